"""What an environment's rows are made of: native batches, loops, processes."""

from __future__ import annotations

import multiprocessing
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.vector import SyncVectorEnv

from ssmrl.env_runner import Environment, task_family


def test_arguments_reach_the_environment_of_an_id_and_of_a_spec():
    for env in ("Pendulum-v1", gymnasium.spec("Pendulum-v1")):
        environment = Environment(env, 2, g=3.0, vectorization_mode="sync")
        assert isinstance(environment.unwrapped, SyncVectorEnv)
        assert environment.unwrapped.get_attr("g") == (3.0, 3.0)


def test_the_spec_of_a_vector_environment_is_refused():
    spec = gymnasium.make_vec("CartPole-v1", 4, vectorization_mode="sync").spec
    assert spec is not None
    with pytest.raises(ValueError, match="spec of a single environment"):
        Environment(spec, 2)


def test_rows_that_share_one_environment_are_refused(counting):
    env = counting(2)()
    with pytest.raises(ValueError, match="new environment at every call; rows 0 and 1"):
        Environment(lambda: env, 2)


def test_the_name_of_a_family_is_an_environment_of_its_tasks():
    family = task_family("pendulum-physics")
    tasks = family.sample(3, seed=0)
    by_name, by_family = Environment("pendulum-physics", tasks=tasks), Environment(family, tasks=tasks)
    assert by_name.tasks == by_family.tasks == tasks
    assert by_name.batch_size == 3
    np.testing.assert_array_equal(by_name.reset(seed=0)[0], by_family.reset(seed=0)[0])
    with pytest.raises(ValueError, match=r"`tasks` must be given with the family 'pendulum-physics'"):
        Environment(family)
    with pytest.raises(TypeError, match="`tasks` need a family or an id"):
        Environment(CartPoleEnv, tasks=[{}])


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_a_family_without_a_horizon_is_never_truncated(kind):
    family = task_family("linear-system", horizon=None)
    environment = Environment(family, tasks=family.sample(1, 0), seed=0, vectorization_mode=kind)
    environment.reset()
    action = np.zeros((1, 1), np.float32)
    assert not any(environment.step(action)[3].any() for _ in range(250))
    env: Any = family.make(family.sample(1, 0)[0])
    assert env.spec.max_episode_steps is None


def test_tasks_of_gymnasiums_own_ids_are_arguments_of_a_loop():
    environment = Environment("Pendulum-v1", tasks=[{"g": 1.0}, {"g": 2.0}])
    assert not environment.is_native
    rows: Any = environment.env
    assert rows.get_attr("g") == (1.0, 2.0)
    with pytest.raises(TypeError, match=r"needs environments of `ssmrl/`; row 0 has no `set_task`"):
        environment.set_tasks([{"g": 1.0}] * 2)
    assert Environment(gymnasium.spec("ssmrl/Pendulum-v1"), tasks=[{"g": 1.0}]).is_native


def test_processes_know_our_ids(monkeypatch):
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr("gymnasium.vector.async_vector_env.multiprocessing", context)
    with Environment("pendulum-physics", tasks=[{"g": 5.0}], seed=0, vectorization_mode="async") as environment:
        native = Environment("pendulum-physics", tasks=[{"g": 5.0}], seed=0)
        np.testing.assert_array_equal(environment.reset()[0], native.reset()[0])
