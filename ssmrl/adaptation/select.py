"""Which parameters adapt."""

from __future__ import annotations

from torch import nn

__all__ = ["trainable_parameters"]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, for those that require a gradient.

    Raises:
        ValueError: there are none.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient.")
    return params
