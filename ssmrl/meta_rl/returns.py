"""Returns and advantages of episodes that follow each other in a row.

Letters: T steps. Everything is (..., T), one row or any batch of them, and maps with `vmap`. In the equations c_t = 1
where step t + 1 goes on from step t (`ssmrl.meta_rl.segments`), v_{t+1} is `next_value`, and
discount_t = γ (1 - terminated_t): termination alone makes the future worth nothing, whereas a truncated episode, or a
row that stops in the middle of one, is worth the value of the observation it stopped at.

Where an episode that is cut after H steps is the task itself, as in the experiments of MAML and ProMP, say so: pass
`terminated | truncated` as `terminated`. Where several episodes are one trial, whose whole return the policy seeks
(RL²), pass the ends of trials, with invalid steps packed away (`ssmrl.env_runner.pack_valid`).

The results are differentiable in all that is floating-point, γ and λ included. For a policy gradient they are
constants: `detach` them where a network made the values. Invalid steps, whatever they hold, get 0.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ssmrl.meta_rl.segments import check_fraction, check_steps, continuing, sum_back, where_valid
from ssmrl.sharding import Shards

__all__ = ["discounted_returns", "generalized_advantages", "lambda_returns", "normalize_advantages"]


def discounted_returns(
    reward: Tensor,
    next_value: Tensor | None,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float | Tensor = 0.99,
    valid: Tensor | None = None,
) -> Tensor:
    """G_t = r_t + discount_t (c_t G_{t+1} + (1 - c_t) v_{t+1}), (..., T): `lambda_returns` with λ = 1.

    Sutton and Barto 2018, "Reinforcement Learning", equation 3.9, http://incompleteideas.net/book/the-book-2nd.html.

    Args:
        reward: (..., T) r_t.
        next_value: (..., T) v_{t+1}, the value of the observation after step t; matters only where an episode is cut
            without having terminated. None: 0, which takes every cut for a termination.
        terminated, truncated: Bool (..., T).
        gamma: γ in [0, 1].
        valid: Bool (..., T); None: all are.

    Raises:
        TypeError, ValueError: shapes that differ, masks that are not Bool, γ out of range.
    """
    if next_value is None:
        next_value = torch.zeros_like(reward)
    return lambda_returns(reward, next_value, terminated, truncated, gamma=gamma, lam=1.0, valid=valid)


def lambda_returns(
    reward: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float | Tensor = 0.99,
    lam: float | Tensor = 0.95,
    valid: Tensor | None = None,
) -> Tensor:
    """G_t = r_t + discount_t ((1 - λ c_t) v_{t+1} + λ c_t G_{t+1}), (..., T).

    Sutton and Barto 2018, equation 12.18, http://incompleteideas.net/book/the-book-2nd.html: λ = 0 is the one-step
    target r_t + discount_t v_{t+1}, λ = 1 the discounted return.

    Args:
        reward: (..., T) r_t.
        next_value: (..., T) v_{t+1}, the value of the observation after step t, an episode's final one included.
        terminated, truncated: Bool (..., T).
        gamma, lam: γ and λ in [0, 1].
        valid: Bool (..., T); None: all are.

    Raises:
        TypeError, ValueError: shapes that differ, masks that are not Bool, γ or λ out of range.
    """
    check_steps("reward", reward, next_value=next_value, terminated=terminated, truncated=truncated, valid=valid)
    check_fraction("gamma", gamma)
    check_fraction("lam", lam)
    c_t = continuing(terminated, truncated, valid).to(reward.dtype)
    r_t, v_t = where_valid(valid, reward), _discounted_in(next_value, terminated, valid)
    lam_t = lam * c_t
    return sum_back(r_t + gamma * (1 - lam_t) * v_t, gamma * lam_t)


def generalized_advantages(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float | Tensor = 0.99,
    lam: float | Tensor = 0.95,
    valid: Tensor | None = None,
) -> Tensor:
    """A_t = δ_t + γ λ c_t A_{t+1}, δ_t = r_t + discount_t v_{t+1} - v_t, (..., T): GAE(γ, λ).

    Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", equation 16,
    https://arxiv.org/abs/1506.02438. `A_t + value_t` is the target of the value function, the λ-return where
    `next_value` is the next step's `value`.

    Args:
        reward: (..., T) r_t.
        value: (..., T) v_t, of the observation before step t.
        next_value: (..., T) v_{t+1}, of the observation after step t, an episode's final one included.
        terminated, truncated: Bool (..., T).
        gamma, lam: γ and λ in [0, 1].
        valid: Bool (..., T); None: all are.

    Raises:
        TypeError, ValueError: shapes that differ, masks that are not Bool, γ or λ out of range.
    """
    check_steps("reward", reward, value=value, next_value=next_value)
    check_steps("reward", reward, terminated=terminated, truncated=truncated, valid=valid)
    check_fraction("gamma", gamma)
    check_fraction("lam", lam)
    c_t = continuing(terminated, truncated, valid).to(reward.dtype)
    r_t, v_t = where_valid(valid, reward), _discounted_in(next_value, terminated, valid)
    delta_t = r_t + gamma * v_t - where_valid(valid, value)
    return sum_back(delta_t, gamma * lam * c_t)


def normalize_advantages(
    advantage: Tensor,
    valid: Tensor | None = None,
    *,
    epsilon: float = 1e-8,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """(A - mean A) / √(var A + ε²) over all valid steps of one task, (..., T); 0 where a step is invalid.

    Tasks are on an axis that `vmap` maps, so that each has a mean and a deviation of its own, as in ProMP. There and
    elsewhere the divisor is √var + ε, whose derivative is NaN where all advantages are equal.

    Args:
        advantage: (..., T).
        valid: Bool (..., T); None: all are.
        epsilon: ε > 0, in the unit of the advantages.
        process_group: mean and variance are those of the steps of all its ranks; not within `vmap`.

    Raises:
        TypeError, ValueError: shapes that differ, a mask that is not Bool, ε that is not positive.
    """
    shards = Shards(process_group)
    check_steps("advantage", advantage, valid=valid)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be > 0; got {epsilon}.")
    advantage = where_valid(valid, advantage)
    own = torch.as_tensor(advantage.numel() if valid is None else valid.sum()).to(advantage)
    total, count = shards.total((advantage.sum(), own))
    share = 1 / count.clamp(min=1)
    centred = where_valid(valid, advantage - total * share)
    (squares,) = shards.total((centred.square().sum(),))
    return centred / (squares * share + epsilon**2).sqrt()


def _discounted_in(next_value: Tensor, terminated: Tensor, valid: Tensor | None) -> Tensor:
    """(1 - terminated_t) v_{t+1}; not by a product with 0, since what is there may be NaN."""
    return where_valid(valid, torch.where(terminated, 0.0, next_value))
