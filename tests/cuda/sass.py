"""What the machine executes: kernels as nvdisasm prints them, their loops, and how long one warp takes through them.

nvcc does not bring nvdisasm; NVIDIA's wheel does (``pip install nvidia-cuda-nvdisasm``, the extra ``cuda-report``).
"""

from __future__ import annotations

import heapq
import pathlib
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

KERNEL = re.compile(r"^\.text\.(\S+):$")
FUNCTION = re.compile(r"^(\$\S+):$")
LABEL = re.compile(r"^(\.L_\w+):$")
CODE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* (0x[0-9a-f]{16}) \*/$")
SECOND_WORD = re.compile(r"^\s*/\* (0x[0-9a-f]{16}) \*/$")
NO_BARRIER = 7
# Without a scoreboard: wait for themselves, or, of a message to another block (STAS), its answer is waited for.
SYNCHRONISES = ("BAR", "UCGABAR_WAIT", "MEMBAR", "STAS")


def nvdisasm() -> str | None:
    """The disassembler: on PATH, beside nvcc, or of NVIDIA's wheel."""
    places = ["nvdisasm", "/usr/local/cuda/bin/nvdisasm"]
    try:
        import nvidia

        places += [str(file) for path in nvidia.__path__ for file in pathlib.Path(path).glob("c*/bin/nvdisasm")]
    except ImportError:
        pass
    return next((found for place in places if (found := shutil.which(place))), None)


def disassembled(cubin: pathlib.Path) -> str:
    """The text of a cubin, with the control words."""
    tool = nvdisasm()
    if tool is None:
        raise FileNotFoundError("sass: expected nvdisasm, found none; pip install nvidia-cuda-nvdisasm")
    return subprocess.run([tool, "-c", "-hex", str(cubin)], capture_output=True, text=True, check=True).stdout


class Instruction(NamedTuple):
    """One instruction, with what ptxas says of its time: clocks before the next one may be issued, the scoreboard that
    its result releases, the scoreboards that it waits for."""

    operation: str  # with its modifiers, as LDS.128
    operands: str
    guarded: bool
    stall: int
    sets: int  # scoreboard, or NO_BARRIER
    waits: int  # a mask of six

    @property
    def name(self) -> str:
        return self.operation.partition(".")[0]

    @property
    def target(self) -> str | None:
        """Where a branch or a call goes."""
        found = re.search(r"`\(([^)]+)\)", self.operands)
        return found[1] if found and self.name in ("BRA", "CALL", "BRX", "JMP") else None

    @property
    def jumps(self) -> bool:
        """Whether it may go to a label of its function. ptxas writes some far jumps as calls, which do not return."""
        return self.name in ("BRA", "BRX", "JMP") or (self.name == "CALL" and (self.target or "").startswith(".L_"))

    @property
    def ends(self) -> bool:
        return self.name in ("EXIT", "RET", "BPT") and not self.guarded


KINDS = {  # of instructions, by the units that execute them
    "exp": ("MUFU",),
    "fp64": ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"),
    "fp32": ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"),
    "convert": ("F2F", "F2FP", "HADD2", "I2F", "F2I", "I2FP"),
    "integer multiply": ("IMAD", "IMUL", "UIMAD"),
    "shared": ("LDS", "STS", "LDSM", "ATOMS", "STAS", "SYNCS", "UBLKCP", "SHFL", "REDUX", "CREDUX"),
    "global": ("LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "LDL", "STL", "LDGSTS"),
    "constant": ("LDC", "ULDC", "LDCU"),
    "control": (
        *("BRA", "BRX", "JMP", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "NOP", "BAR", "YIELD"),
        *("MEMBAR", "ERRBAR", "CGAERRBAR", "UCGABAR_ARV", "UCGABAR_WAIT", "CCTL", "DEPBAR", "NANOSLEEP", "FENCE"),
    ),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}


def kind(instruction: Instruction) -> str:
    return KIND_OF.get(instruction.name, "alu")


def memory(instruction: Instruction) -> tuple[str, int] | None:
    """LDS, LDG, STG, ...: the name and the bytes of a lane; None of others."""
    if instruction.name not in ("LDS", "STS", "LDG", "STG", "LD", "ST", "LDL", "STL", "STAS"):
        return None
    size = re.search(r"\.(U8|S8|U16|S16|64|128)\b", instruction.operation)
    return instruction.name, {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}[size[1]] if size else 4


class Function(NamedTuple):
    """A kernel, or what it calls: basic blocks, and which may follow which."""

    name: str
    blocks: list[list[Instruction]]
    after: list[list[int]]

    def loops(self) -> dict[int, set[int]]:
        """First block of each loop -> its blocks: all from which a branch back to the first is reached without passing
        it. A loop begins with its head, as the compiler lays it out."""
        before: list[set[int]] = [set() for _ in self.blocks]
        for block, following in enumerate(self.after):
            for other in following:
                before[other].add(block)
        found = {}
        for head in range(len(self.blocks)):
            waiting = [block for block in before[head] if block >= head]
            if not waiting:
                continue
            inside = {head}
            while waiting:
                block = waiting.pop()
                if block not in inside:
                    inside.add(block)
                    waiting += before[block]
            found[head] = inside
        return found

    def path(
        self, start: int, through: Iterable[int], end: int | None, without: frozenset[int] = frozenset()
    ) -> list[int]:
        """The blocks of the shortest way, in instructions, from start over `through` in this order to end (None: to
        where the function is left), not over `without`. end is passed once; what of `through` is not on the way is left
        out."""
        found = [start]
        for goal in [*through, end]:
            way = [] if goal in found and goal != end else self._shortest(found[-1], goal, end, without)
            if way is None and goal == end:
                raise ValueError(f"sass: {self.name}: no way from block {found[-1]} to {end}")
            found += way or []
        return found

    def reached(self, start: int, without: int | None) -> set[int]:
        """The blocks that are reached from start without passing one."""
        found: set[int] = set()
        waiting = [start]
        while waiting:
            for other in self.after[waiting.pop()]:
                if other not in found and other != without:
                    found.add(other)
                    waiting.append(other)
        return found

    def _shortest(self, start: int, goal: int | None, end: int | None, without: frozenset[int]) -> list[int] | None:
        """The blocks after start; of a goal that is start, those of the way back. None: there is no way that does not
        pass end."""
        if goal is None and self._leaves(start):
            return []
        queue: list[tuple[int, tuple[int, ...]]] = [(0, (start,))]
        seen: set[int] = set()
        while queue:
            cost, way = heapq.heappop(queue)
            block = way[-1]
            if len(way) > 1 and (block == goal or (goal is None and self._leaves(block))):
                return list(way[1:])
            if block in seen or block in without or (len(way) > 1 and block == end):
                continue
            if len(way) > 1:
                seen.add(block)
            for other in self.after[block]:
                heapq.heappush(queue, (cost + len(self.blocks[other]), (*way, other)))
        return None

    def _leaves(self, block: int) -> bool:
        return bool(self.blocks[block]) and self.blocks[block][-1].ends

    def instructions(self, blocks: Iterable[int]) -> list[Instruction]:
        return [instruction for block in blocks for instruction in self.blocks[block]]


class Kernel(NamedTuple):
    body: Function
    functions: dict[str, Function]  # what it calls


def _function(name: str, lines: list[str | Instruction]) -> Function:
    """lines: labels and instructions."""
    blocks: list[list[Instruction]] = [[]]
    at: dict[str, int] = {}
    for line in lines:
        if isinstance(line, str):
            if blocks[-1]:
                blocks.append([])
            at[line] = len(blocks) - 1
            continue
        blocks[-1].append(line)
        if line.jumps or line.ends:
            blocks.append([])
    after: list[list[int]] = []
    for number, block in enumerate(blocks):
        following = [at[i.target] for i in block if i.jumps and i.target in at]
        last = block[-1] if block else None
        goes_on = last is None or not (last.ends or (last.jumps and not is_conditional(last)))
        if goes_on and number + 1 < len(blocks):
            following.append(number + 1)
        after.append(following)
    return Function(name, blocks, after)


def is_conditional(branch: Instruction) -> bool:
    """Whether a branch may not be taken. "BRA P1, `(...)" and "BRA.DIV UR4, `(...)" are; only the guard is in the guard."""
    return branch.guarded or not branch.operands.startswith("`(")


def kernels(text: str) -> dict[str, Kernel]:
    """The kernels of a disassembled file, by their mangled names."""
    found: dict[str, dict[str, list[str | Instruction]]] = {}
    kernel = function = ""
    pending: tuple[str, str, bool] | None = None
    for line in text.splitlines():
        if name := KERNEL.match(line):
            kernel = function = name[1]
            found[kernel] = {kernel: []}
        elif name := FUNCTION.match(line):
            function = name[1]
            found[kernel][function] = []
        elif name := LABEL.match(line):
            found[kernel][function].append(name[1])
        elif pending and (word := SECOND_WORD.match(line)):
            control = int(word[1], 16) >> 41
            operation, operands, guarded = pending
            times = control & 15, control >> 5 & 7, control >> 11 & 63
            found[kernel][function].append(Instruction(operation, operands, guarded, *times))
            pending = None
        elif kernel and (code := CODE.search(line)):
            if pending:
                raise ValueError(f"sass: expected the second word of {pending[0]}, got {line.strip()}")
            pending = code[2], code[3], code[1] is not None
    if not found:
        raise ValueError("sass: expected the output of nvdisasm -c -hex, found no kernel in it")
    made = {}
    for name, parts in found.items():
        functions = {part: _function(part, lines) for part, lines in parts.items()}
        made[name] = Kernel(functions.pop(name), functions)
    return made


class Loop(NamedTuple):
    """A loop over the elements of a row."""

    head: int
    path: list[int]  # its blocks, on the shortest way that passes all accesses of 16 bytes
    elements: int  # of a thread and pass
    kinds: Counter  # instructions of a pass, by kind
    accesses: Counter  # (name, bytes): of a pass

    @property
    def instructions(self) -> int:
        return self.kinds.total()

    def per_element(self, of: str | None = None) -> float:
        return (self.kinds[of] if of else self.instructions) / self.elements


def _loop(body: Function, head: int, blocks: set[int], element_bytes: int) -> Loop | None:
    """The loop, where it loads vectors of 16 bytes and takes exponentials; its options by the shortest way."""
    wide = [b for b in sorted(blocks) if any((memory(i) or ("", 0))[1] == 16 for i in body.blocks[b])]
    # Where no way passes them all, as some stand for others at the end of a row, the one with most elements.
    found = [loop for way in [wide, *([b] for b in wide)] if (loop := _loop_through(body, head, way, element_bytes))]
    # Loads of both are more than there are exponentials for.
    return max(
        found, key=lambda loop: (loop.kinds["exp"] >= loop.elements, loop.elements, -loop.instructions), default=None
    )


def _loop_through(body: Function, head: int, through: list[int], element_bytes: int) -> Loop | None:
    try:
        path = body.path(head, [b for b in through if b != head], head)[:-1] if through else []
    except ValueError:  # no way around it that passes them all: not a loop over one row
        return None
    instructions = body.instructions(path)
    loads = sum((memory(i) or ("", 0))[1] == 16 and i.name in ("LDS", "LDG", "LD") for i in instructions)
    if not loads or not any(i.operation.startswith("MUFU.EX2") for i in instructions):
        return None
    accesses = Counter(access for i in instructions if (access := memory(i)))
    return Loop(head, path, loads * 16 // element_bytes, Counter(map(kind, instructions)), accesses)


def row_loops(kernel: Kernel, element_bytes: int, writes: bool, loads: str | None = None) -> tuple[Loop, Loop | None]:
    """The loops that reduce a row and that write its gradient: of several the one with most elements in a pass.

    Args:
        loads: "LDS" or "LDG": of those that load their vectors from there; None: of all.

    Raises:
        ValueError: where one is not there.
    """
    body = kernel.body
    loops = body.loops()
    of_rows = {h: loop for h, blocks in loops.items() if (loop := _loop(body, h, blocks, element_bytes))}
    # A loop around another such one walks over rows.
    made = [loop for h, loop in of_rows.items() if not any(o in loops[h] for o in of_rows if o != h)]
    if loads is not None:
        made = [
            loop for loop in made if {name for name, size in loop.accesses if size == 16} - {"STG", "ST"} == {loads}
        ]
    stores = [loop for loop in made if any(name in ("STG", "ST") for name, _ in loop.accesses)]
    reduces = [loop for loop in made if loop not in stores]
    for wanted, those in (("reduces", reduces), *([("writes", stores)] if writes else [])):
        if not those:
            where = f", with {loads}" if loads else ""
            raise ValueError(
                f"sass: {body.name}: expected a loop that {wanted} rows{where}, found none among {len(loops)}"
            )

    def first(candidates: list[Loop]) -> Loop:
        return max(candidates, key=lambda loop: (loop.elements, -loop.head))

    return first(reduces), first(stores) if writes else None


def row_pass(kernel: Kernel, element_bytes: int, vectors: int) -> Loop:
    """The loop over rows of a kernel that has no loop over a row, with that many vectors of a row in each lane.

    Raises:
        ValueError: where there is none.
    """
    body = kernel.body
    made = [loop for h, blocks in body.loops().items() if (loop := _pass(body, h, blocks, element_bytes, vectors))]
    if not made:
        raise ValueError(f"sass: {body.name}: expected a loop over rows, found none among {len(body.loops())}")
    return max(made, key=lambda loop: (loop.elements, -loop.head))


def _pass(body: Function, head: int, blocks: set[int], element_bytes: int, vectors: int) -> Loop | None:
    """A loop over rows, on the shortest way that loads vectors, takes the exponentials of `vectors` of them, whose blocks
    stand in their order, and stores as many."""

    def of(matches) -> list[int]:
        return [b for b in sorted(blocks) if any(matches(i) for i in body.blocks[b])]

    loads = of(lambda i: memory(i) == ("LDG", 16))
    width = 16 // element_bytes
    exponentials = [b for b in sorted(blocks) if sum(i.operation == "MUFU.EX2" for i in body.blocks[b]) >= width]
    stores = of(lambda i: memory(i) == ("STG", 16))
    stores = [b for b in stores if exponentials and b > exponentials[0]]
    if not loads or len(exponentials) < vectors:
        return None
    try:
        path = body.path(head, [b for b in (*loads, *exponentials[:vectors], *stores[:vectors]) if b != head], head)[
            :-1
        ]
    except ValueError:
        return None
    instructions = body.instructions(path)
    accesses = Counter(access for i in instructions if (access := memory(i)))
    return Loop(head, path, vectors * width, Counter(map(kind, instructions)), accesses)


def clocks(instructions: Iterable[Instruction], latency: dict[str, float]) -> float:
    """The time of one warp that has its scheduler to itself: what ptxas has it wait after each instruction, and for
    what takes an unknown time, those of `latency` by operation or its beginning ("LDG", "MUFU"); "" of others."""
    now = 0.0
    ready = [0.0] * 6
    known = sorted(latency, key=len, reverse=True)
    for instruction in instructions:
        for barrier in range(6):
            if instruction.waits >> barrier & 1:
                now = max(now, ready[barrier])
        taken = latency[next(k for k in known if instruction.operation.startswith(k))]
        if instruction.sets != NO_BARRIER:
            ready[instruction.sets] = max(ready[instruction.sets], now + taken)
        elif instruction.name in SYNCHRONISES:
            now += taken
        now += instruction.stall
    return now
