"""Test-time adaptation of one stream of transitions, as a pure function; `Adapter` and `StreamAdapter` run it.

One call takes one transition (or batch of sequences): it looks at it with the weights in use, decides whether to go
back to the anchor, adapts with the inner loop, and lets the result stand or not. Every decision is a tensor, so
that it can be mapped over streams. Letters: B rows of a stream, T steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torchopt
from torch import Tensor
from torchopt.base import GradientTransformation

from ssmrl.adaptation.anchor import distance
from ssmrl.adaptation.guard import Guard
from ssmrl.adaptation.inner_loop import adapt
from ssmrl.adaptation.resets import Observed, ResetPolicy
from ssmrl.adaptation.tree import all_finite, all_finite_on_host, is_there, tree_leaves, tree_map
from ssmrl.adaptation.window import Forward, Window, empty_buffer, keep_newest, push, window_loss

__all__ = ["Counts", "Outcome", "Report", "Reset", "Rules", "Stream", "begin", "fresh", "in_use", "update"]


class Outcome(IntEnum):
    """What became of an update."""

    ADAPTED = 0
    """The model adapted."""
    WAITING = 1
    """Skipped: it is not the turn of this call (`every`), or the window has not its `minimum` yet."""
    BAD_DATA = 2
    """Skipped: a value in the data or the hidden state is not finite. Nothing of the stream changed."""
    NOT_FINITE = 3
    """Rolled back: a loss or a weight was not finite."""
    LOSS_ROSE = 4
    """Rolled back: the loss on the update's own data rose beyond the guard's bound."""
    DROPPED = 5
    """The stream was dropped, and its data ignored."""


class Reset(IntEnum):
    """Why the weights went back to the anchor before an update."""

    NONE = 0
    POLICY = 1
    """The reset policy said so."""
    GUARD = 2
    """The guard did: the anchor had been better, or a loss was not finite."""


class Counts(NamedTuple):
    """What happened to a stream since it began; Int64 () each."""

    calls: Tensor
    adapted: Tensor
    waiting: Tensor
    bad_data: Tensor
    rolled_back: Tensor
    resets: Tensor


class Stream(NamedTuple):
    """All that one stream carries from call to call; what is switched off is ()."""

    params: Any
    """The adapted parameters."""
    optimizer_state: Any
    average: Any
    """Their exponential average, which is in use then."""
    buffer: Any
    """A `Buffer`."""
    policy: Any
    guard: Any
    """A `GuardState`."""
    counts: Counts


class Report(NamedTuple):
    """What one update did; tensors () of one stream, or (N,) of N."""

    loss: Tensor
    """The loss of the data before the first gradient step."""
    loss_after: Tensor
    """And after the last, with the weights that stand."""
    num_steps: Tensor
    """Int64, gradient steps that stand: K or 0."""
    step_norm: Tensor
    """Euclidean distance that the weights went, resets apart."""
    distance: Tensor
    """Euclidean distance of the weights from the anchor."""
    outcome: Tensor
    """Int64, an `Outcome`."""
    reset: Tensor
    """Int64, a `Reset`."""


@dataclass(frozen=True)
class Rules:
    """What is the same for all calls and all streams."""

    forward: Forward
    loss_fn: Callable[[Tensor, Any], Tensor]
    before: tuple[GradientTransformation, ...]
    """What is done to gradients before the optimizer sees them."""
    optimizer: GradientTransformation
    after: tuple[GradientTransformation, ...]
    """What is done to its steps."""
    num_steps: int
    anchor: Any
    """Where the adapted parameters begin, in the structure of `Stream.params`."""
    average: float | None
    from_anchor: bool
    every: int
    window: Window | None
    policy: ResetPolicy | None
    guard: Guard | None
    branches: bool
    """Decide with Python's `if`, which saves work: for one stream that is neither mapped nor traced."""

    def transformation(self, scale: Tensor | None = None) -> GradientTransformation:
        """The optimizer with what is around it; with a guard, `scale`, a tensor (), multiplies its steps."""
        scaled = () if self.guard is None else (_scaled_by(_one(self.anchor) if scale is None else scale),)
        parts = (*self.before, self.optimizer, *scaled, *self.after)
        return parts[0] if len(parts) == 1 else torchopt.chain(*parts)


def begin(rules: Rules, x: Tensor, y: Any, hidden: Any, reset: Any) -> Stream:
    """A stream at the anchor, for data like these, whose values do not matter."""
    return fresh(rules, () if rules.window is None else empty_buffer(rules.window, x, y, hidden, reset), hidden)


def fresh(rules: Rules, buffer: Any, hidden: Any) -> Stream:
    """A stream at the anchor, with an empty buffer, and a hidden state of the right shapes."""
    loss = _one(rules.anchor)
    zero = torch.zeros((), dtype=torch.int64, device=loss.device)
    return Stream(
        params=rules.anchor,
        optimizer_state=rules.transformation().init(rules.anchor),
        average=() if rules.average is None else rules.anchor,
        buffer=buffer,
        policy=() if rules.policy is None else rules.policy.init(loss),
        guard=() if rules.guard is None else rules.guard.init(loss, hidden),
        counts=Counts(*[zero] * 6),
    )


def in_use(stream: Stream) -> Any:
    """The parameters to predict with."""
    return stream.average if is_there(stream.average) else stream.params


def update(
    rules: Rules,
    stream: Stream,
    x: Tensor,
    y: Any,
    hidden: Any,
    reset: Any,
    *,
    measured: bool = True,
    adapting: bool = True,
) -> tuple[Stream, Report]:
    """Take one transition, (B, ...), or batch of sequences, (B, T, ...), and adapt to it, or to the window it ends.

    Args:
        rules: the settings.
        stream: the stream before it.
        x, y, hidden: inputs, targets, and the state before them; () for targets or a state that there are not.
        reset: Bool (B,) or (B, T), where episodes begin; () for nowhere.
        measured: work out the loss after the update, and distances; else they are NaN where nothing needs them.
        adapting: False where it is known that it is not the turn of this call (`every`), which saves the work.

    Returns:
        The stream after it, and what happened.
    """
    finite = all_finite_on_host if rules.branches else all_finite
    fine = finite((x, y, hidden))
    if not rules.branches:  # nothing of what cannot be used may reach a weight
        x, y, hidden = tree_map(lambda leaf: torch.where(fine, leaf, torch.zeros_like(leaf)), (x, y, hidden))
    elif not bool(fine):
        return _untouched(rules, stream)
    never = torch.zeros_like(fine)
    calls = stream.counts.calls
    # What is switched off costs no operation.
    may_reset = rules.policy is not None or rules.guard is not None
    may_wait = rules.every > 1 or rules.window is not None or not adapting

    # Look at the data, and go back to the anchor?
    by_policy, by_guard, policy, guard = never, never, stream.policy, stream.guard
    params, optimizer_state, average = stream.params, stream.optimizer_state, stream.average
    fresh_state: Any = ()
    if rules.from_anchor or may_reset:
        fresh_state = rules.transformation().init(rules.anchor)
    if may_reset:
        loss = _loss(rules, in_use(stream), x, y, hidden, reset)[0]
        if rules.guard is not None:
            own = _choose(rules, (calls > 0) & (x.dim() == 2), guard.anchor_hidden, hidden)
            anchor_loss, own = _loss(rules, rules.anchor, x, y, own, reset)
            own = _choose(rules, finite(own), own, hidden)
            by_guard, guard = rules.guard.watch(guard, loss, anchor_loss, own)
        if rules.policy is not None:
            begins = reset.any() if isinstance(reset, Tensor) else never
            by_policy, policy = rules.policy.update(Observed(loss, begins), policy)
        at_anchor = rules.anchor, fresh_state, rules.anchor if is_there(average) else ()
        params, optimizer_state, average = _choose(
            rules, by_policy | by_guard, at_anchor, (params, optimizer_state, average)
        )

    # What to adapt to.
    buffer = stream.buffer
    due = torch.ones_like(fine) if rules.every == 1 else (calls + 1) % rules.every == 0
    if rules.window is not None:
        buffer = push(buffer, x, y, hidden, reset)
        if rules.policy is not None and rules.policy.keep is not None:
            buffer = keep_newest(buffer, rules.policy.keep, by_policy)
        due = due & (buffer.filled.clamp(max=rules.window.length) >= rules.window.minimum)

    def loss_of(params: Any) -> Tensor:
        if rules.window is None:
            return _loss(rules, params, x, y, hidden, reset)[0]
        return window_loss(rules.window, buffer, rules.forward, rules.loss_fn, params)

    # Adapt, and judge.
    tried = due & fine
    if not adapting or (rules.branches and not bool(tried)):
        first = last = loss_of(params)
        stands = rolled_back = never
        outcome = torch.full_like(calls, Outcome.WAITING)
        step_norm = torch.zeros_like(first)
    else:
        start, start_state = (rules.anchor, fresh_state) if rules.from_anchor else (params, optimizer_state)
        scale = None if rules.guard is None else guard.scale
        adapted = adapt(
            loss_of,
            start,
            optimizer=rules.transformation(scale),
            num_steps=rules.num_steps,
            optimizer_state=start_state,
        )
        losses = adapted.losses if rules.num_steps else loss_of(start)[None]
        first = losses[0]
        is_finite = finite((adapted.params, losses))
        last = torch.full_like(first, torch.nan)
        if measured or rules.guard is not None:
            last = loss_of(adapted.params)
            is_finite = is_finite & torch.isfinite(last)
        stands = tried & is_finite
        outcome = torch.where(is_finite, Outcome.ADAPTED, Outcome.NOT_FINITE)
        if rules.guard is not None:
            holds = rules.guard.judge(first, last)
            stands = stands & holds
            outcome = torch.where(is_finite & ~holds, Outcome.LOSS_ROSE, outcome)
            guard = rules.guard.rescaled(guard, tried, is_finite & holds)
        if may_wait:
            outcome = torch.where(due, outcome, Outcome.WAITING)
        rolled_back = tried & ~stands
        step_norm = distance(adapted.params, params) if measured else last
        step_norm = torch.where(stands, step_norm, 0.0)
        if rules.from_anchor and may_wait and not rules.branches:
            # A stream that waits has the loss of what it predicts with, whatever the others of a stack do.
            first = torch.where(tried, first, loss_of(params))
        last = torch.where(stands, last, first)
        params, optimizer_state = _choose(
            rules, stands, (adapted.params, adapted.optimizer_state), (params, optimizer_state)
        )
        if rules.average is not None:
            decay = torch.where(stands, rules.average, 1.0)
            average = tree_map(lambda a, p: decay.to(p.dtype) * a + (1 - decay.to(p.dtype)) * p, average, params)

    counts = stream.counts
    after = Stream(
        params,
        optimizer_state,
        average,
        buffer,
        policy,
        guard,
        Counts(
            calls + 1,
            counts.adapted + stands,
            counts.waiting + (outcome == Outcome.WAITING) if may_wait else counts.waiting,
            counts.bad_data,
            counts.rolled_back + rolled_back,
            counts.resets + (by_policy | by_guard) if may_reset else counts.resets,
        ),
    )
    far = distance(in_use(after), rules.anchor) if measured else torch.full_like(first, torch.nan)
    why = torch.zeros_like(calls)
    if may_reset:
        why = torch.where(by_guard, Reset.GUARD, torch.where(by_policy, Reset.POLICY, Reset.NONE))
    report = Report(
        loss=first,
        loss_after=last,
        num_steps=rules.num_steps * stands,
        step_norm=step_norm,
        distance=far,
        outcome=outcome,
        reset=why,
    )
    if rules.branches:
        return after, report
    return _choose(rules, fine, (after, report), _untouched(rules, stream))  # type: ignore[no-any-return]


def _untouched(rules: Rules, stream: Stream) -> tuple[Stream, Report]:
    """A stream whose newest data cannot be used."""
    counts = stream.counts
    nan = torch.full_like(_one(rules.anchor), torch.nan)
    zero = torch.zeros_like(counts.calls)
    report = Report(nan, nan, zero, torch.zeros_like(nan), nan, zero + Outcome.BAD_DATA, zero)
    return stream._replace(counts=counts._replace(calls=counts.calls + 1, bad_data=counts.bad_data + 1)), report


def _loss(rules: Rules, params: Any, x: Tensor, y: Any, hidden: Any, reset: Any) -> tuple[Tensor, Any]:
    output, after = rules.forward(params, x, hidden, reset)
    return rules.loss_fn(output, y if isinstance(y, Tensor) else None), after


def _choose(rules: Rules, where: Tensor, true: Any, false: Any) -> Any:
    """One of two pytrees of the same structure."""
    if rules.branches:
        return true if bool(where) else false
    return tree_map(lambda a, b: torch.where(where, a, b), true, false)


def _one(params: Any) -> Tensor:
    """1 as a scalar with the dtype and device of the parameters."""
    leaf: Tensor = tree_leaves(params)[0]
    return torch.ones((), dtype=leaf.dtype, device=leaf.device)


def _scaled_by(scale: Tensor) -> GradientTransformation:
    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        del params, inplace
        return tree_map(lambda u: u * scale.to(u.dtype), updates), state

    return GradientTransformation(lambda params: (), update)
