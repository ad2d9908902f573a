"""LSTM: long short-term memory, in PyTorch's parameterisation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ssmrl.core.base import StateModel, check_batch_size, check_dimensions, check_input, check_reset, check_state_tensor
from ssmrl.core.gated_scan import RecurrentWeights, define_cell

__all__ = ["LSTM", "LSTMState"]


class LSTMState(NamedTuple):
    """State of an `LSTM`."""

    h: Tensor
    """(B, S) the output of the cell."""
    c: Tensor
    """(B, S) the memory of the cell."""


class LSTM(StateModel):
    """Long short-term memory with a linear readout, y_t = Linear(h_t):

        i, f, o = σ(W_i· x + b_i· + W_h· h + b_h·),   g = tanh(W_ig x + b_ig + W_hg h + b_hg),
        c' = f ∘ c + i ∘ g,   h' = o ∘ tanh(c').

    Hochreiter and Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735, with forget gates, in the
    parameterisation of `torch.nn.LSTM` (two biases, gates in the order i, f, g, o):
    `model.rnn.load_state_dict(nn.LSTM(input_dim, state_dim).state_dict())` gives equal states. Unlike `nn.LSTM` it runs
    under `vmap` and has derivatives of every order.

    Args:
        state_dim: S, width of h and of c.
        input_dim: D, features of x_t.
        output_dim: O, features of y_t.
        device, dtype: of the weights; None: `torch.get_default_dtype()`.

    Raises:
        ValueError: a size that is not a positive integer.
    """

    def __init__(
        self,
        state_dim: int,
        input_dim: int,
        output_dim: int,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_dimensions(state_dim=state_dim, input_dim=input_dim, output_dim=output_dim)
        super().__init__()
        self.state_dim = state_dim
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.rnn = RecurrentWeights(input_dim, state_dim, num_gates=4, device=device, dtype=dtype)
        self.readout = nn.Linear(state_dim, output_dim, device=device, dtype=dtype)

    @property
    def constructor_arguments(self) -> dict[str, Any]:
        return {"state_dim": self.state_dim, "input_dim": self.input_dim, "output_dim": self.output_dim}

    def init_hidden(self, batch_size: int = 1) -> LSTMState:
        """The zero state."""
        check_batch_size(batch_size)
        weight = self.readout.weight
        zeros = torch.zeros(batch_size, self.state_dim, dtype=weight.dtype, device=weight.device)
        return LSTMState(zeros, zeros)

    def forward(
        self, x: Tensor, hidden_state: LSTMState | tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, LSTMState]:
        """One step (B, D) -> (B, O) or one sequence (B, T, D) -> (B, T, O), and the next state."""
        check_input(x, self.input_dim, self.readout.weight)
        batch_size = x.shape[0]
        state = self.init_hidden(batch_size) if hidden_state is None else hidden_state
        if not isinstance(state, tuple) or len(state) != 2:
            raise TypeError(f"hidden_state must be a tuple (h, c) of tensors; got {type(state).__name__}.")
        for name, tensor in zip(LSTMState._fields, state, strict=True):
            check_state_tensor(f"hidden_state.{name}", tensor, (batch_size, self.state_dim), self.readout.weight)
        if reset is not None:
            check_reset(reset, x)
        v = self.rnn.run(_CELL, x, torch.cat(state, -1), reset)
        h = v[1:, :, : self.state_dim]
        y = linear(h.reshape(-1, self.state_dim), self.readout.weight, self.readout.bias)
        return self.rnn.like_input(y, x), LSTMState(*v[-1].chunk(2, -1))


class _LSTMCell:
    """v = (h, c); product and input blocks i, f, g, o."""

    name = "lstm"
    blocks = (2, 4, 4)

    def step(self, v: Tensor, u: Tensor, x: Tensor) -> Tensor:
        width = v.shape[-1] // 2
        a = u + x
        gates = a.sigmoid()
        i, f, o = gates[..., :width], gates[..., width : 2 * width], gates[..., 3 * width :]
        c = torch.addcmul(f * v[..., width:], i, a[..., 2 * width : 3 * width].tanh())
        return torch.cat([o * c.tanh(), c], -1)

    def linearise(self, v: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a_i, a_f, a_g, a_o = (u + x).chunk(4, -1)
        i, f, g, o = a_i.sigmoid(), a_f.sigmoid(), a_g.tanh(), a_o.sigmoid()
        c = v[..., v.shape[-1] // 2 :]
        tanh_c = (f * c + i * g).tanh()
        h_by_c = o * (1 - tanh_c * tanh_c)
        c_by = torch.cat([g * i * (1 - i), c * f * (1 - f), i * (1 - g * g)], -1)
        h_by_o = tanh_c * o * (1 - o)
        none = torch.zeros_like(f)
        by_a = torch.cat([h_by_c.repeat(*[1] * (f.dim() - 1), 3) * c_by, h_by_o, c_by, none], -1)
        return torch.cat([none, h_by_c * f, none, f], -1), by_a, by_a


_CELL = _LSTMCell()
define_cell(_CELL)
