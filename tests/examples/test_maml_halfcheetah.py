"""The HalfCheetah example at a tiny size, from another folder: its figures, its seeds, and a run that was stopped."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "maml_halfcheetah.py"
RETURNS, CURVE = "returns after 0, 1, ... updates", "curve: before, after, steps"


def run(out: Path, *arguments: str) -> dict[str, Any]:
    settings = ["--size", "tiny", "--threads", "1", "--out", str(out), *arguments]
    settings += [] if "--compile" in arguments else ["--no-compile"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *settings], capture_output=True, text=True, cwd=out.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    reports = list(out.glob("*.json"))
    return json.loads(reports[0].read_text()) if reports else {}


def test_a_run_that_was_stopped_ends_where_one_that_was_not_ends(tmp_path):
    whole = run(tmp_path / "whole", "--save-every", "1")
    assert run(tmp_path / "stopped", "--stop-after", "2") == {}
    resumed = run(tmp_path / "stopped", "--resume")
    assert len(whole[CURVE]) == 3
    assert whole[CURVE] == resumed[CURVE]
    assert whole[RETURNS] == resumed[RETURNS]
    other = run(tmp_path / "other", "--seed", "1")
    assert other[CURVE] != whole[CURVE]
    assert (tmp_path / "whole" / "halfcheetah_dir.png").stat().st_size > 10_000
    assert len(whole[RETURNS]) == 4
    assert sum(whole["share of an iteration"].values()) == pytest.approx(1, abs=0.2)


def test_two_inner_steps_follow_one(tmp_path):
    figures = run(tmp_path / "out", "--width", "8", "--iterations", "2", "--two-step-iterations", "2")
    steps = [steps for _, _, steps in figures[CURVE]]
    one, two = steps[0], steps[3] - steps[2]
    assert [b - a for a, b in zip([0, *steps], steps, strict=False)] == [one, one, two, two]
    assert two == 3 * one // 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("--family", "halfcheetah-vel", "--memory", "gru"),
        ("--family", "ant-dir", "--memory", "ssm", "--updates", "1"),
        ("--family", "humanoid-dir", "--oracle"),
    ],
)
def test_other_families_and_policies_run(tmp_path, arguments):
    figures = run(tmp_path / "out", "--width", "8", *arguments)
    updates = 0 if "--oracle" in arguments else 1 if "--updates" in arguments else 3
    assert len(figures[RETURNS]) == updates + 1
    assert all(math.isfinite(value) for row in figures[RETURNS] for value in row)
    assert len(figures[CURVE][0]) == (2 if "--oracle" in arguments else 3)
