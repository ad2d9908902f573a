"""Models and trainings of `serious_benchmark.py`: MAML, training on all tasks at once, an oracle, and their scores.

Letters: N systems, B windows, L steps of one, K inner steps.
"""

from __future__ import annotations

import math
import statistics
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

__all__ = ["MODELS", "Data", "Learners", "Size", "oracle_errors", "persistence_errors", "run", "told_errors"]

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
    """Meta-updates, each of K + 1 gradients."""
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
    outer_lr: float = 0.005
    """Of Adam, after a tenth of the updates; it falls to 0 as a cosine."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Of gradient descent from the model for all tasks; what suits it best on systems of the training is taken."""
    oracle_steps: int = 200
    """Of Adam, on all other episodes of the very system."""
    oracle_windows: int = 8
    """Of each of its steps."""
    compile: bool | Literal["trace"] = True
    """Of meta-updates."""

    @property
    def joint_updates(self) -> int:
        """Updates of the model for all systems, which gets as many gradients as MAML with what comes before it."""
        return 2 * (1 + self.inner_steps) * self.updates

    @property
    def shared_updates(self) -> int:
        """Those that come before MAML: half of all."""
        return self.joint_updates // 2

    @property
    def joint_windows(self) -> int:
        """Windows of its batch: as many steps as support and query of MAML have."""
        return self.query[0] + math.ceil(math.prod(self.support) / self.query[1])


class Data:
    """Systems of the training and of the test, as models see them."""

    def __init__(self, size: Size, train: Episodes, test: Episodes) -> None:
        self.size, self.train, self.test = size, train, test
        self.scales, self.far = scales_of(train), steps_apart(train)
        self.inputs = train.observation.shape[-1] + train.action.shape[-1]
        self.outputs = train.observation.shape[-1]

    def batch(self, generator: torch.Generator, windows: int | None = None) -> tuple[Tensor, ...]:
        """Support x, y and query x, y of some systems, (N, B, L, ...); `windows` of the query."""
        return self.drawn(generator, windows)[1]

    def drawn(self, generator: torch.Generator, windows: int | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Which systems, (N,), and a batch of them."""
        size, episodes = self.size, self.train.action.shape[1]
        systems = torch.randint(len(self.train.action), (size.batch,), generator=generator)
        first = torch.randint(episodes, (size.batch,), generator=generator)
        second = (first + torch.randint(1, episodes, (size.batch,), generator=generator)) % episodes
        support = self.support(self.train, systems, first, self.begins(size.batch, math.prod(size.support), generator))
        count, length = size.query[0] if windows is None else windows, size.query[1]
        starts = torch.stack([self.begins(size.batch, length, generator) for _ in range(count)], 1)
        return systems, (*support, *windows_at(self.scales, self.train, systems, second, starts, length))

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

    def begins(self, number: int, length: int, generator: torch.Generator) -> Tensor:
        """Int64 (N,), where windows of so many steps begin."""
        last = self.train.action.shape[2] - length
        return WARM_UP + torch.randint(last - WARM_UP + 1, (number,), generator=generator)


def one_step(model: nn.Module, params: Any, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of the normalised change, every step from what was observed."""
    return mse_loss(functional_forward(model, params, x)[0], y)


def trained(learner: MetaMAML, data: Data, updates: range, total: int, seed: int, windows: int | None = None) -> float:
    """Make these of `total` updates; the median milliseconds of one."""
    generator, times = torch.Generator().manual_seed(1000 * seed + updates.start), []
    for update in updates:
        for group in learner.outer_step.optimizer.param_groups:
            group["lr"] = rate_at(update, total, data.size.outer_lr)
        tasks = data.batch(generator, windows)
        began = time.perf_counter()
        learner.meta_update(tasks)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


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

    def begin(self, seed: int) -> None:
        """New weights, and optimizers that know nothing."""
        torch.manual_seed(seed)
        self.model.load_state_dict(self.make().state_dict())
        for learner in (self.maml, self.joint):
            learner.outer_step.optimizer.state.clear()

    def go_on_from(self, params: dict[str, Tensor], rate: float) -> None:
        """MAML begins with these weights and this rate of every tensor."""
        self.model.load_state_dict(params)
        with torch.no_grad():
            for value in self.rates.values():
                value.fill_(rate)

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
    """Both trainings with a seed, and what they are worth on the systems of the test.

    They share their first part, in which a model learns from all systems at once; then one of them goes on with that,
    and the other one with MAML, from the rate of adaptation that suits the model best by then.
    """
    data, model, size = learners.data, learners.model, learners.data.size
    support_x, support_y, *_ = data.tested(data.test)
    number = len(data.test.action)

    def score(params: Any, rates: Any) -> dict[str, Any]:
        alike = {name: p.expand(number, *p.shape) for name, p in params.items()}
        after = adapted(model, params, rates, size.inner_steps, support_x, support_y)
        return {
            way: errors(model, data, of, data.test, size.context) for way, of in (("before", alike), ("after", after))
        }

    began = time.perf_counter()
    learners.begin(seed)
    shared, total = size.shared_updates, size.joint_updates
    trained(learners.joint, data, range(shared), total, seed, size.joint_windows)
    shared_params, shared_seconds = learners.weights()[0], time.perf_counter() - began

    began = time.perf_counter()
    milliseconds = trained(learners.joint, data, range(shared, total), total, seed, size.joint_windows)
    params, _ = learners.weights()
    rate, medians = best_rate(model, data, params)
    joint = {**score(params, {name: torch.full((), rate) for name in params}), "rate": rate}
    joint |= {"medians of rates": medians, "milliseconds": milliseconds, "left out": learners.joint.left_out}
    joint["seconds"] = shared_seconds + time.perf_counter() - began

    began = time.perf_counter()
    learners.go_on_from(shared_params, best_rate(model, data, shared_params)[0])
    milliseconds = trained(learners.maml, data, range(size.updates), size.updates, seed)
    meta, rates = learners.weights()
    maml = {**score(meta, rates), "milliseconds": milliseconds, "left out": learners.maml.left_out}
    maml["seconds"] = shared_seconds + time.perf_counter() - began
    return {
        "parameters": sum(p.numel() for p in params.values()),
        "maml": maml,
        "joint": joint,
        "weights": params,
    }


def oracle_errors(data: Data, name: str, params: Any, seed: int) -> list[list[float]]:
    """Of the model for all systems, trained on with the other episodes of the very system, one model for each."""
    size, number, length = data.size, len(data.test.action), data.size.query[1]
    model, generator = MODELS[name](data.inputs, data.outputs), torch.Generator().manual_seed(seed)
    own = {name: p.detach().expand(number, *p.shape).clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.Adam(own.values())  # elementwise, so that systems do not know each other
    systems = torch.arange(number)
    for step in range(size.oracle_steps):
        optimizer.param_groups[0]["lr"] = rate_at(step, size.oracle_steps, size.outer_lr / 2)
        parts = []
        for _ in range(size.oracle_windows):
            episode = torch.randint(2, data.test.action.shape[1], (number,), generator=generator)
            begin = data.begins(number, length, generator)
            parts.append(windows_at(data.scales, data.test, systems, episode, begin[:, None], length))
        x, y = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        optimizer.zero_grad()
        vmap(partial(one_step, model))(own, x, y).sum().backward()
        optimizer.step()
    with torch.no_grad():
        return errors(model, data, own, data.test, size.context)


class Told(nn.Module):
    """A model that is told the physics: numbers that do not change go in beside observation and action."""

    def __init__(self, model: nn.Module, numbers: int) -> None:
        super().__init__()
        self.model = model
        self.physics = nn.Parameter(torch.zeros(numbers), requires_grad=False)

    def init_hidden(self, batch_size: int = 1) -> Any:
        return self.model.init_hidden(batch_size)

    def forward(self, x: Tensor, hidden_state: Any = None) -> tuple[Tensor, Any]:
        told = self.physics.expand(*x.shape[:-1], -1)
        output: tuple[Tensor, Any] = self.model(torch.cat([x, told], -1), hidden_state)
        return output


def told_errors(data: Data, name: str, seed: int) -> list[list[float]]:
    """Of a model for all systems that is told the physics of each, and does not adapt: what knowing them is worth."""
    size, numbers = data.size, data.train.physics.shape[-1]
    torch.manual_seed(seed)
    told = Told(MODELS[name](data.inputs + numbers, data.outputs), numbers)
    learned = {name: p for name, p in told.named_parameters() if p.requires_grad}
    optimizer, generator = torch.optim.Adam(learned.values()), torch.Generator().manual_seed(seed)
    for update in range(size.joint_updates):
        optimizer.param_groups[0]["lr"] = rate_at(update, size.joint_updates, size.outer_lr)
        systems, (_, _, x, y) = data.drawn(generator, size.joint_windows)
        physics = data.train.physics[systems][:, None, None].expand(*x.shape[:-1], -1)
        optimizer.zero_grad()
        mse_loss(told.model(torch.cat([x, physics], -1).flatten(0, 1))[0], y.flatten(0, 1)).backward()
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimizer.step()
    number = len(data.test.action)
    params = {name: p.detach().expand(number, *p.shape) for name, p in learned.items()}
    return errors(told, data, {**params, "physics": data.test.physics}, data.test, size.context)
