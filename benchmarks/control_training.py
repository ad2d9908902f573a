"""Data and models of `adaptive_control.py`: rounds of planning and training, and meta-training from where they end.

Letters: N streams or tasks, T steps of an episode, D the size of an observation, A of an action.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchopt
from control_systems import System, Task
from torch import Tensor, nn
from torch.func import vmap
from torchopt.base import GradientTransformation

from ssmrl import MLP, AdaptationConfig, StateSpaceModel, StreamAdapter, adapt
from ssmrl.adaptation import clip_by_global_norm, learning_rates, scale_by_learning_rates, select
from ssmrl.adaptation.tree import tree_map
from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from ssmrl.env_runner import derive_seed, rollout
from ssmrl.meta_rl import (
    AdaptiveControl,
    DynamicsScales,
    MetaLearner,
    Planner,
    Transitions,
    adaptive_planning_loss,
    dynamics_scales,
    model_step,
    one_step_loss,
    open_loop_loss,
    planning_loss,
)

__all__ = [
    "NUM_STEPS",
    "SIZES",
    "Run",
    "Size",
    "aggregated",
    "best_rates",
    "errors_ahead",
    "fitted",
    "inner_steps",
    "meta_trained",
    "scales_of",
    "train",
]

NUM_STEPS = 3
"""Gradient steps at every step of the environment, from the meta-trained weights."""
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""To choose from, for the model that is not meta-trained."""


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
    """Width of its perceptrons, half of that of the model without a state."""
    windows: tuple[int, ...] = (8, 12, 20, 32)
    """Lengths of what is adapted to in meta-training; in the test it grows from the least to the largest."""
    after: int = 24
    """Steps after a window that the adapted model is judged by."""
    noise: tuple[float, float] = (0.05, 0.25)
    """Deviations of the noise on actions in training, in parts of their range, row by row in turn."""
    adapted: str = "*"
    """Names of the weights that adapt, as a pattern."""
    per_element: bool = True
    """A learned rate for every element of them, or for every tensor."""
    rate: float = 0.01
    """Before it is learned."""
    clip: float | None = None
    """Of the norm of a gradient that is adapted by."""


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
)
CLASSIC = Size(
    rounds=4,
    tasks=300,
    updates=1000,
    meta_updates=1200,
    batch=16,
    test_tasks=40,
    own_steps=400,
    episode=200,
    candidates=64,
    horizon=20,
    ahead=15,
    state=32,
    hidden=64,
)
ROBOT = Size(
    rounds=9,
    tasks=60,
    updates=1500,
    meta_updates=600,
    batch=6,
    test_tasks=40,
    own_steps=0,
    episode=200,
    candidates=100,
    horizon=15,
    ahead=15,
    state=64,
    hidden=128,
    windows=(16, 32, 64),
    noise=(0.05, 0.2),
    adapted="*input.*",
    per_element=False,
    rate=0.3,
    clip=1.0,
)
"""Which joint does not obey is a matter of the layers that see actions. They have one rate for every tensor: a rate of
its own for the weights of a joint that always obeyed in training would not have been learned."""
SIZES = {
    "tiny": {
        "classic": TINY,
        "robot": replace(TINY, adapted=ROBOT.adapted, per_element=False, rate=ROBOT.rate, clip=ROBOT.clip),
    },
    "default": {"classic": CLASSIC, "robot": ROBOT},
}


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
            json.dumps({**asdict(self.size), "steps": NUM_STEPS, "rates to choose": RATES})
        )
        return found

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

    def recurrent(self) -> nn.Module:
        size = self._observation_size()
        return StateSpaceModel(self.size.state, size + self.system.actions.size, size, hidden_dim=self.size.hidden)

    def stateless(self) -> nn.Module:
        size = self._observation_size()
        return MLP(size + self.system.actions.size, size, hidden_dim=2 * self.size.hidden)

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


# Training


def rate_at(update: int, total: int, peak: float) -> float:
    """Up over a tenth of the updates, then down as a cosine."""
    part = (update + 1) / total
    return peak * min(10 * part, 0.5 * (1 + math.cos(math.pi * part)))


def train(run: Run, model: nn.Module, scales: DynamicsScales, data: Transitions, updates: int, seed: int) -> None:
    """Train a model on whole episodes, to be planned with."""
    step, params, ahead = run.step(model, scales), dict(model.named_parameters()), run.size.ahead
    generator, optimizer, left_out = torch.Generator().manual_seed(seed), torch.optim.Adam(model.parameters()), 0
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(update, updates, 2e-3)
        rows = torch.randint(len(data.action), (3 * run.size.batch // 2,), generator=generator)
        starts = (torch.rand(4, generator=generator) * (run.size.episode - ahead)).long().tolist()
        episodes = Transitions(*(leaf[rows] for leaf in data))
        loss = planning_loss(model, step, scales, params, None, episodes, starts=starts, horizon=ahead)
        optimizer.zero_grad()
        loss.backward()
        # Where predictions run away in the batch, there is no direction to go in: the step is left out.
        if bool(torch.isfinite(nn.utils.clip_grad_norm_(model.parameters(), 1.0))):
            optimizer.step()
        else:
            left_out += 1
    if left_out:
        print(
            f"{run.folder}: {left_out} of {updates} training steps had no finite gradient and were left out", flush=True
        )


def scales_of(run: Run, data: Any) -> DynamicsScales:
    """Those of the first round, whatever came after it."""
    return dynamics_scales(*(leaf[: run.size.tasks] for leaf in data))


def aggregated(run: Run) -> dict[str, Any]:
    """Data of all rounds, and the recurrent model that was trained on them."""
    torch.manual_seed(run.seed)
    model, data, scales = run.recurrent(), None, None
    for r in range(run.size.rounds):
        seed = derive_seed(run.seed, 2, r)
        tasks = [run.system.task(seed, n, "train") for n in range(run.size.tasks)]
        policy = random_actions(run, seed)
        if scales is not None:
            policy = exploring(run, run.control(model, scales, seed), seed)
        new, reward, _ = run.episodes(policy, tasks, seed)
        print(f"{run.folder} round {r}: mean return {reward.sum(1).mean():.0f}", flush=True)
        data = new if data is None else Transitions(*map(torch.cat, zip(data, new, strict=True)))
        scales = scales_of(run, data)
        last = r == run.size.rounds - 1
        train(run, model, scales, data, (3 if last else 1) * run.size.updates, seed)
    assert data is not None
    return {"data": tuple(data), "model": model.state_dict()}


# Meta-training


def some_tasks(run: Run, data: Transitions, generator: torch.Generator) -> tuple[int, int, tuple[Tensor, ...]]:
    """Where a window begins, how long it is, and episodes up to some steps after it."""
    size = run.size
    rows = torch.randint(len(data.action), (size.batch,), generator=generator)
    window = size.windows[int(torch.randint(len(size.windows), (1,), generator=generator))]
    begin = int(torch.randint(size.episode - window - size.after + 1, (1,), generator=generator))
    return begin, window, tuple(leaf[rows, : begin + window + size.after] for leaf in data)


def inner_steps(run: Run, rates: Any) -> GradientTransformation:
    """Gradient descent with a rate for every tensor, or every element."""
    steps = scale_by_learning_rates(rates)
    return steps if run.size.clip is None else torchopt.chain(clip_by_global_norm(run.size.clip), steps)


def losses_of(run: Run, model: nn.Module, scales: DynamicsScales, params: Any, task: Any, at: Any, rates: Any) -> Any:
    """Before and after adaptation of those of the parameters that have a rate."""
    begin, window = at
    mine = {name: params[name] for name in rates}
    return adaptive_planning_loss(
        model,
        run.step(model, scales),
        scales,
        mine,
        Transitions(*(leaf[None] for leaf in task)),
        begin=begin,
        window=window,
        horizon=run.size.ahead,
        optimizer=inner_steps(run, rates),
        num_steps=NUM_STEPS,
        shared={name: value for name, value in params.items() if name not in rates},
    )


def meta_trained(
    run: Run, model: nn.Module, scales: DynamicsScales, data: Transitions, unadapted: float
) -> dict[str, Any]:
    """MAML with learned rates, whose loss has the model before it adapts with a weight."""
    params = dict(model.named_parameters())
    mine = {name: params[name] for name in select(model, run.size.adapted)}
    rates = learning_rates(mine, run.size.rate, per_element=run.size.per_element)
    optimizer = torch.optim.Adam([*params.values(), *rates.values()])
    generator, at = torch.Generator().manual_seed(run.seed), (0, 0)

    def loss(meta: Any, task: Any) -> Tensor:
        found = losses_of(run, model, scales, meta["params"], task, at, meta["rates"])
        total: Tensor = unadapted * found.unadapted + found.adapted
        return total

    learner = MetaLearner(loss, {"params": params, "rates": rates}, outer_optimizer=optimizer, max_grad_norm=1.0)
    for update in range(run.size.meta_updates):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(update, run.size.meta_updates, 5e-4)
        begin, window, tasks = some_tasks(run, data, generator)
        at = (begin, window)
        learner.update(tasks)
    return {"model": model.state_dict(), "rates": {name: rate.detach() for name, rate in rates.items()}}


def best_rates(run: Run, model: nn.Module, scales: DynamicsScales, data: Transitions) -> dict[str, Tensor]:
    """The rate at which gradient steps help a model most that was not meta-trained for them, on the training tasks."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    mine = select(model, run.size.adapted)
    generator = torch.Generator().manual_seed(run.seed)
    batches = [some_tasks(run, data, generator) for _ in range(8)]

    def rates(rate: float) -> dict[str, Tensor]:
        return {name: torch.tensor(rate) for name in mine}

    def loss(rate: float) -> float:
        total = 0.0
        for *at, tasks in batches:
            found = vmap(lambda *task, at=at: losses_of(run, model, scales, params, task, at, rates(rate)))(*tasks)
            # As a guard would have it: where a model runs away, it stays as it was.
            total += float(torch.where(found.adapted < 10 * found.unadapted, found.adapted, found.unadapted).mean())
        return total

    return rates(min(RATES, key=loss))


# What is not meta-trained, and how good predictions are


def fitted(run: Run, model: nn.Module, scales: DynamicsScales, tasks: Sequence[Task], seed: int) -> dict[str, Tensor]:
    """The recurrent model, fitted to two episodes of every system: one of the planner on it, one at random."""
    parts = [
        run.episodes(exploring(run, run.control(model, scales, seed), seed), tasks, seed)[0],
        run.episodes(random_actions(run, seed), tasks, seed + 1)[0],
    ]
    data = Transitions(*(torch.stack(leaves, 1) for leaves in zip(*parts, strict=True)))  # (N, 2, T, ·)
    named = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(*episodes: Tensor) -> Any:
        def loss(params: Any, *episodes: Tensor) -> Tensor:
            return one_step_loss(model, scales, params, None, *episodes)[0]

        steps, optimizer = run.size.own_steps, torchopt.adam(1e-3)
        return adapt(loss, named, *episodes, optimizer=optimizer, num_steps=steps, first_order=True).params

    result: dict[str, Tensor] = tree_map(torch.Tensor.detach, vmap(of_one)(*data))
    return result


def errors_ahead(
    run: Run, model: nn.Module, scales: DynamicsScales, rates: Any, data: Transitions
) -> tuple[Tensor, Tensor]:
    """Mean squared errors of open-loop predictions after full windows, before and after adapting to them, (N,) each.

    As with a guard, steps that make the window's own loss larger, or not finite, do not stand.
    """
    window, ahead = run.size.windows[-1], run.size.ahead
    params = {name: p.detach() for name, p in model.named_parameters() if name in rates}
    step, inner = run.step(model, scales), inner_steps(run, rates)

    def at(begin: int, *task: Tensor) -> tuple[Tensor, Tensor]:
        episode = Transitions(*(leaf[None] for leaf in task))
        past, future = episode.steps(begin, begin + window), episode.steps(begin + window, begin + window + ahead)
        state = one_step_loss(model, scales, params, None, *episode.steps(0, begin))[1] if begin else None

        def loss(params: Any) -> Tensor:
            return one_step_loss(model, scales, params, state, *past)[0]

        def error(params: Any) -> Tensor:
            here = one_step_loss(model, scales, params, state, *past)[1]
            return open_loop_loss(step, scales, params, here, *future)

        found = adapt(loss, params, optimizer=inner, num_steps=NUM_STEPS, first_order=True).params
        stands = loss(found) <= loss(params)
        found = tree_map(lambda a, b: torch.where(stands, a, b), found, params)
        return error(params), error(found)

    with torch.no_grad():
        begins = range(0, run.size.episode - window - ahead + 1, ahead)
        found = [vmap(lambda *task, begin=begin: at(begin, *task))(*data) for begin in begins]
        before, after = (torch.stack(errors).mean(0) for errors in zip(*found, strict=True))
    return before, after
