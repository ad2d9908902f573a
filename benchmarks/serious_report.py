"""What `serious_benchmark.py` reports: interquartile means with intervals, shares of the gap, a table, a plot.

Letters: R seeds, N systems.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from serious_tasks import HORIZONS

from ssmrl.meta_rl import interquartile_mean, stratified_bootstrap

mpl.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["ADAPTED", "plot", "report", "table"]

WAYS = {
    "(a) MAML, adapted": ("maml", "after"),
    "(a) not yet adapted": ("maml", "before"),
    "(b) all systems, adapted": ("joint", "after"),
    "(c) all systems": ("joint", "before"),
}
ADAPTED, OTHERS = "(a) MAML, adapted", ("(b) all systems, adapted", "(c) all systems")


def interval(runs: list[Any]) -> list[list[float]]:
    """(len(HORIZONS), 3): interquartile mean, low and high of errors (R, len(HORIZONS), N); with R = 1 the mean."""
    errors = torch.tensor(runs, dtype=torch.float64)
    if len(errors) < 2:
        return [[float(interquartile_mean(errors[:, h]))] * 3 for h in range(len(HORIZONS))]
    found = []
    for h in range(len(HORIZONS)):
        generator = torch.Generator().manual_seed(0)
        found.append([float(v) for v in stratified_bootstrap(errors[:, h], generator=generator, whole_runs=True)])
    return found


def report(results: dict[str, Any]) -> dict[str, Any]:
    """Of every task and model: errors of its ways, what they cost, and the share of the gap to the oracle."""
    found: dict[str, Any] = {}
    for task, of_task in results.items():
        of_models: dict[str, Any] = {}
        privileged: dict[str, Any] = {"oracle": None, "told": None}
        for runs in of_task["models"].values():
            for way in privileged:
                if all(way in one for one in runs):
                    privileged[way] = interval([one[way] for one in runs])
        oracle = privileged["oracle"]
        for name, runs in of_task["models"].items():
            errors = {way: interval([one[which][when] for one in runs]) for way, (which, when) in WAYS.items()}
            of_models[name] = {
                "errors": errors,
                "parameters": runs[0]["parameters"],
                "milliseconds of a meta-update": statistics.median(one["maml"]["milliseconds"] for one in runs),
                "megabytes": max(one["megabytes"] for one in runs),
                "rates of (b)": [one["joint"]["rate"] for one in runs],
                "left out": [[one[which]["left out"] for which in ("maml", "joint")] for one in runs],
                "seconds": [one["maml"]["seconds"] + one["joint"]["seconds"] for one in runs],
                "ahead of (b) and (c)": [ahead(errors, h) for h in range(len(HORIZONS))],
            }
            if oracle is not None:
                of_models[name]["gap closed"] = [
                    share(errors[OTHERS[1]][h][0], errors[ADAPTED][h][0], oracle[h][0]) for h in range(len(HORIZONS))
                ]
        persistence = interval([of_task["persistence"]])
        found[task] = {"persistence": [p[0] for p in persistence], **privileged, "models": of_models}
    return found


def ahead(errors: dict[str, Any], h: int) -> bool:
    """Whether the interval of (a) is below those of (b) and (c)."""
    return all(errors[ADAPTED][h][2] < errors[other][h][1] for other in OTHERS)


def share(before: float, after: float, best: float) -> float | None:
    """Of the gap between (c) and the oracle that (a) closes; None where the oracle is not better than (c)."""
    return (before - after) / (before - best) if best < before else None


def table(found: dict[str, Any]) -> str:
    lines = []
    for task, of_task in found.items():
        lines.append(f"\n{task:34}" + "".join(f"{f'{h} ahead':>28}" for h in HORIZONS))
        lines.append(f"{'persistence':34}" + "".join(f"{value:>28.3f}" for value in of_task["persistence"]))
        for way in ("oracle", "told"):
            if of_task[way] is not None:
                lines.append(f"{way:34}" + "".join(f"{cell(value):>28}" for value in of_task[way]))
        for name, of_model in of_task["models"].items():
            for way, errors in of_model["errors"].items():
                lines.append(f"{f'{name} {way}':34.34}" + "".join(f"{cell(value):>28}" for value in errors))
    return "\n".join(lines)


def cell(value: list[float]) -> str:
    return f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"


def plot(found: dict[str, Any], path: Path) -> None:
    """Errors of every model on every task, five steps ahead."""
    h = HORIZONS.index(5)
    figure, axes = plt.subplots(1, len(found), figsize=(2.6 * len(found) + 2, 4), squeeze=False, layout="constrained")
    for axis, (task, of_task) in zip(axes[0], found.items(), strict=True):
        for n, way in enumerate(WAYS):
            values = [of_model["errors"][way][h] for of_model in of_task["models"].values()]
            places = [k + 0.18 * (n - 1.5) for k in range(len(values))]
            error = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
            axis.errorbar([v[0] for v in values], places, xerr=error, fmt="o", ms=4, lw=1, label=way)
        axis.axvline(of_task["persistence"][h], color="0.7", ls=":", label="persistence")
        if of_task["oracle"] is not None:
            axis.axvline(of_task["oracle"][h][0], color="k", ls="--", lw=1, label="oracle")
        axis.set_xscale("log")
        axis.set_yticks(range(len(of_task["models"])), of_task["models"] if axis is axes[0][0] else [])
        axis.set_ylim(len(of_task["models"]) - 0.5, -0.5)
        axis.set_title(task, fontsize=9)
    axes[0][0].set_xlabel("error, 5 steps ahead")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
