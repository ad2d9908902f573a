"""Meta-reinforcement learning against the published numbers: the examples with several seeds, put together.

    python benchmarks/meta_rl.py navigation                # three seeds, one after the other
    python benchmarks/meta_rl.py direction --jobs 2        # two at a time, on one thread each
    python benchmarks/meta_rl.py direction --size tiny --seeds 2 --out output

Every run is a call of an example with its own folder under --runs, and is not made again where its figures are there;
one that was stopped goes on from its checkpoint. Written are meta_rl_<case>.json, which the documentation shows, and
meta_rl_<case>.png.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib as mpl
import torch
import tyro

import ssmrl
from ssmrl.meta_rl import AdaptationReport, adaptation_report, plot_adaptation

mpl.use("Agg")
import matplotlib.pyplot as plt

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RETURNS, CONTROL = "returns after 0, 1, ... updates", "returns never adapted"


@dataclass(frozen=True)
class Case:
    """One row of the table: an example, its arguments, and what was published."""

    script: str
    arguments: tuple[str, ...] = ()
    report: str = ""
    """The file that the example writes."""
    resumes: bool = True
    threads: bool = True
    """It can be told of threads; else it has one."""
    oracle: tuple[str, ...] | None = None
    """Arguments of the run whose return is the oracle's; None: the family knows it, or nobody does."""
    published: str = ""


CHEETAH = "maml_halfcheetah.py"
VELOCITY = ("--family", "halfcheetah-vel")
SLOWLY = ("--outer-lr", "0.001")
SHORT = ("--iterations", "50", "--updates", "1")
CASES = {
    "navigation": Case(
        "maml_navigation.py",
        report="maml_navigation.json",
        resumes=False,
        published="MAML (Finn et al. 2017), after 0 / 1 / 2 / 3 updates: -40.4 / -11.7 / -3.3 / -3.2",
    ),
    "direction": Case(
        CHEETAH,
        report="halfcheetah_dir.json",
        oracle=("--oracle", *SLOWLY),
        published="MAML with PPO in RLlib: about 0 after 18M steps, 150 after 31M, 200 after 40M, 260 after 100M",
    ),
    "direction_gru": Case(CHEETAH, ("--memory", "gru", *SLOWLY), "halfcheetah_dir.json", oracle=("--oracle", *SLOWLY)),
    "velocity": Case(
        CHEETAH,
        (*VELOCITY, "--iterations", "400", "--two-step-iterations", "66"),
        "halfcheetah_vel.json",
        oracle=(*VELOCITY, "--oracle", *SLOWLY),
        published="gap closed by MAML (Finn et al. 2017) after 1 / 3 updates: 0.68 / 0.92, 76M steps",
    ),
    "ant_direction": Case(CHEETAH, ("--family", "ant-dir", *SHORT), "ant_dir.json"),
    "humanoid_direction": Case(CHEETAH, ("--family", "humanoid-dir", *SHORT), "humanoid_dir.json"),
}


@dataclass(frozen=True)
class Arguments:
    """The examples of policy adaptation with several seeds, put together."""

    case: Annotated[Literal[tuple(CASES)], tyro.conf.Positional]  # type: ignore[valid-type]
    seeds: int = 3
    """From 0 on."""
    jobs: int = 1
    """Runs at a time; with more than one, each has one thread."""
    oracle: bool = True
    """Train the oracles too, where the family does not know their return."""
    oracle_seeds: int | None = None
    """As many of them; None: as many as seeds."""
    size: Literal["tiny", "default"] = "default"
    """Of the examples."""
    runs: Path = Path("output/meta_rl")
    """Folder for the runs."""
    out: Path = Path("docs/results")
    """Folder for what is put together."""


def run(arguments: Arguments, case: Case, name: str, extra: tuple[str, ...], seed: int) -> dict[str, Any]:
    """The figures of one run, made if they are not there."""
    folder = arguments.runs / f"{name}_{arguments.size}" / str(seed)
    report = folder / case.report
    if not report.exists():
        threads = "2" if arguments.jobs == 1 else "1"
        command = [sys.executable, str(EXAMPLES / case.script), *extra, "--seed", str(seed), "--size", arguments.size]
        command += [*(["--threads", threads] if case.threads else []), *(["--resume"] if case.resumes else [])]
        command += ["--out", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: see {folder / 'log.txt'}.")
    figures: dict[str, Any] = json.loads(report.read_text())
    return figures


def put_together(arguments: Arguments, case: Case, runs: list[dict[str, Any]], oracles: list[dict[str, Any]]) -> Any:
    """The report of the runs, and everything that the documentation shows of them."""
    returns, control = (torch.tensor([one[key] for one in runs]) for key in (RETURNS, CONTROL))
    if "task-blind optimum, oracle" in runs[0]:
        blind, oracle = runs[0]["task-blind optimum, oracle"]
    else:
        blind = runs[0]["task-blind optimum"]
        # Every oracle has seen the same tasks of the test: the mean over trainings is that of each task.
        oracle = torch.tensor([one[RETURNS][0] for one in oracles]).mean(0) if oracles else None
    generator = torch.Generator().manual_seed(0)
    report = adaptation_report(returns, control, oracle=oracle, task_blind=blind, generator=generator)
    curves = [one["curve: before, after, steps"] for one in runs]
    thin = max(len(curves[0]) // 100, 1)
    found = {
        **report.to_dict(),
        "curves: before, after, steps": [curve[::thin] for curve in curves],
        "seconds": [one["seconds"] for one in runs],
        "share of an iteration": [one.get("share of an iteration") for one in runs],
        "runs at a time": arguments.jobs,
        "published": case.published,
        "arguments": [{k: v for k, v in one["arguments"].items() if k != "out"} for one in runs],
        "command": f"python benchmarks/meta_rl.py {arguments.case} --seeds {arguments.seeds} --jobs {arguments.jobs}"
        + ("" if arguments.oracle_seeds is None else f" --oracle-seeds {arguments.oracle_seeds}")
        + ("" if arguments.oracle else " --no-oracle"),
        "versions": {"ssmrl": ssmrl.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{platform.machine()}, 2 cores",
    }
    # A direction is a task of its own.
    ways = [next(iter(task.values())) for task in runs[0].get("tasks", []) if "direction" in task]
    for way in sorted(set(ways)):
        mine = [n for n, other in enumerate(ways) if other == way]
        found[f"mean returns, direction {way:+.0f}"] = returns[:, :, mine].mean((0, 2)).tolist()
    return report, found


def plot(name: str, report: AdaptationReport, found: dict[str, Any], path: Path) -> None:
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    for n, curve in enumerate(found["curves: before, after, steps"]):
        before, after, steps = zip(*curve, strict=True)
        millions = [s / 1e6 for s in steps]
        axes[0].plot(millions, before, color="0.7", label=None if n else "before the inner steps")
        axes[0].plot(millions, after, color="C0", alpha=0.7, label=None if n else "after them")
    axes[0].set_xlabel("environment steps, millions")
    seeds = len(found["seconds"])
    axes[0].set(ylabel="mean return", title=f"{name}: training, {seeds} {'seed' if seeds == 1 else 'seeds'}")
    axes[0].legend(fontsize=7)
    plot_adaptation(report, axes[1])
    axes[1].set_title("tasks of the test")
    axes[1].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, dpi=100)


def main(arguments: Arguments) -> None:
    case = CASES[arguments.case]
    wanted = [(arguments.case, case.arguments, seed) for seed in range(arguments.seeds)]
    if case.oracle is not None and arguments.oracle:
        name = "velocity_oracle" if case.oracle[:2] == VELOCITY else "direction_oracle"
        number = arguments.seeds if arguments.oracle_seeds is None else arguments.oracle_seeds
        wanted += [(name, case.oracle, seed) for seed in range(number)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        made = list(pool.map(lambda one: run(arguments, case, *one), wanted))
    report, found = put_together(arguments, case, made[: arguments.seeds], made[arguments.seeds :])
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"meta_rl_{arguments.case}.json").write_text(json.dumps(found) + "\n")
    plot(arguments.case, report, found, arguments.out / f"meta_rl_{arguments.case}.png")
    for row in report.table():
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main(tyro.cli(Arguments))
