"""The documentation: what it shows was made by a command, its code runs, and first steps are as short as promised.

The pages themselves are run by the build, which also refuses a public name that no page describes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("howto/*.md")])


def cells(page):
    return re.findall(r"```\{code-cell\} python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def lines_of_code(cell):
    return [line for line in cell.splitlines() if line.strip() and not line.strip().startswith(("#", ":"))]


@pytest.mark.parametrize("file", sorted((DOCS / "results").glob("*.json")), ids=lambda file: file.name)
def test_a_results_file_names_the_command_that_made_it(file):
    report = json.loads(file.read_text())
    parts = [report, *(part for part in report.values() if isinstance(part, dict))]
    commands = [part.get("command") or part.get("commands") for part in parts]
    assert any("benchmarks/" in str(command) or "examples/" in str(command) for command in commands if command)


def test_every_results_file_and_picture_is_shown_in_a_page():
    text = "\n".join(page.read_text() for page in [*PAGES, ROOT / "README.md"])
    named = {Path(name).name for name in re.findall(r"[\w{}/.*-]+\.(?:json|png|mp4)", text)}
    shown = [re.compile(re.sub(r"\\{.*?\\}|\\\*", ".*", re.escape(name))) for name in named]  # f-strings and globs
    for file in [*(DOCS / "results").iterdir(), *(DOCS / "_static").iterdir()]:
        assert any(name.fullmatch(file.name) for name in shown), file.name


def test_code_that_is_not_run_by_the_build_is_run_by_ci():
    outside = [page.name for page in PAGES if re.search(r"^```python", page.read_text(), flags=re.MULTILINE)]
    assert outside == ["tasks.md"]
    assert "docs/tasks.md" in (ROOT / ".ci" / "run").read_text()


def test_a_page_with_code_is_one_that_the_build_runs():
    for page in PAGES:
        if cells(page):
            assert page.read_text().startswith("---\nfile_format: mystnb\n"), page.name


@pytest.mark.parametrize(
    ("page", "limit"), [("howto/model.md", 10), ("howto/task_family.md", 15), ("howto/streams.md", 15)]
)
def test_a_first_cell_is_short(page, limit):
    assert len(lines_of_code(cells(page)[0])) <= limit


def test_every_page_is_more_than_a_stub():
    for page in PAGES:
        if page.name not in ("changelog.md", "index.md"):
            assert len(page.read_text().split()) > 150, page.name
