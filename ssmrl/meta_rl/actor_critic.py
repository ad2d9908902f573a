"""Rows of steps for an actor and a critic: advantages and targets by the values of the policy that made them.

A row holds steps that follow each other, and the model runs over all of it: it forgets where `reset` is True, and
nowhere else. For RL² (Duan et al. 2016, https://arxiv.org/abs/1611.02779) a row holds trials, several episodes on one
task, over which the policy remembers, sees its previous actions and rewards, and seeks the return of all of them:
`reset` is True where a trial begins, and `terminated` where it ends.

Letters: B rows, T steps, D inputs, A action components or number of actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ssmrl.core import functional_forward
from ssmrl.meta_rl.returns import generalized_advantages, normalize_advantages
from ssmrl.meta_rl.segments import check_steps, continuing

__all__ = [
    "ActorCriticBatch",
    "actor_critic_batch",
    "check_has_value",
    "check_rows",
    "evaluate_rows",
    "some_rows",
    "zero_where_invalid",
]


class ActorCriticBatch(NamedTuple):
    """B rows of T steps that a policy with a value made, with what PPO needs of them. The rows are every leaf's axis 0.

    Invalid steps have no influence, whatever they hold, where they are at the end of a row or before a `reset`.
    """

    x: Tensor
    """(B, T, D) what the policy saw."""
    action: Tensor
    """(B, T) or (B, T, A)."""
    reset: Tensor
    """Bool (B, T) where it forgot."""
    valid: Tensor
    """Bool (B, T)."""
    advantage: Tensor
    """(B, T)."""
    target: Tensor
    """(B, T) what the value is to be: the λ-return."""
    value: Tensor
    """(B, T) what it was."""
    old: Any
    """The distributions that the actions were drawn from, leaves (B, T, A)."""
    hidden_state: Any = None
    """Before the first step, leaves (B, ...); None: the policy's initial one."""


@torch.no_grad()
def actor_critic_batch(
    policy: nn.Module,
    x: Tensor,
    action: Tensor,
    reward: Tensor,
    reset: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor | None = None,
    *,
    next_x: Tensor | None = None,
    hidden_state: Any = None,
    gamma: float = 0.99,
    lam: float = 0.95,
    normalize: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> ActorCriticBatch:
    """A_t and targets A_t + v_t by GAE(γ, λ) with the policy's own values, and the distributions that acted.

    Where a row is cut without having terminated, be it by a truncation or by its end, v_{t+1} is the value of `next_x`
    in the state after step t.

    Args:
        policy: a `PolicyModel` with a value, as it was when it acted.
        x: (B, T, D).
        action: (B, T) or (B, T, A).
        reward: (B, T) r_t.
        reset: Bool (B, T) where the policy forgets before it sees x_t.
        terminated, truncated: Bool (B, T). For RL² `terminated` is the end of a trial, and `truncated` nowhere True.
        valid: Bool (B, T); None: all are.
        next_x: (B, T, D) what it would have seen after step t; only those of cuts are used. None: there are no cuts.
        hidden_state: before the first step, leaves (B, ...); None: the policy's initial one.
        gamma, lam: γ and λ in [0, 1].
        normalize: bring the advantages of all rows to mean 0 and deviation 1: `normalize_advantages`.
        process_group: all rows are then those of all its ranks.

    Raises:
        TypeError, ValueError: shapes that differ, masks that are not Bool, γ or λ out of range, a policy without a
            value, a cut without `next_x`, or one after which the policy does not forget.
    """
    valid = torch.ones_like(reset) if valid is None else valid
    check_steps("reward", reward, terminated=terminated, truncated=truncated, valid=valid)
    check_rows(reward, x, action, reset)
    cut = valid & ~terminated & ~continuing(terminated, truncated, valid)
    x = zero_where_invalid(valid, x)
    row, t = cut.nonzero(as_tuple=True)
    at = torch.arange(x.shape[1], device=x.device).expand_as(cut)
    seen, forgets = x, reset
    if len(row):
        _check_cuts(cut, reset, valid, x, next_x)
        # The inputs after cuts are put into the row, where the policy is about to forget anyway: one pass has all.
        at = at + cut.cumsum(1) - cut.long()
        seen = x.new_zeros(len(x), x.shape[1] + int(cut.sum(1).max()), x.shape[2])
        seen = seen.scatter(1, at.unsqueeze(-1).expand_as(x), x)
        seen[row, at[row, t] + 1] = next_x[row, t]  # type: ignore[index]
        forgets = reset.new_zeros(seen.shape[:2]).scatter(1, at, reset)
    old, values = evaluate_rows(policy, {}, seen, hidden_state, forgets)
    value, next_value = values.gather(1, at), values.gather(1, (at + 1).clamp(max=seen.shape[1] - 1))
    if len(row):
        old = tree_map(lambda leaf: leaf[torch.arange(len(x), device=x.device)[:, None], at], old)
    advantage = generalized_advantages(
        reward, value, next_value, terminated, truncated, gamma=gamma, lam=lam, valid=valid
    )
    target = advantage + value
    if normalize:
        advantage = normalize_advantages(advantage, valid, process_group=process_group)
    return ActorCriticBatch(x, action, reset, valid, advantage, target, value, old, hidden_state)


def some_rows(batch: ActorCriticBatch, rows: Tensor) -> ActorCriticBatch:
    """Some rows, by their indices Int64 (R,)."""
    chosen: ActorCriticBatch = tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, batch)
    return chosen


def evaluate_rows(
    policy: nn.Module, params: Mapping[str, Tensor], x: Tensor, hidden_state: Any, reset: Tensor
) -> tuple[Any, Tensor]:
    """Distributions and values (B, T) of whole rows."""
    output: Any = functional_forward(policy, params, x, hidden_state, reset=reset)[0]
    check_has_value(output.value is not None)
    return output.distribution, output.value


def zero_where_invalid(valid: Tensor, x: Tensor) -> Tensor:
    """Zeros at the invalid steps of (B, T) or (B, T, ...): what is not finite there would be in the gradient."""
    return x.masked_fill(~valid.reshape(*valid.shape, *[1] * (x.dim() - valid.dim())), 0)


def check_has_value(has_value: bool) -> None:
    """Refuse a policy without a value."""
    if not has_value:
        raise ValueError("The policy must have a value: PolicyModel(model, head, has_value=True).")


def check_rows(like: Tensor, x: Tensor, action: Tensor, reset: Tensor) -> None:
    """Refuse rows that do not have (B, T) of `like`: broadcast, they would give a wrong number without an error."""
    if like.dim() != 2:
        raise ValueError(f"A batch must hold rows of steps, (B, T, ...); got {tuple(like.shape)}.")
    for name, value, dims in (("x", x, (3,)), ("action", action, (2, 3)), ("reset", reset, (2,))):
        if value.dim() not in dims or value.shape[:2] != like.shape:
            axes = {"x": "(B, T, D)", "action": "(B, T) or (B, T, A)", "reset": "(B, T)"}[name]
            raise ValueError(
                f"`{name}` must have shape {axes} with (B, T) = {tuple(like.shape)}; got {tuple(value.shape)}."
            )


def _check_cuts(cut: Tensor, reset: Tensor, valid: Tensor, x: Tensor, next_x: Tensor | None) -> None:
    row, t = cut.nonzero()[0].tolist()
    if next_x is None:
        raise ValueError(
            f"`next_x` must be what the policy would have seen next, since row {row} is cut after step {t} without "
            "having terminated; got None. For RL² pack the valid steps and pass the ends of trials as `terminated`."
        )
    if next_x.shape != x.shape:
        raise ValueError(
            f"`next_x` must have the shape (B, T, D) = {tuple(x.shape)} of `x`; got {tuple(next_x.shape)}."
        )
    remembers = cut[:, :-1] & ~reset[:, 1:] & valid[:, 1:]
    if remembers.any():
        row, t = remembers.nonzero()[0].tolist()
        raise ValueError(
            f"The policy must forget after a cut; row {row} is cut after step {t} without having terminated, and "
            f"`reset` is False at step {t + 1}. Where it remembers across episodes (RL²), pass the ends of trials."
        )
