"""The API page of docs/, and the site.

    python build_tools/docs.py api      writes docs/api.md from the table of contents of accumloss
    python build_tools/docs.py site     build/docs, which zensical.toml describes; then build/site, strictly

The pages are written for a reader of the repository. The site has the same, and what they link to outside of docs/: the
changelog, the examples, the pictures of the benchmarks. A link to anything else is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGE, SITE = ROOT / "build" / "docs", ROOT / "build" / "site"
# what lies outside of docs/ and has a place on the site
ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "tests/README.md": "internals/tests.md",
}
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
GROUP = re.compile(r"^(\S.*)\n((?:    \w+ {2,}\S.*(?:\n|$))+)", re.M)


def contents() -> dict[str, dict[str, str]]:
    """The groups of public names: heading -> {name: what it is}, of the docstring of the package, which is not imported."""
    text = (ROOT / "accumloss" / "__init__.py").read_text().split('"""')[1]
    return {heading: dict(re.findall(r"^    (\w+) +(\S.*)$", names, re.M)) for heading, names in GROUP.findall(text)}


def api() -> str:
    """docs/api.md"""
    text = [
        "# API",
        "",
        "Every public name of `accumloss`. `help(accumloss.NAME)` prints the shapes, the units, the errors",
        "and an example; the site that `make docs` builds shows them on this page.",
    ]
    for heading, names in contents().items():
        text += ["", f"## {heading}", "| name | what it is |", "|---|---|"]
        text += [f"| `{name}` | {what} |" for name, what in names.items()]
    return "\n".join(text) + "\n"


def api_of_site() -> str:
    """The same, with what mkdocstrings makes of each docstring."""
    page = api().replace("; the site that `make docs` builds shows them on this page.", "; below stands the same.")
    for names in contents().values():
        shown = "".join(f"\n::: accumloss.{name}\n" for name in names)
        last = list(names)[-1]
        line = next(line for line in page.splitlines() if line.startswith(f"| `{last}` |"))
        page = page.replace(line, f"{line}\n{shown}")
    return re.sub(r"^\| `(\w+)` \|", r"| [`\1`](#accumloss.\1) |", page, flags=re.M)


def examples_page(text: str) -> str:
    """The table of the examples, and their code."""
    names = re.findall(r"^\| \[(\S+)\]\(\1\)", text, re.M)
    text = re.sub(r"^\| \[(\S+)\.py\]\(\1\.py\)", r"| [\1.py](#\1py)", text, flags=re.M)
    for name in names:
        text += f"\n## {name}\n```python\n{(ROOT / 'examples' / name).read_text()}```\n"
    return text


def pages() -> Iterator[tuple[str, str]]:
    """Path in the repository -> path on the site, of each page."""
    for path in sorted((ROOT / "docs").rglob("*.md")):
        yield path.relative_to(ROOT).as_posix(), path.relative_to(ROOT / "docs").as_posix()
    yield from ((source, target) for source, target in ELSEWHERE.items() if source != "README.md")


def relinked(text: str, source: str, target: str, places: dict[str, str]) -> str:
    """The page with its links as they are on the site; ValueError for one that leads nowhere there."""

    def replaced(match: re.Match[str]) -> str:
        where, _, anchor = match[2].partition("#")
        if not where or "://" in where or where.startswith("mailto:"):
            return match[0]
        meant = os.path.normpath(os.path.join(os.path.dirname(source), where)).replace(os.sep, "/")
        if meant not in places:
            raise ValueError(f"{source}: expected a link to a page or a picture, got {match[2]}")
        there = os.path.relpath(places[meant], os.path.dirname(target)).replace(os.sep, "/")
        return f"{match[1]}({there}{'#' if anchor else ''}{anchor})"

    parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)  # no links in code
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)


ITEM = re.compile(r"\s*(?:[-*]|\d+\.) ")


def spaced(text: str) -> str:
    """The page as Python-Markdown takes it, which wants more of a list and a table than GitHub: an empty line before, and four
    spaces of what belongs to an item."""
    lines: list[str] = []
    before, is_code, is_list = "", False, False
    for line in text.split("\n"):
        if line.startswith("```"):
            is_code, is_list = not is_code, False
        elif not is_code:
            begins = ITEM.match(line) and not is_list, line.startswith("|") and not before.startswith("|")
            if any(begins) and before.strip():
                lines.append("")
            is_list = bool(ITEM.match(line)) or (is_list and (not line.strip() or line.startswith(" ")))
            if is_list:
                line = " " * (len(line) - len(line.lstrip())) + line
        lines.append(line)
        before = line
    return "\n".join(lines)


def stage(folder: Path = STAGE) -> None:
    """Writes the pages of the site."""
    shutil.rmtree(folder, ignore_errors=True)
    pictures = [*(ROOT / "docs" / "images").glob("*.png"), *(ROOT / "benchmarks" / "results").glob("*.png")]
    places = dict(pages()) | ELSEWHERE
    places |= {picture.relative_to(ROOT).as_posix(): f"images/{picture.name}" for picture in pictures}
    (folder / "images").mkdir(parents=True)
    for picture in pictures:
        shutil.copy(picture, folder / "images")
    for source, target in pages():
        text = (ROOT / source).read_text()
        if source == "docs/api.md":
            text = api_of_site()
        if source == "examples/README.md":
            text = examples_page(text)
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).write_text(spaced(relinked(text, source, target, places)))


def site() -> None:
    stage()
    subprocess.run([sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=ROOT, check=True)
    page = (SITE / "api" / "index.html").read_text()
    missing = [name for names in contents().values() for name in names if f'id="accumloss.{name}"' not in page]
    if missing:
        raise SystemExit(f"make docs: expected every public name on the API page, got none of {', '.join(missing)}")
    print(f"{SITE / 'index.html'}")


def main() -> None:
    if sys.argv[1:] == ["api"]:
        (ROOT / "docs" / "api.md").write_text(api())
    elif sys.argv[1:] == ["site"]:
        site()
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
