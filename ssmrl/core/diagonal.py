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
from ssmrl.core.norm import LayerNorm

__all__ = ["DiagonalSSM", "diagonal_recurrence"]

_DT_MIN, _DT_MAX = 0.001, 0.1


class DiagonalSSM(StateModel):
    """A stack of diagonal state space layers of the S4D / S5 line.

    v_t = Linear(x_t); for each of L layers, with u_t = LayerNorm(v_t) and S complex states h,

        h_t = λ̄ ∘ h_{t-1} + B̄ u_t,        λ̄ = exp(λΔ),  B̄ = ((λ̄ - 1) / λ) ∘ B    (zero-order hold)
        g_t = gelu(2 Re(C h_t) + D ∘ u_t)
        v_t <- v_t + g_t ∘ sigmoid(Linear(g_t));

    y_t = Linear(v_t), h_0 = 0. The recurrence is linear and elementwise, O(T·S) work in O(log T) parallel
    operations (`diagonal_recurrence`); only the matrix products around it, for all T at once, cost more. Each h
    stands for itself and its conjugate, hence the 2 Re. Re λ = -exp(·) < 0, so a layer never grows without bound.

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
        for index, layer in enumerate(self.layers):
            v, h = layer(v, hidden_state[:, index], keep)
            states.append(h)
        y = self.output(v)
        return y[0] if is_step else y.transpose(0, 1), torch.stack(states, 1)

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

    def forward(self, v: Tensor, h_0: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """(T, B, H), the state before (B, 2, S) and Bool (T, B) -> (T, B, H) and the state after (B, 2, S)."""
        num_steps, batch_size, _ = v.shape
        _, state_dim, hidden_dim = self.b.shape
        u = self.norm(v)
        lambda_bar, b_bar = self._discretise()
        drive = linear(u, b_bar.reshape(2 * state_dim, hidden_dim)).view(num_steps, batch_size, 2, state_dim)
        h = diagonal_recurrence(lambda_bar, torch.cat([h_0[None], drive]), keep)
        # 2 Re(C h) = 2 (Re C Re h - Im C Im h)
        readout = 2 * torch.stack([self.c[:, 0], -self.c[:, 1]], 1).reshape(hidden_dim, 2 * state_dim)
        g = gelu(linear(h[1:].reshape(num_steps, batch_size, 2 * state_dim), readout) + self.d * u)
        return v + g * self.gate(g).sigmoid(), h[-1]

    def _discretise(self) -> tuple[Tensor, Tensor]:
        """λ̄ (2, S) and B̄ (2, S, H), by zero-order hold."""
        re, im = -self.log_minus_re_lambda.exp(), self.im_lambda
        dt = self.log_dt.exp()
        x, y = re * dt, im * dt
        lambda_bar = torch.stack([x.exp() * y.cos(), x.exp() * y.sin()])
        # λ̄ - 1 without cancellation where λΔ is small: Re = expm1(x) cos y - 2 sin²(y/2).
        minus_one = torch.stack([x.expm1() * y.cos() - 2 * (y / 2).sin().square(), lambda_bar[1]])
        inverse = torch.stack([re, -im]) / (re.square() + im.square())
        scale = _multiply(inverse, minus_one)[:, :, None]
        return lambda_bar, torch.stack(
            [scale[0] * self.b[0] - scale[1] * self.b[1], scale[0] * self.b[1] + scale[1] * self.b[0]]
        )


def diagonal_recurrence(a: Tensor, f: Tensor, keep: Tensor | None = None) -> Tensor:
    """Solve h_0 = f_0, h_t = a ∘ (k_t h_{t-1}) + f_t for t = 1..T, with complex numbers as real pairs.

    Two steps of the recurrence are one step of another, with a² for a and a f_{2i} + f_{2i+1} for f: that one, half
    as long, gives every second h, and one more product gives the others. So O(T) work in 2 log2 T rounds, of
    products and sums only, differentiable to every order (Blelloch 1990, "Prefix Sums and Their Applications",
    https://www.cs.cmu.edu/~guyb/papers/Ble93.pdf).

    Args:
        a: (2, S) real and imaginary parts.
        f: (T+1, B, 2, S) the initial state f_0 and the input of every step.
        keep: Bool (T, B). Where it is False k_t = 0: step t starts from the zero state, whatever h_{t-1} was,
            NaN included.

    Returns:
        h: (T+1, B, 2, S).
    """
    if keep is not None:
        keep = torch.cat([torch.ones_like(f[:1, :, 0, 0], dtype=torch.bool), keep])[:, :, None, None]
    return _solve(a, f, keep)


def _solve(a: Tensor, f: Tensor, keep: Tensor | None) -> Tensor:
    """As above, with an entry of `keep` for f_0 too, which is not read."""
    if len(f) == 1:
        return f
    even, odd = f[0::2], f[1::2]
    num_pairs = len(odd)
    if keep is None:
        keep_odd = keep_even = keep_pair = None
    else:
        keep_odd, keep_even = keep[1::2], keep[2::2]
        keep_pair = keep[0::2][:num_pairs] & keep_odd
    h_odd = _solve(_multiply(a, a), _advance(a, even[:num_pairs], odd, keep_odd), keep_pair)
    h_even = torch.cat([even[:1], _advance(a, h_odd[: len(even) - 1], even[1:], keep_even)])
    pairs = torch.stack([h_even[:num_pairs], h_odd], 1).reshape(2 * num_pairs, *f.shape[1:])
    return pairs if len(even) == num_pairs else torch.cat([pairs, h_even[num_pairs:]])


def _advance(a: Tensor, h: Tensor, f: Tensor, keep: Tensor | None) -> Tensor:
    """One step, a ∘ (k h) + f."""
    return _multiply(a, h if keep is None else torch.where(keep, h, 0.0)) + f


def _multiply(a: Tensor, h: Tensor) -> Tensor:
    """The complex product of (2, S) and (..., 2, S)."""
    return a[0] * h + torch.stack([-a[1], a[1]]) * h.flip(-2)
