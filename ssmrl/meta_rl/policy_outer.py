"""Outer steps of policies that adapt: on a surrogate by any optimizer (ProMP, policy gradients), and by TRPO."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from ssmrl.adaptation.optim import check_num_steps, check_rate
from ssmrl.meta_rl.meta_learner import MetaLearner, check_own, copy_into, map_over_tasks, split_tasks
from ssmrl.meta_rl.nonfinite import NonFinite, Updates
from ssmrl.meta_rl.policy_maml import Loss
from ssmrl.meta_rl.policy_meta_learner import Collected, Params, PolicyMAML, parameters_after
from ssmrl.meta_rl.trust_region import TrustRegionStep, trust_region_step
from ssmrl.sharding import Shards

__all__ = ["GradientOuter", "TrustRegionOuter"]


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
        self.learner.shards.broadcast([*maml.policy.parameters(), *maml.policy.buffers()])

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What makes the steps."""
        return self.learner.outer_step.optimizer

    @property
    def left_out(self) -> int:
        """How many steps `nonfinite` has left out."""
        return self.learner.left_out

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
        gain, counts = _gain(collected, self.learner.shards)
        if any(count % self.num_minibatches for count in counts):
            of = f"the {counts[0]} tasks" if len(counts) == 1 else f"every rank's tasks, of which there are {counts}"
            raise ValueError(f"`num_minibatches` = {self.num_minibatches} must divide {of}.")
        tasks: Any = (collected.batches, gain)
        size = len(gain) // self.num_minibatches
        parts = [part for _, part in split_tasks(tasks, size)]
        counts = [count // self.num_minibatches for count in counts]
        return [self.learner.update(part, counts) for _ in range(self.num_steps) for part in parts]


class TrustRegionOuter:
    """Outer steps by TRPO on the surrogate of the return after adaptation, as in the first publication of MAML.

    Args:
        maml: what it learns.
        max_divergence: δ, on the mean divergence of the adapted policies from those that acted.
        curvature_share: share of every task's episodes, before and after adaptation, that the curvature is computed on;
            the line search holds the bound on all of them.
        exploration_weight: of E-MAML's term, as for `GradientOuter`.
        nonfinite, process_group: as for `GradientOuter`.
        **options: of `trust_region_step`.
    """

    def __init__(
        self,
        maml: PolicyMAML,
        *,
        max_divergence: float = 0.01,
        curvature_share: float = 1.0,
        exploration_weight: float = 0.0,
        nonfinite: NonFinite | None = None,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        if not 0 < curvature_share <= 1:
            raise ValueError(f"`curvature_share` must be above 0 and at most 1; got {curvature_share}.")
        check_rate("exploration_weight", exploration_weight)
        self.maml = maml
        self.curvature_share = curvature_share
        self.options = {**options, "max_divergence": max_divergence, "process_group": process_group}
        self.updates = Updates(nonfinite, self._learned)
        self.shards = Shards(process_group)
        self.shards.broadcast([*maml.policy.parameters(), *maml.policy.buffers(), *maml.rates])
        self._loss = maml.task_loss(maml.losses.surrogate, exploration_weight=exploration_weight)
        self._divergence = maml.task_loss(maml.losses.divergence)

    @property
    def left_out(self) -> int:
        """How many steps `nonfinite` has left out."""
        return self.updates.left_out

    def state_dict(self) -> dict[str, Any]:
        """Policy parameters, rates and counters: a tree for `ssmrl.checkpoint.save_checkpoint`."""
        return {"meta_params": [leaf.detach() for leaf in self._learned()], "updates": self.updates.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, to the same bits.

        Raises:
            ValueError: it is of another policy, or of other rates.
        """
        updates = state["updates"]
        copy_into(self._learned(), state["meta_params"], "meta-parameters")
        self.updates.load_state_dict(updates)

    def step(self, collected: Collected) -> TrustRegionStep:
        """Make the step on what was collected; one that was left out has a loss of NaN and the fraction 0.

        Raises:
            FloatingPointError: the loss or its gradient is not finite, and `nonfinite` does not leave the step out;
                nothing has changed.
        """
        gain, counts = _gain(collected, self.shards)
        meta, (nan, zero) = self._meta(), gain.new_tensor([math.nan, 0.0])
        left_out = TrustRegionStep(meta, nan, nan, zero, 0.0)
        return self.updates(lambda: self._step(meta, (collected.batches, gain), sum(counts)), left_out)

    def _step(self, meta: Any, tasks: Any, number: int) -> TrustRegionStep:
        def over_tasks(loss: Callable[[Any, Any], Tensor], tasks: Any) -> Callable[[Any], Tensor]:
            """The share of this rank in the mean over all tasks."""
            return lambda meta: map_over_tasks(loss, meta, tasks).sum() / number

        options, (batches, gain) = self.options, tasks
        if self.curvature_share < 1:
            # Fewer episodes adapt to other policies than those that acted. The divergence is from them: it has to be at
            # its minimum, or its Hessian is no curvature.
            some = max(round(self.curvature_share * batches[0].valid.shape[1]), 1)
            *before, after = tree_map(lambda leaf: leaf[:, :some], batches)
            with torch.no_grad():
                adapted = parameters_after(self.maml, before, len(after.valid))
                after = after._replace(old=vmap(self.maml.losses.distribution)(adapted, after))
            part = (*before, after)
            options = {**options, "curvature_fn": over_tasks(self._divergence, (part, gain))}
        done = trust_region_step(over_tasks(self._loss, tasks), over_tasks(self._divergence, tasks), meta, **options)
        copy_into(self._learned(), [*done.params[0].values(), *done.params[1]], "meta-parameters")
        return done

    def _meta(self) -> tuple[Params, list[Tensor]]:
        params, rates = self.maml.meta_params
        return {name: p.detach() for name, p in params.items()}, [rate.detach() for rate in rates]

    def _learned(self) -> list[Tensor]:
        params, rates = self.maml.meta_params
        return [*params.values(), *rates]


def _gain(collected: Collected, shards: Shards) -> tuple[Tensor, list[int]]:
    """What the data of this rank's tasks before adaptation were worth, (N,), and how many tasks every rank has.

    It is returns after adaptation, with mean 0 and deviation 1 over the tasks of all ranks.
    """
    returns = collected.returns[-1].to(collected.batches[0].advantage.device)  # where the group communicates from
    counts = shards.counts(len(returns), returns)
    check_own(counts)
    every = shards.gathered(returns, counts)
    gain = (every - every.mean()) / (every.std(correction=0) + 1e-8)
    return gain[shards.place(counts)], counts
