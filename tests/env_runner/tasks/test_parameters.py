from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ssmrl.env_runner.tasks.parameters import FINITE, POSITIVE, UNIT_INTERVAL, Parameter, Parameters

KNOWN = {"mass": Parameter(2.0, POSITIVE), "goal": Parameter((0.0, 1.0), FINITE), "p": Parameter(0.5, UNIT_INTERVAL)}
CHANGES = {2: {"mass": 3.0}, 4: {"goal": (5.0, 6.0)}}


def values(parameters: Parameters) -> dict[str, Any]:
    return {name: value.tolist() for name, value in parameters.values.items()}


def test_values_are_the_tasks_or_the_defaults():
    parameters = Parameters(KNOWN, [{"mass": 7}, {"goal": [3, 4], "p": 1}])
    assert values(parameters) == {"mass": [7, 2], "goal": [[0, 1], [3, 4]], "p": [0.5, 1]}
    assert all(value.dtype == np.float64 for value in parameters.values.values())


def test_changes_hold_from_their_step_on_and_leave_what_they_do_not_name():
    parameters = Parameters(KNOWN, [{"changes": CHANGES}, {}])
    changed = [parameters.advance(None).tolist() for _ in range(5)]
    assert changed == [[], [0], [], [0], []]
    assert values(parameters)["mass"] == [3, 2]
    assert values(parameters)["goal"] == [[5, 6], [0, 1]]


def test_only_rows_that_step_are_counted():
    parameters = Parameters(KNOWN, [{"changes": CHANGES}, {"changes": CHANGES}])
    parameters.advance(None)
    assert parameters.advance(np.array([False, True])).tolist() == [1]
    assert values(parameters)["mass"] == [2, 3]
    assert parameters.steps.tolist() == [1, 2]


@pytest.mark.parametrize(("per_episode", "mass"), [(False, 3), (True, 2)])
def test_an_episode_begins_with_the_first_values_where_steps_are_counted_in_episodes(per_episode, mass):
    parameters = Parameters(KNOWN, [{"changes": CHANGES}], per_episode=per_episode)
    for _ in range(2):
        parameters.advance(None)
    assert parameters.begin(np.arange(1)).tolist() == [0] * per_episode
    assert values(parameters)["mass"] == [mass]


def test_going_to_a_step_is_having_made_it():
    walked, gone = (Parameters(KNOWN, [{"changes": CHANGES}, {}]) for _ in range(2))
    for _ in range(3):
        walked.advance(None)
    gone.advance(None)
    gone.go_to([3, 3])
    assert values(walked) == values(gone)
    assert walked.advance(None).tolist() == gone.advance(None).tolist() == [0]
    gone.go_to([0, 0])
    assert values(gone)["mass"] == [2, 2]


def test_reports_are_copies_of_some_rows():
    parameters = Parameters(KNOWN, [{"mass": m} for m in (1, 2, 3)])
    report = parameters.report(np.array([2, 0]))
    assert report["mass"].tolist() == [3, 1]
    parameters.report(slice(None))["mass"][:] = 9
    assert values(parameters)["mass"] == [1, 2, 3]


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ({"weight": 1}, ValueError, r"^A task of this environment has the parameters \['mass', 'goal', 'p'\]; got 'w"),
        ({"mass": 0}, ValueError, "^`mass` must be positive and finite; got 0"),
        ({"mass": np.inf}, ValueError, "^`mass` must be positive and finite; got inf"),
        ({"goal": (0, np.nan)}, ValueError, "^`goal` must be finite; got"),
        ({"goal": (0, 1, 2)}, ValueError, r"^`goal` must have shape \(2,\); got \(3,\)"),
        ({"p": 1.1}, ValueError, r"^`p` must be in \[0, 1\]; got 1.1"),
        ({"p": "much"}, TypeError, r"^`p` must be numbers of shape \(\); got 'much'"),
        ({"goal": ((1, 2), (3,))}, TypeError, r"^`goal` must be numbers of shape \(2,\); got"),
        ({"changes": {3: {"mass": -1}}}, ValueError, r"^`changes\[3\]`: `mass` must be positive"),
        ({"changes": {0: {"mass": 1}}}, ValueError, r"`changes.keys\(\)` must be at least 1; got 0"),
    ],
)
def test_bad_tasks_are_refused(task, error, message):
    with pytest.raises(error, match=message):
        Parameters(KNOWN, [task])


def test_an_error_names_the_row():
    with pytest.raises(ValueError, match=r"^Row 1: `mass` must be positive and finite; got -1"):
        Parameters(KNOWN, [{}, {"mass": -1}])
    with pytest.raises(ValueError, match=r"^Row 2: `changes\[5\]`: A task .* got 'weight'"):
        Parameters(KNOWN, [{}, {}, {"changes": {5: {"weight": 1}}}])
