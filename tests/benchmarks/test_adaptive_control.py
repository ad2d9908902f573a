"""The study of adaptive control: its scores by hand, and a run at a tiny size that goes on where it was stopped."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("adaptive_control")
    finally:
        sys.path.remove(str(FOLDER))


def rewards(value, middle):
    """(3 groups, 2 tasks, 4 steps) of one value, and of another from the middle on."""
    values = torch.full((3, 2, 4), float(value))
    values[..., 2:] = middle
    return values.tolist()


def test_differences_are_paired_and_the_last_group_counts_from_the_change_on(study):
    # Two runs: ours 1 and 2 a step, the other one 0; after the middle ours is 3 in both.
    runs = [{study.OURS: rewards(value, 3.0), "other": rewards(0, 0), "ran away": None} for value in (1, 2)]
    found = study.put_together(runs)
    mean, low, high = found["other"]["ours minus it"]
    assert mean == pytest.approx([9.0, 9.0, 6.0])  # (2 · 1 + 6 + 2 · 2 + 6) / 2, and 6 after the change
    assert low[2] == high[2] == pytest.approx(6.0)
    assert high[0] - mean[0] == pytest.approx(12.706 * 2**0.5 / 2**0.5, rel=1e-3)  # Student's t, one degree of freedom
    assert found[study.OURS]["ours minus it"][0] == [0.0, 0.0, 0.0]
    assert found["ran away"] == {"failed": 2}


def test_a_tiny_run_and_that_it_is_not_made_twice(tmp_path):
    command = [sys.executable, str(FOLDER / "adaptive_control.py"), "--size", "tiny", "--seeds", "2"]
    command += ["--systems", "cartpole", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    texts = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert "hidden state alone: " in texts[0]
    assert " s\n" not in texts[1]  # nothing was made
    report = json.loads((tmp_path / "out" / "adaptive_control.json").read_text())
    ways = report["systems"]["cartpole"]
    assert len(ways) == 10
    returns = [found["return"][0] for found in ways.values() if "return" in found]
    assert len(returns) >= 8
    assert all(0 <= value <= 60 for groups in returns for value in groups)  # of 60 steps, at most 1 each
    assert (tmp_path / "out" / "adaptive_control.png").stat().st_size > 10_000
