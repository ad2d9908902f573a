"""A batched Gymnasium environment: seeded by one integer, with a task per row.

Letters: B rows, that is environments that run side by side; A action components.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ClosedEnvironmentError
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper
from numpy.typing import NDArray

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.batch import BatchedEnv
from ssmrl.env_runner.rows import restore_rows, save_rows, set_row_tasks
from ssmrl.env_runner.simulation import State, Task, UnstableSimulationError, check_tasks, save_generator
from ssmrl.env_runner.tasks.family import TaskFamily
from ssmrl.env_runner.tasks.registration import family_names, task_family
from ssmrl.env_runner.vectorize import UNLIMITED, Maker, make_rows

__all__ = ["Environment", "Maker", "derive_seed", "row_seeds"]

_LONGER_KEY = 1 << 16  # keys below it have other uses


def derive_seed(seed: int, *key: int) -> int:
    """Return a 32-bit seed that is a hash of `seed` and `key`.

    It is the first word of `numpy.random.SeedSequence(seed, spawn_key=key)`. Row i of an
    `Environment` has the key (i,), see `row_seeds`, and its action space the empty key. Gymnasium's
    own `seed + i` gives row 1 of seed 0 the stream of row 0 of seed 1.
    """
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


def row_seeds(seed: int, num_rows: int, *key: int) -> list[int]:
    """Return the seeds of B rows, no two of them equal: `derive_seed(seed, i, *key)` of row i.

    Where an earlier row has it already, as about one in 10,000 batches of 1,000 rows has, it is the first one that
    none has, with a longer key. So a row's seed does not depend on how many rows come after it.
    """
    seeds: dict[int, None] = {}
    for row in range(num_rows):
        derived = derive_seed(seed, row, *key)
        again = _LONGER_KEY
        while derived in seeds:
            derived = derive_seed(seed, row, *key, again)
            again += 1
        seeds[derived] = None
    return [*seeds]


class Environment(VectorWrapper):
    """B copies of a Gymnasium environment, or B tasks, stepped together.

    It is an ordinary `gymnasium.vector.VectorEnv`: every array has the leading axis B, and
    Gymnasium's vector wrappers can be put around it. What it adds is seeding by one integer that
    does not depend on B, tasks per row, native batches where there are some, a `max_episode_steps`
    that always holds, saving and restoring, and errors in place of silence.

    Args:
        env: a `TaskFamily` or the name of one (`"halfcheetah-vel"`), an id (`"CartPole-v1"`), an
            `EnvSpec`, a maker (a callable without arguments that returns a new `gymnasium.Env`), or
            a list of B makers: a task per row. The rows' spaces must be equal.
        batch_size: B. None: the number of makers or tasks, 1 otherwise.
        tasks: parameters of every row's environment, as `TaskFamily.sample` draws them; for a family
            or an `ssmrl/` id. Of another id they are arguments of the constructor, and its rows a loop.
        max_episode_steps: truncate episodes after that many steps. It replaces the limit of the
            spec, and every TimeLimit that a maker applies. None: leave those as they are.
        seed: the seed of the first `reset`, where that is given none. None: not reproducible.
        autoreset_mode: what follows the end of an episode; an `AutoresetMode` or its value. With
            NEXT_STEP the row's next `step` ignores its action and returns the reset observation,
            with SAME_STEP the observation is the reset one and the last one is in
            `info["final_obs"]`, with DISABLED the row waits for
            `reset(options={"reset_mask": mask})`.
        vectorization_mode: "native" (all rows in one simulation: the `ssmrl/` ids, and Gymnasium's
            own robots, cart-pole and pendulum), "sync" (a loop) or "async" (a process per row; makers
            must survive cloudpickle). All give the same numbers. "auto": native where it can be,
            else sync.
        out_of_bounds: what becomes of Box actions outside the space: "error", or "clip" to it.
        num_threads: that native robots are stepped on; nothing else has threads. None: one per CPU.
        **kwargs: arguments of the environment, for a family, an id or an `EnvSpec`.

    Raises:
        TypeError, ValueError: an argument is not of the kind described above.
        gymnasium.error.Error: Gymnasium's own, e.g. for an id that is not registered.
    """

    def __init__(
        self,
        env: str | EnvSpec | TaskFamily | Maker | Sequence[Maker],
        batch_size: int | None = None,
        *,
        tasks: Sequence[Task] | None = None,
        max_episode_steps: int | None = None,
        seed: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        vectorization_mode: str = "auto",
        out_of_bounds: str = "error",
        num_threads: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = None if tasks is None else check_tasks(tasks, batch_size)
        if batch_size is None:
            rows = given if given is not None else env if isinstance(env, (list, tuple)) else [None]
            batch_size = len(rows)
        batch_size = require_integer("batch_size", batch_size, 1)
        if max_episode_steps is not None:
            max_episode_steps = require_integer("max_episode_steps", max_episode_steps, 1)
        self._seed = None if seed is None else require_integer("seed", seed, 0)
        if autoreset_mode not in [key for mode in AutoresetMode for key in (mode, mode.value)]:
            raise ValueError(
                "`autoreset_mode` must be an AutoresetMode or one of "
                f"{[mode.value for mode in AutoresetMode]}; got {autoreset_mode!r}."
            )
        _require_one_of("vectorization_mode", vectorization_mode, ("auto", "native", "sync", "async"))
        _require_one_of("out_of_bounds", out_of_bounds, ("error", "clip"))
        mode = AutoresetMode(autoreset_mode)
        if num_threads is not None:
            num_threads = require_integer("num_threads", num_threads, 1)
        if isinstance(env, str):
            env = _family_or_id(env)
        if isinstance(env, TaskFamily):
            if tasks is None:
                raise ValueError(
                    f"`tasks` must be given with the family {env.name!r}: `family.sample(batch_size, seed)` draws them."
                )
            of_family = {"horizon", "version"} & kwargs.keys()
            if of_family:
                raise ValueError(
                    f"{sorted(of_family)} are arguments of `task_family({env.name!r}, ...)`: pass its result; "
                    "`max_episode_steps` limits episodes here."
                )
            kwargs = {**env.settings, **kwargs}
            if max_episode_steps is None:
                max_episode_steps = UNLIMITED if env.horizon is None else env.horizon
            env = env.env_id
        self._tasks = given
        super().__init__(
            make_rows(env, batch_size, given, max_episode_steps, mode, vectorization_mode, num_threads, kwargs)
        )
        self._clip = out_of_bounds == "clip"
        self._disabled = mode is AutoresetMode.DISABLED
        self._failed = False
        # (B,) the rows that `step` may not touch before a reset; None before the first one.
        self._ended: NDArray[np.bool_] | None = None

    @property
    def batch_size(self) -> int:
        """B, Gymnasium's `num_envs`."""
        return self.num_envs

    @property
    def is_native(self) -> bool:
        """Whether all rows are in one native simulation."""
        return isinstance(self.env, BatchedEnv)

    @property
    def tasks(self) -> list[Task] | None:
        """The task of every row, None where it was made without."""
        return None if self._tasks is None else [*check_tasks(self._tasks)]

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Give every row another task of the same kind; the next call must be a `reset` of all rows.

        Raises:
            ValueError: there are not B of them, or one does not fit the environment.
            TypeError: the environment was made without tasks.
        """
        self._require_open()
        if self._tasks is None:
            raise TypeError("`set_tasks` needs an environment that was made with `tasks`.")
        given = check_tasks(tasks, self.num_envs)
        if isinstance(self.env, BatchedEnv):
            self.env.set_tasks(given)
        else:
            set_row_tasks(self.env, given, self._tasks)
        self._tasks = given
        if self._ended is not None:
            self._seed, self._ended = None, None

    def save(self) -> State:
        """Return everything that the future of all rows depends on, as arrays and JSON values.

        Raises:
            TypeError: the rows are Gymnasium environments that cannot be saved: those of `ssmrl` can.
        """
        self._require_open()
        return {
            "rows": self.env.save() if isinstance(self.env, BatchedEnv) else save_rows(self.env),
            "made": self._made(),
            "tasks": self.tasks,
            "seed": self._seed,
            "ended": None if self._ended is None else self._ended.copy(),
            "action_space": save_generator(self.action_space.np_random),
        }

    def restore(self, state: State) -> None:
        """Be what `save` saw, bit for bit, in an environment that was made with the same arguments.

        Raises:
            ValueError: it is the state of an environment of another kind.
        """
        self._require_open()
        if not isinstance(state, Mapping) or state.get("made") != self._made():
            got = state.get("made") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"`state` must be of an environment like this one, {self._made()}; got {got}.")
        if isinstance(self.env, BatchedEnv):
            self.env.restore(state["rows"])
        else:
            restore_rows(self.env, state["rows"])
        self._tasks = None if state["tasks"] is None else check_tasks(state["tasks"])
        self._seed, self._failed = state["seed"], False
        self._ended = None if state["ended"] is None else np.array(state["ended"], np.bool_)
        self.action_space.np_random.bit_generator.state = copy.deepcopy(state["action_space"])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every row, or in those of a mask.

        Args:
            seed: reseed row i with `row_seeds(seed, B)[i]`, and the batched `action_space` where no
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
            seeds = row_seeds(seed, self.num_envs)
            if rows.all():
                self.action_space.seed(derive_seed(seed))
        observations, infos = self.env.reset(seed=seeds, options=options)
        self._ended = np.zeros_like(rows) if self._ended is None else self._ended & ~rows
        self._failed = self._failed and not rows.all()
        return observations, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step every row.

        Args:
            actions: (B,) integers for a Discrete action space, (B, A) finite numbers for a Box; any
                other space takes Gymnasium's batched actions.

        Returns:
            Gymnasium's observations (B, ...), rewards (B,), terminations (B,), truncations (B,) and
            vector info.

        Raises:
            ValueError, TypeError: actions of the wrong shape or kind, not finite, or out of bounds.
            UnstableSimulationError: a row's simulation left what its physics can be computed for.
        """
        self._require_open()
        if self._ended is None:
            raise ValueError("`reset` must be called before the first `step`.")
        if self._failed:
            raise UnstableSimulationError("A row became unstable: reset all rows, or restore a state, before a step.")
        if self._disabled and self._ended.any():
            raise ValueError(
                f"Row {np.flatnonzero(self._ended)[0]} has ended and cannot be stepped: call "
                '`reset(options={"reset_mask": terminated | truncated})` first.'
            )
        actions = _check_actions(actions, self.single_action_space, self.num_envs, self._clip, self._tasks)
        try:
            result = self.env.step(actions)
            if not self.is_native:  # a native simulation sees to it itself
                self._check_observations(result[0])
        except UnstableSimulationError as error:
            self._failed = True
            raise self._with_row(error) from None
        self._ended = np.logical_or(result[2], result[3])
        return result

    def __enter__(self) -> Environment:
        """Return the environment itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the environment."""
        self.close()

    def _made(self) -> dict[str, Any]:
        """What a state must have in common with the environment that is to go on from it."""
        spec = self.env.spec if self.is_native else None
        return {
            "id": None if spec is None else spec.id,
            "is_native": self.is_native,
            "num_envs": self.num_envs,
            "autoreset_mode": AutoresetMode(self.metadata["autoreset_mode"]).value,
            "observation_space": str(self.single_observation_space),
        }

    def _with_row(self, error: UnstableSimulationError) -> UnstableSimulationError:
        """Name the row where the error is that of a single environment."""
        if error.source is None or not isinstance(self.env, SyncVectorEnv):
            return error
        row = next(row for row, env in enumerate(self.env.envs) if env.unwrapped is error.source)
        return UnstableSimulationError(f"Row {row}: {error}")

    def _check_observations(self, observations: Any) -> None:
        if isinstance(observations, np.ndarray) and observations.dtype.kind == "f" and np.isnan(observations).any():
            row = int(np.flatnonzero(np.isnan(observations).reshape(self.num_envs, -1).any(axis=1))[0])
            raise UnstableSimulationError(f"The observation of row {row} is not a number{_of_task(self._tasks, row)}.")

    def _require_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("The environment is closed and cannot be used again.")


def _reset_mask(mask: Any, batch_size: int) -> NDArray[np.bool_]:
    rows = np.asarray(mask)
    if rows.dtype != np.bool_ or rows.shape != (batch_size,):
        raise ValueError(
            f"`reset_mask` must be boolean of shape ({batch_size},); got {rows.dtype} of shape {rows.shape}."
        )
    if not rows.any():
        raise ValueError("`reset_mask` must name at least one row; got none.")
    return rows


def _check_actions(
    actions: Any, space: gymnasium.Space[Any], batch_size: int, clip: bool, tasks: list[dict[str, Any]] | None
) -> Any:
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
        if wrong.any():
            _refuse_actions(f"from {space.start} to {space.start + space.n - 1}", actions, wrong, tasks)
        return actions
    if actions.dtype.kind not in "iuf":
        raise TypeError(f"`actions` must be real numbers for {space}; got {actions.dtype}.")
    if not np.isfinite(actions).all():
        _refuse_actions("finite", actions, ~np.isfinite(actions), tasks)
    if clip:
        return np.clip(actions, space.low, space.high)
    rounded = actions.astype(space.dtype, copy=False)
    wrong = (rounded < space.low) | (rounded > space.high)
    if wrong.any():
        expected = f'from {space.low} to {space.high}, unless the environment has out_of_bounds="clip"'
        _refuse_actions(expected, actions, wrong, tasks)
    return actions


def _refuse_actions(
    expected: str, actions: NDArray[Any], wrong: NDArray[np.bool_], tasks: list[dict[str, Any]] | None
) -> NoReturn:
    row = int(np.flatnonzero(wrong.reshape(len(actions), -1).any(axis=1))[0])
    raise ValueError(f"`actions` must be {expected}; got {actions[row]} in row {row}{_of_task(tasks, row)}.")


def _of_task(tasks: list[dict[str, Any]] | None, row: int) -> str:
    return "" if tasks is None else f", whose task is {tasks[row]}"


def _family_or_id(name: str) -> TaskFamily | str:
    if name in family_names():
        return task_family(name)
    if name not in gymnasium.registry and not re.search(r"-v\d+$", name):
        near = difflib.get_close_matches(name.lower(), family_names(), 3, 0.5)
        raise ValueError(
            f"`env` must be the name of a family or an id, which ends in -v and a number; got {name!r}. "
            f"Families of a like name: {near or family_names()}."
        )
    return name


def _require_one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {[*choices]}; got {value!r}.")
