"""A run of `adaptive_control.py`: its size, its system and seed, its files, and the policies that collect its data.

Letters: N streams or tasks, T steps of an episode, D the size of an observation, A of an action.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from control_systems import System, Task
from torch import Tensor, nn

from ssmrl import MLP, AdaptationConfig, StateSpaceModel, StreamAdapter
from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from ssmrl.core import WithInputGains
from ssmrl.env_runner import rollout
from ssmrl.meta_rl import (
    AdaptiveControl,
    DynamicsScales,
    Planner,
    Transitions,
    model_step,
)

__all__ = [
    "ADAM",
    "ALLOWANCE",
    "FIXED",
    "SIZES",
    "Run",
    "Size",
    "as_published",
    "exploring",
    "on_all_weights",
    "random_actions",
]

RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""To choose from, for the model that is not meta-trained."""
OF_GAINS = (*RATES, 1.0, 3.0, 10.0)
"""The same, where gains adapt: there are few of them, and their gradients are small."""
FIXED = 0.01
"""A rate that many take."""
ADAM, ALLOWANCE = 0.003, 0.3
"""Rate of the Adam that is carried on, and the allowance of all guards."""


@dataclass(frozen=True)
class Size:
    """Of a run."""

    rounds: int
    tasks: int
    """Of every round, an episode each."""
    updates: int
    """Of the model after every round, three times as many after the last."""
    meta_updates: int
    batch: int
    """Tasks of a meta-update; an update of the model has half as many episodes more."""
    test_tasks: int
    """Of every group."""
    own_steps: int
    """Of the models that are fitted to one system each."""
    episode: int
    """Steps."""
    candidates: int
    """Of the planner, in each of three rounds."""
    horizon: int
    """Of the planner."""
    ahead: int
    """Steps that a prediction is trained for from its own predictions."""
    state: int
    """Width of the recurrent model's state."""
    hidden: int
    """Width of its perceptrons."""
    stateless: int
    """Width of the model without a state, which has about as many weights."""
    windows: tuple[int, ...] = (8, 16, 32, 64)
    """Lengths of what is adapted to in meta-training; in the test it grows from the least to the largest."""
    after: int = 24
    """Steps after a window that the adapted model is judged by."""
    peak: float = 2e-3
    """The highest rate of the model's training."""
    meta_peak: float = 1.5e-3
    """The highest rate of meta-training."""
    steps: int = 6
    """Gradient steps at every step of the environment, from the meta-trained weights."""
    unadapted: float = 0.0
    """Weight of the loss before adaptation in meta-training."""
    noise: tuple[float, float] = (0.05, 0.25)
    """Deviations of the noise on actions in training, in parts of their range, row by row in turn."""
    adapted: str = "*"
    """Names of the weights that adapt, as a pattern."""
    per_element: bool = True
    """A learned rate for every element of them, or for every tensor."""
    rate: float = 0.01
    """Before it is learned."""
    learned: bool = True
    """Whether it is."""
    clip: float | None = None
    """Of the norm of a gradient that is adapted by."""
    rise: float | None = 3.0
    """Begin anew, with the newest transitions alone, where errors rise to so many times what they were; None: never."""


TINY = Size(
    rounds=2,
    tasks=4,
    updates=3,
    meta_updates=3,
    batch=2,
    test_tasks=2,
    own_steps=2,
    episode=80,
    candidates=8,
    horizon=3,
    ahead=3,
    state=8,
    hidden=16,
    stateless=20,
    windows=(8, 16, 32),
)
CLASSIC = Size(
    rounds=4,
    tasks=300,
    updates=1000,
    meta_updates=3600,
    batch=16,
    test_tasks=40,
    own_steps=400,
    episode=200,
    candidates=64,
    horizon=20,
    ahead=15,
    state=32,
    hidden=64,
    stateless=80,
)
CARTPOLE = replace(CLASSIC, horizon=30)
"""On its true physics, a planner that looks 30 steps ahead swings it up more often than one that looks 20."""
ROBOT = Size(
    rounds=16,
    tasks=20,
    updates=800,
    meta_updates=1200,
    batch=6,
    test_tasks=40,
    own_steps=0,
    episode=200,
    candidates=100,
    horizon=15,
    ahead=15,
    state=64,
    hidden=256,
    stateless=216,
    windows=(16, 32, 64),
    peak=5e-3,
    noise=(0.02, 0.1),
    adapted="gain",
    per_element=False,
    steps=3,
    rate=1.0,
    clip=1.0,
    rise=None,
)
"""A round has few episodes, since planning on its model decides which come next."""
OF_ROBOTS = ("adapted", "per_element", "steps", "rate", "clip", "rise")
SIZES = {
    "tiny": {"classic": TINY, "robot": replace(TINY, **{name: getattr(ROBOT, name) for name in OF_ROBOTS})},
    "default": {"classic": CLASSIC, "cartpole": CARTPOLE, "robot": ROBOT},
}


def on_all_weights(size: Size) -> Size:
    """All weights adapt, with a learned rate for every element of them."""
    return replace(size, adapted="*", per_element=True, rate=FIXED)


def as_published(size: Size) -> Size:
    """Meta-training for one step of one rate that is not learned, and for predictions of one step, after it alone."""
    return replace(on_all_weights(size), steps=1, unadapted=0.0, ahead=1, per_element=False, learned=False)


@dataclass(frozen=True)
class Run:
    """A system and a seed, and where its files are."""

    system: System
    seed: int
    size: Size
    folder: Path

    def open(self) -> None:
        """Make the folder; what was made there with other settings is not gone on with.

        Raises:
            ValueError: the settings of the folder differ.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path, settings = self.folder / "settings.json", json.dumps(self.settings)
        if path.exists() and path.read_text() != settings:
            raise ValueError(f"{self.folder} is of other settings than {settings}; move it away: {path.read_text()}")
        path.write_text(settings)

    @property
    def settings(self) -> dict[str, Any]:
        """All that results depend on, as JSON has it."""
        found: dict[str, Any] = json.loads(
            json.dumps({**asdict(self.size), "rates": self.rates, "fixed": FIXED, "adam": ADAM, "allowance": ALLOWANCE})
        )
        return found

    @property
    def rates(self) -> tuple[float, ...]:
        """To choose from."""
        return OF_GAINS if self.size.adapted == "gain" else RATES

    def planner(self, step: Any) -> Planner:
        size = self.size
        return Planner(
            step, self.system.actions, horizon=size.horizon, candidates=size.candidates, rounds=3, chunk_size=40
        )

    def step(self, model: nn.Module, scales: DynamicsScales) -> Any:
        return model_step(model, scales, self.system.cost, project=self.system.project)

    def control(
        self,
        model: nn.Module,
        scales: DynamicsScales,
        seed: int,
        config: AdaptationConfig | None = None,
        number: int = 0,
    ) -> AdaptiveControl:
        adapter = None if config is None else StreamAdapter(model, config, number)
        generator = torch.Generator().manual_seed(seed)
        return AdaptiveControl(
            self.planner(self.step(model, scales)), model, scales, adapter=adapter, generator=generator
        )

    def episodes(self, policy: Any, tasks: Sequence[Task], seed: int, changes: Sequence[Any] | None = None) -> Any:
        """An episode of every task: what happened, the rewards (N, T), and the state of the policy after it."""
        changes = [None] * len(tasks) if changes is None else changes
        with self.system.environment(tasks, changes, self.size.episode, seed) as environment:
            record, carry = rollout(policy, environment, self.size.episode)
        transitions = Transitions(record.observation, record.action, record.next_observation)
        return transitions, record.reward, carry.hidden_state

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, from its checkpoint if it was made before."""
        found = load_checkpoint(self.folder / name)
        if found is None:
            began = time.perf_counter()
            save_checkpoint(self.folder / name, 0, make())
            print(f"{self.folder} {name}: {time.perf_counter() - began:.0f} s", flush=True)
            found = load_checkpoint(self.folder / name)
        assert found is not None
        return found.state

    def recurrent(self, scales: DynamicsScales) -> nn.Module:
        size = self._observation_size()
        model = StateSpaceModel(self.size.state, size + self.system.actions.size, size, hidden_dim=self.size.hidden)
        return self._with_gains(model, scales)

    def stateless(self, scales: DynamicsScales) -> nn.Module:
        size = self._observation_size()
        return self._with_gains(MLP(size + self.system.actions.size, size, hidden_dim=self.size.stateless), scales)

    def _with_gains(self, model: nn.Module, scales: DynamicsScales) -> nn.Module:
        """The model, with a gain for every actuator if actuators may fail; no gain changes what action 0 does."""
        number = self.system.actions.size
        return (
            WithInputGains(model, number, scales.action.normalize(torch.zeros(number))) if self.system.gains else model
        )

    def _observation_size(self) -> int:
        task = self.system.task(0, 0, "train")
        with self.system.environment([task], [None], self.size.episode, 0) as environment:
            shape = environment.single_observation_space.shape
        assert shape is not None
        return int(shape[0])


# Policies that collect


def random_actions(run: Run, seed: int) -> Any:
    """Actions that are held for some steps."""
    generator, low, high = torch.Generator().manual_seed(seed), run.system.actions.low, run.system.actions.high

    def policy(observation: Tensor, held: Tensor | None, reset: Tensor) -> tuple[Tensor, Tensor]:
        fresh = low + torch.rand(len(reset), len(low), generator=generator) * (high - low)
        keep = torch.rand(len(reset), 1, generator=generator) < 0.7
        action = fresh if held is None else torch.where(keep, held, fresh)
        return action, action

    return policy


def exploring(run: Run, policy: Any, seed: int) -> Any:
    """The policy with noise on its actions."""
    generator, low, high = torch.Generator().manual_seed(seed), run.system.actions.low, run.system.actions.high

    def noisy(observation: Tensor, state: Any, reset: Tensor) -> tuple[Tensor, Any]:
        action, state = policy(observation, state, reset)
        scale = torch.where(torch.arange(len(action)) % 2 == 0, *run.size.noise)[:, None] * (high - low)
        action = torch.clamp(action + scale * torch.randn(action.shape, generator=generator), low, high)
        return action, state._replace(action=action)

    return noisy
