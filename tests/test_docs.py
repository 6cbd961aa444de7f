"""The pages: prose that reads well, links that lead somewhere, names that exist, figures that were measured, blocks that run."""

import csv
import dataclasses
import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import accumloss
from accumloss import __main__ as command

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "tests" / "README.md",
    ROOT / "examples" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
COLUMNS = 100

spec = importlib.util.spec_from_file_location("docs", ROOT / "build_tools" / "docs.py")
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def prose(text):
    """(line number, line) of what is no code, by a fence or by four spaces."""
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            is_code = not is_code
        elif not is_code and not line.startswith("    "):
            yield number, line


def section(text, heading):
    return text.split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]


def flat(name):
    """A page of docs/ in one line."""
    return " ".join((DOCS / name).read_text().split())


def table(text):
    """The cells of each row of the tables of a text, without their headings."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for i, row in enumerate(rows) if not is_rule(row) and not (i + 1 < len(rows) and is_rule(rows[i + 1]))]


def is_rule(row):
    return all(re.fullmatch(r":?-+:?", cell) for cell in row)


# Prose ----------------------------------------------------------------------------------------------------------------


def too_long(text):
    """Prose beyond the columns; tables, code, pictures and what no space divides are as long as they are."""
    for number, line in prose(text):
        is_one_word = " " not in LINK.sub("link", line).strip()
        if len(line) > COLUMNS and not line.startswith(("|", "![", "<!--")) and not is_one_word:
            yield f"{number}: {line}"


def test_prose_keeps_to_its_columns():
    assert [f"{name_of(page)}:{line}" for page in PAGES for line in too_long(page.read_text())] == []
    assert list(too_long("word " * 30)) and not list(too_long("```\n" + "word " * 30 + "\n```"))


def test_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    assert any("No GPU has run it" in line for line in lines[:10])


# Links ----------------------------------------------------------------------------------------------------------------


def slug(heading):
    """The anchor that GitHub, and the site, make of a heading."""
    return re.sub(r" ", "-", re.sub(r"[^\w\- ]", "", heading.strip().lower()))


def anchors(page):
    return {slug(line.lstrip("#")) for _, line in prose(page.read_text()) if line.startswith("#")}


def dead_links(page, text):
    for number, line in prose(text):
        for target in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            where, _, anchor = target.partition("#")
            if "://" in where:
                continue
            there = (page.parent / where).resolve() if where else page
            if not there.is_file() or (anchor and anchor not in anchors(there)):
                yield f"{name_of(page)}:{number}: {target}"


def test_links_lead_somewhere():
    assert [link for page in PAGES for link in dead_links(page, page.read_text())] == []
    for bad in ("no-such-page.md", "README.md#no-such-heading"):
        assert list(dead_links(README, f"[x]({bad})"))


def test_a_mention_of_a_page_is_a_link():
    bare = re.compile(r"(?<![\w/(\]])docs/[\w/-]+\.md")
    found = [
        f"{name_of(page)}:{number}: {line}"
        for page in sorted(DOCS.rglob("*.md"))
        for number, line in prose(page.read_text())
        if bare.search(line)
    ]
    assert found == []


def test_every_page_is_reached_from_the_index():
    for index in (DOCS / "index.md", DOCS / "internals" / "index.md"):
        targets = {(index.parent / link.split("#")[0]).resolve() for link in LINK.findall(index.read_text())}
        assert [page.name for page in sorted(index.parent.glob("*.md")) if page != index and page not in targets] == []


def test_the_site_has_every_page(tmp_path):
    site.stage(tmp_path / "staged")
    staged = {path.relative_to(tmp_path / "staged").as_posix() for path in (tmp_path / "staged").rglob("*.md")}
    assert staged == set(re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    assert "::: accumloss.TokenSums" in (tmp_path / "staged" / "api.md").read_text()
    with pytest.raises(ValueError, match=r"docs/x\.md: expected a link to a page or a picture, got \.\./setup\.py"):
        site.relinked("[x](../setup.py)", "docs/x.md", "x.md", {})


def test_lists_and_tables_are_spaced_for_the_site():
    text = "One\n- a\n  more\n  - b\n\nTwo\n| c |\n|---|\n| d |\n```\n- e\n```\n1. f\n   more\nThree"
    wanted = "One\n\n- a\n    more\n    - b\n\nTwo\n\n| c |\n|---|\n| d |\n```\n- e\n```\n\n1. f\n      more\nThree"
    assert site.spaced(text) == wanted


# Names ----------------------------------------------------------------------------------------------------------------


def test_paths_that_are_named_exist():
    path = re.compile(r"`((?:accumloss|benchmarks|build_tools|csrc|tests)/[\w./-]+)`")
    missing = [
        f"{name_of(page)}: {name}"
        for page in PAGES
        for name in path.findall(page.read_text())
        if not (ROOT / name).exists()
    ]
    assert missing == []


def test_tests_that_are_named_exist():
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    names = {path.name for path in (ROOT / "tests").rglob("*")}
    missing = []
    for page in PAGES:
        for name in re.findall(r"`(?:[\w/]+/)?((?:test_|distributed_)\w+(?:\.py)?)`", page.read_text()):
            exists = name in names if name.endswith(".py") else f"def {name}(" in sources
            missing += [] if exists else [f"{name_of(page)}: {name}"]
    assert missing == []


def test_public_names_that_are_used_exist():
    missing = []
    for page in PAGES:
        for name in re.findall(r"(?<!ops\.)\baccumloss\.([a-zA-Z]\w+)\b(?!/|\.py)", page.read_text()):
            is_module = (ROOT / "accumloss" / name).is_dir() or (ROOT / "accumloss" / f"{name}.py").is_file()
            missing += [] if name in accumloss.__all__ or is_module else [f"{name_of(page)}: accumloss.{name}"]
    assert [name for name in missing if not name.endswith("accumloss.NAME")] == []


def test_the_house_is_the_tree():
    """docs/internals/index.md lists each file of the sources, by folder, and no other."""
    text = (DOCS / "internals" / "index.md").read_text().split("\n## The house\n")[1].split("\n## ")[0]
    listed = set()
    for part in text.split("\n### ")[1:]:
        folder = re.match(r"`(.*)`", part)
        names = {name for row in table(part) for name in re.findall(r"`([^`]+)`", row[0])}
        listed |= {(folder[1] if folder else "") + name for name in names}
    tree = {
        path.relative_to(ROOT).as_posix()
        for folder in ("accumloss", "build_tools", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".so"}
    }
    assert listed - tree == {"setup.py", "CMakeLists.txt", "pyproject.toml", "Makefile"}
    assert tree - listed == set()


def test_methods_in_the_docs_are_those_that_are_wrapped():
    pytest.importorskip("transformers", reason="needs transformers")
    from accumloss.transformers.patches import trainer_methods

    page = (DOCS / "internals" / "transformers.md").read_text()
    listed = {row[0].strip("`"): row[1] for row in table(section(page, "## The methods that are wrapped"))}
    assert set(listed) == set(trainer_methods.METHODS)
    assert {name for name, of in listed.items() if "instance" in of} == set(trainer_methods.AROUND)
    assert set(trainer_methods.AROUND) <= set(trainer_methods.METHODS)


def test_options_in_the_docs_are_those_of_the_losses():
    page = (DOCS / "losses.md").read_text()
    head = next(line for line in page.splitlines() if line.startswith("| loss |"))
    names = re.findall(r"`(\w+)`", head)
    assert names[:-2] == [field.name for field in dataclasses.fields(accumloss.LossOptions)]
    assert names[-2:] == ["weight", "inplace"]


def test_what_is_told_is_what_the_code_says():
    """Each message of docs/transformers.md stands in the sources of the integration, word for word."""
    page = (DOCS / "transformers.md").read_text()
    code = "\n".join(path.read_text() for path in (ROOT / "accumloss" / "transformers").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    parts = [
        part.strip(" .,") for message, _ in table(section(page, "## What is told")) for part in message.split("...")
    ]
    assert len(parts) > 10 and [part for part in parts if part not in code] == []


def test_messages_of_troubleshooting_are_those_of_the_code():
    code = "\n".join(path.read_text() for path in (ROOT / "accumloss").rglob("*.py"))
    code += (ROOT / "csrc" / "ops.cpp").read_text() + (ROOT / "csrc" / "cpu" / "labels.h").read_text()
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    rows = table(section((DOCS / "troubleshooting.md").read_text(), "## A warning or an error"))
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row[0])]
    assert len(messages) > 8 and [message for message in messages if message not in code] == []


def test_numbers_in_the_docs_are_those_of_the_code():
    from accumloss.accumulation import window

    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    doubles = window.KNOWN + 1  # of the packed sums; the last of them
    assert f"One all_reduce of {words[doubles]} doubles" in flat("internals/accumulator.md")
    assert f"| one all_reduce a dimension of the mesh | {8 * doubles} |" in flat("many-devices.md")
    architectures = re.search(r"foreach\(listed ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())[1]
    told = re.search(r"compiled for sm_([\d, ]+) and (\d+)", " ".join(README.read_text().split()))
    assert [*told[1].split(", "), told[2]] == re.findall(r"\d+", architectures)


def test_numbers_of_the_trained_heads():
    pytest.importorskip("transformers", reason="needs transformers")
    import tolerances
    from training import HEADS

    assert f"trains {len(HEADS)} heads" in flat("internals/exactness.md")
    bounds = f"gradient {tolerances.TRAINER_GRADIENT:.0e}, loss {tolerances.TRAINER_LOSS:.0e} relative"
    assert bounds.replace("e-0", "e-") in flat("internals/exactness.md")


def test_api_page():
    page = DOCS / "api.md"
    assert page.read_text() == site.api(), "python build_tools/docs.py api"
    names = [row[0].strip("`") for row in table(page.read_text())]
    assert names[0] == "TokenSums" and sorted(names) == sorted(accumloss.__all__)


def test_commands_in_the_docs_are_known():
    """make's targets, and what python -m accumloss is called with."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    parser = command.make_parser()
    found = 0
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.M):
            assert target in targets, f"{name_of(page)}: make {target}"
        for line in re.findall(r"(?:^|`)python -m accumloss ([^`#\n]*)", text, re.M):
            arguments = [word for word in shlex.split(line) if not word.startswith("$")]
            options, unknown = parser.parse_known_args(arguments)
            assert not unknown and options.command, f"{name_of(page)}: {line}"
            found += 1
    assert found > 5


# Figures --------------------------------------------------------------------------------------------------------------


def rows_of(name):
    with (RESULTS / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def shown(value, digits=2):
    """A number as README rounds it."""
    return f"{value:.1e}" if value < 1e-2 else f"{float(f'{value:.{digits}g}'):g}"


def test_figures_of_the_heads_are_measured():
    measured = {}
    for row in rows_of("exactness.csv"):
        measured.setdefault(row["class"], {}).setdefault(row["way"], float(row["gradient_error"]))
    for row in rows_of("trainers.csv"):
        if row["stock_4x2"]:
            ways = {way: float(row[f"{way}_4x2"]) for way in ("stock", "accumloss")}
            measured.setdefault(row["trainer"], ways)
    rows = [row for row in table(section(README.read_text(), "## Figures")) if len(row) == 3]
    assert len(rows) == 4
    for head, stock, ours in rows:
        found = measured[re.search(r"`(\w+)`", head)[1]]
        for cell, value in ((stock, found["stock"]), (ours, found["accumloss"])):
            assert float(cell) == pytest.approx(value, rel=0.05), head  # two digits


def test_figures_of_speed_are_measured():
    rows = [row for row in table(section(README.read_text(), "## Figures")) if len(row) == 5]
    assert len(rows) == 3
    for shape, fresh, warmed, stock, ours in rows:
        tokens, vocab = shape.split(" × ")
        of = {
            (row["regime"], row["peer"]): row
            for row in rows_of("cross_entropy_cpu.csv")
            if (row["rows"], row["vocab"], row["dtype"], float(row["ignored"])) == (tokens, vocab, "bf16", 0.0)
        }
        for cell, regime in ((fresh, "fresh"), (warmed, "warmed")):
            assert cell == shown(float(of[regime, "accumloss"]["ratio_to_stock"])) + "×"
        assert float(stock.split("×")[0]) == round(float(of["fresh", "stock"]["peak_extra_over_logits"]), 1)
        assert float(ours.rstrip("×")) == round(float(of["fresh", "accumloss"]["peak_extra_over_logits"]), 1)


def test_figures_of_the_censuses_are_measured():
    census = rows_of("census.csv")
    ran = [row for row in census if row["verdict"] != "not run"]
    wrong = [row for row in ran if row["stock_exact"] != "1"]
    exact = [row for row in ran if row["verdict"] == "exact"]
    readme, problem = README.read_text(), (DOCS / "problem.md").read_text()
    for text in (readme, problem):
        told = " ".join(text.split())
        assert f"{len(exact)} are " in told and f"other {len(ran) - len(exact)} cannot be" in told
    assert f"Of {len(ran)} classes" in readme and f"[{len(wrong)} train wrongly]" in " ".join(readme.split())
    causes = {row["stock_cause"] for row in wrong}
    counts = {cause: sum(row["stock_cause"] == cause for row in wrong) for cause in causes}
    told = {row[0]: int(row[1]) for row in table(section(problem, "## The census"))}
    assert told == {
        "that of the one batch": len(ran) - len(wrong),
        "the sum of the means": counts["sum of means"],
        "the mean of the means": counts["mean of means"],
        "divided by a wrong number": counts["miscounted"],
    }
    evaluated = [row for row in exact if row["accumloss_evaluation_difference"]]
    depend = {
        way: sum(float(row[f"{way}_evaluation_difference"]) > 1e-5 for row in evaluated)
        for way in ("stock", "accumloss")
    }
    told = f"for {depend['stock']} of {len(evaluated)} classes with stock transformers, for none with accumloss"
    assert told in flat("problem.md") and depend["accumloss"] == 0
    trainers = rows_of("trainers.csv")
    of = {verdict: sum(row["verdict"] == verdict for row in trainers) for verdict in ("exact", "told", "not run")}
    told = flat("problem.md")
    assert f"{len(trainers) - of['not run']} ran" in told
    assert f"{of['exact']} with accumloss, and the other {of['told']} are told" in told


def test_figures_of_evaluation_are_measured():
    measured = {}
    for row in rows_of("evaluation.csv"):
        measured.setdefault((row["class"], row["way"]), []).append(float(row["eval_loss"]))
    rows = table(section((DOCS / "transformers.md").read_text(), "## Evaluation and metrics"))
    assert len(rows) == 4
    for name, way, *cells in rows:
        assert [f"{value:.6f}" for value in measured[name, way]] == cells


def test_figures_of_the_fused_head_are_measured():
    rows = rows_of("fused_linear_architectures.csv")
    count = {path: sum(row["path"] == path for row in rows) for path in ("fused", "logits")}
    told = flat("transformers.md")
    assert f"the {len(rows)} classes" in told
    assert (
        f"{count['fused']} are fused, {count['logits']} keep their logits, and {len(rows) - sum(count.values())} could"
        in told
    )


# Blocks ---------------------------------------------------------------------------------------------------------------


def blocks(page):
    """(heading, block) of each Python block."""
    for part in re.split(r"^#+ ", page.read_text(), flags=re.M)[1:]:
        yield from ((part.split("\n")[0], block) for block in re.findall(r"^```python\n(.*?)^```$", part, re.M | re.S))


def test_the_problem_is_what_readme_says():
    names = {"torch": torch}
    exec(dict(blocks(README))["The problem"], names)
    for name, value in (
        ("mean_of_means", 2.5),
        ("one_batch", 1.1875),
        ("sum_of_means", 5.0),
        ("sums", 38.0),
        ("exact", 1.1875),
    ):
        assert names[name].item() == pytest.approx(value)
        told = re.search(rf"^{name} = .*# ([\d.]+)", dict(blocks(README))["The problem"], re.M)[1]
        assert float(told) == pytest.approx(value, abs=0.005)


@pytest.fixture
def with_trainer(tmp_path, monkeypatch):
    """What the blocks with a Trainer are written with."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from training import LABELS, build, rows

    monkeypatch.chdir(tmp_path)
    quiet = {
        "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "save_strategy": "no",
    }  # fmt: skip
    arguments = functools.partial(transformers.TrainingArguments, str(tmp_path), **quiet)
    model = build("BertForTokenClassification", num_labels=LABELS)
    examples = rows("tags")
    yield {
        "accumloss": accumloss,
        "torch": torch,
        "F": F,
        "functools": functools,
        "Trainer": transformers.Trainer,
        "TrainingArguments": arguments,
        "arguments": arguments(gradient_accumulation_steps=4),
        "model": model,
        "rows": examples,
        "llama": build("LlamaForCausalLM"),
        "class_weight": torch.linspace(0.5, 2, LABELS),
        "trainer": transformers.Trainer(model, arguments(), train_dataset=examples),
    }
    accumloss.unregister_from_transformers()


def test_the_blocks_of_readme_are_one_session(tmp_path, monkeypatch):
    """Pasted one after the other into one Python that has nothing but what they bring; what they print is what is told."""
    pytest.importorskip("transformers", reason="needs transformers")
    session = "".join(block + "\n" for _, block in blocks(README))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON_HISTORY": os.devnull}
    command = [sys.executable, "-P", "-i", "-q"]
    ran = subprocess.run(
        command, input=session, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert "Error" not in ran.stderr and "Traceback" not in ran.stderr, ran.stderr[-3000:]
    assert "BertForTokenClassification: accumloss, from the logits" in ran.stdout
    assert "'train_loss'" in ran.stdout  # the Trainer's
    assert len(re.findall(r"^(?:[.> ]*)tensor\(0\.\d+\) tensor\(256\)$", ran.stdout, re.M)) == 2  # the loop's


@pytest.mark.parametrize("page", ["transformers", "troubleshooting"])
def test_blocks_with_a_trainer_run(page, with_trainer, monkeypatch):
    own = types.ModuleType(f"page_{page}")  # whose names are rebound, as those of any module
    vars(own).update(with_trainer)
    monkeypatch.setitem(sys.modules, own.__name__, own)
    ran = 0
    for heading, block in blocks(DOCS / f"{page}.md"):
        exec(compile(block, f"docs/{page}.md: {heading}", "exec"), vars(own))
        ran += 1
    assert ran == (DOCS / f"{page}.md").read_text().count("```python") > 0


def test_blocks_of_the_losses_run(capsys):
    loss_utils = pytest.importorskip("transformers.loss.loss_utils", reason="needs transformers")
    from training import VOCAB, build, rows

    labels = torch.stack([row["input_ids"] for row in rows()])
    generator = torch.Generator().manual_seed(0)
    names = {
        "accumloss": accumloss,
        "batches": [(torch.randn(2, 5, 9, generator=generator), torch.randint(9, (2, 5))) for _ in range(3)],
        "hidden": torch.randn(*labels.shape, 16, generator=generator, requires_grad=True),
        "head": torch.nn.Linear(16, VOCAB),
        "labels": labels,
        "n": labels[:, 1:].numel(),
        "model": build("LlamaForCausalLM"),
        "LOSS_MAPPING": dict(loss_utils.LOSS_MAPPING),
    }
    found = []
    for _, block in blocks(DOCS / "losses.md"):
        exec(block, names)
        found.append(names.get("loss"))
    assert len(found) == 4 and torch.equal(found[1], found[2])  # counted, and not
    assert names["sums"].num_items == names["n"] and len(capsys.readouterr().out.splitlines()) == 2


def test_every_block_of_readme_runs():
    assert [heading for heading, _ in blocks(README)] == ["The problem", "With Trainer", "In a loop of your own"]


@pytest.mark.slow("the pages are checked above without it; needs the site's own packages")
def test_the_site_builds():
    pytest.importorskip("zensical", reason="needs zensical")
    pytest.importorskip("mkdocstrings", reason="needs mkdocstrings")
    site.site()
    done = subprocess.run(["git", "status", "--porcelain", "build"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""
