"""The benchmark of meta-reinforcement learning at a tiny size: what it puts together; that it makes no run twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "meta_rl.py"


def run(folder, case, *arguments):
    command = [sys.executable, str(SCRIPT), case, "--size", "tiny", "--seeds", "2", "--jobs", "2", *arguments]
    done = subprocess.run(
        [*command, "--runs", "runs", "--out", "out"], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out" / f"meta_rl_{case}.json").read_text())


def test_seeds_are_put_together_and_no_run_is_made_twice(tmp_path):
    found = run(tmp_path, "navigation")
    reports = sorted((tmp_path / "runs").rglob("maml_navigation.json"))
    single = [json.loads(report.read_text()) for report in reports]
    assert [one["arguments"]["seed"] for one in single] == [0, 1]
    for got, one in zip(found["returns"], single, strict=True):
        for row, expected in zip(got, one["returns after 0, 1, ... updates"], strict=True):
            assert row == pytest.approx(expected)
    means = [sum(row) / len(row) for row in single[0]["returns after 0, 1, ... updates"]]
    assert found["run_means"][0] == pytest.approx(means)
    assert found["table"][1]["gap_closed"] is not None
    assert (tmp_path / "out" / "meta_rl_navigation.png").stat().st_size > 10_000
    before = [report.stat().st_mtime_ns for report in reports]
    assert run(tmp_path, "navigation")["table"] == found["table"]
    assert [report.stat().st_mtime_ns for report in reports] == before
