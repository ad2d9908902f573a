"""Tasks of robots that do not fit."""

from __future__ import annotations

import pytest

from ssmrl.env_runner import Environment
from ssmrl.env_runner.robots import RobotEnv

pytest.importorskip("mujoco.batch")


@pytest.mark.parametrize(
    ("task", "match"),
    [
        ({"velocity": 1.0}, r"has the parameters \[.*\]; got 'velocity'"),
        ({"mass": -1.0}, "`mass` must be finite and at least 0"),
        ({"changes": {0: {"mass": 2.0}}}, "must be at least 1"),
        ({"changes": {5: {"wind": 2.0}}}, "got 'wind'"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(task, match):
    with pytest.raises(ValueError, match=match):
        RobotEnv("Hopper-v5", task=task)
    with pytest.raises(ValueError, match=match):
        Environment("ssmrl/Hopper-v5", tasks=[{}, task])
    with pytest.raises(ValueError, match=match):
        Environment("ssmrl/Hopper-v5", tasks=[{}, task], vectorization_mode="sync")
