"""Robust means, intervals and gaps: by hand, against SciPy, and where coverage is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student_t
from scipy.stats import trim_mean

from ssmrl.meta_rl import gap_closed, interquartile_mean, stratified_bootstrap, student_t_interval


def mean(scores):
    return scores.mean((-2, -1))


def test_the_middle_half_counts():
    scores = torch.tensor([[1.0, 100.0, 3.0, 4.0], [-50.0, 2.0, 5.0, 6.0]])
    assert float(interquartile_mean(scores)) == (2 + 3 + 4 + 5) / 4  # without -50, 1 and 6, 100


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 100))
def test_it_is_scipys_trimmed_mean(runs, tasks, seed):
    scores = np.random.default_rng(seed).normal(size=(runs, tasks))
    expected = trim_mean(scores, 0.25, axis=None)
    assert float(interquartile_mean(torch.as_tensor(scores))) == pytest.approx(expected)


def test_leading_axes_are_kept():
    scores = torch.randn(6, 2, 3, 4)
    found = interquartile_mean(scores)
    assert found.shape == (6, 2)
    assert float(found[4, 1]) == pytest.approx(float(interquartile_mean(scores[4, 1])))


def test_tasks_are_strata():
    """Tasks a thousand apart, runs that agree: resampling tasks would give wide intervals, resampling runs none."""
    scores = torch.tensor([[0.0, 1000.0, 2000.0, 3000.0]]).repeat(3, 1)
    interval = stratified_bootstrap(scores, generator=torch.Generator().manual_seed(0))
    assert interval.low == interval.value == interval.high == 1500


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Of a plain mean over 20 runs and 4 tasks of normal scores."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        scores = torch.randn(20, 4, generator=generator)
        interval = stratified_bootstrap(scores, mean, generator=generator, level=0.9, num_samples=300)
        assert interval.low <= interval.value <= interval.high
        hits += bool(interval.low <= 0 <= interval.high)
    assert 0.8 <= hits / 200 <= 0.95


def test_whole_runs_are_drawn_with_the_scores_of_all_tasks():
    """Three runs of which each is as good on one task as on another: the interval is their range."""
    scores = torch.tensor([[0.0], [10.0], [20.0]]).expand(3, 40)
    whole, apart = (
        stratified_bootstrap(scores, mean, generator=torch.Generator().manual_seed(0), whole_runs=whole_runs)
        for whole_runs in (True, False)
    )
    assert [float(part) for part in whole] == [10, 0, 20]
    assert 7 < apart.low < apart.high < 13  # 10 ± 2 · 8.2 / √(3 · 40)


def test_what_runs_have_learned_is_covered_if_they_are_drawn_whole():
    """Runs as far apart as the scores of one of them: intervals that take tasks for independent miss the truth."""
    generator = torch.Generator().manual_seed(0)
    hits = {"whole": 0, "apart": 0, "student": 0}
    for _ in range(200):
        scores = torch.randn(10, 1, generator=generator) + torch.randn(10, 40, generator=generator)
        found = {
            "whole": stratified_bootstrap(scores, mean, generator=generator, num_samples=300, whole_runs=True),
            "apart": stratified_bootstrap(scores, mean, generator=generator, num_samples=300),
            "student": student_t_interval(scores.mean(1)),
        }
        for name, interval in found.items():
            hits[name] += bool(interval.low <= 0 <= interval.high)
    assert hits["whole"] >= 170
    assert hits["apart"] <= 100
    assert 180 <= hits["student"] <= 198


def test_students_interval_of_three_runs():
    """With t = 4.303 of 2 degrees of freedom and s = 1: 2 ± 4.303 / √3, for each of the columns."""
    scores = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    interval = student_t_interval(scores)
    assert interval.value.tolist() == [2, 5]
    assert interval.low.tolist() == pytest.approx([2 - 4.302653 / 3**0.5, 5])
    assert interval.high.tolist() == pytest.approx([2 + 4.302653 / 3**0.5, 5])


@given(st.integers(2, 120), st.sampled_from([0.01, 0.5, 0.9, 0.95, 0.999]), st.integers(0, 100))
def test_students_interval_is_scipys(runs, level, seed):
    scores = np.random.default_rng(seed).normal(3.0, 2.0, size=runs)
    found = student_t_interval(torch.as_tensor(scores), level=level)
    expected = student_t.interval(level, runs - 1, loc=scores.mean(), scale=scores.std(ddof=1) / runs**0.5)
    assert (float(found.low), float(found.high)) == pytest.approx(expected, rel=1e-9)


def test_a_seed_repeats_the_interval():
    scores = torch.randn(5, 6)
    first, again = (stratified_bootstrap(scores, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == again


def test_the_gap_is_from_before_to_the_oracle():
    before, after = torch.tensor([-40.0, -20.0]), torch.tensor([-10.0, -20.0])
    assert gap_closed(before, after, 0.0).tolist() == [0.75, 0.0]
    with pytest.raises(ValueError, match="`oracle` must be above `before`"):
        gap_closed(before, after, -30.0)


@pytest.mark.parametrize(
    ("scores", "settings", "match"),
    [
        (torch.randn(4), {}, r"must have shape \(R, N\), runs and tasks; got \(4,\)"),
        (torch.randn(1, 4), {}, "two runs or more"),
        (torch.tensor([[1.0, torch.nan], [1.0, 2.0]]), {}, "must be finite"),
        (torch.ones(2, 2, dtype=torch.int64), {}, "floating-point"),
        (torch.randn(2, 4), {"level": 1.0}, "`level` must be between 0 and 1; got 1.0"),
        (torch.randn(2, 4), {"num_samples": 0}, "`num_samples` must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(scores, settings, match):
    with pytest.raises(ValueError, match=match):
        stratified_bootstrap(scores, generator=torch.Generator(), **settings)


@pytest.mark.parametrize(
    ("scores", "settings", "match"),
    [
        (torch.randn(1, 4), {}, r"shape \(R, ...\) with two runs or more; got \(1, 4\)"),
        (torch.tensor(1.0), {}, r"two runs or more; got \(\)"),
        (torch.tensor([1.0, torch.inf]), {}, "must be finite"),
        (torch.randn(3), {"level": 0.0}, "`level` must be between 0 and 1; got 0.0"),
    ],
)
def test_what_has_no_students_interval_is_refused(scores, settings, match):
    with pytest.raises(ValueError, match=match):
        student_t_interval(scores, **settings)
