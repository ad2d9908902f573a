"""Streams of systems whose dynamics switch, and models meta-trained to adapt to them, for `adaptation.py`.

Three systems: a linear one, whose best predictor is known, and Gymnasium's Pendulum-v1 and CartPole-v1 with gravity,
masses and lengths of their own. After every `switch_every` steps the dynamics are drawn anew, at once and without a
notice. Letters: N streams, T steps, D inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torchopt
from torch import Tensor
from torch.func import functional_call

from ssmrl import Environment, StateSpaceModel, adapt, mse_loss
from ssmrl.adaptation import clip_by_global_norm, learning_rates, scale_by_learning_rates
from ssmrl.env_runner import action_features, derive_seed, make_with_physics, random_policy, rollout, sample_physics
from ssmrl.meta_rl import MetaLearner

STATE_DIM = 4  # of the linear system
SPECTRAL_RADIUS = (0.7, 0.95)
INPUT_GAIN = 0.75
NOISE = 0.1
MAX_SKIPPED = 20  # meta-updates that may diverge before training gives up


class Scales(NamedTuple):
    """Mean and deviation of inputs (2, D) and of targets (2, O)."""

    x: Tensor
    y: Tensor


class Streams(NamedTuple):
    """T transitions of N streams, normalised; the dynamics switch at steps `switch_every`, 2 `switch_every`, ..."""

    x: Tensor
    """(N, T, D) observation and action."""
    y: Tensor
    """(N, T, O) what is predicted: the next state of the linear system, the change of an observation."""
    reset: Tensor
    """Bool (N, T) an episode begins at x. The dynamics go on over it: what identifies them should not be forgotten."""
    floor: Tensor
    """(N, T) squared error of the best predictor, which knows the dynamics: noise, or 0."""
    switch_every: int
    scales: Scales


def linear_streams(num_streams: int, num_steps: int, switch_every: int, seed: int) -> Streams:
    """A linear system z' = A z + b u + σ w, a new (A, b) at every switch; x = (z, u), y = z'.

    z ∈ R⁴, u ~ U[-1, 1], w ~ N(0, I), σ = 0.1; A = ρ Q with ρ ~ U[0.7, 0.95] and Q orthogonal, Haar distributed;
    b ~ N(0, 0.75² I). Then z has variance around 1, and the floor is σ² = 0.01. z goes on over a switch.
    """
    generator = torch.Generator().manual_seed(seed)
    num_regimes = math.ceil(num_steps / switch_every)
    shape = (num_regimes, num_streams)
    low, high = SPECTRAL_RADIUS
    radius = low + (high - low) * torch.rand(*shape, 1, 1, generator=generator)
    q, r = torch.linalg.qr(torch.randn(*shape, STATE_DIM, STATE_DIM, generator=generator))
    a = radius * q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # the signs make Q Haar distributed
    b = INPUT_GAIN * torch.randn(*shape, STATE_DIM, generator=generator)
    u = 2 * torch.rand(num_streams, num_steps, 1, generator=generator) - 1
    w = NOISE * torch.randn(num_streams, num_steps, STATE_DIM, generator=generator)
    z = torch.zeros(num_streams, STATE_DIM)
    states = [z]
    for t in range(num_steps):
        k = t // switch_every
        z = (a[k] @ z[..., None]).squeeze(-1) + b[k] * u[:, t] + w[:, t]
        states.append(z)
    z = torch.stack(states, 1)
    reset = torch.zeros(num_streams, num_steps, dtype=torch.bool)
    reset[:, 0] = True
    one = Scales(*(torch.tensor([[0.0], [1.0]]).expand(2, n) for n in (STATE_DIM + 1, STATE_DIM)))
    return Streams(torch.cat([z[:, :-1], u], -1), z[:, 1:], reset, w.square().mean(-1), switch_every, one)


def gym_streams(
    env_id: str,
    num_streams: int,
    num_steps: int,
    switch_every: int,
    seed: int,
    *,
    spread: float = 2.0,
    scales: Scales | None = None,
    progress: Callable[[int], object] | None = None,
) -> Streams:
    """Record Pendulum-v1 or CartPole-v1 under `sample_physics(spread=...)` that change abruptly, in mid-episode.

    x is observation and action, y the change of the observation, both normalised by `scales`: None takes those of this
    recording. Pendulum's actions are random; CartPole's push to the side the pole falls to, half of the time, since
    random ones alone end in 20 steps. The floor is 0: there is no noise.
    """
    makers = []
    for row in range(num_streams):
        seeds = [derive_seed(seed, row, k) for k in range(math.ceil(num_steps / switch_every))]
        first, *others = (sample_physics(env_id, s, spread=spread) for s in seeds)
        changes = {switch_every * k: physics for k, physics in enumerate(others, 1)}
        makers.append(partial(make_with_physics, env_id, first, changes=changes))
    with Environment(makers, seed=seed, autoreset_mode="Disabled") as environment:
        space = environment.single_action_space
        policy = balance(seed) if env_id == "CartPole-v1" else random_policy(space, seed)
        record, _ = rollout(policy, environment, num_steps, progress=progress)
    x = torch.cat([record.observation, action_features(record.action, space)], -1)
    y = record.next_observation - record.observation
    if scales is None:
        scales = Scales(*(torch.stack([v.flatten(0, 1).mean(0), v.flatten(0, 1).std(0)]) for v in (x, y)))
    x, y = ((values - mean) / std for values, (mean, std) in ((x, scales.x), (y, scales.y)))
    return Streams(x, y, record.reset, torch.zeros(num_streams, num_steps), switch_every, scales)


def balance(seed: int) -> Callable[..., Any]:
    """CartPole: push towards the side the pole falls to, half of the time."""
    generator = torch.Generator().manual_seed(seed)

    def policy(observation: Tensor, hidden_state: Any, reset: Tensor) -> tuple[Tensor, Any]:
        x, v, angle, omega = observation.T
        push = (angle + 0.5 * omega + 0.1 * v + 0.05 * x > 0).long()
        other = torch.randint(2, push.shape, generator=generator)
        return torch.where(torch.rand(push.shape, generator=generator) < 0.5, other, push), hidden_state

    return policy


# Models


def new_model(streams: Streams, seed: int) -> StateSpaceModel:
    torch.manual_seed(seed)
    return StateSpaceModel(state_dim=32, input_dim=streams.x.shape[-1], output_dim=streams.y.shape[-1], hidden_dim=64)


def draw(streams: Streams, num: int, before: int, after: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Windows (num, before + after, ·) of which the last `after` steps are of one regime.

    Half of them have a switch just there, so that what comes before is of another regime.
    """
    num_streams, num_steps = streams.x.shape[:2]
    every = streams.switch_every
    regimes = num_steps // every
    row = torch.randint(num_streams, (num,), generator=generator)
    regime = torch.randint(1, regimes, (num,), generator=generator)
    within = torch.randint(0, every - after + 1, (num,), generator=generator)
    within = torch.where(torch.rand(num, generator=generator) < 0.5, 0, within)
    index = (regime * every + within - before)[:, None] + torch.arange(before + after)
    return streams.x[row[:, None], index], streams.y[row[:, None], index]


def meta_train(
    model: StateSpaceModel,
    streams: Streams,
    *,
    num_steps: int,
    rate: float,
    updates: int,
    seed: int,
    learn_rates: bool = False,
    lengths: Sequence[int] = (4, 8, 16, 32),
    burn_in: int = 16,
    query: int = 16,
    num_tasks: int = 20,
    outer_lr: float = 3e-3,
    max_grad_norm: float = 1.0,
    unadapted: float = 0.1,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Tensor] | None:
    """Meta-train a model, in place, for the use that `StreamAdapter` makes of it with `from_anchor=True`.

    A task is a window of one stream: `burn_in` steps, maybe of another regime, leave a hidden state; K = `num_steps`
    gradient steps on the next m transitions, from that state; and the adapted model, whose state goes over those m
    once more, is judged on `query` steps after them. m is drawn from `lengths` for every update. To that loss
    `unadapted` times the one that the model leaves without adaptation is added, so that it is worth something before
    there is anything to adapt to.

    Args:
        learn_rates: learn a rate for every tensor of weights, all `rate` at first (Li et al. 2017, Meta-SGD).

    Returns:
        The learned rates, None where they are not.
    """
    meta: dict[str, Any] = {"params": dict(model.named_parameters())}
    if learn_rates:
        meta["rates"] = learning_rates(meta["params"], rate)

    def forward(params: Any, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        output, state = functional_call(model, params, (x[None], state))
        return output[0], state

    def loss_fn(params: Any, x: Tensor, y: Tensor, state: Tensor) -> Tensor:
        return mse_loss(forward(params, x, state)[0], y)

    def task_loss(meta: Any, task: Any) -> Tensor:
        params = meta["params"]
        optimizer = adaptation_optimizer(rate, meta.get("rates"))
        (early_x, x, query_x), (_, y, query_y) = task["x"], task["y"]
        _, state = forward(params, early_x, model.init_hidden(1))
        without = loss_fn(params, torch.cat([x, query_x]), torch.cat([y, query_y]), state)
        adapted = adapt(loss_fn, params, x, y, state, optimizer=optimizer, num_steps=num_steps).params
        _, state = forward(adapted, x, state)
        return loss_fn(adapted, query_x, query_y, state) + unadapted * without

    leaves = [*meta["params"].values(), *meta.get("rates", {}).values()]
    optimizer = torch.optim.Adam(leaves, lr=outer_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    learner = MetaLearner(task_loss, meta, outer_optimizer=optimizer, max_grad_norm=max_grad_norm)
    generator = torch.Generator().manual_seed(seed)
    skipped = 0
    for _ in range(updates):
        m = lengths[int(torch.randint(len(lengths), (), generator=generator))]
        x, y = draw(streams, num_tasks, burn_in, m + query, generator)
        sizes = [burn_in, m, query]
        try:
            learner.update({"x": x.split(sizes, 1), "y": y.split(sizes, 1)})
        except FloatingPointError:  # the inner loop diverged on an extreme task; the model is untouched: go on
            skipped += 1
            if skipped > MAX_SKIPPED:
                raise
        schedule.step()
        if progress is not None:
            progress(1)
    return {name: r.detach() for name, r in meta["rates"].items()} if learn_rates else None


def adaptation_optimizer(
    rate: float, rates: dict[str, Tensor] | None = None, max_grad_norm: float = 10.0
) -> torchopt.base.GradientTransformation:
    """Gradient descent, clipped, at one rate or at learned ones: what `meta_train` adapts with."""
    descent = torchopt.sgd(rate) if rates is None else scale_by_learning_rates(rates)
    return torchopt.chain(clip_by_global_norm(max_grad_norm), descent)


def train_hidden_state_only(
    model: StateSpaceModel,
    streams: Streams,
    *,
    updates: int,
    seed: int,
    length: int = 96,
    burn_in: int = 32,
    batch: int = 32,
    lr: float = 3e-3,
    max_grad_norm: float = 1.0,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Train a model, in place, that has nothing but its hidden state to tell it the dynamics: no MAML, no adaptation.

    A window is `burn_in` steps without a loss and `length` with it, cut anywhere from a stream, so that many hold a
    switch, at any place; the gradient goes back through all of it. The state goes on over ends of episodes.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(seed)
    num_streams, num_steps = streams.x.shape[:2]
    total = burn_in + length
    for _ in range(updates):
        row = torch.randint(num_streams, (batch, 1), generator=generator)
        start = torch.randint(0, num_steps - total + 1, (batch, 1), generator=generator)
        index = start + torch.arange(total)
        x, y = streams.x[row, index], streams.y[row, index]
        loss = mse_loss(model(x)[0][:, burn_in:], y[:, burn_in:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(1)
