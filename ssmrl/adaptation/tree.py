"""TorchOpt's pytrees, for trees of any kind: its own types know only trees of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchopt import pytree

__all__ = ["all_finite", "is_there", "tree_leaves", "tree_map"]

tree_map: Callable[..., Any] = pytree.tree_map
tree_leaves: Callable[..., list[Any]] = pytree.tree_leaves


def is_there(tree: Any) -> bool:
    """Whether a tree has leaves; () stands for what is switched off or was not given."""
    return bool(tree_leaves(tree))


def all_finite(tree: Any) -> Tensor:
    """Bool (), whether all floating-point numbers in the tensors of a tree are finite."""
    leaves = [leaf for leaf in tree_leaves(tree) if leaf.is_floating_point()]
    return torch.stack([torch.isfinite(leaf).all() for leaf in leaves]).all() if leaves else torch.tensor(True)
