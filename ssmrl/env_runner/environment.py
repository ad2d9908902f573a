"""A batched Gymnasium environment: seeded by one integer, with a task per row.

Letters: B rows, that is environments that run side by side; A action components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ClosedEnvironmentError
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorWrapper
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray

from ssmrl.env_runner._checks import require_integer

__all__ = ["Environment", "Maker", "derive_seed"]

Maker = Callable[[], gymnasium.Env[Any, Any]]


def derive_seed(seed: int, *key: int) -> int:
    """Return a 32-bit seed that is a hash of `seed` and `key`.

    It is the first word of `numpy.random.SeedSequence(seed, spawn_key=key)`. Row i of an
    `Environment` has the key (i,) and its action space the empty key, so that no two rows share a
    stream. Gymnasium's own `seed + i` gives row 1 of seed 0 the stream of row 0 of seed 1.
    """
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


class Environment(VectorWrapper):
    """B copies of a Gymnasium environment, or B tasks, stepped together.

    It is an ordinary `gymnasium.vector.VectorEnv`: every array has the leading axis B, and
    Gymnasium's vector wrappers can be put around it. What it adds is seeding by one integer that
    does not depend on B, tasks per row, a `max_episode_steps` that always holds, and errors in
    place of silence.

    Args:
        env: an id (`"CartPole-v1"`), an `EnvSpec`, a maker (a callable without arguments that
            returns a new `gymnasium.Env`), or a list of B makers: a task per row. The rows' spaces
            must be equal.
        batch_size: B. None: the number of makers in a list, 1 otherwise.
        max_episode_steps: truncate episodes after that many steps. It replaces the limit of the
            spec, and every TimeLimit that a maker applies. None: leave those as they are.
        seed: the seed of the first `reset`, where that is given none. None: not reproducible.
        autoreset_mode: what follows the end of an episode; an `AutoresetMode` or its value. With
            NEXT_STEP the row's next `step` ignores its action and returns the reset observation,
            with SAME_STEP the observation is the reset one and the last one is in
            `info["final_obs"]`, with DISABLED the row waits for
            `reset(options={"reset_mask": mask})`.
        vectorization_mode: "sync" (a loop) or "async" (a process per row; makers must survive
            cloudpickle). Both give the same numbers.
        **kwargs: arguments of the environment, for an id or an `EnvSpec`.

    Raises:
        TypeError, ValueError: an argument is not of the kind described above.
        gymnasium.error.Error: Gymnasium's own, e.g. for an id that is not registered.
    """

    def __init__(
        self,
        env: str | EnvSpec | Maker | Sequence[Maker],
        batch_size: int | None = None,
        *,
        max_episode_steps: int | None = None,
        seed: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        vectorization_mode: str = "sync",
        **kwargs: Any,
    ) -> None:
        if batch_size is None:
            batch_size = len(env) if isinstance(env, (list, tuple)) else 1
        batch_size = require_integer("batch_size", batch_size, 1)
        if max_episode_steps is not None:
            max_episode_steps = require_integer("max_episode_steps", max_episode_steps, 1)
        self._seed = None if seed is None else require_integer("seed", seed, 0)
        if autoreset_mode not in [key for mode in AutoresetMode for key in (mode, mode.value)]:
            raise ValueError(
                "`autoreset_mode` must be an AutoresetMode or one of "
                f"{[mode.value for mode in AutoresetMode]}; got {autoreset_mode!r}."
            )
        if vectorization_mode not in ("sync", "async"):
            raise ValueError(f'`vectorization_mode` must be "sync" or "async"; got {vectorization_mode!r}.')

        mode = AutoresetMode(autoreset_mode)
        if isinstance(env, (str, EnvSpec)):
            if isinstance(env, EnvSpec) and "vectorization_mode" in env.kwargs:
                raise ValueError(
                    "`env` must be the spec of a single environment; got that of a vector "
                    f"environment, whose settings would override these: {env.kwargs}."
                )
            if max_episode_steps is not None:
                kwargs["max_episode_steps"] = max_episode_steps
            vector = gymnasium.make_vec(
                env,
                batch_size,
                vectorization_mode,
                vector_kwargs={"autoreset_mode": mode},
                **kwargs,
            )
        else:
            makers = [
                partial(_make_row, maker, row, max_episode_steps)
                for row, maker in enumerate(_makers(env, batch_size, kwargs))
            ]
            vectorize = SyncVectorEnv if vectorization_mode == "sync" else AsyncVectorEnv
            vector = vectorize(makers, autoreset_mode=mode)
            if isinstance(vector, SyncVectorEnv):
                _require_distinct(vector.envs)
        super().__init__(vector)
        self._disabled = mode is AutoresetMode.DISABLED
        # (B,) the rows that `step` may not touch before a reset; None before the first one.
        self._ended: NDArray[np.bool_] | None = None

    @property
    def batch_size(self) -> int:
        """B, Gymnasium's `num_envs`."""
        return self.num_envs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every row, or in those of a mask.

        Args:
            seed: reseed row i with `derive_seed(seed, i)`, and the batched `action_space` where no
                mask is given. None: the first `reset` uses the seed of the constructor, a later one
                continues the streams.
            options: passed to every row's own `reset`, without `"reset_mask"`: Bool (B,), the rows
                to reset. The others are left alone, and their last observation is returned again.

        Returns:
            The observations (B, ...) and Gymnasium's vector info.
        """
        self._require_open()
        if self._ended is None and seed is None:
            seed = self._seed
        if seed is not None:
            seed = require_integer("seed", seed, 0)
        rows = np.ones(self.num_envs, np.bool_)
        if options is not None and "reset_mask" in options:
            rows = _reset_mask(options["reset_mask"], self.num_envs)
            if self._ended is None and not rows.all():
                raise ValueError(
                    "The first `reset` must reset every row; got a `reset_mask` without row "
                    f"{np.flatnonzero(~rows)[0]}."
                )
            options = {**options, "reset_mask": rows}  # Gymnasium removes the mask from its dict.
        seeds: Any = None  # Gymnasium's vector environments take a list, its interface an int.
        if seed is not None:
            seeds = [derive_seed(seed, row) for row in range(self.num_envs)]
            if rows.all():
                self.action_space.seed(derive_seed(seed))
        observations, infos = self.env.reset(seed=seeds, options=options)
        self._ended = np.zeros_like(rows) if self._ended is None else self._ended & ~rows
        return observations, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step every row.

        Args:
            actions: (B,) integers for a Discrete action space, (B, A) finite numbers for a Box; any
                other space takes Gymnasium's batched actions. Box actions out of bounds reach the
                environment as they are.

        Returns:
            Gymnasium's observations (B, ...), rewards (B,), terminations (B,), truncations (B,) and
            vector info.
        """
        self._require_open()
        if self._ended is None:
            raise ValueError("`reset` must be called before the first `step`.")
        if self._disabled and self._ended.any():
            raise ValueError(
                f"Row {np.flatnonzero(self._ended)[0]} has ended and cannot be stepped: call "
                '`reset(options={"reset_mask": terminated | truncated})` first.'
            )
        actions = _check_actions(actions, self.single_action_space, self.num_envs)
        result = self.env.step(actions)
        self._ended = np.logical_or(result[2], result[3])
        return result

    def __enter__(self) -> Environment:
        """Return the environment itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the environment."""
        self.close()

    def _require_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("The environment is closed and cannot be used again.")


def _makers(env: Any, batch_size: int, kwargs: dict[str, Any]) -> Sequence[Maker]:
    if kwargs:
        raise TypeError(
            f"Environment arguments need an id or an EnvSpec; got {sorted(kwargs)} with a maker: "
            "bind them with functools.partial."
        )
    if not isinstance(env, (list, tuple)):
        if not callable(env):
            raise TypeError(f"`env` must be an id, an EnvSpec, a maker or a list of makers; got {type(env).__name__}.")
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


def _reset_mask(mask: Any, batch_size: int) -> NDArray[np.bool_]:
    rows = np.asarray(mask)
    if rows.dtype != np.bool_ or rows.shape != (batch_size,):
        raise ValueError(
            f"`reset_mask` must be boolean of shape ({batch_size},); got {rows.dtype} of shape {rows.shape}."
        )
    if not rows.any():
        raise ValueError("`reset_mask` must name at least one row; got none.")
    return rows


def _check_actions(actions: Any, space: gymnasium.Space[Any], batch_size: int) -> Any:
    """Return `actions` (B, ...) as an array of elements of the single action space `space`."""
    if not isinstance(space, (Box, Discrete)):
        return actions
    actions = np.asarray(actions)
    shape = (batch_size, *(space.shape or ()))
    if actions.shape != shape:
        raise ValueError(f"`actions` must have shape {shape}, one per row; got {actions.shape}.")
    if isinstance(space, Discrete):
        if actions.dtype.kind not in "iu":
            raise TypeError(f"`actions` must be integers for {space}; got {actions.dtype}.")
        wrong = (actions < space.start) | (actions >= space.start + space.n)
        expected = f"from {space.start} to {space.start + space.n - 1}"
    else:
        if actions.dtype.kind not in "iuf":
            raise TypeError(f"`actions` must be real numbers for {space}; got {actions.dtype}.")
        wrong = ~np.isfinite(actions).reshape(batch_size, -1).all(axis=1)
        expected = "finite"
    if wrong.any():
        row = np.flatnonzero(wrong)[0]
        raise ValueError(f"`actions` must be {expected}; got {actions[row]} in row {row}.")
    return actions
