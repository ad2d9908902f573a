"""Physics of a task: which numbers of the model it changes, and which it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium
import numpy as np
import pytest

from ssmrl.env_runner.robots.physics import FACTORS, actuator_mask, check_physics, model_fields, set_physics

mujoco = pytest.importorskip("mujoco")


@pytest.fixture(scope="module")
def model():
    env: Any = gymnasium.make("Hopper-v5")
    return env.unwrapped.model


def test_a_number_multiplies_the_whole_field(model):
    fields = model_fields(model, {"gravity": 0.5, "mass": 2.0}, ["gravity", "mass"])
    np.testing.assert_array_equal(fields["opt.gravity"], [0, 0, -9.81 / 2])
    np.testing.assert_array_equal(fields["body_mass"], 2 * model.body_mass)


def test_a_tuple_multiplies_rows_or_elements(model):
    by_row = model_fields(model, {"friction": (1, 2, 3, 4, 5)}, ["friction"])["geom_friction"]
    np.testing.assert_array_equal(by_row, model.geom_friction * np.arange(1, 6)[:, None])
    factors = tuple(range(1, 16))
    by_element = model_fields(model, {"inertia": factors}, ["inertia"])["body_inertia"]
    np.testing.assert_array_equal(by_element, model.body_inertia * np.reshape(factors, (5, 3)))


def test_what_is_not_in_the_physics_is_nominal_and_the_model_stays_as_it_is(model):
    before = model.dof_damping.copy()
    fields = model_fields(model, {}, [*FACTORS])
    assert fields.keys() == set(FACTORS.values())
    fields["dof_damping"][:] = 7
    np.testing.assert_array_equal(model.dof_damping, before)


def test_mujocos_derived_constants_follow(model):
    changed = copy.copy(model)
    set_physics(changed, model_fields(changed, {"mass": 3.0}, ["mass"]))
    np.testing.assert_allclose(changed.body_subtreemass[0], 3 * model.body_subtreemass[0])
    assert model.body_subtreemass[0] != changed.body_subtreemass[0]


def test_gravity_changes_how_a_robot_falls(model):
    heights = []
    for factor in (0.5, 1.0):
        changed = copy.copy(model)
        set_physics(changed, model_fields(changed, {"gravity": factor}, ["gravity"]))
        data = mujoco.MjData(changed)
        data.qpos[1] = 5.0
        mujoco.mj_step(changed, data, 100)
        heights.append(5.0 - data.qpos[1])
    assert heights[0] == pytest.approx(heights[1] / 2, rel=0.01)


def test_disabled_actuators():
    np.testing.assert_array_equal(actuator_mask(4, 2), [True, True, False, True])
    np.testing.assert_array_equal(actuator_mask(4, (0, 3)), [False, True, True, False])
    np.testing.assert_array_equal(actuator_mask(2, ()), [True, True])
    np.testing.assert_array_equal(actuator_mask(2, np.array([False, True])), [True, False])


@pytest.mark.parametrize(
    ("physics", "match"),
    [
        ({"wind": 1.0}, "has the parameters .*'gravity'.*; got 'wind'"),
        ({"mass": (1.0, 2.0)}, r"`mass` must be a number, or hold 5 of them; got shape \(2,\)"),
        ({"friction": -1.0}, "`friction` must be finite and at least 0; got -1.0"),
        ({"gravity": np.inf}, "`gravity` must be finite"),
        ({"disabled": 3}, "`disabled` must be from 0 to 2; got 3"),
        ({"disabled": 0.5}, "must be the number of an actuator"),
        ({"disabled": True}, "must be the number of an actuator"),
        ({"inertia": (1.0,) * 4}, r"hold 5 or 15 of them; got shape \(4,\)"),
    ],
)
def test_bad_physics_is_refused(model, physics, match):
    with pytest.raises(ValueError, match=match):
        check_physics(model, physics)
