"""MAML for a policy, from start to finish: a point learns to go, after one to three updates, to a goal it cannot see.

Tasks are goals in the square around the start; the reward is minus the distance. The policy collects 20 episodes of a
task, makes one step of policy gradient on them, and collects 20 more; the outer loop changes the initial policy by
TRPO so that the return after the step is high (Finn et al. 2017, section 5.3). In the last third of the training it
makes two steps, and the outer loop differentiates through both. All tasks are collected and differentiated at once.
The plot shows the paths on four goals that were not trained on, before and after the updates, and the learning curve.

    python examples/maml_navigation.py                    # 88 iterations, 8 million steps: three minutes
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
    PolicyMAML,
    PolicyModel,
    TrustRegionOuter,
    adaptation_report,
    linear_advantages,
    plot_adaptation,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

HORIZON = 100


@dataclass(frozen=True)
class Size:
    """How much is spent: iterations of the outer loop, and tasks and episodes of each, in training and in the test."""

    iterations: tuple[int, ...]
    """With one inner step, with two, ..."""
    tasks: int
    episodes: int
    test_tasks: int
    test_episodes: int


# The paper's test, too, takes at least twice as many episodes for an update as its training (4,000 steps).
SIZES = {"tiny": Size((1, 1), 3, 4, 4, 4), "default": Size((64, 24), 20, 20, 40, 40)}


@dataclass(frozen=True)
class Arguments:
    """MAML with TRPO on 2D navigation."""

    inner_lr: float = 0.5
    """Rate of the first inner step; every further one has half of the rate before it."""
    max_divergence: float = 0.02
    """Of an outer step, the mean KL divergence of the adapted policies."""
    curvature_share: float = 0.25
    """Share of the episodes that the curvature of an outer step is computed on."""
    updates: int = 3
    """Of the test."""
    seed: int = 0
    """Of everything."""
    threads: int = 2
    """Of the gradients."""
    size: Literal["tiny", "default"] = "default"
    """tiny runs in seconds, for tests."""
    out: Path = Path("output")
    """Folder for the plot and the figures."""


def collector(environment, maml, episodes, paths=None, *key):
    """`collect(params, k)`: `episodes` of every task with its own parameters, and the mean returns (N,)."""
    num_tasks = environment.num_envs // episodes

    def collect(params, k):
        seed = derive_seed(*key, k)
        actor = per_task(maml.policy.act, params, noise=normal_noise(seed, 2))
        trajectory = by_task(collect_episodes(actor, environment, 1, HORIZON, seed=seed), num_tasks)
        # An episode that is cut after 100 steps is the task, as in the paper: nothing comes after it.
        batch = vmap(lambda p, one: maml.losses.batch(p, one, linear_advantages(one)))(params, trajectory)
        if paths is not None:
            paths.append(trajectory.observation[:, 0])
        return batch, trajectory.reward.sum(dim=(1, 2)) / episodes

    return collect


def learner(arguments, policy, inner_steps):
    rate = arguments.inner_lr
    return PolicyMAML(policy, torchopt.sgd(lambda step: rate * 0.5**step), inner_steps=inner_steps)


def train(arguments, size, family, policy):
    """The mean returns of every iteration before and after the inner steps, with its environment steps.

    The policy is learned in place.
    """
    nobody = [{"goal": (0.0, 0.0)}] * (size.tasks * size.episodes)
    environment = Environment(family, tasks=nobody, out_of_bounds="clip")
    options = {"max_divergence": arguments.max_divergence, "curvature_share": arguments.curvature_share}
    phases = [inner_steps for inner_steps, number in enumerate(size.iterations, 1) for _ in range(number)]
    curve, steps = [], 0
    with tqdm(total=len(phases), desc="iterations", file=sys.stdout, mininterval=0.5) as bar:
        for iteration, inner_steps in enumerate(phases):
            goals = family.sample(size.tasks, seed=derive_seed(arguments.seed, iteration))
            environment.set_tasks([goal for goal in goals for _ in range(size.episodes)])
            maml = learner(arguments, policy, inner_steps)
            collect = collector(environment, maml, size.episodes, None, arguments.seed, iteration)
            collected = maml.collect(collect, size.tasks)
            done = TrustRegionOuter(maml, **options).step(collected)
            before, *_, after = collected.returns.mean(1).tolist()
            steps += sum(int(batch.valid.sum()) for batch in collected.batches)
            curve.append([before, after, steps])
            bar.set_postfix(before=f"{before:.1f}", after=f"{after:.1f}", step=f"{done.fraction:.2f}")
            bar.update()
    return curve


def test(arguments, size, family, maml):
    """Returns after 0, 1, ... updates on tasks of the test, and the paths (N, T, 2) of one episode of each."""
    goals = family.sample(size.test_tasks, seed=0, split="test")
    rows = [goal for goal in goals for _ in range(size.test_episodes)]
    environment = Environment(family, tasks=rows, out_of_bounds="clip")
    paths = []
    collect = collector(environment, maml, size.test_episodes, paths, arguments.seed, 0, 7)
    returns = maml.evaluate(collect, size.test_tasks, num_updates=arguments.updates)
    # After the first collection adapted policies and those of the control take turns.
    return returns, [*paths[:1], *paths[1::2]], goals


def plot(curve, report, paths, goals, path):
    fig, axes = plt.subplots(1, 2 + len(paths), figsize=(3.2 * (2 + len(paths)), 3.2))
    before, after, steps = zip(*curve, strict=True)
    millions = [s / 1e6 for s in steps]
    axes[0].plot(millions, before, color="0.6", label="before the inner steps")
    axes[0].plot(millions, after, color="C0", label="after them")
    axes[0].set(xlabel="environment steps, millions", ylabel="mean return", title="training tasks")
    axes[0].legend(fontsize=7)
    plot_adaptation(report, axes[1])
    axes[1].set(title="test tasks")
    axes[1].legend(fontsize=7)
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
    torch.set_num_threads(arguments.threads)
    size, family = SIZES[arguments.size], task_family("navigation")
    policy = PolicyModel(MLP(2, 2, hidden_dim=100), GaussianHead(2))
    began = time.time()
    curve = train(arguments, size, family, policy)
    seconds = time.time() - began
    returns, paths, goals = test(arguments, size, family, learner(arguments, policy, 1))
    arguments.out.mkdir(parents=True, exist_ok=True)
    references = {"oracle": family.oracle_return, "task_blind": family.task_blind_return}
    report = adaptation_report(
        returns.adapted[None], returns.control[None], **references, generator=torch.Generator().manual_seed(0)
    )
    plot(curve, report, paths, goals, arguments.out / "maml_navigation.png")
    figures = {
        "returns after 0, 1, ... updates": returns.adapted.tolist(),
        "returns never adapted": returns.control.tolist(),
        "task-blind optimum, oracle": (family.task_blind_return, family.oracle_return),
        "curve: before, after, steps": curve,
        "seconds": seconds,
        "arguments": {**asdict(arguments), "out": str(arguments.out)},
    }
    (arguments.out / "maml_navigation.json").write_text(json.dumps(figures))
    shown = " / ".join(f"{value:.1f}" for value in report.mean.tolist())
    print(f"test return after 0 / 1 / ... updates: {shown}  ({seconds:.0f} s of training)")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
