"""A model whose inputs have gains, one for every actuator, which adapt while its weights do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmrl.core.base import check_dimensions

__all__ = ["WithInputGains"]


class WithInputGains(nn.Module):
    """y = model([u, v₀ + g (v - v₀)]): the last features v of an input (u, v) are multiplied by gains g, 1 at first.

    A model of dynamics reads observations u and actions v. Where an actuator has become weaker, or dead, one gain says
    so, and everything else that the model has learned of the system stays true; weights that adapt have to say it in
    every row that reads the action. So few numbers are found from few steps, also of an actuator that never failed in
    training: `AdaptationConfig(adapted="gain")`, `docs/control_results.md`.

    Args:
        model: a `StateModel`, or any module of its shape.
        num_gains: G, of the last features of its inputs.
        origin: v₀, (G,), the input that no gain changes; None: 0. Of normalised actions it is action 0:
            `scales.action.normalize(torch.zeros(G))`.

    Attributes:
        gain: (G,) the parameters g.

    Raises:
        ValueError: num_gains is not a positive integer, origin is of another shape, model has no parameters.
    """

    init_hidden: Callable[[int], Any]
    origin: Tensor

    def __init__(self, model: nn.Module, num_gains: int, origin: Tensor | None = None) -> None:
        super().__init__()
        check_dimensions(num_gains=num_gains)
        like = next(model.parameters(), None)
        if like is None:
            raise ValueError(f"model must have parameters; {type(model).__name__} has none.")
        if origin is not None and origin.shape != (num_gains,):
            raise ValueError(f"origin must have shape ({num_gains},); got {tuple(origin.shape)}.")
        self.model = model
        self.gain = nn.Parameter(torch.ones(num_gains, dtype=like.dtype, device=like.device))
        self.register_buffer("origin", torch.zeros_like(self.gain.detach()) if origin is None else origin.to(like))
        if hasattr(model, "init_hidden"):  # a model without a state stays one
            self.init_hidden = model.init_hidden  # type: ignore[assignment]

    def forward(self, x: Tensor, *state: Any, **options: Any) -> Any:
        """As `model`, (B, D) or (B, T, D)."""
        num_gains = len(self.gain)
        if x.shape[-1] < num_gains:
            raise ValueError(f"x must have at least {num_gains} features, one for every gain; got {x.shape[-1]}.")
        rest, scaled = x.split([x.shape[-1] - num_gains, num_gains], dim=-1)
        return self.model(torch.cat([rest, torch.lerp(self.origin, scaled, self.gain)], dim=-1), *state, **options)
