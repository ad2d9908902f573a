"""What all families keep: tasks from a seed, splits without a leak, names, and errors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmrl.env_runner import Environment, changing, family_names, task_family
from ssmrl.env_runner.tasks.family import TaskFamily, of_two_sets

FAMILIES = family_names()
# Published with the same few tasks in training and test.
SAME_IN_BOTH = {"halfcheetah-dir", "ant-dir"}


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    few=st.integers(0, 4),
    more=st.integers(0, 4),
    split=st.sampled_from(["train", "test"]),
)
def test_more_tasks_of_a_seed_are_the_same_ones_and_some(name, seed, few, more, split):
    family = task_family(name)
    tasks = family.sample(few + more, seed, split)
    assert family.sample(few, seed, split) == tasks[:few]
    assert family.sample(few + more, seed, split) == tasks


@pytest.mark.parametrize("name", FAMILIES)
def test_no_test_task_is_a_training_task(name):
    family = task_family(name)
    keys = [{json.dumps(t, sort_keys=True) for t in family.sample(60, 0, split)} for split in ("train", "test")]
    if name in SAME_IN_BOTH:
        assert keys[0] == keys[1]
        assert len(keys[0]) == 2
    else:
        assert not keys[0] & keys[1]


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in SAME_IN_BOTH])
def test_other_seeds_give_other_tasks(name):
    family = task_family(name)
    assert family.sample(8, 0) != family.sample(8, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_says_where_it_is_from_and_bears_its_own_name(name):
    family = task_family(name)
    assert family.name == name
    assert family.source
    assert family.env_id.startswith("ssmrl/")


def test_changing_tasks_turn_into_others_of_the_family():
    family = changing(task_family("pendulum-physics"), [3, 7])
    first, second = family.sample(2, seed=0)
    assert [*first["changes"]] == [3, 7]
    values = [first["g"], *(change["g"] for change in first["changes"].values()), second["g"]]
    assert len(set(values)) == 4
    assert family.name == "pendulum-physics-changing"
    environment = Environment(family, tasks=[first, second], seed=0, max_episode_steps=100)
    _, info = environment.reset()
    seen = [info["task"]["g"][0]]
    for _ in range(8):
        *_, info = environment.step(np.zeros((2, 1), np.float32))
        if "task" in info:
            seen.append(info["task"]["g"][0])
    assert seen == values[:3]


def test_what_cannot_change_is_refused():
    family = task_family("pendulum-physics")
    with pytest.raises(ValueError, match="`steps` must be at least 1; got 0"):
        changing(family, [0])
    with pytest.raises(TypeError, match=r"`family` must be a TaskFamily, .*; got 'pendulum-physics'"):
        changing("pendulum-physics", [3])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not change already, as those of 'pendulum-physics-changing' do"):
        changing(changing(family, [3]), [5])


def test_settings_are_shared_by_all_tasks():
    family = task_family("bandit").with_settings(horizon=4, arms=3)
    env: Any = family.make({})
    assert env.spec.max_episode_steps == 4
    assert env.action_space.n == 3
    assert family.with_settings(arms=2).horizon == 4


def test_other_settings_leave_the_tasks_and_no_reference():
    family = task_family("bandit")
    assert None not in (family.task_blind_return, family.oracle_return)
    other = family.with_settings(horizon=50)
    assert (other.task_blind_return, other.oracle_return) == (None, None)
    assert other.sample(3, 0) == family.sample(3, 0)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"horizon": 0}, ValueError, "`horizon` must be at least 1; got 0"),
        ({"horizon": 1.5}, TypeError, "`horizon` must be an integer; got 1.5"),
        ({"max_episode_steps": 50}, ValueError, "`max_episode_steps` must not be .*: give its `horizon` .* got 50"),
    ],
)
def test_settings_that_a_family_cannot_have_are_refused(settings, error, match):
    family = task_family("pendulum-physics")
    with pytest.raises(error, match=match):
        family.with_settings(**settings)
    horizon = settings.pop("horizon", None)
    with pytest.raises(error, match=match):
        TaskFamily(family.name, family.env_id, family.draw, horizon, settings)


def test_two_sets_are_drawn_from_evenly():
    family = TaskFamily("two", "ssmrl/none", of_two_sets([{"a": 1}, {"a": 2}], [{"a": 3}]), None)
    drawn = [task["a"] for task in family.sample(2000, 0)]
    assert np.mean(np.equal(drawn, 1)) == pytest.approx(0.5, abs=0.05)
    assert set(drawn) == {1, 2}
    assert {task["a"] for task in family.sample(20, 0, "test")} == {3}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_tasks": -1, "seed": 0}, "`num_tasks` must be at least 0; got -1"),
        ({"num_tasks": 1, "seed": -1}, "`seed` must be at least 0"),
        ({"num_tasks": 1, "seed": 0, "split": "dev"}, r"`split` must be one of \['train', 'test'\]; got 'dev'"),
    ],
)
def test_sampling_refuses_what_it_cannot_do(arguments, match):
    with pytest.raises(ValueError, match=match):
        task_family("pendulum-physics").sample(**arguments)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match=r"`name` must be one of .*'ant-dir'.*; got 'ant-flight'"):
        task_family("ant-flight")
