"""Meta-learn a model of CartPole or Pendulum that adapts to physics it has never met.

Every task is the environment with gravity, masses and lengths of its own, each 1.5^U(-2, 2) times the usual. A
`StateSpaceModel` predicts the next observation from observation and action. It is meta-trained with `MetaMAML` on
some physics, and adapted with `Adapter`, a few gradient steps on four short windows, to physics from another range
of seeds. The table compares what is left of the error with what simpler ways leave.

    python examples/adapt_dynamics.py --env Pendulum-v1 --seed 1
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import torch
import tyro
from tqdm import tqdm

from ssmrl import AdaptationConfig, Adapter, Environment, MetaMAML, StateSpaceModel, mse_loss
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

TASK_BATCH = 10  # tasks of one meta-update
NUM_SUPPORT = NUM_QUERY = 4  # windows that a task is learned from and judged on
CURVE_STEPS = 10  # adaptation steps in the plot
OPEN_LOOP_AFTER = 4  # steps of the plotted window in which the model sees true observations
MAX_GRAD_NORM = 0.1  # tight: tasks with extreme physics have gradients a hundred times those of others
RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # from which the baselines get the best one


@dataclass(frozen=True)
class Size:
    """How much is spent: updates, tasks, and windows recorded of each task."""

    epochs: int
    train_tasks: int
    test_tasks: int
    windows: int


SIZES = {
    "tiny": Size(epochs=4, train_tasks=6, test_tasks=3, windows=8),
    "quick": Size(epochs=200, train_tasks=100, test_tasks=20, windows=12),
    "default": Size(epochs=400, train_tasks=200, test_tasks=40, windows=16),
    "large": Size(epochs=1500, train_tasks=500, test_tasks=100, windows=24),
}


@dataclass(frozen=True)
class Recipe:
    """What fits one environment."""

    length: int  # steps of a window
    inner_steps: int
    inner_lr: float
    outer_lr: float
    joint_lr: float  # of training without MAML: the best of 0.0015, 0.003, 0.006, 0.01, 0.02
    shown: tuple[int, str]  # component of the observation that is plotted, and its name


RECIPES = {
    "CartPole-v1": Recipe(
        length=20,
        inner_steps=3,
        inner_lr=0.03,
        outer_lr=3e-3,
        joint_lr=6e-3,
        shown=(3, "angular velocity of the pole (rad/s)"),
    ),
    "Pendulum-v1": Recipe(
        length=16, inner_steps=5, inner_lr=0.1, outer_lr=6e-3, joint_lr=1e-2, shown=(2, "angular velocity (rad/s)")
    ),
}


@dataclass(frozen=True)
class Arguments:
    """Meta-learn a model that adapts to unknown physics, and compare it with simpler ways."""

    env: Literal["CartPole-v1", "Pendulum-v1"] = "CartPole-v1"
    """Gymnasium environment."""
    size: Literal["tiny", "quick", "default", "large"] = "default"
    """How much to spend: under a minute on 2 cores by default."""
    epochs: int | None = None
    """Meta-updates, of 10 tasks each; None: what the size says."""
    seed: int = 0
    """Decides physics, data, weights and batches."""
    out: Path = Path("output")
    """Folder for the plot (PNG) and the figures (JSON)."""


@dataclass
class Data:
    """Windows of N tasks, normalised by the training tasks' statistics."""

    x: torch.Tensor  # (N, W, T, D) observation and action
    y: torch.Tensor  # (N, W, T, O) change of the observation

    def draw(self, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """A stack of tasks, each with random windows as support and query."""
        num_tasks, num_windows = self.x.shape[:2]
        task = torch.randint(num_tasks, (TASK_BATCH, 1), generator=generator)
        order = torch.rand(TASK_BATCH, num_windows, generator=generator).argsort(1)
        support, query = order[:, :NUM_SUPPORT], order[:, NUM_SUPPORT : NUM_SUPPORT + NUM_QUERY]
        return self.x[task, support], self.y[task, support], self.x[task, query], self.y[task, query]

    def held_out(self) -> tuple[torch.Tensor, ...]:
        """All tasks: support is their first windows, query all the others."""
        n = NUM_SUPPORT
        return self.x[:, :n], self.y[:, :n], self.x[:, n:], self.y[:, n:]


def balance(seed: int):
    """CartPole: push towards the side the pole falls to, half of the time; random pushes alone end in 20 steps."""
    generator = torch.Generator().manual_seed(seed)

    def policy(observation, hidden_state, reset):
        x, v, angle, omega = observation.T
        push = (angle + 0.5 * omega + 0.1 * v + 0.05 * x > 0).long()
        other = torch.randint(2, push.shape, generator=generator)
        return torch.where(torch.rand(push.shape, generator=generator) < 0.5, other, push), hidden_state

    return policy


def collect(env_id: str, physics_seeds: range, num_windows: int, seed: int, label: str) -> Data:
    """Record `num_windows` windows of every task from the Gymnasium environment, one row per task."""
    length = RECIPES[env_id].length
    makers = [partial(make_with_physics, env_id, sample_physics(env_id, s)) for s in physics_seeds]
    # More than is needed, since windows do not cross the ends of episodes, which only CartPole has many of.
    num_steps = int((2 if env_id == "CartPole-v1" else 1.25) * num_windows * length)
    with Environment(makers, seed=seed, autoreset_mode="Disabled") as environment, progress(num_steps, label) as bar:
        action_space = environment.single_action_space
        policy = balance(seed) if env_id == "CartPole-v1" else random_policy(action_space, seed)
        trajectory, _ = rollout(policy, environment, num_steps, progress=bar.update)
    windows, _ = split_support_query(cut_windows(trajectory, length), num_windows - 1, 1)
    everything = torch.cat([windows.observation, action_features(windows.action, action_space)], -1)
    return Data(everything, windows.next_observation - windows.observation)


def normalise(train: Data, test: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring both to mean 0 and deviation 1 of the training tasks, in place; returns the scale of x and of y."""
    scales = []
    for name in ("x", "y"):
        values = getattr(train, name).flatten(0, 2)
        mean, std = values.mean(0), values.std(0)
        scales.append(torch.stack([mean, std]))
        for data in (train, test):
            setattr(data, name, (getattr(data, name) - mean) / std)
    return scales[0], scales[1]


def progress(total: int, label: str) -> tqdm:
    return tqdm(total=total, desc=label, file=sys.stdout, mininterval=0.5, dynamic_ncols=True)


def cosine(optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)


def meta_train(model: StateSpaceModel, train: Data, test: Data, recipe: Recipe, epochs: int, seed: int):
    """(a): MetaMAML. Returns held-out query losses after adaptation, over epochs, and how many updates diverged."""
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.outer_lr)
    schedule = cosine(optimizer, epochs)
    maml = MetaMAML(
        model,
        recipe.inner_lr,
        inner_steps=recipe.inner_steps,
        outer_optimizer=optimizer,
        max_grad_norm=MAX_GRAD_NORM,
        nonfinite=NonFinite("skip"),  # the inner steps of an extreme task may run away
    )
    generator = torch.Generator().manual_seed(seed)
    held_out = test.held_out()
    curve = [(0, maml.evaluate(held_out).mean().item())]
    every = max(1, epochs // 20)
    with progress(epochs, "meta-training") as bar:
        for epoch in range(1, epochs + 1):
            maml.meta_update(train.draw(generator))
            schedule.step()
            bar.update()
            if epoch % every == 0 or epoch == epochs:
                curve.append((epoch, maml.evaluate(held_out).mean().item()))
                bar.set_postfix(held_out=f"{curve[-1][1]:.4f}")
    return curve, maml.left_out


def train_on_all_tasks(model: StateSpaceModel, train: Data, recipe: Recipe, epochs: int, seed: int) -> None:
    """(b): the same windows of the same tasks, without MAML, with as many gradients as MAML takes: K + 1 an epoch."""
    updates = epochs * (recipe.inner_steps + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.joint_lr)
    schedule = cosine(optimizer, updates)
    generator = torch.Generator().manual_seed(seed)
    with progress(updates, "training without MAML") as bar:
        for _ in range(updates):
            support_x, support_y, query_x, query_y = train.draw(generator)
            x = torch.cat([support_x, query_x], 1).flatten(0, 1)
            y = torch.cat([support_y, query_y], 1).flatten(0, 1)
            loss = mse_loss(model(x)[0], y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            bar.update()


def best_rate(model: StateSpaceModel, test: Data, num_steps: int) -> tuple[float, float]:
    """The rate of `RATES` that adapts this model best on the held-out tasks themselves, and the error it leaves."""
    errors = {r: MetaMAML(model, r, inner_steps=num_steps).evaluate(test.held_out()).mean().item() for r in RATES}
    rate = min(errors, key=lambda r: errors[r] if math.isfinite(errors[r]) else math.inf)
    return rate, errors[rate]


def adaptation_curve(model: StateSpaceModel, test: Data, rate: float) -> torch.Tensor:
    """Query error of every held-out task after 0, 1, ... steps of `Adapter`, (N, steps + 1); inf once it diverged."""
    errors = torch.full((len(test.x), CURVE_STEPS + 1), math.inf)
    adapter = Adapter(model, AdaptationConfig(learning_rate=rate, num_steps=1))
    for task, (support_x, support_y, query_x, query_y) in enumerate(zip(*test.held_out(), strict=True)):
        for step in range(CURVE_STEPS + 1):
            with torch.no_grad():
                errors[task, step] = mse_loss(model(query_x)[0], query_y)
            if step < CURVE_STEPS:
                try:
                    adapter.update_step(support_x, support_y, model.init_hidden(len(support_x)))
                except FloatingPointError:
                    break
        adapter.reset()
    return errors


@torch.no_grad()
def open_loop(model: StateSpaceModel, x: torch.Tensor, scale_x: torch.Tensor, scale_y: torch.Tensor):
    """Predicted observations (T, O) of one window (T, D): true ones go in at first, then the model's own."""
    num_observed = scale_y.shape[1]
    mean, std = scale_x[0, :num_observed], scale_x[1, :num_observed]
    state = model.init_hidden(1)
    observation, predicted = x[0, :num_observed] * std + mean, []
    for t in range(len(x)):
        if t < OPEN_LOOP_AFTER:
            observation = x[t, :num_observed] * std + mean
        inputs = torch.cat([(observation - mean) / std, x[t, num_observed:]])
        change, state = model(inputs[None], state)
        observation = observation + change[0] * scale_y[1] + scale_y[0]
        predicted.append(observation)
    return torch.stack(predicted)


def interval(errors: torch.Tensor) -> tuple[float, float]:
    """Mean over tasks and the half-width of its 95 % interval (normal approximation)."""
    return errors.mean().item(), 1.96 * errors.std().item() / math.sqrt(len(errors))


def plot(path: Path, title: str, curve, curves, window, recipe: Recipe) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    left.plot(*zip(*curve, strict=True), marker=".")
    left.set(xlabel="meta-update", ylabel="normalised error", yscale="log", title="held-out tasks, after adaptation")
    for label, (errors, style) in curves.items():
        stays = errors.isfinite().all(0) & (errors.mean(0) < 10)
        steps = torch.arange(errors.shape[1])[stays]
        mean = errors.mean(0)[stays]
        half = 1.96 * errors.std(0)[stays] / math.sqrt(len(errors))
        (line,) = middle.plot(steps, mean, style, label=label)
        middle.fill_between(steps, (mean - half).clamp(min=mean / 3), mean + half, alpha=0.2, color=line.get_color())
        if not stays.all():
            middle.plot(steps[-1], mean[-1], "x", markersize=10, color=line.get_color())
    middle.set(xlabel="adaptation step", ylabel="normalised error", yscale="log", title="held-out tasks, 95 % interval")
    middle.set_ylim(top=200)
    middle.legend(fontsize=8, loc="upper right")
    component, name = recipe.shown
    for label, (values, style) in window.items():
        right.plot(range(1, len(values) + 1), values[:, component], style, label=label)
    right.set(xlabel="step", ylabel=name, title=f"the median held-out task; open loop after {OPEN_LOOP_AFTER} steps")
    right.axvline(OPEN_LOOP_AFTER, color="grey", linestyle=":")
    right.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Arguments) -> dict:
    torch.set_num_threads(1)  # products this small gain nothing from a second thread, and lose much on a busy machine
    started = time.perf_counter()
    size, recipe, seed = SIZES[arguments.size], RECIPES[arguments.env], arguments.seed
    epochs = size.epochs if arguments.epochs is None else arguments.epochs
    first = 1_000_000 * seed  # physics are drawn from disjoint ranges of seeds
    train_seeds = range(first, first + size.train_tasks)
    test_seeds = range(first + 500_000, first + 500_000 + size.test_tasks)
    train = collect(arguments.env, train_seeds, size.windows, 2 * seed, "training physics")
    test = collect(arguments.env, test_seeds, size.windows, 2 * seed + 1, "held-out physics")
    scale_x, scale_y = normalise(train, test)
    collected = time.perf_counter()

    def new_model() -> StateSpaceModel:
        torch.manual_seed(seed)
        return StateSpaceModel(state_dim=32, input_dim=train.x.shape[-1], output_dim=train.y.shape[-1], hidden_dim=64)

    untrained, meta, joint = new_model(), new_model(), new_model()
    curve, left_out = meta_train(meta, train, test, recipe, epochs, seed)
    meta_trained = time.perf_counter()
    train_on_all_tasks(joint, train, recipe, epochs, seed)
    trained = time.perf_counter()

    joint_rate, _ = best_rate(joint, test, recipe.inner_steps)
    joint_rate_20, joint_error_20 = best_rate(joint, test, 20)
    untrained_rate, _ = best_rate(untrained, test, recipe.inner_steps)
    too_high = 0.2 if recipe.inner_lr < 0.2 else 1.0
    of_meta = adaptation_curve(meta, test, recipe.inner_lr)
    of_joint = adaptation_curve(joint, test, joint_rate)
    of_untrained = adaptation_curve(untrained, test, untrained_rate)
    of_too_high = adaptation_curve(meta, test, too_high)

    k = recipe.inner_steps
    errors = {
        "meta_before": of_meta[:, 0],
        "meta_after": of_meta[:, k],
        "joint_before": of_joint[:, 0],
        "joint_after": of_joint[:, k],
        "untrained_before": of_untrained[:, 0],
        "untrained_after": of_untrained[:, k],
    }
    means = {name: interval(e) for name, e in errors.items()}
    after = means["meta_after"][0]
    result = {
        "settings": asdict(size) | asdict(recipe) | asdict(arguments) | {"epochs": epochs, "out": None},
        "errors": {name: {"mean": m, "ci95": h} for name, (m, h) in means.items()},
        "rates": {"meta": recipe.inner_lr, "joint": joint_rate, "untrained": untrained_rate},
        "joint_after_20_steps": {"mean": joint_error_20, "rate": joint_rate_20},
        "loss_reduction": 1 - curve[-1][1] / curve[0][1],
        "adaptation_gain": 1 - after / means["meta_before"][0],
        "ratio_to_joint": after / means["joint_before"][0],
        "ratio_to_joint_adapted": after / means["joint_after"][0],
        "meta_curve": curve,
        "diverged_updates": left_out,
        "rate_too_high": {
            "rate": too_high,
            "diverged_tasks": int((~of_too_high.isfinite()).any(1).sum()),
            "median_by_step": [m if math.isfinite(m) else None for m in of_too_high.median(0).values.tolist()],
        },
        "seconds": {
            "data": collected - started,
            "meta_training": meta_trained - collected,
            "joint_training": trained - meta_trained,
            "all": time.perf_counter() - started,
        },
        "versions": {name: version(name) for name in ("ssmrl", "torch", "torchopt", "gymnasium", "numpy")}
        | {"python": platform.python_version()},
        "command": "python examples/adapt_dynamics.py " + " ".join(sys.argv[1:]),
    }

    rows = [
        ("(a) meta-trained", "meta_before", "meta_after", recipe.inner_lr),
        ("(b) trained on all tasks, not adapted", "joint_before", None, None),
        ("(c) trained on all tasks, adapted at its best rate", "joint_before", "joint_after", joint_rate),
        ("(d) untrained, at its best rate", "untrained_before", "untrained_after", untrained_rate),
    ]
    print(f"\n{arguments.env}, {size.test_tasks} held-out tasks: normalised error of the predicted change")
    print(f"(1 = as good as the mean), before and after {k} steps on {NUM_SUPPORT} windows of {recipe.length}\n")
    print(f"{'':52}{'rate':>6}{'before':>18}{'after':>20}")
    for label, before_name, after_name, rate in rows:
        cells = ["{:.4f} ± {:.4f}".format(*means[n]) if n else "" for n in (before_name, after_name)]
        print(f"{label:52}{rate or '':>6}{cells[0]:>18}{cells[1]:>20}")
    print(
        f"\nmeta-training took {result['loss_reduction']:.1%} off the error after adaptation; adaptation takes "
        f"{result['adaptation_gain']:.1%} off\nthe meta-trained model's; adapted, (a) has "
        f"{result['ratio_to_joint']:.2f} of the error of (b) and {result['ratio_to_joint_adapted']:.2f} of (c)."
    )

    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"adapt_dynamics_{arguments.env}_seed{seed}"
    task = int(of_meta[:, k].argsort()[len(test.x) // 2])
    window_x, window_y = test.x[task, -1], test.y[task, -1]
    observed = scale_y.shape[1]
    truth = window_x[:, :observed] * scale_x[1, :observed] + scale_x[0, :observed] + window_y * scale_y[1] + scale_y[0]
    predict = partial(open_loop, x=window_x, scale_x=scale_x, scale_y=scale_y)
    window = {"true": (truth, "k-"), "(a) before adaptation": (predict(meta), "C0:")}
    adapter = Adapter(meta, AdaptationConfig(learning_rate=recipe.inner_lr, num_steps=k))
    adapter.update_step(test.x[task, :NUM_SUPPORT], test.y[task, :NUM_SUPPORT], meta.init_hidden(NUM_SUPPORT))
    window["(a) adapted"] = (predict(meta), "C0-")
    adapter.reset()
    window["(b) not adapted"] = (predict(joint), "C1--")
    curves = {
        f"(a) meta-trained, rate {recipe.inner_lr}": (of_meta, "C0-"),
        f"(b), (c) trained on all tasks, rate {joint_rate}": (of_joint, "C1-"),
        f"(d) untrained, rate {untrained_rate}": (of_untrained, "C2-"),
        f"(a) at a rate too high, {too_high}": (of_too_high, "C3:"),
    }
    title = f"{arguments.env} under unknown physics: meta-learned to adapt in {k} gradient steps"
    plot(stem.with_suffix(".png"), title, curve, curves, window, recipe)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1, default=str, allow_nan=False) + "\n")
    print(f"\nwrote {stem.with_suffix('.png')} and {stem.with_suffix('.json')} in {result['seconds']['all']:.0f} s")
    return result


if __name__ == "__main__":
    main(tyro.cli(Arguments))
