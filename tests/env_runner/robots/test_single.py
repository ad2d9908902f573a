"""A robot with a task: against Gymnasium's own environment, and against what its task says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from ssmrl.env_runner import Environment, UnstableSimulationError
from ssmrl.env_runner.robots import Reward, RobotEnv, Velocity
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


def step_of(env, action):
    env.reset(seed=0)
    return env.step(np.asarray(action, np.float32))


def test_a_disabled_actuator_gets_no_control_and_costs_nothing():
    action = np.full(6, 0.5)
    masked = action * [1, 0, 1, 1, 1, 1]
    disabled = step_of(RobotEnv("HalfCheetah-v5", task={"disabled": 1}), action)
    by_hand = step_of(RobotEnv("HalfCheetah-v5"), masked)
    np.testing.assert_array_equal(disabled[0], by_hand[0])
    assert disabled[1] == by_hand[1]


def test_the_velocity_that_is_paid_for_is_gymnasiums():
    env = RobotEnv("HalfCheetah-v5", reward=Reward(Velocity(), control_cost=0.05), task={"velocity": 1.5})
    env.reset(seed=0)
    action = np.linspace(-1, 1, 6, dtype=np.float32)
    for _ in range(5):
        _, reward, terminated, truncated, info = env.step(action)
        expected = -abs(info["x_velocity"] - 1.5) - 0.05 * np.square(action).sum()
        assert reward == pytest.approx(expected, rel=1e-12)
        assert (terminated, truncated) == (False, False)


@pytest.mark.parametrize("per_episode", [False, True])
def test_physics_change_after_n_steps_and_the_info_says_so(per_episode):
    task = {"gravity": 1.0, "changes": {3: {"gravity": 0.0}}}
    env = RobotEnv("HalfCheetah-v5", task=task, changes_per_episode=per_episode)
    plain = RobotEnv("HalfCheetah-v5")
    _, info = env.reset(seed=0)
    plain.reset(seed=0)
    assert info["task"]["gravity"] == 1.0
    zero = np.zeros(6, np.float32)
    for step in range(1, 6):
        observation, _, _, _, info = env.step(zero)
        same = np.array_equal(observation, plain.step(zero)[0])
        assert same == (step <= 3)
        assert ("task" in info) == (step == 3)
        if step == 3:
            assert info["task"]["gravity"] == 0.0
    assert env.reset(seed=0)[1]["task"]["gravity"] == (1.0 if per_episode else 0.0)


def test_frame_skip_is_the_number_of_simulation_steps():
    once = RobotEnv("HalfCheetah-v5", frame_skip=1)
    five = RobotEnv("HalfCheetah-v5")
    once.reset(seed=0)
    five.reset(seed=0)
    action = np.full(6, 0.3, np.float32)
    for _ in range(5):
        observation = once.step(action)[0]
    np.testing.assert_array_equal(observation, five.step(action)[0])
    assert once.metadata["render_fps"] == 5 * five.metadata["render_fps"]


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_an_unstable_simulation_names_its_row_and_task(kind):
    tasks = [{"gravity": 1.0}, {"gravity": 1e12}]
    environment = Environment("ssmrl/Walker2d-v5", tasks=tasks, seed=0, vectorization_mode=kind)
    environment.reset()
    message = r"row 1 .*'gravity': 1000000000000" if kind == "native" else "'gravity': 1000000000000"
    with pytest.raises(UnstableSimulationError, match=message):
        deque((environment.step(np.zeros((2, 6), np.float32)) for _ in range(20)), maxlen=0)


@pytest.mark.parametrize(
    ("task", "match"),
    [
        ({"velocity": 1.0}, r"has the parameters \[.*\]; got 'velocity'"),
        ({"mass": -1.0}, "`mass` must be finite and at least 0"),
        ({"changes": {0: {"mass": 2.0}}}, "must be at least 1"),
        ({"changes": {5: {"wind": 2.0}}}, "got 'wind'"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(task, match):
    with pytest.raises(ValueError, match=match):
        RobotEnv("Hopper-v5", task=task)
    with pytest.raises(ValueError, match=match):
        Environment("ssmrl/Hopper-v5", tasks=[{}, task])
    with pytest.raises(ValueError, match=match):
        Environment("ssmrl/Hopper-v5", tasks=[{}, task], vectorization_mode="sync")


def test_an_unknown_robot_is_refused():
    with pytest.raises(ValueError, match=r"`env_id` must be one of .*'HalfCheetah-v5'.*; got 'Swimmer-v5'"):
        RobotEnv("Swimmer-v5")


def test_nothing_is_written_into_the_working_directory_and_warnings_are_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", logger="ssmrl"):
        RobotEnv("HalfCheetah-v5")
    assert list(tmp_path.iterdir()) == []
    assert any("settotalmass" in record.message for record in caplog.records)


def test_videos_can_be_recorded(tmp_path):
    """In a process of its own: how MuJoCo draws without a screen is decided when it is imported."""
    pytest.importorskip("moviepy")
    code = """
import sys
import gymnasium
from gymnasium.wrappers import RecordVideo
import ssmrl.env_runner
env = gymnasium.make("ssmrl/HalfCheetahVel-v5", velocity=2.0, render_mode="rgb_array")
env.reset(seed=0)
try:
    env.render()
except Exception as error:
    sys.exit(f"cannot draw: {error}")
env = RecordVideo(env, "videos", episode_trigger=lambda episode: True)
env.reset(seed=0)
for _ in range(3):
    env.step(env.action_space.sample())
env.close()
"""
    environment = {**os.environ, "MUJOCO_GL": "egl", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    if "cannot draw" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    (video,) = (tmp_path / "videos").glob("*.mp4")
    assert video.stat().st_size > 1000
