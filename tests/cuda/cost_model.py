"""What a kernel can reach, before a GPU says it. ``make cuda-report`` prints it into docs/internals/cuda-model.md.

Instructions, bytes and waits are read off the machine code, the rates of the chips are published ones, and none is
fitted. The time of a row on a multiprocessor is at least

  memory  what the chip copies meanwhile,
  issue   all instructions of the row, at four warps a clock,
  exp     its exponentials, at the rate of the special function units,
  chain   what happens one after the other: the loops at full issue and the waits between them, divided by the rows
          that are in work at once,
  producer  what the warp does that brings the rows,
  gap     where a multiprocessor has one row at a time, what it copies and, one after the other, for how long it cannot.

The share of the copy is the time of a copy / the largest: a row that is read twice reaches two thirds at most. What it
leaves out: conflicts, tails of loops, the start and the end of a launch; PESSIMISTIC stands for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import sass

# LUO: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499, H100.
# JIA: Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", arXiv 1804.06826.
# GUIDE: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions".
# Bandwidths, clocks, multiprocessors and the size of the L2 are those of NVIDIA's data sheets.
# HALVES: "NVIDIA A100 Tensor Core GPU Architecture": "The L2 cache is divided into two partitions [...]. Each L2 partition
# localizes and caches data for memory accesses from SMs in the GPCs directly connected to the partition." H100 likewise.


class Chip(NamedTuple):
    name: str
    capability: int
    multiprocessors: int
    ghz: float  # boost
    gigabytes: float  # a second
    fp64: float  # results a clock and multiprocessor (GUIDE)
    cache: float  # MiB of L2
    halves: bool  # whether it is two partitions, each for its own multiprocessors (HALVES)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", 80, 108, 1.41, 2039, 32, 40, True),
        Chip("RTX 4090", 89, 128, 2.52, 1008, 2, 72, False),
        Chip("H100", 90, 132, 1.98, 3352, 64, 50, True),
        Chip("H200", 90, 132, 1.98, 4800, 64, 50, True),
        Chip("B200", 100, 148, 1.92, 8000, 64, 126, True),
        Chip("RTX 5090", 120, 170, 2.41, 1792, 2, 96, False),
    )
}
WARP = 32
HELPERS = 32  # threads of a staged block that share no row
LANES = 128  # of a multiprocessor: four warps issue an instruction a clock
EXPONENTIALS = 16  # a clock and multiprocessor (GUIDE)


class Parameters(NamedTuple):
    """What is assumed of every chip."""

    copy: float  # of the data sheet's bandwidth, what a copy reaches. Less would flatter every kernel
    issue: float  # of the issue slots, what can be used
    exp: float  # of the special function units
    waits: float  # latencies, times those of an idle chip
    drains: bool  # whether the L2 goes on writing back what it has while nothing is read
    halves: float  # of an L2 of two partitions, what has a place of its own


NOMINAL = Parameters(copy=0.9, issue=1.0, exp=1.0, waits=1.0, drains=True, halves=1.0)
# Half of what a multiprocessor reads is of the other partition's memory, and may have a place in both: three for two.
PESSIMISTIC = Parameters(copy=0.9, issue=0.8, exp=0.85, waits=1.5, drains=False, halves=2 / 3)

DEVICE_MEMORY = 479.0  # clocks (LUO)
# Clocks until a result is there, by operation or its beginning. "" is of all others that take an unknown time: special
# functions, conversions, shuffles, shared memory.
LATENCY = {
    "LDG": 263.0,  # of the L2 (LUO): labels, whose lines other rows have brought, and what every row reads
    "ATOMG": 263.0,
    "LD": 41.0,  # of parameters, from the L1 (LUO)
    "LDC": 27.0,  # (JIA)
    "LDS": 29.0,  # (LUO)
    "UCGABAR_WAIT": 180.0,  # between multiprocessors of a cluster (LUO)
    "STAS": 180.0,
    "MEMBAR.ALL.GPU": 263.0,  # until stores have reached the L2
    "MEMBAR.SC.GPU": 263.0,
    "BAR": 29.0,
    "": 23.0,  # (JIA: shuffles 22 to 25, special functions less)
}


class Work(NamedTuple):
    """What one row costs."""

    per_element: float  # instructions of the loops over the elements
    exp_per_element: float
    every_warp: int  # instructions of a row in each warp, outside of those loops
    first_warp: int  # and in the first warp beyond that
    clocks: float  # of the first warp, outside of the loops
    fp64: int  # instructions of the first warp
    producer: float = 0.0  # clocks of the warp that brings the rows, where there is one
    operations: frozenset[str] = frozenset()  # of every warp
    exp_of_warp: int = 0  # exponentials of a row that are not in those loops, in each lane
    rest_per_element: float = 0.0  # of what is not held, where a row is held in part; as the two above
    rest_exp_per_element: float = 0.0


def _with_calls(kernel: sass.Kernel, blocks: Iterable[int]) -> list[sass.Instruction]:
    """The instructions, and after each call those of the function: the shortest way that passes its largest piece of
    double precision, which options that are off do not lengthen and a row that is none does not cut short."""
    found = []
    for instruction in kernel.body.instructions(blocks):
        found.append(instruction)
        called = kernel.functions.get(instruction.target or "")
        if called is not None and _is_double(kernel, instruction):
            doubles = [sum(sass.kind(i) == "fp64" for i in block) for block in called.blocks]
            densest = doubles.index(max(doubles))
            found += called.instructions(called.path(0, [densest] if densest else [], None))
    return found


def _is_double(kernel: sass.Kernel, instruction: sass.Instruction) -> bool:
    """Whether it calls a function of the sources that computes in double, which one thread does for the others. Not one
    of the compiler's, such as a division's, nor what only a rare row needs."""
    called = kernel.functions.get(instruction.target or "")
    is_ours = instruction.name == "CALL" and called is not None and "$_Z" in called.name
    return is_ours and any(sass.kind(i) == "fp64" for block in called.blocks for i in block)


ROWS_OF_TILE = 4  # kTileRows


TILE_VECTORS = 4  # of a lane: kTileVectors


def tile_work(kernel: sass.Kernel, vectors: int = TILE_VECTORS, element_bytes: int = 2) -> tuple[Work, sass.Loop]:
    """What one row costs a tile kernel, whose lanes have all of it in registers, that many vectors each: a pass of its
    loop over rows, and a row's share of what is read of some rows before. And the loop."""
    body = kernel.body
    loop = sass.row_pass(kernel, element_bytes, vectors)
    inside = body.loops()[loop.head]
    way = body.path(0, [loop.head], None)
    before = [b for b in way[: way.index(loop.head)] if b not in inside]
    head, row = body.instructions(before), body.instructions(loop.path)
    clocks = sass.clocks(row, LATENCY) + sass.clocks(head, LATENCY) / ROWS_OF_TILE
    every = len(row) + -(-len(head) // ROWS_OF_TILE)
    fp64 = sum(sass.kind(i) == "fp64" for i in row)
    return Work(0.0, 0.0, every, 0, clocks, fp64, 0.0, frozenset(i.name for i in row), loop.kinds["exp"]), loop


def work(
    kernel: sass.Kernel,
    writes: bool,
    element_bytes: int = 2,
    cluster: bool = False,
    loads: str | None = None,
    rest: bool = False,
) -> Work:
    """What one row costs.

    The way of a warp through a row is the shortest one, in instructions, that passes the loops over the elements; that
    of the first warp also passes what calls a function that computes in double, or starts a copy. Where the kernel has no loop over
    rows, the way leads from its beginning to its end.

    Args:
        writes: whether the kernel writes gradients.
        cluster: whether the way passes what the blocks of a cluster exchange, or not.
        loads: of the loops that load from there alone, "LDS" or "LDG"; None: of all.
        rest: whether the way also passes the loops over the rest of a row, which load from global memory.
    """
    reduce, write = sass.row_loops(kernel, element_bytes, writes, loads)
    of_rest = [loop for loop in sass.row_loops(kernel, element_bytes, writes, "LDG") if loop] if rest else []
    body = kernel.body
    every_loop = [loop for loop in (reduce, write, *of_rest) if loop]
    heads = [loop.head for loop in every_loop]
    inside = {block for loop in every_loop for block in loop.path}
    reached = {block: body.reached(block, None) for block in range(len(body.blocks))}
    # The loop over the rows: all from which and to which a way leads. It is entered at one block.
    rows = {b for b in reached if all(b in reached[head] and head in reached[b] for head in heads)}
    loops = body.loops()
    around = not rows <= set().union(*(loops[head] for head in heads))
    start = min(b for b in rows if any(b in body.after[o] for o in reached.keys() - rows)) if around else 0
    end = start if around else None
    outside = (rows if around else reached.keys()) - inside
    once = [b for b in outside if any(i.name == "UBLKCP" or _is_double(kernel, i) for i in body.blocks[b])]
    exchanges = [b for b in outside if any(i.name in ("UCGABAR_WAIT", "STAS") for i in body.blocks[b])]
    later = {block: body.reached(block, start) for block in (*heads, *once, *exchanges)}

    def is_of_rows(block: int) -> bool:
        """Whether a way through the loops passes it; else it is for rows that are ignored."""
        return all(block in later[head] or head in later[block] for head in heads)

    once = [block for block in once if is_of_rows(block)]
    common = [*heads, *sorted(filter(is_of_rows, exchanges), key=lambda b: -len(later[b]))[: int(cluster)]]  # one
    without = frozenset() if cluster else frozenset(exchanges)

    def way(through: list[int]) -> list[sass.Instruction]:
        path = body.path(start, sorted(through, key=lambda b: -len(later[b].intersection(through) - {b})), end, without)
        if not set(heads) <= set(path):
            raise ValueError(f"cost_model: {body.name}: expected a way through the loops over a row, found none")
        return _with_calls(kernel, [b for b in (path[:-1] if around else path) if b not in inside])

    every, first = way(common), way([*common, *once])
    return Work(
        sum(loop.per_element() for loop in (reduce, write) if loop),
        sum(loop.per_element("exp") for loop in (reduce, write) if loop),
        len(every),
        len(first) - len(every),
        sass.clocks(first, LATENCY),
        sum(sass.kind(i) == "fp64" for i in first),
        0.0 if once else _producer(body, cluster),
        frozenset(i.name for i in every),
        rest_per_element=sum(loop.per_element() for loop in of_rest),
        rest_exp_per_element=sum(loop.per_element("exp") for loop in of_rest),
    )


ROWS_OF_TICKET = 8  # kMostRowsOfTicket


def _producer(body: sass.Function, cluster: bool) -> float:
    """Clocks of a row of the warp that brings the rows: of the smallest loop with a bulk copy in it, and a row's share of
    the loop around that one, which looks at some rows at once. 0: the kernel has none."""
    copies = {b for b, block in enumerate(body.blocks) if any(i.name == "UBLKCP" for i in block)}
    others = {b for b, block in enumerate(body.blocks) if any(i.name == "STAS" for i in block)}
    loops = body.loops()
    found: list[float] = []
    for _, head in sorted((len(blocks), head) for head, blocks in loops.items() if len(blocks) > 1 and copies & blocks):
        told = others & loops[head]
        if cluster and not told:
            continue
        ways = []
        for copy in copies & loops[head]:
            through = [block for block in (*sorted(told)[: int(cluster)], copy) if block != head]
            try:
                path = body.path(head, through, head, frozenset() if cluster else frozenset(told))
            except ValueError:
                continue
            if copy in path:
                ways.append(sass.clocks(body.instructions(path[:-1]), LATENCY))
        if ways:
            found.append(min(ways))
        if len(found) == 2:
            break
    if not found:
        return 0.0
    return found[0] + max(0.0, found[-1] - found[0]) / ROWS_OF_TICKET


PARTS = 8  # of a held row: HeldBlock::kParts


class Shape(NamedTuple):
    """How rows lie on a multiprocessor."""

    elements: int  # of a row and block
    warps: float  # that share a row in a block
    rows: float  # in work at once
    bytes_per_element: float  # read and written
    copied: float  # bytes an element of a copy, or of a read where nothing is written
    used: int  # multiprocessors
    on_chip: bool  # whether a row is there when it is begun
    waves: int = 1  # of a grid that was meant to be one
    rest: float = 0.0  # of a row that is held in part, the share that is not
    # Share of a row whose loops nothing is read meanwhile, where it is alone: of a held one, its last part's and its first.
    alone: float = 1 / PARTS


class Bounds(NamedTuple):
    """Clocks of a row on a multiprocessor."""

    memory: float
    issue: float
    exp: float
    chain: float
    producer: float = 0.0
    gap: float = 0.0
    copy: float | None = None  # of a copy of the row, where it moves less than the kernel

    @property
    def share(self) -> float:
        return (self.memory if self.copy is None else self.copy) / max(self[:6])

    @property
    def tightest(self) -> str:
        return max(zip(self[:6], self._fields, strict=False))[1]


def bounds(work: Work, chip: Chip, shape: Shape, parameters: Parameters = NOMINAL) -> Bounds:
    per_clock = parameters.copy * chip.gigabytes / shape.used / chip.ghz  # bytes, of a multiprocessor
    per_element = work.per_element * (1 - shape.rest) + work.rest_per_element * shape.rest
    exp_per_element = work.exp_per_element * (1 - shape.rest) + work.rest_exp_per_element * shape.rest
    issued = per_element * shape.elements + WARP * (work.every_warp * shape.warps + work.first_warp)
    issue = max(issued / LANES, WARP * work.fp64 / chip.fp64) / parameters.issue
    exponentials = exp_per_element * shape.elements + WARP * work.exp_of_warp * shape.warps
    exp = exponentials / EXPONENTIALS / parameters.exp
    alone = max(1.0, LANES / WARP / shape.warps)  # fewer than four warps do not fill the issue slots
    chain = per_element * shape.elements / LANES * alone / parameters.issue + work.clocks * parameters.waits
    if not shape.on_chip:
        chain += DEVICE_MEMORY * parameters.waits
    memory = shape.bytes_per_element * shape.elements / per_clock
    gap = 0.0
    if shape.rows <= 1 and not shape.on_chip:
        # From the last logit's arrival to the first of the next row: a part of the loops, what is between them, the way.
        stands_still = (
            per_element * shape.elements / LANES * shape.alone + (work.clocks + DEVICE_MEMORY) * parameters.waits
        )
        gap = (memory / 2 if parameters.drains else memory) + stands_still
    copy = shape.copied * shape.elements / per_clock
    found = Bounds(memory, issue, exp, chain / shape.rows, work.producer * parameters.waits, gap, copy)
    if shape.waves > 1:  # nothing overlaps a wave that waits for another to end
        found = Bounds(memory, *(shape.waves * max(found[:6]),) * 5, copy)
    return found


class Kernel(NamedTuple):
    """A kernel of the report, bf16 without options."""

    name: str  # of the plan
    call: str  # of accumloss.plan
    entry: str
    source: str


KERNELS = (
    Kernel("staged", "with_grad", "staged_kernel<__nv_bfloat16, false, true>", "staged.cu"),
    Kernel("staged", "forward", "staged_kernel<__nv_bfloat16, false, false>", "staged.cu"),
    Kernel("held", "with_grad", "held_kernel<__nv_bfloat16>", "cross_entropy.cu"),
    Kernel("partly_held", "with_grad", "held_kernel<__nv_bfloat16>", "cross_entropy.cu"),
    Kernel("block", "with_grad", "block_kernel<__nv_bfloat16, true, true>", "cross_entropy.cu"),
    Kernel("block", "forward", "block_kernel<__nv_bfloat16, true, false>", "cross_entropy.cu"),
    Kernel("tile", "with_grad", "tile_kernel<__nv_bfloat16, true, true>", "cross_entropy.cu"),
    Kernel("tile", "forward", "tile_kernel<__nv_bfloat16, true, false>", "cross_entropy.cu"),
)
ARCHITECTURES = ("80", "90", "100")
# Whose machine code stands for a chip's own: the same instructions, other rates.
CODE_OF = {80: "80", 89: "80", 90: "90", 100: "100", 120: "100"}
CLASSES = (64, 256, 1000, 4096, 8192, 16384, 32000, 50257, 128256, 151936, 262144)

# The kernels of commit 0a07c1f on sm_90, by sass.py. Kept as numbers: they are what the model is checked with.
BEFORE = {
    "staged": Work(28.25, 2.0625, 298, 530, 4184.0, 104),
    "staged, cluster": Work(28.25, 2.0625, 305, 530, 4382.0, 104),
    "staged, forward": Work(14.625, 1.0625, 270, 383, 3128.0, 49),
    "held": Work(29.375, 2.0625, 300, 388, 4165.0, 108),
    "warp": Work(47.75, 2.125, 627, 0, 3639.0, 109),
}


# What a reading of that code by hand had estimated for it.
BY_HAND = dict(zip(CLASSES[2:], (0.50, 0.68, 0.37, 0.55, 0.73, 0.60, 0.34, 0.36, 0.33), strict=True))
BY_HAND_FORWARD = 0.62


def before(V: int, forward: bool = False) -> Bounds:
    """Of commit 0a07c1f on an H200: blocks of 512 threads with one row each, and a grid of 132 / cluster clusters, of
    which fewer than that run at once where a cluster has four blocks or eight."""
    chip = CHIPS["H200"]
    if V <= 1024:
        return bounds(BEFORE["warp"], chip, Shape(V, 1, 16, 4, 4, 132, on_chip=False))
    if V <= 4096:
        return bounds(BEFORE["held"], chip, Shape(V, 8, 4, 4, 4, 132, on_chip=False))
    cluster = 1 if V <= 37000 else 2 if V <= 75000 else 4 if V <= 152000 else 8
    name = "staged, forward" if forward else "staged, cluster" if cluster > 1 else "staged"
    waves = 2 if cluster >= 4 else 1
    moved = 2 if forward else 4
    return bounds(BEFORE[name], chip, Shape(V // cluster, 16, 1, moved, moved, 132, on_chip=True, waves=waves))


def tile_of(vectors: int) -> str:
    return f"tile, {vectors} vectors a lane"


def kernel_of(plan, V: int) -> str:
    """Which of works() a plan is served by."""
    if plan.kernel in ("packed", "warp"):
        return tile_of(-(-V // (256 // plan.groups * 8)))
    return plan.kernel


HELD_HEADER = 1024  # kHeldHeader
HELD_PASS = 64  # bytes of a thread: pass_bytes()
ELEMENT = 2  # bytes, bf16


def bytes_per_element(plan, chip: Chip, V: int, call: str = "with_grad", parameters: Parameters = NOMINAL) -> float:
    """Of device memory, read and written; of what is read again, what the L2 has not.

    What a partly held row reads again is read backwards: of what is too much for the L2 only that is missed. The block
    kernel reads it from its beginning, which the L2 has given away by then.
    """
    cache = chip.cache * (1 << 20) * (parameters.halves if chip.halves else 1.0)
    row = float(V * ELEMENT)
    if plan.kernel == "block" and call == "with_grad":
        return ELEMENT * (3.0 if plan.resident * row > cache else 2.0)
    if plan.kernel == "partly_held":
        rest = max(0.0, row - (plan.shared_bytes - HELD_HEADER))
        return ELEMENT * (2.0 + max(0.0, rest - cache / plan.resident) / row)
    return plan.bytes_per_element


def shape_of(plan, chip: Chip, V: int, call: str = "with_grad", parameters: Parameters = NOMINAL) -> Shape:
    """How the rows of a plan lie on a chip.

    Args:
        plan: accumloss.plan(V, arch=chip.name, call=call).
    """
    rest, alone = 0.0, 1 / PARTS
    if plan.kernel == "partly_held":
        held = plan.shared_bytes - HELD_HEADER
        rest = max(0.0, 1 - held / (V * ELEMENT))
        # Some warps read the rest first, some last: nothing is read while the last pass is reduced and the first written.
        alone = min(1.0, plan.threads * HELD_PASS / (V * ELEMENT))
    blocks = max(1, plan.resident * plan.cluster // chip.multiprocessors)
    threads = plan.threads - HELPERS if plan.kernel == "staged" else plan.threads
    lanes = threads // plan.groups  # that share a row
    return Shape(
        elements=-(-V // plan.cluster),
        warps=lanes / WARP,
        rows=blocks * threads / lanes,
        bytes_per_element=bytes_per_element(plan, chip, V, call, parameters),
        copied=2.0 if call == "forward" else 4.0,
        used=min(chip.multiprocessors, plan.resident * plan.cluster),
        on_chip=plan.kernel == "staged",
        rest=rest,
        alone=alone,
    )


def works(compiled_of) -> dict[tuple[str, str, str, bool], tuple[Work, sass.Loop, sass.Loop | None]]:
    """(architecture, plan's kernel, call, cluster) -> what a row costs, and its loops.

    Args:
        compiled_of: (source, architecture) -> kernel_resources.Compiled, or None where it is not compiled for that.
    """
    found = {}
    for architecture in ARCHITECTURES:
        codes: dict[str, dict[str, sass.Kernel]] = {}
        for kernel in KERNELS:
            made = compiled_of(kernel.source, architecture)
            if made is None:
                continue
            if kernel.source not in codes:
                codes[kernel.source] = made.sass()
            code, writes = codes[kernel.source][kernel.entry], kernel.call == "with_grad"
            if kernel.name == "tile":
                for vectors in range(1, TILE_VECTORS + 1):
                    tile, loop = tile_work(code, vectors)
                    found[architecture, tile_of(vectors), kernel.call, False] = tile, loop, None
                continue
            if kernel.name == "partly_held":
                row = work(code, writes, loads="LDS", rest=True)
                found[architecture, kernel.name, kernel.call, False] = row, *sass.row_loops(code, 2, writes, "LDG")
                continue
            loads = "LDS" if kernel.name == "held" else None
            for cluster in (False, True) if kernel.name == "staged" else (False,):
                row = work(code, writes, cluster=cluster, loads=loads)
                found[architecture, kernel.name, kernel.call, cluster] = row, *sass.row_loops(code, 2, writes, loads)
    return found


LOOP_KINDS = ("exp", "fp32", "alu", "integer multiply", "convert", "shared", "global", "constant", "control", "fp64")


def _loops_table(found) -> list[str]:
    head = ["kernel, sm", "loop", "instructions an element", *LOOP_KINDS, "accesses of a pass (bytes of a lane)"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (1 + len(LOOP_KINDS)) + "---|"]
    for (architecture, name, call, cluster), (_, reduce, write) in found.items():
        if cluster:
            continue
        for loop, of in ((reduce, "a row" if name.startswith("tile") else "reduces"), (write, "writes")):
            if loop is None:
                continue
            numbers = [f"{loop.per_element():.2f}", *(f"{loop.per_element(kind):.2f}" for kind in LOOP_KINDS)]
            accesses = ", ".join(f"{count} {which} ({size})" for (which, size), count in sorted(loop.accesses.items()))
            cells = [f"{name}, {call}, {architecture}", of, *numbers, accesses]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _rows_table(found, registers) -> list[str]:
    head = [
        "kernel, sm",
        "registers",
        "instructions of every warp",
        "of the first beyond",
        "fp64",
        "clocks of the first",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * 5]
    for (architecture, name, call, cluster), (row, _, _) in found.items():
        numbers = [registers[architecture, name, call], row.every_warp, row.first_warp, row.fp64, f"{row.clocks:.0f}"]
        which = f"{name}{' in a cluster' if cluster else ''}, {call}, {architecture}"
        lines.append(f"| {which} | " + " | ".join(map(str, numbers)) + " |")
    return lines


def share(found, chip: Chip, V: int, call: str, plan_of, parameters: Parameters = NOMINAL) -> float:
    """Of the copy, or of the read in the forward alone, by the plan of a chip."""
    plan = plan_of(V, arch=chip.name, call=call)
    row = found[CODE_OF[chip.capability], plan.kernel, call, plan.kernel == "staged" and plan.cluster > 1][0]
    return bounds(row, chip, shape_of(plan, chip, V, call, parameters), parameters).share


def _shares_table(found, call: str, plan_of) -> list[str]:
    """Nominal / pessimistic, and what bounds it where that is not the memory."""
    lines = ["| V | " + " | ".join(CHIPS) + " |", "|---:|" + "---|" * len(CHIPS)]
    for V in CLASSES:
        cells = []
        for chip in CHIPS.values():
            plan = plan_of(V, arch=chip.name, call=call)
            kernel = kernel_of(plan, V)
            row = found[CODE_OF[chip.capability], kernel, call, kernel == "staged" and plan.cluster > 1][0]
            nominal, pessimistic = (
                bounds(row, chip, shape_of(plan, chip, V, call, parameters), parameters)
                for parameters in (NOMINAL, PESSIMISTIC)
            )
            cells.append(f"{nominal.share:.2f} / {pessimistic.share:.2f} {nominal.tightest}")
        lines.append(f"| {V} | " + " | ".join(cells) + " |")
    return lines


def report(compiled_of, plan_of) -> list[str]:
    """The model's page in Markdown."""
    if sass.nvdisasm() is None:
        raise FileNotFoundError("no nvdisasm")
    found = works(compiled_of)
    registers = {
        (architecture, name, kernel.call): made.resources[kernel.entry]["registers"]
        for architecture in ARCHITECTURES
        for kernel in KERNELS
        for name in ([tile_of(n + 1) for n in range(TILE_VECTORS)] if kernel.name == "tile" else [kernel.name])
        if (made := compiled_of(kernel.source, architecture)) is not None
    }
    cells = [f"{before(V).share:.2f}" for V in BY_HAND]
    return [
        "Machine code by nvdisasm, bf16 without options: instructions of a lane an element in the loops over a row,",
        "",
        *_loops_table(found),
        "",
        "and what a row costs beside them. Clocks: of one warp that has its scheduler to itself, by the stalls that ptxas has",
        "written into the code and published latencies.",
        "",
        *_rows_table(found, registers),
        "",
        "**A model, not a measurement.** The share of the copy that a plan can reach with gradient: nominal / pessimistic, and",
        "which bound is the tightest (`tests/cuda/cost_model.py` says how, and where its constants are from). The bounds are",
        "taken to overlap: 1.00 says that memory is the tightest of them, not that the copy's speed is reached,",
        "",
        *_shares_table(found, "with_grad", plan_of),
        "",
        "and the share of the read in the forward alone:",
        "",
        *_shares_table(found, "forward", plan_of),
        "",
        "The same for the kernels of commit 0a07c1f on an H200 with gradient, and what a reading by hand of their code had",
        "estimated. At 4096 the hand had left out what every warp does outside of the loops.",
        "",
        "| V | " + " | ".join(map(str, BY_HAND)) + " | 32000, forward |",
        "|---|" + "---:|" * (len(BY_HAND) + 1),
        "| model | " + " | ".join(cells) + f" | {before(32000, forward=True).share:.2f} |",
        "| by hand | " + " | ".join(f"{BY_HAND[V]:.2f}" for V in BY_HAND) + f" | {BY_HAND_FORWARD:.2f} |",
    ]
