"""Transformer: causal attention over a window, with the key-value cache as an explicit state.

Letters: B sequences, T steps, D inputs, O outputs, M model width, H feed-forward width, L layers, W window.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmrl.core.base import StateModel, check_batch_size, check_dimensions, check_input, check_reset, check_state_tensor
from ssmrl.core.norm import LayerNorm

__all__ = ["Transformer", "TransformerState"]


class TransformerState(NamedTuple):
    """What the last W steps of an episode left behind, oldest first; zero where the episode is younger than that."""

    keys: Tensor
    """(B, L, W, M)."""
    values: Tensor
    """(B, L, W, M)."""
    position: Tensor
    """(B,) int64: steps since the episode's start. The cached step of age a = 1..W is valid where a <= position."""


class Transformer(StateModel):
    """A causal pre-norm Transformer encoder whose steps attend to themselves and to the W steps before them.

    With p_t the number of steps since the episode's start, and for each of L layers

        z_t = Linear(x_t) + PE(p_t),    PE(p)_{2i} = sin(p / 10000^{2i/M}),  PE(p)_{2i+1} = cos(p / 10000^{2i/M})
        q_t, k_t, v_t = Linear(LayerNorm(z_t)),  s = max(t - W, t - p_t)..t,  and for each head
        z_t <- z_t + Linear(Σ_s softmax_s(q_t·k_s / √(M/heads)) v_s)
        z_t <- z_t + Linear(relu(Linear(LayerNorm(z_t))))
        y_t = Linear(z_t).

    Positions are absolute in the episode: the state carries them, and a reset sets them to 0. The receptive field is
    L·W + 1 steps. A step costs O(W) whatever its position; a sequence is computed at once, in O(T (T + W)).
    Attention is written out, since the fused kernels have no second derivative. A step always attends to itself, so
    that no softmax is empty.

    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, sections 3.2, 3.3 and 3.5; LayerNorm in front of each
    block as in Xiong et al. 2020, https://arxiv.org/abs/2002.04745, figure 1b. Other than there: no dropout, no norm
    after the last layer, and no scaling of the input projection.

    Args:
        model_dim: M, width of the model, even and divisible by `num_heads`.
        input_dim: D, features of x_t.
        output_dim: O, features of y_t.
        hidden_dim: H, width of the feed-forward blocks.
        device, dtype: of the weights; None: `torch.get_default_dtype()`.
        num_layers: L.
        num_heads: heads that the attention is split into.
        window: W, how many earlier steps a step attends to, and the length of the cache.

    Raises:
        ValueError: a size that is not a positive integer, or a `model_dim` that is odd or not a multiple of
            `num_heads`.
    """

    def __init__(
        self,
        model_dim: int,
        input_dim: int,
        output_dim: int,
        hidden_dim: int = 512,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype | None = None,
        num_layers: int = 2,
        num_heads: int = 4,
        window: int = 64,
    ) -> None:
        check_dimensions(model_dim=model_dim, input_dim=input_dim, output_dim=output_dim, hidden_dim=hidden_dim)
        check_dimensions(num_layers=num_layers, num_heads=num_heads, window=window)
        if model_dim % 2 or model_dim % num_heads:
            raise ValueError(
                f"model_dim must be even, for sines and cosines, and a multiple of num_heads = {num_heads}; "
                f"got {model_dim}."
            )
        super().__init__()
        self.model_dim = model_dim
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.hidden_dim = hidden_dim
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.window = window
        self.input = nn.Linear(input_dim, model_dim, device=device, dtype=dtype)
        self.layers = nn.ModuleList(_Layer(model_dim, hidden_dim, num_heads, device, dtype) for _ in range(num_layers))
        self.output = nn.Linear(model_dim, output_dim, device=device, dtype=dtype)

    @property
    def constructor_arguments(self) -> dict[str, Any]:
        return {
            "model_dim": self.model_dim,
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
            "hidden_dim": self.hidden_dim,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "window": self.window,
        }

    def init_hidden(self, batch_size: int = 1) -> TransformerState:
        """An empty cache at position 0: keys and values (B, L, W, M) of zeros, position (B,) of zeros."""
        check_batch_size(batch_size)
        weight = self.input.weight
        keys = torch.zeros(self._cache_shape(batch_size), dtype=weight.dtype, device=weight.device)
        position = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return TransformerState(keys, torch.zeros_like(keys), position)

    def forward(
        self, x: Tensor, hidden_state: TransformerState | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, TransformerState]:
        """One step (B, D) -> (B, O) or one sequence (B, T, D) -> (B, T, O), and the next state.

        Raises:
            TypeError: a `hidden_state` that is not a `TransformerState`.
            ValueError: a shape, dtype or device that does not fit.
        """
        check_input(x, self.input_dim, self.input.weight)
        if hidden_state is None:
            hidden_state = self.init_hidden(x.shape[0])
        self._check_state(hidden_state, x.shape[0])
        if reset is not None:
            check_reset(reset, x)
        if x.dim() == 3:
            return self._sequence(x, hidden_state, reset)
        y, hidden_state = self._sequence(x[:, None], hidden_state, None if reset is None else reset[:, None])
        return y[:, 0], hidden_state

    def _sequence(self, x: Tensor, state: TransformerState, reset: Tensor | None) -> tuple[Tensor, TransformerState]:
        batch_size, num_steps, _ = x.shape
        # Time runs from -W (the oldest in the cache) over 0 (the first input) to T - 1.
        times = torch.arange(-self.window, num_steps, device=x.device)
        t = times[self.window :]
        # When the episode that step t belongs to began: before 0, or at the last reset.
        start = -state.position[:, None].expand(batch_size, num_steps)
        if reset is not None:
            start = torch.where(reset, t, start).cummax(1).values
        t = t[:, None]
        attended = (times <= t) & (times >= t - self.window) & (times >= start[:, :, None])

        z = self.input(x) + self._position_encoding(t[:, 0] - start)
        keys, values = [], []
        for index, layer in enumerate(self.layers):
            z, k, v = layer(z, state.keys[:, index], state.values[:, index], attended)
            keys.append(k[:, num_steps:])
            values.append(v[:, num_steps:])
        last_start = start[:, -1] if num_steps else -state.position
        # Zero, not only invalid, so that equal histories have equal states.
        valid = (times[num_steps:] >= last_start[:, None])[:, None, :, None]
        return self.output(z), TransformerState(
            torch.where(valid, torch.stack(keys, 1), 0.0),
            torch.where(valid, torch.stack(values, 1), 0.0),
            num_steps - last_start,
        )

    def _position_encoding(self, position: Tensor) -> Tensor:
        """(B, T) -> (B, T, M), sines and cosines interleaved."""
        dtype = self.input.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)  # bfloat16 cannot tell 256 from 257
        even = torch.arange(0, self.model_dim, 2, dtype=wide, device=position.device)
        angles = position[..., None].to(wide) * torch.exp(even * (-math.log(10_000.0) / self.model_dim))
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2).to(dtype)

    def _cache_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        return batch_size, self.num_layers, self.window, self.model_dim

    def _check_state(self, state: Any, batch_size: int) -> None:
        if not isinstance(state, TransformerState):
            raise TypeError(f"hidden_state must be a TransformerState; got {type(state).__name__}.")
        for name in ("keys", "values"):
            shape = self._cache_shape(batch_size)
            check_state_tensor(f"hidden_state.{name}", getattr(state, name), shape, self.input.weight)
        position = state.position
        if not isinstance(position, Tensor) or position.dtype != torch.int64 or position.shape != (batch_size,):
            got = (
                f"{position.dtype} {tuple(position.shape)}" if isinstance(position, Tensor) else type(position).__name__
            )
            raise ValueError(
                f"hidden_state.position must be a tensor of dtype torch.int64 and shape {(batch_size,)}; got {got}."
            )


class _Layer(nn.Module):
    """LayerNorm, attention, residual; LayerNorm, Linear-ReLU-Linear, residual."""

    def __init__(
        self, model_dim: int, hidden_dim: int, num_heads: int, device: torch.device | str, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = LayerNorm(model_dim, device=device, dtype=dtype)
        self.queries_keys_values = nn.Linear(model_dim, 3 * model_dim, device=device, dtype=dtype)
        self.attention_out = nn.Linear(model_dim, model_dim, device=device, dtype=dtype)
        self.feed_forward_norm = LayerNorm(model_dim, device=device, dtype=dtype)
        self.hidden = nn.Linear(model_dim, hidden_dim, device=device, dtype=dtype)
        self.out = nn.Linear(hidden_dim, model_dim, device=device, dtype=dtype)

    def forward(
        self, z: Tensor, cached_keys: Tensor, cached_values: Tensor, attended: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, M), two caches (B, W, M) and a mask (B, T, W + T) -> (B, T, M), keys and values (B, W + T, M)."""
        q, k, v = self.queries_keys_values(self.attention_norm(z)).chunk(3, -1)
        k, v = torch.cat([cached_keys, k], 1), torch.cat([cached_values, v], 1)
        z = z + self.attention_out(self._attention(q, k, v, attended))
        return z + self.out(self.hidden(self.feed_forward_norm(z)).relu()), k, v

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, attended: Tensor) -> Tensor:
        # A weight of 0 times NaN is NaN, in value and derivative. So a key or value that is not finite is taken out
        # here, and makes the *score* NaN: it spoils the steps that attend to it, and no others.
        bad = ~torch.isfinite((k.detach() + v.detach()).sum(-1, keepdim=True))
        k, v = torch.where(bad, 0.0, k), torch.where(bad, 0.0, v)
        q_heads, k_heads, v_heads = self._heads(q), self._heads(k), self._heads(v)
        scores = torch.matmul(q_heads, k_heads.mT) * (1 / math.sqrt(q_heads.shape[-1]))
        scores = scores + torch.where(bad.mT, math.nan, 0.0).to(scores.dtype)[:, None]
        weights = torch.where(attended[:, None], scores, -math.inf).softmax(-1)
        return torch.matmul(weights, v_heads).transpose(1, 2).reshape(q.shape)

    def _heads(self, sequence: Tensor) -> Tensor:
        """(B, T, M) -> (B, heads, T, M / heads)."""
        batch_size, num_steps, model_dim = sequence.shape
        return sequence.view(batch_size, num_steps, self.num_heads, model_dim // self.num_heads).transpose(1, 2)
