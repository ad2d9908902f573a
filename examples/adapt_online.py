"""Watch models adapt live: pendulums (or cart-poles) whose physics change abruptly while they run.

Several environments run side by side, each with gravity, masses and lengths of its own, all of which change twice, in
mid-episode and without a notice. One meta-trained `StateSpaceModel` predicts the next observation of each; a
`StreamAdapter` adapts it to every one of them while they run. The plot shows the error of predictions, made before
what they predict is seen: without adaptation, with it, with a reset every 50 steps, with a reset when the error says
so, and of weights that were fitted, in hindsight, to the very physics of that time.

    python examples/adapt_online.py --env CartPole-v1 --streams 32
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
import torch
import torchopt
import tyro
from torch.func import functional_call, vmap
from tqdm import tqdm

from ssmrl import AdaptationConfig, Environment, MetaMAML, StateSpaceModel, StreamAdapter, adapt
from ssmrl.adaptation import Guard, Window, reset_every, reset_on_rise
from ssmrl.env_runner import (
    action_features,
    cut_windows,
    make_with_physics,
    random_policy,
    rollout,
    sample_physics,
    split_support_query,
)
from ssmrl.meta_rl import NonFinite

mpl.use("Agg")
import matplotlib.pyplot as plt

RATE = {"Pendulum-v1": 0.1, "CartPole-v1": 0.03}
WINDOW, NUM_STEPS = 8, 5  # as trained, so used: gradient steps on the last transitions of a stream
FITTED_STEPS = 300  # of Adam, in hindsight
MAX_GRAD_NORM = 0.1  # tight: tasks with extreme physics have gradients a hundred times those of others


@dataclass(frozen=True)
class Size:
    """How much is spent: meta-updates, physics to train on, windows of each, and steps between two changes."""

    updates: int
    tasks: int
    windows: int
    every: int


SIZES = {"tiny": Size(4, 6, 3, 12), "default": Size(1500, 200, 12, 150)}


@dataclass(frozen=True)
class Arguments:
    """Adapt a meta-learned model live to environments whose physics change."""

    env: Literal["Pendulum-v1", "CartPole-v1"] = "Pendulum-v1"
    """Which environment."""
    streams: int = 16
    """Environments side by side."""
    seed: int = 0
    """Of everything."""
    size: Literal["tiny", "default"] = "default"
    """tiny runs in seconds, for tests."""
    out: Path = Path("output")
    """Folder for the plot and the figures."""


def progress(total: int, label: str) -> tqdm:
    return tqdm(total=total, desc=label, file=sys.stdout, mininterval=0.5, dynamic_ncols=True)


def policy_of(env_id: str, space, seed: int):
    """Random actions; CartPole's push to the side the pole falls to, half of the time, or episodes end in 20 steps."""
    if env_id != "CartPole-v1":
        return random_policy(space, seed)
    generator = torch.Generator().manual_seed(seed)

    def policy(observation, hidden_state, reset):
        x, v, angle, omega = observation.T
        push = (angle + 0.5 * omega + 0.1 * v + 0.05 * x > 0).long()
        other = torch.randint(2, push.shape, generator=generator)
        return torch.where(torch.rand(push.shape, generator=generator) < 0.5, other, push), hidden_state

    return policy


def collect(env_id: str, size: Size, seed: int):
    """Pairs of windows to adapt to and to be judged on, (pairs, 1, T, ·), of many physics."""
    makers = [partial(make_with_physics, env_id, sample_physics(env_id, 10_000 * seed + s)) for s in range(size.tasks)]
    num_steps = 3 * size.windows * WINDOW if env_id == "CartPole-v1" else 2 * size.windows * WINDOW
    with Environment(makers, seed=seed, autoreset_mode="Disabled") as environment, progress(num_steps, "data") as bar:
        space = environment.single_action_space
        record, _ = rollout(policy_of(env_id, space, seed), environment, num_steps, progress=bar.update)
    windows, _ = split_support_query(cut_windows(record, WINDOW), size.windows - 1, 1)
    x = torch.cat([windows.observation, action_features(windows.action, space)], -1)
    y = windows.next_observation - windows.observation
    scales = [(v.flatten(0, 2).mean(0), v.flatten(0, 2).std(0)) for v in (x, y)]
    x, y = ((v - mean) / std for v, (mean, std) in zip((x, y), scales, strict=True))
    return x, y, scales


def meta_train(model: StateSpaceModel, x, y, rate: float, updates: int, seed: int) -> None:
    """MAML on one window at a time: what a stream will have to adapt to."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    maml = MetaMAML(
        model,
        rate,
        inner_steps=NUM_STEPS,
        outer_optimizer=optimizer,
        max_grad_norm=MAX_GRAD_NORM,
        compile="trace",
        nonfinite=NonFinite("skip"),  # the inner steps of an extreme task may run away
    )
    generator = torch.Generator().manual_seed(seed)
    with progress(updates, "meta-training") as bar:
        for _ in range(updates):
            task = torch.randint(len(x), (20,), generator=generator)
            support, query = torch.rand(20, x.shape[1], generator=generator).argsort(1)[:, :2].T
            batch = [v[task, w][:, None] for w in (support, query) for v in (x, y)]
            bar.set_postfix(loss=f"{maml.meta_update(tuple(batch)):.4f}", left_out=maml.left_out, refresh=False)
            schedule.step()
            bar.update()


def live(arguments: Arguments, size: Size, model: StateSpaceModel, scales, rate: float):
    """Errors (T, N) of every way, and what the streams were, for fitting in hindsight."""
    (x_mean, x_std), (y_mean, y_std) = scales
    env_id, num = arguments.env, arguments.streams
    window = AdaptationConfig(rate, NUM_STEPS, window=Window(WINDOW), max_grad_norm=10.0)
    carry_on = AdaptationConfig(rate, 1, window=Window(WINDOW), max_grad_norm=10.0, guard=Guard())
    rise = reset_on_rise(5.0, fast=0.9, slow=0.02, keep=2)
    ways = {
        "adapting, from the anchor": _changed(window, from_anchor=True),
        "adapting, carrying on, guarded": carry_on,
        "adapting, reset every 50 steps": _changed(carry_on, reset=reset_every(50)),
        "adapting, reset when the error rises": _changed(carry_on, reset=rise),
    }
    adapters = {name: StreamAdapter(model, config, num, compile="trace") for name, config in ways.items()}
    states = {name: model.init_hidden(num) for name in ("no adaptation", *ways)}
    errors: dict[str, list[torch.Tensor]] = {name: [] for name in states}
    recorded = []

    makers = []
    for row in range(num):
        first, *later = (sample_physics(env_id, 5_000_000 + 1000 * arguments.seed + 3 * row + k) for k in range(3))
        changes = {size.every * k: physics for k, physics in enumerate(later, 1)}
        makers.append(partial(make_with_physics, env_id, first, changes=changes))
    total = 3 * size.every
    with (
        Environment(makers, seed=arguments.seed, autoreset_mode="Disabled") as environment,
        progress(total, f"{num} live streams") as bar,
    ):
        space = environment.single_action_space
        policy, hidden = policy_of(env_id, space, arguments.seed + 1), None
        observation = torch.as_tensor(environment.reset()[0])
        begins = torch.ones(num, dtype=torch.bool)
        for _ in range(total):
            action, hidden = policy(observation, hidden, begins)
            following, _, terminated, truncated, _ = environment.step(action.numpy())
            following = torch.as_tensor(following)
            x = (torch.cat([observation, action_features(action, space)], -1) - x_mean) / x_std
            y = (following - observation - y_mean) / y_std
            for name in states:
                with torch.no_grad():
                    predict = adapters.get(name, model)
                    prediction, state = predict(x, states[name], begins)
                errors[name].append((prediction - y).square().mean(-1))
                if name in adapters:
                    adapters[name].update_step(x, y, states[name], reset=begins)
                states[name] = state
            recorded.append((x, y, begins))
            ended = terminated | truncated
            begins = torch.as_tensor(ended)
            if ended.any():
                following = torch.as_tensor(environment.reset(options={"reset_mask": ended})[0])
            observation = following
            bar.update()
    x, y, begins = (torch.stack(values, 1) for values in zip(*recorded, strict=True))
    return {name: torch.stack(e) for name, e in errors.items()}, (x, y, begins)


def _changed(config: AdaptationConfig, **changes) -> AdaptationConfig:
    return AdaptationConfig(**{**config.__dict__, **changes})


def in_hindsight(model: StateSpaceModel, record, every: int) -> torch.Tensor:
    """Errors (T, N) of weights fitted to each stretch of each stream: as if its physics were known."""
    x, y, begins = (v.unflatten(1, (3, every)).flatten(0, 1)[:, None] for v in record)  # (N · 3, 1, every, ·)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def errors(params, x, y, begins):
        return (functional_call(model, params, (x, None, begins))[0] - y).square().mean(-1)

    def fitted(x, y, begins):
        loss = partial(lambda p, *data: errors(p, *data).mean())
        adapted = adapt(
            loss, params, x, y, begins, optimizer=torchopt.adam(3e-3), num_steps=FITTED_STEPS, first_order=True
        )
        return errors(adapted.params, x, y, begins)[0]

    return vmap(fitted)(x, y, begins).unflatten(0, (-1, 3)).flatten(1).T


def plot(path: Path, title: str, errors: dict[str, torch.Tensor], every: int) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.4), layout="constrained", width_ratios=(3, 2))
    for name, values in errors.items():
        style = {"color": "k", "lw": 1} if name == "no adaptation" else {"lw": 1.2}
        style = {"color": "0.5", "ls": ":"} if name.startswith("fitted") else style
        middle = values.median(1).values.numpy()  # single streams are off by orders of magnitude
        smooth = np.convolve(np.pad(middle, (2, 2), "edge"), np.ones(5) / 5, "valid")
        left.plot(smooth, label=name, **style)
        after = values.unflatten(0, (3, every))[1:].transpose(1, 2).flatten(0, 1).median(0).values
        right.plot(np.arange(1, every + 1), after.numpy(), **style)
    for switch in (every, 2 * every):
        left.axvline(switch, color="0.8", zorder=0)
    left.set(xlabel="step", ylabel="normalised squared error", yscale="log", title="median over streams")
    right.set(
        xlabel="steps after a change of physics", xscale="log", yscale="log", title="median over streams, changes"
    )
    left.legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Arguments) -> dict:
    torch.set_num_threads(1)  # products this small gain nothing from a second thread, and lose much on a busy machine
    if arguments.streams < 1:
        raise SystemExit("--streams must be at least 1.")
    size, rate = SIZES[arguments.size], RATE[arguments.env]
    x, y, scales = collect(arguments.env, size, arguments.seed)
    torch.manual_seed(arguments.seed)
    model = StateSpaceModel(state_dim=32, input_dim=x.shape[-1], output_dim=y.shape[-1], hidden_dim=64)
    meta_train(model, x, y, rate, size.updates, arguments.seed)
    errors, record = live(arguments, size, model, scales, rate)
    errors["fitted to the true physics, in hindsight"] = in_hindsight(model, record, size.every)

    print(
        f"\n{arguments.streams} streams of {arguments.env}: normalised squared error of the next observation's change"
    )
    print(f"{'':44}{'median':>10}{'mean':>10}{'10 steps after a change':>26}")
    result = {}
    for name, values in errors.items():
        soon = torch.cat([values[k * size.every : k * size.every + 10] for k in (1, 2)])
        result[name] = {
            "median": values.median().item(),
            "mean": values.mean().item(),
            "soon_after_a_change": soon.median().item(),
        }
        print(
            f"{name:44}{result[name]['median']:10.4f}{result[name]['mean']:10.4f}{result[name]['soon_after_a_change']:26.4f}"
        )

    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"adapt_online_{arguments.env}_seed{arguments.seed}"
    plot(stem.with_suffix(".png"), f"{arguments.env}, physics that change", errors, size.every)
    record_of_run = {"errors": result, "settings": asdict(arguments) | {"out": None} | asdict(size)}
    stem.with_suffix(".json").write_text(json.dumps(record_of_run, indent=1) + "\n")
    print(f"\nwrote {stem.with_suffix('.png')} and {stem.with_suffix('.json')}")
    return record_of_run


if __name__ == "__main__":
    main(tyro.cli(Arguments))
