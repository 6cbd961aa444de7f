"""nvcc takes the CUDA sources for every architecture without a warning, no kernel spills registers, vectors stay whole."""

from __future__ import annotations

import functools
import pathlib
import re
import textwrap

import ptx
import pytest
from kernel_resources import (
    ARCHITECTURES,
    BEGIN,
    CUDA,
    END,
    PAGE,
    SOURCES,
    architectures,
    compiled,
    nvcc,
    resources,
    source_of,
)

TWO = pathlib.Path(__file__).with_name("two_kernels.cu")


def compiler_for(architecture: str) -> str:
    compiler = nvcc()
    if compiler is None:
        pytest.skip("no nvcc")
    if architecture not in architectures(compiler):
        pytest.skip(f"no nvcc that knows sm_{architecture}")
    return compiler


def check(source: pathlib.Path, architecture: str) -> set[str]:
    """No spills, vectors as meant; the names of the kernels."""
    found = compiled(compiler_for(architecture), source, architecture)
    registers = {k: row["registers"] for k, row in found.resources.items() if k.startswith("staged")}
    # 544 threads are given as many as 640: there are not more than 96 for each.
    assert all(count <= 96 for count in registers.values()), registers
    spilled = {kernel: row for kernel, row in found.resources.items() if row["spills"] or row["stack"]}
    assert not spilled, spilled
    wrong = {name: faults for name, kernel in found.ptx.items() if (faults := ptx.faults(name, kernel))}
    assert not wrong, wrong
    return set(found.ptx)


def test_two_kernels_compile_as_meant():
    assert check(TWO, "90") == {
        "staged_kernel<__nv_bfloat16, false, true>",
        "held_kernel<__nv_bfloat16>",
    }


@functools.cache
def listed() -> dict[str, set[str]]:
    """Architecture -> kernels of the table in docs/internals/cuda-model.md."""
    table = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    head = re.search(r"^\| kernel \|(.+)$", table, re.MULTILINE)
    assert head is not None
    columns = re.findall(r"sm_(\d+)", head[1])
    rows = [[cell.strip() for cell in row.split("|")[1:]] for row in re.findall(r"^\| `.+$", table, re.MULTILINE)]
    return {a: {row[0].strip("`") for row in rows if row[1 + i].isdigit()} for i, a in enumerate(columns)}


@pytest.mark.slow("minutes of nvcc; two kernels for one architecture stand for them")
@pytest.mark.parametrize("source, architecture", [(s, a) for s, wanted in SOURCES.items() for a in wanted])
def test_kernels_compile_as_meant(source, architecture):
    names = check(CUDA / source, architecture)
    of_source = {name for name in listed()[architecture] if source_of(name) == source}
    assert names == of_source, "make cuda-report"


def test_report_lists_every_architecture():
    assert set(listed()) == set(ARCHITECTURES)
    assert {a for a, kernels in listed().items() if any(name.startswith("staged") for name in kernels)} == {"90", "100"}


def test_resources_reads_the_log_of_ptxas():
    log = """ptxas info    : Compiling entry function '_Zk' for 'sm_90'
ptxas info    : Function properties for _Zk
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size"""
    assert resources(log) == {("_Zk", "90"): {"registers": 64, "shared": 0, "stack": 16, "spills": 12}}


# The reader of PTX, on kernels of a few lines ---------------------------------------------------------------------------

LOAD = "ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];"
FAR, LAST = (LOAD.replace("nc", how) for how in ("cg", "cs"))
STORE = "st.global.cs.v4.u32 [%rd2], {%r1, %r2, %r3, %r4};"
SHARED = "ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r9+16];"
COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1], %r2, [%r3];"
SPLIT = "\n".join(f"st.global.u32 [%rd2+{4 * i}], %r{i};" for i in range(4))


def kernel_of(loop: str, after: str = "") -> ptx.Kernel:
    text = f""".visible .entry _Zk(
    .param .u64 _Zk_param_0
)
{{
    ld.param.u64 %rd1, [_Zk_param_0];
    @%p1 bra $L__BB0_2;
$L__BB0_1:
{textwrap.indent(loop, "    ")}
    @%p2 bra $L__BB0_1;
$L__BB0_2:
{textwrap.indent(after, "    ")}
    ret;
}}
"""
    return ptx.kernels(text)["_Zk"]


BACKWARD, HELD = "block_kernel<float, false, true>", "held_kernel<float>"
FORWARD, STAGED = "tile_kernel<float, true, false>", "staged_kernel<float, false, true>"
FENCE = "membar.gl;"


@pytest.mark.parametrize(
    "name, loop",
    [
        (BACKWARD, [LOAD, STORE]),
        ("general_kernel<double>", ["ld.global.v2.f64 {%fd1, %fd2}, [%rd1];", "st.global.cs.v2.f64 [%rd2+16], {%fd1, %fd2};"]),
        (HELD, ["cp.async.cg.shared.global.L2::cache_hint [%r9], [%rd1], 16, %rd9;", SHARED, FAR, LAST, STORE]),
        (FORWARD, [LOAD]),
        (STAGED, [COPY, SHARED, STORE]),
        (STAGED.replace("true", "false"), [COPY, SHARED]),
        ("scale_kernel<float>", [LOAD, STORE]),
        ("targets_kernel<float>", [LOAD]),
        ("distillation_backward_kernel<float>", [LOAD, STORE]),
        ("finish_kernel<float, false>", ["ld.global.f64 %fd1, [%rd1];", FENCE]),
    ],
)  # fmt: skip
def test_ptx_reader_accepts_whole_vectors_and_misses_each(name, loop):
    assert ptx.faults(name, kernel_of("\n".join(loop))) == []
    if name.startswith("finish"):
        assert ptx.faults(name, kernel_of(loop[0])) == ["no fence between the blocks' sums"]
        return
    for line in loop:
        rest = [other for other in loop if other is not line]
        assert len(ptx.faults(name, kernel_of("\n".join(rest)))) == 1, f"without {line}"
        assert len(ptx.faults(name, kernel_of("\n".join(rest), after=line))) == 1, f"{line} behind the loop"


@pytest.mark.parametrize(
    "stores",
    [
        SPLIT,
        SPLIT.replace("u32", "f32").replace("st.global", "st.global.cs"),
        "\n".join(f"st.global.u32 [%rd2+{4 * i - 32}], %r{i};" for i in range(4)),
        SPLIT.replace(".global", ""),  # an address of which the compiler knows no space
        SPLIT.replace(";\n", ";\nadd.s32 %r9, %r9, 1;\n"),
        "st.global.v2.u32 [%rd2], {%r1, %r2};\nst.global.v2.u32 [%rd2+8], {%r3, %r4};",
        "st.global.f64 [%rd2], %fd1;\nst.global.f64 [%rd2+8], %fd2;",
    ],
)
def test_ptx_reader_refuses_vectors_that_were_split(stores):
    whole = "\n".join([LOAD, STORE])
    found = ptx.faults(BACKWARD, kernel_of(f"{whole}\n{stores}"))
    assert len(found) == 1 and "one vector is stored as" in found[0]
    assert ptx.faults(BACKWARD, kernel_of(whole, after=stores)) == []  # once a row: sums, not a vector


def test_ptx_reader_refuses_loads_that_were_split():
    split = "\n".join(f"ld.shared.u32 %r{i}, [%r9+{4 * i + 64}];" for i in range(4))
    whole = "\n".join([COPY, SHARED, STORE])
    (found,) = ptx.faults(STAGED, kernel_of(f"{whole}\n{split}"))
    assert "one vector is loaded as 4 of 4 bytes" in found
    assert ptx.faults(STAGED, kernel_of(whole, after=split)) == []  # once a row: the sums of a warp
    assert ptx.faults(STAGED, kernel_of(f"{whole}\n{split.replace('%r9', '%r8', 1)}")) == []


def test_ptx_reader_follows_a_loop_to_where_the_compiler_has_put_it():
    """Its second half behind another loop: that one is not in it."""
    text = f""".visible .entry _Zk(
)
{{
$L__BB0_1:
    {LOAD}
    @%p1 bra $L__BB0_5;
    bra.uni $L__BB0_6;
$L__BB0_2:
    @%p2 bra $L__BB0_2;
    {SHARED}
    ret;
$L__BB0_5:
    {STORE}
$L__BB0_6:
    @%p3 bra $L__BB0_1;
    bra.uni $L__BB0_2;
}}
"""
    kernel = ptx.kernels(text)["_Zk"]
    assert ptx.faults(BACKWARD, kernel) == []
    assert "no 16-byte load from shared memory in a loop" in ptx.faults(HELD, kernel)


def test_ptx_reader_knows_scalars_from_the_parts_of_a_vector():
    whole = "\n".join([LOAD, STORE])
    for stores in (
        "st.global.u32 [%rd2], %r1;\nst.global.u32 [%rd3+4], %r2;\nst.global.u32 [%rd2+8], %r3;",
        "st.global.f32 [%rd2], %f1;",
        "st.global.u16 [%rd2], %rs1;\nst.global.u16 [%rd2+2], %rs2;",
        SPLIT.replace("global", "shared"),
        "ld.shared.u32 %r1, [%r9];\nld.shared.u32 %r2, [%r9+8];\nld.shared.u16 %rs1, [%r9+12];",
    ):
        assert ptx.faults(BACKWARD, kernel_of(f"{whole}\n{stores}")) == []


@pytest.mark.parametrize(
    "line, what",
    [
        ("membar.gl;", "a fence of the whole device"),
        ("fence.acq_rel.gpu;", "a fence of the whole device"),
        ("mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r1], %r2;", "drops the first-level cache"),
        ("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1];", "an arrival that is a fence"),
        ("setmaxnreg.dec.sync.aligned.u32 40;", "outside of a role's branch"),
        ("bar.sync 0;", "a barrier of the block or cluster in a loop"),
        ("barrier.cluster.arrive.release;", "a barrier of the block or cluster in a loop"),
    ],
)
def test_ptx_reader_refuses_waits_for_all(line, what):
    loop = "\n".join([COPY, SHARED, STORE])
    (found,) = ptx.faults(STAGED, kernel_of(f"{loop}\n{line}"))
    assert what in found
    behind = ptx.faults(STAGED, kernel_of(loop, after=line))
    assert bool(behind) == ("in a loop" not in what)
    allowed = "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1], %r2;\nmbarrier.arrive.release.cta.shared::cta.b64 %rd9, [%r1];"
    assert ptx.faults(STAGED, kernel_of(f"{loop}\n{allowed}")) == []


def test_ptx_reader_counts_the_loops_over_a_row():
    exponential = "ex2.approx.ftz.f32 %f1, %f2;"
    reduces, writes = [SHARED, exponential, "add.f32 %f3, %f3, %f1;"], [SHARED, exponential, STORE]
    text = kernel_of("\n".join(reduces)).lines[:-2]  # up to the label behind the loop
    other = [line.replace("BB0_1", "BB0_3") for line in kernel_of("\n".join(writes)).lines[6:]]
    kernel = ptx.Kernel("_Zk", [*text, *other])
    assert ptx.row_loops(kernel, writes=True) == (4 / 8, 4 / 8)
    assert ptx.row_loops(kernel, writes=True, element_bytes=4) == (1.0, 1.0)
    assert ptx.row_loops(kernel, writes=False) == (4 / 8, 0)
    for loop, missing in ((reduces, "writes"), (writes, "reduces"), ([exponential], "reduces")):
        with pytest.raises(ValueError, match=f"expected a loop that {missing} rows, found none"):
            ptx.row_loops(kernel_of("\n".join(loop)), writes=True)
