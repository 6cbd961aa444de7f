"""The ops on memory that ends at, or begins after, a page that must not be touched: a program, which a fault kills.

    python guard_pages.py CASES SEED [large]

Under guard_malloc.c, preloaded, what the ops allocate is guarded too. ``large``: gradients of 32 MiB and more.

Each case is named before it runs, so that the last line names the one that was killed. Inputs are read-only where the op
does not write over them. What the ops return must be the bits that they return for copies in ordinary memory.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

PAGE = mmap.PAGESIZE
PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """Pages between two that must not be touched, and a copy of a tensor in them, with its strides."""

    def __init__(self, like: torch.Tensor, at_end: bool):
        extent = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        self.bytes = extent * like.element_size()
        self.pages = max(-(-self.bytes // PAGE), 1) * PAGE
        self.base = libc.mmap(None, self.pages + 2 * PAGE, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        assert self.base not in (None, ctypes.c_void_p(-1).value), ctypes.get_errno()
        self.protect(PROT_READ | PROT_WRITE)
        start = self.base + PAGE + (self.pages - self.bytes if at_end else 0)
        ctypes.memset(self.base + PAGE, 0xFF, self.pages)  # NaN, and no label
        memory = (ctypes.c_char * max(self.bytes, 1)).from_address(start if self.bytes else self.base + PAGE)
        flat = torch.frombuffer(memory, dtype=like.dtype, count=extent) if extent else torch.empty(0, dtype=like.dtype)
        self.tensor = flat.as_strided(like.shape, like.stride())
        self.tensor.copy_(like)

    def protect(self, how: int) -> None:
        assert libc.mprotect(self.base + PAGE, self.pages, how) == 0, ctypes.get_errno()

    def close(self) -> None:
        libc.munmap(self.base, self.pages + 2 * PAGE)


def layout(generator: torch.Generator, x: torch.Tensor, kind: int) -> torch.Tensor:
    """The same values: dense, with gaps between the rows, or in another order of the leading dimensions."""
    if kind == 0:
        return x
    if kind == 1:
        wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 1 + kind, dtype=x.dtype)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else x


def guard_outputs(on: bool) -> None:
    """Where guard_malloc.c is preloaded: whether memory that is allocated from now on is guarded."""
    if hasattr(libc, "guard_malloc"):
        libc.guard_malloc(int(on))


def run_large() -> None:
    """Gradients that go past the caches: rows that begin anywhere, ignored ones between them."""
    ops = torch.ops.accumloss
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for V, kwargs in ((32768, {}), (33333, {}), (33333, {"label_smoothing": 0.1})):
            N = (33 << 20) // (V * dtype.itemsize) + 1
            x = torch.randn(N, V, generator=torch.Generator().manual_seed(V)).to(dtype)
            y = torch.arange(N) * 7 % V
            y[1::3] = -100
            one = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            _, _, _, lse, _, _, nll = ops.cross_entropy(x, y, **kwargs)
            for at_end in (True, False):
                print(f"large: {dtype} {N} x {V} {kwargs}, {'ends' if at_end else 'begins'} at a guard", flush=True)
                guards = [Guarded(t, at_end) for t in (x, y, lse, nll)]
                for guard in guards:
                    guard.protect(PROT_READ)
                inside = [guard.tensor for guard in guards]
                guard_outputs(True)
                both = ops.cross_entropy_with_grad(one, *inside[:2], **kwargs)[-1]
                backward = ops.cross_entropy_backward(one, *inside, **kwargs)
                guard_outputs(False)
                assert torch.equal(both, ops.cross_entropy_with_grad(one, x, y, **kwargs)[-1])
                assert torch.equal(backward, ops.cross_entropy_backward(one, x, y, lse, nll, **kwargs))
                guards[0].protect(PROT_READ | PROT_WRITE)
                ops.cross_entropy_with_grad_(one, *inside[:2], **kwargs)
                assert torch.equal(inside[0], both)
                del both, backward, inside
                for guard in guards:
                    guard.close()
    print("all of them", flush=True)


def run(count: int, seed: int) -> None:
    ops = torch.ops.accumloss
    generator = torch.Generator().manual_seed(seed)

    def draw(*values):
        return values[int(torch.randint(0, len(values), (), generator=generator))]

    for index in range(count):
        dtype = draw(torch.bfloat16, torch.float16, torch.float32, torch.float64)
        V = draw(1, 2, 3, 7, 8, 10, 11, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 191, 192, 193, 300, 511, 512, 513, 545, 1023,
                 1024, 1025, 1057, 2047, 2049, 3001, 16385, 20001)  # fmt: skip
        sizes = draw((1, 1), (1, 3), (2, 3), (1, 31), (1, 32), (3, 11), (5, 13)) if V <= 600 else draw((1, 1), (2, 3))
        kind, at_end = draw(0, 0, 1, 2), draw(True, True, False)
        kwargs = {
            "shift": draw(0, 0, 1), "metrics": draw(False, True), "label_smoothing": draw(0.0, 0.0, 0.0, 0.1),
            "softcap": draw(0.0, 0.0, 0.0, 20.0), "z_loss": draw(0.0, 0.0, 1e-3),
        }  # fmt: skip
        op = draw("cross_entropy", "cross_entropy_backward", "cross_entropy_backward_", "cross_entropy_with_grad",
                  "cross_entropy_with_grad_", "mean_with_grad", "scale_", "cross_entropy_shard",
                  "cross_entropy_shard_backward", "cross_entropy_shard_backward_")  # fmt: skip
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        x = layout(generator, (torch.randn(*sizes, V, generator=generator) * 3).to(dtype), kind)
        y = torch.randint(0, V, sizes, generator=generator)
        y[torch.rand(sizes, generator=generator) < draw(0.0, 0.3, 1.0)] = -100
        y[-1, -1] = draw(0, V - 1)
        y = layout(generator, y if draw(True, False) else y.int(), draw(0, 2))
        if kwargs["metrics"] and draw(True, False):
            x.copy_(torch.round(x.float()))  # ties
        weight = torch.rand(V, generator=generator, dtype=acc) if draw(True, False) else None
        print(f"case {index}: {op} {dtype} {tuple(x.shape)} of strides {x.stride()}, {y.dtype} labels, weight "
              f"{weight is not None}, {'ends' if at_end else 'begins'} at a guard, {kwargs}", flush=True)  # fmt: skip
        _, _, _, lse, _, _, nll = ops.cross_entropy(x, y, weight, **kwargs)
        one = torch.full((), 0.5, dtype=acc)
        if "shard" in op:  # labels of it and of others, which index nothing of it
            begin, after = draw(0, 5, 1000), draw(0, 7, 3000)
            del kwargs["shift"]
            if op != "cross_entropy_shard":
                del kwargs["metrics"]
            kwargs |= {"class_offset": begin, "vocab_size": begin + V + after}
            others = torch.randint(0, begin + V + after, sizes, generator=generator).to(y.dtype)
            is_item, is_other = y != -100, torch.rand(sizes, generator=generator) < 0.5
            y = layout(generator, torch.where(is_item, torch.where(is_other, others, y + begin), y), draw(0, 2))
            if weight is not None:
                weight = torch.rand(begin + V + after, generator=generator, dtype=acc)
        inputs = {
            "cross_entropy": [x, y, weight], "scale_": [x.contiguous(), one],
            "cross_entropy_backward": [one, x, y, lse, nll, weight], "cross_entropy_with_grad": [one, x, y, weight],
            "mean_with_grad": [one, x, y, weight], "cross_entropy_shard": [x, y, weight],
            "cross_entropy_shard_backward": [one, x, y, lse, nll, weight],
        }  # fmt: skip
        given = inputs[op] if op in inputs else inputs[op.removesuffix("_")]
        if op == "scale_":
            kwargs = {}
        if op == "mean_with_grad":
            del kwargs["metrics"]
        guards = [None if t is None else Guarded(t, at_end) for t in given]
        written = {"scale_": 0}.get(op, 1) if op.endswith("_") else -1
        for i, guard in enumerate(guards):
            if guard is not None and i != written:
                guard.protect(PROT_READ)
        ordinary = [
            None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in given
        ]
        function = getattr(ops, op)
        guard_outputs(True)
        found = function(*[None if g is None else g.tensor for g in guards], **kwargs)
        guard_outputs(False)
        wanted = function(*ordinary, **kwargs)
        if written >= 0:
            found, wanted = [*(found or ()), guards[written].tensor], [*(wanted or ()), ordinary[written]]
        found, wanted = [[t] if isinstance(t, torch.Tensor) else list(t) for t in (found, wanted)]
        same = (torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(found, wanted, strict=True))
        assert all(same), "other bits than in ordinary memory"
        del found
        for guard in guards:
            if guard is not None:
                guard.close()
    print("all of them", flush=True)


if __name__ == "__main__":
    import accumloss  # noqa: F401

    torch.set_num_threads(1)
    if sys.argv[3:] == ["large"]:
        run_large()
    else:
        run(int(sys.argv[1]), int(sys.argv[2]))
