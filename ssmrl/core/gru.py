"""GRU: gated recurrent unit, in PyTorch's parameterisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ssmrl.core.base import StateModel, check_batch_size, check_dimensions, check_input, check_reset, check_state_tensor
from ssmrl.core.gated_scan import RecurrentWeights, define_cell

__all__ = ["GRU"]


class GRU(StateModel):
    """A gated recurrent unit with a linear readout, y_t = Linear(h_t):

        r = σ(W_ir x + b_ir + W_hr h + b_hr),   z = σ(W_iz x + b_iz + W_hz h + b_hz),
        n = tanh(W_in x + b_in + r ∘ (W_hn h + b_hn)),   h' = (1 - z) ∘ n + z ∘ h.

    Cho et al. 2014, https://arxiv.org/abs/1406.1078, in the variant and parameterisation of `torch.nn.GRU` (two biases,
    gates in the order r, z, n): `model.rnn.load_state_dict(nn.GRU(input_dim, state_dim).state_dict())` gives equal
    states. Unlike `nn.GRU` it runs under `vmap` and has derivatives of every order.

    Args:
        state_dim: S, width of the state.
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
        self.rnn = RecurrentWeights(input_dim, state_dim, num_gates=3, device=device, dtype=dtype)
        self.readout = nn.Linear(state_dim, output_dim, device=device, dtype=dtype)

    @property
    def constructor_arguments(self) -> dict[str, Any]:
        return {"state_dim": self.state_dim, "input_dim": self.input_dim, "output_dim": self.output_dim}

    def init_hidden(self, batch_size: int = 1) -> Tensor:
        """The zero state, (B, S)."""
        check_batch_size(batch_size)
        weight = self.readout.weight
        return torch.zeros(batch_size, self.state_dim, dtype=weight.dtype, device=weight.device)

    def forward(
        self, x: Tensor, hidden_state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step (B, D) -> (B, O) or one sequence (B, T, D) -> (B, T, O), and the next state (B, S)."""
        check_input(x, self.input_dim, self.readout.weight)
        batch_size = x.shape[0]
        if hidden_state is None:
            hidden_state = self.init_hidden(batch_size)
        check_state_tensor("hidden_state", hidden_state, (batch_size, self.state_dim), self.readout.weight)
        if reset is not None:
            check_reset(reset, x)
        h = self.rnn.run(_CELL, x, hidden_state, reset)
        y = linear(h[1:].reshape(-1, self.state_dim), self.readout.weight, self.readout.bias)
        return self.rnn.like_input(y, x), h[-1]


class _GRUCell:
    """v = h; product and input blocks r, z, n."""

    name = "gru"
    blocks = (1, 3, 3)

    def step(self, v: Tensor, u: Tensor, x: Tensor) -> Tensor:
        width = v.shape[-1]
        gates = (u[..., : 2 * width] + x[..., : 2 * width]).sigmoid()
        r, z = gates[..., :width], gates[..., width:]
        n = torch.addcmul(x[..., 2 * width :], r, u[..., 2 * width :]).tanh()
        return torch.lerp(n, v, z)

    def linearise(self, v: Tensor, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u_r, u_z, u_n = u.chunk(3, -1)
        x_r, x_z, x_n = x.chunk(3, -1)
        r, z = (u_r + x_r).sigmoid(), (u_z + x_z).sigmoid()
        n = (x_n + r * u_n).tanh()
        by_n = (1 - z) * (1 - n * n)
        by_r = by_n * u_n * r * (1 - r)
        by_z = (v - n) * z * (1 - z)
        return z, torch.cat([by_r, by_z, by_n * r], -1), torch.cat([by_r, by_z, by_n], -1)


_CELL = _GRUCell()
define_cell(_CELL)
