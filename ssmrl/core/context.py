"""A model with context parameters: inputs of its own that adapt, while its weights do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmrl.core.base import check_dimensions

__all__ = ["WithContext"]


class WithContext(nn.Module):
    """y = model([x, φ]), with context parameters φ, zero at first.

    Adapting φ alone is CAVIA (Zintgraf et al. 2019, "Fast Context Adaptation via Meta-Learning",
    https://arxiv.org/abs/1810.03642): `MetaMAML(WithContext(model, 4), adapted="context")`. The paper does not learn
    where φ starts, which here is so when the outer optimizer holds `model.parameters()` alone.

    Args:
        model: a `StateModel`, or any module of its shape, whose inputs have D + C features.
        context_dim: C.

    Attributes:
        context: (C,) the parameters φ.
    """

    init_hidden: Callable[[int], Any]

    def __init__(self, model: nn.Module, context_dim: int) -> None:
        super().__init__()
        check_dimensions(context_dim=context_dim)
        like = next(model.parameters(), None)
        if like is None:
            raise ValueError(f"model must have parameters; {type(model).__name__} has none.")
        self.model = model
        self.context = nn.Parameter(torch.zeros(context_dim, dtype=like.dtype, device=like.device))
        if hasattr(model, "init_hidden"):  # a model without a state stays one
            self.init_hidden = model.init_hidden  # type: ignore[assignment]

    def forward(self, x: Tensor, *state: Any, **options: Any) -> Any:
        """As `model`, with x of D features, (B, D) or (B, T, D)."""
        context = self.context.expand(*x.shape[:-1], -1)
        return self.model(torch.cat([x, context], dim=-1), *state, **options)
