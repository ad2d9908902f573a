"""The throughput benchmark at a tiny size: every engine is timed, and the shares are shares."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "env_throughput.py"
pytest.importorskip("mujoco.batch")


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=out.parent, check=False)


def test_steps_and_a_collected_batch_are_timed(tmp_path):
    out = tmp_path / "t.json"
    tiny = ["--robots", "HalfCheetah", "--rows", "2", "--engines", "ssmrl", "SyncVectorEnv", "--seconds", "0.02"]
    more = ["--turns", "1", "--tasks", "2", "--episodes", "2", "--horizon", "3"]
    done = run(out, *tiny, *more)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    for way in report["steps"]["figures"]["HalfCheetah"].values():
        assert way["2"].keys() == {"ssmrl", "SyncVectorEnv"}
        assert all(rate > 0 for rate in way["2"].values())
    assert 0 < report["collect"]["figures"]["share of physics"] < 1
    assert "--out" not in report["steps"]["command"]
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_an_unknown_robot_is_refused(tmp_path):
    done = run(tmp_path / "t.json", "--robots", "Swimmer")
    assert done.returncode != 0
    assert "--robots must be among HalfCheetah" in done.stderr
