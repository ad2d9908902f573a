"""Control of systems that were never met, by planning on a model: when gradients help, and when a hidden state does.

    python benchmarks/adaptive_control.py pendulum --jobs 2              # five seeds, hours
    python benchmarks/adaptive_control.py cheetah_joint --seeds 0 1 2
    python benchmarks/adaptive_control.py pendulum --size tiny --seeds 0 1 --out output

For every seed: rounds of data, collected by the planner on the model of the round before; a recurrent model trained on
all of it; from there, meta-training. Then systems of every group of GROUPS are controlled in every way of `ways_of`,
with the same random numbers. What was done is not done again: every model and every way has a file of its own under
--runs, and a seed that is in the file of results stays there, so that seeds can be added in another session.
"""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torchopt
import tyro
from control_report import CHANGING, GROUPS, OURS, plot, put_together, table
from control_run import ADAM, ALLOWANCE, FIXED, SIZES, Run, Size, as_published, on_all_weights
from control_systems import SYSTEMS, Task
from control_training import (
    aggregated,
    best_rates,
    errors_ahead,
    fitted,
    inner_steps,
    meta_trained,
    scales_of,
    train,
    with_a_rate,
)
from torch import Tensor, nn
from torch.func import vmap

import ssmrl
from ssmrl import AdaptationConfig
from ssmrl.adaptation import Guard, Window, reset_on_rise, select
from ssmrl.checkpoint import load_checkpoint
from ssmrl.core import functional_forward
from ssmrl.env_runner import derive_seed, rollout
from ssmrl.meta_rl import AdaptiveControl, DynamicsScales, Planner, Transitions, dynamics_data


@dataclass(frozen=True)
class Arguments:
    """Every way to control systems of unknown physics, on several seeds."""

    system: Annotated[Literal[tuple(SYSTEMS)], tyro.conf.Positional]  # type: ignore[valid-type]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Which."""
    ways: tuple[str, ...] = ()
    """Of those that the documentation names, ours among them; none: all."""
    jobs: int = 1
    """Runs at a time, on a thread each."""
    size: Literal["tiny", "default"] = "default"
    """tiny is for tests."""
    video: bool = False
    """Film ours and the hidden state alone, on a task of every group without a change, into --runs, in place of all
    else; the seeds must have been run."""
    runs: Path = Path("output/adaptive_control")
    """Folder for models and rewards of every run."""
    out: Path = Path("docs/results")
    """Folder for what is put together."""


# Ways to control


def by_turns(run: Run, planners: Any, planner: Planner, state_of: Any, seed: int) -> Any:
    """A policy that plans with two sets of parameters by turns; `state_of` brings hidden states up to date."""
    generator = torch.Generator().manual_seed(seed)

    def policy(observation: Tensor, state: Any, reset: Tensor) -> tuple[Tensor, Any]:
        t, plan, hidden, before = (0, planner.init(len(reset)), None, None) if state is None else state
        params = planners[t >= run.size.episode // 2]
        hidden = state_of(params, hidden, before, observation)
        action, plan = planner(params, hidden, observation, plan, planner.noise(len(reset), generator))
        return action, (t + 1, plan, hidden, (observation, action))

    return policy


def knowing_the_truth(run: Run, tasks: list[Task], later: list[Task], seed: int) -> Any:
    """The planner on the true physics, which change in the middle of an episode."""
    planners = [run.system.params(tasks), run.system.params(later)]
    return by_turns(run, planners, run.planner(run.system.true_step), lambda *_: None, seed)


def on_its_own_model(
    run: Run, hidden: nn.Module, scales: DynamicsScales, tasks: list[Task], later: list[Task], seed: int
) -> Any:
    """The planner on models that were fitted to the very systems, before and after a change."""
    number = len(tasks)
    changed = [n for n in range(number) if tasks[n] != later[n]]

    def both() -> dict[str, dict[str, Tensor]]:
        before = fitted(run, hidden, scales, tasks, derive_seed(seed, 1))
        after = {name: value.clone() for name, value in before.items()}
        for name, value in fitted(run, hidden, scales, [later[n] for n in changed], derive_seed(seed, 2)).items():
            after[name][changed] = value
        return {"before": before, "after": after}

    def state_of(params: Any, state: Any, before: Any, observation: Tensor) -> Any:
        if before is None:
            return hidden.init_hidden(number)  # type: ignore[operator]
        x, _ = dynamics_data(scales, *before, observation)
        return vmap(lambda p, x, h: functional_forward(hidden, p, x[None], h[None])[1][0])(params, x, state)

    weights = run.once("own", both)
    planner = run.planner(run.step(hidden, scales))
    return by_turns(run, [weights["before"], weights["after"]], planner, state_of, seed)


@dataclass(frozen=True)
class Way:
    """A policy, and where its predictions are of interest what `errors_ahead` needs for them."""

    policy: Any
    adapting: tuple[Run, nn.Module, DynamicsScales, Any] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    """Goes into the results."""


def ways_of(run: Run, tasks: list[Task], later: list[Task], seed: int) -> dict[str, Callable[[], Way]]:
    """Name -> what makes the policy; models are trained when they are asked for."""
    found = run.once("data", lambda: aggregated(run))
    data, scales = Transitions(*found["data"]), scales_of(run, found["data"])
    control = partial(run.control, scales=scales, seed=seed, number=len(tasks))
    with_gains, on_all = run.system.gains, replace(run, size=on_all_weights(run.size))
    published = replace(run, size=as_published(run.size))

    def start(make: Any, weights: Any) -> nn.Module:
        model: nn.Module = make(scales)
        model.load_state_dict(weights)
        return model

    def perceptron() -> nn.Module:
        torch.manual_seed(run.seed)
        model = run.stateless(scales)
        train(run, model, scales, data, (run.size.rounds + 2) * run.size.updates, derive_seed(run.seed, 3))
        return model

    def recurrent() -> nn.Module:
        return start(run.recurrent, found["model"])

    hidden = recurrent()

    # Name of the files -> how the steps are, what is meta-trained, and by what.
    makers: dict[str, tuple[Run, Callable[[], nn.Module], Callable[..., dict[str, Any]]]] = {
        "meta": (run, recurrent, with_a_rate if with_gains else meta_trained),
        "meta_all": (on_all, recurrent, meta_trained),
        "rebal": (published, recurrent, meta_trained),
        "mlp": (on_all, perceptron, meta_trained),
    }

    def learned(name: str, *, adapting: bool = True) -> Way:
        its_run, make, trained = makers[name]
        weights = run.once(name, lambda: trained(its_run, make(), scales, data))
        model = start(run.stateless if name == "mlp" else run.recurrent, weights["model"])
        return by_steps(its_run, model, weights["rates"]) if adapting else Way(control(model))

    def adapting_by(its_run: Run, optimizer: Any, **options: Any) -> AdaptationConfig:
        size = its_run.size
        return AdaptationConfig(
            adapted=size.adapted,
            window=Window(size.windows[-1], minimum=size.windows[0]),
            guard=Guard(allowance=ALLOWANCE),
            reset=None if size.rise is None else reset_on_rise(size.rise, keep=size.windows[0]),
            optimizer=optimizer,
            num_steps=size.steps,
            **options,
        )

    def by_steps(its_run: Run, model: nn.Module, rates: dict[str, Tensor], **notes: Any) -> Way:
        config = adapting_by(its_run, inner_steps(its_run, rates), from_anchor=True)
        return Way(control(model, config=config), (its_run, model, scales, rates), notes)

    def at_the_best_rate(its_run: Run, name: str) -> Way:
        chosen = run.once(name, lambda: best_rates(its_run, hidden, scales, data))
        return by_steps(its_run, hidden, **chosen)

    def at_a_fixed_rate() -> Way:
        return by_steps(on_all, hidden, {name: torch.tensor(FIXED) for name in select(hidden, on_all.size.adapted)})

    def with_adam() -> Way:
        return Way(control(hidden, config=adapting_by(on_all, torchopt.adam(ADAM))))

    ways: dict[str, Callable[[], Way]] = {}
    if run.system.true_step is not None:
        ways["true physics"] = lambda: Way(knowing_the_truth(run, tasks, later, seed))
        ways["a model of its own"] = lambda: Way(on_its_own_model(run, hidden, scales, tasks, later, seed))
    ways[OURS] = lambda: learned("meta")
    if not with_gains:  # else the weights are those of the hidden state alone
        ways["meta-trained, not adapting"] = lambda: learned("meta", adapting=False)
    ways["hidden state alone"] = lambda: Way(control(hidden))
    ways["not meta-trained, the best rate"] = lambda: at_the_best_rate(run, "rates")
    if with_gains:
        ways["not meta-trained, all weights, the best rate"] = lambda: at_the_best_rate(on_all, "rates_all")
        ways["meta-trained, all weights"] = lambda: learned("meta_all")
    else:
        ways["not meta-trained, a fixed rate"] = at_a_fixed_rate
    return ways | {
        "not meta-trained, Adam carried on": with_adam,
        "ReBAL, as published": lambda: learned("rebal"),
        "GrBAL, an MLP": lambda: learned("mlp"),
        "GrBAL, an MLP, not adapting": lambda: learned("mlp", adapting=False),
    }


# One seed


def size_of(name: str, size_name: str) -> Size:
    sizes = SIZES[size_name]
    return sizes.get(name, sizes["robot" if SYSTEMS[name].true_step is None else "classic"])


def run_of(name: str, seed: int, size_name: str, runs: str) -> Run:
    return Run(SYSTEMS[name], seed, size_of(name, size_name), Path(runs) / size_name / name / str(seed))


def run_seed(name: str, seed: int, size_name: str, runs: str, chosen: tuple[str, ...] = ()) -> dict[str, Any]:
    """What every way, or those chosen, got: returns (groups, N), rewards after changes, errors of predictions.

    Raises:
        ValueError: a way that is chosen is none of the system's, or ours is not chosen.
    """
    torch.set_num_threads(1)
    run, size = run_of(name, seed, size_name, runs), size_of(name, size_name)
    run.open()
    key, tasks, later, changes = derive_seed(seed, 1), [], [], []
    for group, (label, splits) in enumerate(GROUPS.items()):
        for n in range(size.test_tasks):
            first, second = (run.system.task(key, 1000 * (2 * group + k) + n, split) for k, split in enumerate(splits))
            changing, again = label in CHANGING, 0
            while second == first and changing:  # of a few tasks, the same one
                again += 1
                second = run.system.task(derive_seed(key, again), n, splits[1])
            tasks.append(first)
            later.append(second if changing else first)
            changes.append({size.episode // 2: second} if changing else None)
    found, ways = {}, ways_of(run, tasks, later, key)
    if chosen and (OURS not in chosen or not {*chosen} <= ways.keys()):
        raise ValueError(f"--ways must be among {', '.join(ways)}, with {OURS!r}; got {', '.join(chosen)}.")
    for way, make in ways.items():
        if chosen and way not in chosen:
            continue
        path = run.folder / f"{way}.json"
        if not path.exists():
            began = time.perf_counter()
            result = json.dumps(tried(run, make, tasks, changes, key))
            path.with_suffix(".new").write_text(result)
            path.with_suffix(".new").replace(path)
            print(f"{path}: {time.perf_counter() - began:.0f} s", flush=True)
        found[way] = json.loads(path.read_text())
    return found


def tried(run: Run, make: Callable[[], Way], tasks: list[Task], changes: list[Any], seed: int) -> dict[str, Any]:
    """Returns and rewards of a way; of one that ran away, in training or in use, what there is to say of it."""
    try:
        way = make()
        record, reward, state = run.episodes(way.policy, tasks, seed, changes)
    except FloatingPointError as error:
        return {"failed": str(error)}
    middle, number = run.size.episode // 2, run.size.test_tasks
    reward = reward.unflatten(0, (len(GROUPS), number))  # (groups, N, T)
    returns = torch.stack(
        [reward[g, :, middle if label in CHANGING else 0 :].sum(-1) for g, label in enumerate(GROUPS)]
    )
    around = [reward[g, :, middle - 25 :].mean(0).tolist() for g, label in enumerate(GROUPS) if label in CHANGING]
    found = {"returns": rounded(returns.tolist(), 2), "rewards from 25 steps before a change on": rounded(around, 4)}
    found |= way.notes
    if isinstance(way.policy, AdaptiveControl) and way.policy.adapter is not None:
        found["restarts"] = state.restarts.tolist()
    if way.adapting is not None:
        still = Transitions(*(leaf[: 2 * number] for leaf in record))
        before, after = errors_ahead(*way.adapting, still)
        errors = {"before": before, "after": after}
        found["errors ahead"] = {key: e.unflatten(0, (2, number)).mean(1).tolist() for key, e in errors.items()}
    return found


def film(name: str, seed: int, size_name: str, runs: Path) -> None:
    """Videos of a run's models, the adapting one and the hidden state alone, on the same tasks and random numbers."""
    run = run_of(name, seed, size_name, str(runs))
    if run.system.filmed is None:
        raise ValueError(f"--video needs one of the robots; got {name!r}.")
    if load_checkpoint(run.folder / "meta") is None:
        raise ValueError(f"--video needs the models of seed {seed}; there are none in {run.folder}.")
    run.open()
    key = derive_seed(seed, 1)
    for group, split in (("in range", "train"), ("outside", "test")):
        task = run.system.task(key, 1000 * 2 * [*GROUPS].index(group), split)
        ways = ways_of(run, [task], [task], key)
        for way in (OURS, "hidden state alone"):
            policy = ways[way]().policy
            title = f"{name} {group} {way}".replace(" ", "_").replace(",", "")
            with run.system.filmed(task, run.size.episode, key, str(run.folder), title) as environment:
                record, _ = rollout(policy, environment, run.size.episode)
            print(f"{title}: {task}, return {record.reward.sum():.0f}, {run.folder}")


def rounded(values: Any, digits: int) -> Any:
    return round(values, digits) if isinstance(values, float) else [rounded(value, digits) for value in values]


# All seeds


def main(arguments: Arguments) -> None:
    name, path = arguments.system, arguments.out / f"adaptive_control_{arguments.system}.json"
    if arguments.video:
        for seed in arguments.seeds:
            film(name, seed, arguments.size, arguments.runs)
        return
    settings = run_of(name, 0, arguments.size, str(arguments.runs)).settings
    made: dict[str, Any] = {}
    if path.exists():
        record = json.loads(path.read_text())
        if record["settings"] != settings:
            raise ValueError(f"{path} is of other settings than these; move it away: {record['settings']}")
        made = record["seeds"]
    seeds = [seed for seed in arguments.seeds if str(seed) not in made]
    wanted = [(name, seed, arguments.size, str(arguments.runs), arguments.ways) for seed in seeds]
    if arguments.jobs == 1:
        new = [run_seed(*one) for one in wanted]
    else:
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            new = list(pool.map(run_seed, *zip(*wanted, strict=True))) if wanted else []
    made |= {str(seed): found for (_, seed, *_), found in zip(wanted, new, strict=True)}
    made = {seed: made[seed] for seed in sorted(made, key=int)}
    if len({tuple(found) for found in made.values()}) > 1:
        raise ValueError(f"Seeds of {path} have other --ways than these: {', '.join(next(iter(made.values())))}.")
    report = put_together([*made.values()])
    options = [] if arguments.size == "default" else ["--size", arguments.size]
    options += ["--ways", *arguments.ways] if arguments.ways else []
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {
        "report": report,
        "groups": [*GROUPS],
        "command": shlex.join(["python", "benchmarks/adaptive_control.py", name, "--seeds", *made, *options]),
        "machine": f"{platform.machine()}, 2 cores",
        "settings": settings,
        "versions": {"ssmrl": ssmrl.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "seeds": made,
    }
    path.write_text(json.dumps(record) + "\n")
    plot(name, [*made.values()], report, path.with_suffix(".png"))
    print(table(report))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
