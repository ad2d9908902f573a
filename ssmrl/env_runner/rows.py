"""Saving and restoring a loop over environments that can be saved themselves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import gymnasium
from gymnasium.vector import SyncVectorEnv, VectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from ssmrl.env_runner.simulation import State, Task

__all__ = ["restore_rows", "save_rows", "set_row_tasks"]

# What wrappers hold between two steps: the names of their attributes.
_HELD = {
    TimeLimit: ("_elapsed_steps",),
    OrderEnforcing: ("_has_reset",),
    PassiveEnvChecker: (),
}
_OF_VECTOR = ("_env_obs", "_rewards", "_terminations", "_truncations", "_autoreset_envs", "_observations")


def save_rows(vector: VectorEnv[Any, Any, Any]) -> State:
    """Return the state of all rows, of every one's wrappers, and of the loop over them."""
    envs = _envs(vector)
    saved = [env.unwrapped.save() for env in envs]  # type: ignore[attr-defined]
    return {
        "tasks": [state["task"] for state in saved],
        "rows": saved,
        "wrappers": [[{name: getattr(w, name) for name in _HELD[type(w)]} for w in _wrappers(env)] for env in envs],
        "vector": {name: copy.deepcopy(getattr(vector, name)) for name in _OF_VECTOR},
    }


def set_row_tasks(vector: VectorEnv[Any, Any, Any], tasks: Sequence[Task], before: Sequence[Task]) -> None:
    """Give every row its task; where one does not fit, all rows have those of `before` again."""
    if not isinstance(vector, SyncVectorEnv):
        raise TypeError(
            "`set_tasks` needs native or synchronous rows: processes keep the tasks that they were made with."
        )
    setters = [getattr(env.unwrapped, "set_task", None) for env in vector.envs]
    if None in setters:
        raise TypeError(f"`set_tasks` needs environments of `ssmrl/`; row {setters.index(None)} has no `set_task`.")
    for row, task in enumerate(tasks):
        try:
            setters[row](task)  # type: ignore[misc]
        except (ValueError, TypeError) as error:
            for done in range(row + 1):
                setters[done](before[done])  # type: ignore[misc]
            raise type(error)(f"Row {row}: {error}") from None


def restore_rows(vector: VectorEnv[Any, Any, Any], state: State) -> None:
    """Be what `save_rows` saw."""
    envs = _envs(vector)
    if len(state["rows"]) != len(envs):
        raise ValueError(f"`state` must be of {len(envs)} rows; got {len(state['rows'])}.")
    for env, saved, wrappers in zip(envs, state["rows"], state["wrappers"], strict=True):
        env.unwrapped.restore(saved)  # type: ignore[attr-defined]
        for wrapper, held in zip(_wrappers(env), wrappers, strict=True):
            for name, value in held.items():
                setattr(wrapper, name, value)
            if isinstance(wrapper, PassiveEnvChecker):  # it would miss the reset that nobody made
                wrapper.checked_reset = wrapper.checked_step = wrapper.checked_data_reuse = True
    for name, value in state["vector"].items():
        setattr(vector, name, copy.deepcopy(value))


def _envs(vector: VectorEnv[Any, Any, Any]) -> list[gymnasium.Env[Any, Any]]:
    if not isinstance(vector, SyncVectorEnv):
        raise TypeError(f"Rows can be saved that are native or synchronous; got a {type(vector).__name__}.")
    envs = list(vector.envs)
    for row, env in enumerate(envs):
        unknown = [type(w).__name__ for w in _wrappers(env) if type(w) not in _HELD]
        if unknown or not hasattr(env.unwrapped, "save"):
            raise TypeError(
                f"Row {row} must be an environment of `ssmrl/` without wrappers of its own to be saved; got {env}."
            )
    return envs


def _wrappers(env: gymnasium.Env[Any, Any]) -> list[gymnasium.Wrapper[Any, Any, Any, Any]]:
    wrappers = []
    while isinstance(env, gymnasium.Wrapper):
        wrappers.append(env)
        env = env.env
    return wrappers
