"""Losses of meta-parameters on one task: what the algorithms of the MAML family minimise.

Each is a pure function for one task, to be mapped over tasks and differentiated (`MetaLearner` does), and little more
than a call of the inner loop. `loss_fn(params, *shared, *data)` is a scalar; `support` and `query` are tuples of data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchopt import pytree
from torchopt.base import GradientTransformation

from ssmrl.adaptation.implicit import Solver, adapt_implicitly
from ssmrl.adaptation.inner_loop import adapt
from ssmrl.adaptation.optim import check_num_steps

__all__ = ["implicit_loss", "multi_step_loss", "post_adaptation_loss", "reptile_loss"]

Loss = Callable[..., Tensor]
Data = Sequence[Any]


def post_adaptation_loss(
    loss_fn: Loss,
    params: Any,
    support: Data,
    query: Data,
    *,
    shared: Data = (),
    optimizer: GradientTransformation,
    num_steps: int,
    **options: Any,
) -> Tensor:
    """L(θ_K, query) with θ_K = K steps on L(·, support) from θ: MAML (Finn et al. 2017, https://arxiv.org/abs/1703.03400).

    With `shared` parameters that do not adapt ANIL or CAVIA, with learned rates in `optimizer` Meta-SGD.

    Args:
        loss_fn: `(params, *shared, *data) -> scalar`.
        params: θ, the pytree that adapts.
        support, query: data for `loss_fn`.
        shared: what `loss_fn` takes between the parameters and the data, such as parameters that do not adapt.
        optimizer, num_steps: as for `ssmrl.adapt`.
        **options: others of its settings.
    """
    adapted = adapt(loss_fn, params, *shared, *support, optimizer=optimizer, num_steps=num_steps, **options)
    return loss_fn(adapted.params, *shared, *query)


def multi_step_loss(
    loss_fn: Loss,
    params: Any,
    support: Data,
    query: Data,
    *,
    weights: Tensor,
    shared: Data = (),
    optimizer: GradientTransformation,
    **options: Any,
) -> Tensor:
    """Σ_k w_k L(θ_k, query) over the steps k = 1..K: the multi-step loss of MAML++.

    Antoniou, Edwards, Storkey 2019, "How to train your MAML", section 4, https://arxiv.org/abs/1810.09502. Its other
    parts are rates for every parameter and step (`scale_by_learning_rates(..., per_step=True)`) and `first_order=True`
    in the first iterations.

    Args:
        weights: (K,) w_k; a tensor that may change from call to call, as the paper anneals it towards the last step.
        loss_fn, params, support, query, shared, optimizer: as for `post_adaptation_loss`.
        **options: other settings of `ssmrl.adapt`; with `recompute` every step is a group of its own.

    Raises:
        ValueError: weights is not of shape (K,) with K >= 1.
    """
    if weights.dim() != 1 or len(weights) == 0:
        raise ValueError(f"weights must have shape (K,) with K >= 1 steps; got {tuple(weights.shape)}.")
    state, total = None, weights.new_zeros(())
    for weight in weights:
        # One step at a time, with the optimizer's state carried on: K such calls are one of K steps.
        adapted = adapt(
            loss_fn, params, *shared, *support, optimizer=optimizer, num_steps=1, optimizer_state=state, **options
        )
        params, state = adapted.params, adapted.optimizer_state
        total = total + weight * loss_fn(params, *shared, *query)
    return total


def implicit_loss(
    loss_fn: Loss,
    params: Any,
    support: Data,
    query: Data,
    *,
    shared: Data = (),
    optimizer: GradientTransformation,
    num_steps: int,
    strength: float,
    solver: Solver,
) -> Tensor:
    """L(φ*, query) with φ* = argmin L(φ, support) + λ/2 ‖φ - θ‖²: implicit MAML (`adapt_implicitly`).

    Rajeswaran, Finn, Kakade, Levine 2019, https://arxiv.org/abs/1909.04630.

    Args:
        strength, solver: λ and the linear solver of `ssmrl.adaptation.adapt_implicitly`.
        loss_fn, params, support, query, shared, optimizer, num_steps: as for `post_adaptation_loss`.
    """
    adapted = adapt_implicitly(
        loss_fn,
        params,
        *shared,
        *support,
        optimizer=optimizer,
        num_steps=num_steps,
        strength=strength,
        solver=solver,
    )
    return loss_fn(adapted, *shared, *query)


def reptile_loss(
    loss_fn: Loss,
    params: Any,
    support: Data,
    *,
    shared: Data = (),
    optimizer: GradientTransformation,
    num_steps: int,
) -> Tensor:
    """½ ‖θ - θ_K‖², θ_K = K steps on L(·, support) taken as a constant, whose gradient θ - θ_K is Reptile's.

    Nichol, Achiam, Schulman 2018, "On First-Order Meta-Learning Algorithms", https://arxiv.org/abs/1803.02999. There
    every inner step draws a new batch of the task; here all take the same data. The value is no loss on a query set:
    judge with `post_adaptation_loss`.

    Args:
        num_steps: K, which must be more than 1 for the gradient to be more than that of joint training.
        loss_fn, params, support, shared, optimizer: as for `post_adaptation_loss`.

    Raises:
        ValueError: num_steps is less than 1.
    """
    if check_num_steps("num_steps", num_steps) < 1:
        raise ValueError("num_steps must be at least 1; got 0.")
    constant = pytree.tree_map(Tensor.detach, params)
    adapted = adapt(loss_fn, constant, *shared, *support, optimizer=optimizer, num_steps=num_steps, first_order=True)
    leaves: list[Tensor] = pytree.tree_leaves(params)
    targets: list[Tensor] = pytree.tree_leaves(adapted.params)
    return 0.5 * torch.stack([(p - t.detach()).square().sum() for p, t in zip(leaves, targets, strict=True)]).sum()
