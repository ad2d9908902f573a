"""Gymnasium environments: batched, seeded, rolled out and cut into support and query windows."""

from ssmrl.env_runner.environment import Environment, Maker, derive_seed
from ssmrl.env_runner.rollout import (
    Policy,
    RolloutCarry,
    Trajectory,
    action_features,
    random_policy,
    rollout,
)
from ssmrl.env_runner.tasks import NOMINAL_PHYSICS, make_with_physics, sample_physics
from ssmrl.env_runner.windows import Windows, cut_windows, split_support_query

__all__ = [
    "NOMINAL_PHYSICS",
    "Environment",
    "Maker",
    "Policy",
    "RolloutCarry",
    "Trajectory",
    "Windows",
    "action_features",
    "cut_windows",
    "derive_seed",
    "make_with_physics",
    "random_policy",
    "rollout",
    "sample_physics",
    "split_support_query",
]
