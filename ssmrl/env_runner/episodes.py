"""Whole episodes: what trajectories hold of them, moved to the front of each row.

Letters: B rows, T steps, L steps of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.rollout import Policy, RolloutCarry, Trajectory, rollout

__all__ = ["collect_episodes", "first_episodes", "pack_valid"]


def collect_episodes(
    policy: Policy,
    environment: VectorEnv[Any, Any, Any],
    num_episodes: int,
    max_steps: int,
    *,
    hidden_state: Any = None,
    seed: int | None = None,
    previous: bool = False,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], object] | None = None,
) -> Trajectory:
    """Reset all rows and collect the first `num_episodes` whole episodes of each.

    Rows that have theirs are stepped on, unseen, until the last one has. The episodes of a row are one trial: the
    policy is told to forget at the first one alone, and sees previous actions and rewards where `previous` (RL²).

    Args:
        policy, environment, hidden_state, seed, previous, dtype, progress: as in `rollout`.
        num_episodes: episodes of each row.
        max_steps: give up after that many steps of the batch. An environment that truncates after H steps needs at
            most `num_episodes * (H + 1) - 1`.

    Returns:
        The trajectory (B, L, ...), packed as `pack_valid` does it: a row's sum of rewards is that of its episodes.

    Raises:
        ValueError: a row has too few episodes after `max_steps`.
    """
    num_episodes = require_integer("num_episodes", num_episodes, 1)
    max_steps = require_integer("max_steps", max_steps, 1)
    pieces: list[Trajectory] = []
    carry: RolloutCarry | None = None
    ended = torch.zeros(environment.num_envs, dtype=torch.int64)
    while ended.min() < num_episodes:
        if len(pieces) == max_steps:
            row = int(ended.argmin())
            raise ValueError(
                f"Every row must end {num_episodes} episodes within `max_steps` = {max_steps} steps; row {row} ended "
                f"{ended[row]}: raise it, or limit the episodes (`Environment(max_episode_steps=...)`)."
            )
        start: dict[str, Any] = {"hidden_state": hidden_state, "seed": seed} if carry is None else {"carry": carry}
        piece, carry = rollout(
            policy,
            environment,
            1,
            previous=previous,
            episodes_per_trial=num_episodes,
            dtype=dtype,
            progress=progress,
            **start,
        )
        pieces.append(piece)
        ended += _ends(piece)[:, 0]
    whole = Trajectory(*(torch.cat(leaves, dim=1) for leaves in zip(*pieces, strict=True)))
    return first_episodes(whole, num_episodes)


def first_episodes(trajectory: Trajectory, num_episodes: int) -> Trajectory:
    """Keep of every row (B, T, ...) what comes up to its `num_episodes`-th end, packed as `pack_valid` does it."""
    num_episodes = require_integer("num_episodes", num_episodes, 1)
    ends = _ends(trajectory).long()
    ended_before = ends.cumsum(dim=1) - ends
    return pack_valid(trajectory._replace(valid=trajectory.valid & (ended_before < num_episodes)))


def pack_valid(trajectory: Trajectory) -> Trajectory:
    """Move the valid steps of every row (B, T, ...) to its front, in order; behind them everything is 0 and False.

    Returned are (B, L, ...), L the most valid steps of a row. A sequence model that runs over the packed steps is in
    the state in which the policy was, in all three autoreset modes, also in trials of several episodes; over a
    NEXT_STEP trajectory as it was recorded it would take in one input more at every end.
    """
    counts = trajectory.valid.sum(dim=1)
    order = torch.argsort((~trajectory.valid).long(), dim=1, stable=True)[:, : int(counts.max())]
    row = torch.arange(len(order), device=order.device)[:, None]
    there = trajectory.valid[row, order]

    def pack(leaf: Tensor) -> Tensor:
        return leaf[row, order].masked_fill(~there.reshape(*there.shape, *[1] * (leaf.dim() - 2)), 0)

    return Trajectory(*(pack(leaf) for leaf in trajectory))


def _ends(trajectory: Trajectory) -> Tensor:
    """Bool (B, T) an episode ends with this step."""
    return trajectory.valid & (trajectory.terminated | trajectory.truncated)
