"""What `adaptive_control.py` reports of its seeds: scores, a table, a plot.

Letters: N tasks of a group.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor

from ssmrl.meta_rl import student_t_interval

mpl.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["CHANGING", "GROUPS", "OURS", "plot", "put_together", "table"]

GROUPS = {
    "in range": ("train", "train"),
    "outside": ("test", "test"),
    "change": ("train", "train"),
    "change to outside": ("train", "test"),
}
"""Where physics are drawn from before and after the middle of an episode; in the first two groups they stay."""
CHANGING = ("change", "change to outside")
"""Of these groups the return is that from the change on."""
OURS = "meta-trained, adapting"


def put_together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean returns with intervals over seeds, what every way has less than ours, and shares of the gap closed."""
    found: dict[str, Any] = {}
    failures = {way: sum("failed" in run[way] for run in runs) for way in runs[0]}
    if failures[OURS]:
        raise RuntimeError(f"{OURS} ran away with {failures[OURS]} of {len(runs)} seeds: there is nothing to compare.")
    ours = torch.tensor([run[OURS]["returns"] for run in runs])  # (seeds, groups, N)
    for way, failed in failures.items():
        if failed:
            found[way] = {"failed": failed}
            continue
        returns = torch.tensor([run[way]["returns"] for run in runs])
        found[way] = {"return": interval(returns), "ours minus it": interval(ours - returns)}
        if "errors ahead" in runs[0][way]:
            errors = {key: torch.tensor([run[way]["errors ahead"][key] for run in runs]) for key in ("before", "after")}
            found[way]["error ahead, after / before"] = interval((errors["after"] / errors["before"])[..., None])
    if all("return" in found.get(way, {}) for way in ("hidden state alone", "true physics")):
        worst, best = (torch.tensor(found[way]["return"][0]) for way in ("hidden state alone", "true physics"))
        found[OURS]["of the gap from hidden state alone to true physics"] = (
            (torch.tensor(found[OURS]["return"][0]) - worst) / (best - worst)
        ).tolist()
    return found


def interval(values: Tensor) -> tuple[list[float], list[float] | None, list[float] | None]:
    """Mean, low and high over seeds of (seeds, groups, N); of one seed the mean, which has no bounds."""
    means = values.mean(2)
    if len(means) == 1:
        return means[0].tolist(), None, None
    mean, low, high = student_t_interval(means)
    return mean.tolist(), low.tolist(), high.tolist()


def plot(name: str, runs: list[dict[str, Any]], report: dict[str, Any], path: Path) -> None:
    """What ours is ahead of every way, and rewards around a change."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained", width_ratios=(5, 4, 4))
    ways = [way for way, found in report.items() if "failed" not in found]
    others = [way for way in ways if way != OURS]
    for group, label in enumerate(GROUPS):
        found = [report[way]["ours minus it"] for way in others]
        mean = [way[0][group] for way in found]
        error = None
        if len(runs) > 1:
            error = [[way[0][group] - way[1][group] for way in found], [way[2][group] - way[0][group] for way in found]]
        places = [n + 0.18 * (group - 1.5) for n in range(len(others))]
        axes[0].errorbar(mean, places, xerr=error, fmt="o", ms=3, lw=1, label=label)
    axes[0].axvline(0, color="0.8", zorder=0)
    axes[0].set_yticks(range(len(others)), others, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set(title=f"{name}, {counted(len(runs))}", xlabel=label_of(len(runs)))
    axes[0].legend(fontsize=7)
    colors = plt.get_cmap("tab20").colors  # as many ways as there are would repeat the usual ten
    for k, label in enumerate(CHANGING):
        for color, way in zip(colors, ways, strict=False):
            rewards = torch.tensor([run[way]["rewards from 25 steps before a change on"][k] for run in runs]).mean(0)
            smooth = torch.nn.functional.avg_pool1d(rewards[None], 5, 1)[0]
            wide = 2.0 if way in (OURS, "true physics") else 1.0
            axes[1 + k].plot(range(-23, len(smooth) - 23), smooth, label=way, lw=wide, color=color)
        axes[1 + k].axvline(0, color="0.8", zorder=0)
        axes[1 + k].set(title=label, xlabel="steps after it", ylabel="reward, mean of five steps")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower right", ncols=4, fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def label_of(seeds: int) -> str:
    return "return of ours less that of another way" + (", 95 %" if seeds > 1 else "")


def counted(seeds: int) -> str:
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def table(report: dict[str, Any]) -> str:
    lines = [f"{'':36}" + "".join(f"{group:>34}" for group in GROUPS)]
    for way, found in report.items():
        if "failed" in found:
            lines.append(f"{way:36}ran away with {found['failed']} seeds")
            continue
        mean, low, high = found["ours minus it"]
        cells = []
        for group, value in enumerate(found["return"][0]):
            bounds = "" if low is None else f": {low[group]:+.0f} to {high[group]:+.0f}"
            cells.append(f"{value:.0f}  (ours {mean[group]:+.0f}{bounds})")
        lines.append(f"{way:36}" + "".join(f"{cell:>34}" for cell in cells))
    return "\n".join(lines)
