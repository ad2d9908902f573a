"""Gradient descent as a pure function, and what runs it at test time."""

from ssmrl.adaptation.inner_loop import Adapted, adapt
from ssmrl.adaptation.losses import mse_loss
from ssmrl.adaptation.test_time_adaptation import AdaptationConfig, Adapter

__all__ = ["AdaptationConfig", "Adapted", "Adapter", "adapt", "mse_loss"]
