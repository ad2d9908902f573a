"""What a policy gradient needs of the steps that a policy made on a task, and the losses of a policy on it.

For one task; `vmap` maps it. Letters: E rows, T steps, D inputs, A action components.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmrl.core import functional_forward
from ssmrl.meta_rl.baselines import fit_linear_baseline, linear_baseline
from ssmrl.meta_rl.losses import (
    clipped_surrogate_loss,
    entropy_bonus,
    likelihood_ratio_loss,
    loaded_dice_loss,
    masked_mean,
    surrogate_loss,
)
from ssmrl.meta_rl.returns import discounted_returns, generalized_advantages, normalize_advantages
from ssmrl.meta_rl.segments import episode_step

__all__ = ["PolicyBatch", "PolicyLosses", "linear_advantages"]


class PolicyBatch(NamedTuple):
    """E rows of T steps that a policy made on a task, with what a policy gradient needs of them."""

    x: Tensor
    """(E, T, D) what the policy saw."""
    action: Tensor
    """(E, T) or (E, T, A)."""
    reset: Tensor
    """Bool (E, T) where it forgot."""
    valid: Tensor
    """Bool (E, T)."""
    advantage: Tensor
    """(E, T)."""
    old: Any
    """The distributions that the actions were drawn from, leaves (E, T, A)."""


def linear_advantages(
    trajectory: Any, *, gamma: float = 0.99, lam: float = 1.0, horizon_ends: bool = True, normalize: bool = True
) -> Tensor:
    """Advantages (E, T) over a linear baseline that is fitted to the returns of the task itself, as MAML and ProMP do.

    Args:
        trajectory: of one task, with leaves (E, T, ...) `observation`, `next_observation`, `reward`, `terminated`,
            `truncated` and `valid`: a `ssmrl.env_runner.Trajectory`. Observations are vectors (E, T, D).
        gamma, lam: γ and λ of `generalized_advantages`.
        horizon_ends: whether an episode that is cut after H steps is the task itself, after which nothing comes, as in
            both papers. False: it is worth what the baseline says of its last observation.
        normalize: to mean 0 and deviation 1 over the task's steps.
    """
    one = trajectory
    step = episode_step(one.terminated, one.truncated, one.valid)
    terminated = one.terminated | one.truncated if horizon_ends else one.terminated
    returns = discounted_returns(one.reward, None, terminated, one.truncated, gamma=gamma, valid=one.valid)
    weights = fit_linear_baseline(one.observation, step, returns, valid=one.valid)
    value = linear_baseline(weights, one.observation, step)
    next_value = linear_baseline(weights, one.next_observation, step + 1)
    advantage = generalized_advantages(
        one.reward, value, next_value, terminated, one.truncated, gamma=gamma, lam=lam, valid=one.valid
    )
    return normalize_advantages(advantage, one.valid) if normalize else advantage


class PolicyLosses:
    """Losses (params, batch) -> scalar of a policy model on the batch of one task, for either loop.

    Args:
        policy: a `PolicyModel`.
    """

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy

    def distribution(self, params: Any, batch: PolicyBatch) -> Any:
        """The distributions over actions at every step, of these parameters."""
        output: Any = functional_forward(self.policy, params, batch.x, None, reset=batch.reset)[0]
        return output.distribution

    def batch(self, params: Any, trajectory: Any, advantage: Tensor, x: Tensor | None = None) -> PolicyBatch:
        """The batch of a task from its trajectory, made by the policy with these parameters.

        Args:
            params: name -> tensor.
            trajectory: with leaves (E, T, ...) `observation`, `action`, `reset` and `valid`.
            advantage: (E, T).
            x: (E, T, D) what the policy saw, where that is not the observation alone (`policy_inputs`).
        """
        x = trajectory.observation if x is None else x
        batch = PolicyBatch(x, trajectory.action, trajectory.reset, trajectory.valid, advantage, ())
        with torch.no_grad():
            return batch._replace(old=self.distribution(params, batch))

    def likelihood_ratio(self, params: Any, batch: PolicyBatch) -> Tensor:
        """-mean log π(a_t) A_t: the inner loss of MAML. See `likelihood_ratio_loss`."""
        log_prob = self.distribution(params, batch).log_prob(batch.action)
        return likelihood_ratio_loss(log_prob, batch.advantage, batch.valid)

    def surrogate(self, params: Any, batch: PolicyBatch) -> Tensor:
        """-mean ρ_t A_t: the inner loss of ProMP, and the outer one of MAML with TRPO. See `surrogate_loss`."""
        log_prob = self.distribution(params, batch).log_prob(batch.action)
        return surrogate_loss(log_prob, self.old_log_prob(batch), batch.advantage, batch.valid)

    def low_variance(self, params: Any, batch: PolicyBatch) -> Tensor:
        """-mean π / ⊥(π) A_t: ProMP's J^LVC, whose data are taken for its own wherever it is. See `surrogate_loss`."""
        log_prob = self.distribution(params, batch).log_prob(batch.action)
        return surrogate_loss(log_prob, None, batch.advantage, batch.valid)

    def dice(self, params: Any, batch: PolicyBatch, *, lam: float = 1.0) -> Tensor:
        """Loaded DiCE, γ = 1, with every row an episode, per step. See `loaded_dice_loss`."""
        log_prob = self.distribution(params, batch).log_prob(batch.action)
        never = torch.zeros_like(batch.valid)
        steps = batch.valid.sum().clamp(min=1)
        return loaded_dice_loss(
            log_prob, batch.advantage, never, never, batch.valid, gamma=1.0, lam=lam, denominator=steps
        )

    def clipped(self, params: Any, batch: PolicyBatch, *, clip: float = 0.2) -> Tensor:
        """PPO's clipped surrogate. See `clipped_surrogate_loss`."""
        log_prob = self.distribution(params, batch).log_prob(batch.action)
        old = self.old_log_prob(batch)
        return clipped_surrogate_loss(log_prob, old, batch.advantage, batch.valid, clip=clip)

    def divergence(self, params: Any, batch: PolicyBatch) -> Tensor:
        """Mean KL(π_old ‖ π) over the valid steps."""
        return masked_mean(batch.old.kl(self.distribution(params, batch)), batch.valid)

    def exploration(self, params: Any, batch: PolicyBatch, gain: Tensor) -> Tensor:
        """-mean log π(a_t) · gain: what E-MAML adds for data whose use was worth `gain`, a scalar.

        Stadie et al. 2018, "Some Considerations on Learning to Explore via Meta-Reinforcement Learning", equation 6,
        https://arxiv.org/abs/1803.01118.
        """
        log_prob = self.distribution(params, batch).log_prob(batch.action)
        return likelihood_ratio_loss(log_prob, gain.expand_as(log_prob), batch.valid)

    def entropy(self, params: Any, batch: PolicyBatch) -> Tensor:
        """-mean entropy, to be added with a weight. See `entropy_bonus`."""
        return entropy_bonus(self.distribution(params, batch), batch.valid)

    @staticmethod
    def old_log_prob(batch: PolicyBatch) -> Tensor:
        """(E, T) of the actions, under the policy that took them."""
        log_prob: Tensor = batch.old.log_prob(batch.action)
        return log_prob.detach()
