"""When tasks change: counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmrl.env_runner.schedule import Schedule

CHANGES = [{2: {"g": 1.0}, 4: {"m": 2.0, "g": 3.0}}, None, {3: {"g": 5.0}}]


def test_every_row_changes_when_its_own_steps_are_made():
    schedule = Schedule(CHANGES)
    changed = [schedule.advance(None).tolist() for _ in range(5)]
    assert changed == [[], [0], [2], [0], []]
    assert [schedule.values(row) for row in range(3)] == [{"g": 3.0, "m": 2.0}, {}, {"g": 5.0}]


def test_rows_that_do_not_step_are_not_counted():
    schedule = Schedule(CHANGES)
    only_last = np.array([False, False, True])
    assert [schedule.advance(only_last).tolist() for _ in range(3)] == [[], [], [2]]
    assert schedule.steps.tolist() == [0, 0, 3]
    assert schedule.values(0) == {}


@pytest.mark.parametrize("per_episode", [False, True])
def test_an_episode_begins_with_the_first_values_where_steps_are_counted_in_it(per_episode):
    schedule = Schedule(CHANGES, per_episode=per_episode)
    for _ in range(3):
        schedule.advance(None)
    back = schedule.begin(np.array([0, 1]))
    assert back.tolist() == ([0] if per_episode else [])
    assert schedule.values(0) == ({} if per_episode else {"g": 1.0})
    assert schedule.values(2) == {"g": 5.0}
    again = [schedule.advance(None).tolist() for _ in range(2)]
    assert again == ([[], [0]] if per_episode else [[0], []])


@given(st.integers(0, 6))
def test_the_number_of_steps_is_all_there_is_to_save(steps):
    counted, told = Schedule(CHANGES), Schedule(CHANGES)
    for _ in range(steps):
        counted.advance(None)
    told.go_to(np.arange(3), counted.steps)
    assert [told.values(row) for row in range(3)] == [counted.values(row) for row in range(3)]
    assert told.advance(None).tolist() == counted.advance(None).tolist()


@pytest.mark.parametrize(("step", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_changes_come_after_a_whole_number_of_steps(step, error):
    with pytest.raises(error, match=r"`changes.keys\(\)` must be"):
        Schedule([{step: {"g": 1.0}}])
