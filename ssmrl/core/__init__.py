"""Sequence models with an explicit state, and nothing else."""

from ssmrl.core.base import StateModel, functional_forward
from ssmrl.core.scan import linear_recurrence, mlp_recurrence
from ssmrl.core.ssm import StateSpaceModel

__all__ = [
    "StateModel",
    "StateSpaceModel",
    "functional_forward",
    "linear_recurrence",
    "mlp_recurrence",
]
