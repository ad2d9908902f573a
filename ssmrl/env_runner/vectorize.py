"""The rows of an `Environment`: one native simulation, a loop over environments, or processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit

from ssmrl.env_runner.simulation import Task
from ssmrl.env_runner.tasks.registration import is_ours, native_environment

__all__ = ["UNLIMITED", "Maker", "make_row_of_id", "make_rows"]

UNLIMITED = -1  # Gymnasium's word for no limit, where None is that of the id

Maker = Callable[[], gymnasium.Env[Any, Any]]
"""`maker() -> gymnasium.Env`: makes the environment of one row."""


def make_rows(
    env: Any,
    batch_size: int,
    tasks: list[dict[str, Any]] | None,
    max_episode_steps: int | None,
    mode: AutoresetMode,
    vectorization_mode: str,
    num_threads: int | None,
    kwargs: dict[str, Any],
) -> VectorEnv[Any, Any, Any]:
    """Make the rows of an environment; `max_episode_steps` may be UNLIMITED."""
    if isinstance(env, EnvSpec) and gymnasium.registry.get(env.id) == env:
        env = env.id
    native_id = native_environment(env, kwargs) if vectorization_mode in ("auto", "native") else None
    if tasks is not None and native_id != env:
        native_id = None  # the tasks of an id that is not ours are arguments of its constructor
    if native_id is not None:
        limit = gymnasium.spec(env).max_episode_steps if max_episode_steps is None else max_episode_steps
        if num_threads is not None and "robot" in gymnasium.spec(native_id).kwargs:
            kwargs = {**kwargs, "num_threads": num_threads}
        return gymnasium.make_vec(
            native_id,
            batch_size,
            "vector_entry_point",
            tasks=tasks,
            max_episode_steps=None if limit == UNLIMITED else limit,
            autoreset_mode=mode,
            **kwargs,
        )
    if vectorization_mode == "native":
        raise ValueError(
            f"There is no native batch of {env!r} with {sorted(kwargs)}: it takes an id of `ssmrl/`, or without "
            "tasks one of Gymnasium's robots, cart-pole or pendulum, no `render_mode`, for robots the extra `mujoco`."
        )
    vectorize = AsyncVectorEnv if vectorization_mode == "async" else SyncVectorEnv
    if isinstance(env, (str, EnvSpec)):
        if isinstance(env, EnvSpec) and "vectorization_mode" in env.kwargs:
            raise ValueError(
                "`env` must be the spec of a single environment; got that of a vector "
                f"environment, whose settings would override these: {env.kwargs}."
            )
        if max_episode_steps is not None:
            kwargs["max_episode_steps"] = max_episode_steps
        if isinstance(env, str) and is_ours(env):
            rows = [{}] * batch_size if tasks is None else tasks
            makers = [partial(make_row_of_id, env, kwargs, row, task) for row, task in enumerate(rows)]
            return vectorize(makers, autoreset_mode=mode)
        if tasks is not None:
            return vectorize([partial(gymnasium.make, env, **{**kwargs, **t}) for t in tasks], autoreset_mode=mode)
        asked = "async" if vectorization_mode == "async" else "sync"
        return gymnasium.make_vec(env, batch_size, asked, vector_kwargs={"autoreset_mode": mode}, **kwargs)
    if tasks is not None:
        raise TypeError("`tasks` need a family or an id; got them with makers, which have tasks of their own.")
    makers = [
        partial(_make_row, maker, row, max_episode_steps) for row, maker in enumerate(_makers(env, batch_size, kwargs))
    ]
    vector = vectorize(makers, autoreset_mode=mode)
    if isinstance(vector, SyncVectorEnv):
        _require_distinct(vector.envs)
    return vector


def make_row_of_id(env_id: str, kwargs: Mapping[str, Any], row: int, task: Task) -> gymnasium.Env[Any, Any]:
    """Make a row of one of our ids, in a process that may have imported nothing of ours but this module."""
    env = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    if task:
        try:
            env.unwrapped.set_task(task)  # type: ignore[attr-defined]
        except (ValueError, TypeError) as error:
            raise type(error)(f"Row {row}: {error}") from None
    return env


def _makers(env: Any, batch_size: int, kwargs: dict[str, Any]) -> Sequence[Maker]:
    if kwargs:
        raise TypeError(
            f"Environment arguments need an id or an EnvSpec; got {sorted(kwargs)} with a maker: "
            "bind them with functools.partial."
        )
    if not isinstance(env, (list, tuple)):
        if not callable(env):
            raise TypeError(
                f"`env` must be a family, an id, an EnvSpec, a maker or a list of makers; got {type(env).__name__}."
            )
        return [env] * batch_size
    if len(env) != batch_size:
        raise ValueError(f"`batch_size` must be the number of makers in `env`, {len(env)}; got {batch_size}.")
    for row, maker in enumerate(env):
        if not callable(maker):
            raise TypeError(
                "`env` must hold one maker (a callable that returns an environment) per row; got "
                f"{maker!r} for row {row}."
            )
    return env


def _make_row(maker: Maker, row: int, max_episode_steps: int | None) -> gymnasium.Env[Any, Any]:
    env = maker()
    if not isinstance(env, gymnasium.Env):
        raise TypeError(f"The maker of row {row} must return a gymnasium.Env; got {type(env).__name__}.")
    return env if max_episode_steps is None else _limit_episodes(env, max_episode_steps)


def _limit_episodes(env: gymnasium.Env[Any, Any], steps: int) -> gymnasium.Env[Any, Any]:
    """Replace every TimeLimit where it stands, so that the wrappers around it see the new end."""
    limited = False
    outer, layer = None, env
    while isinstance(layer, gymnasium.Wrapper):
        if isinstance(layer, TimeLimit):
            limited = True
            layer = TimeLimit(layer.env, steps)
            if outer is None:
                env = layer
            else:
                outer.env = layer
        outer, layer = layer, layer.env
    return env if limited else TimeLimit(env, steps)


def _require_distinct(envs: Sequence[gymnasium.Env[Any, Any]]) -> None:
    first: dict[int, int] = {}
    for row, env in enumerate(envs):
        other = first.setdefault(id(env.unwrapped), row)
        if other != row:
            raise ValueError(
                f"A maker must return a new environment at every call; rows {other} and {row} got the same one."
            )
