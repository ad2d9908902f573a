"""StateSpaceModel: an MLP recurrence with a linear input path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ssmrl.core.base import StateModel, check_batch_size, check_dimensions, check_input, check_reset, check_state_tensor
from ssmrl.core.perceptron import perceptron
from ssmrl.core.scan import mlp_recurrence

__all__ = ["StateSpaceModel"]


class StateSpaceModel(StateModel):
    """A neural state model: h_t = MLP(h_{t-1}) + Linear(x_t), y_t = MLP(h_t) + Linear(x_t).

    Each MLP is Linear-ReLU-Linear of width `hidden_dim`; h_0 = 0. A sequence costs O(T·S·H), like a GRU: this is
    not a structured state space model. A sequence runs through `ssmrl.core.scan`, so that meta-gradients pay the
    step-by-step price only for the products that depend on the step before.

    Args:
        state_dim: S, width of the state.
        input_dim: D, features of x_t.
        output_dim: O, features of y_t.
        hidden_dim: H, width of both MLPs.
        device, dtype: of the weights; None: `torch.get_default_dtype()`.

    Raises:
        ValueError: a size that is not a positive integer.
    """

    def __init__(
        self,
        state_dim: int,
        input_dim: int,
        output_dim: int,
        hidden_dim: int = 128,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dimensions(state_dim=state_dim, input_dim=input_dim, output_dim=output_dim, hidden_dim=hidden_dim)
        super().__init__()
        self.state_dim = state_dim
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.hidden_dim = hidden_dim
        self.state_mlp = _MLP(state_dim, hidden_dim, state_dim, device, dtype)
        self.state_input = nn.Linear(input_dim, state_dim, device=device, dtype=dtype)
        self.output_mlp = _MLP(state_dim, hidden_dim, output_dim, device, dtype)
        self.output_input = nn.Linear(input_dim, output_dim, device=device, dtype=dtype)

    @property
    def constructor_arguments(self) -> dict[str, Any]:
        return {
            "state_dim": self.state_dim,
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
            "hidden_dim": self.hidden_dim,
        }

    def init_hidden(self, batch_size: int = 1) -> Tensor:
        """The zero state, (B, S)."""
        check_batch_size(batch_size)
        weight = self.state_input.weight
        return torch.zeros(batch_size, self.state_dim, dtype=weight.dtype, device=weight.device)

    def forward(
        self, x: Tensor, hidden_state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step (B, D) -> (B, O) or one sequence (B, T, D) -> (B, T, O), and the next state (B, S)."""
        check_input(x, self.input_dim, self.state_input.weight)
        batch_size = x.shape[0]
        if hidden_state is None:
            hidden_state = self.init_hidden(batch_size)
        check_state_tensor("hidden_state", hidden_state, (batch_size, self.state_dim), self.state_input.weight)
        if reset is not None:
            check_reset(reset, x)
        if x.dim() == 2:
            return self._step(x, hidden_state, reset)
        return self._sequence(x, hidden_state, reset)

    def _step(self, x: Tensor, h: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        if reset is not None:
            h = torch.where(reset[:, None], 0.0, h)
        h = self.state_mlp(h) + self.state_input(x)
        return self.output_mlp(h) + self.output_input(x), h

    def _sequence(self, x: Tensor, h_0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        batch_size, num_steps, _ = x.shape
        mlp = self.state_mlp
        x = x.transpose(0, 1).reshape(num_steps * batch_size, self.input_dim)
        drive = linear(x, self.state_input.weight, self.state_input.bias + mlp.out.bias)
        c = torch.cat([h_0, drive]).view(num_steps + 1, batch_size, self.state_dim)
        keep = None if reset is None else ~reset.T[:, :, None]
        h = mlp_recurrence(c, mlp.hidden.weight.T, mlp.hidden.bias, mlp.out.weight.T, keep)
        mlp = self.output_mlp
        h_flat = h[1:].reshape(1, num_steps * batch_size, self.state_dim)
        f = linear(x, self.output_input.weight, self.output_input.bias + mlp.out.bias)
        y = perceptron(h_flat, f[None], mlp.hidden.weight.T, mlp.hidden.bias, mlp.out.weight.T)
        return y.view(num_steps, batch_size, self.output_dim).transpose(0, 1), h[-1]


class _MLP(nn.Module):
    """Linear-ReLU-Linear."""

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, device: torch.device | str, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_dim, hidden_dim, device=device, dtype=dtype)
        self.out = nn.Linear(hidden_dim, output_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.hidden(x).relu())
        return y
