"""Rows that are saved, restored, and given other tasks, natively and in a loop."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ssmrl.env_runner import Environment, changing, task_family


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_other_tasks_take_the_place_of_the_rows_own(kind):
    family = task_family("pendulum-physics")
    first, second = family.sample(2, seed=0), family.sample(2, seed=1)
    environment = Environment(family, tasks=first, seed=0, vectorization_mode=kind)
    fresh = Environment(family, tasks=second, seed=0, vectorization_mode=kind)
    environment.reset()
    environment.step(np.zeros((2, 1), np.float32))
    environment.set_tasks(second)
    with pytest.raises(ValueError, match="`reset` must be called before"):
        environment.step(np.zeros((2, 1), np.float32))
    np.testing.assert_array_equal(environment.reset(seed=5)[0], fresh.reset(seed=5)[0])
    action = np.full((2, 1), 1.5, np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(environment.step(action)[0], fresh.step(action)[0])
    assert environment.tasks == second
    with pytest.raises(ValueError, match="`tasks` must hold one task per row, 2; got 1"):
        environment.set_tasks(second[:1])
    with pytest.raises(TypeError, match="`set_tasks` needs an environment that was made with `tasks`"):
        Environment("Pendulum-v1").set_tasks([{}])


def test_only_rows_that_can_be_saved_are_saved(counting):
    with pytest.raises(TypeError, match=r"Row 0 must be an environment of `ssmrl/`"):
        Environment([counting(2)]).save()
    environment = Environment("CartPole-v1", 2, seed=0)
    environment.reset()
    state = environment.save()
    for other in (
        Environment("CartPole-v1", 3),
        Environment("Pendulum-v1", 2),
        Environment("CartPole-v1", 2, autoreset_mode="Disabled"),
        Environment("ssmrl/CartPole-v1", 2, vectorization_mode="sync"),
    ):
        with pytest.raises(ValueError, match=r"`state` must be of an environment like this one, .*; got \{'id'"):
            other.restore(state)
    with pytest.raises(ValueError, match=r"like this one, .*; got None"):
        environment.restore({})


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_a_state_survives_json_its_changes_too(kind):
    family = changing(task_family("pendulum-physics"), [3])
    tasks = family.sample(2, seed=0)
    environment = Environment(family, tasks=tasks, seed=0, vectorization_mode=kind)
    environment.reset()
    state = environment.save()
    again = json.loads(json.dumps(state["tasks"]))
    environment.set_tasks(again)
    assert environment.tasks == tasks


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_parameters_that_all_rows_share_stay_when_tasks_change(kind):
    environment = Environment("ssmrl/Pendulum-v1", tasks=[{"g": 5.0}] * 2, m=3.0, seed=0, vectorization_mode=kind)
    assert environment.reset()[1]["task"]["m"].tolist() == [3.0, 3.0]
    environment.set_tasks([{"g": 6.0}, {"m": 2.0}])
    task = environment.reset()[1]["task"]
    assert task["m"].tolist() == [3.0, 2.0]
    assert task["g"].tolist() == [6.0, 10.0]
    state = environment.save()
    environment.restore(state)
    assert environment.tasks == [{"g": 6.0}, {"m": 2.0}]


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_tasks_that_do_not_fit_change_nothing(kind):
    tasks = [{"g": 5.0}, {"g": 7.0}]
    environment = Environment("ssmrl/Pendulum-v1", tasks=tasks, seed=0, vectorization_mode=kind)
    with pytest.raises(ValueError, match=r"Row 1: `g` must be positive"):
        environment.set_tasks([{"g": 9.0}, {"g": -1.0}])
    assert environment.tasks == tasks
    assert environment.reset()[1]["task"]["g"].tolist() == [5.0, 7.0]
    tasks[0]["g"] = 99.0
    assert environment.tasks == [{"g": 5.0}, {"g": 7.0}]


def test_a_seed_that_waits_for_the_first_reset_is_saved():
    first, second = (Environment("pendulum-physics", tasks=[{"g": 5.0}], seed=0) for _ in range(2))
    second.restore(first.save())
    np.testing.assert_array_equal(first.reset()[0], second.reset()[0])
    first.set_tasks([{"g": 6.0}])
    second.restore(first.save())
    np.testing.assert_array_equal(first.reset()[0], second.reset()[0])
