"""Systems to be swung up under unknown physics, for `adaptive_control.py`: environments, costs, the true physics.

Letters: N streams, C candidates, D the size of an observation, A of an action.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from ssmrl.env_runner import derive_seed, make_with_physics
from ssmrl.env_runner.tasks.classic import NOMINAL_PHYSICS
from ssmrl.env_runner.tasks.swingup import SWINGUP_PHYSICS
from ssmrl.meta_rl import BoxActions

Physics = Mapping[str, float]

INSIDE = (0.0, 2.0)
"""|u| of the factors 1.5^u in training."""
OUTSIDE = (2.0, 3.0)
"""And where nothing was trained."""


@dataclass(frozen=True)
class System:
    """A system with a cost that is known, and physics that are not."""

    nominal: Physics
    make: Callable[..., gymnasium.Env[Any, Any]]
    """(physics, changes={step: physics}) -> environment."""
    actions: BoxActions
    cost: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(observation (C, D), action (C, A), next_observation) -> (C,), the negative of the reward."""
    true_step: Callable[..., tuple[Tensor, Tensor, Any]]
    """The physics themselves as a planner's `step`: params holds a parameter of the physics each, ()."""
    project: Callable[[Tensor], Tensor]
    """Brings a predicted observation to where observations can be."""

    def draw(self, seed: int, index: int, reach: tuple[float, float]) -> dict[str, float]:
        """Draw physics nominal · 1.5^u, |u| uniform in `reach`, a factor and a sign for every parameter."""
        generator = np.random.default_rng(derive_seed(seed, index))
        signs = generator.choice([-1.0, 1.0], len(self.nominal))
        sizes = generator.uniform(*reach, len(self.nominal))
        factors = 1.5 ** (signs * sizes)
        return {
            name: value * float(factor) for (name, value), factor in zip(self.nominal.items(), factors, strict=True)
        }

    def params(self, tasks: Sequence[Physics]) -> dict[str, Tensor]:
        """Return the physics of N streams as `true_step` has them, (N,) each."""
        return {name: torch.tensor([task[name] for task in tasks]) for name in self.nominal}


def on_circle(cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Bring a cosine and a sine to length 1."""
    length = torch.sqrt(cosine.square() + sine.square()).clamp_min(1e-6)
    return cosine / length, sine / length


# The pendulum


def pendulum_cost(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """θ² + 0.1 θ'² + 0.001 u²."""
    cosine, sine, speed = observation.unbind(-1)
    return torch.atan2(sine, cosine).square() + 0.1 * speed.square() + 0.001 * action[:, 0].square()


def pendulum_step(params: Mapping[str, Tensor], hidden: Any, observation: Tensor, action: Tensor) -> Any:
    """θ'' = 3 g sin θ / (2 l) + 3 u / (m l²), semi-implicit Euler of 0.05 s."""
    cosine, sine, speed = observation.unbind(-1)
    g, m, length = params["g"], params["m"], params["l"]
    turn = 3 * g / (2 * length) * sine + 3 / (m * length.square()) * action[:, 0]
    after = (speed + 0.05 * turn).clamp(-8.0, 8.0)
    angle = torch.atan2(sine, cosine) + 0.05 * after
    following = torch.stack([angle.cos(), angle.sin(), after], -1)
    return pendulum_cost(observation, action, following), following, ()


def pendulum_project(observation: Tensor) -> Tensor:
    """Angle on the circle, speed within Gymnasium's limits."""
    cosine, sine, speed = observation.unbind(-1)
    return torch.stack([*on_circle(cosine, sine), speed.clamp(-8.0, 8.0)], -1)


# The cart-pole


def cartpole_cost(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """Return the negative of the reward of `ssmrl/CartPoleSwingUp-v0`."""
    x, _, cosine, _, omega = following.unbind(-1)
    centered, slow = ((1 + torch.exp(-math.log(10) * z.square())) / 2 for z in (x / 2, omega / 5))
    return -(1 + cosine) / 2 * centered * slow * (5 - action[:, 0].square()) / 5


def cartpole_step(params: Mapping[str, Tensor], hidden: Any, observation: Tensor, action: Tensor) -> Any:
    """The equations of `ssmrl.env_runner.tasks.cartpole` in PyTorch, five steps of 0.01 s."""
    x, v, cosine, sine, omega = observation.unbind(-1)
    angle = torch.atan2(sine, cosine)
    gravity, cart, pole, length = (params[name] for name in ("gravity", "masscart", "masspole", "length"))
    total, moment = cart + pole, pole * length
    for _ in range(5):
        cosine, sine = angle.cos(), angle.sin()
        push = (10.0 * action[:, 0] + moment * omega.square() * sine) / total
        turn = (gravity * sine - cosine * push) / (length * (4 / 3 - pole * cosine.square() / total))
        v = v + 0.01 * (push - moment * turn * cosine / total)
        omega = omega + 0.01 * turn
        x = x + 0.01 * v
        angle = angle + 0.01 * omega
    following = torch.stack([x, v, angle.cos(), angle.sin(), omega], -1)
    return cartpole_cost(observation, action, following), following, ()


def cartpole_project(observation: Tensor) -> Tensor:
    """Angle on the circle."""
    x, v, cosine, sine, omega = observation.unbind(-1)
    return torch.stack([x, v, *on_circle(cosine, sine), omega], -1)


def make_swingup(physics: Physics, changes: Mapping[int, Physics] | None = None) -> gymnasium.Env[Any, Any]:
    """A cart-pole to be swung up, with physics that may change in mid-episode."""
    return gymnasium.make("ssmrl/CartPoleSwingUp-v0", **physics, changes=changes)


SYSTEMS = {
    "pendulum": System(
        NOMINAL_PHYSICS["Pendulum-v1"],
        partial(make_with_physics, "Pendulum-v1"),
        BoxActions([-2.0], [2.0]),
        pendulum_cost,
        pendulum_step,
        pendulum_project,
    ),
    "cartpole": System(
        SWINGUP_PHYSICS, make_swingup, BoxActions([-1.0], [1.0]), cartpole_cost, cartpole_step, cartpole_project
    ),
}
