"""Adapter: the inner loop on one live model, at test time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchopt.base import GradientTransformation

from ssmrl.adaptation.checks import check_finite, check_pair, check_state
from ssmrl.adaptation.inner_loop import adapt
from ssmrl.adaptation.losses import mse_loss
from ssmrl.adaptation.optim import DEFAULT_LEARNING_RATE, check_num_steps, sgd_unless_given
from ssmrl.adaptation.select import trainable_parameters
from ssmrl.core.base import functional_forward

__all__ = ["AdaptationConfig", "Adapter"]


@dataclass(frozen=True)
class AdaptationConfig:
    """How an `Adapter` adapts.

    Raises:
        TypeError, ValueError: a negative or non-finite rate, a negative number of steps, an `optimizer` that is
            not TorchOpt's, or an `optimizer` beside a `learning_rate` that it would not use.
    """

    learning_rate: float = DEFAULT_LEARNING_RATE
    """Rate of the default optimizer, `torchopt.sgd`."""
    num_steps: int = 5
    """Gradient steps K per `update_step`."""
    optimizer: GradientTransformation | None = None
    """Any TorchOpt gradient transformation, with its own rate, in place of SGD."""

    def __post_init__(self) -> None:
        check_num_steps("num_steps", self.num_steps)
        self.transformation()

    def transformation(self) -> GradientTransformation:
        """The TorchOpt gradient transformation that these settings mean."""
        return sgd_unless_given(self.optimizer, self.learning_rate, name="optimizer", rate_name="learning_rate")


class Adapter:
    """Adapts a live model to the transitions it is given.

    Every `update_step` makes K gradient steps on one batch of data with `ssmrl.adaptation.adapt`, the procedure
    that MetaMAML trains for, and writes the result into `model`: a loop that calls `model(x, h)` sees it. The
    optimizer's state (moments, schedules) is carried from one `update_step` to the next.

    Args:
        model: any module; its parameters that require a gradient adapt, the others and the buffers do not.
        config: rate, steps, optimizer.
        device: where the model is and the data will come from.
        loss_fn: (output, y) -> scalar.

    Raises:
        ValueError: the model is not on `device`, or has nothing to adapt.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdaptationConfig | None = None,
        device: torch.device | str = "cpu",
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = mse_loss,
    ) -> None:
        self.model = model
        self.config = AdaptationConfig() if config is None else config
        self.loss_fn = loss_fn
        self._optimizer = self.config.transformation()
        self._optimizer_state: Any = None
        self._params = trainable_parameters(model)
        self._anchor = {name: p.detach().clone() for name, p in self._params.items()}
        self._like = next(iter(self._params.values()))
        expected = torch.empty(0, device=device).device
        if self._like.device != expected:
            raise ValueError(
                f"The model must be on device {str(expected)!r}; it is on {str(self._like.device)!r}: "
                f"move it, or pass device={str(self._like.device)!r}."
            )

    @torch.no_grad()  # the gradients are torch.func's; data, state and what loss_fn closes over leave no graph
    def update_step(self, x: Tensor, y: Tensor, hidden_state: Any) -> tuple[float, int]:
        """Adapt the model to one batch of transitions.

        Args:
            x: (B, D) one step, or (B, T, D) a window.
            y: the targets, with the leading axes of `x`.
            hidden_state: the state before `x`. It is detached, never advanced between the gradient steps and
                never changed; None means the model's `init_hidden`, or no state for a model without one.

        Returns:
            The loss *before* the first gradient step, and the number of steps taken.

        Raises:
            TypeError, ValueError: data of a wrong shape, dtype or device, or not finite, or an empty batch.
            FloatingPointError: the steps led to a non-finite loss or weight (a rate that is too high).
            After an error model and optimizer state are as before.
        """
        check_pair("x", x, "y", y, self._like)
        check_finite("x", x)
        check_finite("y", y)
        check_state("hidden_state", hidden_state, self._like)

        def loss(params: dict[str, Tensor]) -> Tensor:
            output, _ = functional_forward(self.model, params, x, hidden_state)
            return self.loss_fn(output, y)

        before: dict[str, Tensor] = dict(self._params)
        adapted = adapt(
            loss,
            before,
            optimizer=self._optimizer,
            num_steps=self.config.num_steps,
            optimizer_state=self._optimizer_state,
        )
        for name, value in (("loss", adapted.losses), *adapted.params.items()):
            if not torch.isfinite(value).all():
                raise FloatingPointError(
                    f"Adaptation made {name!r} non-finite; the model is untouched. Lower the learning rate."
                )
        self._write(adapted.params)
        self._optimizer_state = adapted.optimizer_state
        first = adapted.losses[0] if self.config.num_steps else loss(before)
        return float(first), len(adapted.losses)

    def reset(self) -> None:
        """Bring back the weights that the adapter was made with, bit for bit, and a fresh optimizer state."""
        self._write(self._anchor)
        self._optimizer_state = None

    def _write(self, params: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self._params.items():
                p.copy_(params[name])
