"""Baselines: what a policy gradient subtracts from the return.

Letters: T steps, D inputs, F = 2 D + 4 features; any leading axes, such as the episodes of a task.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssmrl.adaptation.optim import check_positive
from ssmrl.meta_rl.losses import masked_mean
from ssmrl.meta_rl.segments import check_steps, where_valid

__all__ = ["ValueNetwork", "fit_linear_baseline", "linear_baseline", "linear_features", "value_loss"]


def linear_features(observation: Tensor, step: Tensor) -> Tensor:
    """[o, o², s, s², s³, 1] with o the observation clipped to ±10 and s = t / 100, (..., T, F), in float64.

    The features of rllab's `LinearFeatureBaseline` (Duan et al. 2016, "Benchmarking Deep Reinforcement Learning for
    Continuous Control", https://arxiv.org/abs/1604.06778), with which MAML and ProMP were trained.

    Args:
        observation: (..., T, D).
        step: Int64 (..., T) t in its episode: `episode_step`; one more for the observation after the step.

    Raises:
        ValueError: `step` does not have the leading axes of `observation`.
    """
    return torch.cat(_blocks(observation, step), -1)


def fit_linear_baseline(
    observation: Tensor, step: Tensor, returns: Tensor, *, valid: Tensor | None = None, ridge: float = 1e-5
) -> Tensor:
    """The weights (ΦᵀΦ + λ I)⁻¹ Φᵀ G of one task, (F,) in float64; Φ are the `linear_features` of all valid steps.

    `vmap` fits every task of a stack at once. rllab tries ten times the λ where the solution is not finite; here λ is
    never less than F ε tr(ΦᵀΦ), ε the rounding unit of float64, at which the Cholesky factorisation cannot fail.

    Args:
        observation: (..., T, D).
        step: Int64 (..., T) t in its episode.
        returns: (..., T) G_t, what the baseline is to predict.
        valid: Bool (..., T); None: all are.
        ridge: λ > 0.

    Raises:
        TypeError, ValueError: shapes that do not fit, a mask that is not Bool, λ that is not positive.
    """
    check_positive("ridge", ridge)
    check_steps("returns", returns, step=step, valid=valid)
    rows = torch.cat([*_blocks(observation, step), returns.double().unsqueeze(-1)], -1).flatten(0, -2)
    if valid is not None:
        rows = torch.where(valid.flatten().unsqueeze(-1), rows, 0.0)
    products = rows.mT @ rows  # of [Φ, G], so that one pass over the steps gives all
    gram, moment = products[:-1, :-1], products[:-1, -1:]
    diagonal = gram.diagonal()
    floor = len(diagonal) * torch.finfo(gram.dtype).eps * diagonal.sum()
    factor, _ = torch.linalg.cholesky_ex(gram + torch.diag_embed(floor.clamp(min=ridge).expand(len(diagonal))))
    return torch.cholesky_solve(moment, factor).squeeze(-1)


def linear_baseline(weights: Tensor, observation: Tensor, step: Tensor) -> Tensor:
    """v_t = φ(o_t, t)ᵀ w, (..., T), in the dtype of the observation; the default one where that is an integer.

    Args:
        weights: (F,) from `fit_linear_baseline`.
        observation: (..., T, D).
        step: Int64 (..., T) t in its episode; for `next_value` give the next observation, and one more.

    Raises:
        ValueError: shapes that do not fit.
    """
    blocks = _blocks(observation, step)
    sizes = [block.shape[-1] for block in blocks]
    if weights.shape != (sum(sizes),):
        raise ValueError(f"`weights` must have shape (2 D + 4,) = ({sum(sizes)},); got {tuple(weights.shape)}.")
    parts = weights.double().split(sizes)
    value: Tensor = sum(block @ part for block, part in zip(blocks, parts, strict=True))
    return value.to(observation.dtype if observation.is_floating_point() else torch.get_default_dtype())


def _blocks(observation: Tensor, step: Tensor) -> list[Tensor]:
    """The features o, o² and [s, s², s³, 1]."""
    if observation.dim() < 2 or step.shape != observation.shape[:-1]:
        raise ValueError(
            f"`step` must have the leading axes (..., T) of `observation` (..., T, D), which is "
            f"{tuple(observation.shape)}; got {tuple(step.shape)}."
        )
    o = observation.clamp(-10, 10).double()
    s = step.double() / 100
    return [o, o.square(), torch.stack([s, s.square(), s**3, torch.ones_like(s)], -1)]


class ValueNetwork(nn.Module):
    """v = model(o) without the axis of its one output, so that no (..., T, 1) is ever broadcast against (..., T).

    Args:
        model: a `StateModel`, or any module of its shape, with one output: `ValueNetwork(MLP(D, 1))`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def init_hidden(self, batch_size: int = 1) -> Any:
        """The model's initial state."""
        return self.model.init_hidden(batch_size)  # type: ignore[operator]

    def forward(self, observation: Tensor, hidden_state: Any = None, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        """One step (B, D) -> (B,) or one sequence (B, T, D) -> (B, T), and the next state.

        Raises:
            ValueError: the model has more than one output.
        """
        output, state = self.model(observation, hidden_state, reset)
        if output.shape[-1] != 1:
            raise ValueError(f"`model` must have one output, the value; got {output.shape[-1]}.")
        return output.squeeze(-1), state


def value_loss(value: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """½ mean (v_t - G_t)² over the valid steps, a scalar.

    Args:
        value: (..., T) v_t.
        target: (..., T) G_t, such as `lambda_returns` with values that are detached.
        valid: Bool (..., T); None: all are.

    Raises:
        TypeError, ValueError: shapes that differ, or a mask that is not Bool.
    """
    check_steps("value", value, target=target, valid=valid)
    return 0.5 * masked_mean(where_valid(valid, value - target).square(), valid)
