"""The navigation example at a tiny size, from another folder, and what its figures must be."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "maml_navigation.py"


def run(out: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--threads", "1", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads((out / "maml_navigation.json").read_text())
    return figures


def test_it_plots_and_reports_and_a_seed_repeats_it(tmp_path):
    first = run(tmp_path / "a")
    again = run(tmp_path / "b")
    other = run(tmp_path / "c", "--seed", "1", "--updates", "1")
    name = "returns after 0, 1, ... updates"
    assert len(first[name]) == len(first["returns never adapted"]) == 4
    assert len(other[name]) == 2
    assert all(math.isfinite(value) and value < 0 for row in first[name] for value in row)
    assert first[name][0] == first["returns never adapted"][0]
    assert first[name][1] != first["returns never adapted"][1]
    assert first["curve: before, after, steps"] == again["curve: before, after, steps"]
    assert first[name] == again[name]
    assert other["curve: before, after, steps"] != first["curve: before, after, steps"]
    assert abs(first["task-blind optimum, oracle"][0] + 38.26) < 0.01
    assert (tmp_path / "a" / "maml_navigation.png").stat().st_size > 10_000
