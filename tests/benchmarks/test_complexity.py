"""The complexity benchmark: exponents of known laws, and a run at a tiny size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "complexity.py"


@pytest.fixture(scope="module")
def complexity(import_benchmark):
    return import_benchmark("complexity")


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_is_that_of_a_power_law(complexity, power):
    sizes = [8, 64, 256, 1024]
    # What is constant at small sizes does not count: the last three points do.
    assert complexity.exponent(sizes, [100.0, *(3 * n**power for n in sizes[1:])]) == pytest.approx(power)


def test_fewer_than_three_values_have_no_exponent(complexity):
    assert complexity.exponent([1, 2, 3, 4], [1.0, 2.0, None, None]) is None
    assert complexity.exponent([1, 2, 3, 4], [0.5, 1.0, 2.0, 4.0], least=1.0) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_transformer_keeps_all_of_its_past_and_a_recurrence_one_state(complexity):
    kept = {
        name: [complexity.measure(name, 8, length, 0.0)["state_kb"] for length in (8, 16)]
        for name in ("Transformer", "StateSpaceModel", "nn.LSTM")
    }
    assert kept["Transformer"][1] == pytest.approx(2 * kept["Transformer"][0], rel=0.1)
    assert kept["StateSpaceModel"] == [8 * 4 / 1024] * 2
    assert kept["nn.LSTM"] == [2 * 8 * 4 / 1024] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_tiny_run_measures_what_there_is(tmp_path):
    out = tmp_path / "c.json"
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--models", "MLP", "nn.GRU", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    cell = report["figures"]["MLP"]["T"]["16"]
    assert all(cell[name] > 0 for name in ("forward_ms", "meta_gradient_ms", "step_ms"))
    assert report["figures"]["nn.GRU"]["W"]["8"]["meta_gradient_ms"] is None
    assert report["exponents"]["MLP"]["T"]["meta_gradient_ms"] is not None
    assert report["exponents"]["nn.GRU"]["T"]["meta_gradient_ms"] is None
    assert out.with_suffix(".png").stat().st_size > 10_000
