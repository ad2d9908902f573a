"""Planning by sampling on a model: random shooting, the cross-entropy method, and MPPI.

Each is a pure function of one stream that draws sequences of actions, asks what they cost, and fits a plan to the good
ones; `Planner` maps it over streams, of which each has weights, a hidden state and a plan of its own. Letters: N
streams, C candidates, H steps of the horizon, D the size of an observation, A of an action, R rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import vmap

from ssmrl.adaptation.optim import check_num_steps
from ssmrl.adaptation.trace import Traced, check_compile
from ssmrl.adaptation.tree import is_there, tree_leaves, tree_map
from ssmrl.core.base import where_rows
from ssmrl.meta_rl.action_sequences import ActionSpace

__all__ = ["Decision", "Planned", "Planner", "Step", "cem", "mppi", "random_shooting", "sequence_costs"]

Params = Mapping[str, Tensor]
Step = Callable[[Params, Any, Tensor, Tensor], tuple[Tensor, Tensor, Any]]
"""`step(params, hidden_state, observation, action) -> (cost, next_observation, next_hidden_state)`.

What a model predicts for C candidates of one stream: hidden_state leaves (C, ...), () where there is none; observation
(C, D); action (C, A), one-hot for a discrete one; cost (C,).
"""
Costs = Callable[[Tensor], Tensor]
"""Sequences of actions (C, H, A) -> what each costs (C,), infinite where that is not a number."""


class Planned(NamedTuple):
    """What planning found for one stream."""

    plan: Any
    cost: Tensor
    """() the least that any candidate costs; infinite where none is finite: the plan is then as it was."""


class Method(Protocol):
    """A planner of one stream: `cem`, `mppi`, `random_shooting`, or yours."""

    def __call__(self, costs: Costs, actions: Any, plan: Any, noise: Tensor) -> Planned:
        """Return a better plan, with noise (R, C, H, A)."""


def sequence_costs(step: Step, params: Params, hidden_state: Any, observation: Tensor, actions: Tensor) -> Tensor:
    """What C sequences of actions cost from where one stream is: Σ_t c_t, predicted open loop.

    Args:
        step: the model.
        params: what `step` gets.
        hidden_state: leaves (...) without an axis of a batch; () for a model without one.
        observation: (D,).
        actions: (C, H, A).

    Returns:
        (C,), infinite where a cost or the last prediction is not finite: such a sequence is never chosen.
    """
    number, horizon = actions.shape[:2]
    hidden_state = tree_map(lambda leaf: leaf.expand(number, *leaf.shape), hidden_state)
    observation = observation.expand(number, -1)
    total = observation.new_zeros(number)
    for t in range(horizon):
        cost, observation, hidden_state = step(params, hidden_state, observation, actions[:, t])
        total = total + cost
    # A cost that is bounded would hide that the model has run away.
    sound = torch.isfinite(total) & torch.isfinite(observation.sum(-1))
    return torch.where(sound, total, torch.inf)


def random_shooting(costs: Costs, actions: ActionSpace, plan: Any, noise: Tensor) -> Planned:
    """Take the best of R·C sequences that are uniform in the space.

    Rao 2009, "A survey of numerical methods for optimal control"; Nagabandi et al. 2018,
    https://arxiv.org/abs/1708.02596, section IV.C. The plan that is given is not used.
    """
    candidates = actions.uniform(noise.flatten(0, 1))
    found = costs(candidates)
    best, index = found.topk(1, largest=False)
    return _fitted(actions, plan, candidates[index], best, torch.ones_like(best), best[0], scale=False)


def cem(
    costs: Costs, actions: ActionSpace, plan: Any, noise: Tensor, *, elites: float = 0.1, smoothing: float = 0.0
) -> Planned:
    """The cross-entropy method: R times, fit the plan to the cheapest of C sequences that are drawn from it.

    Rubinstein 1999; as a planner Chua et al. 2018, "PETS", https://arxiv.org/abs/1805.12114, whose samples are from a
    truncated normal distribution, where these are clipped.

    Args:
        elites: the share of the candidates that the plan is fitted to; at least one is.
        smoothing: the share of mean and deviation that is kept from the round before.
    """
    number = max(round(elites * noise.shape[1]), 1)
    least = noise.new_full((), torch.inf)
    for one in noise.unbind():
        candidates = actions.sample(plan, one)
        found = costs(candidates)
        kept, index = found.topk(number, largest=False)
        finite = torch.isfinite(kept).to(kept.dtype)
        weights = finite / finite.sum()
        least = torch.minimum(least, kept[0])
        plan = _fitted(actions, plan, candidates[index], kept, weights, least, smoothing=smoothing).plan
    return Planned(plan, least)


def mppi(costs: Costs, actions: ActionSpace, plan: Any, noise: Tensor, *, temperature: float = 1.0) -> Planned:
    """Model predictive path integral control: R times, move the plan to the mean of its samples weighed by e^(-cost/λ).

        w_c ∝ exp(-(S_c - min S) / λ),    μ ← Σ_c w_c a_c

    Williams et al. 2017, https://arxiv.org/abs/1707.02342, algorithm 2. The deviation stays that of `plan`, the cost
    of control is the model's own, and samples are clipped before they are averaged, not after.

    Args:
        temperature: λ > 0, in the unit of the costs of a whole sequence.
    """
    least = noise.new_full((), torch.inf)
    for one in noise.unbind():
        candidates = actions.sample(plan, one)
        found = costs(candidates)
        lowest = found.min()
        weights = torch.softmax(-(found - lowest) / temperature, 0)
        least = torch.minimum(least, lowest)
        plan = _fitted(actions, plan, candidates, found, weights, lowest, scale=False).plan
    return Planned(plan, least)


def _fitted(
    actions: ActionSpace,
    plan: Any,
    candidates: Tensor,
    costs: Tensor,
    weights: Tensor,
    least: Tensor,
    *,
    smoothing: float = 0.0,
    scale: bool = True,
) -> Planned:
    """Fit a plan to candidates with weights; where no cost is finite, leave it as it is."""
    fitted = actions.fit(plan, candidates, torch.nan_to_num(weights), smoothing=smoothing, scale=scale)
    usable = torch.isfinite(costs).any()
    return Planned(tree_map(lambda new, old: torch.where(usable, new, old), fitted, plan), least)


class Decision(NamedTuple):
    """What N streams do now, and what they plan to do after it."""

    action: Tensor
    """Float (N, A) or Int64 (N,); where no candidate has a finite cost, the next action of the plan before."""
    plan: Any
    """For the next call, one step later."""
    cost: Tensor
    """(N,) the least that any candidate costs; infinite where none is finite."""

    def check(self) -> None:
        """Raise FloatingPointError if no candidate of a stream has a finite cost, and name the stream."""
        lost = ~torch.isfinite(self.cost)
        if bool(lost.any()):
            raise FloatingPointError(
                f"No candidate of stream {int(lost.nonzero()[0])} has a finite cost: its weights, hidden state or "
                "observation hold values that are not finite, or its model's predictions run away within the horizon."
            )


class Planner:
    """Plans for N streams in one call, each with weights, a hidden state, an observation and a plan of its own.

    Args:
        step: the model's prediction, see `Step`; of a `StateModel`, `model_step` makes it.
        actions: `BoxActions` or `DiscreteActions`.
        horizon: H >= 1 steps that are looked ahead.
        candidates: C >= 1 sequences of actions that are tried in every round.
        rounds: R >= 1.
        method: a planner of one stream, `functools.partial(cem, elites=0.05)` for instance.
        noise_exponent: colour of the noise of actions, see `colored_noise`.
        chunk_size: at most so many streams at once, which takes less memory, and less time where the candidates of
            all do not fit the cache. None: all at once.
        compile: True: record the planning once for given shapes and compile it with TorchInductor; "trace": record and
            replay it. What `step` reads that is not an argument must not change then.

    Nothing is kept for a gradient.

    Raises:
        TypeError, ValueError: numbers that are no integers >= 1; an empty horizon is one.
    """

    def __init__(
        self,
        step: Step,
        actions: Any,
        *,
        horizon: int,
        candidates: int = 300,
        rounds: int = 3,
        method: Method = cem,
        noise_exponent: float = 0.0,
        chunk_size: int | None = None,
        compile: bool | Literal["trace"] = False,
    ) -> None:
        numbers = {"horizon": horizon, "candidates": candidates, "rounds": rounds, "chunk_size": chunk_size}
        for name, value in numbers.items():
            if value is not None and check_num_steps(name, value) < 1:
                raise ValueError(f"{name} must be at least 1; got {value}.")
        self.step, self.actions, self.method = step, actions, method
        self.horizon, self.candidates, self.rounds = horizon, candidates, rounds
        self.noise_exponent, self.chunk_size = noise_exponent, chunk_size
        compile = check_compile(compile)
        self._run = self._chunk if compile is False else Traced(self._chunk, inductor=compile is True)

    def init(self, num_streams: int) -> Any:
        """Return the plans of N streams that know nothing, leaves (N, H, ...)."""
        if check_num_steps("num_streams", num_streams) < 1:
            raise ValueError(f"num_streams must be at least 1; got {num_streams}.")
        one = self.actions.start(self.horizon)
        return tree_map(lambda leaf: leaf.expand(num_streams, *leaf.shape).clone(), one)

    def noise(self, num_streams: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the noise of one call, (N, R, C, H, A)."""
        shape = (num_streams, self.rounds, self.candidates, self.horizon, self.actions.size)
        drawn: Tensor = self.actions.noise(shape, generator, exponent=self.noise_exponent)
        return drawn

    def __call__(
        self,
        params: Params,
        hidden_state: Any,
        observation: Tensor,
        plan: Any,
        noise: Tensor,
        *,
        shared: Params | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Plan, and take the first action of every plan.

        Args:
            params: name -> (N, ...), what every stream has for itself; `StreamAdapter.in_use` returns it.
            hidden_state: leaves (N, ...), before `observation`; None for a model without one.
            observation: (N, D).
            plan: what `init` or the last call returned.
            noise: (N, R, C, H, A), see `noise`.
            shared: name -> tensor, what all streams have in common. `step` gets both in one mapping.
            reset: Bool (N,), where an episode begins: the plan is begun anew.

        Returns:
            The actions, float (N, A) or Int64 (N,), and the plans for the next call, one step later.

        Raises:
            ValueError: shapes that do not fit.
            FloatingPointError: no candidate of a stream has a finite cost. The stream is named.
        """
        decision = self.decide(params, hidden_state, observation, plan, noise, shared=shared, reset=reset)
        decision.check()
        return decision.action, decision.plan

    @torch.no_grad()
    def decide(
        self,
        params: Params,
        hidden_state: Any,
        observation: Tensor,
        plan: Any,
        noise: Tensor,
        *,
        shared: Params | None = None,
        reset: Tensor | None = None,
    ) -> Decision:
        """Plan as a call does, for a loop that has to go on: streams without a finite cost are the caller's to look at.

        Args:
            params, hidden_state, observation, plan, noise, shared, reset: as for a call.

        Raises:
            ValueError: shapes that do not fit.
        """
        shared = {} if shared is None else dict(shared)
        hidden_state = hidden_state if is_there(hidden_state) else ()
        self._check(params, hidden_state, observation, plan, noise, reset)
        if reset is not None and bool(reset.any()):
            plan = where_rows(reset, self.init(len(observation)), plan)
        mine = (dict(params), hidden_state, observation, plan, noise)
        size = self.chunk_size or len(observation)
        pieces = []
        for begin in range(0, len(observation), size):
            one = tree_map(lambda leaf, begin=begin: leaf[begin : begin + size], mine)
            pieces.append(self._run(shared, *one))
        return Decision(*tree_map(lambda *leaves: torch.cat(leaves), *pieces))

    def _chunk(self, shared: Params, *mine: Any) -> tuple[Tensor, Any, Tensor]:
        def one(params: Params, hidden_state: Any, observation: Tensor, plan: Any, noise: Tensor) -> Any:
            def costs(actions: Tensor) -> Tensor:
                return sequence_costs(self.step, {**shared, **params}, hidden_state, observation, actions)

            planned = self.method(costs, self.actions, plan, noise)
            return self.actions.first(planned.plan), self.actions.shifted(planned.plan), planned.cost

        result: tuple[Tensor, Any, Tensor] = vmap(one)(*mine)
        return result

    def _check(self, params: Any, hidden: Any, observation: Any, plan: Any, noise: Any, reset: Any) -> None:
        if not isinstance(observation, Tensor) or observation.dim() != 2 or not len(observation):
            got = tuple(observation.shape) if isinstance(observation, Tensor) else type(observation).__name__
            raise ValueError(f"observation must have shape (N, D), N >= 1; got {got}.")
        number = len(observation)
        named = [(name, value) for name, value in params.items()]
        named += [
            (name, leaf) for name, tree in (("hidden_state", hidden), ("plan", plan)) for leaf in tree_leaves(tree)
        ]
        for name, value in named:
            if value.dim() == 0 or len(value) != number:
                raise ValueError(
                    f"{name} must have a row for each of {number} streams; got shape {tuple(value.shape)}."
                )
        expected = (number, self.rounds, self.candidates, self.horizon, self.actions.size)
        if noise.shape != expected:
            raise ValueError(f"noise must have shape (N, R, C, H, A) = {expected}; got {tuple(noise.shape)}.")
        if reset is not None and (reset.dtype is not torch.bool or reset.shape != (number,)):
            raise ValueError(f"reset must be a Bool tensor of shape ({number},); got {tuple(reset.shape)}.")
