"""The README: its Python runs, its length, and its table is that of the results file."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_runs_from_top_to_bottom(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")))
    names = runpy.run_path(str(script))
    assert names["y"].shape == (4, 20, 3)
    assert names["prediction"].shape == (1, 3)
    assert names["steps"] == 3


def test_it_has_at_most_120_lines():
    assert len(README.splitlines()) <= 120


def test_there_are_two_commands():
    main_job, tests = blocks("bash")
    assert "examples/adapt_dynamics.py" in main_job
    assert tests.rstrip().endswith("pytest -n auto")


def test_the_pictures_exist():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_the_table_is_that_of_the_results_file():
    scores = json.loads((ROOT / "docs" / "results" / "quick_benchmark_default.json").read_text())["scores"]
    rows = {
        "(a) meta-trained, before adaptation": "error before adaptation",
        "(a) meta-trained, adapted": "error after adaptation, (a)",
        "(b) trained without MAML": "error without MAML, (b)",
        "(c) trained without MAML, adapted at its best rate": "... and adapted at its best rate, (c)",
        "(a) adapted / (b)": "(a) / (b)",
        "(a) adapted / (c)": "(a) / (c)",
    }
    for label, name in rows.items():
        cells = [
            f"{scores[env][name]['mean']:.4f} ± {scores[env][name]['ci95']:.4f}"
            for env in ("CartPole-v1", "Pendulum-v1")
        ]
        assert f"| {label} | {cells[0]} | {cells[1]} |" in README
