"""Adapter: the inner loop on one live model, at test time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchopt.base import GradientTransformation

from ssmrl.adaptation.checks import check_finite, check_pair, check_reset_mask, check_state
from ssmrl.adaptation.guard import Guard
from ssmrl.adaptation.live import LiveModel
from ssmrl.adaptation.losses import mse_loss
from ssmrl.adaptation.optim import (
    DEFAULT_LEARNING_RATE,
    check_num_steps,
    check_positive,
    check_rate,
    sgd_unless_given,
)
from ssmrl.adaptation.resets import ResetPolicy
from ssmrl.adaptation.select import Selector
from ssmrl.adaptation.stream import Counts, Outcome, Reset, Stream, begin, update
from ssmrl.adaptation.trace import Traced, check_compile
from ssmrl.adaptation.tree import tree_map
from ssmrl.adaptation.window import Window

__all__ = ["AdaptationConfig", "Adapter", "Snapshot", "Update"]


@dataclass(frozen=True)
class AdaptationConfig:
    """How an `Adapter`, or every stream of a `StreamAdapter`, adapts. What is not asked for costs nothing.

    Raises:
        TypeError, ValueError: a value out of its range, an `optimizer` that is not TorchOpt's, an `optimizer` beside a
            `learning_rate` that it would not use, or `importance` without a pull that it would weigh.
    """

    learning_rate: float = DEFAULT_LEARNING_RATE
    """Rate of the default optimizer, `torchopt.sgd`."""
    num_steps: int = 5
    """Gradient steps K per update."""
    optimizer: GradientTransformation | None = None
    """Any TorchOpt gradient transformation, with its own rate, in place of SGD. Its state is carried from update to
    update."""
    adapted: Selector | Iterable[Selector] | None = None
    """Which parameters adapt, as `ssmrl.adaptation.select` chooses them; None: all that require a gradient."""
    max_grad_norm: float | None = None
    """Clip the global norm of every gradient to this; None: do not."""
    max_distance: float | None = None
    """Trust region: after every step ‖θ - anchor‖ is at most this, by projection; None: no bound."""
    anchor_strength: float = 0.0
    """λ of a pull to the anchor, the gradient of λ/2 Σ F (θ - anchor)²."""
    importance: Mapping[str, Tensor] | None = None
    """F of that pull, name -> weights, such as `fisher_information`; None: 1."""
    average: float | None = None
    """Decay of an exponential average of the weights over updates, which is what is written into the model; 0 < d < 1.
    None: the weights themselves."""
    from_anchor: bool = False
    """Start every update from the anchor, with a fresh optimizer, instead of carrying on (GrBAL, Nagabandi et al. 2019,
    https://arxiv.org/abs/1803.11347)."""
    every: int = 1
    """Look at every transition, and adapt at every n-th."""
    window: Window | None = None
    """Adapt to the last transitions; None: to the data of each call alone."""
    reset: ResetPolicy | None = None
    """When to go back to the anchor by itself: `reset_every`, `reset_at_episode_end`, `reset_on_rise`; None: never."""
    guard: Guard | None = None
    """What bounds the harm that adaptation can do; None: nothing but refusing values that are not finite."""

    def __post_init__(self) -> None:
        check_num_steps("num_steps", self.num_steps)
        self.transformation()
        for name in ("max_grad_norm", "max_distance", "average"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.average is not None and self.average >= 1:
            raise ValueError(f"average must be below 1; got {self.average}.")
        check_rate("anchor_strength", self.anchor_strength)
        if self.importance is not None and self.anchor_strength == 0:
            raise ValueError("importance would be ignored: anchor_strength is 0.")
        if check_num_steps("every", self.every) < 1:
            raise ValueError(f"every must be at least 1; got {self.every}.")
        for name, kind in (("window", Window), ("reset", ResetPolicy), ("guard", Guard)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__} or None; got {value!r}.")

    def transformation(self) -> GradientTransformation:
        """The TorchOpt gradient transformation that learning rate and optimizer mean."""
        return sgd_unless_given(self.optimizer, self.learning_rate, name="optimizer", rate_name="learning_rate")


class Update(NamedTuple):
    """What one update did."""

    loss: float
    """The loss of the data, or of the window, before the first gradient step; NaN if the data were not finite."""
    loss_after: float
    """And with the weights that stand after it."""
    num_steps: int
    """Gradient steps that stand: K or 0."""
    step_norm: float
    """Euclidean distance that the weights went, resets apart."""
    distance: float
    """Euclidean distance of the weights in use from the anchor."""
    outcome: Outcome
    """Whether the model adapted, or why not."""
    reset: Reset
    """Whether it went back to the anchor first, and why."""


class Snapshot(NamedTuple):
    """All that an adapter has changed and will go on from, as copies."""

    weights: dict[str, Tensor]
    stream: Stream | None
    example: Any = None
    """Data like those that the stream was begun for."""


class Adapter:
    """Adapts a live model to the transitions it is given.

    Every `update_step` makes K gradient steps with `ssmrl.adaptation.adapt`, the procedure that MetaMAML trains for,
    and writes the result into `model`: a loop that calls `model(x, h)` sees it.

    The *anchor* is the weights that the model had when the adapter was made. `with Adapter(...) as adapter:` leaves the
    model as it was at the beginning of the block.

    Args:
        model: any module; the parameters that `config.adapted` selects adapt, the others and the buffers do not.
        config: rate, steps, optimizer, and what else is asked for.
        device: where the model is and the data will come from.
        loss_fn: (output, y) -> scalar; (output, None) where there are no targets. With a window it is taken of every
            step, (B, O), and averaged.
        compile: True: record the update once for given shapes and compile it with TorchInductor, several times as fast;
            "trace": record and replay it. It takes seconds, and the same shapes in every call to pay.

    Raises:
        TypeError, ValueError: the model is not on `device`, or has nothing to adapt; settings that do not fit it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdaptationConfig | None = None,
        device: torch.device | str = "cpu",
        *,
        loss_fn: Callable[[Tensor, Any], Tensor] = mse_loss,
        compile: bool | Literal["trace"] = False,
    ) -> None:
        self.model = model
        self.config = AdaptationConfig() if config is None else config
        self.loss_fn = loss_fn
        self.compile = check_compile(compile)
        self._device = device
        self._live = self._begun(None)
        self._stream: Stream | None = None
        self._example: tuple[Any, ...] | None = None  # of the data that the stream was begun for
        self._entered: list[Snapshot] = []
        self._traced = self._recorded()

    def update_step(
        self, x: Tensor, y: Tensor | None, hidden_state: Any, *, reset: Tensor | bool | None = None
    ) -> tuple[float, int]:
        """Adapt the model to one batch of transitions.

        Args:
            x: (B, D) one step, or (B, T, D) a sequence; with a window, one step.
            y: the targets, with the leading axes of `x`; None for a loss that needs none.
            hidden_state: the state before `x`. It is detached, never advanced between the gradient steps and
                never changed; None means the model's `init_hidden`, or no state for a model without one.
            reset: Bool (B,) or (B, T), or one for all: where an episode begins, so that the state is forgotten before
                that input; None: nowhere.

        Returns:
            The loss *before* the first gradient step, of the window where there is one, and the number of steps that
            stand: K, or 0 for an update that was skipped or rolled back.

        Raises:
            TypeError, ValueError: data of a wrong shape, dtype or device, or an empty batch; without a guard also data
                that are not finite, which with one are skipped.
            FloatingPointError: without a guard, the steps led to a non-finite loss or weight (a rate that is too high),
                which with one is rolled back. After an error the model and all that is carried are as before.
        """
        done = self._update(x, y, hidden_state, reset, measured=False)
        return done.loss, done.num_steps

    def update(self, x: Tensor, y: Tensor | None, hidden_state: Any, *, reset: Tensor | bool | None = None) -> Update:
        """`update_step`, and what it did in numbers, for the price of one more evaluation of the loss."""
        return self._update(x, y, hidden_state, reset, measured=True)

    @torch.no_grad()  # data, state and what loss_fn closes over leave no graph
    def _update(self, x: Tensor, y: Any, hidden_state: Any, reset: Any, *, measured: bool) -> Update:
        live = self._live
        check_pair("x", x, "y", y, live.like, optional=True)
        check_state("hidden_state", hidden_state, live.like, finite=False)
        data = live.data(x, y, hidden_state, check_reset_mask(reset, x), x.shape[0])
        stream = self._stream
        if stream is None:
            stream, self._example = begin(live.rules, *data), tree_map(torch.zeros_like, data)
        stream, data = live.fitted(stream, data, axis=1)
        if self.config.average is None:
            stream = stream._replace(params=live.read())
        if self.compile is False:
            after, report = update(live.rules, stream, *data, measured=measured)
        else:
            after, report = self._traced[measured](stream, live.others(), *data)
        done = Update(
            *(
                kind(value)
                for kind, value in zip(_KINDS, torch.stack([value.double() for value in report]).tolist(), strict=True)
            )
        )
        if done.outcome is Outcome.BAD_DATA and self.config.guard is None:
            for name, value in (("x", x), ("y", y)):
                if value is not None:
                    check_finite(name, value)
            check_state("hidden_state", hidden_state, live.like)
        if done.outcome is Outcome.NOT_FINITE and self.config.guard is None:
            raise FloatingPointError(
                f"Adaptation made {'weights' if torch.isfinite(report.loss) else 'loss'!r} non-finite; the model is "
                f"untouched. Lower the learning rate."
            )
        self._stream = after
        if done.num_steps or done.reset or self.config.average is not None:
            live.write(after)
        return done

    @property
    def counts(self) -> Counts | None:
        """How many updates there were, and how they ended, since the adapter began or was reset; None before any."""
        return None if self._stream is None else Counts(*map(int, self._stream.counts))  # type: ignore[arg-type]

    def reset(self) -> None:
        """Bring back the weights that the adapter was made with, bit for bit, and begin anew in everything else."""
        self._live.write_anchor()
        self._stream = None

    def snapshot(self) -> Snapshot:
        """A copy of the adapted weights and of everything that is carried from update to update."""
        stream = None if self._stream is None else tree_map(torch.clone, self._stream)
        return Snapshot(self._live.weights(), stream, self._example)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this adapter, bit for bit; it can be restored again."""
        self._live.load(snapshot.weights)
        stream = snapshot.stream
        self._stream = None if stream is None else tree_map(torch.clone, stream)
        self._example = snapshot.example

    def state_dict(self) -> dict[str, Any]:
        """Anchor, weights, and all that is carried from update to update: a tree for `save_checkpoint`."""
        live = self._live
        return {
            "anchor": live.anchor(),
            "weights": live.weights(),
            "stream": live.saved(self._stream, self._example),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` of an adapter with the same settings returned, to the same bits.

        The weights that adapt are written into the model; the others are the caller's to load.

        Raises:
            ValueError: it is of another model, or of other settings; nothing has changed.
        """
        live = self._begun(state["anchor"])
        saved = state["stream"]
        stream, example = (None, None) if saved is None else live.loaded(saved, lambda one: one)
        live.load(live.checked(state["weights"]))
        self._live, self._stream, self._example = live, stream, example
        self._traced = self._recorded()

    def _begun(self, anchor: dict[str, Tensor] | None) -> LiveModel:
        return LiveModel(
            self.model, self.config, self._device, self.loss_fn, for_one=self.compile is False, anchor=anchor
        )

    def _recorded(self) -> dict[bool, Traced]:
        return {
            measured: Traced(self._live.update(measured=measured), inductor=self.compile is True)
            for measured in (True, False)
        }

    def __enter__(self) -> Adapter:
        """Remember the model as it is now."""
        self._entered.append(self.snapshot())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the model, and the adapter, as they were at the beginning of the block."""
        self.restore(self._entered.pop())


_KINDS: tuple[Callable[[float], Any], ...] = (
    float,
    float,
    int,
    float,
    float,
    lambda n: Outcome(int(n)),
    lambda n: Reset(int(n)),
)
