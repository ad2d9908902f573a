"""A policy and a vector environment make trajectories of tensors.

Letters: B rows, T steps, D the shape of an observation, A action components.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import Space
from gymnasium.spaces import Discrete, flatdim
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ssmrl.env_runner._checks import require_array_space, require_integer

__all__ = ["Policy", "RolloutCarry", "Trajectory", "action_features", "policy_inputs", "rollout"]

Policy = Callable[[Tensor, Any, Tensor], tuple[Tensor, Any]]
"""`policy(observation, hidden_state, reset) -> (action, hidden_state)`.

observation (B, D); hidden_state whatever the policy returned last, at first what `rollout` was
given (None by default); reset Bool (B,), the rows where an episode (or a trial, see `rollout`)
begins at this observation, so that the state is to be forgotten before it is consumed. action: Int64
(B,) for a Discrete action space, float (B, A) for a Box.
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
    """Bool (B, T) an episode, or a trial of several, begins at `observation`: a model's `reset` mask."""
    valid: Tensor
    """Bool (B, T) False for what is no transition of the environment: the step in which NEXT_STEP
    autoreset ignores the action and goes from a final observation to a first one, with reward 0."""


class RolloutCarry(NamedTuple):
    """Where a rollout stopped, and what the next one needs to go on from there."""

    observation: Tensor
    """(B, D) the observation that the policy sees next."""
    hidden_state: Any
    """The policy's state before that observation."""
    reset: Tensor
    """Bool (B,) an episode, or a trial of several, begins at `observation`."""
    ended: Tensor
    """Bool (B,) the row's next step is the invalid one that NEXT_STEP autoreset inserts."""
    previous: Tensor
    """(B, A + 2) the action (its features), the reward and the end flag of the row's last valid step; 0 at a reset."""
    episode: Tensor
    """Int64 (B,) the episodes of the row's trial that came before this one."""


@torch.no_grad()
def rollout(
    policy: Policy,
    environment: VectorEnv[Any, Any, Any],
    num_steps: int,
    *,
    hidden_state: Any = None,
    carry: RolloutCarry | None = None,
    seed: int | None = None,
    previous: bool = False,
    episodes_per_trial: int = 1,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Trajectory, RolloutCarry]:
    """Let `policy` act for T steps of every row, without gradients.

    Episodes follow each other within a row. All three autoreset modes give the same valid
    transitions, row by row. With NEXT_STEP the policy is called once more on every final
    observation: that action is ignored, and the row's part of the hidden state, that is of every
    tensor in it with the leading axis B, is put back as it was before that call. (Anything else
    that the policy keeps, such as the streams of `random_policy`, has advanced.) Rows that ended
    are reset here where autoreset is DISABLED.

    Args:
        policy: see `Policy`.
        environment: an `Environment` or any other Gymnasium vector environment, with Box or
            Discrete single spaces.
        num_steps: T.
        hidden_state: what the policy gets as its state at the first step.
        carry: go on where an earlier rollout of the same environment stopped, instead of resetting
            it. Two rollouts of T1 and T2 steps are one of T1 + T2.
        seed: reset the environment with this seed.
        previous: show the policy (B, D + A + 2) in place of the observation (B, D): the features
            of the observation, then the action, the reward and the end flag (1 where it ended an
            episode) of the row's last valid step, 0 where `reset`. It is the input of RL² (Duan et
            al. 2016, https://arxiv.org/abs/1611.02779). The trajectory still holds the observation
            alone; `policy_inputs` makes the inputs from it.
        episodes_per_trial: episodes over which the policy remembers: `reset` is True where the
            first of every so many begins. Ends within a trial are seen in `terminated` and
            `truncated`.
        dtype: of what is floating-point; integers stay. None: `torch.get_default_dtype()`.
        progress: called with 1 after every step of the batch, e.g. the `update` of a tqdm bar.

    Returns:
        The trajectory (B, T, ...) on the CPU, and the carry for the next rollout.
    """
    num_steps = require_integer("num_steps", num_steps, 1)
    episodes_per_trial = require_integer("episodes_per_trial", episodes_per_trial, 1)
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
        carry = RolloutCarry(
            observation=_tensor(observation, dtype),
            hidden_state=hidden_state,
            reset=torch.ones(num_rows, dtype=torch.bool),
            ended=torch.zeros(num_rows, dtype=torch.bool),
            previous=torch.zeros(num_rows, flatdim(environment.single_action_space) + 2, dtype=dtype),
            episode=torch.zeros(num_rows, dtype=torch.int64),
        )
    elif seed is not None or hidden_state is not None:
        raise ValueError(
            "`carry` already holds the environment's and the policy's state; got `seed` or `hidden_state` as well."
        )
    elif len(carry.observation) != num_rows:
        raise ValueError(f"`carry` must come from an environment of {num_rows} rows; got {len(carry.observation)}.")
    steps = []
    for _ in range(num_steps):
        step, carry = _step(policy, environment, carry, previous, episodes_per_trial, dtype)
        steps.append(step)
        if progress is not None:
            progress(1)
    return Trajectory(*(torch.stack(leaves, dim=1) for leaves in zip(*steps, strict=True))), carry


def policy_inputs(
    trajectory: Trajectory,
    observation_space: Space[Any],
    action_space: Space[Any],
    *,
    carry: RolloutCarry | None = None,
) -> Tensor:
    """Return what the policy saw in a rollout with `previous=True`, (B, T, D + A + 2).

    They are the rollout's own numbers at every step, invalid ones included. To cut them into windows, cut
    `trajectory._replace(observation=policy_inputs(...))`.

    Args:
        trajectory: leaves (B, T, ...).
        observation_space: the single one; D is its `gymnasium.spaces.flatdim`.
        action_space: the single one; A is its `gymnasium.spaces.flatdim`.
        carry: the one that the rollout went on from, for a trajectory that begins in the middle of
            a trial.

    Raises:
        ValueError: the trajectory begins in the middle of a trial, and there is no `carry`.
    """
    if carry is None and not trajectory.reset[:, 0].all():
        row = int((~trajectory.reset[:, 0]).nonzero()[0])
        raise ValueError(
            f"`carry` must be the one that the rollout went on from, since row {row} begins in the middle of a "
            "trial; got None."
        )
    features = _previous(trajectory, action_space)  # (B, T, A + 2)
    before = torch.zeros_like(features[:, 0]) if carry is None else carry.previous
    time = torch.arange(1, features.shape[1] + 1, device=features.device)
    last = torch.where(trajectory.valid, time, 0).cummax(dim=1).values  # 0 stands for `before`.
    last = torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], dim=1)
    features = torch.cat([before[:, None], features], dim=1)
    previous = features.gather(1, last[..., None].expand(-1, -1, features.shape[2]))
    previous = previous.masked_fill(trajectory.reset[..., None], 0.0)
    return torch.cat(
        [_features("observation", trajectory.observation, observation_space, previous.dtype), previous], -1
    )


def action_features(action: Tensor, space: Space[Any], *, dtype: torch.dtype | None = None) -> Tensor:
    """Return actions (...) of a Discrete or (..., shape) of a Box as model inputs (..., A).

    A Discrete action is one-hot, with A = n; a Box action is flattened. A is
    `gymnasium.spaces.flatdim(space)`. `dtype` None is `torch.get_default_dtype()`.
    """
    require_array_space("space", space)
    return _features("action", action, space, torch.get_default_dtype() if dtype is None else dtype)


def _features(name: str, value: Tensor, space: Space[Any], dtype: torch.dtype) -> Tensor:
    if isinstance(space, Discrete):
        index = value - int(space.start)
        if index.is_floating_point() or ((index < 0) | (index >= int(space.n))).any():
            raise ValueError(f"`{name}` must hold integers of {space}; got {value}.")
        return torch.nn.functional.one_hot(index.long(), int(space.n)).to(dtype)
    shape = space.shape or ()
    lead = value.dim() - len(shape)
    if lead < 0 or value.shape[lead:] != shape:
        raise ValueError(f"`{name}` must have the shape (..., *{shape}) of {space}; got {tuple(value.shape)}.")
    return value.reshape(*value.shape[:lead], flatdim(space)).to(dtype)


def _previous(step: Trajectory, action_space: Space[Any]) -> Tensor:
    """Return what the input after a step says about it (..., A + 2)."""
    ended = step.terminated | step.truncated
    dtype = step.reward.dtype
    action = _features("action", step.action, action_space, dtype)
    return torch.cat([action, step.reward[..., None], ended[..., None].to(dtype)], dim=-1)


def _step(
    policy: Policy,
    environment: VectorEnv[Any, Any, Any],
    carry: RolloutCarry,
    previous: bool,
    episodes_per_trial: int,
    dtype: torch.dtype,
) -> tuple[Trajectory, RolloutCarry]:
    """Make one transition (B, ...) of every row."""
    seen = carry.observation
    if previous:
        seen = _features("observation", seen, environment.single_observation_space, dtype)
        seen = torch.cat([seen, carry.previous], dim=1)
    decision = policy(seen, carry.hidden_state, carry.reset)
    if not isinstance(decision, tuple) or len(decision) != 2:
        raise TypeError(f"`policy` must return a tuple (action, hidden_state); got {type(decision).__name__}.")
    action = _action(decision[0], environment, dtype)
    # The environment gets a copy: it may write into what it is given.
    observed, rewards, terminations, truncations, info = environment.step(action.numpy().copy())
    observation = next_observation = _tensor(observed, dtype)
    terminated, truncated = _tensor(terminations, dtype), _tensor(truncations, dtype)
    ended = begins = terminated | truncated
    waiting = torch.zeros_like(ended)
    mode = environment.metadata["autoreset_mode"]
    if mode is AutoresetMode.NEXT_STEP:
        begins, waiting = carry.ended, ended
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
    episode = torch.where(begins, (carry.episode + 1) % episodes_per_trial, carry.episode)
    reset = begins & (episode == 0)
    last = torch.where(step.valid[:, None], _previous(step, environment.single_action_space), carry.previous)
    return step, RolloutCarry(
        observation=observation,
        hidden_state=_keep(carry.ended, carry.hidden_state, decision[1]),
        reset=reset,
        ended=waiting,
        previous=last.masked_fill(reset[:, None], 0.0),
        episode=episode,
    )


def _keep(rows: Tensor, before: Any, after: Any) -> Any:
    """Return the hidden state `after`, with `before` in the given rows Bool (B,) of its batched tensors."""
    if not rows.any():
        return after
    old, old_structure = tree_flatten(before)
    new, structure = tree_flatten(after)
    if old_structure != structure:
        return after

    def keep(a: Any, b: Any) -> Any:
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or b.shape[:1] != rows.shape:
            return b
        return torch.where(rows.to(b.device).reshape(-1, *[1] * (b.dim() - 1)), a, b)

    return tree_unflatten([keep(a, b) for a, b in zip(old, new, strict=True)], structure)


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
