"""What equal gradients cost MAML in `serious_benchmark.py`, where there is little to adapt to.

There (a) makes updates of K + 1 gradients, and (c) gets as many gradients in K + 1 times as many updates. Here the
state model goes on from the weights that both begin their second half with, by MAML or without inner steps, and by
either number of updates, with the random numbers, queries and outer rates of (a). MAML with few updates is (a); many
without inner steps are not quite (c), whose rates do not rise once more, and whose batches have more windows; of a
system MAML sees those of the support, too. (a), (b) and (c) of the same seeds stand beside them, from what
`serious_benchmark.py` saved.

    python benchmarks/serious_updates.py --task all --seeds 5    # the table of the documentation
    python benchmarks/serious_updates.py --size tiny             # after serious_benchmark.py --size tiny

What is finished is saved, and not made again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from serious_benchmark import asked_for, data_of, folder_of, settings, write
from serious_data import Size
from serious_models import (
    Learners,
    after_steps,
    before_steps,
    beginnings_of_maml,
    best_steps,
    rates_of,
    shared_part,
    steps_to_choose_from,
    stream,
    trained,
)
from serious_report import cell, interval, of_seeds
from serious_tasks import HORIZONS

from ssmrl.checkpoint import load_checkpoint, save_checkpoint

MODEL = "StateSpaceModel"
MAML_FEW, MAML_MANY = "(a) MAML", "MAML, many updates"
NONE_FEW, NONE_MANY = "no inner steps, few updates", "no inner steps, many updates"
ADAPTED = ", adapted"
"""Of these, too, as (b) is, by the steps that are best on the systems held out."""
NONE = (NONE_FEW, NONE_FEW + ADAPTED, NONE_MANY, NONE_MANY + ADAPTED)
MADE = {*NONE, MAML_MANY + ADAPTED}
"""What is made here of every seed."""
COMPARED = {MAML_FEW: NONE, MAML_MANY: NONE[2:]}
"""Whose errors are given in units of MAML's: the first row at as many updates, and at as many gradients."""
SAVED = {
    MAML_FEW + ADAPTED: ("maml", "after"),
    "(b) all systems" + ADAPTED: ("joint", "after"),
    "(c) all systems": ("joint", "before"),
}


@dataclass(frozen=True)
class Arguments:
    """What equal gradients cost MAML."""

    task: tuple[str, ...] = ()
    """Of TASKS in serious_tasks.py, or all, which is the default."""
    seeds: int | None = None
    """From 0 on, of which serious_benchmark.py has results; None: 5."""
    size: Literal["tiny", "default"] = "default"
    jobs: int = os.cpu_count() or 1
    """Processes at a time, of one thread each; one takes a task, with all seeds."""
    runs: Path = Path("output/serious")
    """Folder in which serious_benchmark.py saved data and results."""
    out: Path = Path("output/serious_updates.json")
    """File for the figures."""


def saved(size: Size, runs: Path, task: str, seed: int) -> dict[str, Any]:
    """What `serious_benchmark.py` has of a seed."""
    folder = folder_of(runs, task, MODEL, seed)
    found = load_checkpoint(folder)
    if found is None or found.state["settings"] != settings(size, task, MODEL):
        raise ValueError(f"{folder} must have a result of these settings; run serious_benchmark.py for {task} before.")
    result: dict[str, Any] = found.state["result"]
    return result


def updates_of(size: Size) -> dict[str, int]:
    """Of the second half of a training: as many as (a) makes, and as many as (c)."""
    return {"few": size.updates, "many": size.joint_updates - size.shared_updates}


def of_seed(learners: Learners, seed: int) -> dict[str, list[list[float]]]:
    """Errors of three trainings, two of them before adaptation, too; (len(HORIZONS), N)."""
    data, model, found = learners.data, learners.model, {}
    few, many = updates_of(data.size).values()
    shared = shared_part(learners, seed)
    steps = best_steps(model, data, shared, beginnings_of_maml(data))
    for way, (inner, updates) in {NONE_FEW: (False, few), NONE_MANY: (False, many), MAML_MANY: (True, many)}.items():
        learners.begin(seed)
        learners.go_on_from(shared, steps)
        trained(learners.maml if inner else learners.joint, data, range(updates), updates, stream(seed, 2))
        params, rates = learners.weights()
        if not inner:
            found[way] = before_steps(model, data, params)
            rates = rates_of(best_steps(model, data, params, steps_to_choose_from(data)), params)
        found[way + ADAPTED] = after_steps(model, data, params, rates)
    return found


def make(size: Size, runs: Path, seeds: int, task: str) -> tuple[str, dict[str, Any]]:
    """Intervals of all ways on a task; in a process of its own."""
    torch.set_num_threads(1)
    before = [saved(size, runs, task, seed) for seed in range(seeds)]
    found, learners, about = [], None, settings(size, task, MODEL)
    for seed in range(seeds):
        folder = runs / "updates" / f"{task}-{seed}"
        kept = load_checkpoint(folder)
        if kept is None:
            learners = learners or Learners(MODEL, data_of(size, runs, task))
            folder.mkdir(parents=True, exist_ok=True)
            save_checkpoint(folder, seed, {"settings": about, "errors": of_seed(learners, seed)})
            kept = load_checkpoint(folder)
            assert kept is not None
        if kept.state["settings"] != about or set(kept.state["errors"]) != MADE:
            raise ValueError(f"{folder} is of other settings; move it away, or take another --runs.")
        found.append(kept.state["errors"])
    errors = {way: of_seeds([one[which][when] for one in before]) for way, (which, when) in SAVED.items()}
    errors |= {way: of_seeds([one[way] for one in found]) for way in found[0]}
    return task, {
        "errors": {way: interval(of_way) for way, of_way in errors.items()},
        "of MAML": {
            maml: {other: interval(errors[other] / errors[maml + ADAPTED]) for other in others}
            for maml, others in COMPARED.items()
        },
    }


def main(arguments: Arguments) -> None:
    size, tasks, seeds, runs = asked_for(arguments)
    found: dict[str, Any] = {}
    try:
        with get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
            for task, of_task in pool.imap(partial(make, size, runs, seeds), tasks):
                found[task] = of_task
                print(f"\n{task:48}" + "".join(f"{f'{h} ahead':>28}" for h in HORIZONS))
                for way, values in of_task["errors"].items():
                    print(f"{way:48}" + "".join(f"{cell(value):>28}" for value in values))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    write({"report": found, "updates": updates_of(size), "seeds": seeds}, "serious_updates.py", arguments.out)
    print(f"\nwrote {arguments.out}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
