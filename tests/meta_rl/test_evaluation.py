"""Adaptation curves: exact where every return is known, paired with the control, and drawn."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
import torchopt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch.func import vmap

from ssmrl.adaptation import adapt
from ssmrl.meta_rl import (
    AdaptationReturns,
    adaptation_report,
    adaptation_returns,
    interquartile_mean,
    plot_adaptation,
    stratified_bootstrap,
    student_t_interval,
)

GOALS = torch.tensor([-3.0, 1.0, 5.0], dtype=torch.float64)
RATE = 0.1
START = {"at": torch.zeros(3, dtype=torch.float64)}


def distance(params, goal):
    return (params["at"] - goal) ** 2


def collect(params, k):
    """Return -(θ - goal)², with noise of k."""
    noise = torch.randn(3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    return GOALS, -distance(params, GOALS) + noise


def exactly(params, k):
    return GOALS, -distance(params, GOALS)


def step(params, goals, k):
    optimizer = torchopt.sgd(RATE)
    return vmap(lambda p, goal: adapt(distance, p, goal, optimizer=optimizer, num_steps=1).params)(params, goals)


def generator():
    return torch.Generator().manual_seed(0)


def curves(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_update_brings_a_quadratic_nearer_by_the_same_factor():
    """A step on (θ - g)² multiplies θ - g by 1 - 2α."""
    found = adaptation_returns(exactly, step, START, 4)
    expected = -((1 - 2 * RATE) ** (2 * torch.arange(5.0, dtype=torch.float64)))[:, None] * GOALS**2
    torch.testing.assert_close(found.adapted, expected)
    torch.testing.assert_close(found.control, (-(GOALS**2)).expand(5, 3))


def test_the_control_has_the_noise_of_the_adapted():
    noisy, exact = (adaptation_returns(what, step, START, 3) for what in (collect, exactly))
    assert noisy.control is not None
    assert exact.control is not None
    torch.testing.assert_close(noisy.adapted - noisy.control, exact.adapted - exact.control)
    assert all(not torch.equal(one, other) for one, other in pairwise(noisy.control))


def test_without_adaptation_adapted_and_control_are_the_same():
    found = adaptation_returns(collect, lambda params, batch, k: params, START, 3)
    assert found.control is not None
    assert torch.equal(found.adapted, found.control)
    report = adaptation_report(found.adapted.expand(2, 4, 3), found.control.expand(2, 4, 3), generator=generator())
    assert report.difference is not None
    assert report.difference_interval is not None
    assert report.difference.tolist() == [0.0] * 4
    assert report.difference_interval.low.tolist() == report.difference_interval.high.tolist() == [0.0] * 4


@pytest.mark.parametrize(("control", "expected"), [(False, "c0 a0 c1 a1 c2"), (True, "c0 a0 c1 c1' a1 c2 c2'")])
def test_collections_and_steps_come_in_this_order(control, expected):
    calls = []

    def collects(params, k):
        calls.append(f"c{k}'" if k and params == "start" else f"c{k}")
        return f"batch of {params}", torch.zeros(2)

    def adapts(params, batch, k):
        assert batch == f"batch of {params}"
        calls.append(f"a{k}")
        return f"{params}, adapted"

    found = adaptation_returns(collects, adapts, "start", 2, control=control)
    assert " ".join(calls) == expected
    assert (found.control is not None) == control


def test_with_no_updates_there_is_the_initial_return():
    found = adaptation_returns(exactly, step, START, 0)
    assert found.adapted.tolist() == [[-9.0, -1.0, -25.0]]
    assert found.control is not None
    assert torch.equal(found.control, found.adapted)


def test_returns_are_cut_from_the_graph():
    params = {"at": torch.zeros(3, dtype=torch.float64, requires_grad=True)}
    found = adaptation_returns(exactly, step, params, 1)
    assert not found.adapted.requires_grad


@pytest.mark.parametrize(
    ("returns", "match"),
    [
        ([torch.zeros(2, 1)], r"shape \(N,\); after 0 updates got \(2, 1\)"),
        ([torch.zeros(0)], r"shape \(N,\); after 0 updates got \(0,\)"),
        ([torch.zeros(2), torch.zeros(3)], r"shape \(N,\) = \(2,\); after 1 updates got \(3,\)"),
        ([torch.zeros(3), torch.tensor([1.0, torch.nan, torch.inf])], r"after 1 updates those of tasks \[1, 2\]"),
    ],
)
def test_returns_of_another_shape_or_not_finite_are_refused(returns, match):
    with pytest.raises(ValueError, match=match):
        adaptation_returns(lambda params, k: (None, returns[k]), lambda params, batch, k: params, None, 1)


@pytest.mark.parametrize(("updates", "error"), [(-1, ValueError), (1.5, TypeError)])
def test_a_number_of_updates_that_is_negative_or_broken_is_refused(updates, error):
    with pytest.raises(error, match="num_updates must be"):
        adaptation_returns(collect, step, START, updates)


# Two runs, after 0 and 1 updates, of four tasks.
RETURNS = torch.tensor([[[-8.0, -6.0, -4.0, -2.0], [-4.0, -3.0, -2.0, 5.0]], [[-10.0] * 4, [-6.0, -4.0, -2.0, 0.0]]])
CONTROL = torch.tensor([[[-8.0, -6.0, -4.0, -2.0], [-7.0, -6.0, -5.0, -2.0]], [[-10.0] * 4, [-9.0] * 4]])


def test_a_report_by_hand():
    report = adaptation_report(RETURNS, CONTROL, oracle=0.0, task_blind=-6.0, generator=generator())
    assert report.run_means.tolist() == [[-5, -1], [-10, -3]]
    assert report.mean.tolist() == [-7.5, -2]
    # Without the two lowest and the two highest of eight.
    assert report.iqm.tolist() == [(-10 - 10 - 8 - 6) / 4, (-3 - 2 - 2 - 4) / 4]
    assert report.gap_closed is not None
    assert report.gap_closed_from_task_blind is not None
    assert report.gap_closed.tolist() == pytest.approx([0, 5.5 / 7.5])
    assert report.gap_closed_from_task_blind.tolist() == pytest.approx([-1.5 / 6, 4 / 6])
    # Means of the control after one update: -5 and -9.
    assert report.difference is not None
    assert report.difference.tolist() == [0, (4 + 6) / 2]
    assert report.difference_interval is not None
    # t of one degree of freedom is 12.706; s = √2.
    assert report.difference_interval.low.tolist() == pytest.approx([0, 5 - 12.7062], abs=1e-4)
    assert report.mean_interval is not None
    assert report.mean_interval.high.tolist() == pytest.approx([-7.5 + 12.7062 * 2.5, -2 + 12.7062], abs=1e-3)


def test_intervals_are_those_of_the_scores():
    returns, control, level = curves(4, 3, 6).double(), curves(4, 3, 6, seed=1).double(), 0.8
    report = adaptation_report(returns, control, generator=generator(), level=level, num_samples=300)
    assert report.mean_interval is not None
    assert report.iqm_interval is not None
    draws = generator()
    for k in range(3):
        options = {"generator": draws, "level": level, "num_samples": 300}
        expected = stratified_bootstrap(returns[:, k], interquartile_mean, whole_runs=True, **options)
        assert tuple(part[k] for part in report.iqm_interval) == expected
        student = student_t_interval(returns[:, k].mean(1), level=level)
        torch.testing.assert_close(tuple(part[k] for part in report.mean_interval), tuple(student))
    assert torch.equal(report.iqm, report.iqm_interval.value)
    assert report.difference_interval is not None
    paired = student_t_interval((returns - control).mean(2), level=level)
    torch.testing.assert_close(tuple(report.difference_interval), tuple(paired))


def test_a_quadratic_closes_the_same_share_of_the_gap_wherever_the_goals_are():
    """1 - (1 - 2α)^{2k}; started at the goals' mean, which is the best without knowing the task, of both gaps."""
    start = {"at": GOALS.mean().expand(3)}
    found = adaptation_returns(exactly, step, start, 3, control=False)
    blind = -float(GOALS.var(correction=0))
    report = adaptation_report(found.adapted[None], oracle=0.0, task_blind=blind, generator=generator())
    expected = [1 - (1 - 2 * RATE) ** (2 * k) for k in range(4)]
    assert report.gap_closed is not None
    assert report.gap_closed_from_task_blind is not None
    assert report.gap_closed.tolist() == pytest.approx(expected)
    assert report.gap_closed_from_task_blind.tolist() == pytest.approx(expected)


def test_references_may_be_of_every_task_or_run():
    of_tasks = torch.tensor([1.0, 2.0, 3.0, 6.0])
    reports = [
        adaptation_report(RETURNS, oracle=oracle, task_blind=oracle - 5, generator=generator())
        for oracle in (3.0, of_tasks, of_tasks.expand(2, 4))
    ]
    for report in reports:
        assert report.oracle is not None
        assert report.oracle.shape == (2, 4)
        assert report.table() == reports[0].table()


def test_one_run_has_no_intervals():
    report = adaptation_report(RETURNS[:1], CONTROL[:1], oracle=0.0, generator=generator())
    assert report.mean.tolist() == [-5, -1]
    assert report.difference is not None
    assert report.difference.tolist() == [0, 4]
    assert report.mean_interval is report.iqm_interval is report.difference_interval is None
    row = report.table()[1]
    assert row["mean"] == -1
    assert row["mean_low"] is row["iqm_high"] is row["difference_low"] is None


def test_a_table_is_the_report_in_rows():
    report = adaptation_report(RETURNS, CONTROL, oracle=0.0, generator=generator())
    before, after = report.table()
    assert (before["updates"], after["updates"]) == (0, 1)
    assert (before["control"], after["control"]) == (-7.5, -7)
    assert report.mean_interval is not None
    assert after["mean_low"] == float(report.mean_interval.low[1])
    assert before["gap_closed"] == 0
    assert after["gap_closed_from_task_blind"] is None
    alone = adaptation_report(RETURNS, generator=generator()).table()[1]
    assert alone["control"] is alone["difference"] is alone["difference_low"] is alone["gap_closed"] is None


def test_a_report_comes_back_from_json():
    report = adaptation_report(RETURNS, CONTROL, oracle=0.0, task_blind=-6.0, generator=generator())
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    returns, control = torch.tensor(read["returns"]), torch.tensor(read["control"])
    references = {"oracle": read["oracle"], "task_blind": read["task_blind"]}
    again = adaptation_report(returns, control, **references, level=read["level"], generator=generator())
    assert again.to_dict() == read


@pytest.mark.parametrize(
    ("arguments", "settings", "match"),
    [
        ([torch.zeros(3, 4)], {}, r"`returns` must have shape \(R, U \+ 1, N\), none of them 0; got \(3, 4\)"),
        ([torch.zeros(0, 2, 4)], {}, r"got \(0, 2, 4\)"),
        ([RETURNS, CONTROL[:1]], {}, r"`control` must have the shape of `returns`, \(2, 2, 4\); got \(1, 2, 4\)"),
        ([RETURNS / 0], {}, "`returns` must be finite"),
        ([RETURNS, CONTROL * torch.nan], {}, "`control` must be finite"),
        ([RETURNS.long()], {}, "`returns` must be finite floating-point"),
        ([RETURNS], {"oracle": torch.zeros(2)}, r"`oracle` must be a number, \(N,\) = \(4,\) or \(R, N\) = \(2, 4\)"),
        ([RETURNS], {"task_blind": torch.nan}, "`task_blind` must be finite"),
        ([RETURNS], {"oracle": -7.5}, "`oracle` must be above the mean return before the first update; got -7.5"),
        ([RETURNS], {"oracle": -1.0, "task_blind": 0.0}, "`oracle` must be above `task_blind`; got -1, not above 0"),
        ([RETURNS], {"num_samples": 0}, "`num_samples` must be at least 1"),
        ([RETURNS[:1]], {"level": 95}, "`level` must be between 0 and 1; got 95"),
    ],
)
def test_what_cannot_be_reported_is_refused(arguments, settings, match):
    with pytest.raises(ValueError, match=match):
        adaptation_report(*arguments, generator=generator(), **settings)


def test_returns_of_runs_become_a_report():
    """The whole way: two runs from different starts."""
    runs = [adaptation_returns(collect, step, {"at": START["at"] + shift}, 2) for shift in (0.0, 0.5)]
    assert all(isinstance(run, AdaptationReturns) for run in runs)
    control = torch.stack([run.control for run in runs if run.control is not None])
    report = adaptation_report(torch.stack([run.adapted for run in runs]), control, generator=generator())
    assert report.difference is not None
    assert report.difference[0] == 0
    assert bool((report.difference[1:] > 1).all())


def drawn(report, **settings):
    ax = Figure().subplots()
    plot_adaptation(report, ax, **settings)
    ax.legend()
    ax.figure.canvas.draw()
    return ax


def test_a_plot_has_the_curve_its_band_the_control_and_both_references():
    of_tasks = torch.tensor([1.0, 2.0, 3.0, 60.0])
    report = adaptation_report(RETURNS, CONTROL, oracle=of_tasks, task_blind=-6.0, generator=generator())
    ax = drawn(report, label="GRU", color="C3")
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["GRU", "GRU, not adapted", "oracle", "task-blind optimum"]
    assert list(lines["GRU"].get_ydata()) == report.iqm.tolist()
    assert list(lines["GRU, not adapted"].get_ydata()) == [-8.5, (-9 - 9 - 7 - 6) / 4]
    assert list(lines["oracle"].get_ydata()) == [2.5, 2.5]
    assert list(lines["task-blind optimum"].get_ydata()) == [-6, -6]
    assert lines["GRU"].get_color() == lines["GRU, not adapted"].get_color() == "C3"
    (band,) = ax.collections
    assert report.iqm_interval is not None
    edges = band.get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (float(report.iqm_interval.low.min()), float(report.iqm_interval.high.max()))
    assert tuple(band.get_facecolor()[0][:3]) == to_rgb("C3")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("updates", "return, interquartile mean")
    assert list(ax.get_xticks()) == [0, 1]


def test_what_is_not_known_is_not_drawn():
    ax = drawn(adaptation_report(RETURNS[:1], generator=generator()))
    assert [line.get_label() for line in ax.lines] == ["adapted"]
    assert not ax.collections
    ax = drawn(adaptation_report(RETURNS[:1], CONTROL[:1], generator=generator()))
    assert [line.get_label() for line in ax.lines] == ["adapted", "not adapted"]


def test_a_second_curve_has_the_next_colour():
    ax = Figure().subplots()
    report = adaptation_report(RETURNS, CONTROL, generator=generator())
    plot_adaptation(report, ax, label="one")
    plot_adaptation(report, ax, label="two")
    one, one_control, two, two_control = (line.get_color() for line in ax.lines)
    assert one == one_control != two == two_control
