"""Losses of a model's output: pure functions, for supervised adaptation and for adaptation without labels.

The loss of an adapter is called as `loss(output, y)`. What a stream itself provides as `y` needs no label: the next
observation, the reward, the input itself, or nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmrl.adaptation.optim import check_rate

__all__ = [
    "entropy_loss",
    "mask_input",
    "masked_reconstruction_loss",
    "mse_loss",
    "next_observation_and_reward_loss",
    "next_observation_loss",
]


def mse_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean of (output - target)² over all elements, a scalar; unlike PyTorch's, it never broadcasts.

    Raises:
        ValueError: output and target differ in shape.
    """
    if output.shape != target.shape:
        raise ValueError(
            f"The target must have the shape of the model's output, {tuple(output.shape)}; got {tuple(target.shape)}."
        )
    # Written out: PyTorch's own has no forward-mode derivative of its gradient (its issue 123996), and a wrong second
    # derivative, or none, under nested `vmap`.
    return (output - target).square().mean()


def next_observation_loss(output: Tensor, next_observation: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """Mean of ((o_{t+1} - ô_{t+1}) / s)² over steps and components, a scalar: the stream labels itself.

    Args:
        output: (..., O) the predicted next observation, or its change if the target is that.
        next_observation: (..., O) what came.
        scale: (O,) s > 0, the size of every component, in its unit, so that none drowns the others; None: 1. Give it
            with `functools.partial`.

    Raises:
        ValueError: output and target differ in shape, or the scale does not fit.
    """
    if scale is None or output.shape != next_observation.shape:
        return mse_loss(output, next_observation)
    if scale.shape != output.shape[-1:]:
        raise ValueError(f"scale must have shape (O,) = {tuple(output.shape[-1:])}; got {tuple(scale.shape)}.")
    return mse_loss(output / scale, next_observation / scale)


def next_observation_and_reward_loss(
    output: Tensor, target: Tensor, *, reward_weight: float = 1.0, scale: Tensor | None = None
) -> Tensor:
    """`next_observation_loss` plus w times the mean of (r_t - r̂_t)², a scalar.

    For tasks that change the reward and not the dynamics, in which the next observation teaches nothing.

    Args:
        output: (..., O + 1) the predicted next observation, and last the predicted reward.
        target: (..., O + 1) what came: `torch.cat([next_observation, reward[..., None]], -1)`.
        reward_weight: w >= 0.
        scale: (O,) as for `next_observation_loss`.

    Raises:
        ValueError: shapes that differ, or without room for an observation and a reward; a bad weight or scale.
    """
    check_rate("reward_weight", reward_weight)
    if output.shape[-1] < 2:
        raise ValueError(f"The output must hold an observation and a reward, (..., O + 1); got {tuple(output.shape)}.")
    of_observation = next_observation_loss(output[..., :-1], target[..., :-1], scale=scale)
    return of_observation + reward_weight * mse_loss(output[..., -1:], target[..., -1:])


def mask_input(x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs with some components hidden, and the target of `masked_reconstruction_loss`.

    Args:
        x: (..., D).
        hidden: Bool, shaped as x: what to hide. Draw it with a generator: `torch.rand(x.shape, generator=g) < 0.15`.

    Returns:
        x with 0 where it is hidden, (..., D), and x beside the mask, (..., 2 D).

    Raises:
        ValueError: a mask of another shape or dtype.
    """
    if hidden.dtype is not torch.bool or hidden.shape != x.shape:
        raise ValueError(
            f"hidden must be Bool of the shape of x, {tuple(x.shape)}; got {hidden.dtype}, {tuple(hidden.shape)}."
        )
    return torch.where(hidden, 0.0, x), torch.cat([x, hidden.to(x.dtype)], dim=-1)


def masked_reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean of (x - x̂)² over the hidden components, a scalar; 0 where none is hidden.

    Masked autoencoding as the task of test-time training (Gandelsman et al. 2022, https://arxiv.org/abs/2209.07522).

    Args:
        output: (..., D) the model's reconstruction of x from the masked x.
        target: (..., 2 D) from `mask_input`.

    Raises:
        ValueError: the target has not twice the features of the output.
    """
    if (*output.shape[:-1], 2 * output.shape[-1]) != tuple(target.shape):
        raise ValueError(
            f"The target must be of mask_input, of shape {(*output.shape[:-1], 2 * output.shape[-1])}; "
            f"got {tuple(target.shape)}."
        )
    x, hidden = target.chunk(2, dim=-1)
    return (hidden * (output - x).square()).sum() / hidden.sum().clamp(min=1)


def entropy_loss(output: Tensor, y: None = None) -> Tensor:
    """Mean entropy -Σ_c p_c log p_c of p = softmax(output), a scalar, in nats: for adaptation without any target.

    Wang et al. 2021, "TENT", https://arxiv.org/abs/2006.10726. By itself it collapses sooner or later, to one class for
    everything: adapt few parameters, reset, and guard.

    Args:
        output: (..., C) logits.
        y: nothing; an adapter passes None where it is given no targets.

    Raises:
        ValueError: there is a target.
    """
    if y is not None:
        raise ValueError("entropy_loss takes no target: give y = None.")
    log_p = output.log_softmax(-1)
    p = log_p.exp()
    # A class that a logit of -inf rules out has no part in it, and 0 · log 0 would be NaN.
    return -(p * torch.where(p > 0, log_p, 0.0)).sum(-1).mean()
