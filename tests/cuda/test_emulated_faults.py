"""Faults planted into copies of the kernels: the checks of the emulated kernels, or a sanitizer, must catch each."""

from __future__ import annotations

import emulated
import pytest
import torch
from emulated_checks import CASES, PLAN_CASES, check_case, check_strides, check_ties

if reason := emulated.why_not():
    pytest.skip(f"the kernels cannot be emulated: {reason}", allow_module_level=True)

FAULTS = {
    "merge_without_barrier": [
        ("cuda/group.cuh", "    __syncthreads();\n    state = RowState<Acc>();", "    state = RowState<Acc>();")
    ],
    "once_without_barrier": [("cuda/group.cuh", "*shared = compute();\n    __syncthreads();", "*shared = compute();")],
    "barrier_in_a_branch": [
        ("cuda/group.cuh", "    __syncthreads();\n    state =", "    if (lane < 16) __syncthreads();\n    state =")
    ],
    "shared_memory_used_twice": [
        ("cuda/group.cuh", "kOnceOffset = 4 * kWarp * sizeof(double)", "kOnceOffset = 0 * kWarp * sizeof(double)"),
        ("cuda/group.cuh", "kSharedBytes = kOnceOffset + 128", "kSharedBytes = 4 * kWarp * sizeof(double) + 128"),
    ],
    "shared_memory_too_small": [
        (
            "cuda/plan.h",
            "plan.threads = block_threads(request.V);\n    plan.shared_bytes = kHeldHeader;",
            "plan.threads = block_threads(request.V);\n    plan.shared_bytes = 16;",
        )
    ],
    "warp_sum_skips_a_step": [
        (
            "cuda/group.cuh",
            "for (int lane = kLanes / 2; lane > 0; lane /= 2) value +=",
            "for (int lane = kLanes / 4; lane > 0; lane /= 2) value +=",
        )
    ],
    "shuffle_mask_without_a_lane": [("cuda/group.cuh", "kAllLanes = 0xffffffffu", "kAllLanes = 0x7fffffffu")],
    "maximum_without_rescale": [
        ("cuda/cross_entropy.cuh", "state.sum = state.sum * scale + pairwise", "state.sum = state.sum + pairwise")
    ],
    "label_in_the_sum": [("cuda/cross_entropy.cuh", "if (i == label_at) z[i] =", "if (false) z[i] =")],
    "label_gradient_missing": [("cuda/cross_entropy.cuh", "if (i == label_at) dz = grad.target;", "")],
    "tail_one_short": [("cuda/element.cuh", "return V - vectors * kWidth;", "return V - vectors * kWidth - 1;")],
    "tail_one_long": [("cuda/element.cuh", "return V - vectors * kWidth;", "return V - vectors * kWidth + 1;")],
    "vectors_not_aligned": [("cuda/element.cuh", "head = static_cast<int64_t>((", "head = 0 * static_cast<int64_t>((")],
    "output_alignment_ignored": [("cuda/element.cuh", "|| in_offset != out_offset ?", "?")],
    "ties_after_the_gradient": [
        (
            "cuda/cross_entropy.cuh",
            "  if (kGeneral && inputs.options.metrics && z_label == state.max) wins = wins_tie(group, x, V, label);\n",
            "",
        ),
        (
            "cuda/cross_entropy.cuh",
            "    write_gradient<kGeneral, kHeld>(group, x, out, label, grad, inputs, held);\n  } else if",
            "    write_gradient<kGeneral, kHeld>(group, x, out, label, grad, inputs, held);\n"
            "    if (z_label == state.max && wins_tie(group, x, V, label) && first) ++total->correct;\n  } else if",
        ),
    ],
    "last_warp_not_added": [("cuda/cross_entropy.cuh", "other < Group::kGroups;", "other < Group::kGroups - 1;")],
    "int32_labels_read_as_int64": [("cuda/cross_entropy.cuh", "return labels.is_int32 ?", "return false ?")],
    "ignored_rows_read": [
        (
            "cuda/cross_entropy.cuh",
            "  return label != inputs.options.ignore_index && label >= 0",
            "  return label >= 0",
        )
    ],
}


# Of the staged kernels and the plans around them: the check that runs, and what is changed.
MERGE = "    barrier_of(blocks);\n    state = RowState<Acc>();"
STAGED_FAULTS = {
    "wait_missing": [
        ("cuda/staged.cuh", "    mbarrier_wait(&shared.full[item % shape.stages], (item / shape.stages) & 1);\n", "")
    ],
    "parity_of_the_phase_before": [("cuda/staged.cuh", "(item / shape.stages) & 1", "(item / shape.stages + 1) & 1")],
    "parity_by_row": [("cuda/staged.cuh", "(item / shape.stages) & 1", "item & 1")],
    "stage_refilled_before_the_gradient": [("cuda/staged.cuh", "kGrad ? item : item + 1", "item + 1")],
    "stage_refilled_before_the_barrier": [
        ("cuda/staged.cuh", MERGE, "    if (first) ring.refill(inputs, item + 1);\n" + MERGE)
    ],
    "stage_of_another_row": [("cuda/staged.cuh", "ring.stage(item)", "ring.stage(item + 1)")],
    "copy_not_of_16_bytes": [("cuda/staged.cuh", "(slice.count) * kVectorBytes;", "(slice.count) * kVectorBytes - 4;")],
    "copy_not_aligned": [("cuda/staged.cuh", "x + slice.index(0), bytes", "x + slice.index(0) + 1, bytes")],
    "copy_of_the_ends": [("cuda/staged.cuh", "x + slice.index(0), bytes", "x, bytes")],
    "expects_too_little": [
        ("cuda/staged.cuh", "mbarrier_expect(barrier, bytes)", "mbarrier_expect(barrier, bytes / 2)")
    ],
    "expects_too_much": [
        ("cuda/staged.cuh", "mbarrier_expect(barrier, bytes)", "mbarrier_expect(barrier, bytes + 16)")
    ],
    "expects_nothing": [("cuda/staged.cuh", "      mbarrier_expect(barrier, bytes);\n", "")],
    "mbarrier_for_two_arrivals": [
        ("cuda/staged.cuh", "mbarrier_init(&shared.full[s], 1)", "mbarrier_init(&shared.full[s], 2)")
    ],
    "mbarriers_not_fenced": [("cuda/staged.cuh", "    mbarrier_init_fence();\n", "")],
    "no_barrier_after_the_start": [("cuda/staged.cuh", "  barrier_of(blocks);  // from here", "  // from here")],
    "cluster_waits_as_blocks": [("cuda/staged.cuh", "    cluster_barrier();\n", "    __syncthreads();\n")],
    "cluster_barrier_in_a_branch": [("cuda/staged.cuh", MERGE, "    if (lane < 16)" + MERGE)],
    "rank_outside_the_cluster": [
        ("cuda/staged.cuh", "if (lane < blocks) cluster_store", "if (lane <= blocks) cluster_store")
    ],
    "sums_to_the_own_block_alone": [("cuda/staged.cuh", "kWarp], lane, state);", "kWarp], rank, state);")],
    "sums_of_two_rows_in_one_place": [("cuda/staged.cuh", "shared.states[item % 2]", "shared.states[0]")],
    "ties_without_a_barrier": [
        ("cuda/staged.cuh", "static_cast<int>(beaten));\n      barrier_of(blocks);", "static_cast<int>(beaten));")
    ],
    "ties_of_one_block": [("cuda/staged.cuh", "wins &= shared.beaten[block] == 0", "wins &= shared.beaten[0] == 0")],
    "gradient_without_a_barrier": [
        (
            "cuda/staged.cuh",
            "      __syncthreads();\n      const RowGrad<Acc> grad =",
            "      const RowGrad<Acc> grad =",
        )
    ],
    "slices_rounded_down": [("cuda/staged.cuh", "(vectors + blocks - 1) / blocks", "vectors / blocks")],
    "ends_in_every_block": [("cuda/staged.cuh", "scalars = rank == blocks - 1 ?", "scalars = true ?")],
    "walk_without_carry": [("cuda/staged.cuh", "if (at.t >= T)", "if (at.t > T)")],
    "ignored_rows_copied": [
        ("cuda/staged.cuh", "      if (!is_item(inputs, row_label(inputs, next.at))) continue;\n", "")
    ],
    "stages_overlap": [
        (
            "cuda/staged.cuh",
            "(item % shape.stages) * shape.stage_bytes",
            "(item % shape.stages) * (shape.stage_bytes / 2)",
        )
    ],
    "stages_over_the_mbarriers": [("cuda/staged.cuh", "dynamic_shared() + kStagedHeader", "dynamic_shared()")],
    "stages_past_the_end": [
        ("cuda/plan.h", "kStagedHeader + plan.stages * plan.stage_bytes", "plan.stages * plan.stage_bytes")
    ],
    "shared_memory_not_asked_for": [
        ("cuda/launch.cuh", "most - static_cast<int>(attributes.sharedSizeBytes)", "48 * 1024")
    ],
    "shared_memory_of_each_launch": [
        (
            "cuda/launch.cuh",
            "  check(cudaLaunchKernelEx(",
            "  if (grid.shared_bytes > 48 * 1024) cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), "
            "cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes));\n"
            "  check(cudaLaunchKernelEx(",
        )
    ],
    "a_cluster_too_many": [("cuda/staged.cu", "std::min(rows, plan.resident)", "std::min(rows, plan.resident + 1)")],
    "a_row_left_out": [
        ("cuda/staged.cuh", "for (; walk.row < rows; walk.advance())", "for (; walk.row < rows - 1; walk.advance())")
    ],
    "label_read_after_the_exchange": [
        (
            "cuda/staged.cuh",
            "finish_row(state, z_label, weights, inputs)",
            "finish_row(state, Element<T>::widen(row_start<T>(inputs.logits, walk.at)[this_label]), weights, inputs)",
        )
    ],
    "store_to_a_block_that_left": [
        (
            "cuda/staged.cuh",
            "    ++item;\n  }\n",
            "    ++item;\n  }\n  if (first) cluster_store(&shared.beaten[0], blocks - 1 - rank, 0);\n",
        )
    ],
    "held_ends_over_the_vectors": [
        ("cuda/cross_entropy.cuh", "held[span.vectors * RowSpan<T>::kWidth + s] = element", "held[s] = element")
    ],
    "held_row_past_the_end": [
        ("cuda/plan.h", "kHeldHeader + round_up(request.V * size, 16)", "round_up(request.V * size, 16)")
    ],
    "packed_mask_of_the_first_group": [("cuda/group.cuh", " << (index() % (kWarp / kLanes) * kLanes)", "")],
    "packed_merges_the_whole_warp": [("cuda/group.cuh", "warp_merge<kGeneral, kLanes>", "warp_merge<kGeneral, kWarp>")],
}


def check_faulty(library, staged: bool = True) -> None:
    backend = emulated.Backend(library)
    cases = {**CASES, **PLAN_CASES, "ignored_class": {"shape": (2, 3, 1030), "ignore_index": 7}}
    for seed in (1, 2):
        backend.seed(seed)
        if staged:
            for plan, name in (
                ("staged:1", "ring"),
                ("staged:2", "ring_all_options"),
                ("staged:4", "ring"),
                ("held", "ring"),
                ("packed", "few_vectors"),
            ):
                with backend.plan(plan, clusters=1):
                    check_case(backend, cases[name], torch.float32)
            with backend.plan("staged:2", clusters=1):
                check_ties(backend, 1500)
                check_case(backend, {"shape": (1, 2, 12003)}, torch.float32)
            continue
        with backend.plan("block"):
            for name in ("block_smallest", "block_metrics", "block_all_options", "ignored_class"):
                check_case(backend, cases[name], torch.float32)
            check_strides(backend, 1500)
            check_ties(backend, 1500)
        for name in ("warp", "warp_all_options"):
            check_case(backend, cases[name], torch.float32)


# One of each kind: a barrier that is missing or not reached by all, shared memory and masks, a wrong sum, alignment; a
# copy not waited for, counted wrongly or too early, a block outside of the cluster, a launch, a row, a race in place.
OF_EACH_KIND = [
    "merge_without_barrier",
    "barrier_in_a_branch",
    "shared_memory_too_small",
    "shuffle_mask_without_a_lane",
    "maximum_without_rescale",
    "vectors_not_aligned",
    "wait_missing",
    "expects_too_little",
    "stage_refilled_before_the_gradient",
    "rank_outside_the_cluster",
    "shared_memory_of_each_launch",
    "a_cluster_too_many",
    "a_row_left_out",
    "label_read_after_the_exchange",
]
GROUPS = 4  # for the workers


def planted():
    for i, fault in enumerate(
        [*OF_EACH_KIND, *(name for name in {**FAULTS, **STAGED_FAULTS} if name not in OF_EACH_KIND)]
    ):
        marks = [pytest.mark.xdist_group(f"emulator-faults-{i % GROUPS}")]
        if fault not in OF_EACH_KIND:
            marks.append(pytest.mark.slow("another fault of its kind is planted in the fast tier"))
        yield pytest.param(fault, marks=marks)


@pytest.mark.parametrize("staged", [False, True], ids=["cross", "staged"])
@pytest.mark.xdist_group("emulator-faults-0")
def test_emulated_accepts_no_fault(staged):
    check_faulty(emulated.build_float(), staged)


def test_planted_faults_change_the_sources():
    for fault, patches in {**FAULTS, **STAGED_FAULTS}.items():
        for name, old, new in patches:
            assert (emulated.KERNELS / name).read_text().count(old) == 1 and old != new, fault


@pytest.mark.parametrize("fault", list(planted()))
def test_emulated_catches_planted_fault(fault):
    staged = fault in STAGED_FAULTS
    patches = tuple({**FAULTS, **STAGED_FAULTS}[fault])
    library = emulated.build_float(patches, staged)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)) as caught:
        check_faulty(library, staged)
    print(f"{fault}: {(str(caught.value).splitlines() or [repr(caught.value)])[0]}")


@pytest.mark.slow("a minute of g++ each; the faults of the fast tier show as values or errors of the emulator")
@pytest.mark.parametrize("sanitizer", emulated.SANITIZERS)
def test_emulated_sanitizer_finds_nothing(sanitizer):
    result = emulated.run_sanitized(sanitizer)
    assert result.returncode == 0, result.stdout + result.stderr


# What the values can miss: whether a race shows in them is chance.
@pytest.mark.slow("a minute of g++ each")
@pytest.mark.parametrize(
    "sanitizer, fault, message",
    [
        ("thread", "sums_of_two_rows_in_one_place", "data race"),
        ("thread", "stage_refilled_before_the_gradient", "data race"),
        ("thread", "label_read_after_the_exchange", "data race"),
        ("address", "tail_one_long", "heap-buffer-overflow"),
    ],
)
def test_emulated_sanitizer_catches_planted_fault(sanitizer, fault, message):
    result = emulated.run_sanitized(sanitizer, tuple({**FAULTS, **STAGED_FAULTS}[fault]))
    assert result.returncode != 0
    assert message in result.stderr
