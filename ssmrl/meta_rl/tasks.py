"""Tasks as tensors: what a task is, and how lists of them become stacks that `vmap` can map over.

Letters: N tasks, B sequences of a task, T steps, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torchopt import pytree

from ssmrl.adaptation.checks import check_finite, check_pair, check_state

__all__ = ["Task"]


class Task(NamedTuple):
    """Data of one task, or, with an axis N before every other, of a stack of tasks."""

    support_x: Tensor
    """(B, D) or (B, T, D): the inputs that the task is learned from."""
    support_y: Tensor
    """The targets, with the leading axes of `support_x`."""
    query_x: Tensor
    """Inputs that what was learned is judged on; B and T may differ from the support's."""
    query_y: Tensor


_Four: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
Tasks: TypeAlias = Sequence[_Four] | _Four


class TaskGroup(NamedTuple):
    """Tasks of equal shapes, stacked."""

    indices: list[int]
    """Where the tasks stood in what the caller gave."""
    tasks: Task
    """(N, B, ...)."""
    initial_state: Any
    """A pytree with leaves (B, ...) shared by the tasks, or (N, B, ...) one for each; None: the model's own."""
    state_axis: int | None
    """0 where every task has its own initial state, None where it is shared."""

    def chunks(self, size: int) -> list[TaskGroup]:
        """The tasks, at most `size` of them in each group."""
        return [self.part(slice(start, start + size)) for start in range(0, len(self.indices), size)]

    def part(self, here: slice) -> TaskGroup:
        """Some of the tasks."""
        own = self.state_axis == 0
        state = pytree.tree_map(lambda s: s[here], self.initial_state) if own else self.initial_state
        return TaskGroup(self.indices[here], Task(*(t[here] for t in self.tasks)), state, self.state_axis)


def group_tasks(tasks: Tasks, initial_hidden_state: Any, like: Tensor) -> list[TaskGroup]:
    """Check tasks, then stack those of equal shapes.

    Args:
        tasks: a sequence of `(support_x, support_y, query_x, query_y)`, or one such tuple with an axis N before
            every other.
        initial_hidden_state: a pytree with the batch on the leading axis of every leaf. A batch of 1, or of the
            tasks' own batch size, is shared by all tasks, as is a state without leaves; one of the sum of the tasks'
            batch sizes is split among them in order. None stays None.
        like: a weight of the model, whose dtype and device the data must have.

    Raises:
        TypeError, ValueError: no tasks, or data that do not fit each other, the model, or the state.
    """
    if isinstance(tasks, tuple) and len(tasks) == 4 and all(isinstance(t, Tensor) for t in tasks):
        stack = Task(*tasks)
        _check_stack(stack, like)
        num_tasks, batch_size = stack.support_x.shape[:2]
        batch_sizes = [(batch_size, stack.query_x.shape[1])] * num_tasks
        groups = [(list(range(num_tasks)), stack)]
    else:
        each = _check_list(tasks, like)
        batch_sizes = [(task.support_x.shape[0], task.query_x.shape[0]) for task in each]
        by_shape: dict[Any, list[int]] = {}
        for index, task in enumerate(each):
            by_shape.setdefault(tuple((t.shape, t.dtype) for t in task), []).append(index)
        groups = [
            (indices, Task(*(torch.stack(field) for field in zip(*(each[i] for i in indices), strict=True))))
            for indices in by_shape.values()
        ]
    if initial_hidden_state is None:
        return [TaskGroup(indices, stack, None, None) for indices, stack in groups]
    check_state("initial_hidden_state", initial_hidden_state, like)
    state = _Initial(initial_hidden_state, batch_sizes)
    return [TaskGroup(indices, stack, *state.of(indices)) for indices, stack in groups]


def shared_out(groups: list[TaskGroup], share: slice) -> list[TaskGroup]:
    """Of all tasks of groups, one group after the other, those of a share; groups of which none is are left out."""
    parts, before = [], 0
    for group in groups:
        number = len(group.indices)
        start, stop = (min(max(edge - before, 0), number) for edge in (share.start, share.stop))
        if start < stop:
            parts.append(group if (start, stop) == (0, number) else group.part(slice(start, stop)))
        before += number
    return parts


class _Initial:
    """An initial state that is shared by all tasks or split among them."""

    def __init__(self, state: Any, batch_sizes: list[tuple[int, int]]) -> None:
        self.state = state
        self.sizes = [support for support, _ in batch_sizes]
        leaves = pytree.tree_leaves(state)
        batches = {leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves}
        every = {size for sizes in batch_sizes for size in sizes}
        same_query = all(support == query for support, query in batch_sizes)
        batch = batches.pop() if len(batches) == 1 else None
        # A state without leaves, that of a model without memory, fits every batch.
        self.shared = not leaves or (batch is not None and (batch == 1 or {batch} == every))
        if not self.shared and not (batch == sum(self.sizes) and same_query):
            raise ValueError(
                f"initial_hidden_state must have on the leading axis of every tensor a batch of 1 or of the "
                f"tasks' batch size, one of {sorted(every)} that all tasks share, or the sum "
                f"{sum(self.sizes)} of the tasks' batch sizes, to be split among tasks whose support and query "
                f"sets have the same one; got {batch if batch is not None else 'leaves that disagree, or no tensors'}."
            )

    def of(self, indices: list[int]) -> tuple[Any, int | None]:
        if self.shared:
            return self.state, None

        def stack(leaf: Tensor) -> Tensor:
            parts = leaf.split(self.sizes)
            return torch.stack([parts[i] for i in indices])

        return pytree.tree_map(stack, self.state), 0


def expand_state(state: Any, batch_size: int) -> Any:
    """A state of batch 1 for `batch_size` rows; any other as it is."""
    return pytree.tree_map(lambda leaf: leaf.expand(batch_size, *leaf.shape[1:]) if leaf.shape[0] == 1 else leaf, state)


def _check_stack(stack: Task, like: Tensor) -> None:
    for part in ("support", "query"):
        x, y = getattr(stack, f"{part}_x"), getattr(stack, f"{part}_y")
        check_pair(f"{part}_x", x, f"{part}_y", y, like, stacked=True)
        check_finite(f"{part}_x", x)
        check_finite(f"{part}_y", y)
    if stack.support_x.shape[0] != stack.query_x.shape[0]:
        raise ValueError(
            f"support_x and query_x must hold the same number of tasks N; got {stack.support_x.shape[0]} "
            f"and {stack.query_x.shape[0]}."
        )
    if stack.support_x.shape[0] == 0:
        raise ValueError("tasks must hold at least one task; got a stack of none.")


def _check_list(tasks: Any, like: Tensor) -> list[Task]:
    if not isinstance(tasks, Sequence):
        raise TypeError(
            f"tasks must be a sequence of (support_x, support_y, query_x, query_y) tuples, or one such tuple "
            f"with an axis N before every other; got {type(tasks).__name__}."
        )
    if not tasks:
        raise ValueError("tasks must hold at least one task; got an empty sequence.")
    for index, task in enumerate(tasks):
        if not isinstance(task, (tuple, list)) or len(task) != 4:
            hint = " A stack of tasks is a tuple of four tensors, not a list." if isinstance(task, Tensor) else ""
            raise ValueError(
                f"tasks[{index}] must be a tuple (support_x, support_y, query_x, query_y); "
                f"got {type(task).__name__}{f' of {len(task)}' if isinstance(task, (tuple, list)) else ''}.{hint}"
            )
        for part, x, y in (("support", *task[:2]), ("query", *task[2:])):
            x_name, y_name = f"tasks[{index}].{part}_x", f"tasks[{index}].{part}_y"
            check_pair(x_name, x, y_name, y, like)
            check_finite(x_name, x)
            check_finite(y_name, y)
    return [Task(*task) for task in tasks]
