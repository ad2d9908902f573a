"""Losses: pure functions of a model's output and a target."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

__all__ = ["mse_loss"]


def mse_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean of (output - target)² over all elements, a scalar; unlike PyTorch's, it never broadcasts.

    Raises:
        ValueError: output and target differ in shape.
    """
    if output.shape != target.shape:
        raise ValueError(
            f"The target must have the shape of the model's output, {tuple(output.shape)}; got {tuple(target.shape)}."
        )
    return functional.mse_loss(output, target)
