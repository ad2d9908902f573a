"""Policies for `rollout`: parameters per task, called once for all of them, and a random one.

Letters: N tasks, E rows of each, B = N·E rows, T steps, D the shape of an observation, A action components.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import Space
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from ssmrl.env_runner._checks import require_array_space, require_integer
from ssmrl.env_runner.environment import row_seeds
from ssmrl.env_runner.noise import Noise
from ssmrl.env_runner.rollout import Policy, Trajectory

__all__ = ["PerTaskState", "by_task", "per_task", "random_policy"]


class PerTaskState(NamedTuple):
    """The hidden state of a policy that `per_task` made."""

    hidden_state: Any
    """What `policy_fn` returned last, its leaves (B, ...); None without one."""
    draws: Tensor
    """Int64 (B,) the draws of noise that each row has made."""


def per_task(policy_fn: Callable[..., tuple[Tensor, Any]], params: Any, *, noise: Noise | None = None) -> Policy:
    """Return the policy of N·E rows in which every task has parameters of its own.

    Rows are task-major: task n has the rows n·E to (n + 1)·E - 1, as `by_task` takes a trajectory apart. One call of
    `torch.func.vmap(policy_fn)` over the tasks decides for all rows.

    Args:
        policy_fn: `policy_fn(params, observation, hidden_state, reset, noise) -> (action, hidden_state)` for the E
            rows of one task: observation (E, D), or (E, D + A + 2) in a rollout with `previous`; hidden_state the
            last one it returned, leaves (E, ...), at first what `rollout` was given, None by default; reset Bool
            (E,); noise (E, S), or None. A hidden state of None stays None. It draws no random numbers itself.
        params: pytree of tensors (N, ...). Observations and noise come to it on their device, and noise and
            floating observations in the dtype of the first of them.
        noise: `normal_noise(seed, S)`, `gumbel_noise(seed, S)` or another `Noise`: a draw for every row and step, on
            streams that do not depend on N and E.

    Raises:
        ValueError: the leaves of `params` disagree on N, or N does not divide the number of rows.
        TypeError: `policy_fn` does not return a tuple of two.
    """
    leaves = tree_leaves(params)
    if not leaves or any(leaf.dim() == 0 or len(leaf) != len(leaves[0]) or len(leaf) == 0 for leaf in leaves):
        raise ValueError(
            "`params` must hold tensors with the tasks on one leading axis, (N, ...); got the shapes "
            f"{[tuple(leaf.shape) for leaf in leaves]}."
        )
    num_tasks, device, dtype = len(leaves[0]), leaves[0].device, leaves[0].dtype

    def one_task(*arguments: Any) -> Any:
        decision = policy_fn(*arguments)
        if not isinstance(decision, tuple) or len(decision) != 2:
            raise TypeError(f"`policy_fn` must return a tuple (action, hidden_state); got {type(decision).__name__}.")
        action, hidden_state = decision
        return action if hidden_state is None else (action, hidden_state)  # vmap returns tensors only.

    def split(tree: Any) -> Any:
        return tree_map(lambda leaf: leaf.unflatten(0, (num_tasks, -1)), tree)

    def policy(observation: Tensor, hidden_state: Any, reset: Tensor) -> tuple[Tensor, Any]:
        num_rows = len(reset)
        if num_rows % num_tasks != 0:
            raise ValueError(
                f"The environment must have as many rows for each of the {num_tasks} tasks in `params`; got "
                f"{num_rows} rows."
            )
        state = hidden_state
        if not isinstance(state, PerTaskState):
            state = PerTaskState(hidden_state, torch.zeros(num_rows, dtype=torch.int64))
        observation = observation.to(device, dtype if observation.is_floating_point() else observation.dtype)
        drawn = None if noise is None else split(noise(state.draws).to(device, dtype))
        before = None if state.hidden_state is None else split(state.hidden_state)
        in_dims = (0, 0, None if before is None else 0, 0, None if drawn is None else 0)
        result = vmap(one_task, in_dims)(params, split(observation), before, split(reset.to(device)), drawn)
        action, after = result if isinstance(result, tuple) else (result, None)
        after = None if after is None else tree_map(lambda leaf: leaf.flatten(0, 1), after)
        return action.flatten(0, 1), PerTaskState(after, state.draws + 1)

    return policy


def by_task(trajectory: Trajectory, num_tasks: int) -> Trajectory:
    """Take leaves (N·E, T, ...), rows task-major, to (N, E, T, ...). The inverse is `leaf.flatten(0, 1)`."""
    num_tasks = require_integer("num_tasks", num_tasks, 1)
    if len(trajectory.valid) % num_tasks != 0:
        raise ValueError(f"`num_tasks` must divide the number of rows, {len(trajectory.valid)}; got {num_tasks}.")
    return Trajectory(*(leaf.unflatten(0, (num_tasks, -1)) for leaf in trajectory))


def random_policy(action_space: Space[Any], seed: int) -> Policy:
    """Return a policy that samples `action_space`, the single one, in every row independently.

    Row i's stream is seeded with `row_seeds(seed, B, 1)[i]`: it depends on neither the batch size
    nor the environment's streams, also where they have the same seed. The streams are the policy's
    hidden state and advance in place; from the state None they start anew. The distribution is
    that of Gymnasium's `Space.sample`: uniform where the space is bounded.
    """
    require_array_space("action_space", action_space)
    seed = require_integer("seed", seed, 0)

    def policy(observation: Tensor, hidden_state: Any, reset: Tensor) -> tuple[Tensor, Any]:
        if hidden_state is None:
            hidden_state = tuple(copy.deepcopy(action_space) for _ in observation)
            for space, own in zip(hidden_state, row_seeds(seed, len(hidden_state), 1), strict=True):
                space.seed(own)
        return torch.as_tensor(np.stack([space.sample() for space in hidden_state])), hidden_state

    return policy
