"""Saving and restoring a loop over environments that can be saved themselves."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
from gymnasium.vector import SyncVectorEnv, VectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from ssmrl.env_runner.simulation import State

__all__ = ["restore_rows", "save_rows"]

# What wrappers hold between two steps: the names of their attributes.
_HELD = {TimeLimit: ("_elapsed_steps",), OrderEnforcing: ("_has_reset",), PassiveEnvChecker: ()}
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
