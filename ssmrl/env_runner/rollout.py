"""A policy and a vector environment make trajectories of tensors.

Letters: B rows, T steps, D the shape of an observation, A action components.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Discrete, flatdim
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from ssmrl.env_runner._checks import require_array_space, require_integer
from ssmrl.env_runner.environment import derive_seed

__all__ = [
    "Policy",
    "RolloutCarry",
    "Trajectory",
    "action_features",
    "random_policy",
    "rollout",
]

Policy = Callable[[Tensor, Any, Tensor], tuple[Tensor, Any]]
"""`policy(observation, hidden_state, reset) -> (action, hidden_state)`.

observation (B, D); hidden_state whatever the policy returned last, at first what `rollout` was
given (None by default); reset Bool (B,), the rows where an episode begins at this observation, so
that the state is to be forgotten before it is consumed. action: Int64 (B,) for a Discrete action
space, float (B, A) for a Box.
"""


class Trajectory(NamedTuple):
    """T transitions of B rows; every field has the leading axes (B, T).

    Step t takes `observation` and `action` to `next_observation`. Where it is the last one of an
    episode, `next_observation` is the episode's final observation, never the next one's first, so
    that a truncated value can be bootstrapped from it; `terminated` and `truncated` say which end
    it was.
    """

    observation: Tensor
    """(B, T, D) what the policy saw; Discrete observations are Int64 (B, T)."""
    action: Tensor
    """Int64 (B, T) for a Discrete action space, (B, T, A) for a Box."""
    reward: Tensor
    """(B, T)."""
    next_observation: Tensor
    """(B, T, D) the true successor of `observation`."""
    terminated: Tensor
    """Bool (B, T) the task ended with this step: nothing follows, the value after it is 0."""
    truncated: Tensor
    """Bool (B, T) the episode was cut off after this step: the value after it is not 0."""
    reset: Tensor
    """Bool (B, T) an episode begins at `observation`: what a model's `reset` mask is."""
    valid: Tensor
    """Bool (B, T) False for what is no transition of the environment: the step in which NEXT_STEP
    autoreset ignores the action and goes from a final observation to a first one, with reward 0."""


class RolloutCarry(NamedTuple):
    """Where a rollout stopped, and what the next one needs to go on from there."""

    observation: Tensor
    """(B, D) the next input of the policy."""
    hidden_state: Any
    """The policy's state before that input."""
    reset: Tensor
    """Bool (B,) an episode begins at `observation`."""
    ended: Tensor
    """Bool (B,) the row's next step is the invalid one that NEXT_STEP autoreset inserts."""


@torch.no_grad()
def rollout(
    policy: Policy,
    environment: VectorEnv[Any, Any, Any],
    num_steps: int,
    *,
    hidden_state: Any = None,
    carry: RolloutCarry | None = None,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Trajectory, RolloutCarry]:
    """Let `policy` act for T steps of every row, without gradients.

    Episodes follow each other within a row. All three autoreset modes give the same valid
    transitions, row by row, for a policy that depends on nothing before the last reset; with
    NEXT_STEP it is called once more on every final observation, and that action is ignored. Rows
    that ended are reset here where autoreset is DISABLED.

    Args:
        policy: see `Policy`.
        environment: an `Environment` or any other Gymnasium vector environment, with Box or
            Discrete single spaces.
        num_steps: T.
        hidden_state: what the policy gets as its state at the first step.
        carry: go on where an earlier rollout of the same environment stopped, instead of resetting
            it. Two rollouts of T1 and T2 steps are one of T1 + T2.
        seed: reset the environment with this seed.
        dtype: of what is floating-point; integers stay. None: `torch.get_default_dtype()`.
        progress: called with 1 after every step of the batch, e.g. the `update` of a tqdm bar.

    Returns:
        The trajectory (B, T, ...) on the CPU, and the carry for the next rollout.
    """
    num_steps = require_integer("num_steps", num_steps, 1)
    require_array_space("single_observation_space", environment.single_observation_space)
    require_array_space("single_action_space", environment.single_action_space)
    if not isinstance(environment.metadata.get("autoreset_mode"), AutoresetMode):
        raise ValueError(
            '`environment.metadata["autoreset_mode"]` must be an AutoresetMode; got '
            f"{environment.metadata.get('autoreset_mode')!r}."
        )
    dtype = torch.get_default_dtype() if dtype is None else dtype
    num_rows = environment.num_envs
    if carry is None:
        observation, _ = environment.reset(seed=seed)
        everywhere = torch.ones(num_rows, dtype=torch.bool)
        carry = RolloutCarry(_tensor(observation, dtype), hidden_state, everywhere, ~everywhere)
    elif seed is not None or hidden_state is not None:
        raise ValueError(
            "`carry` already holds the environment's and the policy's state; got `seed` or `hidden_state` as well."
        )
    elif len(carry.observation) != num_rows:
        raise ValueError(f"`carry` must come from an environment of {num_rows} rows; got {len(carry.observation)}.")
    steps = []
    for _ in range(num_steps):
        step, carry = _step(policy, environment, carry, dtype)
        steps.append(step)
        if progress is not None:
            progress(1)
    return Trajectory(*(torch.stack(leaves, dim=1) for leaves in zip(*steps, strict=True))), carry


def random_policy(action_space: Space[Any], seed: int) -> Policy:
    """Return a policy that samples `action_space`, the single one, in every row independently.

    Row i's stream is seeded with `derive_seed(seed, i, 1)`: it depends on neither the batch size
    nor the environment's streams, also where they have the same seed. The streams are the policy's
    hidden state and advance in place; from the state None they start anew. The distribution is
    that of Gymnasium's `Space.sample`: uniform where the space is bounded.
    """
    require_array_space("action_space", action_space)
    seed = require_integer("seed", seed, 0)

    def policy(observation: Tensor, hidden_state: Any, reset: Tensor) -> tuple[Tensor, Any]:
        if hidden_state is None:
            hidden_state = tuple(copy.deepcopy(action_space) for _ in observation)
            for row, space in enumerate(hidden_state):
                space.seed(derive_seed(seed, row, 1))
        return torch.as_tensor(np.stack([space.sample() for space in hidden_state])), hidden_state

    return policy


def action_features(action: Tensor, space: Space[Any], *, dtype: torch.dtype | None = None) -> Tensor:
    """Return actions (...) of a Discrete or (..., shape) of a Box as model inputs (..., A).

    A Discrete action is one-hot, with A = n; a Box action is flattened. A is
    `gymnasium.spaces.flatdim(space)`. `dtype` None is `torch.get_default_dtype()`.
    """
    require_array_space("space", space)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if isinstance(space, Discrete):
        index = action - int(space.start)
        if index.is_floating_point() or ((index < 0) | (index >= int(space.n))).any():
            raise ValueError(f"`action` must hold integers of {space}; got {action}.")
        return torch.nn.functional.one_hot(index.long(), int(space.n)).to(dtype)
    shape = space.shape or ()
    lead = action.dim() - len(shape)
    if lead < 0 or action.shape[lead:] != shape:
        raise ValueError(f"`action` must have the shape (..., *{shape}) of {space}; got {tuple(action.shape)}.")
    return action.reshape(*action.shape[:lead], flatdim(space)).to(dtype)


def _step(
    policy: Policy, environment: VectorEnv[Any, Any, Any], carry: RolloutCarry, dtype: torch.dtype
) -> tuple[Trajectory, RolloutCarry]:
    """Make one transition (B, ...) of every row."""
    decision = policy(carry.observation, carry.hidden_state, carry.reset)
    if not isinstance(decision, tuple) or len(decision) != 2:
        raise TypeError(f"`policy` must return a tuple (action, hidden_state); got {type(decision).__name__}.")
    action = _action(decision[0], environment, dtype)
    # The environment gets a copy: it may write into what it is given.
    observed, rewards, terminations, truncations, info = environment.step(action.numpy().copy())
    observation = next_observation = _tensor(observed, dtype)
    terminated, truncated = _tensor(terminations, dtype), _tensor(truncations, dtype)
    ended = reset = terminated | truncated
    waiting = torch.zeros_like(ended)
    mode = environment.metadata["autoreset_mode"]
    if mode is AutoresetMode.NEXT_STEP:
        reset, waiting = carry.ended, ended
    elif mode is AutoresetMode.SAME_STEP and ended.any():
        next_observation = observation.clone()
        final = np.stack(list(info["final_obs"][ended.numpy()]))
        next_observation[ended] = _tensor(final, dtype)
    elif mode is AutoresetMode.DISABLED and ended.any():
        observed, _ = environment.reset(options={"reset_mask": ended.numpy().copy()})
        observation = _tensor(observed, dtype)
    step = Trajectory(
        observation=carry.observation,
        action=action,
        reward=_tensor(rewards, dtype).to(dtype),
        next_observation=next_observation,
        terminated=terminated,
        truncated=truncated,
        reset=carry.reset,
        valid=~carry.ended,
    )
    return step, RolloutCarry(observation, decision[1], reset, waiting)


def _action(action: Any, environment: VectorEnv[Any, Any, Any], dtype: torch.dtype) -> Tensor:
    """Return the policy's action as the trajectory records it and the environment gets it."""
    space = environment.single_action_space
    shape = (environment.num_envs, *(space.shape or ()))
    given: Tensor = torch.as_tensor(action, device="cpu")
    if given.shape != shape:
        raise ValueError(f"`policy` must return an action of shape {shape}; got {tuple(given.shape)}.")
    if isinstance(space, Discrete):
        if given.is_floating_point() or given.dtype is torch.bool:
            raise TypeError(f"`policy` must return integers for {space}; got {given.dtype}.")
        return given.to(torch.int64, copy=True)
    return given.to(dtype if given.is_floating_point() else given.dtype, copy=True)


def _tensor(array: Any, dtype: torch.dtype) -> Tensor:
    """Copy an array, its floats to `dtype`: a vector environment may reuse its buffers."""
    tensor = torch.as_tensor(np.asarray(array))
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
