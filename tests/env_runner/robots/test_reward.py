"""Rewards of robots' tasks, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ssmrl.env_runner.robots.reward import Angle, Direction, Goal, Motion, Reward, Velocity, check_reward_task


def motion(
    velocity, *, position=((0.0, 0.0), (3.0, -1.0)), control=(2.0, 4.0), contact=(10.0, 0.0), healthy=(True, False)
):
    return Motion(*(np.array(x) for x in (velocity, position, control, contact, healthy)))


PLANE = motion([[1.0, 2.0], [-3.0, 0.5]])


@pytest.mark.parametrize(
    ("forward", "task", "expected"),
    [
        (Velocity(), {"velocity": np.array([1.5, 1.0])}, [-0.5, -4.0]),
        (Direction(), {"direction": np.array([1.0, -1.0])}, [1.0, 3.0]),
        (Angle(), {"angle": np.array([np.pi / 2, np.pi])}, [2.0, 3.0]),
        (Goal(), {"goal": np.array([[1.0, -1.0], [0.0, 0.0]])}, [-2.0, -4.0]),
    ],
)
def test_the_part_that_depends_on_the_task(forward, task, expected):
    np.testing.assert_allclose(forward(task, PLANE), expected, atol=1e-12)


def test_every_weight_counts_once():
    reward = Reward(
        Direction(), scale=3.0, bonus=5.0, alive=7.0, control_cost=0.5, contact_cost=0.1, contact_limit=0.75
    )
    total, parts = reward({"direction": np.array([1.0, 1.0])}, PLANE)
    # 3 · v_x + 5 + 7 · healthy - 0.5 · ‖a‖² - min(0.1 · ‖f‖², 0.75)
    np.testing.assert_allclose(total, [3.0 + 5 + 7 - 1 - 0.75, -9.0 + 5 - 2])
    np.testing.assert_allclose(sum(parts.values()), total)
    assert parts.keys() == {"reward_forward", "reward_survive", "reward_ctrl", "reward_contact"}


@pytest.mark.parametrize(
    ("forward", "task", "match"),
    [
        (Velocity(), {}, r"A task of velocity must have 'velocity'; got \[\]"),
        (Velocity(), {"velocity": np.nan}, "`velocity` must be finite"),
        (Goal(), {"goal": 1.0}, r"`goal` must be finite, of shape \(2,\); got 1.0"),
    ],
)
def test_a_task_that_does_not_fit_the_reward_is_refused(forward, task, match):
    with pytest.raises(ValueError, match=match):
        check_reward_task(forward, task)
