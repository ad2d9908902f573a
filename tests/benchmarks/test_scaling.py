"""The scaling benchmark: its model of costs, the bytes it counts, and a run."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist

from ssmrl import MetaMAML, StateSpaceModel


@pytest.fixture(scope="module")
def scaling(import_benchmark):
    return import_benchmark("scaling")


def test_costs_are_a_line_through_the_times(scaling):
    assert scaling.fit({10: 0.3, 20: 0.5, 40: 0.9}) == pytest.approx((0.1, 0.02))
    assert scaling.fit({10: 0.1, 20: 0.3}) == pytest.approx((0.0, 0.014))  # nothing costs less than nothing


def test_the_projection_is_the_formula_of_the_docstring(scaling):
    costs, network = scaling.Costs(0.01, 0.002), scaling.Network(1e-3, 1e6)
    assert scaling.projected(costs, network, 1000, 20, 1) == pytest.approx(0.05)
    sent = 2 * 7 / 8 * (1000 + 80) / 1e6
    assert scaling.projected(costs, network, 1000, 20, 8) == pytest.approx(0.01 + 3 * 0.002 + 6e-3 + sent)
    assert scaling.efficiency(costs, network, 1000, "weak", 20, 1) == 1
    assert scaling.efficiency(costs, network, 1000, "weak", 20, 2) == pytest.approx(0.05 / (0.05 + 2e-3 + 1.16e-3))
    alone = 0.01 + 1280 * 0.002
    shared = 0.01 + 320 * 0.002 + 4e-3 + 1.5 * (1000 + 4 * 1280) / 1e6
    assert scaling.efficiency(costs, network, 1000, "strong", 20, 4) == pytest.approx(alone / shared / 4)


def test_the_bytes_of_an_update_are_those_that_are_sent(scaling, tmp_path, monkeypatch):
    sent = []
    reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return reduce(tensor, *args, **kwargs)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = StateSpaceModel(4, 2, 2, hidden_dim=4)
        maml = MetaMAML(model, process_group=dist.group.WORLD)
        monkeypatch.setattr(dist, "all_reduce", counted)
        x = torch.randn(3, 1, 5, 2)
        maml.meta_update((x, x, x, x))
    finally:
        dist.destroy_process_group()
    assert sum(sent) == scaling.bytes_of(model) + 4 * 3


def test_a_run_writes_figures_and_a_plot(scaling, tmp_path):
    out = tmp_path / "new" / "scaling.json"
    scaling.main(scaling.Arguments(size="tiny", repeats=2, in_turn=1, out=out))
    figures = json.loads(out.read_text())
    assert set(figures["milliseconds"]) == {
        "alone, 2",
        "alone, 4",
        "alone, 8",
        "side by side",
        "strong",
        "weak",
        "sums",
    }
    assert all(ms > 0 for ms in figures["milliseconds"].values())
    for network in figures["projected efficiency"].values():
        for of_ranks in network.values():
            assert list(of_ranks) == [str(2**n) for n in range(11)]
            assert of_ranks["1"] == 1
    assert out.with_suffix(".png").stat().st_size > 10_000
