"""The benchmark of RL² at a tiny size: what it puts together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "rl2.py"


def test_seeds_of_every_kind_are_put_together(tmp_path):
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--seeds", "2", "--jobs", "2", "--runs", "runs"]
    done = subprocess.run([*command, "--out", "out"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "rl2.json").read_text())["runs"]
    assert [*found] == ["bandit, 10 pulls", "bandit, 100 pulls", "tabular process, 10 episodes"]
    for kind in found:
        folder = tmp_path / "runs" / f"{kind.replace(', ', '_').replace(' ', '_')}_tiny"
        single = [json.loads((folder / str(seed) / "rl2_bandit.json").read_text()) for seed in range(2)]
        assert [one["arguments"]["seed"] for one in single] == [0, 1]
        key = "mean return of a trial on test tasks"
        for name, values in found[kind][key].items():
            assert values == [one[key][name] for one in single]
        for name, means in found[kind]["in a trial"].items():
            assert means[-1] == pytest.approx(sum(one["in a trial"][name][-1] for one in single) / 2)
        assert found[kind]["curves"] == [one["curve"] for one in single]
