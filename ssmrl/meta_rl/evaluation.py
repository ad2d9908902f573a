"""How returns grow with the number of updates: the loop that measures it, what it says about the method, and its plot.

Letters: R runs (seeds of training), N tasks, U updates at the test; after k of them, k = 0, ..., U.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ssmrl.adaptation.optim import check_num_steps
from ssmrl.meta_rl.scores import (
    Interval,
    check_finite,
    check_level,
    gap_closed,
    interquartile_mean,
    stratified_bootstrap,
    student_t_interval,
)

__all__ = ["AdaptationReport", "AdaptationReturns", "adaptation_report", "adaptation_returns", "plot_adaptation"]

Params = TypeVar("Params")
Batch = TypeVar("Batch")


class AdaptationReturns(NamedTuple):
    """Returns of one run on N tasks after 0, ..., U updates."""

    adapted: Tensor
    """(U + 1, N)."""
    control: Tensor | None
    """(U + 1, N) of parameters that were never adapted, on the same noise; None where it was not asked for."""


def adaptation_returns(
    collect: Callable[[Params, int], tuple[Batch, Tensor]],
    adapt: Callable[[Params, Batch, int], Params],
    params: Params,
    num_updates: int,
    *,
    control: bool = True,
) -> AdaptationReturns:
    """Collect with θ_0, adapt on what was collected, collect with θ_1, ..., collect with θ_U.

        D_k, J_k = collect(θ_k, k),   θ_{k+1} = adapt(θ_k, D_k, k),   θ_0 = params

    The control is collect(θ_0, k) for the same k. Because `collect` draws its noise from k alone, the two differ in the
    parameters and in nothing else, and their differences are paired. At k = 0 they are the same, and collected once.

    Args:
        collect: `(params, k) -> (batch, returns)`: episodes of every task with its parameters, and the mean return of
            each task's, (N,). A function of its arguments: its seeds come from k, and differ between two k.
        adapt: `(params, batch, k) -> params`: one inner step of every task, which leaves its arguments as they are.
        params: of every task before the first update, stacked (N, ...); any pytree that the two functions understand.
            What the inner optimizer remembers from step to step travels in it too.
        num_updates: U >= 0.
        control: measure the control, at U more collections.

    Raises:
        TypeError: U is not an integer.
        ValueError: U is negative; or returns that are not (N,), or not finite.
    """
    num_updates = check_num_steps("num_updates", num_updates)
    at = params
    batch, returns = collect(at, 0)
    first = _checked(returns, None, 0)
    adapted, unadapted = [first], [first]
    for k in range(num_updates):
        at = adapt(at, batch, k)
        batch, returns = collect(at, k + 1)
        adapted.append(_checked(returns, first, k + 1))
        if control:
            unadapted.append(_checked(collect(params, k + 1)[1], first, k + 1))
    return AdaptationReturns(torch.stack(adapted), torch.stack(unadapted) if control else None)


class AdaptationReport(NamedTuple):
    """What the returns of R runs say, all in float64 on the CPU. Intervals are over runs; None where there is but one.

    A share of the gap closed is that of the mean returns, (mean_k - before) / (oracle - before): of a ratio per task,
    the mean would be that of the tasks on which there is little to gain.
    """

    returns: Tensor
    """(R, U + 1, N)."""
    control: Tensor | None
    """(R, U + 1, N) without adaptation."""
    oracle: Tensor | None
    """(R, N) return of a policy that knows the task."""
    task_blind: Tensor | None
    """(R, N) return of the best policy that cannot tell tasks apart."""
    level: float
    """Of every interval."""
    run_means: Tensor
    """(R, U + 1) mean over tasks."""
    mean: Tensor
    """(U + 1,) over runs and tasks."""
    mean_interval: Interval | None
    """Student's t, of the runs' means."""
    iqm: Tensor
    """(U + 1,) interquartile mean of the scores of all runs and tasks."""
    iqm_interval: Interval | None
    """Bootstrap of whole runs."""
    difference: Tensor | None
    """(U + 1,) mean of adapted minus control."""
    difference_interval: Interval | None
    """Student's t, of the runs' mean differences."""
    gap_closed: Tensor | None
    """(U + 1,) from the return before the first update to the oracle's."""
    gap_closed_from_task_blind: Tensor | None
    """(U + 1,) from the task-blind optimum to the oracle's return; negative below the optimum."""

    def table(self) -> list[dict[str, float | int | None]]:
        """One row for each number of updates, of numbers that JSON and Markdown take. None: unknown."""
        columns = {
            "mean": self.mean,
            **_bounds("mean", self.mean_interval),
            "iqm": self.iqm,
            **_bounds("iqm", self.iqm_interval),
            "control": None if self.control is None else self.control.mean((0, 2)),
            "difference": self.difference,
            **_bounds("difference", self.difference_interval),
            "gap_closed": self.gap_closed,
            "gap_closed_from_task_blind": self.gap_closed_from_task_blind,
        }
        listed = {name: None if column is None else column.tolist() for name, column in columns.items()}
        updates = range(len(self.mean))
        return [{"updates": k, **{name: None if c is None else c[k] for name, c in listed.items()}} for k in updates]

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, lists and None, for JSON; `returns` and `control` rebuild the report."""
        return {
            "level": self.level,
            "oracle": None if self.oracle is None else float(self.oracle.mean()),
            "task_blind": None if self.task_blind is None else float(self.task_blind.mean()),
            "table": self.table(),
            "run_means": self.run_means.tolist(),
            "returns": self.returns.tolist(),
            "control": None if self.control is None else self.control.tolist(),
        }


def adaptation_report(
    returns: Tensor,
    control: Tensor | None = None,
    *,
    oracle: float | Tensor | None = None,
    task_blind: float | Tensor | None = None,
    generator: torch.Generator,
    level: float = 0.95,
    num_samples: int = 2000,
) -> AdaptationReport:
    """Means, intervals over runs, shares of the gap closed, and paired differences from the control.

    The mean has Student's interval of the R means, which is right of as few as three runs; the interquartile mean
    (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264) the bootstrap's, which is too short of so few. It draws
    whole runs: one training is tested on all N tasks (`stratified_bootstrap`). Of one run there are no intervals:
    nothing in it says how much another training would differ, and its spread over tasks is not that.

    Args:
        returns: (R, U + 1, N): `adapted` of the `AdaptationReturns` of every run.
        control: their `control`, of the same shape.
        oracle: return of a policy that knows the task: the expected one, or one of each task (N,) or (R, N).
        task_blind: that of the best policy that cannot tell tasks apart, likewise.
        generator: the bootstrap draws from it.
        level: of the intervals, between 0 and 1.
        num_samples: of the bootstrap.

    Raises:
        ValueError: of a shape or a range other than these, not finite, or an oracle that is not above what the gap is
            measured from.
    """
    check_level(level)
    returns = _curves("returns", returns)
    runs, _, tasks = returns.shape
    if control is not None:
        control = _curves("control", control)
        if control.shape != returns.shape:
            raise ValueError(
                f"`control` must have the shape of `returns`, {tuple(returns.shape)}; got {tuple(control.shape)}."
            )
    best = _reference("oracle", oracle, runs, tasks)
    blind = _reference("task_blind", task_blind, runs, tasks)
    mean, by_updates = returns.mean((0, 2)), returns.transpose(0, 1)
    mean_interval = iqm_interval = difference = difference_interval = None
    if control is not None:
        difference = (returns - control).mean((0, 2))
    if runs > 1:
        mean_interval = student_t_interval(returns.mean(2), level=level)
        options: dict[str, Any] = {"generator": generator, "level": level, "num_samples": num_samples}
        drawn = [stratified_bootstrap(scores, whole_runs=True, **options) for scores in by_updates]
        iqm_interval = Interval(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))
        if control is not None:
            difference_interval = student_t_interval((returns - control).mean(2), level=level)
    return AdaptationReport(
        returns=returns,
        control=control,
        oracle=best,
        task_blind=blind,
        level=level,
        run_means=returns.mean(2),
        mean=mean,
        mean_interval=mean_interval,
        iqm=interquartile_mean(by_updates),
        iqm_interval=iqm_interval,
        difference=difference,
        difference_interval=difference_interval,
        gap_closed=_share(mean[0], mean, best, "the mean return before the first update"),
        gap_closed_from_task_blind=None if blind is None else _share(blind.mean(), mean, best, "`task_blind`"),
    )


def plot_adaptation(report: AdaptationReport, ax: Any, *, label: str | None = None, color: Any = None) -> None:
    """Draw the adaptation curve: interquartile mean of the returns against the number of updates.

    With its interval as a band, the control dashed, and the oracle and the task-blind optimum as horizontal lines:
    interquartile means too, where they are known per task. `ax.legend()` shows the labels. A second curve on the same
    axes needs no lines of its own: `report._replace(oracle=None, task_blind=None)`.

    Args:
        report: of `adaptation_report`.
        ax: matplotlib's axes.
        label: of the curve, in the legend; None: "adapted". With "GRU", the control is "GRU, not adapted".
        color: of the curve, band and control; None: the next of the axes' cycle.
    """
    updates = list(range(len(report.iqm)))
    (line,) = ax.plot(updates, report.iqm.tolist(), marker="o", color=color, label=label or "adapted")
    color = line.get_color()
    if report.iqm_interval is not None:
        low, high = report.iqm_interval.low.tolist(), report.iqm_interval.high.tolist()
        ax.fill_between(updates, low, high, color=color, alpha=0.2, linewidth=0)
    if report.control is not None:
        control = interquartile_mean(report.control.transpose(0, 1)).tolist()
        ax.plot(updates, control, "--", color=color, label=f"{label}, not adapted" if label else "not adapted")
    for name, reference, style in (("oracle", report.oracle, "-."), ("task-blind optimum", report.task_blind, ":")):
        if reference is not None:
            ax.axhline(float(interquartile_mean(reference)), linestyle=style, color="0.4", label=name)
    ax.set(xlabel="updates", ylabel="return, interquartile mean", xticks=updates)


def _checked(returns: Tensor, first: Tensor | None, k: int) -> Tensor:
    expected = "(N,)" if first is None else f"(N,) = {tuple(first.shape)}"
    if returns.dim() != 1 or len(returns) == 0 or (first is not None and returns.shape != first.shape):
        raise ValueError(
            f"`collect` must return (batch, returns) with returns of shape {expected}; after {k} updates got "
            f"{tuple(returns.shape)}."
        )
    finite = torch.isfinite(returns)
    if not bool(finite.all()):
        tasks = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"`collect` must return finite returns; after {k} updates those of tasks {tasks} are not.")
    return returns.detach()


def _curves(name: str, returns: Tensor) -> Tensor:
    if returns.dim() != 3 or returns.numel() == 0:
        raise ValueError(f"`{name}` must have shape (R, U + 1, N), none of them 0; got {tuple(returns.shape)}.")
    check_finite(name, returns)
    return returns.detach().to("cpu", torch.float64)


def _reference(name: str, value: float | Tensor | None, runs: int, tasks: int) -> Tensor | None:
    if value is None:
        return None
    of_tasks = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    if of_tasks.shape not in ((), (tasks,), (runs, tasks)):
        raise ValueError(
            f"`{name}` must be a number, (N,) = ({tasks},) or (R, N) = ({runs}, {tasks}); got {tuple(of_tasks.shape)}."
        )
    check_finite(name, of_tasks)
    return of_tasks.expand(runs, tasks)


def _share(before: Tensor, after: Tensor, oracle: Tensor | None, of_what: str) -> Tensor | None:
    if oracle is None:
        return None
    if not bool(oracle.mean() > before):
        raise ValueError(
            f"`oracle` must be above {of_what}; got {float(oracle.mean()):g}, not above {float(before):g}."
        )
    return gap_closed(before, after, oracle.mean())


def _bounds(name: str, interval: Interval | None) -> dict[str, Tensor | None]:
    return {
        f"{name}_low": None if interval is None else interval.low,
        f"{name}_high": None if interval is None else interval.high,
    }
