"""Sinusoid regression (MAML, Finn et al. 2017, section 5.1 and table 2) with every algorithm of the family.

A task is y = A sin(x - φ) with A ~ U[0.1, 5], φ ~ U[0, π], x ~ U[-5, 5]; the network has two hidden layers of 40 ReLU
units; 70,000 outer steps of Adam at 0.001 on 25 tasks of 10 support and 10 query points each. Scored, as there, by
fine-tuning on K = 5 and 10 points: mean squared error on 600 new tasks after 0, 1, 5 and 10 steps, on K fresh points
and on a grid over [-5, 5]; means over seeds with 95 % Student t intervals.

    python benchmarks/sinusoid.py                                          # MAML, one seed: two minutes
    python benchmarks/sinusoid.py --seeds 3 --algorithms all               # the table of docs/sinusoid.md
    python benchmarks/sinusoid.py --seeds 3 --algorithms all --resume      # without the runs that were finished
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import torch
import torchopt
import tyro
from scipy import stats
from torch import Tensor
from torch.func import vmap

from ssmrl import MLP, adapt, mse_loss
from ssmrl.adaptation import (
    adapt_implicitly,
    clip_by_global_norm,
    conjugate_gradient,
    learning_rates,
    scale_by_learning_rates,
    split,
)
from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from ssmrl.core import functional_forward
from ssmrl.meta_rl import MetaLearner
from ssmrl.meta_rl.objectives import implicit_loss, multi_step_loss, post_adaptation_loss, reptile_loss

STEPS, SHOTS = (0, 1, 5, 10), (5, 10)
TRAIN_SHOTS, TASKS_PER_UPDATE, TEST_TASKS = 10, 25, 600
INNER_CLIP = 10.0  # where a step now and then diverges: learned rates grow, and the proximal problem is stiff
PUBLISHED = {"5": {"1": 0.67, "5": 0.38, "10": 0.35}}  # MAML, table 2


@dataclass(frozen=True)
class Arguments:
    """Sinusoid regression with the algorithms of the MAML family."""

    algorithms: tuple[str, ...] = ("maml",)
    """Some of maml, fomaml, anil, meta-sgd, maml++, cavia, reptile, imaml; or all."""
    seeds: int = 1
    """Runs of every algorithm, with seeds 0, 1, ..."""
    iterations: int = 70_000
    """Outer steps."""
    compile: Literal["inductor", "trace", "eager"] = "inductor"
    """How the meta-gradient is run."""
    runs: Path = Path("output/sinusoid")
    """Folder for what single runs found."""
    resume: bool = False
    """Take what is there of runs with the same arguments."""
    out: Path = Path("output/sinusoid.json")
    """File for the figures; the plot goes beside it."""


# Tasks


def draw_tasks(count: int, shots: int, generator: torch.Generator) -> dict[str, Tensor]:
    """(count, K, 1) support and query points of as many sinusoids, and the points of a grid."""
    uniform = partial(torch.rand, generator=generator)
    amplitude = 0.1 + 4.9 * uniform(count, 1, 1)
    phase = math.pi * uniform(count, 1, 1)
    x = 10 * uniform(count, 2 * shots, 1) - 5
    y = amplitude * (x - phase).sin()
    return {
        "support_x": x[:, :shots],
        "support_y": y[:, :shots],
        "query_x": x[:, shots:],
        "query_y": y[:, shots:],
        "amplitude": amplitude,
        "phase": phase,
    }


def with_grid(tasks: dict[str, Tensor], points: int = 101) -> dict[str, Tensor]:
    x = torch.linspace(-5, 5, points)[None, :, None].expand(len(tasks["phase"]), -1, -1)
    return {**tasks, "grid_x": x, "grid_y": tasks["amplitude"] * (x - tasks["phase"]).sin()}


def stream(seed: int, block: int = 500) -> Iterator[dict[str, Tensor]]:
    """Stacks of tasks without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        many = draw_tasks(block * TASKS_PER_UPDATE, TRAIN_SHOTS, generator)
        for start in range(0, block * TASKS_PER_UPDATE, TASKS_PER_UPDATE):
            yield {name: t[start : start + TASKS_PER_UPDATE] for name, t in many.items()}


# Algorithms: each is the loss that it minimises, and how it adapts when it is tested.


class Algorithm:
    """MAML, and what the others share with it."""

    adapted: str = ""  # names of the parameters that adapt begin so
    context_dim = 0
    rate = (
        0.001  # the default of the authors' code; with the paper's 0.01 single tasks diverge after 5 steps on 5 points
    )
    train_steps = 1
    first_order = False
    max_grad_norm: float | None = None

    def __init__(self) -> None:
        model = MLP(1 + self.context_dim, 1, hidden_dim=40)
        self.model = model
        self.meta: dict[str, Any] = {"params": dict(model.named_parameters())}

    def loss(self, own: dict[str, Tensor], others: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output, _ = functional_forward(self.model, {**others, **own}, x)
        return mse_loss(output, y)

    def parts(self, meta: dict[str, Any]) -> tuple[Any, Any]:
        """What adapts, and what does not."""
        return split(meta["params"], [n for n in meta["params"] if n.startswith(self.adapted)])

    def optimizer(self, meta: dict[str, Any]) -> torchopt.base.GradientTransformation:
        return torchopt.sgd(self.rate)

    def train_loss(self, meta: dict[str, Any], task: dict[str, Tensor]) -> Tensor:
        own, others = self.parts(meta)
        support, query = (task["support_x"], task["support_y"]), (task["query_x"], task["query_y"])
        return self.objective(meta, own, support, query, shared=(others,), optimizer=self.optimizer(meta), task=task)

    def objective(self, meta: Any, own: Any, support: Any, query: Any, task: Any, **options: Any) -> Tensor:
        options = {**options, "num_steps": self.train_steps, "first_order": self.first_order}
        return post_adaptation_loss(self.loss, own, support, query, **options)

    def adapt(self, meta: dict[str, Any], task: dict[str, Tensor], steps: int) -> tuple[Any, Any]:
        """Adapted parameters, and the others."""
        own, others = self.parts(meta)
        support = (task["support_x"], task["support_y"])
        adapted = adapt(
            self.loss, own, others, *support, optimizer=self.optimizer(meta), num_steps=steps, first_order=True
        )
        return adapted.params, others

    def schedule(self, progress: float) -> dict[str, Tensor]:
        """What changes in the course of training, as a part of every task."""
        return {}


class FirstOrder(Algorithm):
    first_order = True


class Anil(Algorithm):
    """Only the last layer adapts (Raghu et al. 2020)."""

    adapted = "output."
    rate = 0.01


class MetaSGD(Algorithm):
    """One learned rate for every weight (Li et al. 2017)."""

    max_grad_norm = 10.0

    def __init__(self) -> None:
        super().__init__()
        self.meta["rates"] = learning_rates(self.meta["params"], self.rate, per_element=True)

    def optimizer(self, meta: dict[str, Any]) -> torchopt.base.GradientTransformation:
        return torchopt.chain(clip_by_global_norm(INNER_CLIP), scale_by_learning_rates(meta["rates"]))


class MamlPlusPlus(Algorithm):
    """Multi-step loss, a learned rate for every layer and step, first order at first (Antoniou et al. 2019)."""

    max_grad_norm = 10.0

    train_steps = 5

    def __init__(self) -> None:
        super().__init__()
        self.meta["rates"] = learning_rates(self.meta["params"], self.rate, num_steps=self.train_steps)

    def optimizer(self, meta: dict[str, Any]) -> torchopt.base.GradientTransformation:
        return torchopt.chain(clip_by_global_norm(INNER_CLIP), scale_by_learning_rates(meta["rates"], per_step=True))

    def objective(self, meta: Any, own: Any, support: Any, query: Any, task: Any, **options: Any) -> Tensor:
        options["first_order"] = self.first_order
        return multi_step_loss(self.loss, own, support, query, weights=task["step_weights"], **options)

    def schedule(self, progress: float) -> dict[str, Tensor]:
        """Equal weights at first, later the last step's alone but for 3 %; first order for the first tenth."""
        self.first_order = progress < 0.1
        earlier = max(1 - progress / 0.5, 0.03) / self.train_steps
        weights = torch.full((self.train_steps,), earlier)
        weights[-1] = 1 - earlier * (self.train_steps - 1)
        return {"step_weights": weights.expand(TASKS_PER_UPDATE, -1)}


class Cavia(Algorithm):
    """Context parameters, zero before every task, adapt; the weights do not (Zintgraf et al. 2019)."""

    context_dim = 5
    rate = 1.0

    def parts(self, meta: dict[str, Any]) -> tuple[Any, Any]:
        return torch.zeros(self.context_dim), meta["params"]

    def loss(self, own: Tensor, others: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        x = torch.cat([x, own.expand(*x.shape[:-1], -1)], dim=-1)
        return mse_loss(functional_forward(self.model, others, x)[0], y)


class Reptile(Algorithm):
    """Moves towards where many steps lead (Nichol et al. 2018)."""

    train_steps = 10
    rate = 0.01

    def objective(self, meta: Any, own: Any, support: Any, query: Any, task: Any, **options: Any) -> Tensor:
        data = tuple(torch.cat([s, q]) for s, q in zip(support, query, strict=True))
        return reptile_loss(self.loss, own, data, num_steps=self.train_steps, **options)


class Imaml(Algorithm):
    """Implicit gradients of a proximal problem, which it solves when it is tested too (Rajeswaran et al. 2019)."""

    rate = 0.01
    train_steps = 16
    strength = 5.0

    def optimizer(self, meta: dict[str, Any]) -> torchopt.base.GradientTransformation:
        # Without the clip single tasks diverge at every rate and strength that was tried.
        return torchopt.chain(clip_by_global_norm(INNER_CLIP), torchopt.sgd(self.rate))

    def objective(self, meta: Any, own: Any, support: Any, query: Any, task: Any, **options: Any) -> Tensor:
        options |= {"num_steps": self.train_steps, "strength": self.strength, "solver": conjugate_gradient(5)}
        return implicit_loss(self.loss, own, support, query, **options)

    def adapt(self, meta: dict[str, Any], task: dict[str, Tensor], steps: int) -> tuple[Any, Any]:
        own, others = self.parts(meta)
        options: Any = {"strength": self.strength, "solver": conjugate_gradient(1)}
        support = (task["support_x"], task["support_y"])
        optimizer = self.optimizer(meta)
        return adapt_implicitly(
            self.loss, own, others, *support, optimizer=optimizer, num_steps=steps, **options
        ), others


ALGORITHMS: dict[str, type[Algorithm]] = {
    "maml": Algorithm,
    "fomaml": FirstOrder,
    "anil": Anil,
    "meta-sgd": MetaSGD,
    "maml++": MamlPlusPlus,
    "cavia": Cavia,
    "reptile": Reptile,
    "imaml": Imaml,
}


# Training and scores


def run(name: str, seed: int, iterations: int, compile: str) -> dict[str, Any]:
    """Train and test once, in one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    algorithm = ALGORITHMS[name]()
    how: Any = {"inductor": True, "trace": "trace", "eager": False}[compile]
    learners: dict[bool, MetaLearner] = {}
    outer: torch.optim.Optimizer | None = None
    started = time.perf_counter()
    losses = []
    for iteration, tasks in zip(range(iterations), stream(seed), strict=False):
        extra = algorithm.schedule(iteration / iterations)
        key = algorithm.first_order
        if key not in learners:
            learners[key] = MetaLearner(
                algorithm.train_loss,
                algorithm.meta,
                outer_optimizer=outer,
                max_grad_norm=algorithm.max_grad_norm,
                compile=how,
            )
            outer = learners[key].outer_step.optimizer
        losses.append(learners[key].update({**tasks, **extra}))
    seconds = time.perf_counter() - started
    generator = torch.Generator().manual_seed(10_000 + seed)
    tests = {shots: with_grid(draw_tasks(TEST_TASKS, shots, generator)) for shots in SHOTS}
    return {
        "algorithm": name,
        "seed": seed,
        "seconds": seconds,
        "loss": float(np.mean(losses[-1000:])),
        "errors": {shots: {steps: errors(algorithm, test, steps) for steps in STEPS} for shots, test in tests.items()},
        "example": example(algorithm, tests[SHOTS[0]]) if seed == 0 else None,
    }


def kept(folder: Path, resume: bool, name: str, seed: int, iterations: int, compile: str) -> dict[str, Any]:
    """What `run` finds, or found before with the same arguments; it is saved when it is there."""
    folder = folder / f"{name}-{seed}-{iterations}-{compile}"
    found = load_checkpoint(folder) if resume else None
    if found is not None:
        result: dict[str, Any] = found.state
        return result
    result = run(name, seed, iterations, compile)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, iterations, result, keep=1)
    return result


@torch.no_grad()
def errors(algorithm: Algorithm, test: dict[str, Tensor], steps: int) -> dict[str, float]:
    def both(task: dict[str, Tensor]) -> Tensor:
        own, others = algorithm.adapt(algorithm.meta, task, steps)
        return torch.stack([algorithm.loss(own, others, task[f"{d}_x"], task[f"{d}_y"]) for d in ("query", "grid")])

    each = vmap(both)(test)
    mean, half = each.mean(0), 1.96 * each.std(0) / math.sqrt(len(each))
    return {
        "query": float(mean[0]),
        "grid": float(mean[1]),
        "query_ci95_tasks": float(half[0]),
        "grid_ci95_tasks": float(half[1]),
    }


@torch.no_grad()
def example(algorithm: Algorithm, test: dict[str, Tensor]) -> dict[str, Any]:
    """What is learned of the first test task, on the grid."""
    task = {name: t[0] for name, t in test.items()}

    def curve(steps: int) -> list[float]:
        own, others = algorithm.adapt(algorithm.meta, task, steps)
        x = task["grid_x"]
        if algorithm.context_dim:
            x = torch.cat([x, own.expand(len(x), -1)], dim=-1)
            return functional_forward(algorithm.model, others, x)[0][:, 0].tolist()
        return functional_forward(algorithm.model, {**others, **own}, x)[0][:, 0].tolist()

    points = {name: task[name][:, 0].tolist() for name in ("grid_x", "grid_y", "support_x", "support_y")}
    return {**points, "after": {str(steps): curve(steps) for steps in STEPS}}


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half-width of the 95 % t interval over seeds."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else None
    return float(np.mean(values)), None if half is None else float(half)


def table(results: list[dict[str, Any]], measure: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Shots -> algorithm -> steps -> mean and interval."""

    def cell(runs: list[dict[str, Any]], shots: int, steps: int) -> dict[str, Any]:
        values = [run["errors"][shots][steps][measure] for run in runs]
        mean, half = interval(values)
        return {"mean": mean, "ci95": half, "values": values}

    names = list(dict.fromkeys(result["algorithm"] for result in results))
    runs = {name: [result for result in results if result["algorithm"] == name] for name in names}
    return {str(k): {name: {str(s): cell(runs[name], k, s) for s in STEPS} for name in names} for k in SHOTS}


def report(scores: dict[str, Any], title: str) -> None:
    for shots, rows in scores.items():
        print(f"\n{f'{shots}-shot, {title}':38}" + "".join(f"{f'{steps} steps':>18}" for steps in STEPS))
        for name, row in rows.items():
            cells = [row[str(steps)] for steps in STEPS]
            text = [f"{c['mean']:.3f}" + ("" if c["ci95"] is None else f" ± {c['ci95']:.3f}") for c in cells]
            print(f"{name:38}" + "".join(t.rjust(18) for t in text))


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """One sinusoid before and after adaptation, for every algorithm."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = [r for r in results if r["example"]]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.8 * rows), squeeze=False, sharey=True)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, result in zip(axes.flat, shown, strict=False):
        data = result["example"]
        axis.plot(data["grid_x"], data["grid_y"], color="0.6", lw=3, label="task")
        for steps, style in (("0", ":"), ("1", "--"), ("10", "-")):
            axis.plot(data["grid_x"], data["after"][steps], style, lw=1.4, label=f"after {steps} steps")
        axis.plot(data["support_x"], data["support_y"], "k^", ms=6, label=f"{SHOTS[0]} points")
        axis.set_ylim(-6.5, 6.5)  # single curves diverge, and would hide the others
        axis.set_title(result["algorithm"])
        axis.set_xlabel("x")
    axes[0, 0].set_ylabel("y")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Arguments) -> None:
    names = tuple(ALGORITHMS) if "all" in arguments.algorithms else arguments.algorithms
    if unknown := [name for name in names if name not in ALGORITHMS]:
        raise SystemExit(f"--algorithms must be among {', '.join(ALGORITHMS)} or all; got {', '.join(unknown)}.")
    if arguments.seeds < 1 or arguments.iterations < 1:
        raise SystemExit("--seeds and --iterations must be at least 1.")
    started = time.perf_counter()
    jobs = [(name, seed) for seed in range(arguments.seeds) for name in names]
    results = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        one = partial(kept, arguments.runs, arguments.resume)
        pending = [pool.submit(one, *job, arguments.iterations, arguments.compile) for job in jobs]
        for job, future in zip(jobs, pending, strict=True):
            results.append(future.result())
            after = "  ".join(f"{steps}: {e['query']:.3f}" for steps, e in results[-1]["errors"][SHOTS[0]].items())
            print(f"{job[0]:9} seed {job[1]}  5-shot {after}  in {results[-1]['seconds']:.0f} s", flush=True)
    scores = {measure: table(results, measure) for measure in ("query", "grid")}
    report(scores["query"], "error on K fresh points")
    report(scores["grid"], "error on a grid")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    plot(results, arguments.out.with_suffix(".png"))
    record = {
        "scores": scores,
        "published": PUBLISHED,
        "runs": [{k: v for k, v in r.items() if k != "example"} for r in results],
        "settings": {"iterations": arguments.iterations, "compile": arguments.compile, "test_tasks": TEST_TASKS},
        "versions": {"torch": torch.__version__, "torchopt": torchopt.__version__, "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
        "command": f"python benchmarks/sinusoid.py --seeds {arguments.seeds} --algorithms {' '.join(names)} "
        f"--iterations {arguments.iterations} --compile {arguments.compile}",
        "seconds": time.perf_counter() - started,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwrote {arguments.out} in {record['seconds']:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
