"""The benchmark of test-time adaptation: its systems, its scores, and a run at a tiny size."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def adaptation(import_benchmark) -> Any:
    return import_benchmark("adaptation")


@pytest.fixture(scope="module")
def systems(adaptation) -> Any:
    return importlib.import_module("adaptation_systems")


def test_the_linear_system_is_linear_and_its_floor_is_what_no_line_explains(systems):
    streams = systems.linear_streams(3, 600, 300, seed=4)
    assert streams.x.shape == (3, 600, 5)
    for n in range(3):
        for regime in (slice(0, 300), slice(300, 600)):
            x, y = streams.x[n, regime].double(), streams.y[n, regime].double()
            residual = y - x @ torch.linalg.lstsq(x, y).solution
            floor = streams.floor[n, regime].double().mean()
            # Least squares explain away 5 of 300 degrees of freedom.
            assert residual.square().mean() == pytest.approx(floor.item() * 295 / 300, rel=0.05)
    both = streams.y[0] - streams.x[0] @ torch.linalg.lstsq(streams.x[0], streams.y[0]).solution
    assert both.square().mean() > 5 * streams.floor[0].mean()  # one line for both regimes explains neither
    assert torch.equal(streams.x[:, 1:, :4], streams.y[:, :-1])


def test_recorded_physics_change_where_they_should(systems):
    """Two recordings that differ in their second physics alone are equal up to the switch, and differ after it."""
    one = systems.gym_streams("Pendulum-v1", 2, 40, 20, seed=3)
    other = systems.gym_streams("Pendulum-v1", 2, 40, 40, seed=3, scales=one.scales)
    assert torch.equal(one.x[:, :21], other.x[:, :21])
    assert not torch.equal(one.y[:, 20], other.y[:, 20])


def test_windows_to_train_on_end_in_one_regime(systems):
    streams = systems.linear_streams(4, 200, 20, seed=0)
    marked = streams._replace(x=torch.arange(200.0).expand(4, -1)[..., None])
    x, _ = systems.draw(marked, 500, before=5, after=8, generator=torch.Generator().manual_seed(0))
    regimes = x[:, 5:, 0] // 20
    assert (regimes == regimes[:, :1]).all()
    assert 0.4 < (x[:, 5, 0] % 20 == 0).double().mean() < 0.7
    assert (x[:, 1:] - x[:, :-1] == 1).all()


def test_shock_steady_level_and_recovery_by_hand(adaptation):
    curve = np.array([[8.0, 6.0, 4.0, 2.0, 1.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    found = adaptation.summary(curve)
    assert found["shock"] == 8.0
    assert found["steady"] == 1.0
    assert found["recovery"] == 4  # the first mean of three that is at most 1.2: (1.1 + 1 + 1) / 3
    assert adaptation.summary(curve, own=4.0)["recovery"] == 1  # (6 + 4 + 2) / 3 = 4 <= 4.8
    assert adaptation.summary(curve, own=0.1)["recovery"] is None


def test_errors_after_a_switch_leave_out_the_first_regime(adaptation):
    errors = torch.arange(12.0).expand(2, -1)
    assert adaptation.after_switches(errors, 4).tolist() == [[6.0, 7.0, 8.0, 9.0]] * 2


def test_a_moving_mean_by_hand(adaptation):
    assert adaptation.moving_mean(torch.tensor([[1.0, 2.0, 6.0, 4.0]]), 2).tolist() == [[1.5, 4.0, 5.0]]


def test_an_interval_holds_the_value_and_is_narrow_where_all_streams_agree(adaptation):
    steady = np.full((3, 4, 10), 2.0)
    found = adaptation.with_intervals(steady)
    assert found["steady"]["ci95"] == [2.0, 2.0]
    noisy = steady + np.random.default_rng(0).normal(size=steady.shape)
    low, high = adaptation.with_intervals(noisy)["steady"]["ci95"]
    assert low < noisy[..., 5:].mean() < high


def test_it_runs_and_says_what_it_found(tmp_path):
    command = [sys.executable, str(FOLDER / "adaptation.py"), "--size", "tiny", "--seeds", "2"]
    command += ["--parts", "study", "guard", "--systems", "linear", "--out", "a.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    ways = result["study"]["figures"]["linear"]["ways"]
    assert ways["carry on"]["mean"]["value"] < ways["no adaptation"]["mean"]["value"]
    assert ways["10x the rate"] == {"diverged": True}
    assert "diverged" not in ways["10x the rate, guard"]
    for run in result["guard"]["figures"]:
        assert run["all_finite"]
        assert run["error"] < run["without_adaptation"]
        assert run["unguarded_largest_error"] == "not finite" or run["unguarded_largest_error"] > 1e3
    assert (tmp_path / "a_study.png").read_bytes().startswith(b"\x89PNG")
    assert "hidden state only" in done.stdout


@pytest.mark.slow
def test_the_ways_that_are_timed_run(adaptation):
    figures = adaptation.speed(adaptation.SIZES["tiny"])
    assert len(figures["one stream"]) == 3
    assert figures["MB held for 64 streams of heads"] == pytest.approx(64 * 3 * 1782 * 4 / 2**20, rel=0.02)
