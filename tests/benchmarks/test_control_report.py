"""Scores of the study of adaptive control, by hand."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def report(import_benchmark) -> Any:
    return import_benchmark("control_report")


def result(returns):
    """Of two groups of two tasks."""
    return {"returns": returns}


def test_differences_are_paired_and_intervals_are_over_seeds(report):
    ours = [result([[3.0, 5.0], [1.0, 1.0]]), result([[5.0, 7.0], [1.0, 1.0]])]
    other = [result([[1.0, 3.0], [0.0, 0.0]]), result([[1.0, 3.0], [0.0, 0.0]])]
    runs = [{report.OURS: a, "other": b, "ran away": {"failed": "stream 3"}} for a, b in zip(ours, other, strict=True)]
    found = report.put_together(runs)
    mean, low, high = found["other"]["ours minus it"]
    assert mean == pytest.approx([3.0, 1.0])  # 2 and 4; 1 and 1
    assert low[1] == high[1] == pytest.approx(1.0)
    assert high[0] - mean[0] == pytest.approx(12.706 * 2**0.5 / 2**0.5, rel=1e-3)  # Student's t, one degree of freedom
    assert found[report.OURS]["ours minus it"][0] == [0.0, 0.0]
    assert found["ran away"] == {"failed": 2}


def test_the_share_of_the_gap_and_the_errors_ahead(report):
    worst, best = result([[-10.0, -10.0]]), result([[-2.0, -2.0]])
    ours = result([[-4.0, -4.0]]) | {"errors ahead": {"before": [0.4], "after": [0.1]}}
    found = report.put_together([{report.OURS: ours, "true physics": best, "hidden state alone": worst}])
    assert found[report.OURS]["of the gap from hidden state alone to true physics"] == pytest.approx([0.75])
    assert found[report.OURS]["error ahead, after / before"][0] == pytest.approx([0.25])


def test_without_ours_there_is_nothing_to_compare(report):
    with pytest.raises(RuntimeError, match="ran away with 1 of 1 seeds"):
        report.put_together([{report.OURS: {"failed": "stream 3"}, "other": result([[1.0]])}])


def test_one_seed_has_no_bounds_in_the_scores_and_the_table(report):
    groups = [[3.0, 5.0]] * 4
    found = report.put_together([{report.OURS: result(groups), "other": result([[1.0, 1.0]] * 4)}])
    assert found["other"]["ours minus it"] == ([3.0] * 4, None, None)
    row = report.table(found).splitlines()[-1]
    assert row.split("  ")[-1].strip() == "(ours +3)"


def test_the_plot_of_one_seed_and_of_two(report, tmp_path):
    around = {"rewards from 25 steps before a change on": [[0.0] * 60, [1.0] * 60]}
    run = {way: result([[3.0, 5.0]] * 4) | around for way in (report.OURS, "other")}
    for runs in ([run], [run, run]):
        path = tmp_path / f"{len(runs)}.png"
        report.plot("pendulum", runs, report.put_together(runs), path)
        assert path.stat().st_size > 10_000
