"""What outer updates do where a loss, a gradient or a weight is not finite."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from ssmrl.adaptation.optim import check_num_steps

__all__ = ["NonFinite", "Updates", "all_finite", "copy_of", "go_back"]

Result = TypeVar("Result")
Action = Literal["raise", "skip", "roll back"]


@dataclass(frozen=True)
class NonFinite:
    """What to do where a loss, a gradient or a weight is not finite in an outer update.

    - "raise": end with a FloatingPointError that says what is not finite, where it can the tasks or parameters; the
      model is as before the update.
    - "skip": leave the update out, and count it. For tasks whose inner steps run away now and then.
    - "roll back": leave it out, and go back to the weights and the optimizer of at most `every` updates before.
      For runs whose weights are near to where everything runs away.

    Losses and gradients are looked at before the step is made. A step on finite ones that makes a weight not finite, as
    a rate that is far too high does, cannot be taken back by "raise" and "skip", and is an error with both.

    Raises:
        TypeError, ValueError: another action, or a number out of its range.
    """

    action: Action = "raise"
    at_most: int = 5
    """So many of the last `of_last` updates may be left out; one more is an error, >= 0."""
    of_last: int = 100
    """> at_most."""
    every: int = 100
    """Updates from one copy that "roll back" goes back to, to the next, >= 1."""

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise ValueError(f"action must be one of {', '.join(map(repr, get_args(Action)))}; got {self.action!r}.")
        check_num_steps("at_most", self.at_most)
        if check_num_steps("of_last", self.of_last) <= self.at_most:
            raise ValueError(f"of_last must be larger than at_most; got {self.of_last} and {self.at_most}.")
        if check_num_steps("every", self.every) < 1:
            raise ValueError(f"every must be at least 1; got {self.every}.")


class Updates:
    """Runs outer updates, and counts and handles those that are not finite as a `NonFinite` says.

    Args:
        nonfinite: the policy; None: "raise".
        learned: gives what the updates change.
        optimizer: what learns it, if anything does that is to go back with it.

    Attributes:
        made: how many updates were asked for.
        left_out: how many of them were left out.
    """

    def __init__(
        self,
        nonfinite: NonFinite | None,
        learned: Callable[[], Sequence[Tensor]],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if nonfinite is not None and not isinstance(nonfinite, NonFinite):
            raise TypeError(f"nonfinite must be a NonFinite; got {type(nonfinite).__name__}.")
        self.nonfinite = NonFinite() if nonfinite is None else nonfinite
        self.learned = learned
        self.optimizer = optimizer
        self.made = self.left_out = 0
        self._recent: list[int] = []  # those of the last `of_last` updates that were left out
        self._copy: dict[str, Any] | None = None
        self._since = 0  # good updates since the copy

    def __call__(self, update: Callable[[], Result], otherwise: Result) -> Result:
        """Return what the update returns, or `otherwise` where it was left out.

        Args:
            update: makes a step, or raises FloatingPointError and leaves all as it was.

        Raises:
            FloatingPointError: as the policy has it.
        """
        rolls_back = self.nonfinite.action == "roll back"
        if rolls_back and (self._copy is None or self._since >= self.nonfinite.every):
            self._copy, self._since = copy_of(self.learned(), self.optimizer), 0
        self.made += 1
        try:
            result = update()
            self._check_weights()
        except FloatingPointError as error:
            self._leave_out(error)
            return otherwise
        self._since += 1
        return result

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the copy that "roll back" would go back to: a tree for `save_checkpoint`."""
        return {
            "made": self.made,
            "left_out": self.left_out,
            "recent": list(self._recent),
            "since": self._since,
            "copy": copy.deepcopy(self._copy),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.made, self.left_out, self._since = state["made"], state["left_out"], state["since"]
        self._recent, self._copy = list(state["recent"]), copy.deepcopy(state["copy"])

    def _leave_out(self, error: FloatingPointError) -> None:
        policy = self.nonfinite
        unharmed = all_finite(self.learned())
        if policy.action == "roll back" and self._copy is not None:
            go_back(self._copy, self.learned(), self.optimizer)
            self._since = 0
        elif policy.action == "raise" or not unharmed:
            raise error
        self.left_out += 1
        self._recent = [n for n in self._recent if n > self.made - policy.of_last] + [self.made]
        if len(self._recent) > policy.at_most:
            raise FloatingPointError(
                f"{len(self._recent)} of the last {min(policy.of_last, self.made)} updates were not finite, of which "
                f"{policy.at_most} may be left out. The last one: {error}"
            ) from error

    def _check_weights(self) -> None:
        if not all_finite(self.learned()):
            bad = [tuple(p.shape) for p in self.learned() if not bool(torch.isfinite(p).all())]
            raise FloatingPointError(
                f"The outer step made weights of shapes {bad} not finite, and they are lost. Lower the outer rate, go "
                f'on from a checkpoint, or take nonfinite=NonFinite("roll back").'
            )


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every element of all of them is finite."""
    return bool(torch.isfinite(nn.utils.get_total_norm([t for t in tensors if t.numel()], torch.inf)))


def copy_of(learned: Sequence[Tensor], optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """A copy of tensors, and of the state of the optimizer that learns them, that `go_back` goes back to."""
    return {
        "learned": [p.detach().clone() for p in learned],
        "optimizer": None if optimizer is None else copy.deepcopy(optimizer.state_dict()["state"]),
    }


@torch.no_grad()
def go_back(to: dict[str, Any], learned: Sequence[Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write a copy back; rates and other settings of the optimizer stay, so that a schedule of them goes on."""
    for p, value in zip(learned, to["learned"], strict=True):
        p.copy_(value)
    if optimizer is not None:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": copy.deepcopy(to["optimizer"]), "param_groups": groups})
