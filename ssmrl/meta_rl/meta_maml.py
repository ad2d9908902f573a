"""MetaMAML: model-agnostic meta-learning through the inner loop, vmapped over tasks."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import grad, vmap
from torchopt import pytree
from torchopt.base import GradientTransformation

from ssmrl.adaptation.checks import check_finite, check_pair
from ssmrl.adaptation.inner_loop import adapt, check_memory_options
from ssmrl.adaptation.losses import mse_loss
from ssmrl.adaptation.optim import (
    DEFAULT_LEARNING_RATE,
    check_num_steps,
    learned_tensors,
    sgd_unless_given,
    with_tensors,
)
from ssmrl.adaptation.select import Selector, select, split, trainable_parameters
from ssmrl.adaptation.trace import Traced, check_compile
from ssmrl.core.base import check_truncate, functional_forward
from ssmrl.meta_rl.meta_learner import (
    OuterStep,
    accumulate,
    check_chunk_size,
    check_losses,
    copy_into,
    is_finite,
    loss_dtype,
)
from ssmrl.meta_rl.nonfinite import NonFinite
from ssmrl.meta_rl.objectives import multi_step_loss, post_adaptation_loss
from ssmrl.meta_rl.tasks import Task, TaskGroup, Tasks, expand_state, group_tasks, shared_out
from ssmrl.sharding import Shards

__all__ = ["MetaMAML"]

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
        inner_optimizer: any TorchOpt gradient transformation in place of SGD; its state is fresh for every task. Rates
            that are tensors and require a gradient (`learning_rates`) are learned; the outer optimizer must hold them.
        outer_optimizer: any `torch.optim` optimizer whose step needs no closure, in place of Adam. What it holds
            beside the model's parameters (rates, an initial state that is passed in, parameters of the loss) is learned
            too.
        max_grad_norm: clip the global norm of the meta-gradient to this; None: do not clip.
        adapted: which of the parameters adapt, as `ssmrl.adaptation.select` takes it (ANIL, CAVIA); the others are
            meta-learned and stay as they are in the inner loop. None: all of them.
        step_weights: (K,) weights of the query losses after every inner step, whose weighted sum is minimised in place
            of the last of them (MAML++). The attribute of the same name may be changed between updates.
        mixed_mode, recompute: exact meta-gradients in less memory, as for `ssmrl.adapt`.
        chunk_size: at most so many tasks at once, each chunk with a backward pass of its own: the same numbers up to
            rounding, and the memory of one chunk. None: all tasks of equal shapes at once.
        truncate: cut derivatives through the hidden state every this many time steps (truncated backpropagation
            through time, Williams and Peng 1990): another, biased gradient. None: through all T.
        compile: record the tensor operations of the whole meta-gradient at the first update with new shapes, and
            compile them with TorchInductor: the same numbers up to rounding, without the overhead of Python and
            functorch. It takes 10 to 40 seconds, longer for models of many operations, whatever T, and a C++ compiler;
            from torch 2.8 on it is kept on disk for the next process. With "trace" the operations are replayed one by
            one: the same numbers, seconds to record, no compiler. Parameters of the loss cannot be learned with either,
            and what `loss_fn` closes over must not change; every new `loss_fn` object is recorded anew.
        nonfinite: what to do where a loss, a gradient or a weight is not finite; None: raise an error.
        process_group: as for `MetaLearner`: ranks that share the tasks of every update.

    Raises:
        TypeError, ValueError: a negative or non-finite rate, a negative number of steps, a rate beside an optimizer
            that would not use it, an optimizer of another kind, a selector that chooses nothing, weights that are not
            one for each inner step, `first_order` with `mixed_mode` or `recompute`, `compile` with `mixed_mode`, a
            model with nothing to learn, or one with a norm whose second derivative PyTorch gets wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float = DEFAULT_LEARNING_RATE,
        outer_lr: float = OuterStep.DEFAULT_LR,
        first_order: bool = False,
        *,
        inner_steps: int = 1,
        inner_optimizer: GradientTransformation | None = None,
        outer_optimizer: torch.optim.Optimizer | None = None,
        max_grad_norm: float | None = None,
        adapted: Selector | Iterable[Selector] | None = None,
        step_weights: Tensor | Sequence[float] | None = None,
        mixed_mode: bool = False,
        recompute: int | None = None,
        chunk_size: int | None = None,
        truncate: int | None = None,
        compile: bool | Literal["trace"] = False,
        nonfinite: NonFinite | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        params = trainable_parameters(model)
        self.compile = check_compile(compile)
        if compile and mixed_mode:
            raise ValueError("PyTorch does not record forward mode reliably: mixed_mode needs compile=False.")
        self.model = model
        self.mixed_mode = mixed_mode
        self.recompute = recompute
        self.first_order = first_order
        self.inner_steps = check_num_steps("inner_steps", inner_steps)
        self.inner_optimizer = sgd_unless_given(inner_optimizer, inner_lr, name="inner_optimizer", rate_name="inner_lr")
        self.adapted = list(params) if adapted is None else select(model, adapted)
        self.step_weights = step_weights
        self.chunk_size = check_chunk_size(chunk_size)
        self.truncate = None if truncate is None else check_truncate(truncate)
        self.outer_step = OuterStep(params.values(), outer_lr, outer_optimizer, max_grad_norm, nonfinite)
        self._step_weights()
        self._rates = learned_tensors(self.inner_optimizer, split(params, self.adapted)[0])
        held = {id(p) for p in self.outer_step.learned()}
        if any(id(rate) not in held for rate in self._rates):
            raise ValueError(
                "inner_optimizer has rates that require a gradient, which outer_optimizer does not hold: pass it the "
                "model's parameters and the rates, or detach the rates."
            )
        self.shards = Shards(process_group)
        self.shards.broadcast([*model.parameters(), *model.buffers(), *self.outer_step.others(model.parameters())])
        self._traced: dict[Any, Traced] = {}

    @property
    def first_order(self) -> bool:
        """Whether second derivatives are left out; may be changed between updates, as MAML++ does."""
        return self._first_order

    @first_order.setter
    def first_order(self, first_order: bool) -> None:
        check_memory_options(first_order, self.mixed_mode, self.recompute)
        if not first_order:
            _check_norms(self.model)
        self._first_order = first_order

    @property
    def outer_optimizer(self) -> torch.optim.Optimizer:
        """What makes the outer steps."""
        return self.outer_step.optimizer

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
            The mean query loss after adaptation, or its weighted sum over steps, before the outer step; NaN where
            `nonfinite` left the update out.

        Raises:
            TypeError, ValueError: tasks or states that do not fit, or data that are not finite.
            FloatingPointError: the meta-loss or the meta-gradient is not finite, and `nonfinite` does not leave the
                update out; it names the tasks or parameters.
            After an error the model and the outer optimizer are as before, unless a step made weights not finite.
        """
        params = trainable_parameters(self.model)
        state = _as_leaves(initial_hidden_state)
        groups = group_tasks(tasks, state, _first(params))
        self._check_learned(state)
        return self.outer_step.updates(lambda: self._update(params, groups, loss_fn), math.nan)

    @property
    def left_out(self) -> int:
        """How many updates `nonfinite` has left out."""
        return self.outer_step.updates.left_out

    def state_dict(self) -> dict[str, Any]:
        """The model, what else is learned, the outer optimizer and counters: a tree for `save_checkpoint`.

        Data and their random numbers are the caller's to save.
        """
        others = [leaf.detach() for leaf in self.outer_step.others(self.model.parameters())]
        return {"model": self.model.state_dict(), "others": others, "outer_step": self.outer_step.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, to the same bits.

        Raises:
            ValueError, RuntimeError: it is of another model, or of other learned tensors.
        """
        self.model.load_state_dict(state["model"])
        copy_into(self.outer_step.others(self.model.parameters()), state["others"], "rates and other learned tensors")
        self.outer_step.load_state_dict(state["outer_step"])

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
        groups = self._chunks(group_tasks(tasks, initial_hidden_state, _first(params)))
        steps = self._num_steps(num_steps)
        number = sum(len(group.indices) for group in groups)
        losses = _first(params).new_empty(number, dtype=loss_dtype(_first(params)))
        for group in groups:
            options: dict[str, Any] = {"num_steps": steps, "first_order": True}
            meta: Any = (dict(params), [], group.initial_state)
            losses[group.indices] = self._query_losses(meta, {}, group, loss_fn, options).to(losses)
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
        like = _first(weights)
        check_pair("support_x", support_x, "support_y", support_y, like)
        check_finite("support_x", support_x)
        check_finite("support_y", support_y)
        task = Task(support_x[None], support_y[None], support_x[None], support_y[None])
        (group,) = group_tasks(task, initial_hidden_state, like)
        own, shared = split(weights, self.adapted)
        adapted = adapt(
            partial(self._loss, loss_fn),
            own,
            shared,
            group.initial_state,
            support_x,
            support_y,
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

    def _update(self, params: dict[str, nn.Parameter], groups: list[TaskGroup], loss_fn: Loss) -> float:
        num_tasks = sum(len(group.indices) for group in groups)
        losses = _first(params).new_zeros(num_tasks, dtype=loss_dtype(_first(params)))
        with self.outer_step.clean(params.values()):
            for group in self._chunks(shared_out(groups, self.shards.share(num_tasks))):
                # A backward pass each, so that only one group's graph is in memory.
                losses[group.indices] = self._backward(params, group, loss_fn, num_tasks).to(losses)
            self.shards.sum(self.outer_step.learned(), losses)
            check_losses(losses)
            self.outer_step(lambda: [name for name, p in params.items() if not is_finite(p.grad)])
        return float(losses.mean())

    def _backward(self, params: dict[str, nn.Parameter], group: TaskGroup, loss_fn: Loss, num_tasks: int) -> Tensor:
        """(N,) query losses of a group; their sum / num_tasks is differentiated into the `grad` of what is learned."""
        options = {
            "num_steps": self.inner_steps,
            "first_order": self.first_order,
            "mixed_mode": self.mixed_mode,
            "recompute": self.recompute,
        }
        if not self.compile:
            # Constants are in the model, rates in the inner optimizer, which have their gradient from there.
            weights: dict[str, Tensor] = dict(params)
            meta: Any = (weights, [], group.initial_state)
            losses = self._query_losses(meta, {}, group, loss_fn, options, step_weights=self._step_weights())
            (losses.sum() / num_tasks).backward()
            return losses.detach()
        rates = self._rates
        key = (loss_fn, self.inner_optimizer, *options.values(), group.state_axis, self.truncate, self.model.training)
        if key not in self._traced:
            gradient = partial(
                self._gradient, state_axis=group.state_axis, loss_fn=loss_fn, options=options, rates=rates
            )
            self._traced[key] = Traced(gradient, inductor=self.compile is True)
        state = [leaf for leaf in _tensors(group.initial_state) if leaf.is_floating_point()]
        learned = (dict(params), rates, state)
        data = (tuple(group.tasks), group.initial_state, self._step_weights())
        result: tuple[Any, Tensor] = self._traced[key](learned, self._constants(), *data)
        (of_params, of_rates, of_state), losses = result
        accumulate((dict(params), rates), (of_params, of_rates), num_tasks)
        for leaf, share in zip(state, of_state, strict=True):
            if leaf.requires_grad:
                # It is the leaf that is learned, or was split among tasks or stacked from it.
                leaf.backward(share / num_tasks)
        return losses

    def _gradient(
        self,
        meta: Any,
        constants: Any,
        tasks: Any,
        initial_state: Any,
        step_weights: Tensor | None,
        *,
        state_axis: int | None,
        loss_fn: Loss,
        options: dict[str, Any],
        rates: list[Tensor],
    ) -> tuple[Any, Tensor]:
        """Gradient of the sum of a group's query losses, and the losses (N,): a pure function of its arguments."""
        group = TaskGroup([], Task(*tasks), initial_state, state_axis)

        def total(meta: Any) -> tuple[Tensor, Tensor]:
            floats = iter(meta[2])
            state = pytree.tree_map(
                lambda s: next(floats) if isinstance(s, Tensor) and s.is_floating_point() else s, initial_state
            )
            at = (meta[0], meta[1], state)
            losses = self._query_losses(at, constants, group, loss_fn, options, rates, step_weights)
            return losses.sum(), losses

        result: tuple[Any, Tensor] = grad(total, has_aux=True)(meta)
        return result

    def _query_losses(
        self,
        meta: tuple[dict[str, Tensor], list[Tensor], Any],
        constants: Mapping[str, Tensor],
        group: TaskGroup,
        loss_fn: Loss,
        options: dict[str, Any],
        rates: list[Tensor] | None = None,
        step_weights: Tensor | None = None,
    ) -> Tensor:
        """(N,) query losses after adaptation: a pure function of meta-parameters, constants and the group's data.

        Args:
            meta: parameters, tensors in place of `rates` in the inner optimizer, and initial state.
            step_weights: (K,) for the multi-step loss; None: the loss after the last step.
        """
        loss = partial(self._loss, loss_fn)

        def task_loss(params: dict[str, Tensor], rates_now: list[Tensor], task: Task, state: Any) -> Tensor:
            optimizer = with_tensors(self.inner_optimizer, rates, rates_now) if rates else self.inner_optimizer
            own, others = split(params, self.adapted)
            data: dict[str, Any] = {
                "support": (task.support_x, task.support_y),
                "query": (task.query_x, task.query_y),
                "shared": ({**constants, **others}, state),
            }
            if step_weights is None:
                return post_adaptation_loss(loss, own, **data, optimizer=optimizer, **options)
            rest = {name: option for name, option in options.items() if name != "num_steps"}
            return multi_step_loss(loss, own, **data, weights=step_weights, optimizer=optimizer, **rest)

        over_tasks = vmap(task_loss, in_dims=(None, None, 0, group.state_axis))
        losses: Tensor = over_tasks(meta[0], meta[1], group.tasks, meta[2])
        return losses

    def _loss(
        self, loss_fn: Loss, own: Mapping[str, Tensor], others: Mapping[str, Tensor], state: Any, x: Tensor, y: Tensor
    ) -> Tensor:
        state = expand_state(state, x.shape[0])
        output, _ = functional_forward(self.model, {**others, **own}, x, state, truncate=self.truncate)
        return loss_fn(output, y)

    def _constants(self) -> dict[str, Tensor]:
        """Parameters that are not learned, and buffers."""
        frozen = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        return {**frozen, **dict(self.model.named_buffers())}

    def _check_learned(self, state: Any) -> None:
        """Refuse to compile where the outer optimizer learns what only PyTorch's own graph knows of."""
        if self.compile:
            known = [*self.model.parameters(), *self._rates, *_tensors(state)]
            if self.outer_step.others(known):
                raise ValueError(
                    f"compile={self.compile!r} differentiates the model's parameters, rates of the inner optimizer and "
                    f"the initial state alone; outer_optimizer must not hold other tensors."
                )

    def _step_weights(self) -> Tensor | None:
        if self.step_weights is None:
            return None
        like = _first(trainable_parameters(self.model))
        weights = torch.as_tensor(self.step_weights, dtype=like.dtype, device=like.device)
        if tuple(weights.shape) != (self.inner_steps,) or self.inner_steps == 0:
            raise ValueError(
                f"step_weights must have shape (K,) = ({self.inner_steps},), one for each inner step, and K >= 1; "
                f"got {tuple(weights.shape)}."
            )
        return weights

    def _chunks(self, groups: list[TaskGroup]) -> list[TaskGroup]:
        if self.chunk_size is None:
            return groups
        return [chunk for group in groups for chunk in group.chunks(self.chunk_size)]

    def _num_steps(self, num_steps: int | None) -> int:
        return self.inner_steps if num_steps is None else check_num_steps("num_steps", num_steps)


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


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _first(params: Mapping[str, Tensor]) -> Tensor:
    return next(iter(params.values()))


def _as_leaves(state: Any) -> Any:
    """Without the graph that a state may carry; a leaf, which may be learned, stays as it is."""
    return pytree.tree_map(lambda s: s.detach() if isinstance(s, Tensor) and not s.is_leaf else s, state)
