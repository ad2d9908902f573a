"""A robot with a task: against Gymnasium's own environment, and against what its task says."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from ssmrl.env_runner.robots import Reward, RobotEnv, Velocity

pytest.importorskip("mujoco.batch")
pytestmark = pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")


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
