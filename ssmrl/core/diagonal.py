"""DiagonalSSM: stacked linear state spaces with a complex diagonal transition.

Letters: B sequences, T steps, D inputs, O outputs, S complex states of a layer, H hidden width, L layers.
A complex number is a pair of real ones on an axis of size 2, so that weights and states have a real dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from ssmrl.core.base import StateModel, check_batch_size, check_dimensions, check_input, check_reset, check_state_tensor
from ssmrl.core.diagonal_scan import diagonal_recurrence
from ssmrl.core.norm import LayerNorm

__all__ = ["DiagonalSSM"]

_DT_MIN, _DT_MAX = 0.001, 0.1


class DiagonalSSM(StateModel):
    """A stack of diagonal state space layers of the S4D / S5 line.

    v_t = Linear(x_t); for each of L layers, with u_t = LayerNorm(v_t) and S complex states h,

        h_t = λ̄ ∘ h_{t-1} + B̄ u_t,        λ̄ = exp(λΔ),  B̄ = ((λ̄ - 1) / λ) ∘ B    (zero-order hold)
        g_t = gelu(2 Re(C h_t) + D ∘ u_t)
        v_t <- v_t + g_t ∘ sigmoid(Linear(g_t));

    y_t = Linear(v_t), h_0 = 0. The recurrence is linear and elementwise, O(T·S) work (`diagonal_recurrence`); only the
    matrix products around it, for all T at once, cost more. Each h stands for itself and its conjugate, hence the
    2 Re. Re λ = -exp(·) < 0, so a layer never grows without bound.

    At the start λ_n = -1/2 + iπn, n = 0..S-1 (S4D-Lin), and Δ is log-uniform in [0.001, 0.1], one for each state:
    Gu, Gupta, Goel, Ré 2022, "On the Parameterization and Initialization of Diagonal State Space Models",
    https://arxiv.org/abs/2206.11893. The layer, with one state vector shared by all features and the gate, is that
    of Smith, Warrington, Linderman 2023, "Simplified State Space Layers for Sequence Modeling" (S5),
    https://arxiv.org/abs/2208.04933; other than there λ starts from S4D-Lin and not from HiPPO-N, and LayerNorm
    comes first. B and C start complex normal of variance 1/H and 1/S, D normal.

    In bfloat16 λ̄ is rounded to 3 digits, which forgets the slow states: keep this model in float32 or float64.

    Args:
        state_dim: S, complex states of each layer: 2 S real numbers, for 2 S states with the conjugates.
        input_dim: D, features of x_t.
        output_dim: O, features of y_t.
        hidden_dim: H, features between the layers.
        device, dtype: of the weights; None: `torch.get_default_dtype()`.
        num_layers: L.

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
        num_layers: int = 2,
    ) -> None:
        check_dimensions(state_dim=state_dim, input_dim=input_dim, output_dim=output_dim, hidden_dim=hidden_dim)
        check_dimensions(num_layers=num_layers)
        super().__init__()
        self.state_dim = state_dim
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.input = nn.Linear(input_dim, hidden_dim, device=device, dtype=dtype)
        self.layers = nn.ModuleList(_Layer(state_dim, hidden_dim, device, dtype) for _ in range(num_layers))
        self.output = nn.Linear(hidden_dim, output_dim, device=device, dtype=dtype)

    @property
    def constructor_arguments(self) -> dict[str, Any]:
        return {
            "state_dim": self.state_dim,
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
            "hidden_dim": self.hidden_dim,
            "num_layers": self.num_layers,
        }

    def init_hidden(self, batch_size: int = 1) -> Tensor:
        """The zero state, (B, L, 2, S): real and imaginary parts on the axis of size 2."""
        check_batch_size(batch_size)
        weight = self.input.weight
        return torch.zeros(self._state_shape(batch_size), dtype=weight.dtype, device=weight.device)

    def forward(
        self, x: Tensor, hidden_state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step (B, D) -> (B, O) or one sequence (B, T, D) -> (B, T, O), and the next state (B, L, 2, S)."""
        check_input(x, self.input_dim, self.input.weight)
        batch_size = x.shape[0]
        if hidden_state is None:
            hidden_state = self.init_hidden(batch_size)
        check_state_tensor("hidden_state", hidden_state, self._state_shape(batch_size), self.input.weight)
        if reset is not None:
            check_reset(reset, x)
        is_step = x.dim() == 2
        v = self.input(x)[None] if is_step else self.input(x.transpose(0, 1))
        keep = None if reset is None else ~(reset[None] if is_step else reset.T)
        states = []
        for layer, before, *discrete in zip(self.layers, hidden_state.unbind(1), *self._discretise(), strict=True):
            v, h = layer(v, before, keep, *discrete)
            states.append(h)
        y = self.output(v)
        return y[0] if is_step else y.transpose(0, 1), torch.stack(states, 1)

    def _discretise(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """λ̄ (2, S) and B̄ (2, S, H) of every layer; all at once, which is fewer operations."""
        names = ("log_minus_re_lambda", "im_lambda", "log_dt", "b")
        of_all = (torch.stack([getattr(layer, name) for layer in self.layers]) for name in names)
        lambda_bar, b_bar = _zero_order_hold(*of_all)
        return lambda_bar.unbind(), b_bar.unbind()

    def _state_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        return batch_size, self.num_layers, 2, self.state_dim


class _Layer(nn.Module):
    """LayerNorm, diagonal state space with a skip, gate, residual."""

    def __init__(self, state_dim: int, hidden_dim: int, device: torch.device | str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.norm = LayerNorm(hidden_dim, device=device, dtype=dtype)
        self.log_minus_re_lambda = nn.Parameter(torch.full((state_dim,), math.log(0.5), device=device, dtype=dtype))
        steps = torch.arange(state_dim, dtype=torch.float64)
        self.im_lambda = nn.Parameter((math.pi * steps).to(device, dtype or torch.get_default_dtype()))
        self.log_dt = nn.Parameter(
            torch.empty(state_dim, device=device, dtype=dtype).uniform_(math.log(_DT_MIN), math.log(_DT_MAX))
        )
        self.b = nn.Parameter(
            torch.empty(2, state_dim, hidden_dim, device=device, dtype=dtype).normal_(0, (2 * hidden_dim) ** -0.5)
        )
        self.c = nn.Parameter(
            torch.empty(hidden_dim, 2, state_dim, device=device, dtype=dtype).normal_(0, (2 * state_dim) ** -0.5)
        )
        self.d = nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype).normal_())
        self.gate = nn.Linear(hidden_dim, hidden_dim, device=device, dtype=dtype)

    def forward(
        self, v: Tensor, h_0: Tensor, keep: Tensor | None, lambda_bar: Tensor, b_bar: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(T, B, H), the state before (B, 2, S) and Bool (T, B) -> (T, B, H) and the state after (B, 2, S)."""
        num_steps, batch_size, _ = v.shape
        _, state_dim, hidden_dim = b_bar.shape
        u = self.norm(v)
        drive = linear(u, b_bar.reshape(2 * state_dim, hidden_dim)).view(num_steps, batch_size, 2, state_dim)
        h = diagonal_recurrence(lambda_bar, torch.cat([h_0[None], drive]), keep)
        # 2 Re(C h) = 2 (Re C Re h - Im C Im h)
        c_re, c_im = self.c.unbind(1)
        readout = torch.stack([2 * c_re, -2 * c_im], 1).reshape(hidden_dim, 2 * state_dim)
        g = gelu(linear(h[1:].reshape(num_steps, batch_size, 2 * state_dim), readout) + self.d * u)
        return v + g * self.gate(g).sigmoid(), h[-1]


def _zero_order_hold(log_minus_re: Tensor, im: Tensor, log_dt: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """λ̄ (..., 2, S) and B̄ (..., 2, S, H), of log(-Re λ), Im λ and log Δ (..., S) and B (..., 2, S, H)."""
    re, dt = -log_minus_re.exp(), log_dt.exp()
    x, y = re * dt, im * dt
    bar_re, bar_im = x.exp() * y.cos(), x.exp() * y.sin()
    # λ̄ - 1 without cancellation where λΔ is small: Re = expm1(x) cos y - 2 sin²(y/2).
    minus_one_re = x.expm1() * y.cos() - 2 * (y / 2).sin().square()
    # (λ̄ - 1) / λ, by which every row of B is multiplied.
    square = re.square() + im.square()
    by_re = ((minus_one_re * re + bar_im * im) / square).unsqueeze(-1)
    by_im = ((bar_im * re - minus_one_re * im) / square).unsqueeze(-1)
    b_re, b_im = b.unbind(-3)
    b_bar = torch.stack([by_re * b_re - by_im * b_im, by_re * b_im + by_im * b_re], -3)
    return torch.stack([bar_re, bar_im], -2), b_bar
