"""Running moments of observations and rewards, as explicit state.

Letters: B rows, T steps, D the shape of what the moments are of.

The moments are held fixed while a batch is collected and updated from it afterwards, with its `valid` mask:

    def policy_fn(params, observation, hidden_state, reset, noise):
        return actor(params, normalize(moments, observation)), hidden_state

    moments = update_moments(moments, trajectory.observation, trajectory.valid)

So a row's actions depend on nothing that happens in other rows, and what the policy saw is known afterwards. All
functions are for one task, or one set of moments that several share; `torch.func.vmap` makes them per task:
`vmap(update_moments)(moments, trajectory.observation, trajectory.valid)` for leaves (N, E, T, ...).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmrl.env_runner.rollout import Trajectory

__all__ = [
    "RewardScale",
    "RunningMoments",
    "init_moments",
    "init_reward_scale",
    "normalize",
    "scale_rewards",
    "update_moments",
]


class RunningMoments(NamedTuple):
    """Mean and variance of what was seen so far, in float64."""

    total: Tensor
    """() how many were seen, and the weight of the prior."""
    mean: Tensor
    """(D)"""
    var: Tensor
    """(D) the variance of the population, divided by `total`."""


class RewardScale(NamedTuple):
    """What `scale_rewards` carries from one batch to the next."""

    moments: RunningMoments
    """Of the discounted return, D = ()."""
    discounted_return: Tensor
    """float64 (B,) of the rewards of each row's episode so far."""


def init_moments(shape: tuple[int, ...] = (), *, total: float = 1e-4) -> RunningMoments:
    """Return the moments of nothing: mean 0 and variance 1 (D), with the weight of `total` observations.

    1e-4 is what Gymnasium and OpenAI's baselines use; with 0 the moments are those of the data alone.
    """
    ones = torch.ones(shape, dtype=torch.float64)
    return RunningMoments(torch.tensor(total, dtype=torch.float64), torch.zeros_like(ones), ones)


def update_moments(moments: RunningMoments, x: Tensor, mask: Tensor | None = None) -> RunningMoments:
    """Return the moments of what was seen so far and of `x` (..., D) where `mask` Bool (...) is True.

    With n, μ, σ² so far and n', μ', σ'² of the batch, and δ = μ' - μ,

        μ ← μ + δ n' / (n + n'),    σ² ← (n σ² + n' σ'² + δ² n n' / (n + n')) / (n + n')

    (Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances"). What is
    masked has no influence, not even where it is NaN. A batch without a True changes nothing.

    Raises:
        ValueError: x does not end with the shape D of the moments, or mask is not of the shape in front of it.
    """
    lead = x.shape[: x.dim() - moments.mean.dim()]
    if x.shape[len(lead) :] != moments.mean.shape:
        raise ValueError(f"`x` must have the shape (..., *{tuple(moments.mean.shape)}); got {tuple(x.shape)}.")
    mask = torch.ones(lead, dtype=torch.bool, device=x.device) if mask is None else mask
    if mask.shape != lead:
        raise ValueError(f"`mask` must have the shape {tuple(lead)} of `x` without D; got {tuple(mask.shape)}.")
    x = x.double().reshape(-1, *moments.mean.shape)
    mask = mask.reshape(-1, *[1] * moments.mean.dim())
    count = mask.sum()
    some = count.clamp(min=1)
    mean = torch.where(mask, x, 0.0).sum(dim=0) / some
    var = torch.where(mask, (x - mean).square(), 0.0).sum(dim=0) / some
    total = moments.total + count
    weight = count / torch.where(total > 0, total, 1.0)
    delta = mean - moments.mean
    return RunningMoments(
        total=total,
        mean=moments.mean + delta * weight,
        var=moments.var + (var - moments.var + delta.square() * (1 - weight)) * weight,
    )


def normalize(moments: RunningMoments, x: Tensor, *, clip: float = 10.0, epsilon: float = 1e-8) -> Tensor:
    """Return (x - μ) / sqrt(σ² + `epsilon`) (..., D), within ±`clip`.

    In the dtype of `x`, or the default one where that is an integer. `clip` is that of baselines' VecNormalize;
    Gymnasium does not clip, `math.inf`.
    """
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    scaled = (x - moments.mean) / (moments.var + epsilon).sqrt()
    return scaled.clamp(-clip, clip).to(dtype)


def init_reward_scale(num_rows: int, *, total: float = 1e-4) -> RewardScale:
    """Return the state of `scale_rewards` before the first reward of B = `num_rows` rows."""
    return RewardScale(init_moments(total=total), torch.zeros(num_rows, dtype=torch.float64))


def scale_rewards(
    state: RewardScale,
    trajectory: Trajectory,
    *,
    discount: float = 0.99,
    clip: float = 10.0,
    epsilon: float = 1e-8,
) -> tuple[Tensor, RewardScale]:
    """Divide rewards by the running standard deviation of the discounted return.

    Step by step, over the rows whose step is valid: R ← γ R + r, σ² takes in R, the scaled reward is
    r / sqrt(σ² + `epsilon`) within ±`clip`, and R ← 0 where the episode ends. Rewards are not centred, which would
    change what is optimal. A reward depends on what came before it alone, so that two batches are one of their steps.

    Termination and truncation both end a return, as in OpenAI's baselines' VecNormalize
    (https://github.com/openai/baselines/blob/master/baselines/common/vec_env/vec_normalize.py). Gymnasium's
    NormalizeReward agrees where episodes are truncated and autoreset is SAME_STEP; at a termination it leaves out of R
    what came before the last reward, and with NEXT_STEP it lets a truncated R run on into the next episode.

    Args:
        state: from `init_reward_scale`, or returned for the batch before.
        trajectory: leaves (B, T, ...); `reward`, the ends, `reset` and `valid` are used.
        discount: γ.
        clip, epsilon: as in `normalize`.

    Returns:
        The scaled rewards (B, T), 0 where a step is not valid, and the next state.
    """
    moments, value = state
    ended = trajectory.terminated | trajectory.truncated
    scaled = []
    for t in range(trajectory.reward.shape[1]):
        reward, valid = trajectory.reward[:, t], trajectory.valid[:, t]
        value = torch.where(trajectory.reset[:, t], 0.0, value)  # A rollout that began anew.
        value = torch.where(valid, discount * value + reward, value)
        moments = update_moments(moments, value, valid)
        scaled.append(torch.where(valid, reward / (moments.var + epsilon).sqrt(), 0.0).clamp(-clip, clip))
        value = torch.where(valid & ended[:, t], 0.0, value)
    return torch.stack(scaled, dim=1).to(trajectory.reward.dtype), RewardScale(moments, value)
