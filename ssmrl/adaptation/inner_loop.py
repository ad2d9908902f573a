"""The inner loop: K gradient steps as a pure function.

MetaMAML differentiates through it, vmapped over tasks; Adapter runs it on a live model. There is only one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torchopt
from torch import Tensor
from torch.func import grad_and_value
from torchopt import pytree
from torchopt.base import GradientTransformation

from ssmrl.adaptation.optim import check_num_steps, check_optimizer

__all__ = ["Adapted", "adapt"]

Params = TypeVar("Params")


class Adapted(NamedTuple):
    """What `adapt` returns."""

    params: Any
    """The adapted parameters, in the structure of those that came in."""
    optimizer_state: Any
    """TorchOpt's state after the last step, to be carried on."""
    losses: Tensor
    """(K,) the loss before each step."""


def adapt(
    loss_fn: Callable[[Params], Tensor],
    params: Params,
    *,
    optimizer: GradientTransformation,
    num_steps: int,
    optimizer_state: Any = None,
    first_order: bool = False,
) -> Adapted:
    """Make K steps θ_{k+1} = θ_k + update(∇loss(θ_k)), θ_0 = params.

    A pure function of tensors: differentiable to every order through all K steps, and to be mapped with `vmap`
    over any axis of `params`, `optimizer_state` or what `loss_fn` closes over, in any combination.

    Args:
        loss_fn: params -> scalar loss.
        params: a pytree of floating-point tensors.
        optimizer: a TorchOpt gradient transformation, such as `torchopt.sgd(0.01)`.
        num_steps: K >= 0; with 0 the parameters come back as they are.
        optimizer_state: a state to carry on from; None starts afresh.
        first_order: cut the graph at every gradient, as first-order MAML does (Finn et al. 2017, section 5.2,
            https://arxiv.org/abs/1703.03400): d θ_K / d θ_0 is then the identity, unless the optimizer itself
            reads the parameters, as weight decay does.

    Raises:
        TypeError: the optimizer is not a gradient transformation, or num_steps not an integer.
        ValueError: num_steps is negative.
    """
    check_optimizer("optimizer", optimizer)
    num_steps = check_num_steps("num_steps", num_steps)
    losses = []
    for step in range(num_steps):
        gradient, loss = grad_and_value(loss_fn)(params)
        if first_order:
            gradient = pytree.tree_map(Tensor.detach, gradient)
        if step == 0:
            # From the gradient, not from params: under vmap it has the batch axis that TorchOpt's moments need.
            fresh = optimizer.init(gradient)
            optimizer_state = fresh if optimizer_state is None else pytree.tree_map(_batch_like, optimizer_state, fresh)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
        losses.append(loss)
    if optimizer_state is None:
        optimizer_state = optimizer.init(params)
    leaves: list[Tensor] = pytree.tree_leaves(params)  # type: ignore[arg-type]
    return Adapted(params, optimizer_state, torch.stack(losses) if losses else leaves[0].new_empty(0))


def _batch_like(carried: Any, fresh: Any) -> Any:
    """A carried moment or count, with the batch axes that `vmap` hides in a fresh one."""
    return carried + torch.zeros_like(fresh) if isinstance(carried, Tensor) else carried
