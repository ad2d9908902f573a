"""What holds adapted parameters near an anchor, those that they started from: a pull, and a trust region.

Both are TorchOpt transformations, to be chained with an optimizer, so that MAML can be trained through what the
adapters will run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torchopt.base import GradientTransformation

from ssmrl.adaptation.optim import check_positive, check_rate
from ssmrl.adaptation.tree import tree_leaves, tree_map

__all__ = ["distance", "fisher_information", "pull_to_anchor", "trust_region"]


def pull_to_anchor(anchor: Any, strength: float, importance: Any = None) -> GradientTransformation:
    """A transformation g -> g + λ F ∘ (θ - θ_a), the gradient of the penalty λ/2 Σ F (θ - θ_a)²; first in a chain.

    With F = 1 an L2 penalty on the distance from the anchor, with Fisher information elastic weight consolidation
    (Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796; at test time EATA, Niu et al. 2022,
    https://arxiv.org/abs/2204.02610).

    Args:
        anchor: θ_a, a pytree with the parameters' structure.
        strength: λ >= 0.
        importance: F, a pytree like the anchor, not negative; None: 1 everywhere. `fisher_information` estimates it.

    Raises:
        TypeError, ValueError: a strength that is not a finite number >= 0, or importance that does not fit the anchor.
    """
    check_rate("strength", strength)
    if importance is not None:
        _check_importance(importance, anchor)

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        del inplace
        if importance is None:
            return tree_map(lambda g, p, a: g + strength * (p - a), updates, params, anchor), state
        return tree_map(lambda g, p, a, f: g + strength * f * (p - a), updates, params, anchor, importance), state

    return GradientTransformation(lambda params: (), update)


def trust_region(anchor: Any, max_distance: float) -> GradientTransformation:
    """A transformation that ends a step within ‖θ - θ_a‖ <= r of the anchor, by projection; last in a chain.

    The norm is Euclidean, over all parameters. Its derivative is exact on both sides of the bound.

    Args:
        anchor: θ_a, a pytree with the parameters' structure.
        max_distance: r > 0.

    Raises:
        TypeError, ValueError: max_distance is not a finite number > 0.
    """
    check_positive("max_distance", max_distance)

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> tuple[Any, Any]:
        del inplace
        ahead = tree_map(lambda p, u, a: p + u - a, params, updates, anchor)
        square = _square(ahead)
        outside = square > max_distance**2
        # The root only where it is taken, since its derivative at 0 is infinite.
        factor = torch.where(outside, max_distance / torch.where(outside, square, 1.0).sqrt(), 1.0)
        # Inside, the updates as they were, not (p + u - a) + a - p, which rounds.
        return tree_map(
            lambda u, d, p, a: torch.where(outside, d * factor.to(d.dtype) + a - p, u), updates, ahead, params, anchor
        ), state

    return GradientTransformation(lambda params: (), update)


def distance(params: Any, anchor: Any) -> Tensor:
    """‖θ - θ_a‖ over all leaves of two pytrees, a scalar; its derivative at 0 is 0."""
    square = _square(tree_map(torch.sub, params, anchor))
    return torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())


def fisher_information(loss_fn: Callable[..., Tensor], params: Any, *data: Any) -> Any:
    """Mean over samples of the squared gradient, F = 1/n Σ_i (∂ loss_i / ∂θ)²: the diagonal of the empirical Fisher.

    Args:
        loss_fn: `(params, *sample) -> scalar`, a negative log-likelihood up to constants, such as half the squared
            error in units of the noise.
        params: a pytree of floating-point tensors.
        *data: pytrees of tensors with a leading axis of n >= 1 samples.

    Returns:
        F, in the structure of `params`, for `pull_to_anchor`.

    Raises:
        ValueError: there are no samples.
    """
    leaves = [leaf for leaf in tree_leaves(data) if isinstance(leaf, Tensor)]
    if not leaves or any(leaf.dim() == 0 or len(leaf) == 0 for leaf in leaves):
        raise ValueError("data must hold tensors with a leading axis of at least one sample.")
    each = vmap(grad(loss_fn), in_dims=(None, *[0] * len(data)))(params, *data)
    return tree_map(lambda g: g.square().mean(0), each)


def _square(tree: Any) -> Tensor:
    leaves: list[Tensor] = tree_leaves(tree)
    return reduce(torch.add, [leaf.square().sum() for leaf in leaves])


def _check_importance(importance: Any, anchor: Any) -> None:
    try:
        pairs: list[Any] = tree_leaves(tree_map(lambda *pair: _Pair(pair), anchor, importance))
    except (TypeError, ValueError) as error:
        raise ValueError(f"importance must have the structure of the parameters: {error}") from error
    for pair in pairs:
        like, weight = pair.leaves
        if not isinstance(weight, Tensor) or weight.shape != like.shape:
            got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"importance must have the shapes of the parameters; got {got} for {tuple(like.shape)}.")
        if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
            raise ValueError("importance must be finite and not negative.")


class _Pair:
    """A leaf for the tree, which a tuple is not."""

    def __init__(self, leaves: tuple[Any, Any]) -> None:
        self.leaves = leaves
