"""Task distributions, one family per file."""

from ssmrl.env_runner.tasks.classic import NOMINAL_PHYSICS, make_with_physics, sample_physics

__all__ = ["NOMINAL_PHYSICS", "make_with_physics", "sample_physics"]
