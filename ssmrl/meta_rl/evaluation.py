"""What returns of several runs on several tasks say: a robust mean, its interval, and the share of the gap closed.

Letters: R runs (seeds of training), N tasks, U + 1 numbers of updates, S samples of the bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Interval", "gap_closed", "interquartile_mean", "stratified_bootstrap"]


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
) -> Interval:
    """The percentile interval of a statistic of (R, N) scores, from S samples.

    A sample draws R runs of each task with replacement, tasks by themselves: they are the strata, and stay as they are.
    Agarwal et al. 2021, section 4.1.

    Args:
        scores: (R, N), R >= 2.
        statistic: (S, R, N) -> (S,).
        generator: the draws come from it.
        level: between 0 and 1.
        num_samples: S.

    Raises:
        ValueError: scores that are not finite or not (R, N) with two runs or more; a level or S out of range.
    """
    _check_scores(scores)
    if scores.dim() != 2 or scores.shape[0] < 2:
        raise ValueError(f"`scores` must have shape (R, N) with two runs or more; got {tuple(scores.shape)}.")
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1; got {level}.")
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1; got {num_samples}.")
    shape = (num_samples, *scores.shape)
    drawn = torch.randint(scores.shape[0], shape, generator=generator, device=generator.device).to(scores.device)
    samples = statistic(scores.expand(shape).gather(1, drawn))
    low, high = samples.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).to(samples)).unbind()
    return Interval(statistic(scores[None])[0], low, high)


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


def _check_scores(scores: Tensor) -> None:
    if scores.dim() < 2 or scores.shape[-1] == 0 or scores.shape[-2] == 0:
        raise ValueError(f"`scores` must have shape (R, N), runs and tasks; got {tuple(scores.shape)}.")
    if not scores.is_floating_point() or not bool(torch.isfinite(scores).all()):
        raise ValueError("`scores` must be finite floating-point numbers.")
