"""The imports run one way (docs/internals/index.md): these tests read the sources and name each line that does not."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "accumloss"

# C++: what a file, or else its folder, may include of our own headers; from the lowest up.
PORTABLE = {"options.h", "row.h", "backend.h"}
MAY_INCLUDE = {
    "options.h": set(),
    "row.h": {"options.h"},
    "backend.h": {"options.h"},
    "ops.h": {"backend.h"},
    "ops.cpp": PORTABLE | {"ops.h"},
    "cpu": PORTABLE | {"cpu"},
    "cuda": PORTABLE | {"cuda"},
    "bindings.cpp": PORTABLE | {"ops.h", "cuda"},
    "module.cpp": PORTABLE | {"cpu", "cuda"},
}
NO_TORCH = ("options.h", "row.h", "backend.h", "cpu/rows/")  # testable alone
STABLE_ABI = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/shim.h")

# Python: a module imports from the rows above its own only. Inside a row nothing imports a neighbour.
LAYERS = [
    {"_C", "_compat", "display", "inexact", "keywords", "missing", "sums"},
    {"inside", "options"},
    {"checks", "gpus"},
    {"arguments"},
    {"reference"},
    {"fallback"},
    {"ops"},
    {"parallel", "weighting"},
    {"cuda", "linear"},
    {"losses", "per_token"},
    {"accumulation", "transformers", "trl"},
    {"auditing", "demo", "environment"},
    {"__init__"},
    {"__main__"},
]
KNOWS_TRANSFORMERS = {"transformers", "auditing", "demo", "__main__"}


def cpp_files():
    return sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def includes(path):
    """(line number, header as written, header relative to csrc or None) of each #include."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line)
        if found:
            own = found[1] == '"'
            yield number, found[2], (path.parent / found[2]).resolve().relative_to(CSRC).as_posix() if own else None


def room(name):
    """The key of MAY_INCLUDE that a file falls under: its folder, or its own name at the top."""
    return name.split("/")[0]


def include_violations(path, text_of_includes=None):
    name = path.relative_to(CSRC).as_posix()
    for number, header, own in text_of_includes or includes(path):
        where = f"csrc/{name}:{number} includes {header}"
        if own is not None and room(own) not in MAY_INCLUDE.get(room(name), set()):
            yield where
        if header.startswith(("torch/", "ATen/", "c10/")) and not header.startswith(STABLE_ABI):
            yield f"{where}, outside of the stable ABI"
        if header.startswith(("torch/", "cuda", "pybind11/")) and name.startswith(NO_TORCH):
            yield where
        if header.startswith("pybind11/") and name != "module.cpp":
            yield where
        if header.startswith("cuda") and room(name) != "cuda" and own is None:
            yield where


def test_includes_run_one_way():
    files = cpp_files()
    assert files
    rooms = {room(path.relative_to(CSRC).as_posix()) for path in files}
    assert rooms <= set(MAY_INCLUDE), "a new file: give it its place above"
    assert [v for path in files for v in include_violations(path)] == []


@pytest.mark.parametrize(
    ("name", "header", "own"),
    [
        ("cpu/launch.cpp", "../cuda/context.h", "cuda/context.h"),
        ("cuda/context.h", "../cpu/rows/table.h", "cpu/rows/table.h"),
        ("ops.cpp", "cpu/rows/table.h", "cpu/rows/table.h"),
        ("options.h", "row.h", "row.h"),
        ("cpu/rows/plain.h", "torch/csrc/stable/ops.h", None),
        ("row.h", "torch/csrc/stable/tensor.h", None),
        ("row.h", "cuda_runtime.h", None),
        ("ops.cpp", "pybind11/pybind11.h", None),
        ("ops.cpp", "ATen/ATen.h", None),
        ("cuda/cross_entropy.cu", "torch/extension.h", None),
    ],
)
def test_include_violations_are_seen(name, header, own):
    assert list(include_violations(CSRC / name, [(1, header, own)]))


def test_only_bindings_names_dispatch_keys():
    naming = [p.name for p in cpp_files() if re.search(r"\b(STABLE_)?TORCH_LIBRARY", p.read_text())]
    assert naming == ["bindings.cpp"]


def python_modules():
    """(module, file) of the package; a subpackage counts as one module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        yield (relative.parts[0] if len(relative.parts) > 1 else relative.stem), path


def imported(tree, depth):
    """(line number, absolute name) of each import; depth: folders between the file and the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "" if node.level == 0 else "accumloss." if node.level == depth + 1 else "accumloss.<below>."
            base = prefix + (node.module or "")
            if base.rstrip(".") == "accumloss":  # from . import ops, from accumloss import ops
                yield from ((node.lineno, f"accumloss.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def import_violations(module, tree, depth=0):
    layer = next((i for i, row in enumerate(LAYERS) if module in row), None)
    assert layer is not None, f"accumloss/{module}: a new module: give it its place above"
    below = set().union(*LAYERS[:layer])
    known = set().union(*LAYERS)
    for line, name in imported(tree, depth):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "accumloss" and target in known - below - {module}:
            yield f"accumloss/{module}:{line} imports {name}"
        public = top == "accumloss" and target not in known | {"<below>"}
        if public and module not in ("__init__", "__main__"):
            yield f"accumloss/{module}:{line} imports {name} from the public package, which imports it"
        if top == "transformers" and module not in KNOWS_TRANSFORMERS:
            yield f"accumloss/{module}:{line} imports {name}: the core works without it"


def test_imports_run_one_way():
    modules = list(python_modules())
    assert modules
    found = []
    for module, path in modules:
        depth = len(path.relative_to(PACKAGE).parts) - 1
        found += import_violations(module, ast.parse(path.read_text()), depth)
    assert found == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("options", "from .reference import rows"),
        ("ops", "from . import losses"),
        ("reference", "import accumloss.ops"),
        ("losses", "from accumloss import causal_lm_loss"),
        ("losses", "def f():\n    import transformers.utils"),
        ("sums", "from . import _C"),
    ],
)
def test_import_violations_are_seen(module, source):
    assert list(import_violations(module, ast.parse(source)))


def test_only_ops_touches_the_compiled_ops():
    touching = set()
    for module, path in python_modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node).endswith("torch.ops"):
                touching.add(module)
    assert touching == {"ops"}
