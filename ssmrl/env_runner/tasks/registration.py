"""The environments' ids in Gymnasium, and the names of the families."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import gymnasium

from ssmrl.env_runner.tasks.family import TaskFamily

__all__ = ["family_names", "is_ours", "native_environment", "register", "register_family", "task_family"]

_FAMILIES: dict[str, Callable[..., TaskFamily]] = {}


def register(env_id: str, module: str, *, horizon: int | None, **kwargs: Any) -> None:
    """Register an environment with Gymnasium: `module:make` makes one, `module:make_batch` a native batch of them.

    `make(**kwargs)` takes the task's parameters as keyword arguments. `make_batch(num_envs, *, tasks=None,
    max_episode_steps=None, autoreset_mode=..., **kwargs)` takes one dict of them per row, of which what is missing
    is in `kwargs`.
    """
    if env_id not in gymnasium.registry:
        gymnasium.register(
            env_id,
            entry_point=f"{module}:make",
            vector_entry_point=f"{module}:make_batch",
            max_episode_steps=horizon,
            kwargs=kwargs,
        )


def register_family(name: str, factory: Callable[..., TaskFamily]) -> None:
    """Give a family a name: `task_family(name, **arguments)` is `factory(**arguments)` from now on."""
    if name in _FAMILIES:
        raise ValueError(f"There is a family {name!r} already.")
    _FAMILIES[name] = factory


def native_environment(env: Any, kwargs: Mapping[str, Any]) -> str | None:
    """Return the id whose native batches are what a loop over this environment is, None where there is none.

    It is the id itself of those that `register` knows, and for Gymnasium's own robots, cart-pole and pendulum that
    of the same without a task.
    """
    if not isinstance(env, str) or kwargs.get("render_mode") is not None:
        return None
    spec = gymnasium.registry.get(env)
    if spec is not None and spec.namespace is None and str(spec.entry_point).startswith("gymnasium.envs."):
        spec = gymnasium.registry.get(f"ssmrl/{env}") if not (kwargs and "CartPole" in env) else None
    if spec is None or spec.namespace != "ssmrl" or not spec.vector_entry_point:
        return None
    return None if "robot" in spec.kwargs and not _has_mujoco_batch() else spec.id


def is_ours(env_id: str) -> bool:
    """Whether `register` has registered it."""
    spec = gymnasium.registry.get(env_id)
    return spec is not None and spec.namespace == "ssmrl"


def family_names() -> list[str]:
    """Return the names that `task_family` knows."""
    return sorted(_FAMILIES)


def task_family(name: str, **arguments: Any) -> TaskFamily:
    """Return the family of that name.

    Args:
        name: `"halfcheetah-vel"` and the like; `family_names()` lists them.
        **arguments: of the family: its ranges, `version`, `horizon`, `frame_skip`, `control_cost` and so on, as its
            function in `ssmrl.env_runner.tasks` describes them.
    """
    if name not in _FAMILIES:
        raise ValueError(f"`name` must be one of {family_names()}; got {name!r}.")
    return _FAMILIES[name](**arguments)


@cache
def _has_mujoco_batch() -> bool:
    return importlib.util.find_spec("mujoco") is not None and importlib.util.find_spec("mujoco.batch") is not None
