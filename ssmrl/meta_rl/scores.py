"""What scores of several runs on several tasks say: a robust mean, intervals, and the share of the gap closed.

Letters: R runs (seeds of training), N tasks, S samples of the bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Interval", "gap_closed", "interquartile_mean", "stratified_bootstrap", "student_t_interval"]


class Interval(NamedTuple):
    """A statistic and its confidence interval."""

    value: Tensor
    low: Tensor
    high: Tensor


def interquartile_mean(scores: Tensor) -> Tensor:
    """The mean of what is left of (R, N) scores, or (..., R, N), without the lowest and the highest quarter, (...).

    A quarter of a number of scores that 4 does not divide is rounded down, as in `scipy.stats.trim_mean`. Agarwal et
    al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", https://arxiv.org/abs/2108.13264.
    """
    _check_scores(scores)
    ordered = scores.flatten(-2).sort(dim=-1).values
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def stratified_bootstrap(
    scores: Tensor,
    statistic: Callable[[Tensor], Tensor] = interquartile_mean,
    *,
    generator: torch.Generator,
    level: float = 0.95,
    num_samples: int = 2000,
    whole_runs: bool = False,
) -> Interval:
    """The percentile interval of a statistic of (R, N) scores, from S samples.

    A sample draws R runs of each task with replacement, tasks by themselves: they are the strata, and stay as they are.
    Agarwal et al. 2021, section 4.1. Of few runs it is too short: of three whole ones it is their range, which holds
    the truth about three times in four.

    Args:
        scores: (R, N), R >= 2.
        statistic: (S, R, N) -> (S,).
        generator: the draws come from it.
        level: between 0 and 1.
        num_samples: S.
        whole_runs: draw a run with its scores of all tasks. For runs that were trained once and tested on N tasks, as
            meta-learners are: what a run has learned shows in all its scores, and drawing them one by one, as is right
            where every score is of a training of its own, gives intervals up to √N times too short.

    Raises:
        ValueError: scores that are not finite or not (R, N) with two runs or more; a level or S out of range.
    """
    _check_scores(scores)
    if scores.dim() != 2 or scores.shape[0] < 2:
        raise ValueError(f"`scores` must have shape (R, N) with two runs or more; got {tuple(scores.shape)}.")
    check_level(level)
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1; got {num_samples}.")
    shape = (num_samples, *scores.shape)
    drawn_shape = (*shape[:2], 1) if whole_runs else shape
    drawn = torch.randint(scores.shape[0], drawn_shape, generator=generator, device=generator.device).to(scores.device)
    samples = statistic(scores.expand(shape).gather(1, drawn.expand(shape)))
    low, high = samples.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).to(samples)).unbind()
    return Interval(statistic(scores[None])[0], low, high)


def student_t_interval(scores: Tensor, *, level: float = 0.95) -> Interval:
    """The mean m (...) of scores (R, ...) of R runs, and its interval m ± t s / √R, if they are about normal.

    s is their standard deviation (R - 1 in the denominator), t the quantile of Student's distribution with R - 1
    degrees of freedom. Right also of three runs, where a bootstrap over runs is not.

    Args:
        scores: (R, ...), R >= 2: one number of each run, such as its mean over tasks.
        level: between 0 and 1.

    Raises:
        ValueError: scores that are not finite, or of fewer than two runs; a level out of range.
    """
    if scores.dim() < 1 or scores.shape[0] < 2:
        raise ValueError(f"`scores` must have shape (R, ...) with two runs or more; got {tuple(scores.shape)}.")
    check_finite("scores", scores)
    check_level(level)
    runs = scores.shape[0]
    mean = scores.mean(0)
    half = _student_t_quantile(level, runs - 1) * scores.std(0) / math.sqrt(runs)
    return Interval(mean, mean - half, mean + half)


def gap_closed(before: Tensor, after: Tensor, oracle: Tensor | float) -> Tensor:
    """(after - before) / (oracle - before): 0 for no gain by adaptation, 1 for the oracle's return; elementwise.

    Args:
        before: returns without adaptation, or the task-blind optimum.
        after: returns with it, of a shape that broadcasts.
        oracle: return of a policy that knows the task.

    Raises:
        ValueError: the oracle is not better than what it is compared with.
    """
    gap = oracle - before
    if not bool((gap > 0).all()):
        raise ValueError(f"`oracle` must be above `before`; got {oracle} and {before}.")
    return (after - before) / gap


def check_level(level: float) -> None:
    """Refuse a level of confidence that is not between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1; got {level}.")


def check_finite(name: str, scores: Tensor) -> None:
    """Refuse what is not of a floating-point type, or not finite."""
    if not scores.is_floating_point() or not bool(torch.isfinite(scores).all()):
        raise ValueError(f"`{name}` must be finite floating-point numbers.")


def _check_scores(scores: Tensor) -> None:
    if scores.dim() < 2 or scores.shape[-1] == 0 or scores.shape[-2] == 0:
        raise ValueError(f"`scores` must have shape (R, N), runs and tasks; got {tuple(scores.shape)}.")
    check_finite("scores", scores)


def _student_t_quantile(level: float, dof: int) -> float:
    """The t with P(|T| < t) = level, of Student's distribution with `dof` >= 1 degrees of freedom.

    The probability is a finite sum in θ = atan(t / √dof) (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4), which grows
    from 0 at θ = 0 to 1 at π / 2, so bisection finds θ to the last bit.
    """

    def probability(theta: float) -> float:
        sin, cos = math.sin(theta), math.cos(theta)
        odd = dof % 2
        term, total = (cos if odd else 1.0), 0.0
        for k in range(1 + odd, dof, 2):  # cos^{k-1} times products of (1·3·…)/(2·4·…), or (2·4·…)/(3·5·…) of odd dof
            total += term
            term *= cos * cos * k / (k + 1)
        return 2 / math.pi * (theta + sin * total) if odd else sin * total

    low, high = 0.0, math.pi / 2
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return math.sqrt(dof) * math.tan(low)
