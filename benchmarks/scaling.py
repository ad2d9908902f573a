"""What more processes gain: meta-updates shared by ranks, measured here and projected to 1,024 ranks.

    python benchmarks/scaling.py                                        # two processes of one thread each, two minutes
    python benchmarks/scaling.py --compile
    python benchmarks/scaling.py --ranks 8 --size tiny

The case is rl20 of meta_gradient_speed.py: 20 tasks of 4 sequences of 50 steps, a StateSpaceModel 64-128 of 29,033
weights, one inner step. Ways take turns; every figure is a median. A rank that is not in a way waits, without a core.

The projection takes from here what an update costs beside its tasks, and what a task costs, and from `NETWORKS` what is
known of others' networks. A rank has ceil(N / R) tasks; sums over R ranks take

    2 ceil(log2 R) latency + 2 (R - 1) / R bytes / bandwidth,

a tree for the latency and a ring for the bytes, as libraries choose among them by size; no communication is hidden
behind the gradient, as only its end knows it.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro

import ssmrl
from ssmrl import MetaMAML, StateSpaceModel
from ssmrl.sharding import Shards

mpl.use("Agg")
import matplotlib.pyplot as plt


class Sizes(NamedTuple):
    """N tasks of B sequences (support and query alike), T steps; inputs, outputs, state and hidden units."""

    N: int
    B: int
    T: int
    D: int
    O: int  # noqa: E741
    S: int
    H: int


SIZES = {"rl20": Sizes(20, 4, 50, 23, 17, 64, 128), "tiny": Sizes(4, 1, 5, 2, 2, 4, 4)}


class Network(NamedTuple):
    """Between ranks: seconds until a message is there, and bytes per second after that."""

    latency: float
    bandwidth: float


NETWORKS = {  # of makers' data sheets, at about two thirds of what they say
    "Ethernet, 10 Gbit/s": Network(50e-6, 0.8e9),
    "InfiniBand, 400 Gbit/s": Network(5e-6, 33e9),
}
RANKS = [2**n for n in range(11)]
STRONG = 1280
"""Tasks of the projected strong scaling."""


@dataclass(frozen=True)
class Arguments:
    """How much faster meta-updates are on several processes."""

    size: Literal["rl20", "tiny"] = "rl20"
    """tiny runs in seconds, for tests."""
    ranks: int = 2
    """Processes, of one thread each."""
    repeats: int = 40
    """Turns of every way, at least 2."""
    in_turn: int = 5
    """Updates of a turn, one after the other as in training."""
    compile: bool = False
    """Compile the meta-gradient, which every process does for itself."""
    chunk_size: int | None = None
    """Of `MetaMAML`: a smaller one needs less memory, and less of the way to it."""
    out: Path = Path("output/scaling.json")
    """File for the figures; the plot is beside it."""


class Costs(NamedTuple):
    """Seconds of a meta-update: beside its tasks, and of each of them."""

    fixed: float
    task: float


def fit(seconds: dict[int, float]) -> Costs:
    """The least-squares line through the times of updates of so many tasks, which does not begin below 0."""
    n, t = list(seconds), list(seconds.values())
    slope, intercept = statistics.linear_regression(n, t)
    if intercept < 0:
        slope, intercept = statistics.linear_regression(n, t, proportional=True)
    return Costs(intercept, slope)


def projected(costs: Costs, network: Network, nbytes: int, tasks: int, ranks: int) -> float:
    """Seconds of an update of N tasks on R ranks, of so many bytes beside a loss in float32 for every task."""
    rounds = 2 * math.ceil(math.log2(ranks)) * network.latency
    sent = 2 * (ranks - 1) / ranks * (nbytes + 4 * tasks) / network.bandwidth
    return costs.fixed + costs.task * math.ceil(tasks / ranks) + rounds + sent


def efficiency(costs: Costs, network: Network, nbytes: int, kind: str, per_rank: int, ranks: int) -> float:
    """Of R ranks, 1 where they are R times as fast as one."""
    tasks = STRONG if kind == "strong" else per_rank * ranks
    alone = projected(costs, network, nbytes, tasks if kind == "strong" else per_rank, 1)
    there = projected(costs, network, nbytes, tasks, ranks)
    return alone / there / (ranks if kind == "strong" else 1)


def bytes_of(model: torch.nn.Module) -> int:
    """Of the sums of an update, beside a loss for every task: the meta-gradient, and a flag for every parameter."""
    params = list(model.parameters())
    return sum(p.nbytes for p in params) + 4 * len(params)


def tasks_of(sizes: Sizes, number: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    widths = (sizes.D, sizes.O, sizes.D, sizes.O)
    return tuple(torch.randn(number, sizes.B, sizes.T, width, generator=generator) for width in widths)


def updates(arguments: Arguments, number: int, group: dist.ProcessGroup | None) -> Callable[[], Any]:
    sizes = SIZES[arguments.size]
    torch.manual_seed(0)
    model = StateSpaceModel(sizes.S, sizes.D, sizes.O, hidden_dim=sizes.H)
    options: dict[str, Any] = {"compile": arguments.compile, "chunk_size": arguments.chunk_size}
    maml = MetaMAML(model, inner_lr=0.01, process_group=group, **options)
    tasks = tasks_of(sizes, number)
    return lambda: maml.meta_update(tasks)


def sums(arguments: Arguments, group: dist.ProcessGroup) -> Callable[[], Any]:
    """What ranks tell each other in an update, alone."""
    sizes = SIZES[arguments.size]
    params = list(StateSpaceModel(sizes.S, sizes.D, sizes.O, hidden_dim=sizes.H).parameters())
    for p in params:
        p.grad = torch.zeros_like(p)
    losses, shards = torch.zeros(sizes.N), Shards(group)
    return lambda: shards.sum(params, losses)


def measure(rank: int, arguments: Arguments, folder: str) -> None:
    """One process: the times of every way, which rank 0 writes down."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=arguments.ranks,
        timeout=datetime.timedelta(minutes=10),
    )
    group, number = dist.group.WORLD, SIZES[arguments.size].N
    assert group is not None
    sizes = (number // 2, number, 2 * number)
    share = updates(arguments, max(number // arguments.ranks, 1), None)
    ways: dict[str, Callable[[], Any] | None] = {  # None: this rank waits
        **{f"alone, {n}": updates(arguments, n, None) if rank == 0 else None for n in sizes},
        "side by side": lambda: (share(), dist.barrier()),
        "strong": updates(arguments, number, group),
        "weak": updates(arguments, number * arguments.ranks, group),
        "sums": sums(arguments, group),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.repeats + 2):  # two to compile, and to warm up
        for name, call in ways.items():
            dist.barrier()  # whoever has nothing to do waits at the next one
            began = time.perf_counter()
            for _ in range(arguments.in_turn if call is not None else 0):
                call()
            if turn > 1:
                found[name].append((time.perf_counter() - began) / arguments.in_turn)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def report(arguments: Arguments, found: dict[str, list[float]]) -> dict[str, Any]:
    sizes, ranks = SIZES[arguments.size], arguments.ranks
    median = {name: statistics.median(times) for name, times in found.items()}
    costs = fit({n: median[f"alone, {n}"] for n in (sizes.N // 2, sizes.N, 2 * sizes.N)})
    nbytes = bytes_of(StateSpaceModel(sizes.S, sizes.D, sizes.O, hidden_dim=sizes.H))
    alone = median[f"alone, {sizes.N}"]
    pairs = zip(found[f"alone, {sizes.N}"], found["strong"], strict=True)
    return {
        "milliseconds": {name: 1000 * seconds for name, seconds in median.items()},
        "strong speed-up": alone / median["strong"],
        "strong speed-up, quartiles of turns": statistics.quantiles([a / b for a, b in pairs], n=4),
        "weak speed-up": ranks * alone / median["weak"],
        "bytes of an update": nbytes + 4 * sizes.N,
        "costs in milliseconds": {name: 1000 * value for name, value in costs._asdict().items()},
        "projected efficiency": {
            name: {
                kind: {r: round(efficiency(costs, network, nbytes, kind, sizes.N, r), 4) for r in RANKS}
                for kind in ("strong", "weak")
            }
            for name, network in NETWORKS.items()
        },
        "networks": {name: network._asdict() for name, network in NETWORKS.items()},
        "date": time.strftime("%Y-%m-%d"),
        "arguments": {**asdict(arguments), "out": str(arguments.out)},
        "command": " ".join(["python benchmarks/scaling.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"ssmrl": ssmrl.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def plot(arguments: Arguments, figures: dict[str, Any], path: Path) -> None:
    _, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for kind, axis in zip(("strong", "weak"), axes, strict=True):
        for name, of_kinds in figures["projected efficiency"].items():
            axis.semilogx(RANKS, list(of_kinds[kind].values()), base=2, label=f"projected, {name}")
        measured = [1.0, figures[f"{kind} speed-up"] / arguments.ranks]
        axis.plot([1, arguments.ranks], measured, "k*", markersize=9, label="measured")
        number = SIZES[arguments.size].N
        of = f"{STRONG} tasks (measured: {number})" if kind == "strong" else f"{number} tasks a rank"
        axis.set(xlabel="ranks of one thread", title=f"{kind}: {of}", ylim=(0, 1.1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("efficiency")
    axes[0].legend(loc="lower left")
    plt.tight_layout()
    plt.savefig(path, dpi=120)
    plt.close()


def main(arguments: Arguments) -> None:
    if arguments.repeats < 2:
        raise SystemExit(f"--repeats must be at least 2; got {arguments.repeats}.")
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(measure, (arguments, folder), nprocs=arguments.ranks, start_method="spawn")
        found = json.loads(Path(folder, "found.json").read_text())
    figures = report(arguments, found)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    plot(arguments, figures, arguments.out.with_suffix(".png"))
    print("; ".join(f"{way} {ms:.2f} ms" for way, ms in figures["milliseconds"].items()))
    print(
        f"{arguments.ranks} ranks: {figures['strong speed-up']:.2f} times as fast on the same tasks, "
        f"{figures['weak speed-up']:.2f} on {arguments.ranks} times as many"
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
