"""Robust means, intervals and gaps: by hand, against SciPy, and where coverage is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import trim_mean

from ssmrl.meta_rl import gap_closed, interquartile_mean, stratified_bootstrap


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
        mean = lambda s: s.mean((-2, -1))  # noqa: E731
        interval = stratified_bootstrap(scores, mean, generator=generator, level=0.9, num_samples=300)
        assert interval.low <= interval.value <= interval.high
        hits += bool(interval.low <= 0 <= interval.high)
    assert 0.8 <= hits / 200 <= 0.95


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
