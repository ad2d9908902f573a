"""Robots as they are defined here, against Gymnasium's own classes."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from ssmrl.env_runner import Environment
from ssmrl.env_runner.robots import RobotEnv
from ssmrl.env_runner.robots.definitions import ROBOTS

pytest.importorskip("mujoco.batch")
pytestmark = pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
@pytest.mark.parametrize("env_id", ROBOTS)
def test_native_rows_without_a_task_are_gymnasiums_own_environments(env_id, mode):
    rows = 4
    theirs: Any = SyncVectorEnv([lambda: gymnasium.make(env_id, max_episode_steps=12)] * rows, autoreset_mode=mode)
    ours = Environment(env_id, rows, max_episode_steps=12, autoreset_mode=mode)
    assert ours.is_native
    native: Any = ours.env
    np.testing.assert_array_equal(theirs.reset(seed=[3, 1, 4, 1])[0], native.reset(seed=[3, 1, 4, 1])[0])
    theirs.action_space.seed(0)
    for _ in range(30):
        actions = theirs.action_space.sample()
        (*expected, expected_info), (*got, info) = theirs.step(actions), native.step(actions)
        for a, b in zip(expected, got, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        for name in ("x_velocity", "x_position", "reward_forward", "reward_ctrl"):
            if name in expected_info:
                np.testing.assert_array_equal(expected_info[name], info[name], err_msg=name)
                np.testing.assert_array_equal(expected_info["_" + name], info["_" + name], err_msg=name)


@pytest.mark.parametrize(
    ("env_id", "dimensions"),
    [("HalfCheetah-v4", 17), ("Ant-v4", 27), ("Humanoid-v4", 376), ("Ant-v5", 105), ("Humanoid-v5", 348)],
)
def test_observations_have_the_known_number_of_features(env_id, dimensions):
    assert RobotEnv(env_id).observation_space.shape == (dimensions,)


def test_an_unknown_robot_is_refused():
    with pytest.raises(ValueError, match=r"`env_id` must be one of .*'HalfCheetah-v5'.*; got 'Swimmer-v5'"):
        RobotEnv("Swimmer-v5")
