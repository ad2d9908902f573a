"""The loop of adaptive control as a policy: observe, learn from what happened, plan, act, for N streams in lockstep."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmrl.adaptation.streams import StreamAdapter
from ssmrl.adaptation.tree import is_there
from ssmrl.core.base import functional_forward, initial_state, where_rows
from ssmrl.meta_rl.dynamics import DynamicsScales, dynamics_data
from ssmrl.meta_rl.planning import Decision, Planner

__all__ = ["AdaptiveControl", "ControlState"]


class ControlState(NamedTuple):
    """What the policy knows between two observations; leaves (N, ...)."""

    hidden_state: Any
    """Before the observation that was acted on; () for a model without one."""
    plan: Any
    observation: Tensor
    action: Tensor
    """As the model sees it, (N, A): a discrete one is one-hot."""
    began: Tensor
    """Bool (N,), an episode began at the observation."""
    restarts: Tensor
    """Int64 (N,), how often the stream began anew because its adapted model had run away."""


class AdaptiveControl:
    """A policy that plans on a model of the dynamics, and adapts the model to every transition that it sees.

    At every observation it

    1. runs the model on the transition that ends there, which brings the hidden state up to date;
    2. lets `adapter` make its update on that transition, from the state before it;
    3. plans with the weights and the state of every stream, and takes the first action.

    It is a policy in the sense of `ssmrl.env_runner.rollout`: (observation, state, reset) -> (action, state). Its state
    is a `ControlState`; weights live in `adapter`. Where an episode begins, hidden state and plan are begun anew;
    weights are not: physics go on, and if they do not, `adapter.reset` is the caller's to use.

    A stream whose adapted model has run away, so that no candidate has a finite cost, begins anew too, weights at the
    anchor, hidden state and plan, and plans again; `ControlState.restarts` counts how often.

    Args:
        planner: with the `model_step` of the same model and scales.
        model: the model.
        scales: of the transitions.
        adapter: adapts the same model, N streams, with a loss on (prediction, y) of `dynamics_data`. None: the model
            stays as it is, and its hidden state alone identifies the system.
        generator: of the planner's noise.

    Raises:
        ValueError: `adapter` adapts another model.
    """

    def __init__(
        self,
        planner: Planner,
        model: nn.Module,
        scales: DynamicsScales,
        *,
        adapter: StreamAdapter | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if adapter is not None and adapter.model is not model:
            raise ValueError("adapter must adapt the same model object that is planned with.")
        self.planner, self.model, self.scales = planner, model, scales
        self.adapter, self.generator = adapter, generator

    @torch.no_grad()
    def __call__(self, observation: Tensor, state: ControlState | None, reset: Tensor) -> tuple[Tensor, ControlState]:
        """Act on observations (N, D), where episodes begin in the rows of `reset`, Bool (N,).

        Raises:
            FloatingPointError: no candidate of a stream has a finite cost, with a model that does not adapt, or with
                the anchor's weights either.
        """
        number = len(observation)
        if state is None:
            restarts = torch.zeros(number, dtype=torch.int64, device=observation.device)
            fresh = initial_state(self.model, number)
            hidden, plan = () if fresh is None else fresh, self.planner.init(number)
        else:
            hidden, plan, restarts = self._learn(observation, state, reset), state.plan, state.restarts
        noise = self.planner.noise(number, self.generator)
        decision = self._decide(hidden, observation, plan, noise, reset)
        lost = ~torch.isfinite(decision.cost)
        if self.adapter is not None and bool(lost.any()):
            self.adapter.reset(lost)
            restarts = restarts + lost
            hidden = self._begun_anew(hidden, lost)
            decision = self._decide(hidden, observation, plan, noise, reset | lost)
        decision.check()
        action = seen = decision.action
        if not action.is_floating_point():
            seen = torch.nn.functional.one_hot(action, self.planner.actions.size).to(observation.dtype)
        return action, ControlState(hidden, decision.plan, observation, seen, reset, restarts)

    def _decide(self, hidden: Any, observation: Tensor, plan: Any, noise: Tensor, reset: Tensor) -> Decision:
        params, shared = self._weights(len(observation))
        return self.planner.decide(params, hidden, observation, plan, noise, shared=shared, reset=reset)

    def _learn(self, observation: Tensor, state: ControlState, reset: Tensor) -> Any:
        """Adapt to the transition that ends at `observation`, and return the state after it."""
        x, y = dynamics_data(self.scales, state.observation, state.action, observation)
        before = state.hidden_state if is_there(state.hidden_state) else None
        if self.adapter is None:
            _, after = functional_forward(self.model, {}, x, before)
        else:
            _, after = self.adapter(x, before)
            # Where an episode begins there is no transition: a stream whose data are not finite is left as it is.
            y = torch.where(reset[:, None], torch.nan, y)
            self.adapter.update_step(x, y, before, reset=state.began)
        return () if after is None else self._begun_anew(after, reset)

    def _begun_anew(self, hidden: Any, rows: Tensor) -> Any:
        """The hidden state, in some rows as at the beginning of an episode."""
        fresh = initial_state(self.model, len(rows))
        if fresh is None:
            return hidden
        return where_rows(rows, fresh, hidden)

    def _weights(self, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.adapter is not None:
            return self.adapter.in_use()
        shared = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        return {}, {name: value.detach() for name, value in shared.items()}
