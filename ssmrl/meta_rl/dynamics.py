"""A model of dynamics as planners use it: normalised, residual, with a cost that is known or learned.

    x_t = ((o_t - μ_o) / σ_o, (a_t - μ_a) / σ_a),    y_t = (o_{t+1} - o_t - μ_Δ) / σ_Δ

Letters: B rows, T steps, D the size of an observation, A of an action.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmrl.adaptation.tree import is_there
from ssmrl.core.base import functional_forward
from ssmrl.meta_rl.planning import Params, Step

__all__ = [
    "Cost",
    "DynamicsScales",
    "Moments",
    "dynamics_data",
    "dynamics_scales",
    "model_step",
    "one_step_loss",
    "open_loop_loss",
    "predict_open_loop",
]

Cost = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`cost(observation (C, D), action (C, A), next_observation (C, D)) -> (C,)`, the lower the better."""


class Moments(NamedTuple):
    """Mean and standard deviation of every component."""

    mean: Tensor
    std: Tensor

    def normalize(self, values: Tensor) -> Tensor:
        """Return (values - mean) / std."""
        return (values - self.mean) / self.std

    def restore(self, values: Tensor) -> Tensor:
        """Return values · std + mean."""
        return values * self.std + self.mean


class DynamicsScales(NamedTuple):
    """Of observations (D,), actions (A,), changes of observations (D,) and rewards ()."""

    observation: Moments
    action: Moments
    change: Moments
    reward: Moments


def dynamics_scales(
    observation: Tensor, action: Tensor, next_observation: Tensor, reward: Tensor | None = None
) -> DynamicsScales:
    """Return the moments of recorded transitions, leaves (..., D), (..., A), (..., D) and (...).

    A component that never varies gets a deviation of 1, and so does a reward that is not given.

    Raises:
        ValueError: there are fewer than two transitions, or values that are not finite.
    """

    def moments(name: str, values: Tensor, flat: int) -> Moments:
        values = values.reshape(-1, flat) if flat else values.reshape(-1)
        if len(values) < 2:
            raise ValueError(f"{name} must hold at least two transitions; got {len(values)}.")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} must be finite.")
        std = values.std(0)
        return Moments(values.mean(0), torch.where(std > 1e-8 * values.abs().amax(0), std, torch.ones_like(std)))

    size = observation.shape[-1]
    nothing = Moments(observation.new_zeros(()), observation.new_ones(()))
    return DynamicsScales(
        moments("observation", observation, size),
        moments("action", action, action.shape[-1]),
        moments("next_observation - observation", next_observation - observation, size),
        nothing if reward is None else moments("reward", reward, 0),
    )


def dynamics_data(
    scales: DynamicsScales,
    observation: Tensor,
    action: Tensor,
    next_observation: Tensor,
    reward: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return a model's inputs (..., D + A) and targets: (..., D), and with rewards (..., D + 1)."""
    x = torch.cat([scales.observation.normalize(observation), scales.action.normalize(action)], -1)
    y = scales.change.normalize(next_observation - observation)
    if reward is not None:
        y = torch.cat([y, scales.reward.normalize(reward)[..., None]], -1)
    return x, y


def model_step(
    model: nn.Module,
    scales: DynamicsScales,
    cost: Cost | None = None,
    *,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Step:
    """Return what a model of `dynamics_data` predicts, as planners need it.

    Args:
        model: (C, D + A) -> (C, D), a `StateModel` or any module of its shape; with a learned cost (C, D + 1).
        scales: those of its data.
        cost: known; None: the model's last output is the reward, whose negative is the cost.
        project: (C, D) -> (C, D), brings a predicted observation back to where observations can be: a sine and a
            cosine to length 1, or a position into its limits. None: predictions are taken as they are.
    """

    def step(params: Params, hidden_state: Any, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Any]:
        x = torch.cat([scales.observation.normalize(observation), scales.action.normalize(action)], -1)
        output, after = functional_forward(model, params, x, hidden_state if is_there(hidden_state) else None)
        size = observation.shape[-1]
        expected = size + (cost is None)
        if output.shape[-1] != expected:
            raise ValueError(
                f"The model must have {expected} outputs, {size} for an observation"
                f"{' and one for the reward' if cost is None else ''}; got {output.shape[-1]}."
            )
        following = observation + scales.change.restore(output[..., :size])
        if project is not None:
            following = project(following)
        price = -scales.reward.restore(output[..., size]) if cost is None else cost(observation, action, following)
        return price, following, after if is_there(after) else ()

    return step


def predict_open_loop(
    step: Step, params: Params, hidden_state: Any, observation: Tensor, action: Tensor
) -> tuple[Tensor, Any]:
    """Return what a model predicts for H steps from its own predictions, and the state after them.

    Args:
        step: the model, see `Step`.
        params: what `step` gets.
        hidden_state: leaves (B, ...), before `observation`; None or () for a model without one.
        observation: (B, D), where the predictions begin.
        action: (B, H, A).

    Returns:
        (B, H, D), and leaves (B, ...).
    """
    hidden_state = hidden_state if is_there(hidden_state) else ()
    predicted = []
    for t in range(action.shape[1]):
        _, observation, hidden_state = step(params, hidden_state, observation, action[:, t])
        predicted.append(observation)
    return torch.stack(predicted, 1), hidden_state


def one_step_loss(
    model: nn.Module,
    scales: DynamicsScales,
    params: Params,
    hidden_state: Any,
    observation: Tensor,
    action: Tensor,
    next_observation: Tensor,
) -> tuple[Tensor, Any]:
    """Return the mean of (ŷ_t - y_t)² over a sequence, every step from what was observed, and the state after it.

    It is what an adapter with `mse_loss` minimises: ŷ and y are normalised changes, see `dynamics_data`.

    Args:
        params: of `model`; what is missing is the model's own.
        hidden_state: leaves (B, ...) before the sequence; None: the model's `init_hidden`, or no state.
        observation, action, next_observation: (B, T, D), (B, T, A), (B, T, D).
    """
    x, y = dynamics_data(scales, observation, action, next_observation)
    output, after = functional_forward(model, params, x, hidden_state if is_there(hidden_state) else None)
    return (output - y).square().mean(), after


def open_loop_loss(
    step: Step,
    scales: DynamicsScales,
    params: Params,
    hidden_state: Any,
    observation: Tensor,
    action: Tensor,
    next_observation: Tensor,
) -> Tensor:
    """Return the mean of ((ô_t - o_t) / σ_o)² over H steps that are predicted from predictions alone.

    Planning looks ahead in this way, and errors add up in it: Nagabandi et al. 2018, https://arxiv.org/abs/1708.02596,
    section IV.D, measure it to choose a model.

    Args:
        step, params, hidden_state: as for `predict_open_loop`.
        observation, action, next_observation: (B, H, D), (B, H, A), (B, H, D), of which only the first observation is
            shown to the model.
    """
    predicted, _ = predict_open_loop(step, params, hidden_state, observation[:, 0], action)
    return ((predicted - next_observation) / scales.observation.std).square().mean()
