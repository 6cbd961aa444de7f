"""An audit runs no code of a folder that it was not told to trust, and says in one line what it cannot read."""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from training import build

from accumloss import auditing
from accumloss.__main__ import main
from accumloss.auditing import models

MODELING = """
from pathlib import Path
from transformers import BertConfig, BertForMaskedLM
Path({marker!r}).write_text("ran")
class OwnConfig(BertConfig):
    model_type = {model_type!r}
class OwnForMaskedLM(BertForMaskedLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny BERT."""
    folder = tmp_path_factory.mktemp("saved")
    build("BertForMaskedLM").save_pretrained(folder)
    return folder


@pytest.fixture
def marker(tmp_path):
    """A file that is there once code of the folder has run."""
    return tmp_path / "marker"


@pytest.fixture
def folder(saved, tmp_path, marker, monkeypatch):
    """The same with code beside the weights, and somebody who says yes to everything."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "folder"
    shutil.copytree(saved, folder)
    write_code(folder, marker)
    return folder


def write_code(folder, marker, model_type="own"):
    (folder / "modeling_own.py").write_text(MODELING.format(marker=str(marker), model_type=model_type))


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


AUTO_MAP = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForMaskedLM": "modeling_own.OwnForMaskedLM"}


def own_model(folder):
    change_config(folder, model_type="own", architectures=["OwnForMaskedLM"], auto_map=AUTO_MAP)


def own_class(folder):
    change_config(folder, architectures=["OwnForMaskedLM"], auto_map=AUTO_MAP)


def refused(capsys, *arguments):
    """The one line that an audit is refused with, after the bar of the weights that were read before it."""
    assert main(["audit", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line and not line.startswith("Loading weights")]
    assert captured.out == "" and len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("change", [own_model, own_class])
def test_code_of_a_folder_does_not_run(folder, marker, capsys, change):
    change(folder)
    message = refused(capsys, folder)
    assert not marker.exists()
    assert f"audit: expected {'an architecture' if change is not own_model else str(folder)}" in message
    assert "its code lies beside its weights" in message and "--trust-remote-code" in message
    assert sys.stdin.read(1) == "y"  # is there again, and nobody has read of it


def test_stock_asks_and_runs_it(folder, marker):
    """The danger: transformers takes the answer from standard input."""
    own_model(folder)
    transformers.AutoConfig.from_pretrained(folder)
    assert marker.exists()


@pytest.mark.parametrize("change", [own_model, own_class])
def test_trusted_code_runs(folder, marker, capsys, change):
    change(folder)
    write_code(folder, marker, json.loads((folder / "config.json").read_text())["model_type"])
    assert main(["audit", str(folder), "--trust-remote-code", "--json", "--batch-sizes", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["model"].startswith("OwnForMaskedLM")
    assert marker.exists()


def unused_map(folder):
    change_config(folder, auto_map=AUTO_MAP)  # of an architecture that transformers has


def custom_pipeline(folder):
    pipeline = {"impl": "modeling_own.OwnForMaskedLM", "pt": ["AutoModelForMaskedLM"], "type": "text"}
    change_config(folder, custom_pipelines={"own": pipeline})


def custom_generate(folder):
    (folder / "custom_generate").mkdir()
    (folder / "modeling_own.py").rename(folder / "custom_generate" / "generate.py")
    (folder / "generation_config.json").write_text("{}")


def tokenizer(folder):
    tokenizer = {"auto_map": {"AutoTokenizer": ["modeling_own.OwnForMaskedLM", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("change", [unused_map, custom_pipeline, tokenizer])
def test_code_that_a_model_does_not_need(folder, marker, change):
    change(folder)
    assert type(models.from_name(str(folder)).model) is transformers.BertForMaskedLM
    assert not marker.exists()


def test_code_for_generating_does_not_run(folder, marker, monkeypatch):
    for file in folder.glob("*.*"):
        if file.suffix != ".py":
            file.unlink()
    build("GPT2LMHeadModel").save_pretrained(folder)
    custom_generate(folder)
    assert type(models.from_name(str(folder)).model) is transformers.GPT2LMHeadModel
    assert not marker.exists()


def test_a_section_of_a_configuration_is_not_asked_about(folder, marker, capsys):
    """A section's class is chosen by an auto class that the model calls, to which no trust is passed on."""
    auto_map = {"AutoModel": f"{folder}--modeling_own.OwnForMaskedLM"}
    text = {"model_type": "clipseg_text_model", "tie_word_embeddings": False, "auto_map": auto_map}
    vision = {"model_type": "clip_vision_model", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": vision}
    (folder / "config.json").write_text(json.dumps({**config, "text_config": text}))
    assert "--trust-remote-code" in refused(capsys, folder)
    assert not marker.exists()


def test_trust_goes_with_a_model(capsys):
    for other in (["--all"], ["--factory", "mine:make"]):
        assert refused(capsys, "--trust-remote-code", *other) == "audit: expected MODEL with --trust-remote-code"


def test_every_checkpoint_is_read_with_a_word_on_trust():
    calls = []
    for path in Path(auditing.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "load"):
                calls.append((path.name, node.func.attr, {keyword.arg for keyword in node.keywords}))
    found = [(name, "trust_remote_code" in given) for name, attribute, given in calls if attribute == "from_pretrained"]
    assert sorted(found) == [("models.py", True), ("models.py", True), ("trainer_cases.py", True)]


# ------------------------------------------------------------------------------------------------------------- pickles


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "ran")


def without_weights(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()


def pickled(folder, marker):
    torch.save({"bert.embeddings.word_embeddings.weight": Bomb(marker)}, folder / "pytorch_model.bin")


def pickled_plainly(folder, marker):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Bomb(marker)}))


def pickled_in_pieces(folder, marker):
    name = "pytorch_model-00001-of-00001.bin"
    torch.save({"x": Bomb(marker)}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": {"x": name}})
    )


@pytest.mark.parametrize("write", [pickled, pickled_plainly, pickled_in_pieces])
def test_a_pickle_ends_in_a_message(folder, marker, capsys, write):
    without_weights(folder)
    write(folder, marker)
    message = refused(capsys, folder)
    assert (
        f"expected {folder} to hold weights" in message and "got: a pickle that does not hold tensors alone" in message
    )
    assert "model.save_pretrained(folder)" in message
    assert not marker.exists()
    assert "a pickle that" in refused(capsys, folder, "--trust-remote-code")  # trust is for code that can be read
    assert not marker.exists()


def test_a_pickled_adapter_ends_in_a_message(folder, marker, capsys):
    pytest.importorskip("peft", reason="an adapter needs peft")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query"], "auto_mapping": None}
    adapter["auto_mapping"] = {"base_model_class": "OwnForMaskedLM", "parent_library": "modeling_own"}
    (folder / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": str(folder)}))
    torch.save({"x": Bomb(marker)}, folder / "adapter_model.bin")
    assert f"audit: expected {folder} to hold weights" in refused(capsys, folder)
    assert not marker.exists()


def test_a_pickle_of_tensors_is_read(folder):
    wanted = models.from_name(str(folder)).model.state_dict()
    without_weights(folder)
    torch.save(wanted, folder / "pytorch_model.bin")
    found = models.from_name(str(folder)).model.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def of_another_size(folder):
    change_config(folder, hidden_size=32)


def other_weights(folder):
    without_weights(folder)
    torch.save({}, folder / "model.pt")


def empty_pickle(folder):
    without_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


def no_json(folder):
    (folder / "config.json").write_text("{")


def wrong_type(folder):
    change_config(folder, num_hidden_layers="three")


def no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize("change", [cut, of_another_size, other_weights, empty_pickle, no_json, wrong_type, no_config])
def test_a_folder_that_cannot_be_read_ends_in_a_message(folder, capsys, change):
    change(folder)
    message = refused(capsys, folder)
    is_of_config = change in (no_json, wrong_type, no_config)
    assert f"audit: expected {folder} to {'be a folder with a config' if is_of_config else 'hold weights'}" in message
    assert "--trust-remote-code" not in message
