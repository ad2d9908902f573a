"""Environment steps per second: native batches against Gymnasium's vector environments and EnvPool, in one run.

    python benchmarks/env_throughput.py                                   # five robots, 1 to 256 rows: a quarter of
    an hour python benchmarks/env_throughput.py --robots Ant --rows 64 --seconds 1
    python benchmarks/env_throughput.py --parts collect                   # how much of a collected batch is physics

Every figure is the median over turns, in which the engines follow each other; a turn times whole `step` calls, random
actions or a policy's included, on as many threads as there are cores. Rows are Gymnasium's v5 environments, without
tasks: that is what all engines have.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import nn

from ssmrl.env_runner import Environment, normal_noise, per_task, rollout, task_family

ROBOTS = ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid")
ENGINES = ("ssmrl", "SyncVectorEnv", "AsyncVectorEnv", "EnvPool")
PARTS = ("steps", "collect")
MOST_PROCESSES = 64


@dataclass(frozen=True)
class Arguments:
    """Environment steps per second, and the share of physics in a collected batch."""

    parts: tuple[str, ...] = PARTS
    """Any of steps, collect."""
    robots: tuple[str, ...] = ROBOTS
    """Any of HalfCheetah, Hopper, Walker2d, Ant, Humanoid."""
    rows: tuple[int, ...] = (1, 8, 64, 256)
    """Numbers of environments."""
    engines: tuple[str, ...] = ENGINES
    """Any of ssmrl, SyncVectorEnv, AsyncVectorEnv (up to 64 rows), EnvPool (where it is installed)."""
    seconds: float = 0.5
    """Of every turn, about."""
    turns: int = 5
    """Of every engine."""
    tasks: int = 40
    """Of the collected batch."""
    episodes: int = 20
    """Of every task."""
    horizon: int = 100
    """Of every episode."""
    out: Path = Path("output/env_throughput.json")
    """File for the figures; a plot goes beside it. Parts that are not run keep what the file has of them."""

    def __post_init__(self) -> None:
        for name, given, known in (
            ("parts", self.parts, PARTS),
            ("robots", self.robots, ROBOTS),
            ("engines", self.engines, ENGINES),
        ):
            if not set(given) <= set(known):
                raise ValueError(f"--{name} must be among {', '.join(known)}; got {', '.join(given)}.")


def make(engine: str, robot: str, rows: int) -> Any:
    """A vector environment of this engine, reset."""
    env_id = f"{robot}-v5"
    if engine == "EnvPool":
        import envpool

        env = envpool.make_gymnasium(env_id, num_envs=rows, num_threads=os.cpu_count(), seed=0)
    elif engine == "ssmrl":
        env = Environment(env_id, rows, seed=0)
    else:
        env = gymnasium.make_vec(env_id, rows, "sync" if engine == "SyncVectorEnv" else "async")
    env.reset()
    return env


def policy(observations: int, actions: int, high: float) -> Callable[[Any], Any]:
    """A tanh 64-64 network, one for all rows."""
    net = nn.Sequential(nn.Linear(observations, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, actions))

    @torch.no_grad()
    def act(observation: Any) -> Any:
        x = torch.as_tensor(observation, dtype=torch.float32)
        return (high * torch.tanh(net(x))).numpy()

    return act


def time_steps(env: Any, act: Callable[[Any], Any], observation: Any, seconds: float) -> tuple[float, Any]:
    """Seconds of one step call, and the observation to go on from."""
    begun, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begun < seconds:
        observation = env.step(act(observation))[0]
        count += 1
    return (time.perf_counter() - begun) / count, observation


def steps_per_second(arguments: Arguments, robot: str, rows: int, with_policy: bool) -> dict[str, float]:
    """The median steps per second of all rows together, by engine."""
    engines = [e for e in arguments.engines if e != "AsyncVectorEnv" or rows <= MOST_PROCESSES]
    engines = [e for e in engines if e != "EnvPool" or find_spec("envpool")]
    envs = {engine: make(engine, robot, rows) for engine in engines}
    space = gymnasium.make(f"{robot}-v5").action_space
    size, high = space.shape[0], float(space.high[0])
    blocks = np.random.default_rng(0).uniform(-high, high, (64, rows, size)).astype(np.float32)
    turn = iter(range(sys.maxsize))
    act: Callable[[Any], Any] = lambda _: blocks[next(turn) % len(blocks)]  # noqa: E731
    if with_policy:
        torch.manual_seed(0)
        act = policy(envs[engines[0]].single_observation_space.shape[0], size, high)
    latest = {engine: env.reset()[0] for engine, env in envs.items()}
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    for number in range(arguments.turns + 1):
        for engine, env in envs.items():
            took, latest[engine] = time_steps(env, act, latest[engine], arguments.seconds if number else 0.1)
            if number:
                times[engine].append(took)
    for env in envs.values():
        env.close()
    return {engine: rows / statistics.median(took) for engine, took in times.items()}


def run_steps(arguments: Arguments) -> dict[str, Any]:
    """The figures of all robots, rows, and with and without a policy."""
    figures: dict[str, Any] = {}
    for robot in arguments.robots:
        figures[robot] = {}
        for with_policy in (False, True):
            name = "policy" if with_policy else "random actions"
            figures[robot][name] = {}
            for rows in arguments.rows:
                found = steps_per_second(arguments, robot, rows, with_policy)
                figures[robot][name][str(rows)] = found
                ours = found.get("ssmrl", float("nan"))
                shown = ", ".join(f"{e} {v:,.0f} ({ours / v:.1f}x)" for e, v in found.items())
                print(f"{robot}, {name}, {rows} rows: {shown}", flush=True)
    return figures


def run_collect(arguments: Arguments) -> dict[str, Any]:
    """How long a batch of tasks x episodes with a policy per task takes, and how much of it is MuJoCo's."""
    from mujoco import batch

    family = task_family("halfcheetah-vel")
    tasks = [task for task in family.sample(arguments.tasks, seed=0) for _ in range(arguments.episodes)]
    environment = Environment(family, tasks=tasks, max_episode_steps=arguments.horizon, seed=0, out_of_bounds="clip")
    sizes = [(64, 17), (64, 64), (6, 64)]
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.tasks,)
    params = [torch.randn(*shape, *size, generator=generator) / size[1] ** 0.5 for size in sizes]

    def gaussian(weights: Any, observation: Any, hidden_state: Any, reset: Any, noise: Any) -> Any:
        first, second, last = weights
        features = torch.tanh(torch.tanh(observation @ first.T) @ second.T)
        return features @ last.T + 0.3 * noise, None

    physics = [0.0]
    mujoco_step = batch.Batch.step

    def timed_step(self: Any, *args: Any, **kwargs: Any) -> None:
        begun = time.perf_counter()
        mujoco_step(self, *args, **kwargs)
        physics[0] += time.perf_counter() - begun

    batch.Batch.step = timed_step
    shares, rates = [], []
    for number in range(arguments.turns + 1):
        policy = per_task(gaussian, params, noise=normal_noise(number, 6))
        physics[0], begun = 0.0, time.perf_counter()
        trajectory, _ = rollout(policy, environment, arguments.horizon, seed=number)
        took = time.perf_counter() - begun
        if number:
            shares.append(physics[0] / took)
            rates.append(trajectory.reward.numel() / took)
    batch.Batch.step = mujoco_step
    figures = {
        "tasks, episodes, steps": (arguments.tasks, arguments.episodes, arguments.horizon),
        "steps per second": statistics.median(rates),
        "share of physics": statistics.median(shares),
    }
    print(figures, flush=True)
    return figures


def plot(figures: dict[str, Any], path: Path) -> None:
    """Steps per second over the number of rows, a panel for each robot."""
    fig, axes = plt.subplots(1, len(figures), figsize=(3.4 * len(figures), 3.4), squeeze=False)
    for ax, (robot, ways) in zip(axes[0], figures.items(), strict=True):
        for name, style in (("random actions", "-"), ("policy", ":")):
            for number, engine in enumerate(ENGINES):
                points = [(int(n), v[engine]) for n, v in ways[name].items() if engine in v]
                if points:
                    label = engine if name == "random actions" else None
                    ax.plot(*zip(*points, strict=True), style, marker=".", color=f"C{number}", label=label)
        ax.set(title=robot, xscale="log", yscale="log", xlabel="rows")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("environment steps per second")
    axes[0][0].legend(fontsize=7)
    fig.suptitle("Solid: random actions; dotted: with a 64-64 policy", fontsize=9)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def without_out(words: list[str]) -> list[str]:
    """A command line without where its results go, which is no part of what they are."""
    if "--out" not in words:
        return words
    at = words.index("--out")
    return words[:at] + words[at + 2 :]


def main(arguments: Arguments) -> None:
    """Run the parts that were asked for, and write what they found."""
    torch.set_num_threads(1)  # products this small gain nothing from threads
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    runs = {"steps": run_steps, "collect": run_collect}
    for part in arguments.parts:
        begun = time.time()
        figures = runs[part](arguments)
        report[part] = {
            "figures": figures,
            "command": " ".join(["python benchmarks/env_throughput.py", *without_out(sys.argv[1:])]),
            "seconds": time.time() - begun,
            "versions": {n: version(n) for n in ("torch", "gymnasium", "mujoco", "envpool") if find_spec(n)},
            "machine": {"processor": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
        }
        arguments.out.write_text(json.dumps(report, indent=1))
    if "steps" in report:
        plot(report["steps"]["figures"], arguments.out.with_suffix(".png"))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
