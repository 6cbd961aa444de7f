"""The CUDA backend on the CPU: builds csrc/cuda with g++ and the emulator, and calls it on torch tensors.

docs/internals/testing-cuda.md says what this can and cannot find.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import build_cache
import torch

from accumloss import LossOptions

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc"
EMULATOR = pathlib.Path(__file__).resolve().parent / "emulator"
BASE = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", "-DACCUMLOSS_EMULATE_CUDA"]
ALIGNMENT = ["-fsanitize=alignment"]  # of the kernels; alignment.cpp answers it
COMMON = ["emulator/emulator.cpp", "emulator/driver.cpp", "csrc/cuda/bad_labels.cpp", "emulator/alignment.cpp"]
CROSS, STAGED, PAIRS = "csrc/cuda/cross_entropy.cu", "csrc/cuda/staged.cu", "csrc/cuda/pairs.cu"
ONE, ONE_STAGED = "emulator/one_backend.cpp", "csrc/cuda/staged.cu"
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
GUARD = 64  # elements of NaN on both sides of every tensor, which nothing may change and no sum may contain

Patches = tuple[tuple[str, str, str], ...]  # (file under csrc, old text, new text), each a part of one fault


def cuda_include() -> pathlib.Path | None:
    """The directory of NVIDIA's headers, which give the bfloat16 and half types; None where there is no toolkit."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        candidates.insert(0, str(pathlib.Path(nvcc).resolve().parent.parent))
    candidates += sorted(map(str, pathlib.Path("/usr/local").glob("cuda-*")), reverse=True)
    for candidate in candidates:
        if candidate and (include := pathlib.Path(candidate) / "include").joinpath("cuda_bf16.h").exists():
            return include
    return None


def why_not() -> str | None:
    """The reason why the kernels cannot be emulated here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    if cuda_include() is None:
        return "no CUDA toolkit: its headers give the bfloat16 and half types"
    return None


@functools.cache
def _sources() -> list[tuple[str, bytes]]:
    """csrc and the emulator, by their places in a folder that is compiled."""
    kernels = [*KERNELS.glob("*.h"), *(file for file in KERNELS.glob("cuda/*") if file.is_file())]
    own = build_cache.sources(*EMULATOR.iterdir(), root=EMULATOR.parent)
    return build_cache.sources(*kernels, root=ROOT) + own


@functools.cache
def _contents() -> str:
    """All that any object depends on."""
    include = cuda_include()
    assert include is not None
    headers = re.search(r"#define CUDA_VERSION \d+", (include / "cuda.h").read_text())
    return repr((build_cache.version_of("g++"), str(include), headers and headers[0], _sources()))


def _unpack(work: pathlib.Path, patches: Patches, element: str | None) -> None:
    """The sources, perhaps with a fault, perhaps with the staged kernels of one element type alone."""
    build_cache.unpack(_sources(), work)
    for name, old, new in patches:
        text = (work / "csrc" / name).read_text()
        assert text.count(old) == 1, f"the fault's text occurs {text.count(old)} times in csrc/{name}: {old!r}"
        (work / "csrc" / name).write_text(text.replace(old, new))
    if element:
        staged = work / STAGED
        others = rf"^ACCUMLOSS_INSTANTIATE\((?!{element}\)).*\n"
        staged.write_text(re.sub(others, "", staged.read_text(), flags=re.MULTILINE))


def _compile(work: pathlib.Path, source: str, target: pathlib.Path, *flags: str) -> None:
    command = ["g++", *BASE, *flags, "-Iemulator", "-Icsrc/cuda", "-Icsrc", "-isystem", str(cuda_include())]
    result = subprocess.run(
        [*command, source, "-o", str(target)], cwd=work, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def _objects(
    kind: str, sources: list[str], flags: list[str], patches: Patches = (), element: str | None = None
) -> list[str]:
    """The objects of these sources, from the cache or compiled."""

    def make(folder: pathlib.Path) -> None:
        with tempfile.TemporaryDirectory() as directory:
            work = pathlib.Path(directory)
            _unpack(work, patches, element)
            for source in sources:
                name = pathlib.Path(source).name
                if source.endswith(".h"):
                    _compile(work, source, folder / f"{name}.gch", *flags, "-x", "c++-header")
                else:
                    _compile(work, source, folder / f"{name}.o", *flags, "-x", "c++", "-c")

    folder = build_cache.built(kind, (_contents(), sources, BASE, flags, patches, element), make)
    return [str(folder / f"{pathlib.Path(source).name}.o") for source in sources]


def _header(*flags: str) -> list[str]:
    """The flags that bring in what all sources include, precompiled: it takes longer than some of the kernels."""
    (header,) = _objects("emulated-header", ["emulator/cuda_runtime.h"], list(flags))
    return ["-include", header.removesuffix(".o")]


def _library(objects: list[str]) -> pathlib.Path:
    objects = objects + _objects("emulated-common", COMMON, _header())

    def link(folder: pathlib.Path) -> None:
        subprocess.run(["g++", "-shared", *objects, "-o", str(folder / "libemulated.so")], check=True)

    return build_cache.built("emulated-library", objects, link) / "libemulated.so"


def build() -> pathlib.Path:
    """The backend as a shared library."""
    flags = [*_header(*ALIGNMENT), *ALIGNMENT]
    sources = (("emulated-cross", CROSS), ("emulated-staged", STAGED), ("emulated-pairs", PAIRS))
    return _library([made for kind, source in sources for made in _objects(kind, [source], flags)])


def build_one(patches: Patches = (), staged: bool = False, element: str = "float", pairs: bool = False) -> pathlib.Path:
    """The backend for one element type alone, perhaps with a fault.

    Args:
        patches: the fault. Only what it concerns is compiled, and linked first: of functions that are in both parts the
            linker takes the first.
        staged: whether the fault is one of the staged kernels, or of what chooses and launches them.
        pairs: whether it is one of the kernels over rows of two tensors, or of what they have in common with others.
        element: as the kernels name it.
    """
    flags = [*_header(*ALIGNMENT), *ALIGNMENT, f"-DELEMENT={element}"]
    apart = "pairs" if pairs else "staged|slice|async" if staged else "^$"
    of_cross = bool(patches) and not all(re.search(apart, name) for name, _, _ in patches)
    of_staged = bool(patches) and staged
    faulty, right = [], []
    for source, has_fault in ((ONE, of_cross), (ONE_STAGED, of_staged), (PAIRS, pairs)):
        made = _objects("emulated-one", [source], flags, patches if has_fault else (), element)
        (faulty if has_fault else right).extend(made)
    return _library(faulty + right)


# ThreadSanitizer sees the kernels alone; the emulator tells it of fibers and barriers.
SANITIZERS = {
    "thread": ["-fsanitize=thread", "-Wno-tsan"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"],
}
INSTRUMENTED = [ONE, ONE_STAGED, PAIRS, "emulator/sanitized.cpp"]


def run_sanitized(sanitizer: str, patches: Patches = ()) -> subprocess.CompletedProcess:
    """The program emulator/sanitized.cpp, built with a sanitizer, perhaps with a fault, and run."""
    flags = SANITIZERS[sanitizer]
    objects = _objects(f"sanitized-{sanitizer}", INSTRUMENTED, [*flags, "-g1", "-DELEMENT=float"], patches, "float")
    objects += _objects("emulated-common", COMMON, _header())[:3]  # what answers -fsanitize=alignment alone is left out

    def link(folder: pathlib.Path) -> None:
        subprocess.run(["g++", *flags, *objects, "-o", str(folder / "sanitized")], check=True)

    program = build_cache.built(f"sanitized-{sanitizer}-program", objects, link) / "sanitized"
    # The fibers' stacks are not the thread's: their use after return is not looked for.
    settings = {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    setarch = shutil.which("setarch")
    command = [setarch, "-R", str(program)] if setarch else [str(program)]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)


class _Options(ctypes.Structure):  # csrc/options.h, whose list is that of LossOptions
    _fields_ = [
        ("shift", ctypes.c_int64),
        *((f.name, {"int": ctypes.c_int64, "float": ctypes.c_double}[f.type]) for f in dataclasses.fields(LossOptions)),
        ("metrics", ctypes.c_bool),
        ("class_offset", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
    ]


class _Logits(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("B", ctypes.c_int64),
        ("T", ctypes.c_int64),
        ("V", ctypes.c_int64),
        ("stride_b", ctypes.c_int64),
        ("stride_t", ctypes.c_int64),
        ("device_index", ctypes.c_int32),
    ]


class _Labels(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("is_int32", ctypes.c_bool),
        ("stride_b", ctypes.c_int64),
        ("stride_t", ctypes.c_int64),
    ]


class _Inputs(ctypes.Structure):
    _fields_ = [
        ("logits", _Logits),
        ("labels", _Labels),
        ("weight", ctypes.c_void_p),
        ("weight_sum", ctypes.c_void_p),
        ("shard_weight_sum", ctypes.c_void_p),
        ("options", _Options),
    ]


SUMS = ("loss_sum", "num_items", "total_weight", "num_correct", "entropy_sum")


class _Sums(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in (*SUMS, "totals")]


TOKENS = {"loss": None, "lse": torch.float64, "nll": None, "entropy": None, "argmax": torch.int64}  # None: Acc
DISTILLATION = {"loss": None, **dict.fromkeys(("lse", "teacher_lse", "of_student", "of_teacher"), torch.float64)}
TARGETS = {"loss": None, "nll": None, "lse": torch.float64, "total": torch.float64, "of_label": torch.float64,
           "label": torch.int64}  # fmt: skip
GRADS = ("loss", "lse", "nll", "entropy")


class _DistillationInputs(ctypes.Structure):
    _fields_ = [("student", _Inputs), ("teacher", _Logits), ("beta", ctypes.c_double)]


class _TargetInputs(ctypes.Structure):
    _fields_ = [("logits", _Inputs), ("targets", _Logits)]


def guarded(values: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """A copy of values (B, T, V) that starts offset elements after a 64-byte boundary, within guards of NaN."""
    count = values.numel()
    store = torch.full((count + 3 * GUARD,), float("nan"), dtype=values.dtype)
    align = -(store.data_ptr() // store.element_size()) % (64 // store.element_size())
    copy = store[GUARD + align + offset :][:count].view(values.shape)
    copy.copy_(values)
    copy.guard_store = store  # keeps it alive, and findable by check_guards
    return copy


def check_guards(tensor: torch.Tensor) -> None:
    """Fail if anything but the tensor itself was written."""
    store = tensor.guard_store
    start = (tensor.data_ptr() - store.data_ptr()) // store.element_size()
    outside = torch.cat([store[:start], store[start + tensor.numel() :]])
    assert outside.isnan().all(), "a kernel wrote outside its tensor"


class Backend:
    """The launchers on tensors of the CPU: logits (B, T, V), labels (B, T)."""

    def __init__(self, library: pathlib.Path):
        self.library = ctypes.CDLL(str(library))
        of_two = ("tokens", "distillation", "targets")
        calls = ("forward", "backward", "forward_with_grad", "forward_shard", "scale")
        for name in (*calls, *(f"{way}_{which}" for way in calls[:2] for which in of_two)):
            getattr(self.library, f"emulated_{name}").restype = ctypes.c_char_p
        self.library.emulated_bulk_copies.restype = ctypes.c_int64
        self.library.emulated_questions.restype = ctypes.c_int64
        self.library.emulated_largest_grid.restype = ctypes.c_int64
        self.library.emulated_inputs_size.restype = ctypes.c_int64
        assert self.library.emulated_inputs_size() == ctypes.sizeof(_Inputs)

    def seed(self, value: int) -> None:
        self.library.emulated_seed(ctypes.c_uint64(value))

    def device(
        self, capability: int = 90, multiprocessors: int = 2, clusters: int | None = None, missing: int = 0
    ) -> None:
        """Goes to a new device.

        Args:
            clusters: how many of any size run at once, instead of as many as fit on the multiprocessors.
            missing: kernels, those that are loaded first, that the build has no image of; -1: all.
        """
        if clusters is not None:
            multiprocessors = 1  # of which each block of a cluster of one is asked
        self.library.emulated_device(capability, multiprocessors, -1 if clusters is None else clusters, missing)

    def questions(self) -> int:
        """To the device, about kernels and clusters, since the last call."""
        return self.library.emulated_questions()

    def largest_grid(self) -> int:
        """In blocks, since the last call."""
        return self.library.emulated_largest_grid()

    @contextlib.contextmanager
    def on(self, capability: int = 90, **device):
        """On such a device, see device()."""
        self.device(capability, **device)
        try:
            yield
        finally:
            self.device()

    def bulk_copies(self) -> int:
        """Since the last call."""
        return self.library.emulated_bulk_copies()

    @contextlib.contextmanager
    def plan(self, plan: str, capability: int = 90, **device):
        """Kernels forced as ACCUMLOSS_CUDA_PLAN does it, on such a device."""
        before = os.environ.get("ACCUMLOSS_CUDA_PLAN")
        os.environ["ACCUMLOSS_CUDA_PLAN"] = plan
        self.device(capability, **device)
        try:
            yield
        finally:
            del os.environ["ACCUMLOSS_CUDA_PLAN"]
            if before is not None:
                os.environ["ACCUMLOSS_CUDA_PLAN"] = before
            self.device()

    @contextlib.contextmanager
    def starving(self, warp: int):
        """That warp of each block runs when no other can, and copies land at once."""
        self.library.emulated_starve(warp)
        try:
            yield
        finally:
            self.library.emulated_starve(-1)

    @contextlib.contextmanager
    def exp_error(self, kind: int):
        """The exponential of the staged kernels off by 2^-22 of itself: 1 above, -1 below, 2 anything between, by its
        argument; 0 by its rounding alone."""
        self.library.emulated_exp_error(kind)
        try:
            yield
        finally:
            self.library.emulated_exp_error(0)

    def _call(self, name: str, *arguments) -> None:
        error = getattr(self.library, f"emulated_{name}")(*arguments)
        if error is not None:
            raise RuntimeError(error.decode())

    @staticmethod
    def _view(logits: torch.Tensor) -> _Logits:
        assert logits.dim() == 3
        assert logits.stride(2) == 1 or logits.shape[2] == 1
        return _Logits(logits.data_ptr(), DTYPES[logits.dtype], *logits.shape, logits.stride(0), logits.stride(1), 0)

    def _inputs(self, logits, labels, weight, options):
        accumulator = torch.float64 if logits.dtype == torch.float64 else torch.float32
        weight = None if weight is None else weight.to(accumulator).contiguous()
        weight_sum = None if weight is None else weight.double().sum()
        options = {"ignore_index": -100, "logit_scale": 1.0, "vocab_size": logits.shape[2], **options}
        own = slice(options.get("class_offset", 0), options.get("class_offset", 0) + logits.shape[2])
        own_weight = None if weight is None else weight[own]
        own_sum = None if weight is None else own_weight.double().sum()
        inputs = _Inputs(
            self._view(logits),
            _Labels(labels.data_ptr(), labels.dtype == torch.int32, labels.stride(0), labels.stride(1)),
            None if weight is None else own_weight.data_ptr(),
            None if weight is None else weight_sum.data_ptr(),
            None if weight is None else own_sum.data_ptr(),
            _Options(**options),
        )
        inputs.keep_alive = (logits, labels, weight, weight_sum, own_sum)
        return inputs, accumulator

    @staticmethod
    def _sums(accumulator):
        tensors = {n: torch.zeros((), dtype=torch.int64 if n.startswith("num") else accumulator) for n in SUMS}
        return tensors, _Sums(*(tensors[name].data_ptr() for name in SUMS))

    def forward(self, logits, labels, weight=None, **options) -> dict[str, torch.Tensor]:
        inputs, accumulator = self._inputs(logits, labels, weight, options)
        tensors, sums = self._sums(accumulator)
        tensors["lse"] = torch.full(labels.shape, 1e30, dtype=torch.float64)
        tensors["nll"] = torch.full(labels.shape, 1e30, dtype=accumulator)
        pointers = [ctypes.c_void_p(tensors[name].data_ptr()) for name in ("lse", "nll")]
        self._call("forward", ctypes.byref(inputs), ctypes.byref(sums), *pointers)
        return tensors

    def backward(self, logits, labels, lse, nll, grad=1.0, weight=None, out=None, **options) -> torch.Tensor:
        inputs, accumulator = self._inputs(logits, labels, weight, options)
        grad = torch.tensor(grad, dtype=accumulator)
        out = guarded(torch.full_like(logits, 7.0).contiguous()) if out is None else out
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (lse, nll, grad)]
        self._call("backward", ctypes.byref(inputs), *pointers, ctypes.byref(self._view(out)))
        return out

    def forward_with_grad(self, logits, labels, grad=1.0, weight=None, out=None, **options):
        inputs, accumulator = self._inputs(logits, labels, weight, options)
        tensors, sums = self._sums(accumulator)
        grad = torch.tensor(grad, dtype=accumulator)
        out = guarded(torch.full_like(logits, 7.0).contiguous()) if out is None else out
        view = self._view(out)
        pointers = ctypes.byref(inputs), ctypes.byref(sums), ctypes.c_void_p(grad.data_ptr()), ctypes.byref(view)
        self._call("forward_with_grad", *pointers)
        return {**tensors, "grad_logits": out}

    def add(self, totals, logits, labels, grad=None, weight=None, **options) -> None:
        """Adds to totals (5,); with grad the gradient takes the place of the logits."""
        inputs, accumulator = self._inputs(logits, labels, weight, options)
        sums = _Sums(totals=totals.data_ptr())
        if grad is None:
            saved = [torch.empty(labels.shape, dtype=dtype) for dtype in (torch.float64, accumulator)]
            pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in saved]
            self._call("forward", ctypes.byref(inputs), ctypes.byref(sums), *pointers)
        else:
            factor, view = torch.tensor(grad, dtype=accumulator), self._view(logits)
            pointers = [ctypes.c_void_p(factor.data_ptr()), ctypes.byref(view)]
            self._call("forward_with_grad", ctypes.byref(inputs), ctypes.byref(sums), *pointers)

    def forward_shard(self, logits, labels, weight=None, **options) -> torch.Tensor:
        """ShardColumns (., B, T). options: class_offset and vocab_size too; weight (vocab_size,)."""
        inputs, _ = self._inputs(logits, labels, weight, options)
        count = 3 + (options.get("label_smoothing", 0) > 0) + 2 * options.get("metrics", False)
        columns = torch.full((count, *labels.shape), 1e30, dtype=torch.float64)
        self._call("forward_shard", ctypes.byref(inputs), ctypes.c_void_p(columns.data_ptr()))
        return columns

    @staticmethod
    def _rows(shape, accumulator, names):
        """A tensor for each number that is told of a row, and the struct of pointers to them."""
        tensors = {name: torch.full(shape, 77, dtype=dtype or accumulator) for name, dtype in names.items()}
        return tensors, (ctypes.c_void_p * len(names))(*(tensor.data_ptr() for tensor in tensors.values()))

    def tokens(self, logits, labels, weight=None, **options) -> dict[str, torch.Tensor]:
        """TokenRows (B, T)."""
        inputs, accumulator = self._inputs(logits, labels, weight, options)
        tensors, pointers = self._rows(labels.shape, accumulator, TOKENS)
        self._call("forward_tokens", ctypes.byref(inputs), ctypes.byref(pointers))
        return tensors

    def tokens_backward(self, logits, labels, found, grads, weight=None, out=None, **options) -> torch.Tensor:
        """grads: of the names of GRADS, (B, T) float64."""
        inputs, _ = self._inputs(logits, labels, weight, options)
        out = guarded(torch.full_like(logits, 7.0).contiguous()) if out is None else out
        given = [grads[name].contiguous() if name in grads else None for name in GRADS]
        pointers = (ctypes.c_void_p * len(GRADS))(*(None if grad is None else grad.data_ptr() for grad in given))
        saved = [ctypes.c_void_p(found[name].data_ptr()) for name in ("lse", "nll", "entropy")]
        view = ctypes.byref(self._view(out))
        self._call("backward_tokens", ctypes.byref(inputs), *saved, ctypes.byref(pointers), view)
        return out

    def _two(self, kind, logits, other, labels, weight, options):
        inputs, accumulator = self._inputs(logits, labels, weight, options)
        two = kind(inputs, self._view(other))
        two.keep_alive = inputs.keep_alive, other
        return two, accumulator

    def _two_backward(self, name, two, logits, found, grad, out):
        out = guarded(torch.full_like(logits, 7.0).contiguous()) if out is None else out
        pointers = (ctypes.c_void_p * len(found))(*(tensor.data_ptr() for tensor in found.values()))
        grad = grad.double().contiguous()
        arguments = (ctypes.c_void_p(grad.data_ptr()), ctypes.byref(self._view(out)))
        self._call(name, ctypes.byref(two), ctypes.byref(pointers), *arguments)
        return out

    def distillation(self, student, teacher, labels, beta, **options) -> dict[str, torch.Tensor]:
        """DistillationRows (B, T)."""
        two, accumulator = self._two(_DistillationInputs, student, teacher, labels, None, options)
        two.beta = beta
        tensors, pointers = self._rows(labels.shape, accumulator, DISTILLATION)
        self._call("forward_distillation", ctypes.byref(two), ctypes.byref(pointers))
        return tensors

    def distillation_backward(self, student, teacher, labels, found, grad, beta, out=None, **options) -> torch.Tensor:
        two, _ = self._two(_DistillationInputs, student, teacher, labels, None, options)
        two.beta = beta
        return self._two_backward("backward_distillation", two, student, found, grad, out)

    def targets(self, logits, targets, weight=None, **options) -> dict[str, torch.Tensor]:
        """TargetRows (B, T)."""
        labels = torch.zeros(logits.shape[:2], dtype=torch.int64)
        two, accumulator = self._two(_TargetInputs, logits, targets, labels, weight, options)
        tensors, pointers = self._rows(labels.shape, accumulator, TARGETS)
        self._call("forward_targets", ctypes.byref(two), ctypes.byref(pointers))
        return tensors

    def targets_backward(self, logits, targets, found, grad, weight=None, out=None, **options) -> torch.Tensor:
        labels = torch.zeros(logits.shape[:2], dtype=torch.int64)
        two, _ = self._two(_TargetInputs, logits, targets, labels, weight, options)
        return self._two_backward("backward_targets", two, logits, found, grad, out)

    def scale(self, values: torch.Tensor, factor: float) -> None:
        factor = torch.tensor(factor, dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)
        self._call("scale", ctypes.byref(self._view(values)), ctypes.c_void_p(factor.data_ptr()))

    def take_bad_label(self) -> tuple[int, int] | None:
        row, label = ctypes.c_int64(), ctypes.c_int64()
        found = self.library.emulated_take_bad_label(ctypes.byref(row), ctypes.byref(label))
        return (row.value, label.value) if found else None
