"""python -m accumloss: help, env, and the one-line errors of demo."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import accumloss
from accumloss import __main__ as command


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


def test_env_names_versions_and_build(capsys):
    assert command.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for value in (torch.__version__, accumloss.__version__, accumloss.build_info()["cpu_capability"]):
        assert any(line.split()[-1] == str(value) for line in lines)


def test_env_json_is_the_environment(capsys):
    assert command.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["threads"] == torch.get_num_threads()
    assert len(facts["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert facts["build"].keys() == accumloss.build_info().keys()


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
