"""MetaMAML: model-agnostic meta-learning through the inner loop, vmapped over tasks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torchopt import pytree
from torchopt.base import GradientTransformation

from ssmrl.adaptation.checks import check_finite, check_pair
from ssmrl.adaptation.inner_loop import adapt
from ssmrl.adaptation.losses import mse_loss
from ssmrl.adaptation.optim import (
    DEFAULT_LEARNING_RATE,
    check_num_steps,
    check_rate,
    sgd_unless_given,
)
from ssmrl.adaptation.select import trainable_parameters
from ssmrl.core.base import functional_forward
from ssmrl.meta_rl.tasks import Task, TaskGroup, Tasks, expand_state, group_tasks
from ssmrl.meta_rl.trace import Traced

__all__ = ["MetaMAML"]

DEFAULT_OUTER_LR = 0.001

Loss = Callable[[Tensor, Tensor], Tensor]


class MetaMAML:
    """Learns parameters θ from which a few gradient steps on a task's support set do well on its query set:

        min_θ  1/N Σ_i L(query_i, θ_i),    θ_i = K steps of the inner optimizer on L(support_i, ·), from θ.

    Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning", https://arxiv.org/abs/1703.03400, algorithm 2 without
    the resampling of tasks, which the caller does. The meta-gradient is exact, through all K steps.

    Args:
        model: a `StateModel`, or any module of its shape, with or without a hidden state. Its parameters that
            require a gradient are meta-learned and adapted; the others, and buffers, are constants.
        inner_lr: rate of the default inner optimizer, `torchopt.sgd`.
        outer_lr: rate of the default outer optimizer, `torch.optim.Adam`.
        first_order: leave out the second derivatives (FOMAML, section 5.2 of the paper).
        inner_steps: K.
        inner_optimizer: any TorchOpt gradient transformation in place of SGD; its state is fresh for every task.
        outer_optimizer: any `torch.optim` optimizer whose step needs no closure, in place of Adam. What it holds
            beside the model's parameters (an initial state that is passed in, parameters of the loss) is learned too.
        max_grad_norm: clip the global norm of the meta-gradient to this; None: do not clip.
        compile: record the tensor operations of the whole meta-gradient at the first update with new shapes, and
            compile them with TorchInductor: the same numbers up to rounding, without the overhead of Python and
            functorch. It takes 10 to 50 seconds, whatever T, and a C++ compiler. With "trace" the operations are
            replayed one by one: the same numbers, seconds to record, no compiler. Only the model's parameters can be
            learned, and what `loss_fn` closes over must not change; every new `loss_fn` object is recorded anew.

    Raises:
        TypeError, ValueError: a negative or non-finite rate, a negative number of steps, a rate beside an optimizer
            that would not use it, an optimizer of another kind, a model with nothing to learn, or one with a norm
            whose second derivative PyTorch gets wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float = DEFAULT_LEARNING_RATE,
        outer_lr: float = DEFAULT_OUTER_LR,
        first_order: bool = False,
        *,
        inner_steps: int = 1,
        inner_optimizer: GradientTransformation | None = None,
        outer_optimizer: torch.optim.Optimizer | None = None,
        max_grad_norm: float | None = None,
        compile: bool | Literal["trace"] = False,
    ) -> None:
        check_rate("outer_lr", outer_lr)
        if compile not in (False, True, "trace"):
            raise ValueError(f'compile must be True, False or "trace"; got {compile!r}.')
        if max_grad_norm is not None:
            check_rate("max_grad_norm", max_grad_norm)
        params = trainable_parameters(model)
        if not first_order:
            _check_norms(model)
        self.model = model
        self.first_order = first_order
        self.inner_steps = check_num_steps("inner_steps", inner_steps)
        self.inner_optimizer = sgd_unless_given(inner_optimizer, inner_lr, name="inner_optimizer", rate_name="inner_lr")
        if outer_optimizer is None:
            outer_optimizer = torch.optim.Adam(
                params.values(), lr=outer_lr, fused=all(p.is_floating_point() for p in params.values())
            )
        elif not isinstance(outer_optimizer, torch.optim.Optimizer):
            raise TypeError(f"outer_optimizer must be a torch.optim.Optimizer; got {type(outer_optimizer).__name__}.")
        elif outer_lr != DEFAULT_OUTER_LR:
            raise ValueError(
                f"outer_lr = {outer_lr} would be ignored: outer_optimizer has a rate of its own; give one of the two."
            )
        learned = {id(p) for group in outer_optimizer.param_groups for p in group["params"]}
        if not any(id(p) in learned for p in params.values()):
            raise ValueError(
                "outer_optimizer must hold parameters of the model that require a gradient; it holds none."
            )
        if compile and learned - {id(p) for p in model.parameters()}:
            raise ValueError(
                f"compile={compile!r} differentiates the model's parameters alone; outer_optimizer must not hold other "
                f"tensors."
            )
        self.outer_optimizer = outer_optimizer
        self.max_grad_norm = max_grad_norm
        self.compile = compile
        self._traced: dict[Any, Traced] = {}

    @torch.enable_grad()
    def meta_update(self, tasks: Tasks, initial_hidden_state: Any = None, loss_fn: Loss = mse_loss) -> float:
        """Adapt to every task on its support set, and make one outer step on the mean query loss.

        Args:
            tasks: a sequence of `(support_x, support_y, query_x, query_y)`, each x (B, D) or (B, T, D), each y with
                the leading axes of its x; or one such tuple with a task axis N before every other. Shapes may
                differ between tasks: equal ones are stacked and vmapped together.
            initial_hidden_state: the state before every support and query sequence, a pytree with the batch on
                the leading axis of every leaf. With a batch of 1 or of the tasks' batch size all tasks share it;
                with the sum of the tasks' batch sizes it is split among them in order. None means `init_hidden`.
                Tensors that carry a graph are detached; leaves that require a gradient get theirs.
            loss_fn: (output, y) -> scalar, a mean over the batch.

        Returns:
            The mean query loss after adaptation, before the outer step.

        Raises:
            TypeError, ValueError: tasks or states that do not fit, or data that are not finite.
            FloatingPointError: the meta-loss or the meta-gradient is not finite; it names the tasks or parameters.
            After an error the model and the outer optimizer are as before.
        """
        params = trainable_parameters(self.model)
        groups = group_tasks(tasks, _as_leaves(initial_hidden_state), _first(params))
        num_tasks = sum(len(group.indices) for group in groups)
        losses = torch.empty(num_tasks, dtype=_first(params).dtype)
        # Both: the optimizer may hold a part of the model, and more than the model.
        learned = [*params.values(), *(p for group in self.outer_optimizer.param_groups for p in group["params"])]
        _forget_gradients(learned)
        try:
            for group in groups:  # a backward pass each, so that only one group's graph is in memory
                losses[group.indices] = self._backward(params, group, loss_fn, num_tasks).to(losses)
            _check_losses(losses)
            self._check_and_clip_gradient()
            self.outer_optimizer.step()
        finally:
            _forget_gradients(learned)
        return float(losses.mean())

    @torch.no_grad()
    def evaluate(
        self,
        tasks: Tasks,
        initial_hidden_state: Any = None,
        loss_fn: Loss = mse_loss,
        *,
        num_steps: int | None = None,
    ) -> Tensor:
        """Query loss of every task after adaptation to its support set, (N,); the model does not change.

        Args:
            tasks, initial_hidden_state, loss_fn: as for `meta_update`.
            num_steps: inner steps in place of `inner_steps`; with 0, the loss before adaptation.
        """
        params = trainable_parameters(self.model)
        groups = group_tasks(tasks, initial_hidden_state, _first(params))
        steps = self._num_steps(num_steps)
        losses = _first(params).new_empty(sum(len(group.indices) for group in groups))
        for group in groups:
            losses[group.indices] = self._query_losses(dict(params), group, loss_fn, steps, True).to(losses)
        return losses

    @torch.no_grad()
    def adapt_task(
        self,
        support_x: Tensor,
        support_y: Tensor,
        initial_hidden_state: Any = None,
        loss_fn: Loss = mse_loss,
        num_steps: int | None = None,
    ) -> OrderedDict[str, Tensor]:
        """Fast weights: the parameters after `num_steps` (None: `inner_steps`) inner steps on one support set.

        Args:
            support_x: (B, D) or (B, T, D).
            support_y: the same leading axes.
            initial_hidden_state: of batch B or 1; None means `init_hidden`.
            loss_fn: (output, y) -> scalar.

        Returns:
            Name -> tensor for all parameters of the model, adapted or not, without a graph and sharing no memory
            with the model, which does not change; for `functional_forward`.
        """
        weights = self.get_fast_weights()
        names = trainable_parameters(self.model)
        like = _first(weights)
        check_pair("support_x", support_x, "support_y", support_y, like)
        check_finite("support_x", support_x)
        check_finite("support_y", support_y)
        task = Task(support_x[None], support_y[None], support_x[None], support_y[None])
        (group,) = group_tasks(task, initial_hidden_state, like)
        adapted = adapt(
            lambda params: self._loss({**weights, **params}, support_x, support_y, group.initial_state, loss_fn),
            {name: weights[name] for name in names},
            optimizer=self.inner_optimizer,
            num_steps=self._num_steps(num_steps),
        )
        weights.update(adapted.params)
        return weights

    def functional_forward(
        self, x: Tensor, hidden_state: Any, params: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """The model's output and next state (None for a model without one) with `params` as its weights.

        Args:
            x: (B, D) or (B, T, D).
            hidden_state: None means `init_hidden`.
            params: name -> tensor, such as fast weights; None: the model's own.
        """
        return functional_forward(self.model, {} if params is None else params, x, hidden_state)

    def get_fast_weights(self) -> OrderedDict[str, Tensor]:
        """Fast weights before any step: a copy of all parameters, without a graph."""
        return OrderedDict((name, p.detach().clone()) for name, p in self.model.named_parameters())

    def _backward(self, params: Mapping[str, Tensor], group: TaskGroup, loss_fn: Loss, num_tasks: int) -> Tensor:
        """(N,) query losses of a group; their sum / num_tasks is differentiated into the parameters' `grad`."""
        if not self.compile:
            losses = self._query_losses(dict(params), group, loss_fn, self.inner_steps, self.first_order)
            (losses.sum() / num_tasks).backward()
            return losses.detach()
        constants: dict[str, Tensor] = {name: p for name, p in self.model.named_parameters() if name not in params}
        constants.update(self.model.named_buffers())
        options = (loss_fn, self.inner_optimizer, self.inner_steps, self.first_order, group.state_axis)
        key = (*options, self.model.training)
        if key not in self._traced:
            gradient = partial(self._gradient, loss_fn=loss_fn, state_axis=group.state_axis)
            self._traced[key] = Traced(gradient, inductor=self.compile is True)
        result: tuple[dict[str, Tensor], Tensor]
        result = self._traced[key](dict(params), constants, tuple(group.tasks), group.initial_state)
        for name, p in params.items():
            share = result[0][name] / num_tasks
            p.grad = share if p.grad is None else p.grad + share
        return result[1]

    def _gradient(
        self, params: Any, constants: Any, tasks: Any, initial_state: Any, *, loss_fn: Loss, state_axis: int | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradient of the sum of a group's query losses, and the losses (N,): a pure function of its arguments."""
        group = TaskGroup([], Task(*tasks), initial_state, state_axis)

        def total(params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            losses = self._query_losses(params, group, loss_fn, self.inner_steps, self.first_order, constants)
            return losses.sum(), losses

        result: tuple[dict[str, Tensor], Tensor] = grad(total, has_aux=True)(params)
        return result

    def _query_losses(
        self,
        params: dict[str, Tensor],
        group: TaskGroup,
        loss_fn: Loss,
        num_steps: int,
        first_order: bool,
        constants: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        """(N,) query losses after adaptation: a pure function of params, constants and the group's data and states."""

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor, initial_state: Any) -> Tensor:
            return self._loss({**constants, **params}, x, y, initial_state, loss_fn)

        def task_loss(params: dict[str, Tensor], task: Task, initial_state: Any) -> Tensor:
            adapted = adapt(
                lambda p: loss(p, task.support_x, task.support_y, initial_state),
                params,
                optimizer=self.inner_optimizer,
                num_steps=num_steps,
                first_order=first_order,
            )
            return loss(adapted.params, task.query_x, task.query_y, initial_state)

        over_tasks = vmap(task_loss, in_dims=(None, 0, group.state_axis))
        losses: Tensor = over_tasks(params, group.tasks, group.initial_state)
        return losses

    def _loss(self, params: Mapping[str, Tensor], x: Tensor, y: Tensor, initial_state: Any, loss_fn: Loss) -> Tensor:
        state = expand_state(initial_state, x.shape[0])
        output, _ = functional_forward(self.model, params, x, state)
        return loss_fn(output, y)

    def _num_steps(self, num_steps: int | None) -> int:
        return self.inner_steps if num_steps is None else check_num_steps("num_steps", num_steps)

    def _check_and_clip_gradient(self) -> None:
        learned = [p for group in self.outer_optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in learned if p.grad is not None])
        if not torch.isfinite(norm):
            names = [
                name
                for name, p in self.model.named_parameters()
                if p.grad is not None and not torch.isfinite(p.grad).all()
            ]
            raise FloatingPointError(
                f"The meta-gradient is not finite (norm {float(norm)}) in {names or 'its norm'}; the model is "
                f"untouched. Where a gradient is exactly 0, adam and adamw need eps_root > 0; else lower the rates."
            )
        if self.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(learned, self.max_grad_norm, norm)


def _check_norms(model: nn.Module) -> None:
    """Refuse norms with weights of which PyTorch computes a wrong second derivative under vmap: see core/norm.py."""
    wrong = (nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    for name, module in model.named_modules():
        if type(module) in wrong and module.weight is not None:
            raise ValueError(
                f"model must not have {type(module).__name__} with weights ({name or 'the model itself'}): under vmap "
                f"PyTorch computes a wrong second derivative of it. Take ssmrl.core.LayerNorm, which has the same "
                f"arguments, a norm without weights, or first_order=True."
            )


def _forget_gradients(learned: Iterable[Tensor]) -> None:
    for p in learned:
        p.grad = None


def _check_losses(losses: Tensor) -> None:
    bad = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"The query loss after adaptation is not finite for tasks {bad}: {losses[bad].tolist()}; the model is "
            f"untouched. Lower the inner rate."
        )


def _first(params: Mapping[str, Tensor]) -> Tensor:
    return next(iter(params.values()))


def _as_leaves(state: Any) -> Any:
    """Without the graph that a state may carry; a leaf, which may be learned, stays as it is."""
    return pytree.tree_map(lambda s: s.detach() if isinstance(s, Tensor) and not s.is_leaf else s, state)
