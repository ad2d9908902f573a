"""Test-time adaptation: how fast it is, what it does over long runs of changing dynamics, and whether the guard holds.

    python benchmarks/adaptation.py --parts speed     # against a hand-written loop and a loop of Adapters: 3 minutes
    python benchmarks/adaptation.py --parts study     # 100,000 steps of three systems, every policy: half an hour
    python benchmarks/adaptation.py --parts guard     # 1,000,000 guarded steps at ten times the right rate: 5 minutes
    python benchmarks/adaptation.py --parts speed study guard --out docs/results/adaptation.json

Study: 40 streams of 2,500 steps, whose dynamics are drawn anew every 250; every model sees every transition once, in
order, and is scored on its prediction of it before it adapts to it. The policies share one meta-trained model, and the
last row is another one, trained on the same data without MAML to tell the dynamics from its hidden state alone.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchopt
import tyro
from adaptation_systems import Streams, gym_streams, linear_streams, meta_train, new_model, train_hidden_state_only
from memory import resident
from torch import Tensor

from ssmrl import AdaptationConfig, Adapter, StateSpaceModel, StreamAdapter
from ssmrl.adaptation import Guard, Window, reset_at_episode_end, reset_every, reset_on_rise
from ssmrl.adaptation.tree import tree_leaves

PARTS = ("speed", "study", "guard")
SYSTEMS = ("linear", "Pendulum-v1", "CartPole-v1")
RATES = {"linear": 0.1, "Pendulum-v1": 0.1, "CartPole-v1": 0.03}
TOO_HIGH = 10
CONTROLS = "no adaptation", "hidden state only"
AT_EPISODE_END = "reset at episode end"


@dataclass(frozen=True)
class Size:
    """Of the study and of the guarded run."""

    streams: int = 40
    steps: int = 2500
    switch_every: int = 250
    updates: int = 1500  # of meta-training
    hidden_updates: int = 10_000
    train_streams: int = 200
    train_steps: int = 1200
    guard_streams: int = 100
    guard_steps: int = 10_000
    repeats: int = 30
    many: int = 256


SIZES = {
    "default": Size(),
    "tiny": Size(3, 90, 30, 2, 2, 4, 240, 3, 60, 2, 4),
}


@dataclass(frozen=True)
class Arguments:
    """Test-time adaptation: speed, a long-run study, and the guard."""

    parts: tuple[str, ...] = ("speed",)
    """Some of speed, study, guard."""
    systems: tuple[str, ...] = SYSTEMS
    """Of the study."""
    seeds: int = 3
    """Trainings, with seeds 0, 1, ..., of the study and the guarded run."""
    size: str = "default"
    """default, or tiny for a test."""
    out: Path = Path("output/adaptation.json")
    """File for the figures; plots go beside it. Parts and systems that are not run stay as they are in it."""


# Speed


def speed(size: Size) -> dict[str, Any]:
    """Medians in milliseconds of five Adam steps on one transition of 32 inputs, of ways that take turns."""
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    torch.manual_seed(0)
    model = StateSpaceModel(64, 32, 11, hidden_dim=128)
    many = size.many
    x, y, state = torch.randn(many, 32), torch.randn(many, 11), torch.randn(many, 64)
    one = x[:1], y[:1], state[:1]

    def adam(**more: Any) -> AdaptationConfig:
        return AdaptationConfig(optimizer=torchopt.adam(1e-3), num_steps=5, **more)

    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-3)

    def loop_by_hand() -> None:
        for _ in range(5):
            loss = (by_hand(one[0], one[2])[0] - one[1]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    single = {
        "by hand, torch.optim.Adam": loop_by_hand,
        "Adapter": _updates([Adapter(copy.deepcopy(model), adam())], *one),
        "Adapter, compiled": _updates([Adapter(copy.deepcopy(model), adam(), compile=True)], *one),
    }
    figures: dict[str, Any] = {"one stream": medians(single, size.repeats)}
    for name, adapted in (("all weights", None), ("head", ["output_mlp.out", "output_input"])):
        config = adam(adapted=adapted)
        chunk_size = min(16, many) if adapted is None else None
        ways = {
            f"{many} Adapters": _updates([Adapter(copy.deepcopy(model), config) for _ in range(many)], x, y, state),
            "StreamAdapter": _updates([StreamAdapter(model, config, many, chunk_size=chunk_size)], x, y, state),
            "StreamAdapter, compiled": _updates([StreamAdapter(model, config, many, compile=True)], x, y, state),
        }
        figures[f"{many} streams, {name}"] = medians(ways, max(3, size.repeats // 5))
    lots = StreamAdapter(model, adam(adapted=["output_mlp.out", "output_input"]), 16 * many)
    lots.update_step(*(t.repeat(16, 1) for t in (x, y, state)))
    held = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(lots.snapshot().streams))
    figures[f"MB held for {16 * many} streams of heads"] = held / 2**20
    return figures


def _updates(adapters: list[Any], x: Tensor, y: Tensor, state: Tensor) -> Callable[[], None]:
    """One call that updates all rows."""
    rows = [slice(i, i + 1) for i in range(len(x))] if len(adapters) == len(x) else [slice(None)]

    def run() -> None:
        for adapter, row in zip(adapters, rows, strict=True):
            adapter.update_step(x[row], y[row], state[row])

    return run


def medians(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(repeats):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(t) for name, t in times.items()}


# Study


def record(system: str, size: Size, seed: int) -> tuple[Streams, Streams]:
    """Streams to train on, and others to be judged on."""
    train = (size.train_streams, size.train_steps, max(size.train_steps // 10, 24))
    test = (size.streams, size.steps, size.switch_every)
    if system == "linear":
        return linear_streams(*train, seed=2 * seed), linear_streams(*test, seed=1001 + 2 * seed)
    streams = gym_streams(system, *train, seed=2 * seed)
    return streams, gym_streams(system, *test, seed=1001 + 2 * seed, scales=streams.scales)


def meta_trained(system: str, train: Streams, size: Size, seed: int) -> StateSpaceModel:
    model = new_model(train, seed)
    gym: dict[str, Any] = {} if system == "linear" else {"outer_lr": 5e-3, "max_grad_norm": 0.1}
    short = size.train_steps < 1000
    meta_train(
        model,
        train,
        num_steps=5,
        rate=RATES[system],
        updates=size.updates,
        seed=seed,
        lengths=(2, 4) if short else (2, 4, 6, 8, 12),
        query=4 if short else 8,
        burn_in=4 if short else 8,
        **gym,
    )
    return model


def policies(system: str) -> dict[str, AdaptationConfig]:
    rate = RATES[system]
    on = AdaptationConfig(rate, 1, window=Window(8))
    anchored = AdaptationConfig(rate, 5, window=Window(6), from_anchor=True, max_grad_norm=10.0)
    rise = reset_on_rise(5.0, fast=0.9, slow=0.02, keep=2)
    wild = replace(on, learning_rate=TOO_HIGH * rate)
    every = {
        "carry on": on,
        "carry on, guard": replace(on, guard=Guard()),
        "reset every 100": replace(on, reset=reset_every(100)),
        "reset on a rise": replace(on, reset=rise),
        "from the anchor": anchored,
        "from the anchor, window emptied on a rise": replace(anchored, reset=rise),
        f"{TOO_HIGH}x the rate": wild,
        f"{TOO_HIGH}x the rate, guard": replace(wild, guard=Guard()),
    }
    if system == "CartPole-v1":
        every[AT_EPISODE_END] = replace(on, reset=reset_at_episode_end())
    return every


@torch.no_grad()
def without_adaptation(model: StateSpaceModel, streams: Streams) -> Tensor:
    """(N, T) squared errors of the model as it is, from a hidden state that goes on over everything."""
    return (model(streams.x)[0] - streams.y).square().mean(-1)


@torch.no_grad()
def adapting(
    model: StateSpaceModel, config: AdaptationConfig, streams: Streams, *, masked: bool = False
) -> tuple[Tensor, dict[str, float]]:
    """(N, T) squared errors of predictions before the model adapts to them, and what happened in all streams.

    The dynamics, and so the hidden state, go on over the ends of episodes: a mask of them is for the policy alone.
    """
    num_streams, num_steps = streams.x.shape[:2]
    adapter = StreamAdapter(_Remembering(model) if masked else model, config, num_streams, compile="trace")
    state, errors = model.init_hidden(num_streams), torch.empty(num_steps, num_streams)
    warm = 0.0
    for t in range(num_steps):
        x, y = streams.x[:, t], streams.y[:, t]
        prediction, after = adapter(x, state)
        errors[t] = (prediction - y).square().mean(-1)
        adapter.update_step(x, y, state, reset=streams.reset[:, t] if masked else None)
        state = after
        warm = resident("VmRSS") if t == num_steps // 10 else warm
    counts = adapter.counts
    assert counts is not None
    happened = {name: float(c.sum()) for name, c in zip(counts._fields, counts, strict=True)}
    return errors.T, happened | {"MB that memory grew by after the first tenth": resident("VmRSS") - warm}


class _Remembering(torch.nn.Module):
    """A model that does not forget its state where an episode begins."""

    def __init__(self, model: StateSpaceModel) -> None:
        super().__init__()
        self.model = model

    def init_hidden(self, batch_size: int = 1) -> Tensor:
        return self.model.init_hidden(batch_size)

    def forward(self, x: Tensor, hidden_state: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.model(x, hidden_state)


def study(system: str, seed: int, size: Size) -> dict[str, Any]:
    """All policies on one system and one training."""
    torch.set_num_threads(1)
    train, test = record(system, size, seed)
    model = meta_trained(system, train, size, seed)
    control = new_model(train, seed)
    windows: dict[str, Any] = {} if size.train_steps >= 1000 else {"length": 24, "burn_in": 8}
    train_hidden_state_only(control, train, updates=size.hidden_updates, seed=seed, **windows)
    errors = {CONTROLS[0]: without_adaptation(model, test), CONTROLS[1]: without_adaptation(control, test)}
    counts = {}
    for name, config in policies(system).items():
        errors[name], counts[name] = adapting(model, config, test, masked=name == AT_EPISODE_END)
    after = {name: after_switches(e, size.switch_every) for name, e in errors.items()}
    return {"system": system, "seed": seed, "floor": float(test.floor.mean()), "after": after, "counts": counts}


def after_switches(errors: Tensor, every: int) -> np.ndarray:
    """(N, switch_every) mean error at every step after a switch, over the switches of a stream."""
    regimes = errors[:, : errors.shape[1] // every * every].unflatten(1, (-1, every))[:, 1:]
    return regimes.double().mean(1).numpy()


def summary(curves: np.ndarray, own: float | None = None) -> dict[str, float | None]:
    """Shock, steady level, and the first step whose mean with the next two is within 20 % of a level, of (N, steps)."""
    mean = curves.mean(0)
    steady = float(mean[len(mean) // 2 :].mean())
    smooth = np.convolve(mean, np.ones(3) / 3, "valid")
    level = 1.2 * (steady if own is None else own)
    below = np.flatnonzero(smooth <= level)
    return {
        "shock": float(mean[0]),
        "steady": steady,
        "mean": float(mean.mean()),
        "recovery": int(below[0]) if len(below) else None,
    }


def with_intervals(curves: np.ndarray, own: np.ndarray | None = None, resamples: int = 500) -> dict[str, Any]:
    """`summary` of (seeds, N, steps), with 95 % intervals from resampling seeds, and streams within them."""
    generator = np.random.default_rng(0)

    def draw(chosen: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([curves[s][rows] for s, rows in chosen])

    def level(chosen: list[Any]) -> float | None:
        if own is None:
            return None
        return float(summary(np.concatenate([own[s][rows] for s, rows in chosen]))["steady"] or 0)

    everything: list[Any] = [(s, np.arange(curves.shape[1])) for s in range(len(curves))]
    point = summary(draw(everything), level(everything))
    drawn = []
    for _ in range(resamples):
        seeds = generator.integers(len(curves), size=len(curves))
        chosen: list[Any] = [(s, generator.integers(curves.shape[1], size=curves.shape[1])) for s in seeds]
        drawn.append(summary(draw(chosen), level(chosen)))
    result: dict[str, Any] = {}
    for name, value in point.items():
        values = [math.inf if d[name] is None else float(d[name] or 0) for d in drawn]
        low, high = np.quantile(values, [0.025, 0.975], method="nearest")
        result[name] = {
            "value": value,
            "ci95": [float(low), float(high) if math.isfinite(high) else None],
            "resamples": values if name == "recovery" else None,
        }
    return result


def report_study(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """System -> way -> figures; recovery is to its own steady level, catch-up to that of the hidden state alone."""
    report: dict[str, Any] = {}
    for system in dict.fromkeys(run["system"] for run in runs):
        mine = [run for run in runs if run["system"] == system]
        ways = list(mine[0]["after"])
        curves = {way: np.stack([run["after"][way] for run in mine]) for way in ways}
        rows = {}
        for way in ways:
            finite = np.isfinite(curves[way]).all() and curves[way].max() < 1e6
            if not finite:
                rows[way] = {"diverged": True}
                continue
            rows[way] = {**with_intervals(curves[way]), "curve": curves[way].mean((0, 1)).tolist()}
            rows[way]["catch_up"] = with_intervals(curves[way], curves[CONTROLS[1]])["recovery"]
            control = rows.get(CONTROLS[1])
            if control is not None:
                pairs = zip(rows[way]["recovery"]["resamples"], control["recovery"]["resamples"], strict=True)
                rows[way]["share_recovering_in_half"] = float(np.mean([a <= b / 2 for a, b in pairs]))
        for row in rows.values():
            for name in ("shock", "steady", "mean", "recovery", "catch_up"):
                row.get(name, {}).pop("resamples", None)
        counts = {way: {k: sum(r["counts"][way][k] for r in mine) for k in c} for way, c in mine[0]["counts"].items()}
        report[system] = {"floor": float(np.mean([r["floor"] for r in mine])), "ways": rows, "counts": counts}
    return report


def print_study(report: dict[str, Any]) -> None:
    for system, result in report.items():
        print(f"\n{system}, best possible {result['floor']:.4f}")
        print(f"{'':44}{'shock':>9}{'steady':>26}{'recovery':>18}{'catch-up':>10}")
        for way, row in result["ways"].items():
            if row.get("diverged"):
                print(f"{way:44}  diverged")
                continue
            steady, recovery, catch_up = row["steady"], row["recovery"], row["catch_up"]["value"]
            level = "{:.4f} [{:.4f}, {:.4f}]".format(steady["value"], *steady["ci95"])
            within = "{} [{}, {}]".format(recovery["value"], *recovery["ci95"])
            print(f"{way:44}{row['shock']['value']:9.3f}{level:>26}{within:>18}{catch_up!s:>10}")


# Guard


def guard(seed: int, size: Size) -> dict[str, Any]:
    """Guarded adaptation at a rate that is far too high, for long, against no adaptation and no guard."""
    torch.set_num_threads(1)
    train, _ = record("linear", size, seed)
    model = meta_trained("linear", train, size, seed)
    test = linear_streams(size.guard_streams, size.guard_steps, size.switch_every, seed=5001 + seed)
    base = without_adaptation(model, test)
    wild = policies("linear")[f"{TOO_HIGH}x the rate"]
    errors, counts = adapting(model, replace(wild, guard=Guard()), test)
    free, _ = adapting(model, wild, linear_streams(size.guard_streams, min(2000, size.guard_steps), 500, 5001 + seed))
    last = free[:, -100:].nan_to_num(math.inf).mean(1)
    window = min(1000, size.guard_steps)
    ratios = moving_mean(errors, window) / moving_mean(base, window)
    return {
        "seed": seed,
        "rate": wild.learning_rate,
        "steps": errors.numel(),
        "all_finite": bool(torch.isfinite(errors).all()),
        "error": float(errors.mean()),
        "without_adaptation": float(base.mean()),
        "worst_window_of_all_streams": float(
            (moving_mean(errors.mean(0)[None], window) / moving_mean(base.mean(0)[None], window)).max()
        ),
        "worst_window_of_a_stream": float(ratios.max()),
        "counts": counts,
        "unguarded_largest_error": _number(float(free.nan_to_num(math.inf).max())),
        "unguarded_share_of_streams_above_100x": float((last > 100 * base.mean()).double().mean()),
    }


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else "not finite"


def moving_mean(errors: Tensor, window: int) -> Tensor:
    total = torch.cat([torch.zeros(len(errors), 1, dtype=torch.float64), errors.double().cumsum(1)], 1)
    return (total[:, window:] - total[:, :-window]) / window


def plot(report: dict[str, Any], path: Path) -> None:
    """Error after a switch, in the mean over streams, switches and seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = {
        "no adaptation": "0.6",
        "hidden state only": "k",
        "carry on": "C0",
        "carry on, guard": "C1",
        "reset on a rise": "C2",
        "from the anchor": "C4",
        "from the anchor, window emptied on a rise": "C3",
    }
    figure, axes = plt.subplots(1, len(report), figsize=(5.2 * len(report), 4), squeeze=False)
    for axis, (system, result) in zip(axes[0], report.items(), strict=True):
        for way, color in shown.items():
            row = result["ways"].get(way, {})
            if "curve" in row:
                axis.plot(np.arange(1, len(row["curve"]) + 1), row["curve"], color=color, label=way, lw=1.2)
        if result["floor"]:
            axis.axhline(result["floor"], color="0.4", ls=":", label="true dynamics")
        axis.set(xscale="log", yscale="log", title=system, xlabel="steps after a switch")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("squared error of the next prediction")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Arguments) -> None:
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        raise SystemExit(f"--parts must be among {', '.join(PARTS)}; got {', '.join(unknown)}.")
    if unknown := [system for system in arguments.systems if system not in SYSTEMS]:
        raise SystemExit(f"--systems must be among {', '.join(SYSTEMS)}; got {', '.join(unknown)}.")
    if arguments.size not in SIZES or arguments.seeds < 1:
        raise SystemExit("--size must be default or tiny, and --seeds at least 1.")
    size = SIZES[arguments.size]
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    made: dict[str, Any] = {}
    started = time.perf_counter()
    if "speed" in arguments.parts:
        made["speed"] = speed(size)
        for group, row in made["speed"].items():
            print(
                group, {k: round(v, 2) for k, v in row.items()} if isinstance(row, dict) else round(row, 1), flush=True
            )
    jobs = [(system, seed) for seed in range(arguments.seeds) for system in arguments.systems]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        studies = [pool.submit(study, *job, size) for job in jobs] if "study" in arguments.parts else []
        guards = [pool.submit(guard, s, size) for s in range(arguments.seeds)] if "guard" in arguments.parts else []
        runs = []
        for (system, seed), future in zip(jobs, studies, strict=False):
            runs.append(future.result())
            print(f"{system} seed {seed} done after {time.perf_counter() - started:.0f} s", flush=True)
        if guards:
            made["guard"] = [future.result() for future in guards]
            print(json.dumps(made["guard"], indent=1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if runs:
        made["study"] = report_study(runs)
        print_study(made["study"])
        made["study"] = result.get("study", {}).get("figures", {}) | made["study"]
        plot(made["study"], arguments.out.with_name(f"{arguments.out.stem}_study.png"))
    about = {
        "settings": {"size": arguments.size, "seeds": arguments.seeds, **size.__dict__},
        "versions": {"torch": torch.__version__, "torchopt": torchopt.__version__, "python": platform.python_version()},
        "machine": {"processor": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
        "command": f"python benchmarks/adaptation.py --parts {' '.join(arguments.parts)} --seeds {arguments.seeds}",
        "seconds": time.perf_counter() - started,
    }
    result |= {part: {"figures": figures, **about} for part, figures in made.items()}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwrote {arguments.out} in {about['seconds']:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
