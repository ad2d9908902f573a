"""Gradient descent as a pure function, and what runs it at test time."""

from ssmrl.adaptation.implicit import adapt_implicitly, conjugate_gradient, neumann_series
from ssmrl.adaptation.inner_loop import Adapted, adapt
from ssmrl.adaptation.losses import mse_loss
from ssmrl.adaptation.optim import clip_by_global_norm, learning_rates, scale_by_learning_rates
from ssmrl.adaptation.recompute import mixed_mode_grad_and_value, recomputed
from ssmrl.adaptation.select import select, split
from ssmrl.adaptation.test_time_adaptation import AdaptationConfig, Adapter

__all__ = [
    "AdaptationConfig",
    "Adapted",
    "Adapter",
    "adapt",
    "adapt_implicitly",
    "clip_by_global_norm",
    "conjugate_gradient",
    "learning_rates",
    "mixed_mode_grad_and_value",
    "mse_loss",
    "neumann_series",
    "recomputed",
    "scale_by_learning_rates",
    "select",
    "split",
]
