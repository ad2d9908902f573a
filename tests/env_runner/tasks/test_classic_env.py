from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from ssmrl.env_runner.tasks.classic_env import ClassicEnv

CASES = {"CartPole-v1": ({"masspole": 0.3, "length": 0.7}, 1), "Pendulum-v1": ({"m": 2.0}, np.ones(1, np.float32))}
ENV_IDS = [*CASES]


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_without_a_task_it_is_gymnasiums(env_id):
    env, reference = gymnasium.make(f"ssmrl/{env_id}"), gymnasium.make(env_id)
    assert env.observation_space == reference.observation_space
    for seed in (0, None, 5, None):
        np.testing.assert_array_equal(env.reset(seed=seed)[0], reference.reset(seed=seed)[0])
        for _ in range(6):
            got, expected = env.step(CASES[env_id][1]), reference.step(CASES[env_id][1])
            np.testing.assert_array_equal(got[0], expected[0])
            assert got[1:] == expected[1:]
    assert env.spec is not None
    assert reference.spec is not None
    assert env.spec.max_episode_steps == reference.spec.max_episode_steps


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_a_task_is_set_on_gymnasiums_class(env_id):
    task, action = CASES[env_id]
    env, reference = ClassicEnv(env_id, task), gymnasium.make(env_id).unwrapped
    for name, value in task.items():
        setattr(reference, name, value)
    if env_id == "CartPole-v1":
        assert isinstance(reference, gymnasium.envs.classic_control.CartPoleEnv)
        reference.total_mass, reference.polemass_length = 1.3, 0.3 * 0.7
    np.testing.assert_array_equal(env.reset(seed=0)[0], reference.reset(seed=0)[0])
    np.testing.assert_array_equal(env.step(action)[0], reference.step(action)[0])


def test_the_info_tells_the_task_at_a_reset_and_after_the_step_that_it_changes_with():
    env = ClassicEnv("Pendulum-v1", {"g": 3.0, "changes": {2: {"m": 4.0}}})
    infos = [env.reset(seed=0)[1], *(env.step(np.zeros(1, np.float32))[4] for _ in range(3)), env.reset()[1]]
    before, after = {"g": 3.0, "m": 1.0, "l": 1.0}, {"g": 3.0, "m": 4.0, "l": 1.0}
    assert [info.get("task") for info in infos] == [before, None, after, None, after]


def test_changes_can_be_counted_from_the_start_of_an_episode():
    env = ClassicEnv("CartPole-v1", {"changes": {1: {"length": 2.0}}}, changes_per_episode=True)
    for _ in range(2):
        assert env.reset(seed=0)[1]["task"]["length"] == 0.5
        assert env.step(1)[4]["task"]["length"] == 2.0


def test_a_task_can_be_given_in_the_middle_of_an_episode():
    env = ClassicEnv("Pendulum-v1", {})
    env.reset(seed=0)
    state = env.state
    env.set_task({"l": 2.0})
    assert env.state is state
    assert env.reset()[1]["task"]["l"] == 2.0


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_an_environment_can_be_saved_before_its_first_reset(env_id):
    env = ClassicEnv(env_id, {})
    state = env.save()
    assert state["state"] is None
    expected = env.reset()[0]
    other = ClassicEnv(env_id, CASES[env_id][0])
    other.reset(seed=4)
    other.restore(state)
    np.testing.assert_array_equal(other.reset()[0], expected)


def test_a_fallen_cartpole_is_restored_as_fallen():
    env = ClassicEnv("CartPole-v1", {})
    env.reset(seed=0)
    env.state = np.array([0.0, 0.0, 0.3, 0.0])
    assert env.step(0)[1:3] == (1.0, True)
    other = ClassicEnv("CartPole-v1", {})
    other.restore(env.save())
    with pytest.warns(UserWarning, match="already returned terminated"):
        assert other.step(0)[1] == 0.0


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_settings_reach_gymnasiums_class(env_id):
    env: Any = gymnasium.make(f"ssmrl/{env_id}", render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().shape[-1] == 3
    env.close()


def test_a_bad_value_is_refused():
    with pytest.raises(ValueError, match=r"^`m` must be positive and finite; got -1"):
        ClassicEnv("Pendulum-v1", {"m": -1})
