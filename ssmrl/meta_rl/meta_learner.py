"""MetaLearner: the outer loop for any loss of meta-parameters on a task."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import grad, vmap
from torchopt import pytree

from ssmrl.adaptation.optim import check_num_steps, check_rate
from ssmrl.adaptation.trace import Traced, check_compile
from ssmrl.meta_rl.nonfinite import NonFinite, Updates
from ssmrl.sharding import Shards

__all__ = ["MetaLearner"]

TaskLoss = Callable[[Any, Any], Tensor]


class MetaLearner:
    """Minimises the mean over tasks of a loss of meta-parameters, 1/N Σ_i L(η, task_i), with exact gradients.

    `task_loss` is a pure function for one task, such as those of `ssmrl.meta_rl.objectives`; it is mapped over tasks
    with `vmap`. What it adapts, and how, is its own affair, so that initial parameters, rates, initial states and
    whatever else are meta-parameters alike. `MetaMAML` is this for a model, with checks of its data.

    Args:
        task_loss: (meta_params, task) -> scalar.
        meta_params: η, a pytree of leaf tensors that require a gradient; they are updated in place.
        outer_lr: rate of the default outer optimizer, `torch.optim.Adam`.
        outer_optimizer: any `torch.optim` optimizer whose step needs no closure, over some or all of `meta_params`.
        max_grad_norm: clip the global norm of the meta-gradient to this; None: do not clip.
        chunk_size: at most so many tasks at once, each chunk with a backward pass of its own: the same numbers up to
            rounding, and the memory of one chunk. None: all at once.
        compile: as for `MetaMAML`; what `task_loss` closes over must not change.
        nonfinite: what to do where a loss, a gradient or a weight is not finite; None: raise an error.
        process_group: of `torch.distributed`, whose ranks share the tasks: every rank makes the same calls with the
            same tasks, and computes the gradient of its part of them. Meta-parameters are at first those of the first
            rank. None: one process.
        own_tasks: the ranks of `process_group` give tasks of their own to every call, at least one each.

    Raises:
        TypeError, ValueError: meta-parameters that are no leaves or need no gradient, a bad rate or size, a rate beside
            an optimizer, an optimizer of another kind or of other tensors.
    """

    def __init__(
        self,
        task_loss: TaskLoss,
        meta_params: Any,
        *,
        outer_lr: float | None = None,
        outer_optimizer: torch.optim.Optimizer | None = None,
        max_grad_norm: float | None = None,
        chunk_size: int | None = None,
        compile: bool | Literal["trace"] = False,
        nonfinite: NonFinite | None = None,
        process_group: dist.ProcessGroup | None = None,
        own_tasks: bool = False,
    ) -> None:
        leaves = pytree.tree_leaves(meta_params)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_leaf or not leaf.requires_grad:
                got = f"one of shape {tuple(leaf.shape)} that is not" if isinstance(leaf, Tensor) else repr(leaf)
                raise ValueError(
                    "meta_params must be a pytree of leaf tensors that require a gradient, such as nn.Parameter; "
                    f"got {got}."
                )
        if not leaves:
            raise ValueError("meta_params must hold at least one tensor; got none.")
        self.task_loss = task_loss
        self.meta_params = meta_params
        self.chunk_size = check_chunk_size(chunk_size)
        self.compile = check_compile(compile)
        self.outer_step = OuterStep(leaves, outer_lr, outer_optimizer, max_grad_norm, nonfinite)
        if self.outer_step.others(leaves):
            raise ValueError("outer_optimizer must hold no tensors but those of meta_params.")
        self.shards, self.own_tasks = Shards(process_group), own_tasks
        self.shards.broadcast(leaves)
        self._traced = Traced(partial(gradient_and_losses, task_loss), inductor=compile is True)

    @torch.enable_grad()
    def update(self, tasks: Any, counts: Sequence[int] | None = None) -> float:
        """One outer step on a stack of tasks.

        Args:
            tasks: a pytree of tensors with an axis N before every other: what `task_loss` takes, for N tasks.
            counts: with `own_tasks`, the N of every rank where all know it; None: they tell each other.

        Returns:
            The mean loss over the tasks, of all ranks, before the step; NaN where `nonfinite` left the update out.

        Raises:
            ValueError: tasks that do not agree on N, or none.
            FloatingPointError: a loss or the meta-gradient is not finite, and `nonfinite` does not leave the update
                out; the meta-parameters and the outer optimizer are as before, unless the step made them not finite.
        """
        if self.own_tasks:
            counts = self._counts(tasks) if counts is None else counts
            number, mine = sum(counts), self.shards.place(counts)
        else:
            number = count_tasks(tasks)
            mine = self.shards.share(number)
            tasks = pytree.tree_map(lambda t: t[mine], tasks)
        chunks = split_tasks(tasks, self.chunk_size) if mine.start < mine.stop else []
        return self.outer_step.updates(lambda: self._update(chunks, number, mine), math.nan)

    @property
    def left_out(self) -> int:
        """How many updates `nonfinite` has left out."""
        return self.outer_step.updates.left_out

    def state_dict(self) -> dict[str, Any]:
        """Meta-parameters, outer optimizer and counters: a tree that `ssmrl.checkpoint.save_checkpoint` takes."""
        return {"meta_params": [leaf.detach() for leaf in self._leaves()], "outer_step": self.outer_step.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, to the same bits.

        Raises:
            ValueError: it is of other meta-parameters.
        """
        copy_into(self._leaves(), state["meta_params"], "meta-parameters")
        self.outer_step.load_state_dict(state["outer_step"])

    @torch.no_grad()
    def losses(self, tasks: Any) -> Tensor:
        """The loss on each of a stack of tasks, (N,); nothing changes."""
        chunks = split_tasks(tasks, self.chunk_size)
        return torch.cat([map_over_tasks(self.task_loss, self.meta_params, chunk) for _, chunk in chunks])

    def _counts(self, tasks: Any) -> list[int]:
        """How many tasks of its own every rank has."""
        try:
            given = count_tasks(tasks)
        except ValueError:
            self.shards.counts(0, self._leaves()[0])  # or the others would wait for this rank
            raise
        counts = self.shards.counts(given, self._leaves()[0])
        check_own(counts)
        return counts

    def _leaves(self) -> list[Tensor]:
        leaves: list[Tensor] = pytree.tree_leaves(self.meta_params)
        return leaves

    def _update(self, chunks: list[tuple[int, Any]], number: int, mine: slice) -> float:
        leaves = self._leaves()
        losses = leaves[0].new_zeros(number, dtype=loss_dtype(leaves[0]))
        with self.outer_step.clean(leaves):
            if chunks:
                losses[mine] = torch.cat([self._backward(chunk, number) for _, chunk in chunks]).to(losses)
            self.shards.sum(self.outer_step.learned(), losses)
            check_losses(losses)
            self.outer_step(lambda: [f"leaf {i}" for i, p in enumerate(leaves) if not is_finite(p.grad)])
        return float(losses.mean())

    def _backward(self, tasks: Any, num_tasks: int) -> Tensor:
        if not self.compile:
            losses = map_over_tasks(self.task_loss, self.meta_params, tasks)
            (losses.sum() / num_tasks).backward()
            return losses.detach()
        result: tuple[Any, Tensor] = self._traced(self.meta_params, tasks)
        gradient, losses = result
        accumulate(self.meta_params, gradient, num_tasks)
        return losses


def map_over_tasks(task_loss: TaskLoss, meta_params: Any, tasks: Any) -> Tensor:
    """(N,) losses of the same meta-parameters on every task of a stack."""
    losses: Tensor = vmap(task_loss, in_dims=(None, 0))(meta_params, tasks)
    if losses.dim() != 1:
        raise ValueError(f"task_loss must return a scalar for a task; got shape {tuple(losses.shape[1:])}.")
    return losses


def gradient_and_losses(task_loss: TaskLoss, meta_params: Any, tasks: Any) -> tuple[Any, Tensor]:
    """Gradient of the sum of the losses on a stack of tasks, and the losses (N,): a pure function of its arguments."""

    def total(meta_params: Any) -> tuple[Tensor, Tensor]:
        losses = map_over_tasks(task_loss, meta_params, tasks)
        return losses.sum(), losses

    result: tuple[Any, Tensor] = grad(total, has_aux=True)(meta_params)
    return result


def accumulate(meta_params: Any, gradient: Any, num_tasks: int) -> None:
    """Add a gradient / num_tasks to the `grad` of every leaf."""
    leaves: list[Tensor] = pytree.tree_leaves(meta_params)
    shares: list[Tensor] = pytree.tree_leaves(gradient)
    for p, share in zip(leaves, shares, strict=True):
        p.grad = share / num_tasks if p.grad is None else p.grad + share / num_tasks


def count_tasks(tasks: Any) -> int:
    """N of a stack of tasks, which is refused if there is none."""
    leaves = pytree.tree_leaves(tasks)
    sizes = [len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else 0 for leaf in leaves]
    if not sizes or min(sizes) == 0 or min(sizes) != max(sizes):
        raise ValueError(
            f"tasks must be a pytree of tensors with an axis of the same N >= 1 tasks before every other; got "
            f"{[tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]}."
        )
    return sizes[0]


def split_tasks(tasks: Any, chunk_size: int | None) -> list[tuple[int, Any]]:
    """A stack of tasks in chunks, each with how many it holds."""
    size = count_tasks(tasks)
    chunk = size if chunk_size is None else chunk_size

    def part(start: int) -> tuple[int, Any]:
        return min(chunk, size - start), pytree.tree_map(lambda t: t[start : start + chunk], tasks)

    return [part(start) for start in range(0, size, chunk)] if size > chunk else [(size, tasks)]


class OuterStep:
    """One step of an outer optimizer on gradients that are there, checked and clipped.

    Args:
        params: what the default optimizer, Adam at `outer_lr`, learns.
        outer_lr: None is 0.001.
        optimizer: in place of the default.
        max_grad_norm, nonfinite: as for `MetaLearner`.

    Attributes:
        updates: runs what ends in such a step.
    """

    DEFAULT_LR = 0.001

    def __init__(
        self,
        params: Iterable[Tensor],
        outer_lr: float | None,
        optimizer: torch.optim.Optimizer | None,
        max_grad_norm: float | None,
        nonfinite: NonFinite | None = None,
    ) -> None:
        params = list(params)
        if outer_lr is not None:
            check_rate("outer_lr", outer_lr)
        if max_grad_norm is not None:
            check_rate("max_grad_norm", max_grad_norm)
            if max_grad_norm == 0:
                raise ValueError("max_grad_norm must be > 0, or nothing would be learned; got 0.")
        if optimizer is None:
            rate = self.DEFAULT_LR if outer_lr is None else outer_lr
            optimizer = torch.optim.Adam(params, lr=rate, fused=all(p.is_floating_point() for p in params))
        elif not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"outer_optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}.")
        elif outer_lr is not None and outer_lr != self.DEFAULT_LR:
            raise ValueError(
                f"outer_lr = {outer_lr} would be ignored: outer_optimizer has a rate of its own; give one of the two."
            )
        self.optimizer = optimizer
        self.updates = Updates(nonfinite, self.learned, optimizer)
        self.max_grad_norm = max_grad_norm
        if not {id(p) for p in params} & {id(p) for p in self.learned()}:
            raise ValueError(
                "outer_optimizer must hold parameters of the model that require a gradient; it holds none."
            )

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and counters."""
        return {"optimizer": self.optimizer.state_dict(), "updates": self.updates.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would take the tensors themselves
        self.updates.load_state_dict(state["updates"])

    def learned(self) -> list[Tensor]:
        """What the optimizer holds."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def others(self, params: Iterable[Any]) -> list[Tensor]:
        """What the optimizer holds beside these."""
        known = {id(p) for p in params}
        return [p for p in self.learned() if id(p) not in known]

    @contextmanager
    def clean(self, params: Iterable[Tensor]) -> Iterator[None]:
        """No `grad` on these, and on what the optimizer holds, before and after."""
        everything = [*params, *self.learned()]  # the optimizer may hold a part of them, and more
        for p in everything:
            p.grad = None
        try:
            yield
        finally:
            for p in everything:
                p.grad = None

    def __call__(self, not_finite: Callable[[], list[str]]) -> None:
        """Step; `not_finite` names what has a gradient that is not finite, for the error."""
        learned = self.learned()
        norm = nn.utils.get_total_norm([p.grad for p in learned if p.grad is not None])
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"The meta-gradient is not finite (norm {float(norm)}) in {not_finite() or 'its norm'}; the model is "
                f"untouched. Lower the rates, or clip the inner gradient."
            )
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(learned, self.max_grad_norm, norm)
        self.optimizer.step()


@torch.no_grad()
def copy_into(tensors: Sequence[Tensor], values: Sequence[Tensor], what: str) -> None:
    """Write saved values into tensors, all or none; an error says `what` they are."""
    shapes, saved = ([tuple(tensor.shape) for tensor in some] for some in (tensors, values))
    if shapes != saved:
        raise ValueError(f"The state must be of {what} of shapes {shapes}; it is of {saved}.")
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def check_own(counts: Sequence[int]) -> None:
    """Refuse, on all ranks, that one of them has no tasks of its own."""
    if min(counts) < 1:
        raise ValueError(f"Every rank must have at least one task; they have {list(counts)}.")


def check_losses(losses: Tensor) -> None:
    """Refuse losses (N,) that are not finite."""
    bad = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"The query loss after adaptation is not finite for tasks {bad}: {losses[bad].tolist()}; the model is "
            f"untouched. Lower the inner rate."
        )


def check_chunk_size(chunk_size: Any) -> int | None:
    """Refuse a chunk size that is neither None nor an integer >= 1."""
    if chunk_size is None:
        return None
    size = check_num_steps("chunk_size", chunk_size)
    if size < 1:
        raise ValueError(f"chunk_size must be None or at least 1; got {size}.")
    return size


def loss_dtype(like: Tensor) -> torch.dtype:
    """What losses are kept and summed in: float32 at least, for weights of fewer bits."""
    return torch.promote_types(like.dtype, torch.float32)


def is_finite(gradient: Tensor | None) -> bool:
    """Whether a gradient, if there is one, is finite."""
    return gradient is None or bool(torch.isfinite(gradient).all())
