"""A live model as the pure functions of test-time adaptation see it: what adapts, what does not, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torchopt import pytree

from ssmrl.adaptation.anchor import pull_to_anchor, trust_region
from ssmrl.adaptation.optim import (
    clip_by_global_norm,
    treats_elements_alike,
    with_first_call,
    with_tensor_counts,
)
from ssmrl.adaptation.select import select, split, trainable_parameters
from ssmrl.adaptation.stream import Report, Rules, Stream, begin, in_use, update
from ssmrl.adaptation.tree import is_there, tree_leaves, tree_map
from ssmrl.adaptation.updates import differentiable_update
from ssmrl.adaptation.window import Buffer
from ssmrl.core.base import functional_forward, initial_state

if TYPE_CHECKING:
    from ssmrl.adaptation.test_time_adaptation import AdaptationConfig

__all__ = ["LiveModel"]


class LiveModel:
    """What an `Adapter` and a `StreamAdapter` share: the rules of adaptation for one model.

    Args:
        for_one: for one stream, decided with Python's `if`. Its parameters are one vector where the optimizer allows
            it, which saves the better part of an update of a small model.
        anchor: name -> tensor, where the weights that adapt begin; None: as they are in the model.

    Attributes:
        rules: the settings of `ssmrl.adaptation.stream.update`.
        like: a weight of the model, whose dtype and device the data must have.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdaptationConfig,
        device: torch.device | str,
        loss_fn: Callable[[Tensor, Any], Tensor],
        *,
        for_one: bool,
        anchor: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        trainable = trainable_parameters(model)
        names = list(trainable) if config.adapted is None else select(model, config.adapted)
        self.params, _ = split(trainable, names)
        self.like = next(iter(self.params.values()))
        expected = torch.empty(0, device=device).device
        if self.like.device != expected:
            raise ValueError(
                f"The model must be on device {str(expected)!r}; it is on {str(self.like.device)!r}: "
                f"move it, or pass device={str(self.like.device)!r}."
            )
        optimizer = config.transformation()
        self._as_vector = for_one and treats_elements_alike(optimizer)
        self._sizes = [p.numel() for p in self.params.values()]
        self._shapes = [p.shape for p in self.params.values()]
        start = self.read() if anchor is None else self._packed(self.checked(anchor), copy=True)
        before, after = [], []
        if config.anchor_strength:
            importance = config.importance
            if importance is not None:
                importance = self._packed(_in_order(importance, self.params))
            before.append(pull_to_anchor(start, config.anchor_strength, importance))
        if config.max_grad_norm is not None:
            before.append(clip_by_global_norm(config.max_grad_norm))
        if config.max_distance is not None:
            after.append(trust_region(start, config.max_distance))
        self.rules = Rules(
            forward=partial(self.forward, {}),
            loss_fn=loss_fn,
            before=tuple(before),
            optimizer=with_first_call(optimizer if for_one else with_tensor_counts(optimizer)),
            after=tuple(after),
            num_steps=config.num_steps,
            anchor=start,
            average=config.average,
            from_anchor=config.from_anchor,
            every=config.every,
            window=config.window,
            policy=config.reset,
            guard=config.guard,
            branches=for_one,
        )
        if not for_one:
            self._require_tensors_alone()

    # The model's own tensors.

    def read(self) -> Any:
        """The live weights that adapt, as the pure functions have them; a copy."""
        with torch.no_grad():
            return self._packed({name: p.detach() for name, p in self.params.items()}, copy=True)

    def weights(self) -> dict[str, Tensor]:
        """Copies of the live weights that adapt, by name."""
        return {name: p.detach().clone() for name, p in self.params.items()}

    def anchor(self) -> dict[str, Tensor]:
        """Copies of the weights that adaptation begins from, by name."""
        return {name: p.clone() for name, p in self.named(self.rules.anchor).items()}

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Write these weights into the model."""
        for name, p in self.params.items():
            p.copy_(weights[name])

    def write(self, stream: Stream) -> None:
        """Write what a stream predicts with into the model."""
        self.load(self.named(in_use(stream)))

    def write_anchor(self) -> None:
        """Write the weights into the model that it had at first."""
        self.load(self.named(self.rules.anchor))

    def others(self) -> dict[str, Tensor]:
        """What does not adapt, as it is now, by name."""
        named = {name: p.detach() for name, p in self.model.named_parameters() if name not in self.params}
        return {**named, **dict(self.model.named_buffers())}

    # A stream as a tree of dicts and lists, and back.

    def saved(self, stream: Stream | None, example: tuple[Any, ...] | None) -> dict[str, Any] | None:
        """What a stream, or a stack of them, holds.

        Args:
            example: x, y, hidden and reset of one stream, whose shapes it was begun for.
        """
        if stream is None:
            return None
        assert example is not None
        x, y, hidden, reset = example
        if isinstance(stream.buffer, Buffer) and isinstance(stream.buffer.reset, Tensor):  # it may have come later
            reset = torch.zeros(x.shape[:1], dtype=torch.bool, device=x.device)
        data = {
            "x": x,
            "y": y if isinstance(y, Tensor) else None,
            "hidden": tree_leaves(hidden),
            "reset": reset if isinstance(reset, Tensor) else None,
        }
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(stream)]
        return {"data": data, "leaves": leaves}

    def loaded(self, saved: dict[str, Any], stacked: Callable[[Any], Any]) -> tuple[Stream, tuple[Any, ...]]:
        """The stream, or stack of them, and the example that `saved` was given.

        Args:
            stacked: makes as many of one stream as there are.

        Raises:
            ValueError: it was saved by an adapter with other settings, or of another model.
        """
        held = saved["data"]
        x = held["x"].to(self.like.device)
        state: Any = initial_state(self.model, len(x)) if held["hidden"] else ()
        _, structure = pytree.tree_flatten(state)
        if structure.num_leaves != len(held["hidden"]):
            raise ValueError(
                f"The state must be of a model with {structure.num_leaves} tensors in its hidden state; it is of one "
                f"with {len(held['hidden'])}."
            )
        to = partial(torch.Tensor.to, device=x.device)
        hidden = pytree.tree_unflatten(structure, [to(leaf) for leaf in held["hidden"]]) if held["hidden"] else ()
        y, reset = (() if held[name] is None else to(held[name]) for name in ("y", "reset"))
        example = (x, y, hidden, reset)
        leaves, structure = pytree.tree_flatten(stacked(begin(self.rules, *example)))
        if [_kind(leaf) for leaf in leaves] != [_kind(leaf) for leaf in saved["leaves"]]:
            raise ValueError("The state must be of an adapter with the same settings, for the same model; it is not.")
        new = [leaf.to(x.device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in saved["leaves"]]
        stream: Any = pytree.tree_unflatten(structure, new)
        return stream, example

    # Pure functions.

    def named(self, params: Any) -> dict[str, Tensor]:
        """Parameters by name."""
        if not self._as_vector:
            result: dict[str, Tensor] = params
            return result
        pieces = params.split(self._sizes)
        return {
            name: piece if len(shape) == 1 else piece.view(shape)
            for name, piece, shape in zip(self.params, pieces, self._shapes, strict=True)
        }

    def checked(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """These weights, if they are those that adapt."""
        expected, got = ({name: tuple(p.shape) for name, p in some.items()} for some in (self.params, weights))
        if expected != got:
            raise ValueError(f"The state must be of weights {expected} that adapt; it is of {got}.")
        return {name: weights[name].to(self.like.device) for name in self.params}

    def _packed(self, params: dict[str, Tensor], *, copy: bool = False) -> Any:
        if self._as_vector:
            return torch.cat([p.reshape(-1) for p in params.values()])
        return {name: p.clone() for name, p in params.items()} if copy else params

    def forward(self, others: dict[str, Tensor], params: Any, x: Tensor, hidden: Any, reset: Any) -> tuple[Tensor, Any]:
        """The model with these parameters, as a pure function; () for a state or a mask that there is not."""
        output, after = functional_forward(
            self.model,
            {**others, **self.named(params)},
            x,
            hidden if is_there(hidden) else None,
            reset=reset if isinstance(reset, Tensor) else None,
        )
        return output, after if is_there(after) else ()

    def update(self, *, measured: bool, adapting: bool = True) -> Callable[..., tuple[Stream, Report]]:
        """(stream, others, x, y, hidden, reset) -> (stream, report), with all tensors of the model as arguments."""

        def run(stream: Stream, others: dict[str, Tensor], *data: Any) -> tuple[Stream, Report]:
            rules = replace(self.rules, forward=partial(self.forward, others))
            return update(rules, stream, *data, measured=measured, adapting=adapting)

        return run

    # Data.

    def data(self, x: Tensor, y: Any, hidden: Any, reset: Any, batch_size: int) -> tuple[Tensor, Any, Any, Any]:
        """x, y, hidden and reset, detached, with () for what there is not."""
        rules = self.rules
        if rules.window is not None and x.dim() != 2:
            raise ValueError(f"With a window, x must be one step, of shape (B, D); got {tuple(x.shape)}.")
        if hidden is None and (rules.window is not None or rules.guard is not None):
            # A state that is kept must be one.
            hidden = initial_state(self.model, batch_size)
        hidden = tree_map(Tensor.detach, hidden) if is_there(hidden) else ()
        return x.detach(), () if y is None else y.detach(), hidden, () if reset is None else reset

    def fitted(self, stream: Stream, data: tuple[Any, ...], axis: int) -> tuple[Stream, tuple[Any, ...]]:
        """Stream and data with a mask of episodes in both or neither; refuses data unlike those in the window.

        Args:
            axis: that of the places of the window, 1 for one stream, and 2 for many.
        """
        buffer = stream.buffer
        if not isinstance(buffer, Buffer):
            return stream, data
        for name, held, new in zip(("x", "y", "hidden_state"), buffer, data, strict=False):
            was = [(*t.shape[:axis], *t.shape[axis + 1 :]) for t in tree_leaves(held)]
            now = [tuple(t.shape) for t in tree_leaves(new)]
            if was != now:
                raise ValueError(
                    f"{name} must have the shapes that it had when the window was begun, {was}; got {now}. "
                    f"reset() begins a new one."
                )
        x, y, hidden, reset = data
        if isinstance(reset, Tensor) and not isinstance(buffer.reset, Tensor):
            mask = torch.zeros(buffer.x.shape[: axis + 1], dtype=torch.bool, device=x.device)
            stream = stream._replace(buffer=buffer._replace(reset=mask))
        elif isinstance(buffer.reset, Tensor) and not isinstance(reset, Tensor):
            reset = torch.zeros(x.shape[:axis], dtype=torch.bool, device=x.device)
        return stream, (x, y, hidden, reset)

    def _require_tensors_alone(self) -> None:
        """Refuse an optimizer that decides by its state in Python: it cannot have one for every stream."""
        rules = self.rules
        update = differentiable_update(rules.optimizer)

        def step(gradient: Any, state: Any) -> Any:
            return update(gradient, state, rules.anchor, first=False)

        one = tree_map(lambda leaf: leaf[None], (rules.anchor, rules.optimizer.init(rules.anchor)))
        try:
            vmap(step)(*one)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                "optimizer must keep all its state in tensors, and decide nothing in Python by them, to run for many "
                "streams or compiled, which torchopt.radam does not; take another one."
            ) from error


def _kind(leaf: Any) -> Any:
    return (leaf.dtype, tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf)


def _in_order(importance: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if importance.keys() != params.keys():
        raise ValueError(
            f"importance must have the names of the parameters that adapt, {list(params)}; got {list(importance)}."
        )
    return {name: importance[name].detach() for name in params}
