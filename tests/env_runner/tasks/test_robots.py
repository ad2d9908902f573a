"""The robots' families against their published definitions: formulas, ranges, horizons and splits, by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ssmrl.env_runner import task_family
from ssmrl.env_runner.tasks.disabled import disabled
from ssmrl.env_runner.tasks.dynamics import MODEL_SIZES, one_parameter, random_parameters

pytest.importorskip("mujoco.batch")
import mujoco
from gymnasium.envs.mujoco import MujocoEnv

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
    def met(name, split):
        return {task["disabled"] for task in task_family(name).sample(DRAWS, 0, split)}

    assert met("halfcheetah-disabled", "train") == {1, 2, 3, 4, 5}
    assert met("halfcheetah-disabled", "test") == {0}
    assert met("ant-disabled", "train") == {(2, 3), (4, 5), (6, 7)}
    assert met("ant-disabled", "test") == {(0, 1)}
    assert met("humanoid-disabled", "train") == {*range(1, 17)}
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


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        (lambda: one_parameter("Cheetah", "mass"), r"`robot` must be one of \['HalfCheetah', .*; got 'Cheetah'"),
        (lambda: random_parameters("X"), r"`robot` must be one of \['HalfCheetah', .*; got 'X'"),
        (lambda: disabled("X"), r"`robot` must be one of \['HalfCheetah', .*; got 'X'"),
        (lambda: one_parameter("Ant", "wind"), r"`parameter` must be one of \['gravity', .*; got 'wind'"),
    ],
)
def test_unknown_robots_and_parameters_are_refused(factory, match):
    with pytest.raises(ValueError, match=match):
        factory()


@pytest.mark.parametrize(
    ("name", "argument", "value", "error", "match"),
    [
        ("halfcheetah-vel", "control_cost", np.nan, ValueError, "`control_cost` must be finite; got nan"),
        ("halfcheetah-dir", "control_cost", None, TypeError, "`control_cost` must be a number; got None"),
        ("ant-vel", "contact_cost", np.inf, ValueError, "`contact_cost` must be finite; got inf"),
        ("ant-angle", "bonus", -np.inf, ValueError, "`bonus` must be finite; got -inf"),
        ("ant-goal", "bonus", np.nan, ValueError, "`bonus` must be finite; got nan"),
        ("humanoid-dir", "scale", np.float32("nan"), ValueError, "`scale` must be finite; got nan"),
        ("humanoid-dir", "contact_limit", np.nan, ValueError, "`contact_limit` must be finite; got nan"),
        ("ant-mass", "ctrl_cost_weight", np.nan, ValueError, "`ctrl_cost_weight` must be finite; got nan"),
        ("ant-goal", "frame_skip", 0, ValueError, "`frame_skip` must be at least 1; got 0"),
        ("walker2d-vel", "frame_skip", 2.5, TypeError, "`frame_skip` must be an integer; got 2.5"),
        ("ant-disabled", "frame_skip", -1, ValueError, "`frame_skip` must be at least 1; got -1"),
        ("ant-vel", "horizon", 0, ValueError, "`horizon` must be at least 1; got 0"),
        ("hopper-mass", "horizon", 2.0, TypeError, "`horizon` must be an integer; got 2.0"),
    ],
)
def test_numbers_that_a_robot_cannot_have_are_refused(name, argument, value, error, match):
    with pytest.raises(error, match=match):
        task_family(name, **{argument: value})


def test_what_contacts_cost_may_have_no_limit():
    assert task_family("humanoid-dir", contact_limit=np.inf).settings["contact_limit"] == np.inf


@pytest.fixture
def scripted(monkeypatch):
    """Play motions by hand: robots stand where they begin, but for a velocity that the test gives them.

    Everything but MuJoCo's integration is the real environment: `play(family, tasks, velocity, action)` returns the
    returns of one episode per task, velocities and actions being one for all tasks or one per task.
    """
    velocity = np.zeros(2)

    def do_simulation(env, ctrl, n_frames):
        root = 2 if env.model.nq > env.model.nv else 1  # Robots with a free joint are not held in a plane.
        env.data.ctrl[:] = ctrl
        env.data.qpos[:root] += velocity[:root] * env.model.opt.timestep * n_frames
        mujoco.mj_forward(env.model, env.data)
        mujoco.mj_rnePostConstraint(env.model, env.data)

    monkeypatch.setattr(MujocoEnv, "do_simulation", do_simulation)

    def play(family, tasks, velocities, action=0.0):
        env: Any = family.with_settings(reset_noise_scale=0.0).make(tasks[0])
        actions = np.full(env.action_space.shape, action, np.float32)
        returns = np.zeros(len(tasks))
        for i, task in enumerate(tasks):
            velocity[:] = np.broadcast_to(velocities, (len(tasks), 2))[i]
            env.unwrapped.set_task(task)
            env.reset(seed=0)
            for step in range(1, family.horizon + 1):
                _, reward, terminated, truncated, _ = env.step(actions)
                returns[i] += reward
                assert (terminated, truncated) == (False, step == family.horizon)
        return returns

    return play


def mean_and_error(returns):
    """Mean over the tasks, and four times its standard error."""
    return returns.mean(), 4 * returns.std() / np.sqrt(len(returns))


@pytest.mark.parametrize("name", ["halfcheetah-vel", "ant-vel", "walker2d-vel"])
def test_the_task_blind_optimum_of_velocity_is_the_median(scripted, name):
    low, high = (0, 10) if name == "walker2d-vel" else (0, 3)
    family: Any = task_family(name, horizon=2)
    tasks = family.sample(1500, 0)
    earned = {}
    for quantile in (0.25, 0.5, 0.75):
        velocity = (low + quantile * (high - low), 0.0)
        earned[quantile], error = mean_and_error(scripted(family, tasks, velocity))
        if quantile == 0.5:
            assert earned[quantile] == pytest.approx(family.task_blind_return, abs=error)
            assert error < 0.07 * (high - low)
    assert max(earned, key=lambda q: earned[q]) == 0.5
    whole: Any = task_family(name)
    assert whole.task_blind_return == pytest.approx(whole.horizon / 2 * family.task_blind_return)


@pytest.mark.parametrize("name", ["halfcheetah-vel", "ant-vel", "walker2d-vel"])
def test_the_oracle_of_velocity_has_that_of_the_task(scripted, name):
    family: Any = task_family(name)
    tasks = family.sample(5, 0)
    returns = scripted(family, tasks, [(task["velocity"], 0.0) for task in tasks])
    np.testing.assert_allclose(returns, family.oracle_return, atol=1e-6)
    assert (scripted(family, tasks, (-0.1, 0.0)) < family.oracle_return).all()


@pytest.mark.parametrize("name", ["halfcheetah-dir", "ant-dir", "ant-angle", "humanoid-dir"])
def test_no_motion_under_all_directions_earns_more_than_standing_still(scripted, name):
    whole: Any = task_family(name)
    np.testing.assert_allclose(scripted(whole, whole.sample(2, 0), (0.0, 0.0)), whole.task_blind_return, atol=1e-6)
    family: Any = task_family(name, horizon=2)
    tasks = family.sample(600, 0)
    mean, error = mean_and_error(scripted(family, tasks, (2.0, 0.5)))
    assert 0 < error < 1
    assert mean == pytest.approx(family.task_blind_return, abs=error)
    acting, error = mean_and_error(scripted(family, tasks, (2.0, 0.5), action=0.4))
    assert acting < mean
    assert acting <= family.task_blind_return + error


def test_the_task_blind_optimum_of_goals_is_to_stay_at_the_start(scripted):
    family: Any = task_family("ant-goal", horizon=2)
    tasks = family.sample(1200, 0)
    staying, error = mean_and_error(scripted(family, tasks, (0.0, 0.0)))
    assert staying == pytest.approx(family.task_blind_return, abs=error)
    assert error < 0.05 * -staying
    for velocity in ((4.0, 0.0), (-4.0, 0.0), (0.0, 4.0), (0.0, -4.0)):
        assert scripted(family, tasks[:300], velocity).mean() < scripted(family, tasks[:300], (0.0, 0.0)).mean()
    whole: Any = task_family("ant-goal")
    assert whole.task_blind_return == pytest.approx(whole.horizon / 2 * family.task_blind_return)
