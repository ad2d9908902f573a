"""What every family that is simulated in arrays promises."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ssmrl.env_runner.batch import BatchedEnv
from ssmrl.env_runner.one_row import OneRowEnv
from ssmrl.env_runner.simulation import UnstableSimulationError
from ssmrl.env_runner.tasks import changing, task_family
from ssmrl.env_runner.tasks.classic_env import ClassicEnv
from ssmrl.env_runner.tasks.family import TaskFamily
from ssmrl.env_runner.tasks.linear import make_batch

NAMES = [
    "bandit",
    "cartpole-physics",
    "cartpole-swingup",
    "linear-system",
    "navigation",
    "pendulum-physics",
    "sinusoid",
    "sparse-navigation",
    "tabular-mdp",
]
MODES = [mode.value for mode in AutoresetMode]


def batch_of(family: TaskFamily, tasks: list[dict[str, Any]], mode: str = "NextStep", **kwargs: Any) -> Any:
    return gymnasium.make_vec(
        family.env_id,
        len(tasks),
        "vector_entry_point",
        autoreset_mode=AutoresetMode(mode),
        **{"max_episode_steps": family.horizon, **family.settings, **kwargs},
        tasks=tasks,
    )


def loop_of(family: TaskFamily, tasks: list[dict[str, Any]], mode: str = "NextStep", **kwargs: Any) -> Any:
    return SyncVectorEnv(family.makers(tasks, **kwargs), autoreset_mode=mode)


def run(environment: Any, actions: Any) -> list[Any]:
    """Everything that steps, and resets where nothing else makes them, return."""
    seen = []
    for action in actions:
        seen.append(environment.step(action))
        ended = seen[-1][2] | seen[-1][3]
        if environment.metadata["autoreset_mode"] is AutoresetMode.DISABLED and ended.any():
            seen.append(environment.reset(options={"reset_mask": ended}))
    return seen


def require_same(first: Any, second: Any, at: str = "") -> None:
    """Equal values and types."""
    assert type(first) is type(second), at
    if isinstance(first, dict):
        assert first.keys() == second.keys(), at
        for name in first:
            require_same(first[name], second[name], f"{at}.{name}")
    elif isinstance(first, (tuple, list)):
        assert len(first) == len(second), at
        for i, pair in enumerate(zip(first, second, strict=True)):
            require_same(*pair, f"{at}[{i}]")
    elif isinstance(first, np.ndarray) and first.dtype == object:
        require_same(first.tolist(), second.tolist(), at)
    else:
        assert np.asarray(first).dtype == np.asarray(second).dtype, at
        np.testing.assert_array_equal(first, second, err_msg=at)


def actions_of(environment: Any, seed: int, steps: int) -> list[Any]:
    environment.action_space.seed(seed)
    return [environment.action_space.sample() for _ in range(steps)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_native_batch_is_a_loop_bit_for_bit(name, mode):
    family = task_family(name)
    tasks = family.sample(5, seed=1)
    native, loop = (make(family, tasks, mode, max_episode_steps=9) for make in (batch_of, loop_of))
    assert isinstance(native.unwrapped, BatchedEnv)
    require_same(loop.reset(seed=4), native.reset(seed=4))
    actions = actions_of(native, 0, 40)
    expected = run(loop, actions)
    require_same(expected, run(native, actions))
    assert sum(step[3].sum() for step in expected if len(step) == 5) > 5
    require_same(loop.reset(), native.reset())


@pytest.mark.parametrize("per_episode", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_tasks_change_in_a_batch_where_they_do_in_a_loop(name, mode, per_episode):
    family = changing(task_family(name), [3, 5, 13]).with_settings(changes_per_episode=per_episode)
    tasks = family.sample(4, seed=2)
    for row, step in ((1, 4), (3, 2)):  # not all rows at once
        tasks[row]["changes"] = {step: tasks[row]["changes"][3]}
    native, loop = (make(family, tasks, mode, max_episode_steps=6) for make in (batch_of, loop_of))
    require_same(loop.reset(seed=0), native.reset(seed=0))
    actions = actions_of(native, 0, 30)
    require_same(run(loop, actions), run(native, actions))


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_reproduces_a_row_whatever_is_beside_it(name):
    family = task_family(name)
    tasks = family.sample(6, seed=0)
    wide, narrow = batch_of(family, tasks, max_episode_steps=5), batch_of(family, tasks[:2], max_episode_steps=5)
    actions = actions_of(wide, 0, 12)
    for _ in range(2):
        require_same(wide.reset(seed=8)[0][:2], narrow.reset(seed=8)[0])
        seen = [[x[:2] for x in step[:4]] for step in run(wide, actions)]
        require_same(seen, [[*step[:4]] for step in run(narrow, [action[:2] for action in actions])])


@pytest.mark.parametrize("kind", ["native", "single"])
@pytest.mark.parametrize("name", NAMES)
def test_a_restored_environment_goes_on_bit_for_bit(name, kind):
    family = changing(task_family(name), [4, 9])
    tasks = family.sample(3, seed=0)

    def make(tasks: Any) -> Any:
        if kind == "native":
            return batch_of(family, tasks, max_episode_steps=6).unwrapped
        return family.make(tasks[0]).unwrapped

    def go_on(env: Any, actions: Any) -> Any:
        return [*run_single(env, actions), env.reset()] if kind == "single" else run(env, actions)

    first, other = make(tasks), make(family.sample(3, seed=1))
    actions = actions_of(first, 0, 20)
    first.reset(seed=0)
    go_on(first, actions[:7])
    state = first.save()
    expected = go_on(first, actions[7:])
    other.reset(seed=9)
    for env in (first, other):
        env.restore(state)
        require_same(go_on(env, actions[7:]), expected)


def run_single(env: Any, actions: Any) -> list[Any]:
    seen: list[Any] = []
    for action in actions:
        seen.append(env.step(action))
        if seen[-1][2]:
            seen.append(env.reset())
    return seen


@pytest.mark.filterwarnings("ignore:.*Box observation space m.*infinity")  # the plane, and linear systems, have no end
@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space")  # a torque in Nm, and predictions in [-5, 5]
@pytest.mark.parametrize("name", NAMES)
def test_an_environment_passes_gymnasiums_check(name):
    family = task_family(name)
    env = family.make(family.sample(1, seed=0)[0])
    check_env(env.unwrapped)
    assert isinstance(env.unwrapped, (OneRowEnv, ClassicEnv))


@pytest.mark.parametrize("name", NAMES)
def test_a_frame_shows_what_happens(name):
    family = task_family(name)
    env: Any = family.make(family.sample(1, seed=0)[0], render_mode="rgb_array")
    env.reset(seed=0)
    env.step(1 if env.action_space.shape == () else np.ones(env.action_space.shape, np.float32))
    before = env.render()
    assert (before.shape[-1], before.dtype) == (3, np.uint8)
    assert len(np.unique(before.reshape(-1, 3), axis=0)) >= 2
    for _ in range(5):
        env.step(0 if env.action_space.shape == () else -np.ones(env.action_space.shape, np.float32))
    assert not np.array_equal(before, env.render())
    env.close()


@pytest.mark.parametrize("name", NAMES)
def test_more_tasks_are_the_same_ones_and_some(name):
    family = task_family(name)
    tasks = family.sample(12, seed=3)
    assert family.sample(5, seed=3) == tasks[:5]
    assert family.sample(5, seed=4) != tasks[:5]


@pytest.mark.parametrize("name", NAMES)
def test_no_test_task_is_a_training_task(name):
    family = task_family(name)
    train, test = (family.sample(60, seed=0, split=split) for split in ("train", "test"))
    assert not any(task in train for task in test)


@pytest.mark.parametrize("name", NAMES)
def test_the_horizon_is_where_episodes_are_truncated(name):
    family = task_family(name).with_settings(horizon=3)
    env = family.make(family.sample(1, seed=0)[0])
    env.reset(seed=0)
    assert [env.step(env.action_space.sample())[3] for _ in range(3)] == [False, False, True]


@pytest.mark.parametrize("name", NAMES)
def test_unknown_parameters_are_refused(name):
    family = task_family(name)
    task = family.sample(1, seed=0)[0]
    with pytest.raises(ValueError, match=r"the parameters \[.*\]; got 'colour'"):
        family.make({**task, "changes": {2: {"colour": 1.0}}})
    with pytest.raises(ValueError, match=r"^Row 1: A task of this environment has the parameters \[.*\]; got 'colour'"):
        batch_of(family, [task, {**task, "colour": 1.0}])
    with pytest.raises((ValueError, TypeError), match="colour"):
        family.make({**task, "colour": 1.0})
    with pytest.raises(ValueError, match=r"the parameters \[.*\] and the settings \[.*\]; got 'colour'"):
        batch_of(family, [task], colour=1.0)


def test_a_batch_takes_what_rows_lack_from_its_arguments():
    make = partial(make_batch, 2, state_dim=1, noise=0.0)
    batch = make(tasks=[{"A": ((0.5,),)}, {}], A=((0.25,),), B=((1.0,),))
    batch.reset(seed=0)
    batch.step(np.ones((2, 1), np.float32))
    assert batch.step(np.zeros((2, 1), np.float32))[0].tolist() == [[0.5], [0.25]]
    with pytest.raises(ValueError, match="`tasks` must hold one task per row, 2; got 1"):
        make(tasks=[{}])


def test_a_system_that_explodes_is_an_error_that_names_the_row_and_its_task():
    tasks: list[dict[str, Any]] = [{}, {"A": ((1e200,),), "B": ((1.0,),)}]
    batch = make_batch(2, tasks=tasks, state_dim=1, max_episode_steps=2)
    batch.reset(seed=0)
    batch.step(np.ones((2, 1), np.float32))
    with pytest.raises(
        UnstableSimulationError, match=r"reward of row 1 is not finite under its task \{'A': \(\(1e\+200,"
    ):
        batch.step(np.ones((2, 1), np.float32))


def test_the_action_of_a_row_that_begins_an_episode_is_ignored():
    batch = make_batch(2, max_episode_steps=2)
    batch.reset(seed=0)
    action = np.zeros((2, 1), np.float32)
    batch.step(action)
    batch.reset(options={"reset_mask": np.array([True, False])})
    batch.step(action)
    action[1] = np.nan
    assert np.isfinite(batch.step(action)[0]).all()


def test_an_action_that_is_kept_by_the_caller_is_not_written_to():
    family = task_family("bandit")
    batch = batch_of(family, family.sample(2, seed=0), max_episode_steps=1)
    batch.reset(seed=0)
    action = np.array([3, 4])
    batch.step(action)
    batch.step(action)
    assert action.tolist() == [3, 4]
