"""The robots' families against their published definitions: formulas, ranges, horizons and splits, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ssmrl.env_runner import Environment, task_family
from ssmrl.env_runner.tasks.dynamics import MODEL_SIZES

pytest.importorskip("mujoco.batch")

ROBOTS = [*MODEL_SIZES]
DRAWS = 400


def drawn(name, parameter, split="train", **arguments):
    return np.array([task[parameter] for task in task_family(name, **arguments).sample(DRAWS, 0, split)])


def one_step(name, task, action, **arguments):
    """Reward, info and Gymnasium's unwrapped data after one step from the reset of seed 0."""
    env: Any = task_family(name, **arguments).make(task)
    env.reset(seed=0)
    for _ in range(4):
        _, reward, _, _, info = env.step(np.asarray(action, np.float32))
    return reward, info, env.unwrapped.data


@pytest.mark.parametrize(
    ("name", "low", "high", "horizon"),
    [("halfcheetah-vel", 0, 3, 200), ("ant-vel", 0, 3, 200), ("walker2d-vel", 0, 10, 100)],
)
def test_velocities_are_uniform_over_the_published_range(name, low, high, horizon):
    velocities = drawn(name, "velocity")
    assert low <= velocities.min() < low + 0.02 * (high - low)
    assert high - 0.02 * (high - low) < velocities.max() <= high
    assert velocities.mean() == pytest.approx((low + high) / 2, rel=0.1)
    assert task_family(name).horizon == horizon
    narrow = drawn(name, "velocity", low=1.0, high=2.0)
    assert (narrow.min() >= 1) & (narrow.max() <= 2)


def test_halfcheetah_velocity_pays_minus_the_error_and_a_twentieth_of_the_squared_action():
    action = np.array([1, -1, 0.5, 0, 0, 1])
    reward, info, _ = one_step("halfcheetah-vel", {"velocity": 2.0}, action)
    assert reward == pytest.approx(-abs(info["x_velocity"] - 2.0) - 0.05 * 3.25, abs=1e-6)
    dear, info, _ = one_step("halfcheetah-vel", {"velocity": 2.0}, action, control_cost=1.0)
    assert dear == pytest.approx(-abs(info["x_velocity"] - 2.0) - 3.25, abs=1e-6)


@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_halfcheetah_direction_pays_the_velocity_in_it(direction):
    action = np.array([1, -1, 0.5, 0, 0, 1])
    reward, info, _ = one_step("halfcheetah-dir", {"direction": direction}, action)
    assert reward == pytest.approx(direction * info["x_velocity"] - 0.05 * 3.25, abs=1e-6)
    assert set(drawn("halfcheetah-dir", "direction")) == {-1.0, 1.0}
    assert task_family("halfcheetah-dir").horizon == 200


def clipped_contact(data):
    copied = np.clip(data.cfrc_ext, -1, 1)
    return np.square(copied).sum()


def test_ant_velocity_is_mamls():
    action = np.full(8, 0.5)
    reward, info, data = one_step("ant-vel", {"velocity": 2.0}, action)
    expected = 1 - abs(info["x_velocity"] - 2.0) + 0.05 - 0.005 * 2.0 - 0.0005 * clipped_contact(data)
    assert reward == pytest.approx(expected, abs=1e-6)


def test_ant_directions_are_promps_and_pearls():
    action = np.full(8, 0.5)
    reward, info, data = one_step("ant-dir", {"direction": -1.0}, action)
    assert reward == pytest.approx(-info["x_velocity"] + 1 - 0.5 * 2.0 - 0.0005 * clipped_contact(data), abs=1e-6)
    angle = 2.0
    reward, info, data = one_step("ant-angle", {"angle": angle}, action)
    along = np.cos(angle) * info["x_velocity"] + np.sin(angle) * info["y_velocity"]
    assert reward == pytest.approx(along + 1 - 0.5 * 2.0 - 0.0005 * clipped_contact(data), abs=1e-6)
    angles = drawn("ant-angle", "angle")
    assert (angles.min() >= 0) & (angles.max() <= 2 * np.pi)
    assert angles.mean() == pytest.approx(np.pi, rel=0.1)


def test_ant_goal_is_promps_and_pearls():
    action = np.full(8, 0.5)
    goal = (1.0, -2.0)
    reward, _, data = one_step("ant-goal", {"goal": goal}, action)
    distance = np.abs(data.xpos[1, :2] - goal).sum()
    assert reward == pytest.approx(-distance - 0.1 * 2.0 - 0.0005 * clipped_contact(data), abs=1e-6)
    radii = np.linalg.norm(drawn("ant-goal", "goal"), axis=1)
    assert radii.max() <= 3
    assert np.square(radii).mean() == pytest.approx(4.5, rel=0.1)  # uniform on the disc: R² / 2
    env: Any = task_family("ant-goal").make({"goal": goal})
    assert env.observation_space.shape == (107,)  # 105 and the position
    env.reset(seed=0)
    env.unwrapped.data.qpos[2] = 5.0
    assert not env.step(np.zeros(8, np.float32))[2]


def test_walker2d_velocity_is_promps():
    action = np.full(6, 0.5)
    reward, info, _ = one_step("walker2d-vel", {"velocity": 4.0}, action)
    assert reward == pytest.approx(15 - abs(info["x_velocity"] - 4.0) - 0.001 * 1.5, abs=1e-6)
    env: Any = task_family("walker2d-vel").make({"velocity": 4.0})
    assert env.unwrapped.frame_skip == 8


def test_humanoid_direction_is_pearls():
    action = np.full(17, 0.2)
    angle = 1.0
    reward, info, data = one_step("humanoid-dir", {"angle": angle}, action)
    along = np.cos(angle) * info["x_velocity"] + np.sin(angle) * info["y_velocity"]
    contact = min(5e-7 * np.square(data.cfrc_ext).sum(), 10)
    assert reward == pytest.approx(1.25 * along + 5 - 0.1 * 17 * 0.04 - contact, abs=1e-5)


@pytest.mark.parametrize("robot", ROBOTS)
def test_random_parameters_are_a_factor_on_every_element(robot):
    family = task_family(f"{robot.lower()}-rand-params")
    plain: Any = family.make({})
    model = plain.unwrapped.model
    assert (model.nbody, model.nv, model.ngeom) == MODEL_SIZES[robot]
    tasks = family.sample(30, 0)
    sizes = {"mass": model.nbody, "inertia": 3 * model.nbody, "damping": model.nv, "friction": 3 * model.ngeom}
    for name, size in sizes.items():
        factors = np.array([task[name] for task in tasks])
        assert factors.shape == (30, size)
        base = 1.3 if name == "damping" else 1.5
        exponents = np.log(factors) / np.log(base)
        assert -3 <= exponents.min() < -2.7
        assert 2.7 < exponents.max() <= 3
        assert abs(exponents.mean()) < 0.3
    changed: Any = family.make(tasks[0])
    np.testing.assert_array_equal(changed.unwrapped.model.body_mass, model.body_mass * tasks[0]["mass"])


@pytest.mark.parametrize("robot", ROBOTS)
def test_one_parameter_families_have_their_published_ranges(robot):
    name = robot.lower()
    gravity = drawn(f"{name}-gravity", "gravity")
    assert 0.5 <= gravity.min() < gravity.max() <= 1.5
    friction = np.log(drawn(f"{name}-friction", "friction")) / np.log(1.5)
    assert -3 <= friction.min() < -2.7
    assert 2.7 < friction.max() <= 3
    for parameter in ("mass", "damping"):
        assert set(drawn(f"{name}-{parameter}", parameter)) == {0.75, 0.85, 1.0, 1.15, 1.25}
        assert set(drawn(f"{name}-{parameter}", parameter, "test")) == {0.2, 0.3, 0.4, 0.5, 1.5, 1.6, 1.7, 1.8}
    ours = drawn(f"{name}-mass", "mass", low=0.9, high=1.1)
    assert 0.9 <= ours.min() < ours.max() <= 1.1


def test_disabled_joints_and_legs_of_the_test_are_not_met_in_training():
    def disabled(name, split):
        return {task["disabled"] for task in task_family(name).sample(DRAWS, 0, split)}

    assert disabled("halfcheetah-disabled", "train") == {1, 2, 3, 4, 5}
    assert disabled("halfcheetah-disabled", "test") == {0}
    assert disabled("ant-disabled", "train") == {(2, 3), (4, 5), (6, 7)}
    assert disabled("ant-disabled", "test") == {(0, 1)}
    assert disabled("humanoid-disabled", "train") == {*range(1, 17)}
    assert task_family("hopper-disabled").horizon == 1000


@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
def test_version_4_and_frame_skip_are_arguments():
    family = task_family("ant-vel", version=4, frame_skip=2, horizon=7)
    env: Any = family.make({"velocity": 1.0})
    assert env.observation_space.shape == (27,)
    assert env.unwrapped.frame_skip == 2
    assert env.spec.max_episode_steps == 7
    with pytest.raises(ValueError, match="`version` must be 4 or 5; got 3"):
        task_family("ant-vel", version=3)


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("halfcheetah-vel", {"low": 2.0, "high": 1.0}, "low at most high; got 2.0 and 1.0"),
        ("hopper-mass", {"low": 1.0}, "`low` and `high` must be given together"),
        ("hopper-mass", {"low": -1.0, "high": 1.0}, "0 <= low <= high"),
        ("ant-goal", {"radius": 0.0}, "`radius` must be positive and finite; got 0.0"),
        ("hopper-rand-params", {"log_scale_limit": -1.0}, "`log_scale_limit` must be at least 0"),
    ],
)
def test_bad_arguments_are_refused(name, arguments, match):
    with pytest.raises(ValueError, match=match):
        task_family(name, **arguments)


def test_the_task_blind_optimum_of_velocity_is_the_median():
    """A body that has a velocity at once: what a constant one earns, in the mean over many tasks."""
    family = task_family("halfcheetah-vel")
    assert family.horizon is not None
    velocities = np.array([task["velocity"] for task in family.sample(4000, 0)])
    constants = np.linspace(0, 3, 61)
    earned = -family.horizon * np.abs(velocities[:, None] - constants).mean(axis=0)
    assert earned.max() == pytest.approx(family.task_blind_return, rel=0.02)
    assert constants[earned.argmax()] == pytest.approx(1.5, abs=0.15)
    assert family.oracle_return == 0


@pytest.mark.parametrize("name", ["halfcheetah-dir", "ant-dir"])
def test_no_task_blind_policy_earns_more_than_the_optimum_of_direction(name):
    """The same actions earn opposite amounts by their velocity: together no more than standing still."""
    family = task_family(name)
    assert family.horizon is not None
    environment = Environment(family, tasks=[{"direction": 1.0}, {"direction": -1.0}], seed=0)
    environment.reset(seed=0)
    rng = np.random.default_rng(0)
    size = environment.single_action_space.shape
    state = environment.save()
    generators = state["rows"]["generators"]
    state["rows"]["generators"] = [generators[0], generators[0]]  # the same noise in both rows
    environment.restore(state)
    environment.reset()
    returns, forward = np.zeros(2), np.zeros(2)
    for _ in range(family.horizon):
        action = np.tile(rng.uniform(-1, 1, size).astype(np.float32), (2, 1))
        _, reward, terminated, _, info = environment.step(action)
        if terminated.any():
            break
        returns += reward
        forward += info["reward_forward"]
    assert forward.sum() == 0
    assert returns.mean() <= family.task_blind_return
