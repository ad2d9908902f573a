"""MAML for a policy, from start to finish: a point learns to go, after one to three updates, to a goal it cannot see.

Tasks are goals in the square around the start; the reward is minus the distance. The policy collects 20 episodes of a
task, makes one step of policy gradient on them, and collects 20 more; the outer loop changes the initial policy by
TRPO so that the return after the step is high (Finn et al. 2017, section 5.3). All tasks are collected and
differentiated at once. The plot shows the paths on four goals that were not trained on, before and after the updates,
and the learning curve.

    python examples/maml_navigation.py                    # 100 iterations, 8 million steps: some minutes
    python examples/maml_navigation.py --size tiny
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import torch
import torchopt
import tyro
from torch.func import vmap
from torch.utils._pytree import tree_map
from tqdm import tqdm

from ssmrl.core import MLP
from ssmrl.env_runner import (
    Environment,
    by_task,
    collect_episodes,
    derive_seed,
    normal_noise,
    per_task,
    task_family,
)
from ssmrl.meta_rl import (
    GaussianHead,
    PolicyBatch,
    PolicyLosses,
    PolicyModel,
    adapt_policy,
    discounted_returns,
    episode_step,
    fit_linear_baseline,
    generalized_advantages,
    linear_baseline,
    normalize_advantages,
    policy_meta_loss,
    trust_region_step,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

HORIZON = 100


@dataclass(frozen=True)
class Size:
    """How much is spent: iterations of the outer loop, tasks and episodes of each, and tasks of the test."""

    iterations: int
    tasks: int
    episodes: int
    test_tasks: int


SIZES = {"tiny": Size(2, 3, 4, 4), "default": Size(100, 20, 20, 40)}


@dataclass(frozen=True)
class Arguments:
    """MAML with TRPO on 2D navigation."""

    inner_lr: float = 0.5
    """Rate of the inner step; half of it from the second update of the test on."""
    max_divergence: float = 0.01
    """Of an outer step, the mean KL divergence of the adapted policies."""
    updates: int = 3
    """Of the test."""
    seed: int = 0
    """Of everything."""
    size: Literal["tiny", "default"] = "default"
    """tiny runs in seconds, for tests."""
    out: Path = Path("output")
    """Folder for the plot and the figures."""


def stacked(params, num_tasks):
    """The same parameters for every task, (N, ...)."""
    return {name: p.expand(num_tasks, *p.shape) for name, p in params.items()}


def collect(environment, policy, losses, params, episodes, seed):
    """`episodes` of every task with its own parameters: a batch (N, E, T, ...), mean returns (N,), and paths."""
    num_tasks = environment.num_envs // episodes
    actor = per_task(policy.act, params, noise=normal_noise(seed, 2))
    trajectory = by_task(collect_episodes(actor, environment, 1, HORIZON, seed=seed), num_tasks)

    def batch_of(params, one):
        t = episode_step(one.terminated, one.truncated, one.valid)
        # An episode that is cut after 100 steps is the task, as in the paper: nothing comes after it.
        ends = one.terminated | one.truncated
        returns = discounted_returns(one.reward, None, ends, one.truncated, gamma=0.99, valid=one.valid)
        weights = fit_linear_baseline(one.observation, t, returns, valid=one.valid)
        value = linear_baseline(weights, one.observation, t)
        next_value = linear_baseline(weights, one.next_observation, t + 1)
        advantage = generalized_advantages(
            one.reward, value, next_value, ends, one.truncated, gamma=0.99, lam=1.0, valid=one.valid
        )
        batch = PolicyBatch(
            one.observation, one.action, one.reset, one.valid, normalize_advantages(advantage, one.valid), ()
        )
        return batch._replace(old=losses.distribution(params, batch))

    with torch.no_grad():
        batch = vmap(batch_of)(params, trajectory)
    returns = trajectory.reward.sum(dim=(1, 2)) / episodes
    return batch, returns, trajectory.observation


def after_a_step(losses, params, batch, rate):
    """The parameters (N, ...) of every task after one inner step on its batch."""
    optimizer = torchopt.sgd(rate)
    return vmap(lambda p, b: adapt_policy(losses.likelihood_ratio, p, [b], optimizer=optimizer))(params, batch)


def meta_objective(losses, outer_loss, batches, rate):
    """The mean over tasks of an outer loss after the inner step, as a function of the policy's initial parameters."""
    optimizer = torchopt.sgd(rate)

    def of_task(params, batches):
        return policy_meta_loss(losses.likelihood_ratio, outer_loss, params, batches, optimizer=optimizer)

    return lambda params: vmap(of_task, (None, 0))(params, batches).mean()


def train(arguments, size, family, policy, losses):
    """The initial policy, and the mean returns of every iteration before and after the inner step."""
    params = {name: p.detach().clone() for name, p in policy.named_parameters()}
    rate = arguments.inner_lr
    rows = size.tasks * size.episodes
    nobody = [{"goal": (0.0, 0.0)}] * rows
    environment = Environment(family, tasks=nobody, out_of_bounds="clip")
    curve = []
    with tqdm(total=size.iterations, desc="iterations", file=sys.stdout, mininterval=0.5) as bar:
        for iteration in range(size.iterations):
            goals = family.sample(size.tasks, seed=derive_seed(arguments.seed, iteration))
            environment.set_tasks([goal for goal in goals for _ in range(size.episodes)])
            of_tasks, batches, returns = stacked(params, size.tasks), [], []
            for step in range(2):
                seed = derive_seed(arguments.seed, iteration, step)
                batch, mean, _ = collect(environment, policy, losses, of_tasks, size.episodes, seed)
                batches.append(batch)
                returns.append(float(mean.mean()))
                if step == 0:
                    of_tasks = after_a_step(losses, of_tasks, batch, rate)
            # The curvature of a quarter of the episodes will do: the line search keeps the divergence of all in bounds.
            some = [tree_map(lambda leaf: leaf[:, : max(size.episodes // 4, 1)], batch) for batch in batches]
            done = trust_region_step(
                meta_objective(losses, losses.surrogate, batches, rate),
                meta_objective(losses, losses.divergence, batches, rate),
                params,
                curvature_fn=meta_objective(losses, losses.divergence, some, rate),
                max_divergence=arguments.max_divergence,
            )
            params = {name: p.detach() for name, p in done.params.items()}
            curve.append(returns)
            bar.set_postfix(before=f"{returns[0]:.1f}", after=f"{returns[1]:.1f}", step=f"{done.fraction:.2f}")
            bar.update()
    return params, curve


def test(arguments, size, family, policy, losses, params):
    """Returns (updates + 1, N) on tasks of the test, and the paths (updates + 1, N, T, 2) of one episode of each."""
    goals = family.sample(size.test_tasks, seed=arguments.seed, split="test")
    rows = [goal for goal in goals for _ in range(size.episodes)]
    environment = Environment(family, tasks=rows, out_of_bounds="clip")
    of_tasks, returns, paths = stacked(params, size.test_tasks), [], []
    for update in range(arguments.updates + 1):
        seed = derive_seed(arguments.seed, update, 7)
        batch, mean, seen = collect(environment, policy, losses, of_tasks, size.episodes, seed)
        returns.append(mean)
        paths.append(seen[:, 0])
        of_tasks = after_a_step(losses, of_tasks, batch, arguments.inner_lr / (1 if update == 0 else 2))
    return torch.stack(returns), paths, goals


def plot(curve, returns, paths, goals, path):
    fig, axes = plt.subplots(1, 2 + len(paths), figsize=(3.2 * (2 + len(paths)), 3.2))
    before, after = zip(*curve, strict=True)
    axes[0].plot(before, color="0.6", label="before the inner step")
    axes[0].plot(after, color="C0", label="after it")
    axes[0].set(xlabel="iteration", ylabel="mean return", title="training tasks")
    axes[0].legend(fontsize=7)
    axes[1].plot(returns.mean(1), marker="o", color="C0")
    axes[1].set(xlabel="updates", title="test tasks", xticks=range(len(paths)))
    for update, (ax, seen) in enumerate(zip(axes[2:], paths, strict=True)):
        for n in range(min(4, len(seen))):
            moved = seen[n][(seen[n] != 0).any(-1)]
            ax.plot(*moved.T, color=f"C{n}", alpha=0.7)
            ax.plot(*goals[n]["goal"], "*", color=f"C{n}", markersize=12)
        ax.set(title=f"after {update} updates", xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main(arguments: Arguments) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(2)
    size, family = SIZES[arguments.size], task_family("navigation")
    policy = PolicyModel(MLP(2, 2, hidden_dim=100), GaussianHead(2))
    losses = PolicyLosses(policy)
    began = time.time()
    params, curve = train(arguments, size, family, policy, losses)
    seconds = time.time() - began
    returns, paths, goals = test(arguments, size, family, policy, losses, params)
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(curve, returns, paths, goals, arguments.out / "maml_navigation.png")
    steps = 2 * size.iterations * size.tasks * size.episodes * HORIZON
    figures = {
        "mean return after 0, 1, ... updates": returns.mean(1).tolist(),
        "task-blind optimum, oracle": (family.task_blind_return, family.oracle_return),
        "curve": curve,
        "environment steps, at most": steps,
        "seconds": seconds,
        "arguments": {**asdict(arguments), "out": str(arguments.out)},
    }
    (arguments.out / "maml_navigation.json").write_text(json.dumps(figures, indent=1))
    shown = " / ".join(f"{value:.1f}" for value in figures["mean return after 0, 1, ... updates"])
    print(f"test return after 0 / 1 / ... updates: {shown}  ({seconds:.0f} s of training)")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
