"""Meta-World's tasks: with a stand-in of a few lines, and, where it is installed, with Meta-World itself."""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from functools import cache
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box

from ssmrl.env_runner import Environment, metaworld_tasks
from ssmrl.env_runner.tasks import metaworld as module

VERSIONS = {"metaworld": "3.1.1", "mujoco": "3.3.0"}


class StandInTask(NamedTuple):
    env_name: str
    data: bytes


class StandInEnv(gymnasium.Env[Any, Any]):
    """Observes (goal, step, a number of its own stream); like Meta-World, it seeds in `seed` alone."""

    max_path_length = 500

    def __init__(self, gain: float = 1.0) -> None:
        self.observation_space = Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = Box(-1, 1, (4,), np.float32)
        self.gain = gain

    def seed(self, seed: int) -> None:
        self._np_random = np.random.default_rng(seed)

    def set_task(self, task: StandInTask) -> None:
        assert task.env_name == self.name  # type: ignore[attr-defined]
        self.goal = pickle.loads(task.data)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.time = 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.time >= self.max_path_length:
            raise ValueError("You must reset the env manually once truncate==True")
        self.time += 1
        success = float(abs(action[0] - self.goal) < 0.1)
        return self.observe(), self.gain * self.goal, False, self.time == self.max_path_length, {"success": success}

    def observe(self) -> Any:
        return np.array([self.goal, self.time, self.np_random.random()])


CLASSES = {name: type(name, (StandInEnv,), {"name": name}) for name in ("reach-v3", "push-v3", "sweep-v3")}


class StandInBenchmark:
    """Four tasks for each of its classes, those of the first class first; the goals of a seed are hashes of it."""

    def __init__(self, train: tuple[str, ...], test: tuple[str, ...], seeds: tuple[int, int]) -> None:
        self.train_classes, self.test_classes = ({name: CLASSES[name] for name in names} for names in (train, test))
        self.train_tasks, self.test_tasks = (
            [
                StandInTask(name, pickle.dumps(float(goal)))
                for name in names
                for goal in np.random.default_rng([seed, len(name)]).uniform(-1, 1, 4)
            ]
            for names, seed in zip((train, test), seeds, strict=True)
        )


class ML1(StandInBenchmark):
    ENV_NAMES = ("reach-v3", "push-v3")

    def __init__(self, env_name: str, seed: int) -> None:
        super().__init__((env_name,), (env_name,), (seed, seed + 1))


class ML10(StandInBenchmark):
    def __init__(self, seed: int) -> None:
        super().__init__(("reach-v3", "push-v3"), ("sweep-v3",), (seed, seed))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", SimpleNamespace(ML1=ML1, ML10=ML10))
    monkeypatch.setattr(module, "version", VERSIONS.__getitem__)


def goals(makers: list[Any]) -> list[float]:
    return [pickle.loads(maker.task.data) for maker in makers]


@pytest.mark.usefixtures("stand_in")
def test_tasks_are_those_of_the_split_and_its_classes():
    for split in ("train", "test"):
        makers = metaworld_tasks("ML1", "reach-v3", seed=3, split=split)
        assert [maker.task for maker in makers] == getattr(ML1("reach-v3", 3), f"{split}_tasks")
    assert {m.env_class for m in metaworld_tasks("ML10", seed=3, split="test")} == {CLASSES["sweep-v3"]}
    assert metaworld_tasks("ML1", "push-v3", seed=0)[0].env_class is CLASSES["push-v3"]
    assert metaworld_tasks(env_name="reach-v3", seed=0) == metaworld_tasks("ML1", "reach-v3", seed=0, split="train")


@pytest.mark.usefixtures("stand_in")
def test_the_classes_of_a_benchmark_take_turns_and_fewer_tasks_are_the_first():
    makers = metaworld_tasks("ML10", seed=0)
    assert [maker.env_name for maker in makers] == ["reach-v3", "push-v3"] * 4
    assert [maker.task for maker in makers[1::2]] == ML10(0).train_tasks[4:]
    for few in (1, 3, 8):
        assert metaworld_tasks("ML10", None, few, seed=0) == makers[:few]


@pytest.mark.usefixtures("stand_in")
def test_the_seed_says_which_tasks():
    assert goals(metaworld_tasks("ML1", "reach-v3", seed=5)) == goals(metaworld_tasks("ML1", "reach-v3", seed=5))
    assert goals(metaworld_tasks("ML1", "reach-v3", seed=5)) != goals(metaworld_tasks("ML1", "reach-v3", seed=6))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_resets_are_seeded_and_keep_the_task(kind):
    makers = metaworld_tasks("ML10", seed=0)
    with Environment(makers, vectorization_mode=kind) as environment:
        first, again, seeded, other = (environment.reset(seed=seed)[0].copy() for seed in (1, None, 1, 2))
    for observation in (first, again, seeded, other):
        np.testing.assert_array_equal(observation[:, 0], goals(makers))
    assert (again[:, 2] != first[:, 2]).all()  # The streams go on,
    np.testing.assert_array_equal(seeded, first)  # begin anew with a seed,
    assert (other[:, 2] != first[:, 2]).all()  # which it depends on,
    assert len(set(first[:, 2])) == len(makers)  # and are one for each row.


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("given", "steps"), [(None, 500), (3, 3), (700, 700)])
def test_episodes_are_truncated_after_500_steps_or_those_of_the_environment(given, steps):
    environment = Environment(metaworld_tasks("ML1", "reach-v3", 2, seed=0), max_episode_steps=given)
    environment.reset(seed=0)
    for step in range(1, steps + 1):
        _, _, terminated, truncated, _ = environment.step(np.zeros((2, 4), np.float32))
        assert not terminated.any()
        assert (truncated == (step == steps)).all()


@pytest.mark.usefixtures("stand_in")
def test_success_is_in_the_info_and_settings_reach_the_environment():
    makers = metaworld_tasks("ML1", "reach-v3", seed=0, gain=3.0)
    environment = Environment(makers)
    environment.reset(seed=0)
    actions = np.zeros((4, 4), np.float32)
    actions[1, 0] = goals(makers)[1]
    _, reward, _, _, info = environment.step(actions)
    np.testing.assert_array_equal(info["success"], np.abs(actions[:, 0] - goals(makers)) < 0.1)
    assert info["success"][1] == 1.0
    np.testing.assert_array_equal(reward, 3 * np.array(goals(makers)))


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"benchmark": "MT10"}, r"`benchmark` must be one of \['ML1', 'ML10'\]; got 'MT10'"),
        ({"split": "validation"}, r"`split` must be one of \['train', 'test'\]; got 'validation'"),
        ({"env_name": "reach-v2"}, r"`env_name` must be one of \['reach-v3', 'push-v3'\] for ML1; got 'reach-v2'"),
        ({"env_name": None}, r"`env_name` must be one of \['reach-v3', 'push-v3'\] for ML1; got None"),
        ({"benchmark": "ML10"}, "`env_name` must be None for ML10, which has its own; got 'reach-v3'"),
        ({"num_tasks": 5}, "`num_tasks` must be at most 4, all train tasks of ML1; got 5"),
        ({"num_tasks": 0}, "`num_tasks` must be at least 1; got 0"),
        ({"seed": -1}, "`seed` must be at least 0; got -1"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(arguments, match):
    with pytest.raises(ValueError, match=match):
        metaworld_tasks(**{"env_name": "reach-v3", "seed": 0, **arguments})


def test_without_metaworld_it_says_which_versions_fit_and_why_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(
        ImportError, match=r"Meta-World 3\.1\.1 with MuJoCo from 3\.3 to 3\.16.*of its own, because native"
    ):
        metaworld_tasks("ML1", "reach-v3", seed=0)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("metaworld_version", "mujoco_version", "fits"),
    [
        ("3.1.1", "3.3.0", True),
        ("3.1.1", "3.16.0", True),
        ("3.1.1", "3.17.0", False),
        ("3.0.0", "4.0.0", False),
        ("3.1.2", "4.0.0", True),
    ],
)
def test_a_mujoco_that_metaworld_cannot_use_is_refused(monkeypatch, metaworld_version, mujoco_version, fits):
    monkeypatch.setattr(module, "version", {"metaworld": metaworld_version, "mujoco": mujoco_version}.__getitem__)
    if fits:
        assert metaworld_tasks("ML1", "reach-v3", seed=0)
    else:
        with pytest.raises(ImportError, match=rf"MuJoCo 3\.17 or later.*; got MuJoCo {mujoco_version}\."):
            metaworld_tasks("ML1", "reach-v3", seed=0)


@pytest.mark.usefixtures("stand_in")
def test_without_mujoco_it_says_which_versions_fit(monkeypatch):
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    with pytest.raises(ImportError, match="MuJoCo from 3"):
        metaworld_tasks("ML1", "reach-v3", seed=0)


@cache
def real(benchmark: str, env_name: str | None = None, num_tasks: int | None = None, split: str = "train") -> list[Any]:
    pytest.importorskip("metaworld")
    return metaworld_tasks(benchmark, env_name, num_tasks, seed=0, split=split)


def run(makers: list[Any], num_steps: int, seed: int = 0, **kwargs: Any) -> list[Any]:
    """Return the observations, rewards, ends and successes of random actions, and those after a second reset."""
    environment = Environment(makers, **kwargs)
    rng = np.random.default_rng(0)
    with environment:
        observation, _ = environment.reset(seed=seed)
        results: list[Any] = [observation.copy()]
        for _ in range(num_steps):
            *step, info = environment.step(rng.uniform(-1, 1, (len(makers), 4)).astype(np.float32))
            results += [np.copy(value) for value in step]
            if "success" in info:
                results.append(info["success"])
        results.append(environment.reset(seed=seed)[0])
    return results


def same(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_makers_of_ml1_are_metaworlds_own_tasks_of_the_split():
    metaworld = pytest.importorskip("metaworld")
    benchmark = metaworld.ML1("reach-v3", seed=0)
    before = np.random.get_state(legacy=False)["state"]  # noqa: NPY002  # Meta-World draws from it.
    for split, own in (("train", benchmark.train_tasks), ("test", benchmark.test_tasks)):
        assert [maker.task for maker in metaworld_tasks("ML1", "reach-v3", seed=0, split=split)] == own
    np.testing.assert_equal(np.random.get_state(legacy=False)["state"], before)  # noqa: NPY002
    assert len(own) == 50
    assert not {task.data for task in benchmark.train_tasks} & {task.data for task in benchmark.test_tasks}


@pytest.mark.parametrize(("split", "classes"), [("train", 10), ("test", 5)])
def test_ml10_has_as_many_of_each_class(split, classes):
    makers = real("ML10", split=split)
    assert len(makers) == 50 * classes
    for start in (0, 2 * classes):
        counts = Counter(maker.env_name for maker in makers[start : start + 2 * classes])
        assert [*counts.values()] == [2] * classes


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
@pytest.mark.parametrize("arguments", [("ML1", "reach-v3", 3), ("ML10", None, 10), ("ML10", None, 5, "test")])
def test_processes_give_the_numbers_of_a_loop_and_truncations_in_time(arguments, mode):
    makers = real(*arguments)
    sync = run(makers, 10, max_episode_steps=4, autoreset_mode=mode)
    same(sync, run(makers, 10, max_episode_steps=4, autoreset_mode=mode, vectorization_mode="async"))
    same(sync[:1], sync[-1:])
    assert sync[0].shape == (len(makers), 39)
    truncated = np.array([value.all() for value in sync if value.dtype == np.bool_][1::2])
    assert np.flatnonzero(truncated).tolist() == ([3, 8] if mode == "NextStep" else [3, 7])


def test_the_goal_is_hidden_and_tells_the_tasks_apart():
    makers = real("ML1", "reach-v3", 3)
    results = run(makers, 5)
    assert all((value[:, -3:] == 0).all() for value in results if value.shape == (3, 39))
    reward = results[2]
    assert len(set(reward)) == 3


def test_a_hand_that_knows_the_goal_of_its_row_has_success():
    makers = real("ML1", "reach-v3", 3)
    targets = np.array([pickle.loads(maker.task.data)["rand_vec"][-3:] for maker in makers])
    targets[2] = targets[0]  # A wrong one.
    environment = Environment(makers, seed=0)
    for _ in range(2):  # A reset keeps the task.
        observation, _ = environment.reset()
        for _ in range(80):
            action = np.zeros((3, 4), np.float32)
            action[:, :3] = np.clip(10 * (targets - observation[:, :3]), -1, 1)
            observation, _, _, _, info = environment.step(action)
        assert info["success"].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(("given", "steps"), [(None, 500), (510, 510)])
def test_metaworlds_episodes_end_after_500_steps_or_those_of_the_environment(given, steps):
    environment = Environment(real("ML1", "reach-v3", 1), max_episode_steps=given, seed=0)
    environment.reset()
    for step in range(1, steps + 1):
        _, _, terminated, truncated, _ = environment.step(np.zeros((1, 4), np.float32))
        assert (bool(terminated[0]), bool(truncated[0])) == (False, step == steps)
    assert not environment.step(np.zeros((1, 4), np.float32))[3].any()


def test_a_row_is_seeded_by_the_environment():
    makers = real("ML1", "reach-v3", 2)
    environment = Environment(makers)
    states = []
    for seed in (1, 1, 2):
        environment.reset(seed=seed)
        states.append([row.unwrapped.np_random.bit_generator.state["state"] for row in environment.env.envs])  # type: ignore[attr-defined]
    assert states[0] == states[1] != states[2]
    assert states[0][0] != states[0][1]
