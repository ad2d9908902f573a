"""Losses: pure functions of a model's output and a target."""

from __future__ import annotations

from torch import Tensor

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
    # Written out: PyTorch's own has no forward-mode derivative of its gradient (its issue 123996), and a wrong second
    # derivative, or none, under nested `vmap`.
    return (output - target).square().mean()
