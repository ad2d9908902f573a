"""The study of adaptive control: what counts of an episode, and runs at a tiny size, to which seeds are added."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study(import_benchmark) -> Any:
    return import_benchmark("adaptive_control")


def test_of_a_change_only_what_comes_after_it_counts(study):
    size = replace(study.SIZES["tiny"]["classic"], episode=4, test_tasks=1)
    reward = torch.arange(16.0).view(4, 4)  # four groups of one task, four steps
    run = SimpleNamespace(size=size, episodes=lambda *_: (None, reward, None))
    found = study.tried(run, lambda: study.Way(None), [], [], 0)
    assert found["returns"] == [[0.0 + 1 + 2 + 3], [4.0 + 5 + 6 + 7], [10.0 + 11], [14.0 + 15]]


def test_what_runs_away_in_training_is_told_and_not_raised(study):
    def make():
        raise FloatingPointError("not finite")

    assert study.tried(None, make, [], [], 0) == {"failed": "not finite"}


def call(tmp_path, system, *seeds):
    command = [sys.executable, str(FOLDER / "adaptive_control.py"), system, "--size", "tiny", "--seeds", *seeds]
    command += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((tmp_path / "out" / f"adaptive_control_{system}.json").read_text())


def test_seeds_are_added_and_none_is_made_twice(tmp_path):
    text, record = call(tmp_path, "cartpole", "1")
    assert "hidden state alone.json: " in text
    assert len(record["report"]) == 11
    returns = [found["return"][0] for found in record["report"].values() if "return" in found]
    assert len(returns) >= 9
    assert all(0 <= value <= 80 for groups in returns for value in groups)  # of 80 steps, at most 1 each
    first = record["seeds"]["1"]
    text, record = call(tmp_path, "cartpole", "0", "1")
    assert "cartpole/0/" in text
    assert "cartpole/1/" not in text
    assert [*record["seeds"]] == ["0", "1"]
    assert record["seeds"]["1"] == first
    assert (tmp_path / "out" / "adaptive_control_cartpole.png").stat().st_size > 10_000


def test_some_ways_can_be_run_alone(study, tmp_path):
    ways = (study.OURS, "hidden state alone")
    paths = {"runs": tmp_path / "runs", "out": tmp_path / "out"}
    arguments = study.Arguments("cartpole", seeds=(0,), size="tiny", ways=ways, **paths)
    study.main(arguments)
    record = json.loads((tmp_path / "out" / "adaptive_control_cartpole.json").read_text())
    assert [*record["report"]] == [*ways]
    assert record["command"].endswith("--size tiny --ways 'meta-trained, adapting' 'hidden state alone'")
    with pytest.raises(ValueError, match=r"other --ways than these: meta-trained, adapting, hidden"):
        study.main(replace(arguments, seeds=(1,), ways=ways[:1]))
    for wrong in (("magic", study.OURS), ways[1:]):
        with pytest.raises(ValueError, match=r"--ways must be among true physics, .*, with 'meta-trained, adapting'"):
            study.run_seed("cartpole", 0, "tiny", str(tmp_path / "runs"), wrong)


def test_a_robot_has_gains_that_adapt_and_no_ways_that_need_its_equations(tmp_path):
    pytest.importorskip("mujoco")
    _, record = call(tmp_path, "cheetah_joint", "0")
    assert {"true physics", "a model of its own", "meta-trained, not adapting"}.isdisjoint(record["report"])
    assert {"meta-trained, all weights", "not meta-trained, all weights, the best rate"} < record["report"].keys()
    assert len(record["report"]) == 9
