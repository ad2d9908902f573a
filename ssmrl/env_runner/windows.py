"""Trajectories are cut into windows, and each row's windows are split into support and query.

Letters: B rows, T steps, M windows, L steps of a window, N rows of the split, each one task.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmrl.env_runner._checks import require_integer
from ssmrl.env_runner.rollout import Trajectory

__all__ = ["Windows", "cut_windows", "split_support_query"]


class Windows(NamedTuple):
    """M windows of L consecutive valid transitions, each within one episode."""

    row: Tensor
    """Int64 (M,) the row of the trajectory that a window is from."""
    data: Trajectory
    """Leaves (M, L, ...)."""
    num_rows: int
    """B of the trajectory, so that a row without windows is not forgotten."""


def cut_windows(trajectory: Trajectory, length: int) -> Windows:
    """Cut every episode (B, T, ...) from its start into consecutive windows of L = `length` steps.

    An episode is bounded by a `reset`, a termination or truncation, an invalid step, and the ends
    of the trajectory. What remains of it after its last whole window is dropped. Windows are
    ordered by row, then by time. Only a window that starts an episode (the first of a trial, in a
    rollout with `episodes_per_trial`) has `reset` in its first step: a model that starts all of
    them from its initial state sets it there itself.
    """
    length = require_integer("length", length, 1)
    valid = trajectory.valid
    num_rows, num_steps = valid.shape
    last = trajectory.terminated | trajectory.truncated | ~valid
    first = trajectory.reset | ~valid
    first[:, 1:] |= last[:, :-1]
    time = torch.arange(num_steps, device=valid.device)
    begin = torch.where(first, time, 0).cummax(dim=1).values  # (B, T) where t's episode begins.
    num_starts = max(num_steps - length + 1, 0)
    start = slice(num_starts)
    # An invalid step is an episode by itself, so one valid step makes a whole window valid.
    fits = (
        valid[:, start]
        & ((time[start] - begin[:, start]) % length == 0)
        & (begin[:, start] == begin[:, num_steps - num_starts :])
    )
    row, at = fits.nonzero(as_tuple=True)
    steps = at[:, None] + torch.arange(length, device=valid.device)
    data = Trajectory(*(leaf[row[:, None], steps] for leaf in trajectory))
    return Windows(row, data, num_rows)


def split_support_query(
    windows: Windows,
    num_support: int,
    num_query: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Trajectory, Trajectory]:
    """Give every row disjoint windows to adapt to and to be judged on.

    Args:
        windows: those of N rows.
        num_support: windows of the support set.
        num_query: windows of the query set.
        generator: draw from the row's windows without replacement. None: take its first windows in
            time order, support before query.

    Returns:
        support, query: leaves (N, num_support, L, ...) and (N, num_query, L, ...), in the order of
        the rows.

    Raises:
        ValueError: a row has too few windows.
    """
    num_support = require_integer("num_support", num_support, 1)
    num_query = require_integer("num_query", num_query, 1)
    needed = num_support + num_query
    counts = torch.bincount(windows.row, minlength=windows.num_rows).tolist()
    for row, count in enumerate(counts):
        if count < needed:
            raise ValueError(
                f"Every row must have at least num_support + num_query = {needed} windows; row "
                f"{row} has {count}: roll out more steps or cut shorter windows."
            )
    chosen = []
    for row, count in enumerate(counts):
        order = torch.arange(count)
        if generator is not None:
            order = torch.randperm(count, generator=generator, device=generator.device)
        mine = (windows.row == row).nonzero().squeeze(1)
        chosen.append(mine[order[:needed].to(mine.device)])
    index = torch.stack(chosen)
    support, query = index[:, :num_support], index[:, num_support:]
    return (
        Trajectory(*(leaf[support] for leaf in windows.data)),
        Trajectory(*(leaf[query] for leaf in windows.data)),
    )
