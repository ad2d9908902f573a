"""PolicyMAML: a policy from which one or a few policy-gradient steps on a task do well, and its outer steps.

Letters: N tasks, E episodes, T steps, K inner steps. What is "stacked" has the axis N before every other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map
from torchopt.base import GradientTransformation

from ssmrl.adaptation.optim import check_num_steps, check_optimizer, check_rate, learned_tensors, with_tensors
from ssmrl.adaptation.select import Selector, select, split, trainable_parameters
from ssmrl.meta_rl.evaluation import AdaptationReturns, adaptation_returns
from ssmrl.meta_rl.meta_learner import MetaLearner, map_over_tasks, split_tasks
from ssmrl.meta_rl.nonfinite import NonFinite
from ssmrl.meta_rl.policy_batch import PolicyBatch, PolicyLosses
from ssmrl.meta_rl.policy_maml import Loss, adapt_policy, policy_meta_loss
from ssmrl.meta_rl.trust_region import TrustRegionStep, trust_region_step

__all__ = ["Collected", "GradientOuter", "PolicyMAML", "TrustRegionOuter"]

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
            batch, returns = collect(_after(self, batches, num_tasks), k)
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


class GradientOuter:
    """Outer steps on a surrogate of the return after adaptation, by any optimizer.

    With `clipped` surrogates, 5 steps and a penalty it is ProMP (Rothfuss et al. 2019,
    https://arxiv.org/abs/1810.06784, algorithm 1), whose defaults are these; with the likelihood ratio and one step it
    is MAML with vanilla policy gradients.

    Args:
        maml: what it learns.
        outer_loss: (params, batch) -> scalar; None: `maml.losses.clipped` with `clip`.
        outer_lr: of Adam.
        outer_optimizer: in place of Adam; what it holds is learned.
        num_steps: passes over the same data.
        num_minibatches: steps of each pass, on as many tasks each; tasks are split in order. N must be a multiple.
        clip: ε of the default loss.
        divergence_weight: η of ProMP's penalty.
        exploration_weight: of E-MAML's term (Stadie et al. 2018, https://arxiv.org/abs/1803.01118): the data before
            the inner steps are made likelier as far as the return of their task after adaptation is above the others'.
        max_grad_norm, chunk_size, compile, nonfinite: as for `MetaLearner`.
        process_group: of `torch.distributed`, whose ranks collect with tasks of their own, at least one each, and make
            the same steps. Policy and rates are at first those of the first rank. None: one process.
    """

    def __init__(
        self,
        maml: PolicyMAML,
        outer_loss: Loss | None = None,
        *,
        outer_lr: float | None = None,
        outer_optimizer: torch.optim.Optimizer | None = None,
        num_steps: int = 5,
        num_minibatches: int = 1,
        clip: float = 0.3,
        divergence_weight: float = 0.0005,
        exploration_weight: float = 0.0,
        max_grad_norm: float | None = None,
        chunk_size: int | None = None,
        compile: bool | Literal["trace"] = False,
        nonfinite: NonFinite | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if check_num_steps("num_steps", num_steps) < 1:
            raise ValueError(f"`num_steps` must be at least 1; got {num_steps}.")
        if check_num_steps("num_minibatches", num_minibatches) < 1:
            raise ValueError(f"`num_minibatches` must be at least 1; got {num_minibatches}.")
        check_rate("divergence_weight", divergence_weight)
        check_rate("exploration_weight", exploration_weight)
        outer_loss = partial(maml.losses.clipped, clip=clip) if outer_loss is None else outer_loss
        weights = {"divergence_weight": divergence_weight, "exploration_weight": exploration_weight}
        self.maml = maml
        self.num_steps = num_steps
        self.num_minibatches = num_minibatches
        self.learner = MetaLearner(
            maml.task_loss(outer_loss, **weights),
            maml.meta_params,
            outer_lr=outer_lr,
            outer_optimizer=outer_optimizer,
            max_grad_norm=max_grad_norm,
            chunk_size=chunk_size,
            compile=compile,
            nonfinite=nonfinite,
            process_group=process_group,
            own_tasks=True,
        )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What makes the steps."""
        return self.learner.outer_step.optimizer

    def state_dict(self) -> dict[str, Any]:
        """Policy parameters, rates, optimizer and counters: a tree for `ssmrl.checkpoint.save_checkpoint`."""
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, to the same bits."""
        self.learner.load_state_dict(state)

    def step(self, collected: Collected) -> list[float]:
        """Make the steps on what was collected; return the loss before each, NaN of those that were left out.

        Raises:
            ValueError: `num_minibatches` does not divide the number of tasks.
            FloatingPointError: a loss or gradient is not finite, and `nonfinite` does not leave the step out; steps
                before it were made.
        """
        shards, like = self.learner.shards, next(self.maml.policy.parameters())
        returns = collected.returns[-1].to(like.device)  # where the ranks' group communicates from
        counts = shards.counts(len(returns), like)
        if any(count % self.num_minibatches for count in counts):
            of = f"the {counts[0]} tasks" if len(counts) == 1 else f"every rank's tasks, of which there are {counts}"
            raise ValueError(f"`num_minibatches` = {self.num_minibatches} must divide {of}.")
        gain = _gain(shards.gathered(returns, counts))[shards.place(counts)]
        tasks: Any = (collected.batches, gain)
        size = len(returns) // self.num_minibatches
        parts = [part for _, part in split_tasks(tasks, size)]
        return [self.learner.update(part) for _ in range(self.num_steps) for part in parts]


class TrustRegionOuter:
    """Outer steps by TRPO on the surrogate of the return after adaptation, as in the first publication of MAML.

    Args:
        maml: what it learns.
        max_divergence: δ, on the mean divergence of the adapted policies from those that acted.
        curvature_share: share of every task's episodes, before and after adaptation, that the curvature is computed on;
            the line search holds the bound on all of them.
        exploration_weight: of E-MAML's term, as for `GradientOuter`.
        **options: of `trust_region_step`.
    """

    def __init__(
        self,
        maml: PolicyMAML,
        *,
        max_divergence: float = 0.01,
        curvature_share: float = 1.0,
        exploration_weight: float = 0.0,
        **options: Any,
    ) -> None:
        if not 0 < curvature_share <= 1:
            raise ValueError(f"`curvature_share` must be above 0 and at most 1; got {curvature_share}.")
        check_rate("exploration_weight", exploration_weight)
        self.maml = maml
        self.curvature_share = curvature_share
        self.options = {**options, "max_divergence": max_divergence}
        self._loss = maml.task_loss(maml.losses.surrogate, exploration_weight=exploration_weight)
        self._divergence = maml.task_loss(maml.losses.divergence)

    def step(self, collected: Collected) -> TrustRegionStep:
        """Make the step on what was collected.

        Raises:
            FloatingPointError: the loss or its gradient is not finite; nothing has changed.
        """
        tasks = (collected.batches, _gain(collected.returns[-1]))

        def over_tasks(loss: Callable[[Any, Any], Tensor], tasks: Any) -> Callable[[Any], Tensor]:
            return lambda meta: map_over_tasks(loss, meta, tasks).mean()

        options = self.options
        if self.curvature_share < 1:
            # Fewer episodes adapt to other policies than those that acted. The divergence is from them: it has to be at
            # its minimum, or its Hessian is no curvature.
            episodes = collected.batches[0].valid.shape[1]
            some = max(round(self.curvature_share * episodes), 1)
            *before, after = tree_map(lambda leaf: leaf[:, :some], collected.batches)
            with torch.no_grad():
                adapted = _after(self.maml, before, len(after.valid))
                after = after._replace(old=vmap(self.maml.losses.distribution)(adapted, after))
            part = (*before, after)
            options = {**options, "curvature_fn": over_tasks(self._divergence, (part, tasks[1]))}
        params, rates = self.maml.meta_params
        meta = ({name: p.detach() for name, p in params.items()}, [rate.detach() for rate in rates])
        done = trust_region_step(over_tasks(self._loss, tasks), over_tasks(self._divergence, tasks), meta, **options)
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(done.params[0][name])
            for rate, value in zip(rates, done.params[1], strict=True):
                rate.copy_(value)
        return done


def _after(maml: PolicyMAML, batches: Sequence[PolicyBatch], num_tasks: int) -> Params:
    """θ_k of every task after D_0, ..., D_{k-1}; θ_0 after none."""
    return maml.adapt(batches) if batches else maml.stacked(num_tasks)


def _gain(after: Tensor) -> Tensor:
    """(N,) what the data before adaptation were worth: returns after it, with mean 0 and deviation 1 over tasks."""
    return (after - after.mean()) / (after.std(correction=0) + 1e-8)
