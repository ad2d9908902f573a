"""Surrogates of the expected return J(θ), as losses: scalars to be minimised, for one task.

Letters: T steps. Everything is (..., T): the steps of all rows of one task, which `vmap` maps over tasks. `log_prob` is
log π_θ(a_t | s_t); ⊥ is `detach`, a constant for derivatives of every order. Advantages are taken as they are, so that
what made them can be learned; `detach` those of a network that is not to be learned through them.

All have the same first derivative, -∇J on average, at the policy that acted. Their second derivatives, of which the
meta-gradient through an inner loop is made, differ (Rothfuss et al. 2019, "ProMP", section 5,
https://arxiv.org/abs/1810.06784), with Q_t the expected return from step t on:

    ∇²J = H1 + H2 + H12 + H12ᵀ,     H1 = E Σ_t ∇log π_t ∇log π_tᵀ Q_t,  H2 = E Σ_t ∇² log π_t Q_t,
                                    H12 = E Σ_t ∇log π_t ∇Q_tᵀ.

`likelihood_ratio_loss` has H2 alone, `surrogate_loss` H1 + H2, and `dice_loss` and `loaded_dice_loss` all of it.

A sum over valid steps is divided by their number, as in the code of MAML, PPO and ProMP. Where J is the mean return of
an episode, its gradient is that of the sum divided by the number of episodes: pass that as `denominator`. The two DiCE
losses do so by themselves. Where J discounts, ∇J weighs step t with γ^t, which the published algorithms leave out,
DiCE apart: multiply the advantages with `gamma ** episode_step(...)` to have it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmrl.adaptation.optim import check_positive
from ssmrl.meta_rl.distributions import Distribution
from ssmrl.meta_rl.segments import (
    check_fraction,
    check_steps,
    continuing,
    count_episodes,
    episode_step,
    following,
    sum_forward,
    where_valid,
)

__all__ = [
    "clipped_surrogate_loss",
    "dice_loss",
    "entropy_bonus",
    "importance_ratio",
    "kl_penalty",
    "likelihood_ratio_loss",
    "loaded_dice_loss",
    "magic_box",
    "masked_mean",
    "surrogate_loss",
]


def masked_mean(x: Tensor, valid: Tensor | None = None, *, denominator: float | Tensor | None = None) -> Tensor:
    """1/n Σ x_t over the valid steps of all rows (..., T), a scalar; 0 where there is none.

    Args:
        x: (..., T).
        valid: Bool (..., T); None: all are.
        denominator: n > 0; None: the number of valid steps.

    Raises:
        TypeError, ValueError: shapes that differ, a mask that is not Bool, a denominator that is not positive.
    """
    check_steps("x", x, valid=valid)
    total = where_valid(valid, x).sum()
    if denominator is None:
        return total / (max(x.numel(), 1) if valid is None else valid.sum().clamp(min=1))
    if not isinstance(denominator, Tensor):
        check_positive("denominator", denominator)
    return total / denominator


def importance_ratio(log_prob: Tensor, old_log_prob: Tensor, valid: Tensor | None = None) -> Tensor:
    """ρ_t = π_θ(a_t | s_t) / π_old(a_t | s_t), (..., T); 1 where a step is invalid."""
    check_steps("log_prob", log_prob, old_log_prob=old_log_prob, valid=valid)
    return where_valid(valid, log_prob - old_log_prob).exp()


def likelihood_ratio_loss(
    log_prob: Tensor,
    advantage: Tensor,
    valid: Tensor | None = None,
    *,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """-mean log π_θ(a_t | s_t) A_t, a scalar: REINFORCE, and the inner loss of MAML.

    Williams 1992, https://doi.org/10.1007/BF00992696. Its second derivative lacks every term in which an action changes
    what data are seen: the meta-gradient through it is biased, see above.

    Args:
        log_prob: (..., T).
        advantage: (..., T) A_t.
        valid: Bool (..., T); None: all are.
        denominator: as for `masked_mean`.

    Raises:
        TypeError, ValueError: shapes that differ, a mask that is not Bool, a denominator that is not positive.
    """
    check_steps("log_prob", log_prob, advantage=advantage, valid=valid)
    return -masked_mean(where_valid(valid, log_prob) * where_valid(valid, advantage), valid, denominator=denominator)


def surrogate_loss(
    log_prob: Tensor,
    old_log_prob: Tensor | None,
    advantage: Tensor,
    valid: Tensor | None = None,
    *,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """-mean ρ_t A_t, ρ_t = π_θ / π_old, a scalar: the inner loss of ProMP, and the objective of TRPO.

    With `old_log_prob` None π_old = ⊥(π_θ): the low-variance-curvature surrogate J^LVC of Rothfuss et al. 2019, section
    5, https://arxiv.org/abs/1810.06784. With the policy that acted it is their J^LR, the same at that policy. Its
    second derivative lacks H12, the effect of an action on the probability of later ones.

    Args:
        log_prob: (..., T).
        old_log_prob: (..., T) of the policy that acted; None: ⊥(log_prob).
        advantage: (..., T) A_t.
        valid: Bool (..., T); None: all are.
        denominator: as for `masked_mean`.

    Raises:
        TypeError, ValueError: shapes that differ, a mask that is not Bool, a denominator that is not positive.
    """
    old_log_prob = log_prob.detach() if old_log_prob is None else old_log_prob
    check_steps("log_prob", log_prob, advantage=advantage, valid=valid)
    ratio = importance_ratio(log_prob, old_log_prob, valid)
    return -masked_mean(ratio * where_valid(valid, advantage), valid, denominator=denominator)


def clipped_surrogate_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    valid: Tensor | None = None,
    *,
    clip: float = 0.2,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """-mean min(ρ_t A_t, clip(ρ_t, 1 - ε, 1 + ε) A_t), a scalar: PPO, and the outer loss of ProMP.

    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7, https://arxiv.org/abs/1707.06347.

    Args:
        log_prob: (..., T).
        old_log_prob: (..., T) of the policy that acted.
        advantage: (..., T) A_t.
        valid: Bool (..., T); None: all are.
        clip: ε > 0; 0.3 in ProMP.
        denominator: as for `masked_mean`.

    Raises:
        TypeError, ValueError: shapes that differ, a mask that is not Bool, ε or a denominator that is not positive.
    """
    check_positive("clip", clip)
    check_steps("log_prob", log_prob, advantage=advantage, valid=valid)
    ratio, advantage = importance_ratio(log_prob, old_log_prob, valid), where_valid(valid, advantage)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -masked_mean(torch.minimum(ratio * advantage, clipped * advantage), valid, denominator=denominator)


def magic_box(w: Tensor) -> Tensor:
    """□(w) = exp(w - ⊥w): 1, with the derivatives of exp(w) / exp(⊥w); Foerster et al. 2018, section 3."""
    return (w - w.detach()).exp()


def dice_loss(
    log_prob: Tensor,
    reward: Tensor,
    next_value: Tensor | None,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor | None = None,
    *,
    gamma: float | Tensor = 0.99,
    baseline: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """-1/n Σ_t γ^t (□(w_t) R_t + (1 - □(log π_t)) b_t), w_t = Σ_{t' <= t} log π_{t'} in the episode, a scalar.

    R_t = r_t, with γ v_{t+1} added where an episode is cut without having terminated. Its value is minus the mean
    discounted return of an episode; its derivatives of every order are those of -J on average.

    Foerster et al. 2018, "DiCE: The Infinitely Differentiable Monte-Carlo Estimator", section 3,
    https://arxiv.org/abs/1802.05098. The baseline lowers the variance of the first derivative; `loaded_dice_loss` that
    of the second too.

    Args:
        log_prob: (..., T).
        reward: (..., T).
        next_value: (..., T) v_{t+1}, as for `discounted_returns`; None: 0.
        terminated, truncated: Bool (..., T). Where they end an episode w starts anew: for policies that remember
            earlier episodes of a trial (RL²) pass the ends of trials.
        valid: Bool (..., T); None: all are.
        gamma: γ in [0, 1].
        baseline: (..., T) b_t, a function of the observation before step t; None: 0.
        denominator: n > 0; None: the number of episodes.

    Raises:
        TypeError, ValueError: shapes that differ, masks that are not Bool, γ or a denominator out of range.
    """
    check_steps("log_prob", log_prob, reward=reward, next_value=next_value, baseline=baseline)
    check_steps("log_prob", log_prob, terminated=terminated, truncated=truncated, valid=valid)
    check_fraction("gamma", gamma)
    goes_on = continuing(terminated, truncated, valid)
    log_prob, r_t = where_valid(valid, log_prob), where_valid(valid, reward)
    if next_value is not None:
        r_t = r_t + gamma * where_valid(valid, torch.where(goes_on | terminated, 0.0, next_value))
    total = magic_box(_sum_log_probs(log_prob, goes_on, 1.0)) * r_t
    if baseline is not None:
        total = total + (1 - magic_box(log_prob)) * where_valid(valid, baseline)
    discount = gamma ** episode_step(terminated, truncated, valid).to(log_prob.dtype)
    if denominator is None:
        denominator = count_episodes(terminated, truncated, valid).clamp(min=1)
    return -masked_mean(discount * total, valid, denominator=denominator)


def loaded_dice_loss(
    log_prob: Tensor,
    advantage: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor | None = None,
    *,
    gamma: float | Tensor = 0.99,
    lam: float | Tensor = 1.0,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """-1/n Σ_t γ^t (□(w_t) - □(w_t - log π_t)) A_t, w_t = λ w_{t-1} + log π_t in the episode, a scalar.

    Farquhar, Whiteson, Foerster 2019, "Loaded DiCE: Trading off Bias and Variance in Any-Order Score Function Gradient
    Estimators for Reinforcement Learning", algorithm 1, https://arxiv.org/abs/1909.10549. Its derivatives of every
    order are those of -J on average for λ = 1 and advantages without bias, such as returns minus any baseline; a good
    one lowers the variance of all of them. Its value is 0. λ = 0 is `surrogate_loss` with ⊥, whose second derivative
    varies least and is biased most.

    Args:
        log_prob: (..., T).
        advantage: (..., T) A_t, such as `generalized_advantages`.
        terminated, truncated: as for `dice_loss`.
        valid: Bool (..., T); None: all are.
        gamma: γ in [0, 1]; with 1 every step counts alike, as in the published algorithms other than DiCE.
        lam: λ in [0, 1], how far an action's effect on later advantages is followed; not that of the advantages.
        denominator: n > 0; None: the number of episodes.

    Raises:
        TypeError, ValueError: shapes that differ, masks that are not Bool, γ, λ or a denominator out of range.
    """
    check_steps("log_prob", log_prob, advantage=advantage)
    check_steps("log_prob", log_prob, terminated=terminated, truncated=truncated, valid=valid)
    check_fraction("gamma", gamma)
    check_fraction("lam", lam)
    log_prob = where_valid(valid, log_prob)
    w = _sum_log_probs(log_prob, continuing(terminated, truncated, valid), lam)
    total = (magic_box(w) - magic_box(w - log_prob)) * where_valid(valid, advantage)
    discount = gamma ** episode_step(terminated, truncated, valid).to(log_prob.dtype)
    if denominator is None:
        denominator = count_episodes(terminated, truncated, valid).clamp(min=1)
    return -masked_mean(discount * total, valid, denominator=denominator)


def entropy_bonus(
    policy: Distribution, valid: Tensor | None = None, *, denominator: float | Tensor | None = None
) -> Tensor:
    """-mean H(π_θ(· | s_t)), a scalar: a loss that rewards entropy, to be added with a weight.

    Args:
        policy: of actions at every step; its entropy is (..., T).
        valid: Bool (..., T); None: all are.
        denominator: as for `masked_mean`.
    """
    return -masked_mean(policy.entropy(), valid, denominator=denominator)


def kl_penalty(
    policy: Distribution,
    old_policy: Distribution,
    valid: Tensor | None = None,
    *,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Mean KL(π_old(· | s_t) ‖ π_θ(· | s_t)), a scalar: the direction of TRPO, PPO and ProMP.

    Args:
        policy, old_policy: distributions of the same kind at every step.
        valid: Bool (..., T); None: all are.
        denominator: as for `masked_mean`.
    """
    return masked_mean(old_policy.kl(policy), valid, denominator=denominator)


def _sum_log_probs(log_prob: Tensor, goes_on: Tensor, lam: float | Tensor) -> Tensor:
    """w_t = λ w_{t-1} + log π_t, from 0 at the start of every episode."""
    return sum_forward(log_prob, lam * following(goes_on).to(log_prob.dtype))
