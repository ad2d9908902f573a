"""What a family of tasks is: a distribution over tasks, split in two, and the environments of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.simulation import Task

__all__ = ["SPLITS", "Draw", "TaskFamily", "changing", "of_two_sets"]

SPLITS = ("train", "test")

Draw = Callable[[np.random.Generator, str], dict[str, Any]]
"""`draw(generator, split)`: a task of that split."""


@dataclass(frozen=True)
class TaskFamily:
    """A distribution over tasks, and the environments of its tasks.

    A task is a dict of the environment's constructor arguments: numbers, or tuples of numbers.

        family = task_family("halfcheetah-vel")
        tasks = family.sample(40, seed=0)
        environment = Environment(family, tasks=tasks, seed=0)

    Attributes:
        name: `"halfcheetah-vel"`.
        env_id: what `gymnasium.make` knows its environments by, with a task as arguments.
        draw: a task of a split, from a generator.
        horizon: steps, at least 1, after which an episode is truncated. None: never.
        settings: arguments of the environment that all tasks share.
        source: where the definition is from.
        task_blind_return: the expected return of the best policy that cannot tell tasks apart. None: there is no
            formula.
        oracle_return: that of the best policy that knows the task, or an upper bound that it gets close to. None:
            there is no formula.
    """

    name: str
    env_id: str
    draw: Draw
    horizon: int | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    task_blind_return: float | None = None
    oracle_return: float | None = None

    def __post_init__(self) -> None:
        if self.horizon is not None:
            require_integer("horizon", self.horizon, 1)
        if "max_episode_steps" in self.settings:
            raise ValueError(
                "`max_episode_steps` must not be among the settings of a family: give its `horizon` instead; got "
                f"{self.settings['max_episode_steps']!r}."
            )

    def sample(self, num_tasks: int, seed: int, split: str = "train") -> list[dict[str, Any]]:
        """Draw N tasks.

        Task i is a function of the seed, the split and i alone, so that more tasks are the same ones and some.
        Train and test tasks come from streams of their own: none of one is one of the other, where the family
        has more than a few; of a finite family, the two splits are sets of their own, unless its publication
        trains and tests on the same tasks.

        Args:
            num_tasks: N.
            seed: not negative.
            split: "train" or "test".
        """
        num_tasks = require_integer("num_tasks", num_tasks, 0)
        seed = require_integer("seed", seed, 0)
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {[*SPLITS]}; got {split!r}.")
        keys = [(SPLITS.index(split), i) for i in range(num_tasks)]
        streams = [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key)) for key in keys]
        return [self.draw(stream, split) for stream in streams]

    def make(self, task: Task, **kwargs: Any) -> gymnasium.Env[Any, Any]:
        """Make one environment of a task; `kwargs` are those of `gymnasium.make`, `render_mode` for instance."""
        limit = -1 if self.horizon is None else self.horizon  # Gymnasium's word for no limit
        return gymnasium.make(self.env_id, **{"max_episode_steps": limit, **self.settings, **task, **kwargs})

    def makers(self, tasks: Sequence[Task], **kwargs: Any) -> list[Callable[[], gymnasium.Env[Any, Any]]]:
        """Return a maker per task, for any vector environment."""
        return [partial(self.make, task, **kwargs) for task in tasks]

    def with_settings(self, **settings: Any) -> TaskFamily:
        """Return the family with other arguments of its environments; `horizon` is one of them.

        Its tasks are drawn as before, and both of its reference returns are None, as they may not hold any more:
        `task_family(name, horizon=..., ...)` makes a family anew, with tasks and references to match.
        """
        horizon = settings.pop("horizon", self.horizon)
        settings = {**self.settings, **settings}
        return replace(self, horizon=horizon, settings=settings, task_blind_return=None, oracle_return=None)


def of_two_sets(train: Sequence[Task], test: Sequence[Task]) -> Draw:
    """Return a `draw` of a finite family: uniform over the tasks of the split."""
    sets = {"train": [dict(task) for task in train], "test": [dict(task) for task in test]}

    def draw(generator: np.random.Generator, split: str) -> dict[str, Any]:
        tasks = sets[split]
        return dict(tasks[int(generator.integers(len(tasks)))])

    return draw


def changing(family: TaskFamily, steps: Sequence[int]) -> TaskFamily:
    """Return the family whose tasks are those of `family` that turn into others of it, after each of `steps` >= 1
    steps.

    Steps are counted over the life of an environment, or of every episode where its `changes_per_episode` is True.
    A family whose tasks change already is refused: give all steps at once.
    """
    if not isinstance(family, TaskFamily):
        raise TypeError(f"`family` must be a TaskFamily, of `task_family(name)` for instance; got {family!r}.")
    if "changes" in family.sample(1, seed=0)[0]:
        raise ValueError(
            f"The tasks of `family` must not change already, as those of {family.name!r} do; give all steps at once."
        )
    steps = [require_integer("steps", step, 1) for step in steps]

    def draw(generator: np.random.Generator, split: str) -> dict[str, Any]:
        task = family.draw(generator, split)
        return {**task, "changes": {step: family.draw(generator, split) for step in steps}}

    return replace(family, name=f"{family.name}-changing", draw=draw, task_blind_return=None, oracle_return=None)
