"""The CUDA backend on the CPU: builds csrc/cuda with g++ and the emulator, and calls it on torch tensors.

docs/testing-cuda.md says what this can and cannot find.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

import torch

from accumloss import LossOptions

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc"
EMULATOR = pathlib.Path(__file__).resolve().parent / "emulator"
COMMON = ["csrc/cuda/bad_labels.cpp", "emulator/emulator.cpp", "emulator/driver.cpp"]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fsanitize=alignment", "-ffp-contract=off", "-Wno-unknown-pragmas"]
FLAGS += ["-DACCUMLOSS_EMULATE_CUDA"]
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
GUARD = 64  # elements of NaN on both sides of every tensor, which nothing may change and no sum may contain


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


def copy_sources(work: pathlib.Path, patches: tuple) -> None:
    """csrc and the emulator, with a fault; for float alone where there are patches."""
    shutil.copytree(KERNELS, work / "csrc", ignore=shutil.ignore_patterns("cpu"))
    shutil.copytree(EMULATOR, work / "emulator")
    for name, old, new in filter(None, patches):
        text = (work / "csrc" / name).read_text()
        assert text.count(old) == 1, f"the fault's text occurs {text.count(old)} times in csrc/{name}: {old!r}"
        (work / "csrc" / name).write_text(text.replace(old, new))
    if patches:
        staged = work / "csrc" / "cuda" / "staged.cu"
        staged.write_text(re.sub(r"^ACCUMLOSS_INSTANTIATE\(__.*\n", "", staged.read_text(), flags=re.MULTILINE))


def build(cache: pathlib.Path, patches: tuple[tuple[str, str, str], ...] = ()) -> pathlib.Path:
    """Compile the backend into a shared library.

    Args:
        cache: directory that keeps the libraries, by their sources.
        patches: (file under csrc, old text, new text), to plant a fault; the library is then built for float alone.
    """
    include = cuda_include()
    files = sorted([*KERNELS.glob("*.h"), *KERNELS.glob("cuda/*"), *EMULATOR.iterdir()])
    contents = repr((FLAGS, str(include), [(str(f), f.read_bytes()) for f in files]))

    def home(*variant: object) -> pathlib.Path:
        return cache / hashlib.sha256(repr((contents, variant)).encode()).hexdigest()[:24]

    library = home(patches) / "libemulated.so"
    if library.exists():
        return library
    work = pathlib.Path(tempfile.mkdtemp(dir=cache))
    copy_sources(work, patches)
    paths = ["-Iemulator", "-Icsrc/cuda", "-Icsrc", "-isystem", str(include)]

    def compiled(source: str, directory: pathlib.Path, suffix: str, *flags: str) -> pathlib.Path:
        target = directory / (pathlib.Path(source).name + suffix)
        if not target.exists():
            command = ["g++", *FLAGS, *flags, *paths, source, "-o", f"compiling{suffix}"]
            result = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            directory.mkdir(parents=True, exist_ok=True)
            (work / f"compiling{suffix}").rename(target)
        return target

    common = home("common")
    header = compiled("emulator/cuda_runtime.h", common, ".gch", "-x", "c++-header").with_suffix("")
    flags = ["-include", str(header), "-x", "c++", "-c"]  # compiled once, as it takes longer than the kernels
    objects = [str(compiled(source, common, ".o", *flags)) for source in COMMON]
    backends = ["emulator/float_backend.cpp"] if patches else ["csrc/cuda/cross_entropy.cu", "csrc/cuda/staged.cu"]
    objects += [str(compiled(backend, work, ".o", *flags)) for backend in backends]
    # Linked without -fsanitize: the emulator itself answers the sanitizer's calls.
    subprocess.run(["g++", "-shared", *objects, "-o", "libemulated.so"], cwd=work, check=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    (work / "libemulated.so").rename(library)
    shutil.rmtree(work)
    return library


# ThreadSanitizer sees the kernels alone; the emulator tells it of fibers and barriers.
SANITIZERS = {
    "thread": ("-fsanitize=thread", "-DEMULATOR_TSAN"),
    "address": ("-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all", ""),
}


def run_sanitized(
    sanitizer: str, folder: pathlib.Path, patches: tuple[tuple[str, str, str], ...] = ()
) -> subprocess.CompletedProcess:
    """The program emulator/sanitized.cpp, built with a sanitizer, perhaps with a fault, and run."""
    flags, defined = SANITIZERS[sanitizer]
    work = pathlib.Path(tempfile.mkdtemp(dir=folder))
    copy_sources(work, patches or ((),))
    base = ["g++", "-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-tsan"]
    base += ["-DACCUMLOSS_EMULATE_CUDA", "-DEMULATOR_SANITIZED", *defined.split()]
    base += ["-Iemulator", "-Icsrc/cuda", "-Icsrc", "-isystem", str(cuda_include())]
    instrumented = ["emulator/float_backend.cpp", "emulator/sanitized.cpp"]
    objects = []
    for source in [*instrumented, "emulator/driver.cpp", "csrc/cuda/bad_labels.cpp", "emulator/emulator.cpp"]:
        objects.append(pathlib.Path(source).name + ".o")
        own = flags.split() if source in instrumented else []
        subprocess.run([*base, *own, "-c", source, "-o", objects[-1]], cwd=work, check=True)
    subprocess.run(["g++", *flags.split(), *objects, "-o", "sanitized"], cwd=work, check=True)
    # The fibers' stacks are not the thread's: their use after return is not looked for.
    settings = {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    command = [shutil.which("setarch"), "-R", "./sanitized"] if shutil.which("setarch") else ["./sanitized"]
    return subprocess.run(
        command, cwd=work, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )


class _Options(ctypes.Structure):  # csrc/options.h, whose list is that of LossOptions
    _fields_ = [
        ("shift", ctypes.c_int64),
        *((f.name, {"int": ctypes.c_int64, "float": ctypes.c_double}[f.type]) for f in dataclasses.fields(LossOptions)),
        ("metrics", ctypes.c_bool),
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
        ("options", _Options),
    ]


class _Sums(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("loss_sum", "num_items", "total_weight", "num_correct", "entropy_sum")
    ]


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
    """The four launchers on tensors of the CPU: logits (B, T, V), labels (B, T)."""

    def __init__(self, library: pathlib.Path):
        self.library = ctypes.CDLL(str(library))
        for name in ("forward", "backward", "forward_with_grad", "scale"):
            getattr(self.library, f"emulated_{name}").restype = ctypes.c_char_p
        self.library.emulated_bulk_copies.restype = ctypes.c_int64
        self.library.emulated_inputs_size.restype = ctypes.c_int64
        assert self.library.emulated_inputs_size() == ctypes.sizeof(_Inputs)

    def seed(self, value: int) -> None:
        self.library.emulated_seed(ctypes.c_uint64(value))

    def device(self, capability: int, multiprocessors: int) -> None:
        self.library.emulated_device(capability, multiprocessors)

    def bulk_copies(self) -> int:
        """Since the last call."""
        return self.library.emulated_bulk_copies()

    @contextlib.contextmanager
    def plan(self, plan: str, capability: int = 90, multiprocessors: int = 2):
        """Kernels forced as ACCUMLOSS_CUDA_PLAN does it, on such a device."""
        before = os.environ.get("ACCUMLOSS_CUDA_PLAN")
        os.environ["ACCUMLOSS_CUDA_PLAN"] = plan
        self.device(capability, multiprocessors)
        try:
            yield
        finally:
            del os.environ["ACCUMLOSS_CUDA_PLAN"]
            if before is not None:
                os.environ["ACCUMLOSS_CUDA_PLAN"] = before
            self.device(90, 2)

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
        inputs = _Inputs(
            self._view(logits),
            _Labels(labels.data_ptr(), labels.dtype == torch.int32, labels.stride(0), labels.stride(1)),
            None if weight is None else weight.data_ptr(),
            None if weight is None else weight_sum.data_ptr(),
            _Options(**{"ignore_index": -100, "logit_scale": 1.0, **options}),
        )
        inputs.keep_alive = (logits, labels, weight, weight_sum)
        return inputs, accumulator

    @staticmethod
    def _sums(accumulator):
        names = [name for name, _ in _Sums._fields_]
        tensors = {n: torch.zeros((), dtype=torch.int64 if n.startswith("num") else accumulator) for n in names}
        return tensors, _Sums(*(tensors[name].data_ptr() for name in names))

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

    def scale(self, values: torch.Tensor, factor: float) -> None:
        factor = torch.tensor(factor, dtype=torch.float64 if values.dtype == torch.float64 else torch.float32)
        self._call("scale", ctypes.byref(self._view(values)), ctypes.c_void_p(factor.data_ptr()))

    def take_bad_label(self) -> tuple[int, int] | None:
        row, label = ctypes.c_int64(), ctypes.c_int64()
        found = self.library.emulated_take_bad_label(ctypes.byref(row), ctypes.byref(label))
        return (row.value, label.value) if found else None
