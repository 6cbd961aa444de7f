"""Faults planted into copies of the kernels: the checks of the emulated kernels, or a sanitizer, must catch each."""

from __future__ import annotations

import os

import emulated
import pytest
import torch
from cases import sample_cases
from emulated_checks import (
    CASES,
    PLAN_CASES,
    check_case,
    check_half,
    check_partly_held,
    check_strides,
    check_ties,
    inputs,
)
from token_checks import check_digits, check_distillation, check_special_rows, check_targets, check_tokens

if reason := emulated.why_not():
    pytest.skip(f"the kernels cannot be emulated: {reason}", allow_module_level=True)

GENERAL, FACTOR, FINISH, TILE, BLOCK = (f"cuda/{name}.cuh" for name in ("general", "factor", "finish", "tile", "block"))
FAULTS = {
    "merge_without_barrier": [
        ("cuda/group.cuh", "    __syncthreads();\n    state = RowState<Acc>();", "    state = RowState<Acc>();")
    ],
    "barrier_in_a_branch": [
        ("cuda/group.cuh", "    __syncthreads();\n    state =", "    if (lane < 16) __syncthreads();\n    state =")
    ],
    "shared_memory_too_small": [
        (
            "cuda/plan.h",
            "plan.threads = block_threads(request.V);\n    plan.shared_bytes = kBlockHeader;",
            "plan.threads = block_threads(request.V);\n    plan.shared_bytes = 16;",
        )
    ],
    "warp_sum_skips_a_step": [
        ("cuda/group.cuh", "value += lane < lanes ? other", "value += lane < lanes && lane > 1 ? other")
    ],
    "shuffle_mask_without_a_lane": [("cuda/group.cuh", "kAllLanes = 0xffffffffu", "kAllLanes = 0x7fffffffu")],
    "maximum_without_rescale": [
        (GENERAL, "state.sum = state.sum * scale + pairwise", "state.sum = state.sum + pairwise")
    ],
    "maximum_without_rescale_plain": [
        ("cuda/slice.cuh", "found.sum = found.sum * scale + pairwise", "found.sum = found.sum + pairwise")
    ],
    "label_in_the_sum": [(GENERAL, "if (i == label_at) z[i] =", "if (false) z[i] =")],
    "label_in_the_sum_plain": [
        ("cuda/slice.cuh", "const int vector = label >= 0 ? label / kWidth : -1;", "const int vector = -1;")
    ],
    "label_at_an_end_in_the_sum": [("cuda/slice.cuh", "kFindsLabel && place == label ?", "false ?")],
    "label_gradient_missing": [(GENERAL, "if (i == label_at) dz = row.target;", "")],
    "label_gradient_missing_plain": [
        (BLOCK, "    out[label] = Element<T>::narrow(factor.target);\n", "    (void)factor;\n")
    ],
    "tail_one_short": [("cuda/element.cuh", "return V - vectors * kWidth;", "return V - vectors * kWidth - 1;")],
    "tail_one_long": [("cuda/element.cuh", "return V - vectors * kWidth;", "return V - vectors * kWidth + 1;")],
    "vectors_not_aligned": [("cuda/element.cuh", "head = static_cast<int64_t>((", "head = 0 * static_cast<int64_t>((")],
    "output_alignment_ignored": [("cuda/element.cuh", "|| in_offset != out_offset ?", "?")],
    "ties_after_the_gradient": [
        (
            GENERAL,
            "    if (inputs.options.metrics && z_label == state.max) wins = wins_tie(group, x, V, label);\n"
            "    if (group.rank() == 0) record_row<true>(args, row, state, z_label, wins);\n"
            "    if (args.argmax != nullptr) write_argmax(group, x, V, label, wins && state.sum == state.sum, args.argmax + row);\n"
            "    if (!args.writes()) return;\n"
            "    group.order();\n"
            "    factor = factors.of(state, z_label, weight);\n",
            "    factor = factors.of(state, z_label, weight);\n"
            "    if (args.writes()) write_gradient(group, x, out, label, factor, args, held);\n"
            "    if (inputs.options.metrics && z_label == state.max) wins = wins_tie(group, x, V, label);\n"
            "    if (group.rank() == 0) record_row<true>(args, row, state, z_label, wins);\n"
            "    return;\n",
        ),
    ],
    "last_warp_not_added": [
        (FINISH, "threadIdx.x < blockDim.x / kWarp) total", "threadIdx.x < blockDim.x / kWarp - 1) total")
    ],
    "blocks_added_by_the_last_but_one": [(FINISH, "== gridDim.x - 1;", "== gridDim.x - 2;")],
    "blocks_counted_without_a_beginning": [("cuda/arguments.cuh", "*args.ended = 0;", "return;")],
    "blocks_left_out": [(FINISH, "i < gridDim.x; i += blockDim.x", "i < gridDim.x - 1; i += blockDim.x")],
    "records_in_one_place": [("cuda/arguments.cuh", "(args.records)[row] = record;", "(args.records)[0] = record;")],
    "sums_of_the_block_not_waited_for": [
        (FINISH, "= total;\n  __syncthreads();\n  if (threadIdx.x < kWarp) {", "= total;\n  if (threadIdx.x < kWarp) {")
    ],
    "int32_labels_read_as_int64": [("cuda/arguments.cuh", "return labels.is_int32 ?", "return false ?")],
    "ignored_rows_read": [
        (
            "cuda/arguments.cuh",
            "  return label != inputs.options.ignore_index && label >= 0",
            "  return label >= 0",
        )
    ],
}


# Of the staged kernels and the plans around them: the check that runs, and what is changed.
STAGED, SLICE = "cuda/staged.cuh", "cuda/slice.cuh"
ROW_IS_HERE = "    mbarrier_wait(&block.shared.full[group.group][turn % 2], (turn / 2) & 1);\n"
ANSWERED = (
    "    if (number >= 2) {\n      mbarrier_wait(&block.shared.answered[place], (number / 2 - 1) & 1);\n"
    "      mbarrier_expect(&block.shared.answered[place], sizeof(unsigned) * block.blocks);\n    }\n"
)
LAST_ANSWERS = (
    "    for (int last = ends - 2; block.blocks > 1 && last < ends; ++last) {\n"
    "      mbarrier_wait(&block.shared.answered[last % 2], (last / 2) & 1);\n    }\n"
)
STAGED_FAULTS = {
    "wait_missing": [(STAGED, ROW_IS_HERE, "")],
    "parity_of_the_phase_before": [(STAGED, ROW_IS_HERE, ROW_IS_HERE.replace("turn / 2", "turn / 2 + 1"))],
    "parity_by_row": [(STAGED, ROW_IS_HERE, ROW_IS_HERE.replace("(turn / 2)", "turn"))],
    "one_mbarrier_for_all_groups": [
        (STAGED, ROW_IS_HERE, ROW_IS_HERE.replace("full[group.group]", "full[0]")),
        (STAGED, "full[number - turn * block.shape.groups][turn % 2]", "full[0][turn % 2]"),
    ],
    "one_mbarrier_for_two_rows_of_a_group": [
        (STAGED, ROW_IS_HERE, ROW_IS_HERE.replace("turn % 2", "0").replace("(turn / 2)", "turn")),
        (STAGED, "full[number - turn * block.shape.groups][turn % 2]", "full[number - turn * block.shape.groups][0]"),
    ],
    "stage_released_before_the_gradient": [
        (STAGED, "    const RowFactor<float> factor =", "    release(here);\n    const RowFactor<float> factor ="),
        (STAGED, "    release(here);\n  }\n}\n\n// kStagedMaxThreads", "  }\n}\n\n// kStagedMaxThreads"),
    ],
    "stage_released_by_lane_0_alone": [
        (
            STAGED,
            "    __syncwarp(kAllLanes);\n    if (group.lane == 0) mbarrier_arrive",
            "    if (group.lane == 0) mbarrier_arrive",
        )
    ],
    "stage_released_twice": [
        (STAGED, "    const RowFactor<float> factor =", "    release(here);\n    const RowFactor<float> factor ="),
    ],
    "stage_not_waited_for": [(STAGED, "    mbarrier_wait(&block.shared.empty[place.stage], place.phase);\n", "")],
    "stage_waited_for_a_lap_early": [(STAGED, "(lap & 1) ^ 1u", "(lap & 1) ^ 0u")],
    "stage_of_another_row": [(STAGED, "T* const stage = block.stage(here);", "T* const stage = block.stage(number);")],
    "row_of_another_stage": [(STAGED, "block.shared.rows[number];", "block.shared.rows[0];")],
    "copy_not_of_16_bytes": [(STAGED, "made.bytes = slice.bytes();", "made.bytes = slice.bytes() - 4;")],
    "copy_not_aligned": [
        (STAGED, "made.from = block.row_in(made.row) + slice.offset;", "made.from = block.row_in(made.row);")
    ],
    "copy_counted_from_the_row": [
        (
            STAGED,
            "made.before = static_cast<unsigned>(slice.offset < 0 ? -slice.offset : 0) * kSize;",
            "made.before = 4;",
        )
    ],
    "expects_too_little": [
        (STAGED, "mbarrier_expect(place.full, errand.bytes);", "mbarrier_expect(place.full, errand.bytes / 2);")
    ],
    "expects_too_much": [
        (STAGED, "mbarrier_expect(place.full, errand.bytes);", "mbarrier_expect(place.full, errand.bytes + 16);")
    ],
    "expects_nothing": [(STAGED, "    mbarrier_expect(place.full, errand.bytes);\n", "")],
    "mbarrier_for_two_arrivals": [
        (STAGED, "mbarrier_init(&shared.full[group][half], 1);", "mbarrier_init(&shared.full[group][half], 2);")
    ],
    "stages_left_by_one_warp": [
        (STAGED, "mbarrier_init(&shared.empty[s], shape.warps);", "mbarrier_init(&shared.empty[s], 1);")
    ],
    "mbarriers_not_fenced": [(STAGED, "    mbarrier_init_fence();\n", "")],
    "no_barrier_after_the_start": [(STAGED, "    cluster_barrier();  // from here", "    // from here")],
    "cluster_waits_as_blocks": [(STAGED, "    cluster_barrier();  // from here", "    __syncthreads();  // from here")],
    "rank_outside_the_cluster": [(STAGED, "} else if (lane < block.blocks) {", "} else if (lane <= block.blocks) {")],
    "sums_to_the_own_block_alone": [(STAGED, "cluster_send(place, lane, mine", "cluster_send(place, block.rank, mine")],
    "sums_of_two_rows_in_one_place": [(STAGED, "(group * 2 + half) * all", "(group * 2) * all")],
    "sums_by_one_mbarrier": [(STAGED, "const int half = exchanges % 2", "const int half = 0")],
    "sums_expected_of_one_block": [
        (STAGED, "static_cast<unsigned>(shape.warps * blocks)", "static_cast<unsigned>(shape.warps)")
    ],
    "sums_not_expected_again": [
        (STAGED, "    if (block.blocks > 1 && thread == 0) mbarrier_expect(summed, block.bytes_of_sums());\n", "")
    ],
    "sums_not_waited_for": [(STAGED, "    mbarrier_wait(summed, phase);\n", "")],
    "half_of_the_warps_added": [
        (
            STAGED,
            "return merged(sums, all < kWarp ? all : kWarp);",
            "return merged(sums, all < kWarp ? all / 2 : kWarp);",
        )
    ],
    "ties_without_an_exchange": [
        (STAGED, "    return __any_sync(kAllLanes, any);", "    return any || sent.beaten != 0;")
    ],
    "ties_of_one_block": [
        (STAGED, "i < block.blocks * block.shape.warps; i += kWarp", "i < block.shape.warps; i += kWarp")
    ],
    "slices_rounded_down": [(SLICE, "(vectors + (1 << shift) - 1) >> shift", "vectors >> shift")],
    "front_in_every_block": [(SLICE, "has_first = first == 0 && head > 0", "has_first = head > 0")],
    "back_left_out": [(SLICE, "back = end < count ?", "back = false ?")],
    "back_as_a_vector": [(SLICE, "end = count - (has_last && count > begin ? 1 : 0)", "end = count")],
    "ignored_rows_copied": [(STAGED, "    if (mail.label < 0) return made;\n", "")],
    "stages_overlap": [
        (
            STAGED,
            "static_cast<size_t>(number) * shape.stage_bytes",
            "static_cast<size_t>(number) * (shape.stage_bytes / 2)",
        )
    ],
    "stages_over_the_sums": [
        (STAGED, "ring(dynamic_shared() + staged.header)", "ring(dynamic_shared() + kStagedHeader)")
    ],
    "stages_over_the_mbarriers": [(STAGED, "ring(dynamic_shared() + staged.header)", "ring(dynamic_shared())")],
    "stages_past_the_end": [
        (
            "cuda/plan.h",
            "plan.shared_bytes = plan.header_bytes + plan.stages * plan.stage_bytes",
            "plan.shared_bytes = plan.stages * plan.stage_bytes",
        )
    ],
    "fewer_stages_than_groups": [
        (
            "cuda/plan.h",
            "const int most = std::min(kMaxStages, 2 * groups.count);",
            "const int most = groups.count - 1;",
        )
    ],
    "label_left_in_its_place": [(STAGED, "      stage[place] = Element<T>::narrow(-INFINITY);\n", "")],
    "label_written_without_a_fence": [(STAGED, "      bulk_load_fence();\n", "")],
    "label_by_another_thread": [(STAGED, "slice.thread_of(place, size) == thread;", "thread == 0;")],
    "staged_label_gradient_missing": [
        (STAGED, "    if (is_owner) {\n      out[row.label] =", "    if (false) {\n      out[row.label] =")
    ],
    "mail_without_an_answer": [(STAGED, ANSWERED, ""), (STAGED, LAST_ANSWERS, "")],
    "mail_not_waited_for": [(STAGED, "    mbarrier_wait(&block.shared.mailed[place], (number / 2) & 1);\n", "")],
    "last_answers_not_waited_for": [(STAGED, LAST_ANSWERS, "")],
    "block_leaves_early": [(STAGED, "  if (block.blocks > 1) cluster_barrier();  // messages", "  // messages")],
    "ticket_of_the_first_rows_again": [(STAGED, "      begin = given + __shfl_sync", "      begin = __shfl_sync")],
    "tickets_not_cleared": [
        ("cuda/staged.cu", "  check(cudaMemsetAsync(tickets, 0, sizeof(unsigned), stream), what);\n", "")
    ],
    "first_rows_of_one_cluster": [(STAGED, "int64_t begin = blockIdx.x / block.blocks * size;", "int64_t begin = 0;")],
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
    "a_row_left_out": [(STAGED, "    while (begin < rows) {", "    while (begin < rows - 1) {")],
}

# Of the kernels that hold a row: in registers, and in shared memory.
HELD_FAULTS = {
    "held_ends_over_the_vectors": [(GENERAL, "held[span.vectors * kWidth + s] = element", "held[s] = element")],
    "held_row_past_the_end": [
        (
            "cuda/plan.h",
            "kHeldHeader + round_up(request.V * size + kVector - size, kVector)",
            "round_up(request.V * size + kVector - size, kVector)",
        )
    ],
    "held_row_not_rounded_out": [
        ("cuda/plan.h", "round_up(request.V * size + kVector - size, kVector)", "request.V * size / kVector * kVector")
    ],
    "merges_of_two_rows_in_one_place": [("cuda/group.cuh", "merges % 2 * (4 * kWarp);", "0 * (4 * kWarp);")],
    "copies_not_waited_for": [(BLOCK, "      copies_wait(parts - 1 - p);\n", "")],
    "copies_waited_for_too_late": [(BLOCK, "copies_wait(parts - 1 - p)", "copies_wait(parts - p)")],
    "copies_not_committed": [(BLOCK, "      copies_commit();\n    }\n  }\n};", "    }\n  }\n};")],
    "copies_of_the_first_row_in_one_batch": [
        (BLOCK, "bring(row, slice, v);\n      copies_commit();", "bring(row, slice, v);")
    ],
    "next_row_over_this_one": [
        (
            BLOCK,
            "        typename Element<T>::Raw raw[kSliceVectors];\n        if (v >=",
            "        for (int k = 0; k < kSliceVectors; ++k) bring(next, after, v + k * size);\n"
            "        typename Element<T>::Raw raw[kSliceVectors];\n        if (v >=",
        ),
        (
            BLOCK,
            "        for (int k = 0; k < kSliceVectors; ++k) {\n          bring(next, after, v + k * size);\n        }\n",
            "        for (int k = 0; k < 0; ++k) {\n        }\n",
        ),
    ],
    "next_row_not_brought_after_an_ignored_one": [
        (BLOCK, "      block.bring_all(next);\n      continue;", "      continue;")
    ],
    "next_row_one_vector_short": [(BLOCK, "slice.count > after.count ? slice.count : after.count", "slice.count")],
    "held_copy_not_aligned": [
        (
            BLOCK,
            "copy_vector(stage + vector * kWidth, row.x + j,",
            "copy_vector(stage + vector * kWidth, row.x + j + 1,",
        )
    ],
    "held_around_the_row_before": [(BLOCK, "if (slice.offset < 0 && owns(0, p))", "if (false)")],
    "held_around_the_row_behind": [(BLOCK, "if (owns(slice.count - 1, p))", "if (false)")],
    "held_label_left_in_its_place": [(BLOCK, "if (owns(place / kWidth, p)) stage[place]", "if (false) stage[place]")],
    "held_label_gradient_missing": [
        (BLOCK, "if ((vector & (block.size - 1)) == block.thread) row.out", "if (false) row.out")
    ],
    "held_vectors_of_other_threads": [
        (
            BLOCK,
            "        thread(static_cast<int>(threadIdx.x)),\n        size",
            "        thread(static_cast<int>(threadIdx.x + 1) % static_cast<int>(blockDim.x)),\n        size",
        ),
        (
            BLOCK,
            "for (int v = p * part + thread; v < (p + 1) * part; v += size) bring",
            "for (int v = p * part + static_cast<int>(threadIdx.x); v < (p + 1) * part; v += size) bring",
        ),
    ],
    "held_ends_not_written": [(BLOCK, "      } else if (v < slice.count) {", "      } else if (false) {")],
    "held_ends_written_around_the_row": [(BLOCK, "if (j + i < 0 || j + i >= V) continue;", "")],
    "held_rows_of_one_block": [(BLOCK, "number += gridDim.x) {", "number += gridDim.x + 1) {")],
    "packed_mask_of_the_first_group": [
        ("cuda/group.cuh", "(kWarp - lanes) << (static_cast<int>(threadIdx.x) % kWarp - rank())", "(kWarp - lanes)")
    ],
    "packed_merges_the_whole_warp": [
        (TILE, "warp_sum(state.sum, kAllLanes, size)", "warp_sum(state.sum, kAllLanes, kWarp)")
    ],
    "tile_label_of_the_first_row": [(TILE, "group.of(my_label, i)", "group.of(my_label, 0)")],
    "tile_label_in_the_sum": [(TILE, "raw[k] = without<T>(raw[k], place % kWidth);", ";")],
    "tile_label_at_an_end_in_the_sum": [(TILE, "slice.end_at(rank + k * size) == place) ends", "false) ends")],
    "tile_label_gradient_missing": [(TILE, "if (is_owner) out[label]", "if (false) out[label]")],
    "tile_ends_left_out": [(TILE, "state.sum += ends[k];", "state.sum += 0.0f;")],
    "tile_row_one_vector_short": [(TILE, "is_read && v < slice.end) raw[k]", "is_read && v < slice.end - 1) raw[k]")],
    "tile_last_row_left_out": [
        (TILE, "for (int i = 0; i < kTileRows; ++i) {", "for (int i = 0; i < kTileRows - 1; ++i) {")
    ],
    "tile_zeros_of_an_ignored_row_missing": [(TILE, "    if (!is_row) continue;", "    if (!is_read) continue;")],
    "tile_row_behind_the_last": [(TILE, "    if (!is_row) continue;", "")],
    "tile_zeros_without_their_ends": [
        (
            "cuda/slice.cuh",
            "for (int end = thread; end < slice.ends(); end += size)",
            "for (int end = thread; end < slice.front; end += size)",
        )
    ],
}

# Of rows that are held in part.
WHOLE_PASS, LAST_PASS = (
    "    for (; v >= held(); v -= step) {\n",
    "        if (v + k * size < slice.end) stream_vector(to + at",
)
PARTLY_FAULTS = {
    "copies_waited_for_as_if_all_were_held": [
        (BLOCK, "copies_wait(parts - 1 - p)", "copies_wait(kHeldParts - 1 - p)")
    ],
    "copies_of_a_pass_not_committed": [
        (BLOCK, "bring(row, slice, v);\n      copies_commit();", "bring(row, slice, v);\n      if (p > 0) copies_commit();")
    ],
    "next_row_brought_before_its_place_is_read": [
        (BLOCK, "    RowState<float> state = group.merge", "    if (slice.count > block.held()) block.bring_all(next);\n    RowState<float> state = group.merge")
    ],
    "partly_held_as_if_all_were_held": [
        ("cuda/launchers.cuh", "if (plan.kernel == Kernel::kHeld) return {kHeldParts,", "if (true) return {kHeldParts,")
    ],
    "a_pass_more_than_is_asked_for": [
        ("cuda/launchers.cuh", "/ kVector / pass), static_cast", "/ kVector / pass) + 1, static_cast")
    ],
    "half_of_the_warps_reduce_the_rest_twice": [(BLOCK, "      if (turn == first) {", "      if (turn == 1 || turn == first) {")],
    "half_of_the_warps_do_not_reduce_the_rest": [(BLOCK, "thread / kWarp % 2;", "thread / kWarp % 2 * 2;")],
    "rest_not_reduced": [(BLOCK, "        reduce_rest<kSliceVectors>(sums, row, slice);\n", "")],
    "rest_reduced_from_the_row": [(BLOCK, "(sums, from, held(), slice.end, thread", "(sums, row.x, held(), slice.end, thread")],
    "rest_without_its_first_vector": [(BLOCK, "(sums, from, held(), slice.end, thread", "(sums, from, held() + 1, slice.end, thread")],
    "rest_label_in_the_sum": [(BLOCK, "slice.end, thread, size, label);", "slice.end, thread, size, -1);")],
    "rest_end_not_reduced": [(BLOCK, "        sums.push_one(i == label ?", "        if (false) sums.push_one(i == label ?")],
    "rest_end_reduced_by_all": [(BLOCK, "slice.end >= held() && (slice.end & (size - 1)) == thread;", "slice.end >= held();")],
    "rest_end_label_in_the_sum": [(BLOCK, "push_one(i == label ? -INFINITY :", "push_one(false ? -INFINITY :")],
    "rest_not_written": [(BLOCK, "      block.template write_rest<kSliceVectors>(row, slice, gradient);\n", "")],
    "rest_end_not_written": [(BLOCK, "        to[i] = Element<T>::narrow(gradient", "        if (false) to[i] = Element<T>::narrow(gradient")],
    "rest_last_pass_not_written": [(BLOCK, LAST_PASS, LAST_PASS.replace("(v +", "(k > 0 && v +"))],
    "rest_last_pass_past_the_row": [(BLOCK, LAST_PASS, LAST_PASS.replace("slice.end", "slice.end + 1"))],
    "rest_first_pass_not_written": [(BLOCK, WHOLE_PASS, WHOLE_PASS.replace("held()", "held() + size"))],
    "rest_written_into_what_is_held": [(BLOCK, WHOLE_PASS, WHOLE_PASS.replace("held()", "0"))],
    "rest_by_other_threads": [
        (BLOCK, "int v = held() + thread + (passes - 1) * step;", "int v = held() + ((thread + 1) & (size - 1)) + (passes - 1) * step;")
    ],
}  # fmt: skip

# Of the loops that 16-bit logits without options take: bfloat16.
HALF_FAULTS = {
    "rounding_of_the_reference_lost": [
        (SLICE, "sum : sum * exp2_flushed(-fmaf(max, kLog2e, -reference));", "sum : sum;")
    ],
    "rounding_of_the_factor_lost": [
        (
            SLICE,
            "factor(row.probability * exp2_flushed(-fmaf(row.high, kLog2e, -reference)))",
            "factor(row.probability)",
        )
    ],
    "large_rest_not_reduced": [(BLOCK, "  block.template reduce_rest<1>(sums, row, slice);\n", "")],
    "large_rest_not_written": [(BLOCK, "  block.template write_rest<1>(row, slice, gradient);\n", "")],
    "sum_without_rescale": [(SLICE, "    sum *= exp2_flushed(reference - raised);\n", "")],
    "large_logits_as_others": [(SLICE, "kLargestFused = 1048576.0f", "kLargestFused = INFINITY")],
    "reference_without_a_bottom": [(SLICE, "return fmaxf(max * kLog2e, kLowestExponent);", "return max * kLog2e;")],
    "rest_of_the_vectors_not_masked": [
        (SLICE, "      raw[k] = lowest_vector<T>();\n", "      raw[k] = typename Element<T>::Raw{};\n")
    ],
    "rest_of_the_vectors_not_written": [
        (SLICE, "if (v + k * size < slice.end) write(v", "if (k == 0 && v + k * size < slice.end) write(v")
    ],
    "label_from_the_probability": [
        (FACTOR, "others = leads_ ? state.sum * e / total_ * unit : state.sum / total_;", "others = Acc(1) - target();")
    ],
    "far_label_underflows": [
        (FACTOR, "const bool is_far = distance > Far<Acc>::kBeyond;", "const bool is_far = false;")
    ],
}
PAIRS = "cuda/pairs.cuh"
# Of what is told of each row, and of rows of two tensors.
TOKEN_FAULTS = {
    "rows_without_a_gradient_computed": [("cuda/arguments.cuh", "  return !(is_zero(grads.loss)", "  return true || !(is_zero(grads.loss)")],
    "gradient_of_lse_lost": [(FACTOR, "factor.probability += grads.nll + grads.lse;", "factor.probability += grads.nll;")],
    "label_of_lse_lost": [(FACTOR, "grads.nll * expm1(-nll) + p * grads.lse;", "grads.nll * expm1(-nll);")],
    "entropy_of_the_row_lost": [(FACTOR, "factor.probability -= grads.entropy * grads.H;", "")],
    "entropy_of_the_label_lost": [(FACTOR, "if (p != 0) factor.target +=", "if (false) factor.target +=")],
    "entropy_of_the_classes_lost": [(GENERAL, "if (row.entropy != 0 && p != 0) dz +=", "if (false) dz +=")],
    "argmax_of_the_label": [(GENERAL, "  if (!wins) {  // the same", "  if (false) {  // the same")],
    "argmax_without_nan": [(GENERAL, "wins && state.sum == state.sum, args.argmax", "wins, args.argmax")],
    "argmax_of_the_last": [("cuda/group.cuh", "at == kNowhere || x > value", "at == kNowhere || x >= value")],
    "argmax_of_ignored_rows": [(FINISH, "args.tokens.argmax[row] = -1;", "{}")],
    "rows_told_without_their_entropy": [(FINISH, "[row] = static_cast<Acc>(found.entropy);", "[row] = 0;")],
    "largest_of_the_first_warp": [("cuda/group.cuh", "lane < size() / kWarp ? shared[lane] : nothing", "lane < 1 ? shared[lane] : nothing")],
    "places_of_sums_not_alternating": [("cuda/group.cuh", "merges % 2 * (4 * kWarp));\n    ++merges;\n    const int lane = rank() % kWarp;\n    if (lane == 0) shared[rank()", "0 * (4 * kWarp));\n    ++merges;\n    const int lane = rank() % kWarp;\n    if (lane == 0) shared[rank()")],
    "pieces_one_short": [(PAIRS, "(V - head + kPiece<Acc> - 1) / kPiece<Acc>", "(V - head) / kPiece<Acc>")],
    "pieces_before_16_bytes_lost": [(PAIRS, "return piece == 0 ? 0 : head", "return piece == 0 ? head : head")],
    "pieces_not_aligned": [(PAIRS, "if (length == kPiece<Acc> && reinterpret_cast<uintptr_t>(x) % kVectorBytes == 0) {\n#pragma unroll\n    for (int i = 0; i < kPiece<Acc>; i += kWidth) {\n      Acc part[kWidth];\n      Element<T>::unpack", "if (length == kPiece<Acc>) {\n#pragma unroll\n    for (int i = 0; i < kPiece<Acc>; i += kWidth) {\n      Acc part[kWidth];\n      Element<T>::unpack")],
    "what_lies_past_a_row_counted": [(PAIRS, "z[i] = i < length ? transform.value(z[i]) :", "z[i] = true ? transform.value(z[i]) :")],
    "lse_not_waited_for": [(PAIRS, "    told()[1] = lse_of(of_t);\n  }\n  __syncthreads();", "    told()[1] = lse_of(of_t);\n  }\n")],
    "low_part_of_lse_lost": [(PAIRS, "return (z - high) + low;", "return z - high;")],
    "mixture_by_the_smaller": [(PAIRS, "const bool teacher_leads = u > 0;", "const bool teacher_leads = u < 0;")],
    "mixture_of_half": [(PAIRS, "(teacher_leads ? Acc(1) - beta : beta) * expm1(-v)", "Acc(0.5) * expm1(-v)")],
    "divergence_not_taken_away": [(PAIRS, "factor * (s * (from_m.student - divergence))", "factor * (s * from_m.student)")],
    "share_of_the_student_lost": [(PAIRS, "beta == 0 || beta == 1 ? Acc(1) : Acc(1) - beta;", "Acc(1);")],
    "temperature_lost": [(PAIRS, "static_cast<Acc>(grad) * share * args.transform.logit_scale;", "static_cast<Acc>(grad) * share;")],
    "excluded_class_is_nan": [(PAIRS, "if (t != 0) of_teacher += t * from_m.teacher;", "of_teacher += t * from_m.teacher;")],
    "label_of_targets_twice": [(PAIRS, "        q[i] = 0;\n", "")],
    "label_of_targets_in_the_sum": [(PAIRS, "z[i] = j + i == label ? lowest : z[i];", "z[i] = z[i];")],
    "z_loss_of_targets_lost": [(PAIRS, "probability = static_cast<Acc>(total + of_lse);", "probability = static_cast<Acc>(total);")],
    "weight_of_targets_lost": [(PAIRS, "if (weight != nullptr) q[i] *= weight[j + i];", "(void)weight;")],
    "ignored_rows_of_a_student_read": [(PAIRS, "  if (!is_item(inputs, label)) {\n    if (!first) return;\n    const bool ignored = label == inputs", "  if (false) {\n    if (!first) return;\n    const bool ignored = label == inputs")],
}  # fmt: skip
# Of the order of memory, which no value shows here.
ORDER_FAULTS = {
    "blocks_added_without_a_fence": [(FINISH, "      __threadfence();  // before the others learn of it\n", "")],
}
KNOWN = {**FAULTS, **STAGED_FAULTS, **HELD_FAULTS, **PARTLY_FAULTS, **HALF_FAULTS, **TOKEN_FAULTS}


def check_all_tokens(backend) -> None:
    for V in (40, 1500):
        check_special_rows(backend, torch.bfloat16, V)
    for number, case in enumerate(sample_cases(torch.bfloat16, large=False)):
        check_tokens(backend, case, 10 * number)
    check_digits(backend)
    for beta in (0.0, 0.1, 1.0):
        check_distillation(backend, torch.bfloat16, beta)
        check_distillation(backend, torch.float64, beta)
    for dtype in (torch.bfloat16, torch.float32):
        check_targets(backend, dtype, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 15.0, "logit_scale": 1.5})


def check_faulty(library, kind: str = "staged") -> None:
    backend = emulated.Backend(library)
    cases = {**CASES, **PLAN_CASES, "ignored_class": {"shape": (2, 3, 1030), "ignore_index": 7}}
    for seed in (1, 2):
        backend.seed(seed)
        if kind == "half":
            check_half(backend)
            continue
        if kind == "tokens":
            check_all_tokens(backend)
            continue
        if kind == "partly":
            check_partly_held(backend, torch.float32)
            continue
        if kind == "held":
            for plan, name in (
                ("held", "ring"),
                ("held", "ring_metrics_ignored"),
                ("held", "many_ignored"),
                ("held", "few_vectors"),
                ("packed", "few_vectors"),
                ("packed", "many_ignored"),
                ("warp", "many_ignored"),
            ):
                with backend.plan(plan, clusters=1):
                    check_case(backend, {**cases[name], "metrics": name == "ring_metrics_ignored"}, torch.float32)
            with backend.plan("packed"):
                check_case(backend, cases["few_vectors"], torch.float32)  # with metrics
            with backend.plan("held", clusters=1):
                check_case(backend, cases["ring_all_options"], torch.float32)
            with backend.plan("held", clusters=2):  # of 513 vectors, and of 514 by the other rows' alignment
                check_case(backend, {"shape": (1, 9, 2051), "offset": 1, "ignored": 0.0}, torch.float32)
            continue
        if kind == "staged":
            for plan, name in (
                ("staged:1", "ring"),
                ("staged:2", "ring_all_options"),
                ("staged:4", "ring"),
                ("staged:2", "many_ignored"),
            ):
                with backend.plan(plan, clusters=1):
                    check_case(backend, cases[name], torch.float32)
            with backend.plan("staged:2", clusters=1):
                check_ties(backend, 1500)
                check_case(backend, {"shape": (1, 2, 12003)}, torch.float32)
            logits, labels, *_ = inputs(cases["many_ignored"], torch.float32)
            with backend.plan("staged:2", clusters=1):
                backend.bulk_copies()
                backend.forward_with_grad(logits, labels)
                assert backend.bulk_copies() == 2 * (labels >= 0).sum()  # an ignored row is not read
            with backend.plan("staged:1", clusters=2):
                check_case(backend, cases["many_rows"], torch.float32)
                logits, labels, *_ = inputs(cases["many_rows"], torch.float32)
                nll = backend.forward(logits, labels)["nll"].clone()
                for warp in (0, 8):  # of a group, the one that brings rows
                    with backend.starving(warp):
                        assert torch.equal(backend.forward(logits, labels)["nll"], nll)
            continue
        with backend.plan("block"):
            for name in ("block_smallest", "block_metrics", "block_all_options", "ignored_class"):
                check_case(backend, cases[name], torch.float32)
            check_strides(backend, 1500)
            check_ties(backend, 1500)
        for name in ("warp", "warp_all_options", "many_rows"):
            check_case(backend, cases[name], torch.float32)


# One of each kind: a barrier that is missing or not reached by all, shared memory and masks, a wrong sum, alignment; a
# copy not waited for, counted wrongly or too early, a block outside of the cluster, the blocks that finish rows, a thread's
# own copies, a row in registers, one held in part, a launch, a row, a race in place.
OF_EACH_KIND = [
    "merge_without_barrier",
    "barrier_in_a_branch",
    "shared_memory_too_small",
    "shuffle_mask_without_a_lane",
    "maximum_without_rescale",
    "vectors_not_aligned",
    "wait_missing",
    "expects_too_little",
    "stage_released_before_the_gradient",
    "mail_without_an_answer",
    "label_written_without_a_fence",
    "rounding_of_the_factor_lost",
    "rank_outside_the_cluster",
    "blocks_counted_without_a_beginning",
    "copies_not_waited_for",
    "next_row_over_this_one",
    "tile_label_in_the_sum",
    "copies_waited_for_as_if_all_were_held",
    "rest_label_in_the_sum",
    "shared_memory_of_each_launch",
    "a_cluster_too_many",
    "a_row_left_out",
    "rows_without_a_gradient_computed",
    "argmax_of_the_last",
    "entropy_of_the_classes_lost",
    "pieces_not_aligned",
    "lse_not_waited_for",
]
ELEMENT = {"half": "__nv_bfloat16", "tokens": "__nv_bfloat16"}
GROUPS = 4  # for the workers
ALL = "ACCUMLOSS_TEST_ALL_FAULTS" in os.environ
SAMPLE = 3  # of those that the fast tier leaves out one in so many is planted in the slow one; `make faults` plants all


def planted():
    for i, fault in enumerate([*OF_EACH_KIND, *(name for name in KNOWN if name not in OF_EACH_KIND)]):
        marks = [pytest.mark.xdist_group(f"emulator-faults-{i % GROUPS}")]
        if fault not in OF_EACH_KIND:
            if i % SAMPLE and not ALL:
                continue
            marks.append(pytest.mark.slow("another fault of its kind is planted in the fast tier"))
        yield pytest.param(fault, marks=marks)


@pytest.mark.parametrize("kind", ["cross", "staged", "held", "partly", "half", "tokens"])
@pytest.mark.xdist_group("emulator-faults-0")
def test_emulated_accepts_no_fault(kind):
    check_faulty(emulated.build_one(element=ELEMENT.get(kind, "float")), kind)


def test_planted_faults_change_the_sources():
    for fault, patches in {**KNOWN, **ORDER_FAULTS}.items():
        for name, old, new in patches:
            assert (emulated.KERNELS / name).read_text().count(old) == 1 and old != new, fault


@pytest.mark.parametrize("fault", list(planted()))
def test_emulated_catches_planted_fault(fault):
    known = {"cross": FAULTS, "staged": STAGED_FAULTS, "held": HELD_FAULTS, "partly": PARTLY_FAULTS}
    known |= {"half": HALF_FAULTS, "tokens": TOKEN_FAULTS}
    kind = next(kind for kind, faults in known.items() if fault in faults)
    element = ELEMENT.get(kind, "float")
    library = emulated.build_one(
        tuple(KNOWN[fault]), staged=kind in ("staged", "half"), element=element, pairs=kind == "tokens"
    )
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)) as caught:
        check_faulty(library, kind)
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
        ("thread", "stage_released_before_the_gradient", "data race"),
        ("thread", "sums_not_waited_for", "data race"),
        ("thread", "blocks_added_without_a_fence", "data race"),
        ("address", "tail_one_long", "heap-buffer-overflow"),
    ],
)
def test_emulated_sanitizer_catches_planted_fault(sanitizer, fault, message):
    result = emulated.run_sanitized(sanitizer, tuple({**KNOWN, **ORDER_FAULTS}[fault]))
    assert result.returncode != 0
    assert message in result.stderr
