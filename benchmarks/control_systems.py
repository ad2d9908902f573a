"""Systems to be controlled under unknown physics, for `adaptive_control.py`: tasks, environments, costs, true physics.

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

from ssmrl.env_runner import Environment, derive_seed, make_with_physics
from ssmrl.env_runner.tasks import NOMINAL_PHYSICS, disabled, one_parameter
from ssmrl.env_runner.tasks.swingup import SWINGUP_PHYSICS
from ssmrl.meta_rl import BoxActions

Task = dict[str, Any]

SPLITS = {"train": (0.0, 2.0), "test": (2.0, 3.0)}
"""|u| of the factors 1.5^u on classic physics, in training and where nothing was trained."""


@dataclass(frozen=True)
class System:
    """A system with a cost that is known, and physics that are not."""

    draw: Callable[[np.random.Generator, str], Task]
    """(generator, "train" or "test") -> physics in the range of the training, or outside of it."""
    environment: Callable[..., Environment]
    """(tasks, changes, episode, seed): an environment of N tasks; changes holds {step: task} or None for each."""
    actions: BoxActions
    cost: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(observation (C, D), action (C, A), next_observation) -> (C,), close to the negative of the reward."""
    project: Callable[[Tensor], Tensor]
    """Brings a predicted observation to where observations can be."""
    true_step: Callable[..., tuple[Tensor, Tensor, Any]] | None = None
    """The physics themselves as a planner's `step`: params holds a parameter of the physics each, (). None: too slow to
    plan with."""
    gains: bool = False
    """Whether the actuators may fail: models then have a gain for every one of them."""
    filmed: Callable[..., Environment] | None = None
    """(task, episode, seed, folder, title): an environment of one task that makes a video of its first episode."""

    def task(self, seed: int, index: int, split: str) -> Task:
        """Draw a task."""
        return self.draw(np.random.default_rng(derive_seed(seed, index)), split)

    def params(self, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """Return the physics of N streams as `true_step` has them, (N,) each."""
        return {name: torch.tensor([task[name] for task in tasks]) for name in tasks[0]}


def classic_task(nominal: Mapping[str, float], generator: np.random.Generator, split: str) -> Task:
    """Draw physics nominal · 1.5^u, with a sign of u and |u| uniform in SPLITS for every parameter."""
    signs = generator.choice([-1.0, 1.0], len(nominal))
    factors = 1.5 ** (signs * generator.uniform(*SPLITS[split], len(nominal)))
    return {name: value * float(factor) for (name, value), factor in zip(nominal.items(), factors, strict=True)}


def classic_environment(
    make: Callable[..., gymnasium.Env[Any, Any]], tasks: Sequence[Task], changes: Sequence[Any], episode: int, seed: int
) -> Environment:
    """`make(physics, changes=...)` makes one."""
    makers = [partial(make, task, changes=change) for task, change in zip(tasks, changes, strict=True)]
    return Environment(makers, seed=seed, max_episode_steps=episode, autoreset_mode="Disabled")


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


def make_swingup(physics: Task, changes: Mapping[int, Task] | None = None) -> gymnasium.Env[Any, Any]:
    """A cart-pole to be swung up, with physics that may change in mid-episode."""
    return gymnasium.make("ssmrl/CartPoleSwingUp-v0", **physics, changes=changes)


# Robots


ROBOTS = {
    "HalfCheetah": {},
    "Ant": {"terminate_when_unhealthy": False, "include_cfrc_ext_in_observation": False},
}
"""Settings of Gymnasium's environments: an ant that has fallen goes on."""


def robot_environment(name: str, tasks: Sequence[Task], changes: Sequence[Any], episode: int, seed: int) -> Environment:
    """An environment of Gymnasium's robot, all rows in one simulation on one thread."""
    return Environment(
        f"ssmrl/{name}-v5",
        tasks=[
            task if change is None else {**task, "changes": change} for task, change in zip(tasks, changes, strict=True)
        ],
        seed=seed,
        max_episode_steps=episode,
        autoreset_mode="Disabled",
        num_threads=1,
        **ROBOTS[name],
    )


def filmed_robot(name: str, task: Task, episode: int, seed: int, folder: str, title: str) -> Environment:
    """The environment of one robot, which films itself; it needs moviepy, and a machine that renders MuJoCo."""

    def make() -> gymnasium.Env[Any, Any]:
        picture = {"render_mode": "rgb_array", "width": 240, "height": 240}
        picture["camera_name"] = "track"  # which follows the robot
        env = gymnasium.make(f"ssmrl/{name}-v5", **picture, **ROBOTS[name], **task)
        return gymnasium.wrappers.RecordVideo(env, folder, name_prefix=title, episode_trigger=lambda n: n == 0)

    return Environment([make], seed=seed, max_episode_steps=episode, autoreset_mode="Disabled")


LIMIT = 40.0
"""No position or velocity of a robot is seen beyond ±40; a model that runs away is."""


def beyond(following: Tensor) -> Tensor:
    """A cost of 100 where a prediction is at the limit, so that no plan goes there."""
    return 100.0 * (following.abs().amax(-1) >= LIMIT)


def cheetah_cost(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """0.1 ‖a‖² less the velocity at the end of the step, and 5 times the square of a pitch beyond ±0.6.

    Gymnasium's reward has the mean velocity over the step, and nothing of the pitch: without it plans end on the back
    or the nose, where a cheetah can only crawl. Nagabandi et al. 2018, https://arxiv.org/abs/1708.02596, keep theirs
    from tilting by penalties on its front leg.
    """
    fallen = (following[:, 1].abs() - 0.6).clamp_min(0).square()
    return 0.1 * action.square().sum(-1) - following[:, 8] + 5 * fallen + beyond(following)


def ant_cost(observation: Tensor, action: Tensor, following: Tensor) -> Tensor:
    """0.5 ‖a‖² less the velocity at the end of the step, and what an ant has for a height between 0.2 and 1."""
    height = following[:, 0]
    upright = torch.sigmoid(20 * (height - 0.2)) * torch.sigmoid(20 * (1.0 - height))
    return 0.5 * action.square().sum(-1) - following[:, 13] - upright + beyond(following)


def bounded(observation: Tensor) -> Tensor:
    """Bring a prediction into the limits."""
    return observation.clamp(-LIMIT, LIMIT)


def cheetah_gravity(generator: np.random.Generator, split: str) -> Task:
    """A factor on gravity from 0.75 to 1.25; in the test from 0.5 to 0.75, or 1.25 to 1.5."""
    away = generator.uniform(0.0, 0.25) + (0.25 if split == "test" else 0.0)
    return {"gravity": float(1 + generator.choice([-1.0, 1.0]) * away)}


def robot(name: str, size: int, cost: Any, draw: Callable[[np.random.Generator, str], Task]) -> System:
    """Gymnasium's robot of so many actuators, to be run forwards."""
    actions = BoxActions([-1.0] * size, [1.0] * size)
    return System(
        draw, partial(robot_environment, name), actions, cost, bounded, gains=True, filmed=partial(filmed_robot, name)
    )


cheetah = partial(robot, "HalfCheetah", 6, cheetah_cost)

SYSTEMS = {
    "pendulum": System(
        partial(classic_task, NOMINAL_PHYSICS["Pendulum-v1"]),
        partial(classic_environment, partial(make_with_physics, "Pendulum-v1")),
        BoxActions([-2.0], [2.0]),
        pendulum_cost,
        pendulum_project,
        pendulum_step,
    ),
    "cartpole": System(
        partial(classic_task, SWINGUP_PHYSICS),
        partial(classic_environment, make_swingup),
        BoxActions([-1.0], [1.0]),
        cartpole_cost,
        cartpole_project,
        cartpole_step,
    ),
    "cheetah_joint": cheetah(disabled("HalfCheetah").draw),
    "cheetah_gravity": cheetah(cheetah_gravity),
    "cheetah_mass": cheetah(one_parameter("HalfCheetah", "mass").draw),
    "ant_leg": robot("Ant", 8, ant_cost, disabled("Ant").draw),
}
