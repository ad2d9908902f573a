"""Models and trainings of `serious_benchmark.py`: MAML, training on all systems at once, and their scores.

Letters: N systems, B windows, L steps of one, K inner steps.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torchopt
from memory import peak_of
from schedules import rate_at
from serious_data import Data
from serious_tasks import HORIZONS, Episodes
from torch import Tensor, nn
from torch.func import vmap

from ssmrl import GRU, LSTM, MLP, DiagonalSSM, MetaMAML, StateSpaceModel, Transformer, adapt, mse_loss
from ssmrl.adaptation import clip_by_global_norm, learning_rates, scale_by_learning_rates
from ssmrl.core import WithInputGains, functional_forward
from ssmrl.env_runner import derive_seed
from ssmrl.meta_rl import NonFinite, dynamics_data, model_step, predict_open_loop

__all__ = ["LARGEST", "MODELS", "Learners", "errors", "finite", "made", "one_step", "run", "scaled", "stream"]

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "StateSpaceModel": lambda inputs, outputs: StateSpaceModel(64, inputs, outputs, hidden_dim=128),
    "LSTM": lambda inputs, outputs: LSTM(64, inputs, outputs),
    "GRU": lambda inputs, outputs: GRU(72, inputs, outputs),
    "Transformer": lambda inputs, outputs: Transformer(32, inputs, outputs, hidden_dim=128, window=24),
    "MLP": lambda inputs, outputs: MLP(inputs, outputs, hidden_dim=128),
    "DiagonalSSM": lambda inputs, outputs: DiagonalSSM(32, inputs, outputs, hidden_dim=64),
}
"""Of about as many weights each."""


def made(name: str, data: Data) -> nn.Module:
    """A model of this name; where actuators may be dead, with a gain for every one of them, (A,), of 1 at first."""
    model = MODELS[name](data.inputs, data.outputs)
    return WithInputGains(model, len(data.no_action), data.no_action) if data.dead_actuators else model


GAIN = "gain"
"""The name that `WithInputGains` gives its gains."""


def one_step(model: nn.Module, params: Any, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of the normalised change, every step from what was observed."""
    return mse_loss(functional_forward(model, params, x)[0], y)


def stream(seed: int, phase: int) -> torch.Generator:
    """Random numbers of one phase of a seed, which no other phase has."""
    return torch.Generator().manual_seed(derive_seed(seed, phase))


def trained(
    learner: MetaMAML,
    data: Data,
    updates: range,
    total: int,
    generator: torch.Generator,
    windows: int | None = None,
) -> tuple[float, float | None]:
    """Make these of `total` updates; the median milliseconds of one, and the megabytes that the last one took."""
    times, megabytes = [], None
    for update in updates:
        for group in learner.outer_step.optimizer.param_groups:
            group["lr"] = rate_at(update, total, data.size.outer_lr)
        tasks = data.batch(generator, windows)
        began = time.perf_counter()
        if update == updates[-1] and sys.platform == "linux":
            _, megabytes = peak_of(partial(learner.meta_update, tasks))
        else:
            learner.meta_update(tasks)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times), megabytes


class Learners:
    """The two trainings of a model, whose compiled updates serve all seeds."""

    def __init__(self, name: str, data: Data) -> None:
        size = data.size
        self.data, self.name = data, name
        self.model = made(name, data)
        self.rates = learning_rates(dict(self.model.named_parameters()), size.rates[0])  # another one before it learns
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
        self._beginning = copy.deepcopy([learner.state_dict() for learner in (self.maml, self.joint)])

    def begin(self, seed: int) -> None:
        """New weights, and optimizers and counters as in a new object."""
        for learner, state in zip((self.maml, self.joint), self._beginning, strict=True):
            learner.load_state_dict(state)
        torch.manual_seed(seed)
        self.model.load_state_dict(made(self.name, self.data).state_dict())

    def go_on_from(self, params: dict[str, Tensor], rate: float) -> None:
        """MAML begins with these weights and this rate of every tensor, the gains apart, which have their own."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(params[name])
                self.rates[name].fill_(self.data.size.gain_rate if name == GAIN else rate)

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


class Way(NamedTuple):
    """Of adapting without meta-training."""

    gains_alone: bool
    rate: float


def ways_to_adapt(data: Data) -> list[Way]:
    """All weights at every rate, and where models have gains, these alone."""
    return [Way(alone, rate) for alone in (False, True)[: 1 + data.dead_actuators] for rate in data.size.rates]


def rates_of(way: Way, params: Any) -> dict[str, Tensor]:
    """Of every tensor."""
    return {name: torch.full((), 0.0 if way.gains_alone and name != GAIN else way.rate) for name in params}


def best_way(model: nn.Module, data: Data, params: Any, ways: list[Way]) -> Way:
    """The one with the lowest error after adaptation.

    It is the median over systems that are held out of the training, five steps ahead.
    """
    support_x, support_y, *_ = data.tested(data.held_out)
    medians = []
    for way in ways:
        after = adapted(model, params, rates_of(way, params), data.size.inner_steps, support_x, support_y)
        medians.append(statistics.median(errors(model, data, after, data.held_out, data.size.context)[1]))
    return ways[medians.index(min(medians))]


def run(learners: Learners, seed: int) -> dict[str, Any]:
    """Both trainings with a seed, and what they are worth on the systems of the test.

    They share their first part, in which a model learns from all systems at once; then one of them goes on with that,
    and the other one with MAML, from the rate of adaptation that suits the model best by then. The one that goes on is
    adapted in the way that is best on the systems held out; what all other ways had given is there, too.
    """
    data, model, size = learners.data, learners.model, learners.data.size
    support_x, support_y, *_ = data.tested(data.test)
    number = len(data.test.action)

    def before(params: Any) -> list[list[float]]:
        alike = {name: p.expand(number, *p.shape) for name, p in params.items()}
        return errors(model, data, alike, data.test, size.context)

    def after(params: Any, rates: Any) -> list[list[float]]:
        of_each = adapted(model, params, rates, size.inner_steps, support_x, support_y)
        return errors(model, data, of_each, data.test, size.context)

    learners.begin(seed)
    shared, total = size.shared_updates, size.joint_updates
    trained(learners.joint, data, range(shared), total, stream(seed, 0), size.joint_windows)
    shared_params, _ = learners.weights()

    cost = trained(learners.joint, data, range(shared, total), total, stream(seed, 1), size.joint_windows)
    params, _ = learners.weights()
    ways = ways_to_adapt(data)
    way = best_way(model, data, params, ways)
    of_ways = [after(params, rates_of(one, params)) for one in ways]
    joint = {"before": before(params), "after": of_ways[ways.index(way)], "left out": learners.joint.left_out}
    joint |= {"way": way._asdict(), "after, any way": of_ways}
    joint |= {"milliseconds": cost[0], "megabytes": cost[1]}

    all_weights = [one for one in ways if not one.gains_alone]
    learners.go_on_from(shared_params, best_way(model, data, shared_params, all_weights).rate)
    cost = trained(learners.maml, data, range(size.updates), size.updates, stream(seed, 2))
    meta, rates = learners.weights()
    maml = {"before": before(meta), "after": after(meta, rates), "left out": learners.maml.left_out}
    maml |= {"milliseconds": cost[0], "megabytes": cost[1]}
    return {"parameters": sum(p.numel() for p in params.values()), "maml": maml, "joint": joint, "weights": params}
