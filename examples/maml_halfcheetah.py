"""MAML for robots: a policy that runs, after one update on a few seconds of experience, as this task wants it to.

HalfCheetah is paid for running forwards or backwards, or at a velocity, and cannot see which. The policy collects 20
episodes of a task, makes one step of policy gradient on them, and collects 20 more; the outer loop changes the initial
policy by ProMP (Rothfuss et al. 2019) so that the return after the step is high. All tasks are collected and
differentiated at once. At the end it is tested with up to three updates, beside a control that never adapts, and the
curves are drawn.

    python examples/maml_halfcheetah.py                            # direction: 20 million steps in some minutes
    python examples/maml_halfcheetah.py --family halfcheetah-vel   # velocity, 0 to 2 m/s
    python examples/maml_halfcheetah.py --memory gru               # a recurrent policy
    python examples/maml_halfcheetah.py --oracle                   # a policy that is told the task, for comparison
    python examples/maml_halfcheetah.py --resume                   # go on with a run that was stopped
    python examples/maml_halfcheetah.py --size tiny
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium
import matplotlib as mpl
import torch
import torchopt
import tyro
from gymnasium.vector import VectorWrapper
from torch import nn
from torch.func import vmap
from tqdm import tqdm

from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from ssmrl.core import GRU, StateSpaceModel
from ssmrl.env_runner import (
    Environment,
    RunningMoments,
    by_task,
    derive_seed,
    first_episodes,
    init_moments,
    normal_noise,
    normalize,
    per_task,
    policy_inputs,
    rollout,
    task_family,
    update_moments,
)
from ssmrl.meta_rl import (
    GaussianHead,
    GradientOuter,
    PolicyMAML,
    PolicyModel,
    adaptation_report,
    linear_advantages,
    plot_adaptation,
)
from ssmrl.stop import StopSignal

mpl.use("Agg")
import matplotlib.pyplot as plt

HORIZON = 100
LAMBDA = 0.95  # of the advantages; 1 in ProMP, which varies more and learns more slowly here


@dataclass(frozen=True)
class Size:
    """How much is spent: iterations of the outer loop, tasks and episodes of each, in training and in the test."""

    iterations: int
    tasks: int
    episodes: int
    test_tasks: int
    test_episodes: int


# The noise of a gradient on 20 episodes is averaged over tasks in training; in the test every task has its own.
SIZES = {"tiny": Size(3, 2, 2, 2, 2), "default": Size(500, 10, 20, 40, 40)}


@dataclass(frozen=True)
class Arguments:
    """MAML with ProMP on a family of robot tasks."""

    family: Literal["halfcheetah-dir", "halfcheetah-vel", "ant-dir", "humanoid-dir"] = "halfcheetah-dir"
    """What the tasks are."""
    memory: Literal["none", "gru", "ssm"] = "none"
    """A recurrent policy sees its previous action and reward, and keeps a state over an episode."""
    width: int = 64
    """Of the two hidden layers, or of the recurrent state."""
    inner_lr: float = 0.2
    """Rate of the first inner step; every further one of the test has half of the rate before it."""
    outer_lr: float = 0.002
    """Of Adam."""
    outer_steps: int = 5
    """Steps on the same data."""
    oracle: bool = False
    """The task is part of the observation, and nothing adapts: the same outer loop is then PPO."""
    updates: int = 3
    """Of the test."""
    seed: int = 0
    """Of everything."""
    size: Literal["tiny", "default"] = "default"
    """tiny runs in seconds, for tests."""
    iterations: int | None = None
    """In place of those of the size; one of the default size is 40,000 steps."""
    two_step_iterations: int = 0
    """After those, with two inner steps, for the second update of the test; one of the default size is 60,000 steps."""
    two_step_lr: float = 0.0005
    """Of Adam in these."""
    threads: int = 2
    """Of the physics and the gradients."""
    compile: bool = True
    """Compile the meta-gradient, once, and take less time after that."""
    save_every: int = 50
    """Iterations between two checkpoints, which --resume goes on from."""
    resume: bool = False
    """Go on from the last checkpoint in the folder."""
    stop_after: int | None = None
    """Save a checkpoint and stop at this iteration."""
    tensorboard: bool = False
    """Write the curves for TensorBoard too; it needs the package tensorboard."""
    video: bool = False
    """Film the adapted policy on two tasks; it needs the package moviepy and a machine that renders MuJoCo."""
    out: Path = Path("output")
    """Folder for the plot, the figures, checkpoints and videos."""


class Clock:
    """Seconds spent in each part of the run."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began


class Timed(VectorWrapper):
    """An environment whose physics are timed."""

    def __init__(self, environment, clock):
        super().__init__(environment)
        self.clock = clock

    def step(self, actions):
        with self.clock("physics"):
            return self.env.step(actions)


def tasks_of(arguments, family, num_tasks, seed, split="train"):
    """Directions by turns, so that every batch has as many of each; of other families, tasks drawn anew."""
    if arguments.family in ("halfcheetah-dir", "ant-dir"):
        return [{"direction": (-1.0, 1.0)[n % 2]} for n in range(num_tasks)]
    return family.sample(num_tasks, seed=seed, split=split)


def make_environment(arguments, family, clock, rows):
    tasks = family.sample(1, seed=0) * rows  # `collector` sets others
    settings = {"autoreset_mode": "SameStep", "num_threads": arguments.threads}  # every step of every row is valid
    return Timed(Environment(family, tasks=tasks, out_of_bounds="clip", **settings), clock)


def make_policy(arguments, space, actions):
    """A policy of what the arguments say; inputs are the observation, what came before, or the task."""
    inputs, width = space.shape[0], arguments.width
    if arguments.memory != "none":
        inputs += actions + 2
    if arguments.oracle:
        inputs += 1
    if arguments.memory == "gru":
        model = GRU(width, inputs, actions)
    elif arguments.memory == "ssm":
        model = StateSpaceModel(width, inputs, actions, hidden_dim=width)
    else:
        layers = nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, actions)
        model = nn.Sequential(*layers)
        for layer in layers[::2]:  # as in ProMP: with PyTorch's smaller weights an inner step moves the policy less
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return PolicyModel(model, GaussianHead(actions))


def policy_sees(arguments, moments, x, task):
    """What the policy sees of x (..., D) or (..., D + A + 2): observations normalised, and the oracle's task."""
    size = len(moments.mean)
    known = [task.expand(*x.shape[:-1], 1)] if arguments.oracle else []
    return torch.cat([normalize(moments, x[..., :size]), x[..., size:], *known], -1)


def collector(arguments, maml, moments, environment, tasks, clock, seen, *key):
    """`collect(params, k)` of these tasks, with random numbers of their own for every `key` and k.

    Every task has as many rows of the environment as any other, for 100 steps each; its return is that of their first
    episodes. What it observes, and where that is valid, is put into the list `seen`, if there is one.
    """
    num_tasks, policy = len(tasks), maml.policy
    episodes = environment.num_envs // num_tasks
    environment.unwrapped.set_tasks([task for task in tasks for _ in range(episodes)])
    actions = environment.single_action_space.shape[0]
    told = torch.tensor([[next(iter(task.values()))] for task in tasks])  # (N, 1)
    remembers = arguments.memory != "none"

    def act(params, x, hidden_state, reset, noise):
        return policy.act(
            params["policy"], policy_sees(arguments, moments, x, params["task"]), hidden_state, reset, noise
        )

    def batch_of(params, trajectory, x, task):
        advantage = linear_advantages(trajectory, lam=LAMBDA)
        return maml.losses.batch(params, trajectory, advantage, policy_sees(arguments, moments, x, task))

    def collect(params, k):
        torch.set_num_threads(1)  # the physics have the cores
        with clock("collect"):
            seed = derive_seed(arguments.seed, *key, k)
            actor = per_task(act, {"policy": params, "task": told}, noise=normal_noise(seed, actions))
            # Where episodes end early, as Ant's and Humanoid's do, more of them follow in the same row.
            flat, _ = rollout(actor, environment, HORIZON, seed=seed, previous=remembers)
        torch.set_num_threads(arguments.threads)
        with clock("gradients"):
            x = flat.observation
            if remembers:
                x = policy_inputs(flat, environment.single_observation_space, environment.single_action_space)
            trajectory = by_task(flat, num_tasks)
            if seen is not None:
                seen.append((flat.observation, flat.valid))
            batch = vmap(batch_of)(params, trajectory, x.unflatten(0, (num_tasks, -1)), told)
        return batch, by_task(first_episodes(flat, 1), num_tasks).reward.sum((1, 2)) / episodes

    return collect


def train(arguments, size, family, maml, outer, clock, writer):
    """The mean returns of every iteration, before and after the inner steps, with its steps; and observations' moments.

    There are no returns if the run was stopped.
    """
    environment = make_environment(arguments, family, clock, size.tasks * size.episodes)
    curve, folder = [], arguments.out / "checkpoints"
    moments = init_moments(environment.single_observation_space.shape)
    found = load_checkpoint(folder) if arguments.resume else None
    if found is not None:
        for damaged in found.skipped:
            print(damaged)
        curve = found.state["curve"]
        outer.load_state_dict(found.state["outer"])
        clock.seconds.update(found.state["seconds"])
        moments = RunningMoments(**found.state["moments"])
    with_one_step = size.iterations if arguments.iterations is None else arguments.iterations
    total = with_one_step + arguments.two_step_iterations
    progress = tqdm(total=total, initial=len(curve), desc="iterations", file=sys.stdout, mininterval=0.5)
    with progress as bar, StopSignal() as stop:
        for iteration in range(len(curve), total):
            with clock("iteration"):
                tasks = tasks_of(arguments, family, size.tasks, derive_seed(arguments.seed, iteration))
                seen = []
                collect = collector(arguments, maml, moments, environment, tasks, clock, seen, iteration)
                inner_steps = maml.inner_steps if iteration < with_one_step else 2
                if iteration == with_one_step:  # gradients of another size: Adam would leap by its old moments
                    outer.optimizer.state.clear()
                    for group in outer.optimizer.param_groups:
                        group["lr"] = arguments.two_step_lr
                collected = maml.collect(collect, size.tasks, num_steps=inner_steps)
                with clock("gradients"):
                    outer.step(collected)
                for observation, valid in seen:
                    moments = update_moments(moments, observation, valid)
            first, *others = collected.returns.mean(1).tolist()
            means = [first, *others[-1:]]
            steps = sum(int(batch.valid.sum()) for batch in collected.batches)
            curve.append([*means, steps + (curve[-1][-1] if curve else 0)])
            bar.set_postfix(before=f"{means[0]:.0f}", after=f"{means[-1]:.0f}")
            bar.update()
            if writer is not None:
                writer.add_scalar("return/before", means[0], iteration)
                writer.add_scalar("return/after", means[-1], iteration)
            stops = len(curve) == arguments.stop_after
            if stops or stop or len(curve) % arguments.save_every == 0:
                arguments.out.mkdir(parents=True, exist_ok=True)
                state = {"outer": outer.state_dict(), "moments": moments._asdict(), "curve": curve}
                state["seconds"] = dict(clock.seconds)
                save_checkpoint(folder, len(curve), state)
                stop.exit_if_asked()
            if stops:
                return None, moments
    return curve, moments


def test(arguments, size, family, maml, moments, clock):
    """Returns (updates + 1, N) on tasks of the test with adaptation and without, and what collects there."""
    tasks = tasks_of(arguments, family, size.test_tasks, 0, "test")
    environment = make_environment(arguments, family, clock, size.test_tasks * size.test_episodes)
    collect = collector(arguments, maml, moments, environment, tasks, clock, None, 0, 7)
    returns = maml.evaluate(collect, len(tasks), num_updates=0 if arguments.oracle else arguments.updates)
    return tasks, returns, collect


def film(arguments, family, maml, moments, tasks, params):
    """A video of the policy after one update, on the first two tasks of the test."""
    for n, task in enumerate(tasks[:2]):
        name = "_".join(f"{key}_{value:.2f}" for key, value in task.items())
        single = family.make(task, render_mode="rgb_array", camera_name="track")  # which follows the robot
        single = gymnasium.wrappers.RecordVideo(single, str(arguments.out), name_prefix=f"{arguments.family}_{name}")
        observation, _ = single.reset(seed=arguments.seed)
        own, state, done = {key: p[n] for key, p in params.items()}, None, False
        told = torch.tensor([next(iter(task.values()))])
        previous = torch.zeros(single.action_space.shape[0] + 2) if arguments.memory != "none" else torch.zeros(0)
        with torch.no_grad():
            while not done:
                x = torch.cat([torch.as_tensor(observation, dtype=torch.float32), previous])[None]
                x = policy_sees(arguments, moments, x, told)
                action, state = maml.policy.act(own, x, state, torch.tensor([state is None]), None)
                observation, reward, terminated, truncated, _ = single.step(action[0].clamp(-1, 1).numpy())
                done = terminated or truncated
                if len(previous):
                    previous = torch.cat([action[0], torch.tensor([float(reward), float(done)])])
        single.close()


def plot(arguments, curve, report, path):
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    *means, steps = zip(*curve, strict=True)
    labels = ("before the inner step", "after it") if len(means) == 2 else ("the policy that knows the task",)
    for mean, label, color in zip(means, labels, ("0.6", "C0"), strict=False):
        axes[0].plot([s / 1e6 for s in steps], mean, label=label, color=color)
    axes[0].set(xlabel="environment steps, millions", ylabel="mean return", title=f"{arguments.family}: training")
    axes[0].legend(fontsize=7)
    plot_adaptation(report, axes[1])
    axes[1].set(title="test tasks")
    axes[1].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def tensorboard_writer(arguments):
    if not arguments.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SystemExit("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(arguments.out))


def main(arguments: Arguments) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    writer, clock = tensorboard_writer(arguments), Clock()
    # The published tasks: 100 steps; velocities of MAML's HalfCheetah-Vel up to 2 m/s.
    settings = {"high": 2.0} if arguments.family == "halfcheetah-vel" else {}
    if arguments.oracle and arguments.two_step_iterations:
        raise SystemExit("--oracle makes no inner steps: leave out --two-step-iterations.")
    size, family = SIZES[arguments.size], task_family(arguments.family, horizon=HORIZON, **settings)
    with family.make(family.sample(1, seed=0)[0]) as one:
        policy = make_policy(arguments, one.observation_space, one.action_space.shape[0])
    rate = arguments.inner_lr
    inner = torchopt.sgd(lambda step: rate * 0.5**step)
    maml = PolicyMAML(policy, inner, inner_steps=0 if arguments.oracle else 1)
    maml.inner_loss = maml.losses.surrogate
    outer = GradientOuter(maml, outer_lr=arguments.outer_lr, num_steps=arguments.outer_steps, compile=arguments.compile)
    curve, moments = train(arguments, size, family, maml, outer, clock, writer)
    if curve is None:
        print(f"stopped after {arguments.stop_after} iterations; --resume goes on")
        return
    seconds = dict(clock.seconds)
    tasks, returns, collect = test(arguments, size, family, maml, moments, clock)
    report = adaptation_report(
        returns.adapted[None],
        returns.control[None],
        task_blind=family.task_blind_return,
        generator=torch.Generator().manual_seed(0),
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = arguments.family.replace("-", "_")
    plot(arguments, curve, report, arguments.out / f"{name}.png")
    if arguments.video:
        params = maml.stacked(len(tasks))
        if not arguments.oracle:
            params = maml.adapt([collect(params, 0)[0]])
        film(arguments, family, maml, moments, tasks, params)
    whole = max(seconds.get("iteration", 0.0), 1e-9)
    parts = {"physics": seconds.get("physics", 0.0), "gradients": seconds.get("gradients", 0.0)}
    parts = {"policy": seconds.get("collect", 0.0) - parts["physics"], **parts}
    figures = {
        "tasks": tasks,
        "returns after 0, 1, ... updates": returns.adapted.tolist(),
        "returns never adapted": returns.control.tolist(),
        "task-blind optimum": family.task_blind_return,
        "curve: before, after, steps": curve,
        "seconds": seconds.get("iteration", 0.0),
        "share of an iteration": {part: spent / whole for part, spent in parts.items()},
        "arguments": {**asdict(arguments), "out": str(arguments.out)},
    }
    (arguments.out / f"{name}.json").write_text(json.dumps(figures))
    shown = " / ".join(f"{value:.1f}" for value in report.mean.tolist())
    shares = ", ".join(f"{part} {spent / whole:.0%}" for part, spent in parts.items())
    print(f"test return after 0 / 1 / ... updates: {shown}  ({seconds.get('iteration', 0.0):.0f} s: {shares})")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
