"""MLP: a network without memory, in the contract of models that have one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmrl.core.base import StateModel, check_batch_size, check_dimensions, check_input, check_reset

__all__ = ["MLP", "MLPState"]


class MLPState(NamedTuple):
    """The state of a model that has none: no tensors, for every batch."""


class MLP(StateModel):
    """A feed-forward network: y_t = W_3 relu(W_2 relu(W_1 x_t + b_1) + b_2) + b_3.

    It sees one step at a time and remembers nothing, so it is the baseline that tells what memory is worth. Its
    state is empty, and there is nothing for `reset` to forget; both are checked like those of every other model.
    Two hidden layers of ReLU are the policy and regression networks of Finn et al. 2017,
    https://arxiv.org/abs/1703.03400; the width is not theirs.

    Args:
        input_dim: D, features of x_t.
        output_dim: O, features of y_t.
        hidden_dim: H, width of both hidden layers.
        device, dtype: of the weights; None: `torch.get_default_dtype()`.

    Raises:
        ValueError: a size that is not a positive integer.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dim: int = 128,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dimensions(input_dim=input_dim, output_dim=output_dim, hidden_dim=hidden_dim)
        super().__init__()
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.hidden_dim = hidden_dim
        self.input = nn.Linear(input_dim, hidden_dim, device=device, dtype=dtype)
        self.hidden = nn.Linear(hidden_dim, hidden_dim, device=device, dtype=dtype)
        self.output = nn.Linear(hidden_dim, output_dim, device=device, dtype=dtype)

    @property
    def constructor_arguments(self) -> dict[str, Any]:
        return {"input_dim": self.input_dim, "output_dim": self.output_dim, "hidden_dim": self.hidden_dim}

    def init_hidden(self, batch_size: int = 1) -> MLPState:
        """The empty state, whatever the batch."""
        check_batch_size(batch_size)
        return MLPState()

    def forward(
        self, x: Tensor, hidden_state: MLPState | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, MLPState]:
        """One step (B, D) -> (B, O) or one sequence (B, T, D) -> (B, T, O), and the empty state.

        Raises:
            TypeError: a `hidden_state` that is not empty.
            ValueError: a shape, dtype or device that does not fit.
        """
        check_input(x, self.input_dim, self.input.weight)
        if hidden_state is not None and not (isinstance(hidden_state, tuple) and len(hidden_state) == 0):
            raise TypeError(f"hidden_state must be the empty MLPState() or None; got {type(hidden_state).__name__}.")
        if reset is not None:
            check_reset(reset, x)
        return self.output(self.hidden(self.input(x).relu()).relu()), MLPState()
