"""What a model of dynamics is trained for: to be planned with over whole episodes, before it adapts and after it.

Letters: B sequences, T steps, D the size of an observation, A of an action, M steps of a window, H of the horizon, K
inner steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchopt.base import GradientTransformation

from ssmrl.adaptation.inner_loop import adapt
from ssmrl.adaptation.tree import tree_map
from ssmrl.core.base import initial_state
from ssmrl.meta_rl.dynamics import DynamicsScales, one_step_loss, open_loop_loss
from ssmrl.meta_rl.planning import Params, Step

__all__ = ["AdaptiveLosses", "Transitions", "adaptive_planning_loss", "planning_loss"]


class Transitions(NamedTuple):
    """Sequences of what happened, from the beginning of an episode on."""

    observation: Tensor
    """(B, T, D)."""
    action: Tensor
    """(B, T, A)."""
    next_observation: Tensor
    """(B, T, D)."""

    def steps(self, begin: int, end: int) -> Transitions:
        """Return steps begin to end - 1 of all sequences."""
        return Transitions(*(leaf[:, begin:end] for leaf in self))


class AdaptiveLosses(NamedTuple):
    """Of one task; () each."""

    unadapted: Tensor
    adapted: Tensor


def planning_loss(
    model: nn.Module,
    step: Step,
    scales: DynamicsScales,
    params: Params,
    hidden_state: Any,
    transitions: Transitions,
    *,
    starts: Sequence[int],
    horizon: int,
) -> Tensor:
    """Errors of every step of whole sequences, and of predictions H steps ahead from some of them.

        1/T Σ_t ‖ŷ_t - y_t‖²/D  +  mean over s in starts of  1/H Σ_h ‖(ô_{s+h|s} - o_{s+h}) / σ_o‖²/D

    The model runs through all of a sequence, as it will when it is used: one that was trained on pieces has never
    been in the states that it gets into later.

    Args:
        model, step, scales: `step` is `model_step(model, scales, ...)`.
        params: of the model; what is missing is the model's own.
        hidden_state: leaves (B, ...) before the sequences; None: `init_hidden`, or no state.
        transitions: (B, T, ...).
        starts: steps from 0 to T - H, where predictions of H steps begin; with none only the first term is left.
        horizon: H.

    Raises:
        ValueError: a start after which there are fewer than H steps.
    """
    length = transitions.action.shape[1]
    for start in starts:
        if not 0 <= start <= length - horizon:
            raise ValueError(
                f"starts must be between 0 and {length - horizon}: {horizon} of {length} steps follow; got {start}."
            )
    total, at, bounds = transitions.action.new_zeros(()), 0, sorted(set(starts))
    states, parts = [], []
    for bound in [*bounds, length]:
        if bound > at:
            loss, hidden_state = one_step_loss(model, scales, params, hidden_state, *transitions.steps(at, bound))
            total, at = total + loss * (bound - at), bound
        if bound < length:
            here = initial_state(model, len(transitions.action)) if hidden_state is None else hidden_state
            states.append(() if here is None else here)
            parts.append(transitions.steps(bound, bound + horizon))
    total = total / length
    if not parts:
        return total
    ahead = Transitions(*map(torch.cat, zip(*parts, strict=True)))
    together = tree_map(lambda *leaves: torch.cat(leaves), *states)
    return total + open_loop_loss(step, scales, params, together, *ahead)


def adaptive_planning_loss(
    model: nn.Module,
    step: Step,
    scales: DynamicsScales,
    params: Params,
    transitions: Transitions,
    *,
    begin: int,
    window: int,
    horizon: int,
    optimizer: GradientTransformation,
    num_steps: int,
    shared: Mapping[str, Tensor] | None = None,
) -> AdaptiveLosses:
    """`planning_loss` of what follows a window, with the parameters as they are, and adapted to the window.

        h_0 = state of θ at `begin`,    θ_K = K steps on the one-step loss of the window from h_0,
        L(θ') = planning_loss(θ', steps after the window, from the state of θ' after the window)

    As a `StreamAdapter` with a `Window` of M steps and `AdaptiveControl` use the model, with two simplifications: h_0
    is of unadapted parameters, and the window is of one episode. It is MAML with GrBAL's split of past and future
    (Nagabandi et al. 2019, https://arxiv.org/abs/1803.11347, equation 3), through the hidden state as in ReBAL, and
    with predictions as far ahead as a plan looks. To train for the time before there is a window too, minimise the sum
    of both.

    Args:
        params: what adapts, name -> tensor.
        transitions: of one task, leaves (1, T, ...), with T ≥ begin + M + H.
        begin, window: where the window begins, and M.
        optimizer, num_steps: as for `ssmrl.adapt`.
        shared: parameters that do not adapt. What is in neither is the model's own, and a constant.
        model, step, scales, horizon: as for `planning_loss`.

    Raises:
        ValueError: fewer than H steps follow the window.
    """
    length, end = transitions.action.shape[1], begin + window
    if begin < 0 or window < 1 or end + horizon > length:
        raise ValueError(
            f"begin + window + horizon must be at most the {length} steps that there are, begin >= 0 and window >= 1; "
            f"got {begin} + {window} + {horizon}."
        )
    others = dict(shared or {})
    state = None
    if begin:
        _, state = one_step_loss(model, scales, {**others, **params}, None, *transitions.steps(0, begin))
    past, future = transitions.steps(begin, end), transitions.steps(end, length)

    def inner(params: Any, others: Any, state: Any, past: Any) -> Tensor:
        return one_step_loss(model, scales, {**others, **params}, state, *past)[0]

    def after(params: Any) -> Tensor:
        weights = {**others, **params}
        _, here = one_step_loss(model, scales, weights, state, *past)
        return planning_loss(model, step, scales, weights, here, future, starts=(0,), horizon=horizon)

    adapted = adapt(
        inner, dict(params), others, () if state is None else state, past, optimizer=optimizer, num_steps=num_steps
    )
    return AdaptiveLosses(after(params), after(adapted.params))
