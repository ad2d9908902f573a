"""Gradient descent as a pure function, and what runs it at test time."""

from ssmrl.adaptation.anchor import distance, fisher_information, pull_to_anchor, trust_region
from ssmrl.adaptation.guard import Guard
from ssmrl.adaptation.implicit import adapt_implicitly, conjugate_gradient, neumann_series
from ssmrl.adaptation.inner_loop import Adapted, adapt
from ssmrl.adaptation.losses import (
    entropy_loss,
    mask_input,
    masked_reconstruction_loss,
    mse_loss,
    next_observation_and_reward_loss,
    next_observation_loss,
)
from ssmrl.adaptation.optim import clip_by_global_norm, learning_rates, scale_by_learning_rates
from ssmrl.adaptation.recompute import mixed_mode_grad_and_value, recomputed
from ssmrl.adaptation.resets import Observed, ResetPolicy, reset_at_episode_end, reset_every, reset_on_rise
from ssmrl.adaptation.select import select, split
from ssmrl.adaptation.stream import Counts, Outcome, Report, Reset
from ssmrl.adaptation.streams import StreamAdapter
from ssmrl.adaptation.test_time_adaptation import AdaptationConfig, Adapter, Update
from ssmrl.adaptation.window import Window

__all__ = [
    "AdaptationConfig",
    "Adapted",
    "Adapter",
    "Counts",
    "Guard",
    "Observed",
    "Outcome",
    "Report",
    "Reset",
    "ResetPolicy",
    "StreamAdapter",
    "Update",
    "Window",
    "adapt",
    "adapt_implicitly",
    "clip_by_global_norm",
    "conjugate_gradient",
    "distance",
    "entropy_loss",
    "fisher_information",
    "learning_rates",
    "mask_input",
    "masked_reconstruction_loss",
    "mixed_mode_grad_and_value",
    "mse_loss",
    "neumann_series",
    "next_observation_and_reward_loss",
    "next_observation_loss",
    "pull_to_anchor",
    "recomputed",
    "reset_at_episode_end",
    "reset_every",
    "reset_on_rise",
    "scale_by_learning_rates",
    "select",
    "split",
    "trust_region",
]
