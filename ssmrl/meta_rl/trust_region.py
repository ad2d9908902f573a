"""A step within a trust region: the natural gradient at the length that a bound on the divergence allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchopt import pytree

from ssmrl.adaptation.implicit import conjugate_gradient
from ssmrl.adaptation.optim import check_num_steps, check_positive
from ssmrl.adaptation.tree import dot
from ssmrl.sharding import Shards

__all__ = ["TrustRegionStep", "trust_region_step"]

Vector = tuple[Tensor, ...]


class TrustRegionStep(NamedTuple):
    """What `trust_region_step` returns."""

    params: Any
    """The new parameters; those that came in where no length of the step was accepted."""
    loss: Tensor
    """Before the step."""
    loss_after: Tensor
    divergence: Tensor
    """Between the policies before and after it."""
    fraction: float
    """Of the longest step that was made: 1, `shrink`, its square, and so on; 0 where none was accepted."""


def trust_region_step(
    loss_fn: Callable[[Any], Tensor],
    divergence_fn: Callable[[Any], Tensor],
    params: Any,
    *,
    curvature_fn: Callable[[Any], Tensor] | None = None,
    max_divergence: float = 0.01,
    num_cg_steps: int = 10,
    damping: float = 1e-5,
    shrink: float = 0.8,
    num_shrinks: int = 15,
    process_group: dist.ProcessGroup | None = None,
) -> TrustRegionStep:
    """θ' = θ - c √(2 δ / sᵀF s) s with s = (F + damping I)⁻¹ g, c the largest of 1, shrink, shrink², ... that holds.

    g is the gradient of the loss and F the Hessian of the divergence at θ, whose products with vectors are exact. It
    holds where the loss falls and the divergence is at most δ. Through adaptation, loss and divergence are functions of
    the parameters before it: this is then the outer step of MAML with TRPO.

    Args:
        loss_fn: params -> scalar, to be minimised.
        divergence_fn: params -> scalar >= 0, with value 0 and gradient 0 at θ, such as the mean KL divergence from the
            policy that collected the data.
        params: θ, a pytree of floating-point tensors.
        curvature_fn: what F is the Hessian of, for instance the divergence on a part of the data, which the line search
            then corrects; None: the divergence itself.
        max_divergence: δ > 0.
        num_cg_steps: of conjugate gradients for s.
        damping: >= 0.
        shrink, num_shrinks: of the line search, 0 < shrink < 1.
        process_group: of `torch.distributed`, whose ranks call this with the same θ, and with functions that return
            shares: loss, divergence and curvature are the sums of these over ranks. None: one process.

    Raises:
        ValueError: a setting is out of range.
        FloatingPointError: the loss or its gradient is not finite.

    Schulman et al. 2015, "Trust Region Policy Optimization", appendix C, https://arxiv.org/abs/1502.05477. Settings are
    those of rllab, whose products are finite differences.
    """
    check_positive("max_divergence", max_divergence)
    check_num_steps("num_shrinks", num_shrinks)
    if not 0 < shrink < 1:
        raise ValueError(f"shrink must be between 0 and 1; got {shrink}.")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be at least 0 and finite; got {damping}.")
    solve, shards = conjugate_gradient(num_cg_steps), Shards(process_group)
    leaves, structure = pytree.tree_flatten(params)

    def unflatten(vector: Vector) -> Any:
        return pytree.tree_unflatten(structure, list(vector))

    with torch.enable_grad():
        at = tuple(leaf.detach().requires_grad_() for leaf in leaves)
        loss = loss_fn(unflatten(at))
        before, *gradient = shards.total((loss.detach(), *torch.autograd.grad(loss, at)))
        if not (torch.isfinite(before) and all(bool(torch.isfinite(g).all()) for g in gradient)):
            raise FloatingPointError(f"The loss and its gradient must be finite; the loss is {float(before)}.")
        curved = divergence_fn if curvature_fn is None else curvature_fn
        slope = torch.autograd.grad(curved(unflatten(at)), at, create_graph=True)

        def fisher_product(vector: Vector) -> Vector:
            return shards.total(torch.autograd.grad(dot(slope, vector), at, retain_graph=True))

        def damped_product(vector: Vector) -> Vector:
            return tuple(image + damping * v for image, v in zip(fisher_product(vector), vector, strict=True))

        direction = solve(damped_product, tuple(gradient))
        curvature = dot(direction, damped_product(direction))
    with torch.no_grad():
        longest = torch.sqrt(2 * max_divergence / curvature)
        for shrinks in range(num_shrinks + 1):
            if not bool(torch.isfinite(longest)):  # nothing to gain, or a Hessian that is not positive along s
                break
            fraction = shrink**shrinks
            candidate = tuple(p - fraction * longest * s for p, s in zip(at, direction, strict=True))
            after, moved = shards.total((loss_fn(unflatten(candidate)), divergence_fn(unflatten(candidate))))
            if bool((after < before) & (moved <= max_divergence)):
                return TrustRegionStep(unflatten(candidate), before, after, moved, fraction)
        return TrustRegionStep(params, before, before, torch.zeros_like(before), 0.0)
