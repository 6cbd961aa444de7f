"""python -m accumloss: help, what env tells, and the one-line errors of demo."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import accumloss
from accumloss import __main__ as command
from accumloss import environment, fallback


def test_main_without_arguments_prints_help(capsys):
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert "env" in printed
    assert "demo" in printed


def test_main_runs_as_a_module():
    folder = str(Path(accumloss.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-m", "accumloss", "env", "--json"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout)["accumloss"] == accumloss.__version__


# What a report has, and what its parts are: with a key that goes or changes its meaning SCHEMA is raised.
TEXT, MAYBE, NUMBER = (str,), (str, type(None)), (int,)
DEVICE = {
    "device": TEXT, "name": TEXT, "capability": MAYBE, "served_by": TEXT, "kernels": (dict,), "why": MAYBE, "remedy": MAYBE,
    "free_bytes": (int, type(None)), "total_bytes": (int, type(None)),
}  # fmt: skip
SCHEMA_1 = {
    "schema": NUMBER, "accumloss": TEXT, "import_error": (type(None), dict), "python": TEXT, "torch": TEXT, "torch_cuda": MAYBE, "torch_hip": MAYBE,
    "packages": dict.fromkeys(("transformers", "accelerate", "peft", "trl", "numpy"), MAYBE),
    "platform": TEXT, "libc": MAYBE, "cpu": MAYBE, "cores": NUMBER, "threads": NUMBER, "torch_cpu_capability": TEXT,
    "build": (dict,),  # build_info()
    "devices": [DEVICE],
    "transformers": {
        "installed": MAYBE, "tested": TEXT, "losses": (list,), "warnings": (list,), "error": MAYBE, "said": TEXT,
    },
    "variables": (dict,),
}  # fmt: skip


def check_schema(facts, schema, where="env"):
    if isinstance(schema, list):
        assert facts, where
        for index, fact in enumerate(facts):
            check_schema(fact, schema[0], f"{where}[{index}]")
    elif isinstance(schema, dict):
        assert facts.keys() == schema.keys(), where
        for key, value in facts.items():
            check_schema(value, schema[key], f"{where}.{key}")
    else:
        assert type(facts) in schema, f"{where}: {facts!r}"


def environment_of(capsys):
    assert command.main(["env", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_env_json_has_its_schema(capsys, monkeypatch):
    monkeypatch.setenv("ACCUMLOSS_KEEP_MEMORY", "0")
    facts = environment_of(capsys)
    check_schema(facts, SCHEMA_1)
    assert facts["schema"] == 1
    assert facts["threads"] == torch.get_num_threads()
    assert facts["build"] == accumloss.build_info()
    parts = {"version", "torch", "compiler", "cuda", "cuda_architectures", "cpu_capability", "fallback"}
    assert parts <= facts["build"].keys()
    assert facts["variables"]["ACCUMLOSS_KEEP_MEMORY"] == "0"
    cpu = facts["devices"][0]
    assert (cpu["device"], cpu["served_by"], cpu["why"]) == ("cpu", "kernels", None)
    assert 0 < cpu["free_bytes"] < cpu["total_bytes"]


def test_env_names_versions_build_and_devices(capsys, monkeypatch):
    monkeypatch.setenv("ACCUMLOSS_KEEP_MEMORY", "0")
    assert command.main(["env"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"accumloss {accumloss.__version__}"
    of: dict[str, str] = {}
    last = ""
    for line in lines:  # a long value goes on below itself
        name, _, text = line[2:].partition("  ")
        last = name or last
        of[last] = f"{of.get(last, '')} {text.strip()}".strip()
    assert of["torch"] == torch.__version__
    assert of["build cpu capability"] == accumloss.build_info()["cpu_capability"]
    assert f"kernels ({accumloss.build_info()['cpu_capability']} for any row)" in of["device cpu"]
    assert "GiB free" in of["device cpu"]
    assert of["ACCUMLOSS_KEEP_MEMORY"] == "0"


def test_env_says_what_registering_does_and_takes_it_back(capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    before = accumloss.registered_losses()
    said = environment_of(capsys)["transformers"]
    assert said["installed"] == transformers.__version__
    assert {"ForCausalLM", "ForMaskedLM"} <= set(said["losses"]) and said["error"] is None
    assert accumloss.registered_losses() == before
    with accumloss.registered(metrics=True):
        environment_of(capsys)
        assert accumloss.registered_losses()["ForCausalLM"].startswith("accumloss.")


def test_env_is_there_where_registering_fails(capsys, monkeypatch):
    """The report of what is wrong must not end in it."""
    if importlib.util.find_spec("transformers") is not None:

        def registered():
            raise RuntimeError("expected transformers.Trainer to have train, got a transformers that does not")

        monkeypatch.setattr("accumloss.transformers.registered", registered)
        assert "to have train" in environment_of(capsys)["transformers"]["error"]
    monkeypatch.setattr(environment, "_version", lambda package: None)
    facts = environment_of(capsys)
    assert facts["transformers"]["error"] == "transformers is not installed"
    check_schema(facts, SCHEMA_1)


def test_env_says_what_serves_each_gpu(capsys, monkeypatch):
    """One with an image in the build, one without, of a CUDA that is none."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index == 0 else (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 4 * 2**30))
    monkeypatch.setattr(fallback, "_architectures", lambda: "90-real")
    monkeypatch.setattr(environment, "_registration", lambda problem: {"said": ""})
    _, served, unserved = environment_of(capsys)["devices"]
    check_schema([served, unserved], [DEVICE])
    assert (served["device"], served["capability"], served["served_by"]) == ("cuda:0", "sm_90", "kernels")
    assert served["kernels"] == {f"V = {V}": accumloss.plan(V, arch="sm_90").kernel for V in (32000, 128256)}
    assert (unserved["served_by"], unserved["kernels"]) == ("fallback", {})
    assert "sm_120" in unserved["why"] and "CUDAARCHS=120" in unserved["remedy"]
    assert unserved["free_bytes"] == 3 * 2**30
    monkeypatch.setattr(fallback, "_architectures", lambda: None)
    assert command.main(["env"]) == 0
    assert "device cuda:0" in (printed := capsys.readouterr().out)
    assert "GPU 0, sm_90: plain PyTorch: this accumloss was built without CUDA" in printed


# Where accumloss does not import -----------------------------------------------------------------------------------------

LIBRARY = "extern int accumloss_is_not_there(void);\nint PyInit__C(void) { return accumloss_is_not_there(); }\n"


def broken(tmp_path, kind):
    """A copy of the package whose compiled module is missing, of another Python, no library, or of another torch."""
    shutil.copytree(
        Path(accumloss.__file__).parent, tmp_path / "accumloss", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if kind == "another Python":
        (tmp_path / "accumloss" / "_C.cpython-39-x86_64-linux-gnu.so").write_bytes(b"")
    if kind == "cut off":
        (tmp_path / "accumloss" / f"_C{suffix}").write_bytes(b"\x7fELF")
    if kind == "another torch":
        (tmp_path / "_C.c").write_text(LIBRARY)
        command = [
            "cc",
            "-shared",
            "-fPIC",
            "-Wl,-z,now",
            str(tmp_path / "_C.c"),
            "-o",
            str(tmp_path / "accumloss" / f"_C{suffix}"),
        ]
        subprocess.run(command, check=True)
    return tmp_path


def python(folder, *arguments, has_torch=True):
    """Python without site: an editable install would find its own module. Where torch is: its folder alone."""
    sites = [folder, *(path for path in sys.path if path and has_torch and Path(path).name.endswith("-packages"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sites)), "ACCUMLOSS_KEEP_MEMORY": "0"}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


BROKEN = {
    "missing": ("cannot import name '_C'", "leave the folder of the sources"),
    "another Python": ("_C.cpython-39-x86_64-linux-gnu.so is there, which cpython-", "install accumloss again"),
    "cut off": ("file too short", "install accumloss again beside this torch"),
    "another torch": ("undefined symbol: accumloss_is_not_there", "this one does not fit what was built: install accumloss again"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_env_says_what_is_known_where_the_module_does_not_import(kind, tmp_path):
    why, remedy = BROKEN[kind]
    folder = broken(tmp_path, kind)
    ran = python(folder, "-m", "accumloss", "env", "--json")
    facts = json.loads(ran.stdout)
    assert ran.returncode == 1, ran.stderr
    check_schema({**facts, "transformers": None}, {**SCHEMA_1, "transformers": MAYBE})
    assert why in facts["import_error"]["error"] and remedy in facts["import_error"]["remedy"]
    assert facts["torch"] == torch.__version__ and facts["build"] == {}
    assert (
        facts["devices"][0]["served_by"] == "nothing"
        and facts["devices"][0]["remedy"] == facts["import_error"]["remedy"]
    )
    assert facts["variables"]["ACCUMLOSS_KEEP_MEMORY"] == "0"
    failed = python(folder, "-c", "import accumloss")
    assert why in failed.stderr.splitlines()[-1] and remedy in failed.stderr.splitlines()[-1]
    if kind != "missing":
        return
    shown = python(folder, "-m", "accumloss", "env")
    assert shown.returncode == 1 and "which does not import" in shown.stdout.splitlines()[0]
    words = " ".join(shown.stdout.split())
    assert why in words and remedy in words and torch.__version__ in words
    for arguments in (("-m", "accumloss", "audit"), ("-c", "import accumloss.losses")):
        failed = python(folder, *arguments)
        (line,) = [line for line in failed.stderr.splitlines() if "accumloss: expected the compiled module" in line]
        assert failed.returncode == 1 and failed.stdout == "" and why in line and remedy in line


def test_env_says_that_torch_is_missing(tmp_path):
    ran = python(broken(tmp_path, "missing"), "-m", "accumloss", "env", "--json", has_torch=False)
    facts = json.loads(ran.stdout)
    assert facts["torch"] is None and facts["devices"] == []
    assert "install torch 2.10 or newer" in facts["import_error"]["remedy"]


def test_another_program_that_imports_accumloss_is_not_the_command(tmp_path):
    folder = broken(tmp_path, "missing")
    (folder / "program.py").write_text("import accumloss\n")
    failed = python(folder, "-m", "program", "env")
    assert failed.stdout == "" and "accumloss: expected the compiled module" in failed.stderr.splitlines()[-1]


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"accumloss {accumloss.__version__}\n"


def test_main_refuses_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["no-such-command"])
    assert exit.value.code == 2
    assert "no-such-command" in capsys.readouterr().err


def refused(capsys, *arguments):
    """The one line that the demo is refused with."""
    assert command.main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("package", ["transformers", "tokenizers", "matplotlib", "rich", "accelerate"])
def test_demo_names_the_package_to_install(package, monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    assert f"pip install {package}" in refused(capsys, "--out", str(tmp_path))


@pytest.fixture
def packages():
    for package in ("transformers", "tokenizers", "matplotlib", "rich", "accelerate"):
        pytest.importorskip(package, reason=f"the demo needs {package}")


def test_demo_refuses_bad_options(packages, capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert "--steps" in refused(capsys, "--steps", "0", "--out", str(tmp_path))
    assert "no-such-device" in refused(capsys, "--device", "no-such-device", "--out", str(tmp_path))
    assert str(file) in refused(capsys, "--out", str(file))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_demo_refuses_a_gpu_that_is_not_there(packages, capsys, tmp_path):
    assert "cuda" in refused(capsys, "--device", "cuda", "--out", str(tmp_path))
