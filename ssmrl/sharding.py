"""What the ranks of a process group share: the tasks of an outer update, and the rows of live streams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["Rows", "Shards"]


class Shards:
    """Which tasks are this rank's, and what ranks have to tell each other.

    Every rank computes the gradient of its own tasks. Sums over ranks make of these the gradient of all, on every rank,
    and all of them make the same step. An update sends the meta-gradient, a flag for every parameter and a loss for
    every task, in all-reduces of at most `bucket_bytes` that are under way at once.

    Args:
        group: of `torch.distributed`; None: there is one rank.
        bucket_bytes: of one all-reduce; a larger tensor has one of its own.

    Raises:
        TypeError: group is of another kind, or one that this process is not in.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, bucket_bytes: int = 25 * 2**20) -> None:
        if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup that this process is in, such as "
                f"torch.distributed.group.WORLD after init_process_group(); got {group!r}."
            )
        self.group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.bucket_bytes = bucket_bytes

    def share(self, number: int) -> slice:
        """Return the part of so many tasks that is this rank's; parts differ by one task at most, and may be empty."""
        return slice(number * self.rank // self.size, number * (self.rank + 1) // self.size)

    def counts(self, number: int, like: Tensor) -> list[int]:
        """How many tasks of its own every rank has, of which this one has `number`.

        Args:
            like: a tensor on the device that the group communicates from.
        """
        every = torch.zeros(self.size, dtype=torch.int64, device=like.device)
        every[self.rank] = number
        if self.group is not None:
            dist.all_reduce(every, group=self.group)
        found: list[int] = every.tolist()
        return found

    def largest(self, number: int) -> int:
        """The largest of a number that every rank has one of."""
        if self.group is None:
            return number
        devices = [backend.split(":")[0] for backend in dist.get_backend_config(self.group).split(",")]
        of_all = torch.tensor(number, device="cpu" if "cpu" in devices else devices[0])
        dist.all_reduce(of_all, dist.ReduceOp.MAX, group=self.group)
        return int(of_all)

    def place(self, counts: Sequence[int]) -> slice:
        """Where this rank's own tasks are among all, those of one rank after those of another."""
        begin = sum(counts[: self.rank])
        return slice(begin, begin + counts[self.rank])

    @torch.no_grad()
    def gathered(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """(N,) values of all tasks from those of every rank's own, (counts[rank],)."""
        if self.group is None:
            return values
        every = values.new_zeros(sum(counts))
        every[self.place(counts)] = values
        dist.all_reduce(every, group=self.group)
        return every

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Make tensors those of the first rank."""
        if self.group is not None:
            for tensor in tensors:
                whole = tensor.detach().contiguous()  # backends send memory, with what lies between
                dist.broadcast(whole, dist.get_global_rank(self.group, 0), self.group)
                tensor.copy_(whole)

    @torch.no_grad()
    def total(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Sums over ranks, without a graph, of tensors that every rank has of the same shapes."""
        if self.group is None:
            return tuple(tensors)
        sums = tuple(tensor.detach().clone() for tensor in tensors)
        self._sum_in_place(sums)
        return sums

    @torch.no_grad()
    def mean(self, values: Sequence[Tensor], weight: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Means over ranks, each with its scalar weight, and the share that this rank has in them."""
        if self.group is None:
            return tuple(values), torch.ones_like(weight)
        *sums, total = self.total([*(weight * value for value in values), weight])
        total = total.clamp(min=torch.finfo(total.dtype).tiny)
        return tuple(value / total for value in sums), weight / total

    @torch.no_grad()
    def sum(self, params: Sequence[Tensor], losses: Tensor) -> None:
        """Sum the gradients of parameters, and losses (N,), over ranks, in place.

        A parameter that no rank has a gradient of has none after it; where some have one, it is 0 for the others.
        """
        if self.group is None:
            return
        seen = torch.tensor([p.grad is not None for p in params], dtype=losses.dtype, device=losses.device)
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self._sum_in_place([losses, seen, *(p.grad for p in params if p.grad is not None)])
        for p, ranks in zip(params, seen.tolist(), strict=True):
            if ranks == 0:
                p.grad = None

    def _sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        under_way = []
        for bucket in self._buckets(tensors):
            flat = bucket[0] if len(bucket) == 1 else torch.cat([tensor.reshape(-1) for tensor in bucket])
            flat = flat.contiguous()
            under_way.append((bucket, flat, dist.all_reduce(flat, group=self.group, async_op=True)))
        for bucket, flat, work in under_way:
            if work is not None:
                work.wait()
            for tensor, part in zip(bucket, flat.reshape(-1).split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def _buckets(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """In order, with one dtype and device each."""
        buckets: dict[tuple[torch.dtype, torch.device], list[list[Tensor]]] = {}
        for tensor in tensors:
            several = buckets.setdefault((tensor.dtype, tensor.device), [[]])
            held = sum(t.nbytes for t in several[-1])
            if held and held + tensor.nbytes > self.bucket_bytes:
                several.append([])
            several[-1].append(tensor)
        return [bucket for several in buckets.values() for bucket in several]


class Rows:
    """Rows 0, ..., N - 1 that are dealt to the ranks in turn: rank r of R has r, r + R, r + 2 R, ...

    So rows that come later leave every other where it is. All trees are of tensors with rows on their first axis.

    Args:
        group: as for `Shards`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.shards = Shards(group)

    def count(self, number: int) -> int:
        """How many of N rows are this rank's."""
        return len(range(self.shards.rank, number, self.shards.size))

    def mine(self, tree: Any) -> Any:
        """Of all rows, this rank's."""
        if self.shards.group is None:
            return tree
        return tree_map(lambda leaf: leaf[self.shards.rank :: self.shards.size], tree)

    @torch.no_grad()
    def whole(self, tree: Any, number: int) -> Any:
        """All N rows, from those of every rank: bit for bit, in one all-gather of bytes."""
        if self.shards.group is None:
            return tree
        leaves, structure = tree_flatten(tree)
        if not leaves:
            return tree
        packed = torch.cat([_bytes(leaf) for leaf in leaves], 1)
        padded = packed.new_zeros(-(-number // self.shards.size), packed.shape[1])
        padded[: len(packed)] = packed
        of_ranks = [torch.empty_like(padded) for _ in range(self.shards.size)]
        dist.all_gather(of_ranks, padded, group=self.shards.group)
        every = torch.stack(of_ranks, 1).flatten(0, 1)[:number]
        return tree_unflatten(_like(every, leaves), structure)

    @torch.no_grad()
    def one(self, tree: Any, row: int) -> Any:
        """One of all rows, from this rank's where it is among them, else from another's; without the axis of rows."""
        owner, place = row % self.shards.size, row // self.shards.size
        if self.shards.group is None:
            return tree_map(lambda leaf: leaf[place].clone(), tree)
        leaves, structure = tree_flatten(tree)
        held = place if self.shards.rank == owner else 0
        packed = torch.cat([_bytes(leaf[held : held + 1]) for leaf in leaves], 1)
        dist.broadcast(packed, dist.get_global_rank(self.shards.group, owner), self.shards.group)
        return tree_unflatten([leaf[0] for leaf in _like(packed, leaves)], structure)


def _bytes(leaf: Tensor) -> Tensor:
    """(n, ...) -> UInt8 (n, bytes of a row)."""
    rows = leaf.flatten(1) if leaf.dim() > 1 else leaf[:, None]
    return torch.empty(rows.shape, dtype=rows.dtype, device=rows.device).copy_(rows).view(torch.uint8)


def _like(packed: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Rows of several leaves from their bytes."""
    sizes = [_bytes(leaf[:1]).shape[1] for leaf in leaves]
    return [
        part.flatten().clone().view(leaf.dtype).view(len(packed), *leaf.shape[1:])
        for part, leaf in zip(packed.split(sizes, 1), leaves, strict=True)
    ]
