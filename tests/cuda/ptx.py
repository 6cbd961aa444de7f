"""What the machine code of the kernels has to look like, read off their PTX: whole 16-byte accesses in the loops.

A vector that the compiler has taken apart costs four instructions instead of one, each of which touches all of the
sectors; no value shows it.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

LABEL = re.compile(r"\s*(\$\w+):")
BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+);")
VECTOR = 16  # bytes
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


class Access(NamedTuple):
    """A load or store."""

    line: int
    kind: str  # ld or st
    space: str  # global, shared, ..., or "" where the compiler does not know
    bytes: int
    vector: bool
    base: str
    offset: int


class Kernel(NamedTuple):
    """The body of one entry function."""

    name: str
    lines: list[str]

    def _blocks(self) -> list[tuple[range, list[str], bool]]:
        """Lines of each basic block, the labels that it may branch to, and whether it may go on to the next."""
        begins = [0, *(n for n, line in enumerate(self.lines) if LABEL.match(line))]
        begins += [n + 1 for n, line in enumerate(self.lines) if BRANCH.search(line)]
        cuts = sorted({*begins, len(self.lines)})
        found = []
        for begin, end in itertools.pairwise(cuts):
            lines = self.lines[begin:end]
            targets = [branch[1] for line in lines if (branch := BRANCH.search(line))]
            last = lines[-1].strip()
            ends = (bool(targets) and not last.startswith("@")) or re.match(r"(ret|exit|trap);", last) is not None
            found.append((range(begin, end), targets, not ends))
        return found

    def loops(self) -> dict[int, set[int]]:
        """First line of each loop -> its lines, wherever the compiler has put them: all from which a branch back to the
        first is reached without passing it."""
        blocks = self._blocks()
        at_label = {
            LABEL.match(self.lines[b[0].start])[1]: i
            for i, b in enumerate(blocks)
            if LABEL.match(self.lines[b[0].start])
        }  # type: ignore[index]
        before: dict[int, set[int]] = {i: set() for i in range(len(blocks))}
        for i, (_, targets, goes_on) in enumerate(blocks):
            for after in [
                *(at_label[t] for t in targets if t in at_label),
                *([i + 1] if goes_on and i + 1 < len(blocks) else []),
            ]:
                before[after].add(i)
        found: dict[int, set[int]] = {}
        for head in range(len(blocks)):
            inside = {head}
            waiting = [i for i in before[head] if i >= head]  # as the compiler lays it out, a loop begins with its head
            while waiting:
                block = waiting.pop()
                if block not in inside:
                    inside.add(block)
                    waiting += before[block]
            if any(i >= head for i in before[head]):
                found[blocks[head][0].start] = {line for i in inside for line in blocks[i][0]}
        return found

    def inner_loops(self) -> list[set[int]]:
        """Those without another loop in them."""
        loops = self.loops()
        return [lines for head, lines in loops.items() if not any(other in lines for other in loops if other != head)]

    def repeated(self) -> set[int]:
        """Lines from which a way leads back to them."""
        blocks = self._blocks()
        labels = {match[1]: i for i, b in enumerate(blocks) if (match := LABEL.match(self.lines[b[0].start]))}
        after = [
            [*(labels[t] for t in targets if t in labels), *([i + 1] if goes_on and i + 1 < len(blocks) else [])]
            for i, (_, targets, goes_on) in enumerate(blocks)
        ]
        found: set[int] = set()
        for block, (lines, _, _) in enumerate(blocks):
            seen: set[int] = set()
            waiting = list(after[block])
            while waiting:
                other = waiting.pop()
                if other not in seen:
                    seen.add(other)
                    waiting += after[other]
            if block in seen:
                found.update(lines)
        return found

    def accesses(self) -> list[Access]:
        """All loads and stores of registers, in their order."""
        found = []
        pattern = (
            r"\b(ld|st)((?:\.[a-z_]+(?:::\w+)*)*?)(?:\.(v\d))?\.[a-z](\d+)\s+(?:\{[^}]*\}|[^\[]*?),?\s*"
            r"\[([%\w$]+)(?:\+(-?\d+))?\]"
        )
        for number, line in enumerate(self.lines):
            if access := re.search(pattern, line):
                kind, modifiers, vector, bits, base, offset = access.groups()
                space = next((s for s in ("global", "shared", "param", "local", "const") if f".{s}" in modifiers), "")
                size = SIZES[bits] * (int(vector[1:]) if vector else 1)
                found.append(Access(number, kind, space, size, bool(vector), base, int(offset or 0)))
        return found


def kernels(ptx: str) -> dict[str, Kernel]:
    """The entry functions of a PTX file, by their mangled names."""
    found = {}
    for part in re.split(r"^(?=\.(?:visible|weak|func|entry|extern))", ptx, flags=re.MULTILINE):
        if entry := re.match(r"[.\w\s]*?\.entry\s+(\w+)\(", part):
            found[entry[1]] = Kernel(entry[1], part.splitlines())
    return found


def split_vectors(kernel: Kernel, loads: bool) -> list[str]:
    """Accesses that are the parts of one 16-byte vector, in an innermost loop: stores to global memory, and with `loads`
    loads from shared memory, to one base, one after the other."""
    found = []
    kinds = [("st", ("global", ""), "stored"), *([("ld", ("shared",), "loaded")] if loads else [])]
    for loop in kernel.inner_loops():
        inside = [access for access in kernel.accesses() if access.line in loop]
        for kind, spaces, what in kinds:
            run: list[Access] = []
            for access in [a for a in inside if a.kind == kind and a.space in spaces]:
                follows = run and (access.base, access.offset) == (run[-1].base, run[-1].offset + run[-1].bytes)
                run = [*run, access] if follows and access.bytes in (4, 8) else [access]
                if len(run) > 1 and sum(part.bytes for part in run) == VECTOR:
                    parts = ", ".join(f"[{part.base}+{part.offset}]" for part in run)
                    found.append(f"one vector is {what} as {len(run)} of {run[0].bytes} bytes: {parts}")
                    run = []
    return found


def whole_vectors(kernel: Kernel, kind: str, space: str, inner: bool = True) -> int:
    """16-byte loads or stores of a space in the loops that have no other in them, or in any loop. space: as ``global``, or
    with how it is cached, as ``global.cs``."""
    space, _, cached = space.partition(".")
    loops = kernel.inner_loops() if inner else [kernel.repeated()]
    return sum(
        access.vector
        and access.bytes == VECTOR
        and (access.kind, access.space) == (kind, space)
        and (not cached or f"{space}.{cached}." in kernel.lines[access.line])
        for access in kernel.accesses()
        if any(access.line in loop for loop in loops)
    )


def row_loops(kernel: Kernel, writes: bool, element_bytes: int = 2) -> tuple[float, float]:
    """Instructions an element of the loops that reduce a row and that write its gradient (0 where none is wanted): of
    several the one with most elements in a pass. All sides of its branches count.

    Raises:
        ValueError: where one is not there.
    """
    accesses, loops = kernel.accesses(), kernel.loops()
    made: dict[int, tuple[bool, int, float]] = {}  # by the head: stores to global memory, elements, instructions
    for head, lines in loops.items():
        inside = [access for access in accesses if access.line in lines]
        loads = sum(access.kind == "ld" and access.vector and access.bytes == VECTOR for access in inside)
        if loads and any("ex2." in kernel.lines[line] for line in lines):
            count = sum(bool(re.match(r"\s*(@!?%p\d+\s+)?[a-z][\w.:]*\s.*;|\s*ret;", kernel.lines[n])) for n in lines)
            stores = any(access.kind == "st" and access.space in ("global", "") for access in inside)
            made[head] = stores, loads * VECTOR // element_bytes, count
    innermost = [row for head, row in made.items() if not any(o in loops[head] for o in made if o != head)]
    found = []
    for stores, wanted in ((False, True), (True, writes)):
        of_kind = [row for row in innermost if row[0] == stores]
        if wanted and not of_kind:
            what = "writes" if stores else "reduces"
            raise ValueError(f"ptx: {kernel.name}: expected a loop that {what} rows, found none among {len(loops)}")
        best = max(of_kind, key=lambda row: row[1]) if wanted else (stores, 1, 0)
        found.append(best[2] / best[1])
    return found[0], found[1]


def has_bulk_copy(kernel: Kernel) -> bool:
    """Whether a loop starts copies from global to shared memory."""
    loops = kernel.loops().values()
    copies = [n for n, line in enumerate(kernel.lines) if re.search(r"\bcp\.async\.bulk\.shared\S*\.global\.", line)]
    return any(number in loop for number in copies for loop in loops)


def has_vector_copy(kernel: Kernel) -> bool:
    """Whether a loop starts copies of 16 bytes from global to shared memory; before sm_80 a load and a store."""
    loops = kernel.loops().values()
    copies = [
        n for n, line in enumerate(kernel.lines) if re.search(r"\bcp\.async\.c[ag]\.shared\S*\.global\S* .*, 16", line)
    ]
    if any(number in loop for number in copies for loop in loops):
        return True
    loads = whole_vectors(kernel, "ld", "global", False) + whole_vectors(kernel, "ld", "", False)
    return bool(loads and whole_vectors(kernel, "st", "shared", False))


FENCE = re.compile(r"\bmembar\.gl|\bfence\.(acq_rel|sc)\.gpu")
# What the staged kernels may not wait for, and why.
WAITS = {
    r"\bmembar\.(gl|sys)|\bfence\.(acq_rel|sc)\.(gpu|sys)": "a fence of the whole device",
    r"\bmbarrier\.(try|test)_wait[.\w]*\.acquire\.cluster": "a wait that drops the first-level cache",
    r"\bmbarrier\.arrive[.\w:]*\.release\.cluster[.\w:]*\.shared::cluster": "an arrival that is a fence of the whole device",
    r"\bsetmaxnreg": "registers that are handed over outside of a role's branch",
}
LOOP_WAITS = r"\b(bar|barrier)\.(sync|red|cluster)|\bbarrier\.cluster"


def waits(kernel: Kernel) -> list[str]:
    """Of a staged kernel: what makes all threads wait for each other, or for device memory."""
    found = [
        f"{what}: {line.strip()}"
        for line in kernel.lines
        for pattern, what in WAITS.items()
        if re.search(pattern, line)
    ]
    inside = kernel.repeated()
    found += [
        f"a barrier of the block or cluster in a loop: {kernel.lines[number].strip()}"
        for number in sorted(inside)
        if re.search(LOOP_WAITS, kernel.lines[number])
    ]
    return found


def faults(name: str, kernel: Kernel) -> list[str]:
    """What is not as meant.

    Args:
        name: demangled, as ``staged_kernel<__nv_bfloat16, false, true>``.
    """
    family, _, rest = name.partition("_kernel<")
    flags = re.findall(r"true|false", rest)
    is_staged, is_held = family == "staged", family == "held"
    # staged: general, with gradient; tile, block: sums, gradient. The general ones are told at run time.
    has_grad = (
        family in ("scale", "held", "general")
        or family.endswith("_backward")
        or (family in ("staged", "tile", "block") and flags[1] == "true")
    )
    if family == "finish":
        if flags == ["true"]:  # of each row, without sums
            return []
        return [] if any(FENCE.search(line) for line in kernel.lines) else ["no fence between the blocks' sums"]
    # Of others the sums lie there, one after the other; a piece of a pair that is not whole goes element by element.
    is_pair = family.startswith(("distillation", "targets"))
    found = [] if is_pair else split_vectors(kernel, loads=is_staged or is_held)
    inner = family != "tile"  # whose loop is that over rows
    if has_grad and not whole_vectors(kernel, "st", "global", inner):
        found.append("no 16-byte store to global memory in a loop")
    if is_held and not has_vector_copy(kernel):
        found.append("no 16-byte copy from global to shared memory in a loop")
    # What is not held of a row: read twice, the second time as what the L2 may forget.
    if is_held and not whole_vectors(kernel, "ld", "global.cg"):
        found.append("no 16-byte load from global memory past the first-level cache in a loop")
    if is_held and not whole_vectors(kernel, "ld", "global.cs"):
        found.append("no 16-byte load from global memory for the last time in a loop")
    if not is_staged and not is_held and not whole_vectors(kernel, "ld", "global", inner):
        found.append("no 16-byte load from global memory in a loop")
    if (is_staged or is_held) and not whole_vectors(kernel, "ld", "shared"):
        found.append("no 16-byte load from shared memory in a loop")
    if is_staged and not has_bulk_copy(kernel):
        found.append("no bulk copy from global to shared memory in a loop")
    if is_staged:
        found += waits(kernel)
    return found
