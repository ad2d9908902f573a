"""Sequence models with an explicit state, and nothing else."""

from ssmrl.core.base import StateModel, functional_forward
from ssmrl.core.context import WithContext
from ssmrl.core.diagonal import DiagonalSSM
from ssmrl.core.diagonal_scan import diagonal_recurrence
from ssmrl.core.gains import WithInputGains
from ssmrl.core.gru import GRU
from ssmrl.core.lstm import LSTM, LSTMState
from ssmrl.core.mlp import MLP, MLPState
from ssmrl.core.norm import LayerNorm
from ssmrl.core.scan import linear_recurrence, mlp_recurrence
from ssmrl.core.ssm import StateSpaceModel
from ssmrl.core.transformer import Transformer, TransformerState

__all__ = [
    "GRU",
    "LSTM",
    "MLP",
    "DiagonalSSM",
    "LSTMState",
    "LayerNorm",
    "MLPState",
    "StateModel",
    "StateSpaceModel",
    "Transformer",
    "TransformerState",
    "WithContext",
    "WithInputGains",
    "diagonal_recurrence",
    "functional_forward",
    "linear_recurrence",
    "mlp_recurrence",
]
