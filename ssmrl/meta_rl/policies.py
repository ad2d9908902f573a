"""Any sequence model as a policy: what its outputs mean as a distribution over actions, and as a value.

Letters: B rows, T steps, D inputs, O outputs of the model, A action components or number of actions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ssmrl.core import functional_forward
from ssmrl.core.base import check_dimensions, initial_state
from ssmrl.meta_rl.distributions import Categorical, Distribution, Gaussian, TanhGaussian

__all__ = ["CategoricalHead", "GaussianHead", "PolicyModel", "PolicyOutput"]


class PolicyOutput(NamedTuple):
    """What a policy says of every step."""

    distribution: Any
    """Over actions, its leaves (..., A): a `Gaussian`, `TanhGaussian` or `Categorical`."""
    value: Tensor | None
    """(...), of the input of the step; None of a policy without values."""


class Head(Protocol):
    """How features of the model become a distribution."""

    num_outputs: int
    """Outputs of the model that it takes."""

    def __call__(self, output: Tensor) -> Distribution:
        """Return the distribution of outputs (..., num_outputs)."""


class CategoricalHead(nn.Module):
    """Outputs are the logits of A actions."""

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        check_dimensions(num_actions=num_actions)
        self.num_outputs = num_actions

    def forward(self, output: Tensor) -> Categorical:
        """(..., A) -> a distribution over (...)."""
        return Categorical(output)


class GaussianHead(nn.Module):
    """Outputs are the means of A action components, and their log standard deviations where those depend on the input.

    Args:
        action_dim: A.
        log_std: of every component: the initial value of a parameter, or what is added to the output where it depends
            on the input.
        depends_on_input: whether the standard deviations are outputs of the model. False: A parameters.
        squash: actions are tanh of the Gaussian's, in (-1, 1).
        min_log_std: what log standard deviations are kept above, with derivative 0 below.
        device, dtype: of the parameter.
    """

    def __init__(
        self,
        action_dim: int,
        *,
        log_std: float = 0.0,
        depends_on_input: bool = False,
        squash: bool = False,
        min_log_std: float = math.log(1e-6),
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_dimensions(action_dim=action_dim)
        self.action_dim = action_dim
        if not math.isfinite(log_std):
            raise ValueError(f"`log_std` must be finite; got {log_std}.")
        self.num_outputs = 2 * action_dim if depends_on_input else action_dim
        self.squash, self.min_log_std = squash, min_log_std
        self.initial_log_std = log_std
        initial = torch.full((action_dim,), float(log_std), device=device, dtype=dtype)
        self.log_std = None if depends_on_input else nn.Parameter(initial)

    def forward(self, output: Tensor) -> Gaussian | TanhGaussian:
        """(..., num_outputs) -> a distribution over (..., A)."""
        mean = output[..., : self.action_dim]
        if self.log_std is None:
            log_std = output[..., self.action_dim :] + self.initial_log_std
        else:
            log_std = self.log_std.expand_as(mean)
        log_std = log_std.clamp(min=self.min_log_std)
        return TanhGaussian(mean, log_std) if self.squash else Gaussian(mean, log_std)


class PolicyModel(nn.Module):
    """A sequence model and a head: inputs -> a distribution over actions, and a value.

    Where the policy is to see its previous action and reward, they are part of the inputs, as `rollout(previous=True)`
    and `policy_inputs` have them.

    Args:
        model: a `StateModel`, or any module of its shape; its outputs (..., O) are what the head takes, and one more
            for the value where there is one.
        head: a `CategoricalHead`, a `GaussianHead`, or a module with `num_outputs`.
        has_value: whether the model's last output is the value.

    Raises:
        ValueError: the model says that it has another number of outputs (`output_dim`).
    """

    def __init__(self, model: nn.Module, head: Any, *, has_value: bool = False) -> None:
        super().__init__()
        needed = head.num_outputs + has_value
        outputs = getattr(model, "output_dim", needed)
        if outputs != needed:
            raise ValueError(f"`model` must have {needed} outputs, for the head and the value; got {outputs}.")
        self.model, self.head, self.has_value = model, head, has_value

    def init_hidden(self, batch_size: int = 1) -> Any:
        """The model's initial state, None of a model without one."""
        return initial_state(self.model, batch_size)

    def forward(self, x: Tensor, hidden_state: Any = None, reset: Tensor | None = None) -> tuple[PolicyOutput, Any]:
        """One step (B, D) or a sequence (B, T, D), with `reset` (B,) or (B, T), and the next state."""
        output, state = functional_forward(self.model, {}, x, hidden_state, reset=reset)
        features = output[..., : self.head.num_outputs]
        value = output[..., -1] if self.has_value else None
        return PolicyOutput(self.head(features), value), state

    def act(
        self, params: Mapping[str, Tensor], x: Tensor, hidden_state: Any, reset: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Any]:
        """One step of `ssmrl.env_runner.per_task`: actions (B,) or (B, A) by noise; without noise the most likely ones.

        Args:
            params: name -> tensor, in place of its own.
            x: (B, D).
            hidden_state: None: the initial one.
            reset: Bool (B,).
            noise: (B, A): standard normal for a Gaussian, standard Gumbel for a categorical distribution.
        """
        output, state = functional_forward(self, params, x, hidden_state, reset=reset)
        distribution: Any = output.distribution  # type: ignore[attr-defined]
        return (distribution.mode() if noise is None else distribution.sample(noise)), state
