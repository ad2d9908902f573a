"""PolicyMAML: a policy from which one or a few policy-gradient steps on a task do well, and its outer steps.

Letters: N tasks, E episodes, T steps, K inner steps. What is "stacked" has the axis N before every other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vmap
from torchopt.base import GradientTransformation

from ssmrl.adaptation.optim import check_num_steps, check_optimizer, learned_tensors, with_tensors
from ssmrl.adaptation.select import Selector, select, split, trainable_parameters
from ssmrl.meta_rl.evaluation import AdaptationReturns, adaptation_returns
from ssmrl.meta_rl.policy_batch import PolicyBatch, PolicyLosses
from ssmrl.meta_rl.policy_maml import Loss, adapt_policy, policy_meta_loss

__all__ = ["Collected", "PolicyMAML", "parameters_after"]

Params = dict[str, Tensor]
Collect = Callable[[Params, int], tuple[PolicyBatch, Tensor]]
"""`collect(params, k) -> (batch, returns)`: episodes of every task with its own parameters, both stacked.

params (N, ...) name -> tensor, those after k inner steps; batch (N, E, T, ...); returns (N,), the mean of a task's
episodes. The data must be those of these parameters: `PolicyLosses.batch` records what acted.
"""


class Collected(NamedTuple):
    """What was collected before and after every inner step, of all tasks."""

    batches: tuple[PolicyBatch, ...]
    """D_0, ..., D_K, each (N, E, T, ...)."""
    returns: Tensor
    """(K + 1, N)."""


class PolicyMAML:
    """A policy θ that is to be learned so that K policy-gradient steps, each on new data, make it good at a task:

        θ_{k+1} = θ_k + update(∇ inner_loss(θ_k, D_k)),  D_k collected by θ_k.

    Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning", https://arxiv.org/abs/1703.03400, section 4.2. The inner
    steps are `ssmrl.adapt`, here and at test time. What learns θ is a `TrustRegionOuter` (MAML with TRPO) or a
    `GradientOuter` (ProMP, and any other surrogate); both work on all tasks at once.

    Args:
        policy: a `PolicyModel`. Its parameters that require a gradient are learned, in place.
        inner_optimizer: a TorchOpt transformation, `torchopt.sgd(0.1)` for instance. Rates that are tensors and require
            a gradient (`ssmrl.adaptation.learning_rates`) are learned too.
        inner_steps: K. With 0 nothing adapts: the outer steps are then plain TRPO or PPO over tasks, which with the
            task in the observation gives the oracle.
        inner_loss: (params, batch) -> scalar, of `PolicyLosses(policy)` or one's own; None: its `likelihood_ratio`.
        adapted: which of the parameters the inner steps change, as `ssmrl.adaptation.select` takes it (ANIL); None:
            all.
        first_order: leave out the second derivatives.

    Raises:
        TypeError, ValueError: a setting that is out of range or of another kind.
    """

    def __init__(
        self,
        policy: nn.Module,
        inner_optimizer: GradientTransformation,
        *,
        inner_steps: int = 1,
        inner_loss: Loss | None = None,
        adapted: Selector | Iterable[Selector] | None = None,
        first_order: bool = False,
    ) -> None:
        check_optimizer("inner_optimizer", inner_optimizer)
        params = trainable_parameters(policy)
        self.policy = policy
        self.losses = PolicyLosses(policy)
        self.inner_optimizer = inner_optimizer
        self.inner_steps = check_num_steps("inner_steps", inner_steps)
        self.inner_loss = self.losses.likelihood_ratio if inner_loss is None else inner_loss
        self.adapted = list(params) if adapted is None else select(policy, adapted)
        self.first_order = first_order
        self.rates = learned_tensors(inner_optimizer, split(params, self.adapted)[0])

    @property
    def meta_params(self) -> tuple[dict[str, nn.Parameter], list[Tensor]]:
        """What is learned: the policy's parameters, and learned rates. The tensors themselves."""
        return trainable_parameters(self.policy), self.rates

    def stacked(self, num_tasks: int) -> Params:
        """θ for each of N tasks, without copying it."""
        return {name: p.detach().expand(num_tasks, *p.shape) for name, p in self.policy.named_parameters()}

    @torch.no_grad()
    def adapt(self, batches: Sequence[PolicyBatch]) -> Params:
        """θ_k of every task, stacked, after one step on each of its batches D_0, ..., D_{k-1}, which are stacked."""
        if not batches:
            raise ValueError("`batches` must hold at least one batch; got none. `stacked` gives the initial policy.")
        params, rates = self.meta_params
        path = partial(self._adapted, dict(params), rates)
        return vmap(path)(tuple(batches))

    def collect(self, collect: Collect, num_tasks: int, *, num_steps: int | None = None) -> Collected:
        """Collect with θ_0, adapt, collect with θ_1, ..., collect with θ_K.

        Args:
            collect: see `Collect`.
            num_tasks: N.
            num_steps: K, where it is to be another one.
        """
        steps = self.inner_steps if num_steps is None else check_num_steps("num_steps", num_steps)
        with_adapted = self._with_adapted(collect, num_tasks)
        batches: list[PolicyBatch] = []
        returns = []
        for k in range(steps + 1):
            batch, of_tasks = with_adapted(batches, k)
            batches.append(batch)
            returns.append(of_tasks)
        return Collected(tuple(batches), torch.stack(returns))

    def evaluate(
        self, collect: Collect, num_tasks: int, *, num_updates: int | None = None, control: bool = True
    ) -> AdaptationReturns:
        """Returns (U + 1, N) after 0, ..., U inner steps, and those of the same collections without any.

        Args:
            collect, num_tasks: as for `collect`, on tasks of the test.
            num_updates: U; None: K.
            control: whether to collect without adaptation too.
        """
        updates = self.inner_steps if num_updates is None else num_updates
        none: list[PolicyBatch] = []
        return adaptation_returns(
            self._with_adapted(collect, num_tasks),
            lambda batches, batch, k: [*batches, batch],
            none,
            updates,
            control=control,
        )

    def task_loss(
        self, outer_loss: Loss, *, divergence_weight: float = 0.0, exploration_weight: float = 0.0
    ) -> Callable[[Any, Any], Tensor]:
        """The outer loss as a pure function (meta_params, (batches, gain)) -> scalar for one task.

        Args:
            outer_loss: (params, batch) -> scalar.
            divergence_weight: of the divergence of the policy at every inner step from the one that acted (ProMP).
            exploration_weight: of `PolicyLosses.exploration` of every inner step, with the task's `gain` (E-MAML).
        """

        def loss(meta: Any, task: Any) -> Tensor:
            params, rates = meta
            batches, gain = task

            def before(at: Any, batch: PolicyBatch, k: int) -> Tensor:
                total = torch.zeros_like(gain)
                if divergence_weight:
                    total = total + divergence_weight * self.losses.divergence(at, batch)
                if exploration_weight:
                    total = total + exploration_weight * self.losses.exploration(at, batch, gain)
                return total

            return policy_meta_loss(
                self.inner_loss,
                outer_loss,
                params,
                batches,
                optimizer=self._optimizer(rates),
                adapted=self.adapted,
                before=before if divergence_weight or exploration_weight else None,
                first_order=self.first_order,
            )

        return loss

    def _with_adapted(
        self, collect: Collect, num_tasks: int
    ) -> Callable[[list[PolicyBatch], int], tuple[PolicyBatch, Tensor]]:
        """`(batches, k) -> (batch, returns)`: what `collect` makes with the parameters that batches D_0, ... give."""

        def with_adapted(batches: list[PolicyBatch], k: int) -> tuple[PolicyBatch, Tensor]:
            batch, returns = collect(parameters_after(self, batches, num_tasks), k)
            if returns.shape != (num_tasks,):
                raise ValueError(
                    f"`collect` must return (batch, returns) with returns of shape (N,) = ({num_tasks},); got "
                    f"{tuple(returns.shape)}."
                )
            return batch, returns

        return with_adapted

    def _adapted(self, params: Params, rates: list[Tensor], batches: Sequence[PolicyBatch]) -> Params:
        optimizer = self._optimizer(rates)
        return {
            **{name: p.detach() for name, p in self.policy.named_parameters()},
            **adapt_policy(self.inner_loss, params, batches, optimizer=optimizer, adapted=self.adapted),
        }

    def _optimizer(self, rates: list[Tensor]) -> GradientTransformation:
        return with_tensors(self.inner_optimizer, self.rates, rates) if self.rates else self.inner_optimizer


def parameters_after(maml: PolicyMAML, batches: Sequence[PolicyBatch], num_tasks: int) -> Params:
    """θ_k of every task after D_0, ..., D_{k-1}; θ_0 after none."""
    return maml.adapt(batches) if batches else maml.stacked(num_tasks)
