"""Models of `adaptive_control.py`: rounds of planning and training, meta-training from where they end, controls.

Letters: N streams or tasks, T steps of an episode, D the size of an observation, A of an action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchopt
from control_run import Run, exploring, random_actions
from control_systems import Task
from schedules import rate_at
from torch import Tensor, nn
from torch.func import vmap
from torchopt import pytree
from torchopt.base import GradientTransformation

from ssmrl import adapt
from ssmrl.adaptation import clip_by_global_norm, learning_rates, scale_by_learning_rates, select
from ssmrl.adaptation.tree import tree_map
from ssmrl.env_runner import derive_seed
from ssmrl.meta_rl import (
    DynamicsScales,
    MetaLearner,
    NonFinite,
    Transitions,
    adaptive_planning_loss,
    dynamics_scales,
    one_step_loss,
    open_loop_loss,
    planning_loss,
)

__all__ = [
    "aggregated",
    "best_rates",
    "errors_ahead",
    "fitted",
    "inner_steps",
    "meta_trained",
    "scales_of",
    "train",
    "with_a_rate",
]

# Training


def train(run: Run, model: nn.Module, scales: DynamicsScales, data: Transitions, updates: int, seed: int) -> None:
    """Train a model on whole episodes, to be planned with."""
    step, params, ahead = run.step(model, scales), dict(model.named_parameters()), run.size.ahead
    learned = [p for name, p in model.named_parameters() if name != "gain"]  # gains stay 1
    generator, optimizer, left_out = torch.Generator().manual_seed(seed), torch.optim.Adam(learned), 0
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(update, updates, run.size.peak)
        rows = torch.randint(len(data.action), (3 * run.size.batch // 2,), generator=generator)
        starts = (torch.rand(4, generator=generator) * (run.size.episode - ahead)).long().tolist()
        episodes = Transitions(*(leaf[rows] for leaf in data))
        loss = planning_loss(model, step, scales, params, None, episodes, starts=starts, horizon=ahead)
        model.zero_grad()
        loss.backward()
        # Where predictions run away in the batch, there is no direction to go in: the step is left out.
        if bool(torch.isfinite(nn.utils.clip_grad_norm_(learned, 1.0))):
            optimizer.step()
        else:
            left_out += 1
    if left_out:
        print(
            f"{run.folder}: {left_out} of {updates} training steps had no finite gradient and were left out", flush=True
        )


def scales_of(run: Run, data: Any) -> DynamicsScales:
    """Those of the first round, whatever came after it."""
    return dynamics_scales(*(leaf[: run.size.tasks] for leaf in data))


def aggregated(run: Run) -> dict[str, Any]:
    """Data of all rounds, and the recurrent model that was trained on them."""
    model, data, scales = None, None, None
    for r in range(run.size.rounds):
        seed = derive_seed(run.seed, 2, r)
        tasks = [run.system.task(seed, n, "train") for n in range(run.size.tasks)]
        policy = random_actions(run, seed)
        if model is not None:
            policy = exploring(run, run.control(model, scales, seed), seed)
        new, reward, _ = run.episodes(policy, tasks, seed)
        print(f"{run.folder} round {r}: mean return {reward.sum(1).mean():.0f}", flush=True)
        data = new if data is None else Transitions(*map(torch.cat, zip(data, new, strict=True)))
        if model is None:
            scales = scales_of(run, data)
            torch.manual_seed(run.seed)
            model = run.recurrent(scales)
        last = r == run.size.rounds - 1
        train(run, model, scales, data, (3 if last else 1) * run.size.updates, seed)
    assert data is not None
    assert model is not None
    return {"data": tuple(data), "model": model.state_dict()}


# Meta-training


def some_tasks(run: Run, data: Transitions, generator: torch.Generator) -> tuple[int, int, tuple[Tensor, ...]]:
    """Where a window begins, how long it is, and episodes up to some steps after it."""
    size = run.size
    rows = torch.randint(len(data.action), (size.batch,), generator=generator)
    window = size.windows[int(torch.randint(len(size.windows), (1,), generator=generator))]
    begin = int(torch.randint(size.episode - window - size.after + 1, (1,), generator=generator))
    return begin, window, tuple(leaf[rows, : begin + window + size.after] for leaf in data)


def inner_steps(run: Run, rates: Any) -> GradientTransformation:
    """Gradient descent with a rate for every tensor, or every element."""
    steps = scale_by_learning_rates(rates)
    return steps if run.size.clip is None else torchopt.chain(clip_by_global_norm(run.size.clip), steps)


def losses_of(run: Run, model: nn.Module, scales: DynamicsScales, params: Any, task: Any, at: Any, rates: Any) -> Any:
    """Before and after adaptation of those of the parameters that have a rate."""
    begin, window = at
    mine = {name: params[name] for name in rates}
    return adaptive_planning_loss(
        model,
        run.step(model, scales),
        scales,
        mine,
        Transitions(*(leaf[None] for leaf in task)),
        begin=begin,
        window=window,
        horizon=run.size.ahead,
        optimizer=inner_steps(run, rates),
        num_steps=run.size.steps,
        shared={name: value for name, value in params.items() if name not in rates},
    )


def meta_trained(run: Run, model: nn.Module, scales: DynamicsScales, data: Transitions) -> dict[str, Any]:
    """MAML, whose rates may be learned, and whose loss may have the model before it adapts with a weight."""
    params = dict(model.named_parameters())
    mine = {name: params[name] for name in select(model, run.size.adapted)}
    rates = learning_rates(mine, run.size.rate, per_element=run.size.per_element)
    meta = {"params": params}
    if run.size.learned:
        meta["rates"] = rates
    else:
        rates = tree_map(torch.Tensor.detach, rates)

    def loss(meta: Any, task: Any, at: Any) -> Tensor:
        found = losses_of(run, model, scales, meta["params"], task, at, meta.get("rates", rates))
        total: Tensor = found.adapted
        if run.size.unadapted:  # else a model that is not finite before it adapts would make the sum so too
            total = total + run.size.unadapted * found.unadapted
        return total

    minimized(
        run,
        loss,
        meta,
        lambda generator: some_tasks(run, data, generator),
        updates=run.size.meta_updates,
        peak=run.size.meta_peak,
    )
    return {"model": model.state_dict(), "rates": {name: rate.detach() for name, rate in rates.items()}}


def with_a_rate(run: Run, model: nn.Module, scales: DynamicsScales, data: Transitions) -> dict[str, Any]:
    """The model as it is, and a meta-learned rate for the gains of its actuators.

    The physics of the training tasks are known to its hidden state, and leave the gains nothing to do. So the tasks are
    ones that it does not know: an episode with actions -a is one with actions a of a robot whose actuator is wired the
    other way, and has the gain -1. So has one in five.
    """
    params = {name: p.detach() for name, p in model.named_parameters()}
    mine = select(model, run.size.adapted)
    meta = {name: torch.tensor(run.size.rate).log().requires_grad_() for name in mine}

    def loss(meta: Any, task: Any, at: Any) -> Tensor:
        rates = {name: value.exp() for name, value in meta.items()}
        return losses_of(run, model, scales, params, task, at, rates).adapted

    def reversed_actuators(generator: torch.Generator) -> Any:
        begin, window, (observation, action, following) = some_tasks(run, data, generator)
        sign = torch.where(torch.rand(len(action), 1, action.shape[-1], generator=generator) < 0.2, -1.0, 1.0)
        return begin, window, (observation, sign * action, following)

    minimized(run, loss, meta, reversed_actuators, updates=run.size.meta_updates // 4, peak=0.05)
    return {"model": model.state_dict(), "rates": {name: value.detach().exp() for name, value in meta.items()}}


def minimized(run: Run, task_loss: Any, meta: Any, draw: Any, *, updates: int, peak: float) -> None:
    """Change meta-parameters in place by Adam on `task_loss(meta, task, at)`; a few updates may run away."""
    optimizer = torch.optim.Adam(pytree.tree_leaves(meta))
    generator, at = torch.Generator().manual_seed(run.seed), (0, 0)
    learner = MetaLearner(
        lambda meta, task: task_loss(meta, task, at),
        meta,
        outer_optimizer=optimizer,
        max_grad_norm=1.0,
        nonfinite=NonFinite("skip", at_most=20),
    )
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(update, updates, peak)
        *at, tasks = draw(generator)
        learner.update(tasks)
    if learner.left_out:
        print(f"{run.folder}: {learner.left_out} of {updates} meta-updates ran away and were left out", flush=True)


def best_rates(run: Run, model: nn.Module, scales: DynamicsScales, data: Transitions) -> dict[str, Any]:
    """The rate at which gradient steps help a model most that was not meta-trained for them, on the training tasks.

    "loss" is that of every rate, over that of no step.
    """
    params = {name: p.detach() for name, p in model.named_parameters()}
    mine = select(model, run.size.adapted)
    generator = torch.Generator().manual_seed(run.seed)
    batches = [some_tasks(run, data, generator) for _ in range(8)]

    def rates(rate: float) -> dict[str, Tensor]:
        return {name: torch.tensor(rate) for name in mine}

    def loss(rate: float) -> float:
        total = 0.0
        for *at, tasks in batches:
            found = vmap(lambda *task, at=at: losses_of(run, model, scales, params, task, at, rates(rate)))(*tasks)
            # As a guard would have it: where a model runs away, it stays as it was.
            total += float(torch.where(found.adapted < 10 * found.unadapted, found.adapted, found.unadapted).mean())
        return total

    none, found = loss(0.0), {rate: loss(rate) for rate in run.rates}
    best = min(found, key=lambda rate: found[rate])
    return {"rates": rates(best), "rate": best, "loss": {str(rate): value / none for rate, value in found.items()}}


# What is not meta-trained, and how good predictions are


def fitted(run: Run, model: nn.Module, scales: DynamicsScales, tasks: Sequence[Task], seed: int) -> dict[str, Tensor]:
    """The recurrent model, fitted to two episodes of every system: one of the planner on it, one at random."""
    parts = [
        run.episodes(exploring(run, run.control(model, scales, seed), seed), tasks, seed)[0],
        run.episodes(random_actions(run, seed), tasks, seed + 1)[0],
    ]
    data = Transitions(*(torch.stack(leaves, 1) for leaves in zip(*parts, strict=True)))  # (N, 2, T, ·)
    named = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(*episodes: Tensor) -> Any:
        def loss(params: Any, *episodes: Tensor) -> Tensor:
            return one_step_loss(model, scales, params, None, *episodes)[0]

        steps, optimizer = run.size.own_steps, torchopt.adam(1e-3)
        return adapt(loss, named, *episodes, optimizer=optimizer, num_steps=steps, first_order=True).params

    result: dict[str, Tensor] = tree_map(torch.Tensor.detach, vmap(of_one)(*data))
    return result


def errors_ahead(
    run: Run, model: nn.Module, scales: DynamicsScales, rates: Any, data: Transitions
) -> tuple[Tensor, Tensor]:
    """Mean squared errors of open-loop predictions after full windows, before and after adapting to them, (N,) each.

    As with a guard, steps that make the window's own loss larger, or not finite, do not stand.
    """
    window, ahead = run.size.windows[-1], run.size.ahead
    params = {name: p.detach() for name, p in model.named_parameters() if name in rates}
    step, inner = run.step(model, scales), inner_steps(run, rates)

    def at(begin: int, *task: Tensor) -> tuple[Tensor, Tensor]:
        episode = Transitions(*(leaf[None] for leaf in task))
        past, future = episode.steps(begin, begin + window), episode.steps(begin + window, begin + window + ahead)
        state = one_step_loss(model, scales, params, None, *episode.steps(0, begin))[1] if begin else None

        def loss(params: Any) -> Tensor:
            return one_step_loss(model, scales, params, state, *past)[0]

        def error(params: Any) -> Tensor:
            here = one_step_loss(model, scales, params, state, *past)[1]
            return open_loop_loss(step, scales, params, here, *future)

        found = adapt(loss, params, optimizer=inner, num_steps=run.size.steps, first_order=True).params
        stands = loss(found) <= loss(params)
        found = tree_map(lambda a, b: torch.where(stands, a, b), found, params)
        return error(params), error(found)

    with torch.no_grad():
        begins = range(0, run.size.episode - window - ahead + 1, ahead)
        found = [vmap(lambda *task, begin=begin: at(begin, *task))(*data) for begin in begins]
        before, after = (torch.stack(errors).mean(0) for errors in zip(*found, strict=True))
    return before, after
