from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.error import ClosedEnvironmentError, NameNotFound
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit, TransformReward
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorStatistics
from gymnasium.wrappers.vector import RescaleAction

from ssmrl.env_runner import Environment, UnstableSimulationError, derive_seed, task_family
from ssmrl.env_runner.environment import row_seeds

# Python 3.12 warns of fork in a process with threads, which torch starts.
ignore_fork = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def play(environment: Environment, num_steps: int = 8, seed: int | None = None) -> list[Any]:
    """Step with actions that depend on the row and the time only; return all that was seen."""
    seen = [environment.reset(seed=seed)[0]]
    for t in range(num_steps):
        rows = np.arange(environment.num_envs)
        if isinstance(environment.single_action_space, gymnasium.spaces.Discrete):
            actions = (rows + t) % 2
        else:
            actions = np.sin(rows + t)[:, None].astype(np.float32)
        seen.extend(environment.step(actions)[:4])
    return seen


def steps_to_the_end(environment: Environment) -> int:
    environment.reset(seed=0)
    for t in range(1, 1000):
        *_, terminated, truncated, _ = environment.step(np.zeros((1, 1), np.float32))
        assert not terminated.any()
        if truncated.any():
            return t
    raise AssertionError("no end")


# What it is


def test_it_is_an_ordinary_gymnasium_vector_environment():
    with Environment("CartPole-v1", 3, seed=0) as environment:
        assert isinstance(environment, VectorEnv)
        assert environment.num_envs == environment.batch_size == 3
        assert environment.single_observation_space.shape == (4,)
        assert environment.observation_space.shape == (3, 4)
        assert environment.single_action_space == gymnasium.spaces.Discrete(2)
        assert environment.action_space.shape == (3,)
        assert environment.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
        assert environment.spec is not None
        assert environment.spec.id == "ssmrl/CartPole-v1"  # a native batch of it
        assert environment.is_native
        observation, _ = environment.reset()
        assert observation in environment.observation_space
        observation, reward, terminated, truncated, _ = environment.step(np.array([0, 1, 0]))
        assert observation in environment.observation_space
        assert reward.tolist() == [1.0, 1.0, 1.0]
        assert terminated.tolist() == truncated.tolist() == [False] * 3


def test_gymnasium_vector_wrappers_go_around_it():
    environment = VectorStatistics(Environment("CartPole-v1", 2, max_episode_steps=2, seed=0))
    environment.reset()
    environment.step(np.array([0, 1]))
    *_, info = environment.step(np.array([0, 1]))
    assert info["episode"]["l"].tolist() == [2, 2]

    one = np.ones(1, np.float32)
    rescaled = RescaleAction(Environment("Pendulum-v1", 2, seed=0), -one, one)
    plain = Environment("Pendulum-v1", 2, seed=0)
    rescaled.reset()
    plain.reset()
    half = np.full((2, 1), 0.5, np.float32)
    np.testing.assert_array_equal(rescaled.step(half)[0], plain.step(2 * half)[0])


def test_leaving_the_context_closes_it():
    with Environment("CartPole-v1") as environment:
        environment.reset(seed=0)
    assert environment.closed
    with pytest.raises(ClosedEnvironmentError, match="closed"):
        environment.reset()
    with pytest.raises(ClosedEnvironmentError, match="closed"):
        environment.step([0])
    environment.close()


def test_render_returns_one_frame_per_row(counting):
    class Rendering(gymnasium.Wrapper):
        render_mode = "ansi"

        def render(self):
            return f"episode {self.get_wrapper_attr('episode')}"

    environment = Environment(lambda: Rendering(counting(2)()), 2)
    environment.reset()
    assert environment.render() == ("episode 0", "episode 0")


def test_every_row_can_be_a_task_of_its_own(counting):
    environment = Environment([counting(1), counting(2), counting(3)], max_episode_steps=9)
    assert environment.batch_size == 3
    environment.reset()
    assert environment.step([0, 0, 0])[2].tolist() == [True, False, False]
    assert environment.step([0, 0, 0])[2].tolist() == [False, True, False]
    assert environment.step([0, 0, 0])[2].tolist() == [True, False, True]


# Seeds


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_the_same_integer_gives_the_same_numbers(env_id):
    first = play(Environment(env_id, 3, seed=7, max_episode_steps=5))
    again = play(Environment(env_id, 3, seed=7, max_episode_steps=5))
    other = play(Environment(env_id, 3, seed=8, max_episode_steps=5))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.isclose(first[0], other[0]).any()


def test_a_row_does_not_depend_on_the_batch_size():
    # Episodes end after 3 steps, so that this holds for the resets that follow as well.
    small = play(Environment("Pendulum-v1", 2, seed=3, max_episode_steps=3))
    large = play(Environment("Pendulum-v1", 5, seed=3, max_episode_steps=3))
    for a, b in zip(small, large, strict=True):
        np.testing.assert_array_equal(a, b[:2])


def test_rows_of_neighbouring_seeds_share_no_stream():
    environment = Environment("Pendulum-v1", 4)
    observations = [environment.reset(seed=seed)[0] for seed in range(8)]
    assert len(np.unique(np.concatenate(observations), axis=0)) == 32
    assert len({derive_seed(seed, row) for seed in range(8) for row in range(4)}) == 32


def test_a_row_is_gymnasiums_environment_with_the_derived_seed():
    environment = Environment("CartPole-v1", 3)
    observation, _ = environment.reset(seed=11)
    for row in range(3):
        seed = np.random.SeedSequence(11, spawn_key=(row,)).generate_state(1)[0]
        expected, _ = gymnasium.make("CartPole-v1").reset(seed=int(seed))
        np.testing.assert_array_equal(observation[row], expected)


def test_the_constructors_seed_is_that_of_the_first_reset_only():
    environment = Environment("CartPole-v1", 2, seed=5)
    reseeded = Environment("CartPole-v1", 2, seed=6)
    first, second = environment.reset()[0], environment.reset()[0]
    np.testing.assert_array_equal(first, reseeded.reset(seed=5)[0])
    np.testing.assert_array_equal(second, reseeded.reset()[0])
    assert not np.isclose(first, second).any()
    np.testing.assert_array_equal(first, environment.reset(seed=5)[0])


def test_without_a_seed_two_environments_differ():
    first, second = (Environment("CartPole-v1").reset()[0] for _ in range(2))
    assert not np.isclose(first, second).any()


def test_a_seed_reseeds_the_action_space():
    environment = Environment("Pendulum-v1", 3, seed=1)
    environment.reset()
    first = environment.action_space.sample()
    environment.reset()
    assert not np.isclose(first, environment.action_space.sample()).any()
    environment.reset(seed=1)
    np.testing.assert_array_equal(first, environment.action_space.sample())


def test_the_action_space_has_a_stream_of_its_own():
    environment = Environment("Pendulum-v1", 3, seed=1)
    environment.reset()
    sample = environment.action_space.sample()
    for row in range(3):
        environment.action_space.seed(derive_seed(1, row))
        assert not np.isclose(environment.action_space.sample(), sample).any()


def test_rows_whose_seeds_would_meet_get_others_whatever_comes_after_them(monkeypatch):
    plain = [derive_seed(3, row) for row in range(40)]
    assert row_seeds(3, 40) == plain
    monkeypatch.setattr("ssmrl.env_runner.environment.derive_seed", lambda seed, *key: derive_seed(seed, *key) % 64)
    seeds = row_seeds(3, 40)
    assert len(set(seeds)) == 40
    assert seeds != [seed % 64 for seed in plain]
    assert row_seeds(3, 17) == seeds[:17]
    assert len({*row_seeds(3, 40, 1)}) == 40


def test_seeds_derived_with_different_keys_differ():
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]
    assert len({derive_seed(seed, *key) for seed in range(20) for key in keys}) == 20 * len(keys)


@ignore_fork
@pytest.mark.parametrize(
    ("env", "mode"),
    [
        ("Pendulum-v1", "NextStep"),
        ([partial(gymnasium.make, "Pendulum-v1", g=g) for g in (5.0, 10.0)], "SameStep"),
    ],
)
def test_async_gives_the_numbers_of_sync(env, mode):
    settings: dict[str, Any] = {"seed": 2, "max_episode_steps": 3, "autoreset_mode": mode}
    expected = play(Environment(env, 2, **settings))
    with Environment(env, 2, vectorization_mode="async", **settings) as environment:
        for a, b in zip(play(environment), expected, strict=True):
            np.testing.assert_array_equal(a, b)


@ignore_fork
def test_async_refuses_to_step_a_row_that_has_ended_where_autoreset_is_disabled():
    settings: dict[str, Any] = {"max_episode_steps": 1, "autoreset_mode": "Disabled", "seed": 0}
    with Environment("CartPole-v1", vectorization_mode="async", **settings) as environment:
        environment.reset()
        environment.step([0])
        with pytest.raises(ValueError, match="Row 0 has ended"):
            environment.step([0])
        environment.reset(options={"reset_mask": np.array([True])})
        environment.step([0])


# Ends of episodes


def two_rows(counting: Any, mode: AutoresetMode | str) -> Environment:
    """Row 0 terminates after 2 steps, row 1 is truncated after 3."""
    environment = Environment([counting(2), counting(3, "truncated")], 2, autoreset_mode=mode)
    environment.reset()
    return environment


def test_next_step_returns_the_final_observation_and_ignores_the_action_after_it(counting):
    environment = two_rows(counting, AutoresetMode.NEXT_STEP)
    environment.step([0, 0])
    observation, reward, terminated, truncated, _ = environment.step([1, 2])
    assert observation.tolist() == [[0, 2], [0, 2]]
    assert reward.tolist() == [21, 22]
    assert terminated.tolist() == [True, False]
    assert truncated.tolist() == [False, False]
    observation, reward, terminated, truncated, _ = environment.step([1, 2])
    assert observation.tolist() == [[1, 0], [0, 3]]
    assert reward.tolist() == [0, 32]
    assert terminated.tolist() == [False, False]
    assert truncated.tolist() == [False, True]


def test_same_step_returns_the_first_observation_and_keeps_the_final_one_in_the_info(counting):
    environment = two_rows(counting, "SameStep")
    environment.step([0, 0])
    observation, reward, terminated, truncated, info = environment.step([1, 2])
    assert observation.tolist() == [[1, 0], [0, 2]]
    assert reward.tolist() == [21, 22]
    assert terminated.tolist() == [True, False]
    assert truncated.tolist() == [False, False]
    assert info["final_obs"][0].tolist() == [0, 2]
    assert info["final_obs"][1] is None
    observation, _, terminated, truncated, info = environment.step([1, 2])
    assert observation.tolist() == [[1, 1], [1, 0]]
    assert terminated.tolist() == [False, False]
    assert truncated.tolist() == [False, True]
    assert info["final_obs"][1].tolist() == [0, 3]


def test_a_mask_resets_its_rows_and_no_others_where_autoreset_is_disabled(counting):
    environment = two_rows(counting, "Disabled")
    environment.step([0, 0])
    *_, terminated, truncated, _ = environment.step([0, 0])
    options = {"reset_mask": terminated | truncated}
    observation, _ = environment.reset(options=options)
    assert observation.tolist() == [[1, 0], [0, 2]]
    assert options["reset_mask"].tolist() == [True, False]
    assert environment.step([0, 0])[0].tolist() == [[1, 1], [0, 3]]


def test_a_mask_can_be_a_list_or_a_tensor(counting):
    for mask in ([False, True], torch.tensor([False, True])):
        environment = two_rows(counting, "Disabled")
        assert environment.reset(options={"reset_mask": mask})[0].tolist() == [[0, 0], [1, 0]]


def test_a_masked_reset_leaves_the_streams_of_the_other_rows_alone():
    mask = {"reset_mask": np.array([True, False])}
    environment = Environment("Pendulum-v1", 2, seed=0, autoreset_mode="Disabled")
    untouched = Environment("Pendulum-v1", 2, seed=0, autoreset_mode="Disabled")
    first, _ = environment.reset()
    untouched.reset()
    environment.action_space.seed(0)
    masked, _ = environment.reset(seed=9, options=mask)
    np.testing.assert_array_equal(masked[1], first[1])
    np.testing.assert_array_equal(masked[0], untouched.reset(seed=9)[0][0])
    untouched.reset(seed=0)
    np.testing.assert_array_equal(environment.reset()[0][1], untouched.reset()[0][1])
    untouched.action_space.seed(0)
    np.testing.assert_array_equal(environment.action_space.sample(), untouched.action_space.sample())


def test_options_reach_every_row():
    environment = Environment("Pendulum-v1", 2, seed=0)
    observation, _ = environment.reset(options={"x_init": 0.0, "y_init": 0.0})
    assert observation.tolist() == [[1.0, 0.0, 0.0]] * 2


# Episode limits


def shorter() -> gymnasium.Env[Any, Any]:
    return TransformReward(TimeLimit(gymnasium.make("Pendulum-v1"), 3), lambda reward: reward)


@pytest.mark.parametrize(
    "env",
    [
        "Pendulum-v1",
        gymnasium.spec("Pendulum-v1"),
        partial(gymnasium.make, "Pendulum-v1"),
        shorter,
        gymnasium.envs.classic_control.PendulumEnv,
        [shorter],
    ],
)
@pytest.mark.parametrize("limit", [2, 250])
def test_max_episode_steps_replaces_every_limit_below_and_above_it(env, limit):
    assert steps_to_the_end(Environment(env, max_episode_steps=limit)) == limit


def test_without_max_episode_steps_the_limits_stay():
    assert steps_to_the_end(Environment("Pendulum-v1")) == 200
    assert steps_to_the_end(Environment(shorter)) == 3


def test_wrappers_around_a_replaced_limit_see_the_new_end():
    environment = Environment(lambda: RecordEpisodeStatistics(gymnasium.make("Pendulum-v1")), max_episode_steps=2)
    environment.reset(seed=0)
    environment.step(np.zeros((1, 1), np.float32))
    *_, info = environment.step(np.zeros((1, 1), np.float32))
    assert info["episode"]["l"].tolist() == [2]


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1; got 0"),
        ({"batch_size": 2.0}, TypeError, r"`batch_size` must be an integer; got 2\.0"),
        ({"batch_size": True}, TypeError, "`batch_size` must be an integer; got True"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0; got -1"),
        ({"seed": "a"}, TypeError, "`seed` must be an integer; got 'a'"),
        ({"max_episode_steps": 0}, ValueError, "`max_episode_steps` must be at least 1; got 0"),
        ({"max_episode_steps": 1.5}, TypeError, "`max_episode_steps` must be an integer"),
        ({"autoreset_mode": "Never"}, ValueError, r"'Disabled'\]; got 'Never'"),
        ({"vectorization_mode": "threads"}, ValueError, r"'sync', 'async'\]; got 'threads'"),
        ({"vectorization_mode": "native", "render_mode": "rgb_array"}, (ValueError, TypeError), "native batch|got"),
        ({"out_of_bounds": "wrap"}, ValueError, r"\['error', 'clip'\]; got 'wrap'"),
        ({"tasks": [{}, {}], "batch_size": 3}, ValueError, "`tasks` must hold one task per row, 3; got 2"),
    ],
)
@pytest.mark.parametrize("env", ["CartPole-v1", CartPoleEnv])
def test_a_bad_setting_is_refused(env, arguments, error, message):
    with pytest.raises(error, match=message):
        Environment(env, **arguments)


def test_an_unknown_id_raises_gymnasiums_own_error():
    with pytest.raises(NameNotFound) as ours:
        Environment("NoSuchThing-v0", 2)
    with pytest.raises(NameNotFound) as theirs:
        gymnasium.make_vec("NoSuchThing-v0", 2)
    assert str(ours.value) == str(theirs.value)


def test_what_is_no_environment_is_refused(counting):
    with pytest.raises(TypeError, match=r"`env` must be a family, .* a list of makers; got int"):
        Environment(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got CartPoleEnv"):
        Environment(CartPoleEnv())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"one maker .* per row; got 'CartPole-v1' for row 1"):
        Environment([counting(1), "CartPole-v1"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"maker of row 0 must return a gymnasium\.Env; got int"):
        Environment(lambda: 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=r"number of makers in `env`, 2; got 3"):
        Environment([counting(1), counting(1)], 3)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1; got 0"):
        Environment([])
    with pytest.raises(TypeError, match=r"got \['g'\] with a maker: bind them"):
        Environment(counting(1), g=3.0)


@pytest.mark.parametrize(
    ("actions", "error", "message"),
    [
        ([0, 1, 2], ValueError, r"row 2"),
        ([0, -1, 1], ValueError, r"from 0 to 1; got -1 in row 1"),
        ([0, 1], ValueError, r"shape \(3,\), one per row; got \(2,\)"),
        ([[0], [1], [0]], ValueError, r"shape \(3,\), one per row; got \(3, 1\)"),
        (1, ValueError, r"shape \(3,\), one per row; got \(\)"),
        ([0.0, 1.0, 1.0], TypeError, "must be integers for Discrete"),
        ([True, False, True], TypeError, "must be integers for Discrete"),
    ],
)
def test_a_bad_discrete_action_is_refused(actions, error, message):
    environment = Environment("CartPole-v1", 3, seed=0)
    environment.reset()
    with pytest.raises(error, match=message):
        environment.step(actions)


@pytest.mark.parametrize(
    ("actions", "error", "message"),
    [
        ([[0.0], [np.nan]], ValueError, r"must be finite; got \[nan\] in row 1"),
        ([[np.inf], [0.0]], ValueError, r"must be finite; got \[inf\] in row 0"),
        ([0.0, 0.0], ValueError, r"shape \(2, 1\), one per row; got \(2,\)"),
        ([[0.0, 0.0]], ValueError, r"shape \(2, 1\), one per row; got \(1, 2\)"),
        ([["a"], ["b"]], TypeError, "must be real numbers for Box"),
    ],
)
def test_a_bad_box_action_is_refused(actions, error, message):
    environment = Environment("Pendulum-v1", 2, seed=0)
    environment.reset()
    with pytest.raises(error, match=message):
        environment.step(actions)


def test_a_discrete_action_space_that_starts_elsewhere_is_checked_by_its_own_bounds(counting):
    def shifted() -> gymnasium.Env[Any, Any]:
        env: gymnasium.Env[Any, Any] = counting(5)()
        env.action_space = gymnasium.spaces.Discrete(2, start=4)
        return env

    environment = Environment(shifted)
    environment.reset()
    assert environment.step([5])[1].tolist() == [15]
    with pytest.raises(ValueError, match="from 4 to 5; got 3 in row 0"):
        environment.step([3])


def test_box_actions_out_of_bounds_are_refused_or_clipped():
    class Echo(gymnasium.Wrapper):
        def step(self, action):
            return (*self.env.step(action)[:4], {"action": action})

    def maker():
        return Echo(gymnasium.make("Pendulum-v1"))

    environment = Environment([maker, maker])
    environment.reset(seed=0)
    with pytest.raises(ValueError, match=r'from \[-2.\] to \[2.\], unless .*"clip"; got \[7.\] in row 1'):
        environment.step([[0.0], [7.0]])
    clipping = Environment([maker, maker], out_of_bounds="clip")
    clipping.reset(seed=0)
    assert clipping.step([[-7.0], [0.5]])[4]["action"].tolist() == [[-2.0], [0.5]]


def test_an_observation_that_is_not_a_number_is_refused_with_its_row():
    class Broken(gymnasium.ObservationWrapper):
        def observation(self, observation):
            return np.full_like(observation, np.nan)

    fine, broken = CartPoleEnv, lambda: Broken(CartPoleEnv())
    environment = Environment([fine, broken])
    environment.reset(seed=0)
    with pytest.raises(UnstableSimulationError, match="observation of row 1 is not a number"):
        environment.step([0, 0])


def test_an_error_names_the_task_of_its_row():
    environment = Environment("pendulum-physics", tasks=[{"g": 9.0}, {"g": 11.0}])
    environment.reset(seed=0)
    for wrong in (9.0, np.nan):
        with pytest.raises(ValueError, match=r"in row 1, whose task is \{'g': 11.0\}"):
            environment.step([[0.0], [wrong]])


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_after_an_unstable_row_steps_are_refused_until_a_reset(kind):
    unstable = {"A": ((4.0, 0.0), (0.0, 4.0)), "B": ((1.0,), (1.0,))}
    stable = {"A": ((0.5, 0.0), (0.0, 0.5)), "B": ((1.0,), (1.0,))}
    family = task_family("linear-system", state_dim=2, horizon=None)
    environment = Environment(family, tasks=[stable, unstable], seed=0, vectorization_mode=kind)
    environment.reset()
    action = np.ones((2, 1), np.float32)
    with pytest.raises(UnstableSimulationError, match=r"[Rr]ow 1"):
        deque((environment.step(action) for _ in range(2000)), maxlen=0)
    with pytest.raises(UnstableSimulationError, match="reset all rows, or restore a state, before a step"):
        environment.step(action)
    environment.reset()
    environment.step(action)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"env": "halfcheetah-velocity", "tasks": [{}]}, ValueError, "of a like name: .*'halfcheetah-vel'"),
        (
            {"env": "pendulum-physics", "tasks": [{}], "horizon": 3},
            ValueError,
            r"\['horizon'\] are arguments of",
        ),
        ({"env": "pendulum-physics", "tasks": {"g": 1.0}}, TypeError, "`tasks` must be a list of tasks; got dict"),
        (
            {"env": "pendulum-physics", "tasks": [1, 2]},
            TypeError,
            r"`tasks\[0\]` must be a mapping .*; got 1",
        ),
        (
            {"env": "pendulum-physics", "tasks": [{"changes": [1]}]},
            TypeError,
            r"must be \{step: param.*; got \[1\]",
        ),
        ({"env": "ssmrl/Hopper-v5", "tasks": [{"mass": "x"}]}, TypeError, "`mass` must be a number .*; got 'x'"),
        ({"env": "ssmrl/Hopper-v5", "frame_skip": 0}, ValueError, "`frame_skip` must be at least 1; got 0"),
        ({"env": "ssmrl/Hopper-v5", "num_threads": -3}, ValueError, "`num_threads` must be at least 1; got -3"),
    ],
)
def test_common_mistakes_are_answered(arguments, error, match):
    with pytest.raises(error, match=match):
        Environment(**arguments)


def test_a_step_before_the_first_reset_is_refused():
    with pytest.raises(ValueError, match="`reset` must be called before the first `step`"):
        Environment("CartPole-v1").step([0])


def test_stepping_a_row_that_has_ended_is_refused_where_autoreset_is_disabled(counting):
    environment = two_rows(counting, "Disabled")
    environment.step([0, 0])
    environment.step([0, 0])
    with pytest.raises(ValueError, match="Row 0 has ended"):
        environment.step([0, 0])
    environment.reset(options={"reset_mask": np.array([False, True])})
    with pytest.raises(ValueError, match="Row 0 has ended"):
        environment.step([0, 0])
    environment.reset()
    environment.step([0, 0])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([True], r"boolean of shape \(2,\); got bool of shape \(1,\)"),
        ([1, 0], r"boolean of shape \(2,\); got int64"),
        ([False, False], "at least one row; got none"),
    ],
)
def test_a_bad_reset_mask_is_refused(counting, mask, message):
    with pytest.raises(ValueError, match=message):
        two_rows(counting, "Disabled").reset(options={"reset_mask": mask})


def test_the_first_reset_must_reset_every_row():
    environment = Environment("CartPole-v1", 2, autoreset_mode="Disabled")
    with pytest.raises(ValueError, match="every row; got a `reset_mask` without row 1"):
        environment.reset(options={"reset_mask": [True, False]})


@pytest.mark.parametrize("seed", [-1, 1.5, [1, 2]])
def test_a_bad_seed_of_reset_is_refused(seed):
    with pytest.raises((TypeError, ValueError), match="`seed` must be"):
        Environment("CartPole-v1", 2).reset(seed=seed)


def test_rows_with_different_spaces_are_refused():
    makers = [partial(gymnasium.make, env_id) for env_id in ("CartPole-v1", "Pendulum-v1")]
    # Gymnasium's own error: an AssertionError in older versions.
    with pytest.raises((RuntimeError, AssertionError), match="spaces are not equivalent"):
        Environment(makers)
