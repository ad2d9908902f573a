"""The speed benchmark: the arithmetic it counts, the agreement of its engines, and one run of the script.

JAX runs in the script's process only: its threads would not survive the forks of other tests.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "meta_gradient_speed.py"
PEERS = {"StateSpaceModel", "GRU", "LSTM"}


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("meta_gradient_speed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def float64_problem(benchmark, family, **sizes):
    problem = benchmark.make_problem(family, benchmark.CASES["smoke"]._replace(**sizes))
    return problem._replace(model=problem.model.double(), data=tuple(part.double() for part in problem.data))


@pytest.mark.parametrize("family", sorted(PEERS))
@pytest.mark.parametrize("engine", ["ssmrl", "unrolled", "loop", "higher"])
def test_engines_agree_in_float64(benchmark, engine, family):
    if engine == "higher":
        pytest.importorskip("higher")
    problem = float64_problem(benchmark, family, K=2)
    gradient = benchmark.ENGINES[engine](problem).gradient()
    assert benchmark.gradient_error(gradient, benchmark.reference_gradient(problem)) < 1e-10


@pytest.mark.parametrize("engine", ["ssmrl", "loop"])
def test_an_update_is_one_adam_step_on_the_meta_gradient(benchmark, engine):
    problem = float64_problem(benchmark, "StateSpaceModel")
    engines = benchmark.ENGINES[engine](problem)
    engines.update()
    model = float64_problem(benchmark, "StateSpaceModel").model
    reference = benchmark.reference_gradient(problem)
    for name, p in model.named_parameters():
        p.grad = torch.from_numpy(reference[name])
    torch.optim.Adam(model.parameters(), lr=benchmark.OUTER_LR).step()
    second = benchmark.reference_gradient(problem._replace(model=model))
    assert benchmark.gradient_error(engines.gradient(), second) < 1e-6
    assert benchmark.gradient_error(reference, second) > 1e-4


@pytest.mark.parametrize(("family", "gates", "peer"), [("GRU", 3, nn.GRU), ("LSTM", 4, nn.LSTM)])
def test_gated_cells_are_those_of_torch(benchmark, family, gates, peer):
    problem = float64_problem(benchmark, family, D=3, S=5, T=4)
    rnn = peer(3, 5, batch_first=True).double()
    weights = {f"rnn.{name}": p for name, p in rnn.named_parameters()}
    weights |= {"readout.weight": torch.eye(5).double(), "readout.bias": torch.zeros(5).double()}
    assert weights["rnn.weight_hh_l0"].shape == (gates * 5, 5)
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    for network in (benchmark._step_by_step(problem), benchmark._unrolled(problem)):
        torch.testing.assert_close(network(weights, x), rnn(x)[0])


def test_flops_are_those_counted_by_hand(benchmark):
    # R = 8 * 1 * 10 rows; fed by states 4x128 + 128x4 + 4x128 + 128x4 = 2048 weights, 12 products each;
    # fed by x 4x4 + 4x4 = 32 weights, 6 products each; 2 operations a multiply-add
    problem = benchmark.make_problem("StateSpaceModel", benchmark.CASES["tiny"])
    assert benchmark.meta_update_flops(problem) == 2 * 80 * (12 * 2048 + 6 * 32) == 3_962_880
    # GRU, K = 5: 3*17 x 23 fed by x, 22 products each; 3*64 x 64 and 64 x 17 fed by states, 48 products each
    problem = benchmark.make_problem("GRU", benchmark.CASES["rl20k5"])
    assert benchmark.meta_update_flops(problem) == 2 * 4000 * (48 * (192 * 64 + 64 * 17) + 22 * 192 * 23)
    assert benchmark.meta_update_flops(benchmark.make_problem("MLP", benchmark.CASES["smoke"])) is None


@pytest.mark.parametrize("family", sorted(PEERS))
def test_flops_are_those_torch_counts_in_the_plain_loop(benchmark, family):
    problem = benchmark.make_problem(family, benchmark.Sizes(2, 3, 20, 5, 7, 6, 2))
    engine = benchmark.loop_engine(problem)
    with FlopCounterMode(display=False) as counter:
        engine.update()
    # the first step of every sequence starts from a constant, which saves up to 1 part in T
    assert 0.95 < counter.get_total_flops() / benchmark.meta_update_flops(problem) <= 1


def test_gradient_error_is_relative_to_each_parameter(benchmark):
    reference = {"a": np.array([3.0, 4.0]), "b": np.array([0.0])}
    off = {"a": np.array([3.0, 4.5]), "b": np.array([0.0])}
    assert benchmark.gradient_error(off, reference) == pytest.approx(0.5 / 5.005)
    assert benchmark.gradient_error(reference | {"b": np.array([1e-3])}, reference) == pytest.approx(0.2)
    assert benchmark.gradient_error({"a": reference["a"]}, reference) == float("inf")


def test_a_wrong_meta_gradient_stops_the_run(benchmark, monkeypatch):
    problem = benchmark.make_problem("StateSpaceModel", benchmark.CASES["smoke"])

    def wrong(problem):
        engine = benchmark.loop_engine(problem)
        return engine._replace(gradient=lambda: {name: 1.03 * g for name, g in engine.gradient().items()})

    monkeypatch.setitem(benchmark.ENGINES, "wrong", wrong)
    with pytest.raises(SystemExit, match=r"meta-gradients differ from the reference: \{'wrong': 0.0"):
        benchmark.measure(problem, ["ssmrl", "wrong"], 1, 1, 1e9)


def test_a_peer_that_is_not_installed_is_named(benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "higher", None)
    problem = benchmark.make_problem("StateSpaceModel", benchmark.CASES["smoke"])
    row = benchmark.measure(problem, ["ssmrl", "higher"], 1, 1, 1e9)
    assert row["missing"] == {"higher": "higher is not installed: pip install higher"}
    assert set(row["engines"]) == {"ssmrl"}


def test_slow_engines_take_fewer_turns(benchmark):
    engine = benchmark.Engine(lambda: None, dict)
    turns = benchmark.take_turns({"ssmrl": engine, "loop": engine}, repeats=5, slow_repeats=2)
    assert {name: len(seconds) for name, seconds in turns.items()} == {"ssmrl": 5, "loop": 2}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--cases", "huge"], "--cases must be among smoke, tiny, .*; got huge"),
        (["--engines", "keras"], "--engines must be among ssmrl, .*; got keras"),
        (["--threads", "0"], "--threads must be from 1 to"),
    ],
)
def test_settings_that_do_not_fit_are_named(option, message, tmp_path):
    done = run([*option, "--out", str(tmp_path / "r.json")])
    assert done.returncode == 1
    assert re.search(message, done.stderr)


def run(options):
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)


def test_a_tiny_run_checks_all_models_and_writes_how_it_came_about(benchmark, tmp_path):
    options = ["--cases", "smoke", "--models", "all", "--repeats", "1", "--slow-repeats", "1", "--threads", "1"]
    engines = [name for name in benchmark.ENGINES if name != "compiled"]  # half a minute for every model
    done = run([*options, "--engines", *engines, "--out", str(tmp_path / "r.json")])
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report["results"]) == set(benchmark.MODELS)
    for family, cases in report["results"].items():
        row = cases["smoke"]
        assert set(row["engines"]) | set(row["missing"]) == set(engines)
        for name, figures in row["engines"].items():
            assert figures["seconds"] > 0
            assert figures["gradient_error"] < benchmark.TOLERANCE
            assert (figures["compile_seconds"] is not None) == (name in ("traced", "jax"))
        if family not in PEERS:
            assert set(row["engines"]) == {"ssmrl", "traced"}
            continue
        assert {"ssmrl", "traced", "unrolled", "loop"} <= set(row["engines"])
        assert row["engines"]["loop"]["ratio_to_loop"] == 1
        for peer in ("jax", "higher"):
            installed = importlib.util.find_spec(peer) is not None
            assert (peer in row["engines"]) == installed
            assert ("not installed" in row["missing"].get(peer, "")) != installed
    assert report["peak_flops_per_second"] > 0
    for key in ("settings", "versions", "machine", "command", "seconds"):
        assert report[key]


def test_scaling_measures_each_point_in_a_process_of_its_own(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SCALING_ENGINES", ("ssmrl",))
    points = benchmark.scaling(benchmark.CASES["smoke"], {"T": (2, 40)}, threads=1, seed=0)
    assert [(p["axis"], p["value"], p["engine"]) for p in points] == [("T", 2, "ssmrl"), ("T", 40, "ssmrl")]
    assert all(p["seconds"] > 0 for p in points)
    if sys.platform == "linux":
        assert all(p["peak_megabytes"] > p["update_megabytes"] >= 0 for p in points)
    benchmark.plot(points, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
