"""Models of robots whose physics nobody told them: meta-learned, trained on all at once, adapted or not.

Seven tasks (HalfCheetah's gravity, mass and a dead joint, Walker2d's parameters, Ant's mass and a dead leg, Humanoid's
mass), six models of about as many weights, each

    (a) meta-trained with MAML, whose inner rates are learned, and adapted,
    (b) trained on all systems at once, and adapted by as many steps, at the rate that suits systems held out best,
    (c) the same, not adapted,

all of them with a gain for every actuator where actuators may be dead, for which (b) has a rate of its own;

on systems that were not trained on: what is known of one is 64 steps of another episode. Scored are predictions of 1, 5
and 20 steps from predictions, in units of how far the robot gets in that time. "Persistence" predicts that nothing
changes; the oracle is the state model of (c), trained on with twelve episodes of the very system; "told" is a state
model for all systems whose input has the physics of each (of a dead actuator, an action of 0): what there is to be
gained by knowing them, as far as they can be extrapolated. Given are interquartile means over systems, and Student's
intervals over seeds; (a) is ahead where the interval of its difference to (b), and of that to (c), is above 0. They
cover trainings, not systems, of which finite families have few.

    python benchmarks/serious_benchmark.py --task all --method all --seeds 5     # the tables of the documentation
    python benchmarks/serious_benchmark.py --task ant-leg --method GRU --seeds 2
    python benchmarks/serious_benchmark.py --size tiny                           # a minute

What is finished is saved, and not made again: a run that was stopped goes on.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from serious_controls import oracle_errors, persistence_errors, told_errors
from serious_data import Data, Size
from serious_models import MODELS, Learners, run
from serious_report import plot, report, table
from serious_tasks import HORIZONS, TASKS, WARM_UP, Amount, collected
from tqdm import tqdm

import ssmrl
from ssmrl.checkpoint import load_checkpoint, save_checkpoint

SIZES = {
    "tiny": Size(
        Amount(6, 3, held_out=2, own=4),
        updates=2,
        batch=3,
        oracle_steps=2,
        rates=(0.01, 0.1),
        gain_rates=(3.0,),
        compile="trace",
    ),
    "default": Size(Amount(216, 64), updates=400),
}
VERSION = 3
"""Of the trainings and of what is saved of them: to be raised with either, so that no results of two of them mix."""
TINY = {"tasks": ("halfcheetah-gravity", "ant-leg"), "methods": ("StateSpaceModel", "MLP"), "seeds": 2}
"""What `--size tiny` runs, unless it is told otherwise."""


@dataclass(frozen=True)
class Arguments:
    """Meta-learned dynamics of robots under changed physics."""

    task: tuple[str, ...] = ()
    """Of TASKS in serious_tasks.py, or all, which is the default."""
    method: tuple[str, ...] = ()
    """Of MODELS in serious_models.py, or all, which is the default."""
    seeds: int | None = None
    """From 0 on; None: 5."""
    size: Literal["tiny", "default"] = "default"
    """tiny takes a minute, for tests."""
    jobs: int = os.cpu_count() or 1
    """Processes at a time, of one thread each; one takes a task and a model, with all seeds."""
    runs: Path = Path("output/serious")
    """Folder for data and for what is finished."""
    out: Path = Path("output/serious_benchmark.json")
    """File for the figures; the plot is beside it."""


def chosen(given: tuple[str, ...], known: Any, default: tuple[str, ...], option: str) -> tuple[str, ...]:
    names = tuple(known) if "all" in given else given or default
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--{option} must be among {', '.join(known)} or all; got {', '.join(unknown)}.")
    return names


def asked_for(arguments: Any) -> tuple[Size, tuple[str, ...], int, Path]:
    """Size, tasks, number of seeds, and folder of that size, of a script with these options."""
    tiny = arguments.size == "tiny"
    tasks = chosen(arguments.task, TASKS, TINY["tasks"] if tiny else tuple(TASKS), "task")
    seeds = (TINY["seeds"] if tiny else 5) if arguments.seeds is None else arguments.seeds
    if seeds < 2 or arguments.jobs < 1:
        raise SystemExit(f"--seeds must be at least 2 and --jobs at least 1; got {seeds} and {arguments.jobs}.")
    return SIZES[arguments.size], tasks, seeds, arguments.runs / arguments.size


def write(figures: dict[str, Any], script: str, out: Path) -> None:
    """Write figures, and what made them."""
    made_by = {
        "command": " ".join([f"python benchmarks/{script}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"ssmrl": ssmrl.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures | made_by, indent=1) + "\n")


def data_of(size: Size, runs: Path, task: str) -> Data:
    train, test = collected(task, size.amount, runs / "data")
    return Data(size, train, test, dead_actuators=TASKS[task].dead_actuators)


def prepare(size: Size, runs: Path, task: str) -> None:
    """Collect the data of a task, if they are not there; in a process of its own."""
    torch.set_num_threads(1)
    data_of(size, runs, task)


def settings(size: Size, task: str, name: str) -> dict[str, Any]:
    """What a result depends on beside its seed, as JSON has it."""
    about = {
        "version": VERSION,
        "size": asdict(size),
        "task": asdict(TASKS[task]),
        "model": inspect.getsource(MODELS[name]).strip(),
        "horizons": HORIZONS,
        "warm up": WARM_UP,
        "torch": torch.__version__,
    }
    found: dict[str, Any] = json.loads(json.dumps(about))
    return found


def folder_of(runs: Path, task: str, name: str, seed: int) -> Path:
    return runs / "runs" / f"{task}-{name}-{seed}"


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for: TorchInductor's compiler is one."""
    return sum(os.times()[:4])


def make(size: Size, runs: Path, seeds: int, job: tuple[str, str]) -> str:
    """All seeds of a model on a task, those apart that are there; in a process of its own."""
    torch.set_num_threads(1)
    (task, name), told = job, []
    about, learners = settings(size, task, name), None
    for seed in range(seeds):
        folder = folder_of(runs, task, name, seed)
        found = load_checkpoint(folder)
        if found is not None:
            if found.state["settings"] != about:
                raise ValueError(f"{folder} is of other settings; move it away, or take another --runs.")
            continue
        began = cpu_seconds()
        learners = learners or Learners(name, data_of(size, runs, task))
        result = run(learners, seed)
        params = result.pop("weights")
        if name == "StateSpaceModel":
            result["oracle"] = oracle_errors(learners.data, name, params, seed)
            result["told"] = told_errors(learners.data, name, seed)
        result["cpu seconds"] = cpu_seconds() - began
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(folder, seed, {"settings": about, "result": result}, keep=1)
        told.append(f"seed {seed}")
    return f"{task}, {name}: {', '.join(told) or 'there already'}"


def results_of(size: Size, runs: Path, seeds: int, tasks: tuple[str, ...], names: tuple[str, ...]) -> dict[str, Any]:
    """What was saved of every task, model and seed, and what nothing changes has."""
    results: dict[str, Any] = {}
    for task in tasks:
        data = data_of(size, runs, task)
        of_models: dict[str, Any] = {}
        for name in names:
            found = [load_checkpoint(folder_of(runs, task, name, seed)) for seed in range(seeds)]
            if missing := [seed for seed, one in enumerate(found) if one is None]:
                raise RuntimeError(f"{task}, {name}: results of seeds {missing} are missing or damaged.")
            of_models[name] = [one.state["result"] for one in found if one is not None]
        physics = len(data.test.physics.unique(dim=0))
        results[task] = {"persistence": persistence_errors(data), "physics": physics, "models": of_models}
    return results


def cpu_hours_of(results: dict[str, Any]) -> float:
    """Of all trainings with what compiles them, those of earlier calls, too."""
    every = (one for of_task in results.values() for runs in of_task["models"].values() for one in runs)
    return sum(one["cpu seconds"] for one in every) / 3600


def main(arguments: Arguments) -> None:
    size, tasks, seeds, runs = asked_for(arguments)
    default = TINY["methods"] if arguments.size == "tiny" else tuple(MODELS)
    names = chosen(arguments.method, MODELS, default, "method")
    jobs = [(task, name) for task in tasks for name in names]
    try:
        with get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
            list(pool.imap_unordered(partial(prepare, size, runs), tasks))  # before any model asks for them
            with tqdm(total=len(jobs), desc="models", file=sys.stdout) as bar:
                for told in pool.imap_unordered(partial(make, size, runs, seeds), jobs):
                    bar.write(told)
                    bar.update()
    except ValueError as error:
        raise SystemExit(str(error)) from error
    results = results_of(size, runs, seeds, tasks, names)
    figures = {
        "report": report(results),
        "size": asdict(size),
        "seeds": seeds,
        "cpu hours": cpu_hours_of(results),
    }
    write(figures, "serious_benchmark.py", arguments.out)
    plot(figures["report"], arguments.out.with_suffix(".png"))
    print(table(figures["report"]))
    print(f"\nwrote {arguments.out}, of {figures['cpu hours']:.2f} hours of trainings")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
