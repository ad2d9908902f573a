"""TorchOpt's pytrees, for trees of any kind: its own types know only trees of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torchopt import pytree

__all__ = ["all_finite", "all_finite_on_host", "dot", "is_there", "tree_leaves", "tree_map"]

tree_map: Callable[..., Any] = pytree.tree_map
tree_leaves: Callable[..., list[Any]] = pytree.tree_leaves


def is_there(tree: Any) -> bool:
    """Whether a tree has leaves; () stands for what is switched off or was not given."""
    return isinstance(tree, Tensor) or bool(tree_leaves(tree))


def all_finite(tree: Any) -> Tensor:
    """Bool (), whether all floating-point numbers in the tensors of a tree are finite."""
    leaves = _floating(tree)
    return torch.stack([torch.isfinite(leaf).all() for leaf in leaves]).all() if leaves else torch.tensor(True)


def all_finite_on_host(tree: Any) -> Tensor:
    """`all_finite` where a value may be read, not mapped nor traced: a quarter of the time."""
    leaves = _floating(tree)
    # A sum is finite only if every term is; where it overflows the second test decides.
    if leaves and bool(seen := torch.isfinite(reduce(torch.add, [leaf.sum() for leaf in leaves]))):
        return seen
    return all_finite(tree)


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Σ_i ⟨left_i, right_i⟩, the scalar product of two vectors in pieces of equal shapes."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _floating(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if leaf.is_floating_point()]
