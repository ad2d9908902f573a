"""Meta-World's tasks (ML1, ML10) as rows of an `Environment`. Needs Meta-World, in a Python environment of its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import gymnasium
from gymnasium.wrappers import TimeLimit

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.tasks.family import SPLITS

__all__ = ["MetaWorldMaker", "metaworld_tasks"]

BENCHMARKS = ("ML1", "ML10")
HORIZON = 500
NEEDS = (
    "`metaworld_tasks` needs Meta-World 3.1.1 with MuJoCo from 3.3 to 3.16: `pip install metaworld==3.1.1 packaging` "
    "in a Python environment of its own, because native batches of robots need MuJoCo 3.17 or later, in which "
    "Meta-World 3.1.1 cannot make its environments"
)


@dataclass(frozen=True)
class MetaWorldMaker:
    """Makes environments of one task of Meta-World: a row of an `Environment`, also of an asynchronous one.

    An environment keeps its task for life. Its episodes are truncated after 500 steps, and never terminated.

    Attributes:
        env_class: the class of `benchmark.train_classes` or `test_classes`.
        task: the `metaworld.Task`: the goal, the place of the objects, and that the goal is hidden.
        settings: arguments of the class.
    """

    env_class: Any
    task: Any
    settings: Mapping[str, Any]

    @property
    def env_name(self) -> str:
        """`"reach-v3"` and the like."""
        return str(self.task.env_name)

    def __call__(self) -> gymnasium.Env[Any, Any]:
        """Return a new environment."""
        env = self.env_class(**self.settings)
        env.set_task(self.task)
        env.max_path_length = sys.maxsize  # Its own limit, which `Environment(max_episode_steps=...)` cannot replace.
        return TimeLimit(_Seeded(env), HORIZON)


def metaworld_tasks(
    benchmark: str = "ML1",
    env_name: str | None = None,
    num_tasks: int | None = None,
    *,
    seed: int,
    split: str = "train",
    **settings: Any,
) -> list[MetaWorldMaker]:
    """Return a maker per task of a meta-learning benchmark of Meta-World.

        makers = metaworld_tasks("ML1", "reach-v3", 20, seed=0)
        environment = Environment(makers, seed=0, vectorization_mode="async")

    ML1 has 50 training and 50 test goals in one environment; ML10 has 50 goals in each of 10 training and 5 test
    environments. Here the environments of ML10 take turns: task i is goal i // 10 of environment i % 10 (5 in test),
    so that a multiple of it has as many of each. Fewer tasks are the first of more.

    Observations are float64 (39,), the goal in the last three hidden by zeros; actions are float32 (4,) from -1 to 1;
    `info["success"]` (B,) is 1.0 where a step ends at the goal, else 0.0. Only the tasks are drawn: every episode of a
    task begins in the same state.

    Args:
        benchmark: "ML1" or "ML10".
        env_name: of ML1: `"reach-v3"` and the like. None for ML10.
        num_tasks: None: all.
        seed: Meta-World's own, from 0 to 2³² - 2. Its ML1 draws the test goals of a seed as it does the training goals
            of seed + 1: evaluate with the seed of the training.
        split: "train" or "test".
        **settings: arguments of Meta-World's environments: `render_mode`, `reward_function_version`, ...

    Raises:
        ImportError: Meta-World is not installed, or not next to a MuJoCo that it works with.
        ValueError: a name that is not one of the choices, or more tasks than there are.

    From Meta-World: Yu et al. 2019, https://arxiv.org/abs/1910.10897; https://github.com/Farama-Foundation/Metaworld.
    Its benchmark classes are used, not its Gymnasium ids: in 3.1.1, `"Meta-World/ML1-train"` has the test tasks.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"`benchmark` must be one of {[*BENCHMARKS]}; got {benchmark!r}.")
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {[*SPLITS]}; got {split!r}.")
    seed = require_integer("seed", seed, 0)
    metaworld = _import_metaworld()
    if benchmark == "ML1":
        names = list(metaworld.ML1.ENV_NAMES)
        if env_name not in names:
            raise ValueError(f"`env_name` must be one of {names} for ML1; got {env_name!r}.")
        made = metaworld.ML1(env_name, seed=seed)
    else:
        if env_name is not None:
            raise ValueError(f"`env_name` must be None for {benchmark}, which has its own; got {env_name!r}.")
        made = metaworld.ML10(seed=seed)
    classes, tasks = (
        (made.train_classes, made.train_tasks) if split == "train" else (made.test_classes, made.test_tasks)
    )
    of_each = [[task for task in tasks if task.env_name == name] for name in classes]
    makers = [
        MetaWorldMaker(classes[task.env_name], task, settings) for turn in zip(*of_each, strict=True) for task in turn
    ]
    if num_tasks is None:
        return makers
    num_tasks = require_integer("num_tasks", num_tasks, 1)
    if num_tasks > len(makers):
        raise ValueError(
            f"`num_tasks` must be at most {len(makers)}, all {split} tasks of {benchmark}; got {num_tasks}."
        )
    return makers[:num_tasks]


class _Seeded(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Seed in `reset`, as Gymnasium has it: Meta-World's ignores its seed and has a method for that."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.get_wrapper_attr("seed")(seed)
        return self.env.reset(options=options)


def _import_metaworld() -> Any:
    try:
        import metaworld

        mujoco = version("mujoco")
        fits = _numbers(mujoco) < (3, 17) or _numbers(version("metaworld")) > (3, 1, 1)
    except ImportError as error:
        raise ImportError(f"{NEEDS}.") from error
    if not fits:
        raise ImportError(f"{NEEDS}; got MuJoCo {mujoco}.")
    return metaworld


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release)[:3])
