"""Distributions of actions as tuples of tensors: pure functions that map with `vmap` and differentiate to every order.

`torch.distributions` draws its own noise and checks values on the host; here noise comes as an argument, so that a
policy is a pure function (`ssmrl.env_runner.per_task` draws it), and a distribution is a pytree, so that it can be
returned from `vmap` and stored as the one that acted. Letters: A action components, C choices; any leading axes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["Categorical", "Distribution", "Gaussian", "TanhGaussian"]


class Distribution(Protocol):
    """What losses need of a distribution; every result has its leading axes."""

    def log_prob(self, action: Tensor) -> Tensor:
        """Logarithm of the probability, or density, of an action."""

    def entropy(self) -> Tensor:
        """-E log p, in nats."""

    def kl(self, other: Any) -> Tensor:
        """KL(self ‖ other) = E_self [log p_self - log p_other], in nats."""


class Gaussian(NamedTuple):
    """Independent normal components: a = μ + σ ∘ ε, ε ~ N(0, 1)^A."""

    mean: Tensor
    """(..., A) μ."""
    log_std: Tensor
    """log σ, (..., A) or (A,) for all."""

    def log_prob(self, action: Tensor) -> Tensor:
        """Σ_i (-½ ((a_i - μ_i) / σ_i)² - log σ_i - ½ log 2π) of actions (..., A), (...)."""
        _check_action(action, self.mean.shape, "mean")
        z = (action - self.mean) * (-self.log_std).exp()
        return -(0.5 * z.square() + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Σ_i (log σ_i + ½ log 2πe), (...)."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).expand(self.mean.shape).sum(-1)

    def kl(self, other: Gaussian) -> Tensor:
        """Σ_i (log σ'_i / σ_i + (σ_i² + (μ_i - μ'_i)²) / 2σ'_i² - ½), (...); the primes are `other`'s."""
        _check_other(self, other)
        ratio = self.log_std - other.log_std
        z = (self.mean - other.mean) * (-other.log_std).exp()
        return (0.5 * ((2 * ratio).exp() + z.square() - 1) - ratio).sum(-1)

    def sample(self, noise: Tensor) -> Tensor:
        """The action μ + σ ∘ ε (..., A) for standard normal noise ε (..., A); differentiable in μ and σ."""
        _check_noise(noise, self.mean.shape, "mean")
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Tensor:
        """The action μ of a deterministic policy, (..., A)."""
        return self.mean


class TanhGaussian(NamedTuple):
    """A squashed Gaussian: a = tanh(u), u = μ + σ ∘ ε, for actions in (-1, 1).

    Haarnoja et al. 2018, "Soft Actor-Critic", appendix C, https://arxiv.org/abs/1801.01290. Its entropy has no closed
    form. The mode is that of u.
    """

    mean: Tensor
    """(..., A) μ."""
    log_std: Tensor
    """log σ, (..., A) or (A,) for all."""

    def log_prob(self, action: Tensor) -> Tensor:
        """The log-density log N(u; μ, σ) - Σ_i log(1 - tanh² u_i), u = atanh a, of actions (..., A), (...).

        Actions that rounding put on ±1 are taken for the nearest number inside. `sample_and_log_prob` needs no atanh.
        """
        _check_action(action, self.mean.shape, "mean")
        bound = 1 - torch.finfo(action.dtype).eps / 2
        return self._log_prob_of(action.clamp(-bound, bound).atanh())

    def kl(self, other: TanhGaussian) -> Tensor:
        """The divergence of the Gaussians, (...): one squashing of both changes nothing."""
        _check_other(self, other)
        return Gaussian(*self).kl(Gaussian(*other))

    def sample(self, noise: Tensor) -> Tensor:
        """The action tanh(μ + σ ∘ ε) (..., A) for standard normal noise ε (..., A)."""
        return Gaussian(*self).sample(noise).tanh()

    def sample_and_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The action (..., A) for standard normal noise (..., A), and its log-density (...), exact for every u."""
        u = Gaussian(*self).sample(noise)
        return u.tanh(), self._log_prob_of(u)

    def mode(self) -> Tensor:
        """The action tanh μ of a deterministic policy, (..., A)."""
        return self.mean.tanh()

    def _log_prob_of(self, u: Tensor) -> Tensor:
        # log(1 - tanh² u) = 2 (log 2 - u - softplus(-2u)), without the cancellation of the left side.
        return Gaussian(*self).log_prob(u) - 2 * (math.log(2) - u - softplus(-2 * u)).sum(-1)


class Categorical(NamedTuple):
    """p = softmax(logits) over C choices; a logit of -inf rules a choice out."""

    logits: Tensor
    """(..., C), up to a constant."""

    def log_prob(self, action: Tensor) -> Tensor:
        """The log-probability log p_a of actions Int64 (...), (...)."""
        if action.is_floating_point():
            raise ValueError(f"`action` must hold integers; got {action.dtype}.")
        _check_action(action, self.logits.shape[:-1], "logits without their last axis")
        return self.logits.log_softmax(-1).gather(-1, action.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """-Σ_c p_c log p_c, (...)."""
        log_p = self.logits.log_softmax(-1)
        return -_expectation(log_p, log_p)

    def kl(self, other: Categorical) -> Tensor:
        """Σ_c p_c (log p_c - log p'_c), (...); the prime is `other`'s."""
        _check_other(self, other)
        log_p = self.logits.log_softmax(-1)
        return _expectation(log_p, log_p - other.logits.log_softmax(-1))

    def sample(self, noise: Tensor) -> Tensor:
        """argmax_c (logits_c + ε_c), Int64 (...), for standard Gumbel noise ε (..., C): distributed as p."""
        _check_noise(noise, self.logits.shape, "logits")
        return (self.logits + noise).argmax(-1)

    def mode(self) -> Tensor:
        """The most probable choice, Int64 (...): the action of a deterministic policy."""
        return self.logits.argmax(-1)


def _expectation(log_p: Tensor, x: Tensor) -> Tensor:
    """Σ_c p_c x_c, where a choice that is ruled out has no part: 0 · inf would be NaN."""
    p = log_p.exp()
    return (p * torch.where(p > 0, x, 0.0)).sum(-1)


def _check_action(action: Tensor, shape: torch.Size, of: str) -> None:
    # Broadcasting (T,) against (T, 1) would make (T, T) of it, without an error.
    if action.shape != shape:
        raise ValueError(f"`action` must have the shape {tuple(shape)} of the {of}; got {tuple(action.shape)}.")


def _check_noise(noise: Tensor, shape: torch.Size, of: str) -> None:
    if noise.shape != shape:
        raise ValueError(f"`noise` must have the shape {tuple(shape)} of the {of}; got {tuple(noise.shape)}.")


def _check_other(ours: Any, other: Any) -> None:
    if type(other) is not type(ours):
        raise TypeError(f"`other` must be a {type(ours).__name__}; got {type(other).__name__}.")
    if other[0].shape != ours[0].shape:
        raise ValueError(f"`other` must have the shape {tuple(ours[0].shape)}; got {tuple(other[0].shape)}.")
