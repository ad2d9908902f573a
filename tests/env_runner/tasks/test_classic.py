from __future__ import annotations

import math
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from ssmrl.env_runner import Environment
from ssmrl.env_runner.tasks import NOMINAL_PHYSICS, classic_physics, make_with_physics, sample_physics, task_family

ENV_IDS = [*NOMINAL_PHYSICS]


# Physics


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_the_nominal_values_are_gymnasiums(env_id):
    simulator = gymnasium.make(env_id).unwrapped
    for name, value in NOMINAL_PHYSICS[env_id].items():
        assert getattr(simulator, name) == value


@pytest.mark.parametrize("action", [0, 1])
def test_a_cartpole_step_is_eulers_with_the_tasks_physics(action):
    g, cart, pole, half = 7.0, 2.0, 0.3, 0.8
    physics = {"gravity": g, "masscart": cart, "masspole": pole, "length": half}
    env: Any = make_with_physics("CartPole-v1", physics)
    env.reset(seed=0)
    x, v, theta, w = 0.1, -0.2, 0.15, 0.4
    env.unwrapped.state = np.array([x, v, theta, w])
    observation, *_ = env.step(action)

    # Pole and cart accelerate as in Florian (2007), "Correct equations for the dynamics of the
    # cart-pole system", without friction.
    force, total = (10.0 if action else -10.0), cart + pole
    sine, cosine = math.sin(theta), math.cos(theta)
    angular = (g * sine + cosine * (-force - pole * half * w**2 * sine) / total) / (
        half * (4 / 3 - pole * cosine**2 / total)
    )
    linear = (force + pole * half * (w**2 * sine - angular * cosine)) / total
    expected = [x + 0.02 * v, v + 0.02 * linear, theta + 0.02 * w, w + 0.02 * angular]
    np.testing.assert_allclose(observation, expected, rtol=1e-6)


def test_a_pendulum_step_is_semi_implicit_eulers_with_the_tasks_physics():
    g, m, length = 6.0, 0.7, 1.6
    env: Any = make_with_physics("Pendulum-v1", {"g": g, "m": m, "l": length})
    env.reset(seed=0)
    theta, w, u = 0.8, -1.1, 1.5
    env.unwrapped.state = np.array([theta, w])
    observation, *_ = env.step(np.array([u], np.float32))

    # A rod about its end: inertia m l²/3, gravity at l/2; theta is 0 when it is upright.
    inertia = m * length**2 / 3
    w += 0.05 * (m * g * length / 2 * math.sin(theta) + u) / inertia
    theta += 0.05 * w
    np.testing.assert_allclose(observation, [math.cos(theta), math.sin(theta), w], rtol=1e-6)


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_every_parameter_changes_the_dynamics(env_id):
    def successor(physics: dict[str, float]) -> Any:
        env: Any = make_with_physics(env_id, physics)
        env.reset(seed=0)
        env.unwrapped.state = np.array([0.1, 0.2, 0.1, 0.3][: len(env.unwrapped.state)])
        action = 1 if env_id == "CartPole-v1" else np.ones(1, np.float32)
        return env.step(action)[0]

    nominal = successor({})
    for name, value in NOMINAL_PHYSICS[env_id].items():
        assert not np.array_equal(successor({name: 1.5 * value}), nominal)
        np.testing.assert_array_equal(successor({name: value}), nominal)


def test_arguments_reach_gymnasium_make():
    env = make_with_physics("Pendulum-v1", {}, max_episode_steps=3)
    assert env.spec is not None
    assert env.spec.max_episode_steps == 3


# Sampling


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_a_task_is_a_function_of_one_integer(env_id):
    assert sample_physics(env_id, 5) == sample_physics(env_id, 5)
    values = [value for seed in range(20) for value in sample_physics(env_id, seed).values()]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_log_factors_are_uniform_and_independent(env_id):
    nominal = np.array([*NOMINAL_PHYSICS[env_id].values()])
    tasks = [[*sample_physics(env_id, seed, base=2.0, spread=3.0).values()] for seed in range(2000)]
    exponents = np.log2(np.array(tasks) / nominal)
    assert np.abs(exponents).max() <= 3.0
    assert np.abs(exponents).max() > 2.99
    np.testing.assert_allclose(exponents.mean(axis=0), 0, atol=4 * 3**0.5 / 2000**0.5)
    np.testing.assert_allclose(exponents.var(axis=0), 3.0, rtol=0.1)
    correlation = np.corrcoef(exponents.T) - np.eye(len(nominal))
    np.testing.assert_allclose(correlation, 0, atol=4 / 2000**0.5)


def test_by_default_factors_lie_within_the_square_of_one_and_a_half():
    tasks = [[*sample_physics("Pendulum-v1", seed).values()] for seed in range(500)]
    factors = np.array(tasks) / [10.0, 1.0, 1.0]
    assert 1.5**-2 <= factors.min() < 0.46
    assert 2.2 < factors.max() <= 1.5**2


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_no_spread_is_the_nominal_task(env_id):
    assert sample_physics(env_id, 0, spread=0.0) == NOMINAL_PHYSICS[env_id]


# A task per row


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_the_info_of_every_reset_holds_the_tasks(mode):
    tasks = [sample_physics("Pendulum-v1", seed) for seed in (0, 1)]
    makers = [partial(make_with_physics, "Pendulum-v1", task) for task in tasks]
    environment = Environment(makers, seed=0, max_episode_steps=1, autoreset_mode=mode)
    _, info = environment.reset()
    action = np.zeros((2, 1), np.float32)
    infos = [info, *(environment.step(action)[4] for _ in range(2))]
    for held in (infos[0], infos[2 if mode == "NextStep" else 1]):
        assert held["task"]["g"].tolist() == [task["g"] for task in tasks]
        assert held["task"]["m"].tolist() == [task["m"] for task in tasks]


def test_rows_take_the_physics_of_their_tasks():
    makers = [partial(make_with_physics, "CartPole-v1", {"masscart": m}) for m in (1.0, 4.0)]
    environment = Environment(makers)
    environment.reset(seed=0)
    assert isinstance(environment.unwrapped, SyncVectorEnv)
    for row in environment.unwrapped.envs:
        simulator: Any = row.unwrapped
        simulator.state = np.zeros(4)
    observation, *_ = environment.step([1, 1])
    # From rest and upright, x'' = F / (M + m/4): 10 / 1.025 and 10 / 4.025.
    np.testing.assert_allclose(observation[:, 1], [0.2 / 1.025, 0.2 / 4.025], rtol=1e-6)


def test_a_task_does_not_follow_later_changes_of_its_dict():
    physics = {"g": 3.0}
    env = make_with_physics("Pendulum-v1", physics)
    physics["g"] = 4.0
    _, info = env.reset(seed=0)
    info["task"]["m"] = 9.0
    assert env.reset()[1]["task"] == {"g": 3.0, "m": 1.0, "l": 1.0}


# Changes


def trajectory(env, num_steps):
    """Observations and infos of resets and steps from seed 0, with a new episode after every end."""
    observation, info = env.reset(seed=0)
    record = [(observation, info)]
    actions = np.random.default_rng(0)
    for _ in range(num_steps):
        action = actions.integers(2) if env.action_space.shape == () else actions.uniform(-2, 2, 1).astype(np.float32)
        observation, _, terminated, truncated, info = env.step(action)
        record.append((observation, info))
        if terminated or truncated:
            record.append(env.reset())
    return record


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_physics_change_at_exactly_that_step(env_id):
    before, after = sample_physics(env_id, 1), sample_physics(env_id, 2)
    changing = make_with_physics(env_id, before, changes={5: after})
    twin = make_with_physics(env_id, before)
    for n, ((changed, _), (unchanged, _)) in enumerate(
        zip(trajectory(changing, 8), trajectory(twin, 8), strict=True), start=-1
    ):
        assert np.array_equal(changed, unchanged) == (n < 5)  # -1 is the reset, n the step after n steps

    # From there on it is an environment that has always had the new physics.
    fresh: Any = make_with_physics(env_id, after)
    fresh.reset()
    fresh.unwrapped.state = np.array(changing.unwrapped.state)  # type: ignore[attr-defined]
    action = changing.action_space.sample()
    np.testing.assert_array_equal(changing.step(action)[0], fresh.step(action)[0])


def test_a_change_leaves_what_it_does_not_name_and_the_next_starts_from_it():
    env = make_with_physics("Pendulum-v1", {"g": 3.0}, changes={2: {"m": 4.0}, 3: {"g": 5.0}})
    infos = [info for _, info in trajectory(env, 4)]
    assert [info.get("task") for info in infos] == [
        {"g": 3.0, "m": 1.0, "l": 1.0},
        None,
        None,
        {"g": 3.0, "m": 4.0, "l": 1.0},
        {"g": 5.0, "m": 4.0, "l": 1.0},
    ]


def test_steps_are_counted_across_episodes_and_seeds():
    env = make_with_physics("CartPole-v1", {}, changes={7: {"gravity": 3.0}}, max_episode_steps=3)
    steps = [info.get("task", {}).get("gravity") for _, info in trajectory(env, 12)]
    #               reset        3 steps; reset          3 more; reset         the eighth step
    assert steps == [9.8, None, None, None, 9.8, None, None, None, 9.8, None, 3.0, None, 3.0, *[None] * 3, 3.0]
    env = make_with_physics("CartPole-v1", {}, changes={1: {"gravity": 3.0}})
    env.reset(seed=0)
    env.step(0)
    assert env.reset(seed=0)[1]["task"]["gravity"] == 3.0  # a reset tells the physics of the step that follows it
    assert env.step(0)[4]["task"]["gravity"] == 3.0


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_autoreset_is_not_counted_as_a_step(mode):
    makers = [partial(make_with_physics, "Pendulum-v1", {}, changes=changes) for changes in ({3: {"g": 3.0}}, None)]
    environment = Environment(makers, max_episode_steps=2, autoreset_mode=mode)
    environment.reset(seed=0)
    infos = [environment.step(np.zeros((2, 1), np.float32))[4] for _ in range(6)]
    gravity = [info["task"]["g"].tolist() if "task" in info else None for info in infos]
    if mode == "SameStep":
        assert gravity == [None, [10.0, 10.0], None, [3.0, 10.0], None, [3.0, 10.0]]
    else:
        assert gravity == [None, None, [10.0, 10.0], None, [3.0, 0.0], [3.0, 10.0]]
        assert infos[4]["_task"].tolist() == [True, False]


def test_changes_do_not_follow_later_changes_of_their_dict():
    changes = {1: {"g": 3.0}}
    env = make_with_physics("Pendulum-v1", {}, changes=changes)
    changes[1]["g"] = 4.0
    changes[2] = {"g": 5.0}
    assert [info.get("task", {}).get("g") for _, info in trajectory(env, 3)] == [10.0, None, 3.0, None]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({0: {"g": 1.0}}, ValueError, r"changes.keys\(\)` must be at least 1; got 0"),
        ({0.5: {"g": 1.0}}, TypeError, r"changes.keys\(\)` must be an integer; got 0\.5"),
        ({3: {"mass": 1.0}}, ValueError, r"`changes\[3\]` of Pendulum-v1 must be among \['g', 'm', 'l'\]; got 'mass'"),
        ({3: {"m": 0.0}}, ValueError, r"`changes\[3\]\['m'\]` must be positive and finite; got 0\.0"),
    ],
)
def test_bad_changes_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        make_with_physics("Pendulum-v1", {}, changes=changes)


# Errors


@pytest.mark.parametrize(
    ("physics", "message"),
    [
        ({"mass": 1.0}, r"among \['g', 'm', 'l'\]; got 'mass'"),
        ({"m": 0.0}, r"`physics\['m'\]` must be positive and finite; got 0\.0"),
        ({"m": -1.0}, r"`physics\['m'\]` must be positive and finite; got -1\.0"),
        ({"l": math.nan}, r"`physics\['l'\]` must be positive and finite; got nan"),
        ({"g": math.inf}, r"`physics\['g'\]` must be positive and finite; got inf"),
    ],
)
def test_bad_physics_are_refused(physics, message):
    with pytest.raises(ValueError, match=message):
        make_with_physics("Pendulum-v1", physics)


def test_an_unsupported_environment_is_refused():
    message = r"must be one of \['CartPole-v1', 'Pendulum-v1'\]; got 'Acrobot-v1'"
    with pytest.raises(ValueError, match=message):
        sample_physics("Acrobot-v1", 0)
    with pytest.raises(ValueError, match=message):
        make_with_physics("Acrobot-v1", {})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, "`seed` must be at least 0; got -1"),
        ({"seed": 0.5}, TypeError, r"`seed` must be an integer; got 0\.5"),
        ({"seed": 0, "base": 0.0}, ValueError, r"`base` must be positive and finite; got 0\.0"),
        ({"seed": 0, "base": math.inf}, ValueError, "`base` must be positive and finite"),
        ({"seed": 0, "spread": -1.0}, ValueError, r"`spread` must be at least 0 .* got -1\.0"),
        ({"seed": 0, "spread": math.nan}, ValueError, "`spread` must be at least 0 .* got nan"),
    ],
)
def test_bad_settings_of_the_distribution_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        sample_physics("Pendulum-v1", **arguments)


# Families


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_a_family_draws_as_sample_physics_does(env_id):
    family = classic_physics(env_id, base=2.0, spread=1.5)
    nominal = NOMINAL_PHYSICS[env_id]
    exponents = np.log2([[task[n] / nominal[n] for n in nominal] for task in family.sample(1000, seed=0)])
    assert 1.49 < np.abs(exponents).max() <= 1.5
    np.testing.assert_allclose(exponents.mean(axis=0), 0, atol=4 * 0.75**0.5 / 1000**0.5)
    assert family.draw(np.random.default_rng(3), "train") == sample_physics(env_id, 3, base=2.0, spread=1.5)


@pytest.mark.parametrize(("env_id", "horizon"), [("CartPole-v1", 500), ("Pendulum-v1", 200)])
def test_a_familys_defaults_are_the_published_scheme(env_id, horizon):
    family = task_family(f"{env_id.split('-')[0].lower()}-physics")
    assert (family.env_id, family.horizon) == (f"ssmrl/{env_id}", horizon)
    assert family.draw(np.random.default_rng(3), "train") == sample_physics(env_id, 3, spread=3.0)
    assert task_family("pendulum-physics", horizon=7).horizon == 7


def test_knowing_the_physics_cartpole_reaches_its_bound():
    family = task_family("cartpole-physics")
    tasks = family.sample(100, seed=0, split="test")
    environment = Environment(family, tasks=tasks, seed=0, autoreset_mode="Disabled")
    g, half = (np.array([task[name] for task in tasks]) for name in ("gravity", "length"))
    observation, _ = environment.reset()
    total, alive = np.zeros(100), np.ones(100, np.bool_)
    for _ in range(500):
        x, v, angle, omega = observation.T
        # Hold the pole at an angle that leads back to the middle, in units of its own time.
        time = np.sqrt(4 / 3 * half / g)
        push = angle + 0.03 * x + 0.06 * v + 1.2 * time * omega > 0
        observation, reward, terminated, truncated, _ = environment.step(push.astype(np.int64))
        total += np.where(alive, reward, 0.0)
        alive &= ~terminated
        if (terminated | truncated).any():
            environment.reset(options={"reset_mask": terminated | truncated})
    assert family.oracle_return == total.mean() == 500


def test_bad_settings_of_a_family_are_refused():
    with pytest.raises(ValueError, match=r"must be one of \['CartPole-v1', 'Pendulum-v1'\]; got 'Acrobot-v1'"):
        classic_physics("Acrobot-v1")
    with pytest.raises(ValueError, match=r"`base` must be positive and finite; got 0\.0"):
        classic_physics("CartPole-v1", base=0.0)
    with pytest.raises(ValueError, match=r"`spread` must be at least 0 and finite; got -1\.0"):
        classic_physics("CartPole-v1", spread=-1.0)
