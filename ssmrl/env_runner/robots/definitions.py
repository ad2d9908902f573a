"""Gymnasium's MuJoCo robots, versions 4 and 5: what they observe, are paid for and end at, for all rows at once.

Every function here does in the same order of operations for B rows what the class in `gymnasium.envs.mujoco` does for
one, so that the results are the same to the last bit. Settings have the names and defaults of that class's constructor.

Letters: B rows, D features of an observation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from numpy.typing import NDArray

from ssmrl.env_runner.robots.reward import Motion

__all__ = ["ROBOTS", "Robot", "robot"]

Array = NDArray[np.float64]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Robot:
    """One of Gymnasium's robots.

    Attributes:
        name, version: `HalfCheetah` and 5 are `HalfCheetah-v5`.
        fields: of MuJoCo's data, derived from its state, that are used here, contact forces apart.
        position: (B, 1) or (B, 2), that velocities are differences of.
        observe, healthy: (B, D) and Bool (B,).
        normal: whether noise on the first velocities is normal, instead of uniform.
    """

    name: str
    version: int
    fields: tuple[str, ...]
    position: Callable[[SimpleNamespace, Settings], Array]
    observe: Callable[[SimpleNamespace, Settings], Array]
    healthy: Callable[[SimpleNamespace, Settings], NDArray[np.bool_]]
    normal: bool = False

    @property
    def env_id(self) -> str:
        """Gymnasium's id."""
        return f"{self.name}-v{self.version}"

    def make(self, **settings: Any) -> Any:
        """Make Gymnasium's environment, without wrappers."""
        return self._class()(**settings)

    def settings(self, given: Settings) -> dict[str, Any]:
        """Return the constructor's arguments, those not given at their defaults."""
        parameters = inspect.signature(self._class()).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return {**defaults, **given}

    def _class(self) -> Any:
        entry_point = gymnasium.spec(self.env_id).entry_point
        return load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point

    def needs(self, settings: Settings, contact_cost: float) -> tuple[str, ...]:
        """Return the derived fields that these settings, and a reward with this cost of contacts, make use of."""
        observed = settings.get("include_cfrc_ext_in_observation", self.name == "Humanoid")
        used = observed or settings.get("use_contact_forces", False) or contact_cost
        return (*self.fields, "cfrc_ext") if used else self.fields

    def contact_cost(self, settings: Settings) -> float:
        """Return what Gymnasium's own reward charges for contacts."""
        charged = self.version == 5 or settings.get("use_contact_forces", False)
        return float(settings.get("contact_cost_weight", 0.0)) if charged else 0.0

    def motion(
        self, data: SimpleNamespace, settings: Settings, before: Array, actions: NDArray[Any], dt: float
    ) -> Motion:
        """Return what the rows did in a step of dt seconds, that began at the position `before`."""
        position = self.position(data, settings)
        if self.name == "Humanoid":
            control = np.sum(np.square(data.ctrl), axis=-1)
        else:
            control = np.sum(np.square(actions), axis=-1)
        forces = getattr(data, "cfrc_ext", None)
        if forces is None:
            contact = np.zeros(len(position))
        else:
            if self.name == "Ant":
                forces = np.clip(forces, *settings["contact_force_range"])
            contact = np.sum(np.square(forces.reshape(len(forces), -1)), axis=-1)
        velocity = (position - before) / dt
        return Motion(velocity, position, control, contact, self.healthy(data, settings))

    def reward(self, motion: Motion, settings: Settings) -> tuple[Array, dict[str, Array]]:
        """Return Gymnasium's own rewards (B,) and their parts."""
        forward = settings.get("forward_reward_weight", 1.0) * motion.velocity[:, 0]
        control = settings["ctrl_cost_weight"] * motion.control
        if self.name == "HalfCheetah":
            return forward - control, self._parts(forward, control)
        alive = motion.healthy
        if self.version == 4:
            alive = alive | settings["terminate_when_unhealthy"]
        survive = alive * settings["healthy_reward"]
        costs, contact = control, None
        if self.name == "Ant" and (self.version == 5 or settings["use_contact_forces"]):
            contact = settings["contact_cost_weight"] * motion.contact
            costs = control + contact
        elif self.name == "Humanoid" and self.version == 5:
            contact = np.clip(settings["contact_cost_weight"] * motion.contact, *settings["contact_cost_range"])
            costs = control + contact
        return (forward + survive) - costs, self._parts(forward, control, survive, contact)

    def _parts(
        self, forward: Array, control: Array, survive: Array | None = None, contact: Array | None = None
    ) -> dict[str, Array]:
        """Return the parts of Gymnasium's reward, by the names that its info has in this version."""
        if self.version == 5:
            parts = {"reward_forward": forward, "reward_ctrl": -control}
            more = {"reward_survive": survive, "reward_contact": None if contact is None else -contact}
            return parts | {name: part for name, part in more.items() if part is not None}
        if self.name == "HalfCheetah":
            return {"reward_run": forward, "reward_ctrl": -control}
        if survive is None or self.name in ("Hopper", "Walker2d"):
            return {}
        if self.name == "Ant":  # where it has contact forces, they take the place of the controls
            cost = control if contact is None else contact
            names: tuple[str, ...] = ("reward_forward", "reward_ctrl", "reward_survive", "forward_reward")
        else:
            cost, names = control, ("reward_linvel", "reward_quadctrl", "reward_alive", "forward_reward")
        return dict(zip(names, (forward, -cost, survive, forward.copy()), strict=True))

    def terminated(self, motion: Motion, settings: Settings) -> NDArray[np.bool_]:
        """Return Bool (B,)."""
        if not settings.get("terminate_when_unhealthy", False):
            return np.zeros_like(motion.healthy)
        return ~motion.healthy

    def info(self, data: SimpleNamespace, motion: Motion | None) -> dict[str, Array]:
        """Return where the rows are and, unless an episode begins, how fast."""
        plane = self.name in ("Ant", "Humanoid")
        if self.version == 5:
            place = data.qpos[:, :2] if plane else data.qpos[:, :1]
        elif motion is None:
            return {}
        else:
            place = motion.position
        info = {"x_position": place[:, 0].copy()}
        if plane:
            info["y_position"] = place[:, 1].copy()
            info["distance_from_origin"] = np.sqrt(np.sum(np.square(place), axis=-1))
        elif self.name != "HalfCheetah" and self.version == 5:
            info["z_distance_from_origin"] = data.qpos[:, 1] - data.init_qpos[1]
        if motion is not None:
            info["x_velocity"] = motion.velocity[:, 0].copy()
            if plane:
                info["y_velocity"] = motion.velocity[:, 1].copy()
        if self.env_id == "Humanoid-v5":
            info |= {"tendon_length": data.ten_length.copy(), "tendon_velocity": data.ten_velocity.copy()}
        return info


def _x(data: SimpleNamespace, settings: Settings) -> Array:
    position: Array = data.qpos[:, :1].copy()
    return position


def _torso(data: SimpleNamespace, settings: Settings) -> Array:
    position: Array = data.xpos[:, settings.get("main_body", 1), :2].copy()
    return position


def _center_of_mass(data: SimpleNamespace, settings: Settings) -> Array:
    center: Array = np.einsum("ib,ibj->ij", data.mass, data.xipos) / data.mass.sum(axis=-1)[:, None]
    return center[:, :2].copy()


def _parts(data: SimpleNamespace, settings: Settings, skipped: int, clip: bool = False) -> list[Array]:
    qpos, qvel = data.qpos, data.qvel
    if settings["exclude_current_positions_from_observation"]:
        qpos = qpos[:, skipped:]
    return [qpos, np.clip(qvel, -10, 10) if clip else qvel]


def _observe_cheetah(data: SimpleNamespace, settings: Settings) -> Array:
    return np.concatenate(_parts(data, settings, 1), axis=1)


def _observe_planar(data: SimpleNamespace, settings: Settings) -> Array:
    return np.concatenate(_parts(data, settings, 1, clip=True), axis=1)


def _observe_ant(data: SimpleNamespace, settings: Settings) -> Array:
    parts = _parts(data, settings, 2)
    if settings.get("include_cfrc_ext_in_observation", False):
        parts.append(np.clip(data.cfrc_ext[:, 1:], *settings["contact_force_range"]).reshape(len(data.qpos), -1))
    elif settings.get("use_contact_forces", False):
        parts.append(np.clip(data.cfrc_ext, *settings["contact_force_range"]).reshape(len(data.qpos), -1))
    return np.concatenate(parts, axis=1)


def _observe_humanoid(data: SimpleNamespace, settings: Settings) -> Array:
    parts, rows = _parts(data, settings, 2), len(data.qpos)
    first = 0 if "include_cinert_in_observation" not in settings else 1
    for name in ("cinert", "cvel"):
        if settings.get(f"include_{name}_in_observation", True):
            parts.append(getattr(data, name)[:, first:].reshape(rows, -1))
    if settings.get("include_qfrc_actuator_in_observation", True):
        parts.append(data.qfrc_actuator[:, 6 * first :])
    if settings.get("include_cfrc_ext_in_observation", True):
        parts.append(data.cfrc_ext[:, first:].reshape(rows, -1))
    return np.concatenate(parts, axis=1)


def _always(data: SimpleNamespace, settings: Settings) -> NDArray[np.bool_]:
    return np.ones(len(data.qpos), np.bool_)


def _between(value: Array, bounds: tuple[float, float]) -> NDArray[np.bool_]:
    return (bounds[0] < value) & (value < bounds[1])


def _upright(data: SimpleNamespace, settings: Settings) -> NDArray[np.bool_]:
    z, angle = data.qpos[:, 1], data.qpos[:, 2]
    return _between(z, settings["healthy_z_range"]) & _between(angle, settings["healthy_angle_range"])


def _upright_hopper(data: SimpleNamespace, settings: Settings) -> NDArray[np.bool_]:
    state = np.concatenate((data.qpos[:, 2:], data.qvel), axis=1)
    return _upright(data, settings) & _between(state, settings["healthy_state_range"]).all(axis=1)


def _ant_stands(data: SimpleNamespace, settings: Settings) -> NDArray[np.bool_]:
    low, high = settings["healthy_z_range"]
    finite = np.isfinite(data.qpos).all(axis=1) & np.isfinite(data.qvel).all(axis=1)
    stands: NDArray[np.bool_] = finite & (low <= data.qpos[:, 2]) & (data.qpos[:, 2] <= high)
    return stands


def _humanoid_stands(data: SimpleNamespace, settings: Settings) -> NDArray[np.bool_]:
    return _between(data.qpos[:, 2], settings["healthy_z_range"])


def _all_robots() -> dict[str, Robot]:
    robots = []
    for version in (4, 5):
        humanoid = ("xipos", "cinert", "cvel", "qfrc_actuator")
        tendons = ("ten_length", "ten_velocity") if version == 5 else ()
        robots += [
            Robot("HalfCheetah", version, (), _x, _observe_cheetah, _always, normal=True),
            Robot("Hopper", version, (), _x, _observe_planar, _upright_hopper),
            Robot("Walker2d", version, (), _x, _observe_planar, _upright),
            Robot("Ant", version, ("xpos",), _torso, _observe_ant, _ant_stands, normal=True),
            Robot("Humanoid", version, (*humanoid, *tendons), _center_of_mass, _observe_humanoid, _humanoid_stands),
        ]
    return {robot.env_id: robot for robot in robots}


ROBOTS = _all_robots()
"""By Gymnasium's id."""


def robot(env_id: str) -> Robot:
    """Return the robot of Gymnasium's id, or raise ValueError."""
    if env_id not in ROBOTS:
        raise ValueError(f"`env_id` must be one of {[*ROBOTS]}; got {env_id!r}.")
    return ROBOTS[env_id]
