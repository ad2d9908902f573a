"""Robots whose physics are unknown: the data of `serious_benchmark.py`, collected once for every task.

Letters: N systems (physics), E episodes of each, T steps, D the size of an observation, A of an action.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from ssmrl.env_runner import Environment, by_task, normal_noise, rollout, task_family
from ssmrl.meta_rl import DynamicsScales, dynamics_data, dynamics_scales

__all__ = ["HORIZONS", "TASKS", "Amount", "Episodes", "RobotTask", "collected", "scales_of", "steps_apart"]

HORIZONS = (1, 5, 20)
"""Steps ahead that predictions are scored at."""
WARM_UP = 20
"""First steps of an episode, in which a robot falls to the ground, that are in no window."""


@dataclass(frozen=True)
class RobotTask:
    """A family of physics, and what of Gymnasium's environment is not the default."""

    family: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def dead_actuators(self) -> bool:
        """Whether systems differ by actuators that do not obey, and by nothing else."""
        return self.family.endswith("-disabled")


LYING = {"terminate_when_unhealthy": False}  # a robot that has fallen has physics, too
POSE = {  # positions and velocities alone; the rest are functions of them, or of contacts
    "include_cinert_in_observation": False,
    "include_cvel_in_observation": False,
    "include_qfrc_actuator_in_observation": False,
    "include_cfrc_ext_in_observation": False,
}
ANT = {**LYING, "include_cfrc_ext_in_observation": False}
TASKS = {
    "halfcheetah-gravity": RobotTask("halfcheetah-gravity"),
    "halfcheetah-mass": RobotTask("halfcheetah-mass"),
    "halfcheetah-joint": RobotTask("halfcheetah-disabled"),
    "walker2d-params": RobotTask("walker2d-rand-params", LYING),
    "ant-mass": RobotTask("ant-mass", ANT),
    "ant-leg": RobotTask("ant-disabled", ANT),
    "humanoid-mass": RobotTask("humanoid-mass", {**LYING, **POSE}),
}


@dataclass(frozen=True)
class Amount:
    """Systems of the training and of the test, episodes of each, and their steps."""

    train: int
    """With those held out."""
    test: int
    held_out: int = 16
    """Of the training, to choose rates on."""
    episodes: int = 4
    own: int = 12
    """Episodes of a system of the test beside the two that models are adapted to and judged on: the oracle's."""
    steps: int = 120


class Episodes(NamedTuple):
    """What was seen of N systems."""

    observation: Tensor
    """(N, E, T + 1, D)."""
    action: Tensor
    """(N, E, T, A)."""
    physics: Tensor
    """(N, P) what a system is: logarithms of factors, or 1 for every actuator that is dead."""


def wandering(actions: int, seed: int) -> Callable[..., Any]:
    """Actions that wander: tanh of an autoregression, z_t = 0.9 z_{t-1} + 0.6 ε_t, in every component."""
    noise = normal_noise(seed, actions)

    def policy(observation: Tensor, state: Any, reset: Tensor) -> tuple[Tensor, Any]:
        rows = len(reset)
        z, count = (torch.zeros(rows, actions), torch.zeros(rows, dtype=torch.int64)) if state is None else state
        z = 0.9 * z + 0.6 * noise(count).to(z.dtype)
        return z.tanh(), (z, count + 1)

    return policy


def episodes_of(task: RobotTask, amount: Amount, split: str) -> Episodes:
    """Drive all systems of a split with wandering actions."""
    family = task_family(task.family).with_settings(horizon=amount.steps + 1, **task.settings)
    number, episodes = (amount.train, amount.episodes) if split == "train" else (amount.test, 2 + amount.own)
    drawn = family.sample(number, seed=0, split=split)
    tasks = [t for t in drawn for _ in range(episodes)]
    environment = Environment(family, tasks=tasks, seed=0, autoreset_mode="SameStep")
    space = environment.single_action_space
    low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
    wander = wandering(space.shape[0], 0 if split == "train" else 1)

    def policy(observation: Tensor, state: Any, reset: Tensor) -> tuple[Tensor, Any]:
        action, state = wander(observation, state, reset)
        return low + (high - low) * (action + 1) / 2, state

    flat, _ = rollout(policy, environment, amount.steps, seed=0 if split == "train" else 1)
    environment.close()
    seen = by_task(flat, number)
    if bool((seen.terminated | seen.truncated).any()):
        raise RuntimeError(f"Episodes of {task.family} must not end before {amount.steps} steps, and some did.")
    physics = torch.stack([numbers_of(task, space.shape[0]) for task in drawn])
    return Episodes(torch.cat([seen.observation, seen.next_observation[:, :, -1:]], 2), seen.action, physics)


def numbers_of(task: dict[str, Any], actuators: int) -> Tensor:
    """What a task says, as numbers (P,)."""
    if "disabled" in task:
        dead = torch.zeros(actuators)
        dead[torch.as_tensor(task["disabled"])] = 1.0
        return dead
    return torch.cat([torch.as_tensor(task[name], dtype=torch.float32).reshape(-1) for name in sorted(task)]).log()


def collected(name: str, amount: Amount, folder: Path) -> tuple[Episodes, Episodes]:
    """Episodes of the training and of the test, from the folder if they are there, as they were saved."""
    folder = folder / "-".join(map(str, (name, *astuple(amount))))
    found = load_checkpoint(folder)
    if found is None:
        data = {split: tuple(episodes_of(TASKS[name], amount, split)) for split in ("train", "test")}
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(folder, 0, data)
        found = load_checkpoint(folder)
        assert found is not None
    return Episodes(*found.state["train"]), Episodes(*found.state["test"])


def scales_of(train: Episodes) -> DynamicsScales:
    """Means and deviations of observations, actions and changes in the training."""
    observation = train.observation[:, :, WARM_UP:]
    return dynamics_scales(observation[:, :, :-1], train.action[:, :, WARM_UP:], observation[:, :, 1:])


def steps_apart(train: Episodes) -> Tensor:
    """(len(HORIZONS), D) how far an observation is from that of so many steps before, root mean square."""
    observation = train.observation[:, :, WARM_UP:]
    far = [(observation[:, :, h:] - observation[:, :, :-h]).square().mean((0, 1, 2)).sqrt() for h in HORIZONS]
    return torch.stack(far)


def windows_at(
    scales: DynamicsScales, episodes: Episodes, systems: Tensor, episode: Tensor, starts: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """A model's inputs (M, B, L, D + A) and targets (M, B, L, D) of windows.

    Args:
        systems: Int64 (M,).
        episode: Int64 (M,), of each.
        starts: Int64 (M, B), in the episode.
        length: L.
    """
    t = starts[..., None] + torch.arange(length)
    at = (systems[:, None, None], episode[:, None, None])
    observation, action = episodes.observation[(*at, t)], episodes.action[(*at, t)]
    return dynamics_data(scales, observation, action, episodes.observation[(*at, t + 1)])
