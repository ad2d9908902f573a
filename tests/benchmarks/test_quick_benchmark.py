"""The benchmark's scoring, and one run at tiny size."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quick_benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("quick_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def result(after):
    error = {"mean": 0.5}
    return {
        "errors": {"meta_before": error, "meta_after": {"mean": after}, "joint_before": error, "joint_after": error},
        "loss_reduction": 0.9,
        "adaptation_gain": 1 - after / 0.5,
        "ratio_to_joint": after / 0.5,
        "ratio_to_joint_adapted": after / 0.5,
        "seconds": {"all": 1.0},
    }


def test_the_interval_is_students_t(benchmark):
    scores = benchmark.score([result(0.1), result(0.2), result(0.3)])
    # mean 0.2, deviation 0.1, t(0.975, 2) = 4.302653: half-width 4.302653 * 0.1 / sqrt(3)
    assert scores["error after adaptation, (a)"]["mean"] == pytest.approx(0.2)
    assert scores["error after adaptation, (a)"]["ci95"] == pytest.approx(0.248414, rel=1e-5)
    assert scores["(a) / (b)"]["values"] == pytest.approx([0.2, 0.4, 0.6])


def test_one_seed_has_no_interval(benchmark):
    assert benchmark.score([result(0.1)])["(a) / (c)"]["ci95"] is None


def test_a_tiny_run_writes_scores_and_how_they_came_about(tmp_path):
    command = [sys.executable, str(SCRIPT), "--seeds", "1", "--size", "tiny", "--out", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report["scores"]) == {"CartPole-v1", "Pendulum-v1"}
    for key in ("settings", "versions", "machine", "command", "seconds"):
        assert report[key]


def test_no_seeds_are_refused():
    done = subprocess.run([sys.executable, str(SCRIPT), "--seeds", "0"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "--seeds must be at least 1; got 0" in done.stderr
