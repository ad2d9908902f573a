"""A vector environment around a simulation of which every number is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box

from ssmrl.env_runner.batch import BatchedEnv
from ssmrl.env_runner.simulation import Transition


class Counters:
    """A row counts up by `task["by"]` from a start below 1; the reward is the action; terminated above `limit`."""

    def __init__(self, tasks: list[Any], limit: float = 1e9) -> None:
        self.limit, self.value = limit, np.zeros(len(tasks))
        self.single_observation_space = Box(-np.inf, np.inf, (1,), np.float64)
        self.single_action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.metadata: dict[str, Any] = {}
        self.set_tasks(tasks)

    def set_tasks(self, tasks):
        self.tasks = [dict(task) for task in tasks]
        self.by = np.array([task["by"] for task in tasks], np.float64)

    def begin(self, rows, generators, options):
        self.value[rows] = [options.get("start", generators[row].uniform()) for row in rows]
        return {"start": self.value[rows].copy()}

    def advance(self, actions, rows):
        self.value = self.value + (self.by if rows is None else self.by * rows)
        return Transition(actions[:, 0].astype(np.float64), self.value > self.limit, {"value": self.value.copy()})

    def observe(self):
        return self.value[:, None].copy()

    def save(self):
        return {"value": self.value.copy()}

    def restore(self, state):
        self.value = state["value"].copy()


def make(rows=3, *, limit=1e9, **kwargs):
    return BatchedEnv(Counters([{"by": 1.0 + row} for row in range(rows)], limit), **kwargs)


ACTIONS = np.array([[0.25], [0.5], [1.0]], np.float32)


def test_a_step_is_that_of_the_simulation():
    env = make()
    first, info = env.reset(seed=[7, 8, 9])
    np.testing.assert_array_equal(info["start"], first[:, 0])
    observation, reward, terminated, truncated, info = env.step(ACTIONS)
    np.testing.assert_array_equal(observation[:, 0], first[:, 0] + [1, 2, 3])
    assert reward.tolist() == [0.25, 0.5, 1.0]
    assert terminated.tolist() == truncated.tolist() == [False] * 3
    assert info["_value"].tolist() == [True] * 3


def test_next_step_autoreset_ignores_an_action_and_gives_no_reward():
    env = make(limit=4.0)
    env.reset(seed=0)
    ends = [env.step(ACTIONS)[2].tolist() for _ in range(2)]
    assert ends == [[False, False, False], [False, True, True]]
    observation, reward, terminated, _, info = env.step(ACTIONS)
    assert reward.tolist() == [0.25, 0.0, 0.0]
    assert (observation[1:, 0] < 1).all()
    assert terminated.tolist() == [False] * 3
    assert info["_start"].tolist() == [False, True, True]
    assert info["_value"].tolist() == [True, False, False]


def test_same_step_autoreset_keeps_the_final_observation():
    env = make(limit=4.0, autoreset_mode="SameStep")
    env.reset(seed=0)
    before = env.step(ACTIONS)[0]
    observation, reward, terminated, _, info = env.step(ACTIONS)
    assert terminated.tolist() == [False, True, True]
    assert reward.tolist() == [0.25, 0.5, 1.0]
    assert info["final_obs"][0] is None
    np.testing.assert_array_equal(info["final_obs"][2], before[2] + 3)
    np.testing.assert_array_equal(info["final_info"]["value"][1:], before[1:, 0] + [2, 3])
    assert (observation[1:, 0] < 1).all()


def test_disabled_autoreset_waits_and_leaves_the_others_alone():
    env = make(limit=4.0, autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step(ACTIONS)
    last = env.step(ACTIONS)[0]
    with pytest.raises(ValueError, match="Row 1 has ended and must be reset before it is stepped"):
        env.step(ACTIONS)
    observation, info = env.reset(options={"reset_mask": np.array([False, True, True]), "start": 0.5})
    np.testing.assert_array_equal(observation[:, 0], [last[0, 0], 0.5, 0.5])
    assert info["_start"].tolist() == [False, True, True]
    assert env.step(ACTIONS)[0][1, 0] == 2.5


def test_truncation_counts_the_steps_of_each_episode():
    env = make(max_episode_steps=2, autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step(ACTIONS)
    assert env.step(ACTIONS)[3].all()
    env.reset(options={"reset_mask": np.array([True, True, True])})
    assert not env.step(ACTIONS)[3].any()


def test_an_integer_seeds_row_i_with_itself_plus_i_as_gymnasium_has_it():
    ours, theirs = make(), make()
    np.testing.assert_array_equal(ours.reset(seed=5)[0], theirs.reset(seed=[5, 6, 7])[0])
    assert (ours.reset()[0] != ours.reset(seed=5)[0]).all()


def test_a_mask_reseeds_its_rows_alone():
    env, other = make(), make()
    env.reset(seed=5)
    other.reset(seed=5)
    env.reset(seed=[1, 1, 1], options={"reset_mask": np.array([False, True, False])})
    after, untouched = env.reset()[0], other.reset()[0]
    assert after[0] == untouched[0]
    assert after[1] != untouched[1]


def test_saving_keeps_streams_elapsed_steps_and_rows_that_wait():
    env = make(limit=4.0, max_episode_steps=3)
    env.reset(seed=0)
    for _ in range(2):
        env.step(ACTIONS)
    state = env.save()
    expected = [env.step(ACTIONS)[:4] for _ in range(4)]
    fresh = make(limit=4.0, max_episode_steps=3)
    fresh.restore(state)
    for step in expected:
        for a, b in zip(step, fresh.step(ACTIONS)[:4], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: make().step(ACTIONS), "`reset` must be called before"),
        (lambda: make().reset(seed=[1]), "`seed` must be an integer or hold one per row, 3; got 1"),
        (lambda: make().reset(options={"reset_mask": np.array([True, False, True])}), "first `reset` must reset every"),
        (lambda: make().reset(options={"reset_mask": np.ones(3)}), r"must be Bool of shape \(3,\); got float64 \(3,\)"),
        (lambda: make().set_tasks([{"by": 1.0}]), "`tasks` must hold one task per row, 3; got 1"),
        (lambda: make().restore(make(2).save()), "`state` must be of 3 rows; got 2"),
        (lambda: make(max_episode_steps=0), "`max_episode_steps` must be at least 1; got 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
