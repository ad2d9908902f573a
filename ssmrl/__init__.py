"""Fast adaptation of models that carry a hidden state: meta-learning and test-time adaptation on torch.func."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssmrl.adaptation import AdaptationConfig, Adapted, Adapter, StreamAdapter, adapt, mse_loss
    from ssmrl.core import GRU, LSTM, MLP, DiagonalSSM, StateModel, StateSpaceModel, Transformer
    from ssmrl.env_runner import Environment
    from ssmrl.meta_rl import MetaLearner, MetaMAML, Task

__version__ = "0.1.0"

_HOME = {
    "GRU": "core",
    "LSTM": "core",
    "MLP": "core",
    "AdaptationConfig": "adaptation",
    "Adapted": "adaptation",
    "Adapter": "adaptation",
    "DiagonalSSM": "core",
    "Environment": "env_runner",
    "MetaLearner": "meta_rl",
    "MetaMAML": "meta_rl",
    "StateModel": "core",
    "StateSpaceModel": "core",
    "StreamAdapter": "adaptation",
    "Task": "meta_rl",
    "Transformer": "core",
    "adapt": "adaptation",
    "mse_loss": "adaptation",
}

__all__ = [
    "GRU",
    "LSTM",
    "MLP",
    "AdaptationConfig",
    "Adapted",
    "Adapter",
    "DiagonalSSM",
    "Environment",
    "MetaLearner",
    "MetaMAML",
    "StateModel",
    "StateSpaceModel",
    "StreamAdapter",
    "Task",
    "Transformer",
    "adapt",
    "mse_loss",
]


def __getattr__(name: str) -> object:
    # On first use, so that `import ssmrl` does not pay for Gymnasium, which only env_runner needs.
    if name in _HOME:
        value = getattr(import_module(f"ssmrl.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ssmrl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
