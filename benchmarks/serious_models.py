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

__all__ = [
    "GAIN",
    "LARGEST",
    "MODELS",
    "Learners",
    "after_steps",
    "alike",
    "before_steps",
    "beginnings_of_maml",
    "best_steps",
    "errors",
    "finite",
    "made",
    "one_step",
    "rates_of",
    "run",
    "scaled",
    "shared_part",
    "steps_to_choose_from",
    "stream",
    "trained",
]

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "StateSpaceModel": lambda inputs, outputs: StateSpaceModel(64, inputs, outputs, hidden_dim=128),
    "LSTM": lambda inputs, outputs: LSTM(64, inputs, outputs),
    "GRU": lambda inputs, outputs: GRU(72, inputs, outputs),
    "Transformer": lambda inputs, outputs: Transformer(32, inputs, outputs, hidden_dim=128, window=24),
    "MLP": lambda inputs, outputs: MLP(inputs, outputs, hidden_dim=128),
    "DiagonalSSM": lambda inputs, outputs: DiagonalSSM(32, inputs, outputs, hidden_dim=64),
}
"""Of about as many weights each."""
GAIN = "gain"
"""The name that `WithInputGains` gives its gains."""


def made(name: str, data: Data) -> nn.Module:
    """A model of this name; where actuators may be dead, with a gain for every one of them, (A,), of 1 at first."""
    model = MODELS[name](data.inputs, data.outputs)
    return WithInputGains(model, len(data.no_action), data.no_action) if data.dead_actuators else model


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


class Steps(NamedTuple):
    """Rates of gradient steps that were not meta-trained."""

    rate: float
    """Of all weights; 0: they stay as they are."""
    gain_rate: float
    """Of the gains, where a model has them."""

    def of(self, name: str) -> float:
        """Of a tensor."""
        return self.gain_rate if name == GAIN else self.rate


def steps_to_choose_from(data: Data) -> list[Steps]:
    """Every rate of the weights with every rate of the gains, if there are gains, and at least one of them above 0."""
    if not data.dead_actuators:
        return [Steps(rate, 0.0) for rate in data.size.rates]
    pairs = [Steps(rate, gain_rate) for rate in (0.0, *data.size.rates) for gain_rate in (0.0, *data.size.gain_rates)]
    return pairs[1:]


def beginnings_of_maml(data: Data) -> list[Steps]:
    """Those whose every tensor moves, the gains at the rate that the size has for them."""
    return [Steps(rate, data.size.gain_rate) for rate in data.size.rates]


def rates_of(steps: Steps, params: Any) -> dict[str, Tensor]:
    """Of the tensors that move."""
    return {name: torch.full((), steps.of(name)) for name in params if steps.of(name) > 0}


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

    def go_on_from(self, params: dict[str, Tensor], steps: Steps) -> None:
        """MAML begins with these weights, and with the rates of such steps."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(params[name])
                self.rates[name].fill_(steps.of(name))

    def weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of the weights and of the rates."""
        params = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return params, {name: rate.detach().clone() for name, rate in self.rates.items()}


def descent(rates: Any) -> Any:
    """The inner optimizer: gradient descent on a gradient of norm 1 at most."""
    return torchopt.chain(clip_by_global_norm(1.0), scale_by_learning_rates(rates))


def adapted(model: nn.Module, params: Any, rates: Any, steps: int, x: Tensor, y: Tensor) -> Any:
    """Weights of every system, (N, ...), after K steps on windows (N, B, L, ...), of those tensors that have rates."""
    moving = {name: params[name] for name in rates}

    def loss(moving: Any, x: Tensor, y: Tensor) -> Tensor:
        return one_step(model, {**params, **moving}, x, y)

    def of_one(x: Tensor, y: Tensor) -> Any:
        return adapt(loss, moving, x, y, optimizer=descent(rates), num_steps=steps).params

    with torch.no_grad():
        return {**alike(params, len(x)), **vmap(of_one)(x, y)}


def alike(params: Any, number: int) -> dict[str, Tensor]:
    """The same weights for every system, (N, ...)."""
    return {name: p.expand(number, *p.shape) for name, p in params.items()}


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


def best_steps(model: nn.Module, data: Data, params: Any, choices: list[Steps]) -> Steps:
    """The ones with the lowest error after adaptation.

    It is the median over systems that are held out of the training, five steps ahead.
    """
    support_x, support_y, *_ = data.tested(data.held_out)
    medians = []
    for steps in choices:
        after = adapted(model, params, rates_of(steps, params), data.size.inner_steps, support_x, support_y)
        medians.append(statistics.median(errors(model, data, after, data.held_out, data.size.context)[1]))
    return choices[medians.index(min(medians))]


def before_steps(model: nn.Module, data: Data, params: Any) -> list[list[float]]:
    """Errors on the systems of the test, as `errors` gives them, without adaptation."""
    return errors(model, data, alike(params, len(data.test.action)), data.test, data.size.context)


def after_steps(model: nn.Module, data: Data, params: Any, rates: Any) -> list[list[float]]:
    """Those after adaptation to every system."""
    support_x, support_y, *_ = data.tested(data.test)
    of_each = adapted(model, params, rates, data.size.inner_steps, support_x, support_y)
    return errors(model, data, of_each, data.test, data.size.context)


def shared_part(learners: Learners, seed: int) -> dict[str, Tensor]:
    """The weights that both trainings go on from: new ones that have learned from all systems at once."""
    data, size = learners.data, learners.data.size
    learners.begin(seed)
    trained(learners.joint, data, range(size.shared_updates), size.joint_updates, stream(seed, 0), size.joint_windows)
    params, _ = learners.weights()
    return params


def run(learners: Learners, seed: int) -> dict[str, Any]:
    """Both trainings with a seed, and what they are worth on the systems of the test.

    They share their first part, in which a model learns from all systems at once; then one of them goes on with that,
    and the other one with MAML, from the rate of adaptation that suits the model best by then. The one that goes on is
    adapted by the steps that are best on the systems held out; what all others had given is there, too.
    """
    data, model, size = learners.data, learners.model, learners.data.size
    shared_params = shared_part(learners, seed)

    rest, total = range(size.shared_updates, size.joint_updates), size.joint_updates
    cost = trained(learners.joint, data, rest, total, stream(seed, 1), size.joint_windows)
    params, _ = learners.weights()
    choices = steps_to_choose_from(data)
    chosen = best_steps(model, data, params, choices)
    of_each = [after_steps(model, data, params, rates_of(steps, params)) for steps in choices]
    joint = {"before": before_steps(model, data, params), "after": of_each[choices.index(chosen)]}
    joint |= {"left out": learners.joint.left_out, "steps": chosen._asdict(), "after, any steps": of_each}
    joint |= {"milliseconds": cost[0], "megabytes": cost[1]}

    learners.go_on_from(shared_params, best_steps(model, data, shared_params, beginnings_of_maml(data)))
    cost = trained(learners.maml, data, range(size.updates), size.updates, stream(seed, 2))
    meta, rates = learners.weights()
    maml = {"before": before_steps(model, data, meta), "after": after_steps(model, data, meta, rates)}
    maml |= {"left out": learners.maml.left_out, "milliseconds": cost[0], "megabytes": cost[1]}
    maml |= {"rates": {name: float(r) for name, r in rates.items()}}
    return {"parameters": sum(p.numel() for p in params.values()), "maml": maml, "joint": joint, "weights": params}
