"""The inner loop: K gradient steps as a pure function.

MetaMAML differentiates through it, vmapped over tasks; Adapter runs it on a live model. There is only one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torchopt
from torch import Tensor
from torch.func import grad_and_value
from torchopt import pytree
from torchopt.base import GradientTransformation

from ssmrl.adaptation.optim import check_num_steps, check_optimizer
from ssmrl.adaptation.recompute import (
    a_transform_is_active,
    autograd_gradient,
    mixed_mode_grad_and_value,
    recomputed,
    refuse_captured,
)
from ssmrl.adaptation.updates import differentiable_update, plain_update

__all__ = ["Adapted", "adapt"]


class Adapted(NamedTuple):
    """What `adapt` returns."""

    params: Any
    """The adapted parameters, in the structure of those that came in."""
    optimizer_state: Any
    """TorchOpt's state after the last step, to be carried on."""
    losses: Tensor
    """(K,) the loss before each step."""


def adapt(
    loss_fn: Callable[..., Tensor],
    params: Any,
    *args: Any,
    optimizer: GradientTransformation,
    num_steps: int,
    optimizer_state: Any = None,
    first_order: bool = False,
    mixed_mode: bool = False,
    recompute: int | None = None,
) -> Adapted:
    """Make K steps θ_{k+1} = θ_k + update(∇loss(θ_k)), θ_0 = params.

    A pure function of tensors: differentiable to every order through all K steps, and to be mapped with `vmap`
    over any axis of `params`, `optimizer_state`, `args` or what `loss_fn` closes over, in any combination.

    Args:
        loss_fn: `(params, *args) -> scalar` loss.
        params: a pytree of floating-point tensors.
        *args: pytrees that `loss_fn` takes after the parameters, such as data, an initial state, or parameters that do
            not adapt.
        optimizer: a TorchOpt gradient transformation, such as `torchopt.sgd(0.01)`.
        num_steps: K >= 0; with 0 the parameters come back as they are.
        optimizer_state: a state to carry on from; None starts afresh.
        first_order: cut the graph at every gradient, as first-order MAML does (Finn et al. 2017, section 5.2,
            https://arxiv.org/abs/1703.03400): d θ_K / d θ_0 is then the identity, unless the optimizer itself
            reads the parameters, as weight decay does. The losses have no derivative then.
        mixed_mode: differentiate every step's gradient by forward mode over reverse mode (`mixed_mode_grad_and_value`):
            the same numbers, and the graph of no gradient is stored.
        recompute: store the parameters and the optimizer's state once in this many steps, and run the steps between
            again when a derivative asks for them: the same numbers. 1 stores the least beside K copies of the
            parameters; about √K keeps √K of them. None stores everything.
            With `mixed_mode` or `recompute`, all that is differentiated or mapped has to come in `params`, `args` or
            `optimizer_state`, and `loss_fn` must draw no random numbers.

    Raises:
        TypeError: the optimizer is not a gradient transformation, or num_steps or recompute not an integer.
        ValueError: num_steps is negative, recompute less than 1; first_order with mixed_mode or recompute, of which it
            leaves nothing to do; or `loss_fn` closes over what `mixed_mode` or `recompute` would lose, or draws
            random numbers.
    """
    check_optimizer("optimizer", optimizer)
    num_steps = check_num_steps("num_steps", num_steps)
    check_memory_options(first_order, mixed_mode, recompute)
    if torch.is_inference_mode_enabled():
        # The transforms of PyTorch 2.6 find gradients of 0 there, without a word.
        with torch.inference_mode(False), torch.set_grad_enabled(a_transform_is_active()):
            return adapt(
                loss_fn,
                params,
                *args,
                optimizer=optimizer,
                num_steps=num_steps,
                optimizer_state=optimizer_state,
                first_order=first_order,
                mixed_mode=mixed_mode,
                recompute=recompute,
            )
    fresh = optimizer_state is None
    differentiated = torch.is_grad_enabled() or a_transform_is_active()
    plain = grad_and_value(loss_fn) if differentiated else _gradient_and_value_alone(loss_fn)
    gradient_of = mixed_mode_grad_and_value(loss_fn) if mixed_mode else plain
    update = differentiable_update(optimizer) if differentiated else plain_update(optimizer)

    # Without a gradient before them, mixed mode and recomputation start the optimizer's state outside what they wrap.
    ahead = mixed_mode or recompute is not None

    def step(
        params: Any, state: Any, args: Any, *, first: bool = False, gradient_of: Any = gradient_of
    ) -> tuple[Any, Any, Tensor]:
        at: Any = (params, args)
        at = pytree.tree_map(_detach, at) if first_order else at
        gradient, loss = gradient_of(at[0], *at[1])
        if first_order:
            gradient = pytree.tree_map(Tensor.detach, gradient)
        if first and not ahead:
            state = _start(optimizer, gradient, state) if differentiated or fresh else _copy(state)
        updates, state = update(gradient, state, params, first=first and fresh)
        return torchopt.apply_updates(params, updates, inplace=False), state, loss

    def steps(params: Any, state: Any, args: Any, *, count: int, first: bool) -> tuple[Any, Any, list[Tensor]]:
        losses = []
        for k in range(count):
            params, state, loss = step(params, state, args, first=first and k == 0)
            losses.append(loss)
        return params, state, losses

    if num_steps and ahead:
        like = _mapped_like(params, args)
        optimizer_state = _start(optimizer, like, optimizer_state)
        refuse_captured(partial(step, first=True, gradient_of=plain), like, optimizer_state, args)
    losses: list[Tensor] = []
    group = num_steps if recompute is None else recompute
    for start in range(0, num_steps, max(group, 1)):
        run: Callable[..., Any] = partial(steps, count=min(group, num_steps - start), first=start == 0)
        run = run if recompute is None else recomputed(run)
        params, optimizer_state, before = run(params, optimizer_state, args)
        losses.extend(before)
    if optimizer_state is None:
        optimizer_state = optimizer.init(params)
    leaves: list[Tensor] = pytree.tree_leaves(params)
    return Adapted(params, optimizer_state, torch.stack(losses) if losses else leaves[0].new_empty(0))


def _gradient_and_value_alone(loss_fn: Callable[..., Tensor]) -> Callable[..., tuple[Any, Tensor]]:
    """`grad_and_value` by autograd itself, where nothing differentiates or maps it: half the time for small models."""

    def run(params: Any, *args: Any) -> tuple[Any, Tensor]:
        leaves: list[Tensor]
        leaves, structure = pytree.tree_flatten(params)
        if any(leaf.is_inference() for leaf in leaves):
            return grad_and_value(loss_fn)(params, *args)
        with torch.enable_grad():
            at = [leaf.detach().requires_grad_() for leaf in leaves]
            try:
                loss = loss_fn(pytree.tree_unflatten(structure, at), *args)
            except RuntimeError as error:
                if "Inference tensors" not in str(error):
                    raise
                return grad_and_value(loss_fn)(params, *args)  # what inference mode made, torch.func takes
            if not isinstance(loss, Tensor) or loss.dim() != 0:
                got = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise RuntimeError(f"Expected loss_fn to return a scalar tensor; got {got}.")
            gradient = autograd_gradient(loss, at)
        return pytree.tree_unflatten(structure, gradient), loss.detach()

    return run


def check_memory_options(first_order: bool, mixed_mode: bool, recompute: int | None) -> None:
    """Refuse a bad `recompute`, and what `first_order` leaves nothing to do."""
    if recompute is not None and check_num_steps("recompute", recompute) < 1:
        raise ValueError(f"recompute must be None or at least 1; got {recompute}.")
    if first_order and (mixed_mode or recompute):
        raise ValueError(
            f"first_order stores no graph of a gradient, so mixed_mode and recompute would do nothing; "
            f"got mixed_mode={mixed_mode}, recompute={recompute}."
        )


def _start(optimizer: GradientTransformation, like: Any, carried: Any) -> Any:
    """The optimizer's state before the first step, fresh or carried on, with the batch axes that `vmap` hides.

    They are those of `like`, a gradient, and of tensors in the state itself, such as rates: TorchOpt updates moments in
    place, so they have to have them.
    """
    like = pytree.tree_map(Tensor.detach, like)
    fresh = optimizer.init(like)
    state: Any = fresh if carried is None else carried
    mapped = [t for t in pytree.tree_leaves(state) if isinstance(t, Tensor) and torch._C._functorch.is_batchedtensor(t)]
    if mapped:
        fresh = optimizer.init(_with_axes_of(mapped, like))
    return fresh if carried is None else pytree.tree_map(_batch_like, carried, fresh)


def _copy(state: Any) -> Any:
    """A carried state that `plain_update` may use up."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, state)


def _batch_like(carried: Any, fresh: Any) -> Any:
    """A carried moment or count, with the batch axes that `vmap` hides in a fresh one."""
    return carried + torch.zeros_like(fresh) if isinstance(carried, Tensor) else carried


def _mapped_like(params: Any, args: Any) -> Any:
    """The parameters, without a graph, with all axes that `vmap` hides in them and in `args`, as a gradient has."""
    tree: Any = (params, args)
    return _with_axes_of([leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)], params)


def _with_axes_of(tensors: list[Tensor], params: Any) -> Any:
    return pytree.tree_map(
        lambda p: p.detach() + sum(t.detach().new_zeros((), dtype=p.dtype, device=p.device) for t in tensors), params
    )


def _detach(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
