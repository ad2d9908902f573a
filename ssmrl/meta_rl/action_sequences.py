"""Distributions over sequences of actions, for planners that sample: pure functions of one stream.

A plan is a distribution over the next H actions, a pytree of tensors. An action space says how one is begun, sampled,
fitted to weighted samples, and moved on by a step; noise comes as an argument. Letters: C candidates, H steps of the
horizon, A action components, or choices of a discrete action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["ActionSpace", "BoxActions", "CategoricalPlan", "DiscreteActions", "GaussianPlan", "colored_noise"]


class ActionSpace(Protocol):
    """What a planner needs to know of actions."""

    @property
    def size(self) -> int:
        """A, of the actions that a model sees."""

    def start(self, horizon: int) -> Any:
        """Return the plan that knows nothing."""

    def noise(self, shape: tuple[int, ...], generator: torch.Generator | None, *, exponent: float) -> Tensor:
        """Draw what `sample` needs, (..., H, A)."""

    def uniform(self, noise: Tensor) -> Tensor:
        """Return actions (..., H, A) that are uniform in the space, from this noise with `exponent` 0."""

    def sample(self, plan: Any, noise: Tensor) -> Tensor:
        """Return sequences of actions (C, H, A) from noise (C, H, A)."""

    def fit(self, plan: Any, actions: Tensor, weights: Tensor, *, smoothing: float, scale: bool) -> Any:
        """Return the plan of maximum likelihood for sequences (C, H, A) with weights (C,) that sum to 1."""

    def shifted(self, plan: Any) -> Any:
        """Return the plan one step later, as wide as at first."""

    def first(self, plan: Any) -> Tensor:
        """Return the action to take now: float (A,), or Int64 ()."""


class GaussianPlan(NamedTuple):
    """Independent normal components, clipped to the bounds; (H, A) each."""

    mean: Tensor
    scale: Tensor
    """Standard deviations."""


class CategoricalPlan(NamedTuple):
    """Independent choices."""

    probabilities: Tensor
    """(H, A) of every choice."""


class BoxActions:
    """Actions in a box, low ≤ a ≤ high in every component.

    Args:
        low, high: (A,) numbers, finite, low ≤ high; as tensors, in the dtype and on the device of what is planned.
        initial_scale: of a plan that knows nothing, in halves of high - low. Its mean is the middle of the box.

    Raises:
        TypeError, ValueError: bounds between which there is nothing, or that are not finite; a scale ≤ 0.
    """

    def __init__(self, low: Tensor | Sequence[float], high: Tensor | Sequence[float], *, initial_scale: float = 0.5):
        self.low, self.high = (
            bound if isinstance(bound, Tensor) else torch.tensor(bound, dtype=torch.get_default_dtype())
            for bound in (low, high)
        )
        if self.low.dim() != 1 or self.low.shape != self.high.shape or not len(self.low):
            raise ValueError(
                f"low and high must have the same shape (A,), A >= 1; got {tuple(self.low.shape)} and "
                f"{tuple(self.high.shape)}."
            )
        for index, (low_i, high_i) in enumerate(zip(self.low.tolist(), self.high.tolist(), strict=True)):
            if not -torch.inf < low_i <= high_i < torch.inf:
                raise ValueError(
                    f"low and high must be finite, and low <= high; got {low_i} and {high_i} for component {index}."
                )
        if not 0 < initial_scale < torch.inf:
            raise ValueError(f"initial_scale must be > 0 and finite; got {initial_scale}.")
        self.initial_scale = initial_scale

    @property
    def size(self) -> int:
        """A."""
        return len(self.low)

    def start(self, horizon: int) -> GaussianPlan:
        """Return the middle of the box, and the initial scale, (H, A) each."""
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        return GaussianPlan(middle.expand(horizon, -1).clone(), (self.initial_scale * half).expand(horizon, -1).clone())

    def noise(self, shape: tuple[int, ...], generator: torch.Generator | None, *, exponent: float = 0.0) -> Tensor:
        """Draw standard normal numbers (..., H, A); with an exponent coloured ones, see `colored_noise`."""
        return colored_noise(shape, exponent, generator, dtype=self.low.dtype, device=self.low.device)

    def uniform(self, noise: Tensor) -> Tensor:
        """Return low + (high - low) Φ(ε): uniform for standard normal ε."""
        spread: Tensor = torch.special.ndtr(noise)
        return self.low + (self.high - self.low) * spread

    def sample(self, plan: GaussianPlan, noise: Tensor) -> Tensor:
        """Return μ + σ ∘ ε, clipped to the box."""
        return torch.clamp(plan.mean + plan.scale * noise, self.low, self.high)

    def fit(
        self, plan: GaussianPlan, actions: Tensor, weights: Tensor, *, smoothing: float = 0.0, scale: bool = True
    ) -> GaussianPlan:
        """Return weighted mean and deviation, of which a part `smoothing` is that of `plan`; `scale` False keeps it."""
        mean = torch.einsum("c,cha->ha", weights, actions)
        kept = plan.scale
        if scale:
            found = torch.einsum("c,cha->ha", weights, (actions - mean).square()).sqrt()
            kept = torch.lerp(found, plan.scale, smoothing)
        # Rounding can bring a mean of points on the boundary over it.
        return GaussianPlan(torch.clamp(torch.lerp(mean, plan.mean, smoothing), self.low, self.high), kept)

    def shifted(self, plan: GaussianPlan) -> GaussianPlan:
        """Return the means of steps 1 to H - 1, and for the last one that of the step before it."""
        return GaussianPlan(torch.cat([plan.mean[1:], plan.mean[-1:]]), self.start(len(plan.mean)).scale)

    def first(self, plan: GaussianPlan) -> Tensor:
        """Return the mean of the first step (A,)."""
        return plan.mean[0]


class DiscreteActions:
    """One of A choices in every step; the model sees it one-hot.

    Args:
        number: A >= 1.
        floor: every choice keeps this share of the uniform probability in a plan that is moved on, so that none is
            lost for ever; in [0, 1].
        dtype, device: of what is planned; None: PyTorch's default.
    """

    def __init__(
        self,
        number: int,
        *,
        floor: float = 0.5,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"number must be an integer; got {type(number).__name__}.")
        if number < 1:
            raise ValueError(f"number must be at least 1; got {number}.")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor must be in [0, 1]; got {floor}.")
        self.number, self.floor = number, floor
        self._like = torch.empty(0, dtype=dtype, device=device)

    @property
    def size(self) -> int:
        """A."""
        return self.number

    def start(self, horizon: int) -> CategoricalPlan:
        """Return equal probabilities."""
        return CategoricalPlan(self._like.new_full((horizon, self.number), 1 / self.number))

    def noise(self, shape: tuple[int, ...], generator: torch.Generator | None, *, exponent: float = 0.0) -> Tensor:
        """Draw from Gumbel's distribution, (..., H, A); there is no colour to it."""
        if exponent:
            raise ValueError(f"Noise of discrete actions has no colour: noise_exponent must be 0; got {exponent}.")
        drawn = torch.empty(shape, dtype=self._like.dtype, device=self._like.device)
        return -drawn.exponential_(generator=generator).log()

    def uniform(self, noise: Tensor) -> Tensor:
        """Return choices of equal probability, one-hot."""
        return _one_hot(noise)

    def sample(self, plan: CategoricalPlan, noise: Tensor) -> Tensor:
        """Return choices arg max (log p + g), one-hot (C, H, A): of probability p for g of Gumbel's distribution."""
        return _one_hot(plan.probabilities.log() + noise)

    def fit(
        self, plan: CategoricalPlan, actions: Tensor, weights: Tensor, *, smoothing: float = 0.0, scale: bool = True
    ) -> CategoricalPlan:
        """Return weighted frequencies, of which a part `smoothing` is that of `plan`."""
        found = torch.einsum("c,cha->ha", weights, actions)
        return CategoricalPlan(torch.lerp(found, plan.probabilities, smoothing))

    def shifted(self, plan: CategoricalPlan) -> CategoricalPlan:
        """Return the probabilities of steps 1 to H - 1 and 1/A for the last one, each a part `floor` uniform."""
        start = self.start(len(plan.probabilities)).probabilities
        moved = torch.cat([plan.probabilities[1:], start[-1:]])
        return CategoricalPlan(torch.lerp(moved, start, self.floor))

    def first(self, plan: CategoricalPlan) -> Tensor:
        """Return the most probable choice in the first step, Int64 ()."""
        return plan.probabilities[0].argmax()


def colored_noise(
    shape: tuple[int, ...],
    exponent: float,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw Gaussian noise (..., H, A) of variance 1 whose power over frequency f along the H steps is f^-exponent.

    0 is white: independent steps. With 2 to 4 sequences keep a direction for a while, which finds better plans for
    systems with inertia (Pinneri et al. 2020, "iCEM", https://arxiv.org/abs/2008.06389, section 3.1). The lowest
    frequency's power is that of 1/H, as there.
    """
    white = torch.randn(shape, generator=generator, dtype=dtype, device=device)
    horizon = shape[-2]
    if exponent == 0 or horizon == 1:
        return white
    frequency = torch.fft.rfftfreq(horizon, dtype=dtype, device=device).clamp_min(1 / horizon)
    gain = frequency ** (-exponent / 2)
    # A real sequence has every frequency twice but the first, and the last of an even number of steps.
    twice = torch.full_like(gain, 2.0)
    twice[0] = 1.0
    if horizon % 2 == 0:
        twice[-1] = 1.0
    gain = gain / ((twice * gain.square()).sum() / horizon).sqrt()
    coloured: Tensor = torch.fft.irfft(torch.fft.rfft(white, dim=-2) * gain[:, None], n=horizon, dim=-2)
    return coloured


def _one_hot(score: Tensor) -> Tensor:
    choices = torch.arange(score.shape[-1], device=score.device)
    return (score.argmax(-1, keepdim=True) == choices).to(score.dtype)
