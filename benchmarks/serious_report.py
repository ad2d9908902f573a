"""What `serious_benchmark.py` reports: interquartile means over systems, intervals over seeds, a table, a plot.

Letters: R seeds, N systems.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from serious_models import GAIN, LARGEST
from serious_tasks import HORIZONS
from torch import Tensor

from ssmrl.meta_rl import interquartile_mean, stratified_bootstrap, student_t_interval

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

__all__ = ["plot", "report", "table"]

WAYS = {
    "(a) MAML, adapted": ("maml", "after"),
    "(a) not yet adapted": ("maml", "before"),
    "(b) all systems, adapted": ("joint", "after"),
    "(c) all systems": ("joint", "before"),
}
ADAPTED, BOTH, ALONE = "(a) MAML, adapted", "(b) all systems, adapted", "(c) all systems"
HINDSIGHT = "(b) by the best steps"
PRIVILEGED = ("oracle", "told")


def of_seeds(runs: list[Any]) -> Tensor:
    """(R, ..., len(HORIZONS)): the interquartile mean over systems of errors (R, ..., len(HORIZONS), N)."""
    return interquartile_mean(torch.tensor(runs, dtype=torch.float64)[..., None, :])


def interval(scores: Tensor) -> list[list[float]]:
    """(len(HORIZONS), 3): mean, low and high of scores (R, len(HORIZONS)) over seeds."""
    return torch.stack([*student_t_interval(scores)], -1).tolist()


def bootstrap(runs: list[Any]) -> list[list[float]]:
    """(len(HORIZONS), 3): interquartile mean, low and high of errors (R, len(HORIZONS), N), whole seeds drawn again."""
    scores = torch.tensor(runs, dtype=torch.float64).transpose(0, 1)
    generator = torch.Generator().manual_seed(0)
    found = [stratified_bootstrap(of_horizon, generator=generator, whole_runs=True) for of_horizon in scores]
    return [[float(value) for value in one] for one in found]


def report(results: dict[str, Any]) -> dict[str, Any]:
    """Of every task and model: errors of its ways, differences between them, what they cost, shares of the gap."""
    found: dict[str, Any] = {}
    for task, of_task in results.items():
        of_models: dict[str, Any] = {}
        privileged: dict[str, Any] = dict.fromkeys(PRIVILEGED)
        for name, runs in of_task["models"].items():
            found_by = {way: [one[which][when] for one in runs] for way, (which, when) in WAYS.items()}
            scores = {way: of_seeds(of_way) for way, of_way in found_by.items()}
            scores[HINDSIGHT] = of_seeds([one["joint"]["after, any steps"] for one in runs]).amin(1)
            ahead = {other: interval(scores[other] - scores[ADAPTED]) for other in (BOTH, ALONE, HINDSIGHT)}
            of_models[name] = {
                "errors": {way: interval(of_way) for way, of_way in scores.items()},
                "bootstrap": {way: bootstrap(of_way) for way, of_way in found_by.items()},
                "less than": ahead,
                "ahead of (b) and (c)": [all(ahead[o][h][1] > 0 for o in (BOTH, ALONE)) for h in range(len(HORIZONS))],
                "ran away": {
                    way: sum(e >= LARGEST for of_seed in of_way for errors in of_seed for e in errors)
                    for way, of_way in found_by.items()
                },
                "parameters": runs[0]["parameters"],
                "milliseconds of a meta-update": statistics.median(one["maml"]["milliseconds"] for one in runs),
                "megabytes of a meta-update": largest_of([one["maml"]["megabytes"] for one in runs]),
                "steps of (b)": [one["joint"]["steps"] for one in runs],
                "gain rates of (a)": [one["maml"]["rates"].get(GAIN) for one in runs],
                "left out": [[one[which]["left out"] for which in ("maml", "joint")] for one in runs],
                "cpu seconds": [one["cpu seconds"] for one in runs],
            }
            if all(way in one for one in runs for way in PRIVILEGED):
                of_ways = {way: of_seeds([one[way] for one in runs]) for way in PRIVILEGED}
                privileged = {way: interval(of_way) for way, of_way in of_ways.items()}
                of_models[name]["gap closed"] = share(scores[ALONE], scores[ADAPTED], of_ways["oracle"])
        persistence = of_seeds([of_task["persistence"]])[0].tolist()
        found[task] = {
            "persistence": persistence,
            **privileged,
            "physics in the test": of_task["physics"],
            "models": of_models,
        }
    return found


def largest_of(values: list[float | None]) -> float | None:
    """None where there is none."""
    return max((value for value in values if value is not None), default=None)


def share(before: Tensor, after: Tensor, best: Tensor) -> list[list[float] | None]:
    """Of the gap between (c) and the oracle, the part that (a) closes, with its interval over seeds.

    None at a horizon at which the oracle of some seed is not better than (c).
    """
    found: list[list[float] | None] = []
    for b, a, o in zip(before.T, after.T, best.T, strict=True):
        found.append(interval(((b - a) / (b - o))[:, None])[0] if bool((o < b).all()) else None)
    return found


def table(found: dict[str, Any]) -> str:
    lines = []
    for task, of_task in found.items():
        lines.append(f"\n{task:40}" + "".join(f"{f'{h} ahead':>28}" for h in HORIZONS))
        lines.append(f"{'persistence':40}" + "".join(f"{value:>28.3f}" for value in of_task["persistence"]))
        for way in PRIVILEGED:
            if of_task[way] is not None:
                lines.append(f"{way:40}" + "".join(f"{cell(value):>28}" for value in of_task[way]))
        for name, of_model in of_task["models"].items():
            for way, errors in of_model["errors"].items():
                mark = "*" if way == ADAPTED else " "
                cells = (
                    cell(value) + (mark if of_model["ahead of (b) and (c)"][h] else " ")
                    for h, value in enumerate(errors)
                )
                lines.append(f"{f'{name} {way}':40.40}" + "".join(f"{c:>28}" for c in cells))
    return "\n".join([*lines, "", "* below (b) and (c) of the same model, by more than the interval of the difference"])


def cell(value: list[float]) -> str:
    return f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"


def plot(found: dict[str, Any], path: Path) -> None:
    """Errors of every model on every task, five steps ahead."""
    h, columns = HORIZONS.index(5), min(len(found), 4)
    rows = math.ceil(len(found) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(2.6 * columns + 2, 3.2 * rows + 1), squeeze=False, layout="constrained"
    )
    for axis in grid.flat[len(found) :]:
        axis.axis("off")
    for k, (axis, (task, of_task)) in enumerate(zip(grid.flat, found.items(), strict=False)):
        for n, way in enumerate(WAYS):
            values = [of_model["errors"][way][h] for of_model in of_task["models"].values()]
            places = [m + 0.18 * (n - 1.5) for m in range(len(values))]
            error = [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
            axis.errorbar([v[0] for v in values], places, xerr=error, fmt="o", ms=4, lw=1, label=way)
        axis.axvline(of_task["persistence"][h], color="0.7", ls=":", label="persistence")
        for way, color in zip(PRIVILEGED, ("k", "C4"), strict=True):
            if of_task[way] is not None:
                axis.axvline(of_task[way][h][0], color=color, ls="--", lw=1, label=way)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_yticks(range(len(of_task["models"])), [] if k % columns else of_task["models"])
        axis.set_ylim(len(of_task["models"]) - 0.5, -0.5)
        axis.set_title(task, fontsize=9)
        if k + columns >= len(found):
            axis.set_xlabel("error, 5 steps ahead")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(7, 2 * columns), fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
