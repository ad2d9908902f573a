"""Models and trainings of `serious_benchmark.py`: MAML, training on all tasks at once, an oracle, and their scores.

Letters: N systems, B windows, L steps of one, K inner steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torchopt
from schedules import rate_at
from serious_tasks import HORIZONS, WARM_UP, Amount, Episodes, scales_of, steps_apart, windows_at
from torch import Tensor, nn
from torch.func import vmap

from ssmrl import GRU, LSTM, MLP, DiagonalSSM, MetaMAML, StateSpaceModel, Transformer, adapt, mse_loss
from ssmrl.adaptation import clip_by_global_norm, learning_rates, scale_by_learning_rates
from ssmrl.core import functional_forward
from ssmrl.meta_rl import NonFinite, dynamics_data, model_step, predict_open_loop

__all__ = ["MODELS", "Data", "Learners", "Size", "oracle_errors", "persistence_errors", "run"]

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "StateSpaceModel": lambda inputs, outputs: StateSpaceModel(64, inputs, outputs, hidden_dim=128),
    "LSTM": lambda inputs, outputs: LSTM(64, inputs, outputs),
    "GRU": lambda inputs, outputs: GRU(72, inputs, outputs),
    "Transformer": lambda inputs, outputs: Transformer(32, inputs, outputs, hidden_dim=128, window=24),
    "MLP": lambda inputs, outputs: MLP(inputs, outputs, hidden_dim=128),
    "DiagonalSSM": lambda inputs, outputs: DiagonalSSM(32, inputs, outputs, hidden_dim=64),
}
"""Of about as many weights each."""


@dataclass(frozen=True)
class Size:
    """How much is spent, and how."""

    amount: Amount
    updates: int
    """Meta-updates; the model for all tasks gets as many gradients: K + 1 times as many updates."""
    batch: int = 10
    """Systems of an update."""
    inner_steps: int = 3
    """K."""
    support: tuple[int, int] = (4, 16)
    """Windows that follow each other in one episode, and their steps: what is adapted to."""
    query: tuple[int, int] = (4, 24)
    """Windows of another episode, and their steps."""
    context: int = 4
    """Steps of a window of the test that the model sees before it predicts from its own predictions."""
    inner_lr: float = 0.05
    """At first; every tensor learns its own."""
    outer_lr: float = 0.002
    """Of Adam, after a tenth of the updates; it falls to 0 as a cosine."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Of gradient descent from the model for all tasks; what suits it best on systems of the training is taken."""
    oracle_steps: int = 200
    """Of Adam, on two episodes of the very system."""
    compile: bool | Literal["trace"] = True
    """Of meta-updates."""


class Data:
    """Systems of the training and of the test, as models see them."""

    def __init__(self, size: Size, train: Episodes, test: Episodes) -> None:
        self.size, self.train, self.test = size, train, test
        self.scales, self.far = scales_of(train), steps_apart(train)
        self.inputs = train.observation.shape[-1] + train.action.shape[-1]
        self.outputs = train.observation.shape[-1]

    def batch(self, generator: torch.Generator, windows: int | None = None) -> tuple[Tensor, ...]:
        """Support x, y and query x, y of some systems, (N, B, L, ...); `windows` of the query."""
        size, episodes = self.size, self.train.action.shape[1]
        systems = torch.randint(len(self.train.action), (size.batch,), generator=generator)
        first = torch.randint(episodes, (size.batch,), generator=generator)
        second = (first + torch.randint(1, episodes, (size.batch,), generator=generator)) % episodes
        support = self.support(self.train, systems, first, self._begins(size.batch, math.prod(size.support), generator))
        count, length = size.query[0] if windows is None else windows, size.query[1]
        starts = torch.stack([self._begins(size.batch, length, generator) for _ in range(count)], 1)
        return (*support, *windows_at(self.scales, self.train, systems, second, starts, length))

    def support(self, of: Episodes, systems: Tensor, episode: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
        """Windows that follow each other from a step on."""
        count, length = self.size.support
        starts = begin[:, None] + length * torch.arange(count)
        return windows_at(self.scales, of, systems, episode, starts, length)

    def tested(self, of: Episodes, episodes: tuple[int, int] = (0, 1)) -> tuple[Tensor, ...]:
        """Support of the one episode, query of the other, of all systems: always the same."""
        systems = torch.arange(len(of.action))
        first, second = (torch.full_like(systems, e) for e in episodes)
        begin = torch.full_like(systems, WARM_UP)
        count, length = self.size.query
        starts = (begin[:, None] + length * torch.arange(count)).expand(len(systems), -1)
        return (
            *self.support(of, systems, first, begin),
            *windows_at(self.scales, of, systems, second, starts, length),
        )

    def observed(self, of: Episodes, episode: int = 1) -> tuple[Tensor, Tensor]:
        """Observations (N, B, L + 1, D) and actions (N, B, L, A) of the windows of the query of `tested`."""
        count, length = self.size.query
        t = WARM_UP + length * torch.arange(count)[:, None] + torch.arange(length + 1)
        return of.observation[:, episode][:, t], of.action[:, episode][:, t[:, :-1]]

    def _begins(self, number: int, length: int, generator: torch.Generator) -> Tensor:
        last = self.train.action.shape[2] - length
        return WARM_UP + torch.randint(last - WARM_UP + 1, (number,), generator=generator)


def one_step(model: nn.Module, params: Any, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of the normalised change, every step from what was observed."""
    return mse_loss(functional_forward(model, params, x)[0], y)


def trained(learner: MetaMAML, data: Data, updates: int, seed: int, windows: int | None = None) -> float:
    """Make so many updates; the median milliseconds of one."""
    generator, times = torch.Generator().manual_seed(seed), []
    for update in range(updates):
        for group in learner.outer_step.optimizer.param_groups:
            group["lr"] = rate_at(update, updates, data.size.outer_lr)
        tasks = data.batch(generator, windows)
        began = time.perf_counter()
        learner.meta_update(tasks)
        times.append(time.perf_counter() - began)
    return 1000 * sorted(times)[len(times) // 2]


class Learners:
    """The two trainings of a model, whose compiled updates serve all seeds."""

    def __init__(self, name: str, data: Data) -> None:
        size = data.size
        self.data, self.make = data, lambda: MODELS[name](data.inputs, data.outputs)
        self.model = self.make()
        self.rates = learning_rates(dict(self.model.named_parameters()), size.inner_lr)
        options: dict[str, Any] = {"max_grad_norm": 1.0, "compile": size.compile, "nonfinite": NonFinite("skip")}
        self.maml = MetaMAML(
            self.model,
            inner_optimizer=descent(self.rates),
            inner_steps=size.inner_steps,
            outer_optimizer=torch.optim.Adam([*self.model.parameters(), *self.rates.values()]),
            **options,
        )
        self.joint = MetaMAML(
            self.model, inner_steps=0, outer_optimizer=torch.optim.Adam(self.model.parameters()), **options
        )

    def begin(self, learner: MetaMAML, seed: int) -> None:
        """New weights, the first rates, an optimizer that knows nothing."""
        torch.manual_seed(seed)
        self.model.load_state_dict(self.make().state_dict())
        with torch.no_grad():
            for rate in self.rates.values():
                rate.fill_(self.data.size.inner_lr)
        learner.outer_step.optimizer.state.clear()

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of the weights and of the rates."""
        params = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return params, {name: rate.detach().clone() for name, rate in self.rates.items()}


def descent(rates: Any) -> Any:
    """The inner optimizer: gradient descent on a gradient of norm 1 at most."""
    return torchopt.chain(clip_by_global_norm(1.0), scale_by_learning_rates(rates))


def adapted(model: nn.Module, params: Any, rates: Any, steps: int, x: Tensor, y: Tensor) -> Any:
    """Weights of every system, (N, ...), after K steps on windows (N, B, L, ...)."""

    def of_one(x: Tensor, y: Tensor) -> Any:
        return adapt(partial(one_step, model), params, x, y, optimizer=descent(rates), num_steps=steps).params

    with torch.no_grad():
        return vmap(of_one)(x, y)


@torch.no_grad()
def errors(model: nn.Module, data: Data, params: Any, of: Episodes, context: int) -> list[list[float]]:
    """(len(HORIZONS), N) mean squared errors of predictions from predictions; that nothing changes has about 1.

    Args:
        params: (N, ...), of every system.
        context: steps of a window that the model sees before.
    """
    step = model_step(model, data.scales, lambda observation, action, following: observation[:, 0])

    def of_one(params: Any, observation: Tensor, action: Tensor) -> Tensor:
        before, acted = observation[:, :context], action[:, :context]
        x, _ = dynamics_data(data.scales, before, acted, observation[:, 1 : context + 1])
        _, state = functional_forward(model, params, x)
        predicted, _ = predict_open_loop(
            step, params, state, observation[:, context], action[:, context : context + max(HORIZONS)]
        )
        return scaled(predicted, observation[:, context + 1 :], data.far)

    return finite(vmap(of_one)(params, *data.observed(of)))


def scaled(predicted: Tensor, observed: Tensor, far: Tensor) -> Tensor:
    """(len(HORIZONS),) errors of predictions (B, >= 20, D) in units of how far observations go in so many steps."""
    return torch.stack(
        [((predicted[:, h - 1] - observed[:, h - 1]) / far[i]).square().mean() for i, h in enumerate(HORIZONS)]
    )


LARGEST = 100.0
"""What a larger error, or one that is not finite, counts as: interquartile means leave it out, if it is rare."""


def finite(found: Tensor) -> list[list[float]]:
    """(N, len(HORIZONS)) -> (len(HORIZONS), N)."""
    kept: list[list[float]] = found.nan_to_num(LARGEST, LARGEST).clamp(max=LARGEST).T.tolist()
    return kept


def persistence_errors(data: Data) -> list[list[float]]:
    """Of the prediction that nothing changes."""
    observation, _ = data.observed(data.test)
    context = data.size.context
    now = observation[:, :, context : context + 1].expand(-1, -1, max(HORIZONS), -1)
    return finite(vmap(lambda a, b: scaled(a, b, data.far))(now, observation[:, :, context + 1 :]))


def best_rate(model: nn.Module, data: Data, params: Any) -> tuple[float, list[float]]:
    """Of the rates of the size, the one with the lowest median error after adaptation in the training; all medians."""
    support_x, support_y, x, y = data.tested(Episodes(*(leaf[: len(data.test.action)] for leaf in data.train)))
    medians = []
    for rate in data.size.rates:
        rates = {name: torch.full((), rate) for name in params}
        after = adapted(model, params, rates, data.size.inner_steps, support_x, support_y)
        with torch.no_grad():
            losses = vmap(partial(one_step, model))(after, x, y)
        medians.append(float(losses.nan_to_num(torch.inf, torch.inf).median()))
    return data.size.rates[medians.index(min(medians))], medians


def run(learners: Learners, seed: int) -> dict[str, Any]:
    """Both trainings with a seed, and what they are worth on the systems of the test."""
    data, model, size = learners.data, learners.model, learners.data.size
    support_x, support_y, *_ = data.tested(data.test)
    number = len(data.test.action)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}

    def score(params: Any, rates: Any) -> dict[str, Any]:
        alike = {name: p.expand(number, *p.shape) for name, p in params.items()}
        after = adapted(model, params, rates, size.inner_steps, support_x, support_y)
        return {
            way: errors(model, data, of, data.test, size.context) for way, of in (("before", alike), ("after", after))
        }

    began = time.perf_counter()
    learners.begin(learners.maml, seed)
    milliseconds = trained(learners.maml, data, size.updates, seed)
    params, rates = learners.weights()
    found["maml"] = {**score(params, rates), "milliseconds": milliseconds, "left out": learners.maml.left_out}
    found["maml"]["seconds"] = time.perf_counter() - began

    began = time.perf_counter()
    learners.begin(learners.joint, seed)
    windows = size.query[0] + math.ceil(math.prod(size.support) / size.query[1])
    milliseconds = trained(learners.joint, data, (1 + size.inner_steps) * size.updates, seed, windows)
    params, _ = learners.weights()
    rate, medians = best_rate(model, data, params)
    rates = {name: torch.full((), rate) for name in params}
    found["joint"] = {**score(params, rates), "milliseconds": milliseconds, "left out": learners.joint.left_out}
    found["joint"] |= {"rate": rate, "medians of rates": medians, "seconds": time.perf_counter() - began}
    found["weights"] = params
    return found


def oracle_errors(data: Data, name: str, params: Any) -> list[list[float]]:
    """Of the model for all tasks, trained on with two more episodes of the very system."""
    model, steps = MODELS[name](data.inputs, data.outputs), data.size.oracle_steps
    own = [torch.cat(parts, 1) for parts in zip(*(data.tested(data.test, (0, e))[2:] for e in (2, 3)), strict=True)]

    def of_one(x: Tensor, y: Tensor) -> Any:
        return adapt(partial(one_step, model), params, x, y, optimizer=torchopt.adam(1e-3), num_steps=steps).params

    with torch.no_grad():
        return errors(model, data, vmap(of_one)(*own), data.test, data.size.context)
