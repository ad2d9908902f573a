"""Rates of outer optimizers over a training, for several benchmarks."""

from __future__ import annotations

import math

__all__ = ["rate_at"]


def rate_at(update: int, total: int, peak: float) -> float:
    """Up over a tenth of the updates, then down as a cosine."""
    part = (update + 1) / total
    return peak * min(10 * part, 0.5 * (1 + math.cos(math.pi * part)))
