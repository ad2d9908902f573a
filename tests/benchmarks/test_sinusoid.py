"""The sinusoid benchmark at a tiny size."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sinusoid.py"


@pytest.fixture(scope="module")
def sinusoid() -> Any:
    spec = importlib.util.spec_from_file_location("sinusoid", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sinusoid"] = module
    spec.loader.exec_module(module)
    return module


def test_tasks_are_those_of_the_paper(sinusoid):
    tasks = sinusoid.with_grid(sinusoid.draw_tasks(4000, 5, torch.Generator().manual_seed(0)))
    amplitude, phase = tasks["amplitude"], tasks["phase"]
    assert 0.1 <= amplitude.min() < 0.2
    assert 4.9 < amplitude.max() <= 5.0
    assert 0.0 <= phase.min() < 0.1
    assert 3.0 < phase.max() <= math.pi
    for name in ("support", "query", "grid"):
        x, y = tasks[f"{name}_x"], tasks[f"{name}_y"]
        assert -5.0 <= x.min() < -4.9
        assert 4.9 < x.max() <= 5.0
        torch.testing.assert_close(y, amplitude * torch.sin(x - phase))
    assert not torch.equal(tasks["support_x"], tasks["query_x"])
    # E[A²]/2 less what the best function of x alone takes away: 3.006 (docs/sinusoid.md).
    mean = tasks["grid_y"].mean(0)
    assert float((tasks["grid_y"] - mean).square().mean()) == pytest.approx(3.006, abs=0.15)


def test_every_algorithm_trains_and_is_scored(sinusoid):
    threads = torch.get_num_threads()
    try:
        for name in sinusoid.ALGORITHMS:
            result = sinusoid.run(name, 0, 2, "eager")
            assert result["algorithm"] == name
            for shots in sinusoid.SHOTS:
                errors = result["errors"][shots]
                assert list(errors) == list(sinusoid.STEPS)
                assert math.isfinite(errors[0]["query"])
                assert errors[0]["query"] != errors[1]["query"]
    finally:
        torch.set_num_threads(threads)


def test_a_short_run_learns_to_adapt_and_writes_its_figures(tmp_path):
    out = tmp_path / "s.json"
    command = [sys.executable, str(SCRIPT), "--algorithms", "cavia", "--iterations", "400", "--compile", "trace"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    row = record["scores"]["query"]["10"]["cavia"]
    assert row["0"]["mean"] > 2.0
    assert row["5"]["mean"] < 0.8 * row["0"]["mean"]
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_finished_runs_are_not_made_again(sinusoid, tmp_path):
    threads = torch.get_num_threads()
    try:
        first = sinusoid.kept(tmp_path / "runs", True, "maml", 0, 2, "eager")
        again = sinusoid.kept(tmp_path / "runs", True, "maml", 0, 2, "eager")
        assert again == first  # seconds included
        assert sinusoid.kept(tmp_path / "runs", False, "maml", 0, 2, "eager")["seconds"] != first["seconds"]
        assert sinusoid.kept(tmp_path / "runs", True, "maml", 0, 3, "eager")["loss"] != first["loss"]
    finally:
        torch.set_num_threads(threads)


def test_an_unknown_algorithm_is_refused(tmp_path):
    command = [sys.executable, str(SCRIPT), "--algorithms", "sgd", "--out", str(tmp_path / "s.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "--algorithms must be among maml" in done.stderr
