"""The physics of a task: factors on fields of a MuJoCo model, and actuators without effect.

Letters: B rows, A actuators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import mujoco

__all__ = ["FACTORS", "PHYSICS", "actuator_mask", "check_physics", "model_fields", "set_physics"]

FACTORS: dict[str, str] = {
    "gravity": "opt.gravity",
    "mass": "body_mass",
    "inertia": "body_inertia",
    "damping": "dof_damping",
    "friction": "geom_friction",
}
"""Of every parameter that is a factor: the field of MuJoCo's model that it multiplies. A number multiplies all of it; a
tuple holds one for each body, degree of freedom or geom, or for each element of the field, row by row."""

PHYSICS = (*FACTORS, "disabled")
"""All parameters of a robot's physics. `disabled`: the number of an actuator, or a tuple, whose control is 0; or
Bool, one of each actuator."""


def check_physics(model: mujoco.MjModel, physics: Mapping[str, Any]) -> None:
    """Raise ValueError where `physics` has a name, a shape or a value that this model does not take."""
    for name, value in physics.items():
        if name not in PHYSICS:
            raise ValueError(f"A robot's physics has the parameters {[*PHYSICS]}; got {name!r}.")
        if name == "disabled":
            actuator_mask(model.nu, value)
        else:
            _factor(name, value, _field(model, FACTORS[name]))


def model_fields(model: mujoco.MjModel, physics: Mapping[str, Any], names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return the fields that these parameters multiply, as this physics has them; those not in it are the model's own.

    `model` is the unchanged one: factors do not accumulate.
    """
    fields = {}
    for name in names:
        nominal = _field(model, FACTORS[name])
        fields[FACTORS[name]] = nominal * _factor(name, physics[name], nominal) if name in physics else nominal.copy()
    return fields


def set_physics(model: mujoco.MjModel, fields: Mapping[str, NDArray[Any]]) -> None:
    """Write the fields into a model, and what MuJoCo derives from them."""
    import mujoco

    for name, value in fields.items():
        target = model.opt if name.startswith("opt.") else model
        getattr(target, name.removeprefix("opt."))[:] = value
    if fields:
        mujoco.mj_setConst(model, mujoco.MjData(model))


def actuator_mask(num_actuators: int, disabled: Any) -> NDArray[np.bool_]:
    """Return Bool (A,), False where the actuator is disabled."""
    if np.shape(disabled) == (num_actuators,) and np.asarray(disabled).dtype == np.bool_:
        return ~np.asarray(disabled)
    mask = np.ones(num_actuators, np.bool_)
    for index in np.atleast_1d(np.asarray(disabled, dtype=object)):
        if isinstance(index, (bool, np.bool_)) or not isinstance(index, (int, np.integer)):
            raise ValueError(f"`disabled` must be the number of an actuator, or a tuple of them; got {disabled!r}.")
        if not 0 <= index < num_actuators:
            raise ValueError(f"`disabled` must be from 0 to {num_actuators - 1}; got {disabled!r}.")
        mask[index] = False
    return mask


def _field(model: mujoco.MjModel, name: str) -> NDArray[Any]:
    target = model.opt if name.startswith("opt.") else model
    field: NDArray[Any] = getattr(target, name.removeprefix("opt."))
    return field


def _factor(name: str, value: Any, field: NDArray[Any]) -> NDArray[Any]:
    """Return the factor in a shape that broadcasts against the field."""
    try:
        factor = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be a number or hold numbers; got {value!r}.") from None
    if factor.shape == field.shape[:1]:
        factor = factor.reshape(-1, *[1] * (field.ndim - 1))
    elif factor.shape == (field.size,) or factor.shape == field.shape:
        factor = factor.reshape(field.shape)
    elif factor.ndim:
        sizes = " or ".join(str(n) for n in sorted({field.shape[0], field.size}))
        raise ValueError(f"`{name}` must be a number, or hold {sizes} of them; got shape {factor.shape}.")
    if not (np.isfinite(factor) & (factor >= 0)).all():
        raise ValueError(f"`{name}` must be finite and at least 0; got {value}.")
    return factor
