"""Control of systems that were never met, by planning on a model: when gradients help, and when a hidden state does.

    python benchmarks/adaptive_control.py --seeds 5 --jobs 2        # both systems, with checkpoints; hours
    python benchmarks/adaptive_control.py --size tiny --seeds 2 --out output

For every system and seed: rounds of data, collected by the planner on the model of the round before; a recurrent model
trained on all of it; from there, meta-training. Then 40 systems with physics in the range of the training, 40 outside
of it and 40 whose physics change in mid-episode are controlled in every way of `ways_of`, with the same random numbers.
What was done is not done again: every model and every way has a file of its own under --runs.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import torch
import torchopt
import tyro
from control_systems import INSIDE, OUTSIDE, SYSTEMS, System
from torch import Tensor, nn
from torch.func import vmap

import ssmrl
from ssmrl import MLP, AdaptationConfig, Environment, StateSpaceModel, StreamAdapter, adapt
from ssmrl.adaptation import Window, learning_rates, scale_by_learning_rates
from ssmrl.adaptation.tree import tree_map
from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from ssmrl.core import functional_forward
from ssmrl.env_runner import derive_seed, rollout
from ssmrl.meta_rl import (
    AdaptiveControl,
    DynamicsScales,
    MetaLearner,
    Planner,
    Transitions,
    adaptive_planning_loss,
    dynamics_data,
    dynamics_scales,
    model_step,
    one_step_loss,
    planning_loss,
    student_t_interval,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

WINDOW, LENGTHS, NUM_STEPS, AHEAD, AFTER = 32, (8, 12, 20, 32), 3, 15, 24
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
GROUPS = {"in range": (INSIDE, INSIDE), "outside": (OUTSIDE, OUTSIDE), "change": (INSIDE, INSIDE)}
"""Reach of the physics before and after the middle of an episode; they change in the last group alone."""
OURS = "meta-trained, adapting"


@dataclass(frozen=True)
class Size:
    """Of a run."""

    rounds: int
    tasks: int
    """Of every round, an episode each."""
    updates: int
    """Of the model after every round, three times as many after the last."""
    meta_updates: int
    batch: int
    test_tasks: int
    candidates: int
    own_steps: int
    """Of the models that are fitted to one system each."""
    episode: int
    """Steps."""
    horizon: int
    """Of the planner."""


SIZES = {"tiny": Size(2, 4, 3, 3, 2, 2, 8, 2, 60, 3), "default": Size(4, 300, 1000, 1200, 16, 40, 64, 400, 200, 20)}


@dataclass(frozen=True)
class Arguments:
    """Every way to control systems of unknown physics, on several seeds."""

    systems: tuple[Literal["pendulum", "cartpole"], ...] = ("pendulum", "cartpole")
    """Which."""
    seeds: int = 5
    """From 0 on."""
    jobs: int = 1
    """Runs at a time, on a thread each."""
    size: Literal["tiny", "default"] = "default"
    """tiny is for tests."""
    runs: Path = Path("output/adaptive_control")
    """Folder for models and returns of every run."""
    out: Path = Path("docs/results")
    """Folder for what is put together."""


# One run: data and models


@dataclass(frozen=True)
class Run:
    """A system and a seed, and where its files are."""

    system: System
    seed: int
    size: Size
    folder: Path

    def planner(self, step: Any) -> Planner:
        return Planner(step, self.system.actions, horizon=self.size.horizon, candidates=self.size.candidates, rounds=3)

    def step(self, model: nn.Module, scales: DynamicsScales) -> Any:
        return model_step(model, scales, self.system.cost, project=self.system.project)

    def episodes(self, policy: Any, tasks: list[Any], seed: int, changes: list[Any] | None = None) -> Any:
        """An episode of every task: what happened, and the rewards (N, T)."""
        changes = [None] * len(tasks) if changes is None else changes
        makers = [partial(self.system.make, task, changes=c) for task, c in zip(tasks, changes, strict=True)]
        with Environment(makers, seed=seed, autoreset_mode="Disabled") as environment:
            record, _ = rollout(policy, environment, self.size.episode)
        return Transitions(record.observation, record.action, record.next_observation), record.reward

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, from its checkpoint if it was made before."""
        found = load_checkpoint(self.folder / name)
        if found is None:
            began = time.perf_counter()
            save_checkpoint(self.folder / name, 0, make())
            print(f"{self.folder} {name}: {time.perf_counter() - began:.0f} s", flush=True)
            found = load_checkpoint(self.folder / name)
        assert found is not None
        return found.state


def recurrent(run: Run) -> nn.Module:
    size = observation_size(run)
    return StateSpaceModel(32, size + run.system.actions.size, size, hidden_dim=64)


def stateless(run: Run) -> nn.Module:
    size = observation_size(run)
    return MLP(size + run.system.actions.size, size, hidden_dim=128)


def observation_size(run: Run) -> int:
    with run.system.make(run.system.nominal) as environment:
        shape = environment.observation_space.shape
    assert shape is not None
    return int(shape[0])


def random_actions(run: Run, seed: int) -> Any:
    """Actions that are held for some steps."""
    generator, low, high = torch.Generator().manual_seed(seed), run.system.actions.low, run.system.actions.high

    def policy(observation: Tensor, held: Tensor | None, reset: Tensor) -> tuple[Tensor, Tensor]:
        fresh = low + torch.rand(len(reset), len(low), generator=generator) * (high - low)
        keep = torch.rand(len(reset), 1, generator=generator) < 0.7
        action = fresh if held is None else torch.where(keep, held, fresh)
        return action, action

    return policy


def exploring(run: Run, policy: Any, seed: int) -> Any:
    """Noise of 5 % of the range on the actions of every other row, of 25 % on those between."""
    generator, low, high = torch.Generator().manual_seed(seed), run.system.actions.low, run.system.actions.high

    def noisy(observation: Tensor, state: Any, reset: Tensor) -> tuple[Tensor, Any]:
        action, state = policy(observation, state, reset)
        scale = torch.where(torch.arange(len(action)) % 2 == 0, 0.05, 0.25)[:, None] * (high - low)
        action = torch.clamp(action + scale * torch.randn(action.shape, generator=generator), low, high)
        return action, state._replace(action=action)

    return noisy


def rate_at(update: int, total: int, peak: float) -> float:
    """Up over a tenth of the updates, then down as a cosine."""
    part = (update + 1) / total
    return peak * min(10 * part, 0.5 * (1 + math.cos(math.pi * part)))


def train(run: Run, model: nn.Module, scales: DynamicsScales, data: Transitions, updates: int, seed: int) -> None:
    """Train a model on whole episodes, to be planned with."""
    step, params = run.step(model, scales), dict(model.named_parameters())
    generator, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam(model.parameters())
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(update, updates, 2e-3)
        rows = torch.randint(len(data.action), (3 * run.size.batch // 2,), generator=generator)
        starts = (torch.rand(4, generator=generator) * (run.size.episode - AHEAD)).long().tolist()
        episodes = Transitions(*(leaf[rows] for leaf in data))
        loss = planning_loss(model, step, scales, params, None, episodes, starts=starts, horizon=AHEAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def aggregated(run: Run) -> dict[str, Any]:
    """Data of all rounds, and the recurrent model that was trained on them."""
    torch.manual_seed(run.seed)
    model, data, scales = recurrent(run), None, None
    for r in range(run.size.rounds):
        seed = derive_seed(run.seed, 2, r)
        tasks = [run.system.draw(seed, n, INSIDE) for n in range(run.size.tasks)]
        policy = (
            random_actions(run, seed) if scales is None else exploring(run, control(run, model, scales, seed), seed)
        )
        new, _ = run.episodes(policy, tasks, seed)
        data = new if data is None else Transitions(*map(torch.cat, zip(data, new, strict=True)))
        scales = dynamics_scales(*data) if scales is None else scales
        last = r == run.size.rounds - 1
        train(run, model, scales, data, (3 if last else 1) * run.size.updates, seed)
    assert data is not None
    return {"data": tuple(data), "model": model.state_dict()}


def some_tasks(run: Run, data: Transitions, generator: torch.Generator) -> tuple[int, int, tuple[Tensor, ...]]:
    """Where a window begins, how long it is, and episodes up to some steps after it."""
    rows = torch.randint(len(data.action), (run.size.batch,), generator=generator)
    window = LENGTHS[int(torch.randint(len(LENGTHS), (1,), generator=generator))]
    begin = int(torch.randint(run.size.episode - window - AFTER + 1, (1,), generator=generator))
    return begin, window, tuple(leaf[rows, : begin + window + AFTER] for leaf in data)


def losses_of(run: Run, model: nn.Module, scales: DynamicsScales, params: Any, task: Any, at: Any, inner: Any) -> Any:
    begin, window = at
    episode = Transitions(*(leaf[None] for leaf in task))
    settings = {"begin": begin, "window": window, "horizon": AHEAD, "num_steps": NUM_STEPS}
    return adaptive_planning_loss(model, run.step(model, scales), scales, params, episode, optimizer=inner, **settings)


def meta_trained(
    run: Run, model: nn.Module, scales: DynamicsScales, data: Transitions, unadapted: float
) -> dict[str, Any]:
    """MAML with learned rates, whose loss has the model before it adapts with a weight."""
    params = dict(model.named_parameters())
    rates = learning_rates(params, 0.01, per_element=True)
    optimizer = torch.optim.Adam([*params.values(), *rates.values()])
    generator, at = torch.Generator().manual_seed(run.seed), (0, 0)

    def loss(meta: Any, task: Any) -> Tensor:
        found = losses_of(run, model, scales, meta["params"], task, at, scale_by_learning_rates(meta["rates"]))
        total: Tensor = unadapted * found.unadapted + found.adapted
        return total

    learner = MetaLearner(loss, {"params": params, "rates": rates}, outer_optimizer=optimizer, max_grad_norm=1.0)
    for update in range(run.size.meta_updates):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(update, run.size.meta_updates, 5e-4)
        begin, window, tasks = some_tasks(run, data, generator)
        at = (begin, window)
        learner.update(tasks)
    return {"model": model.state_dict(), "rates": {name: rate.detach() for name, rate in rates.items()}}


def best_rate(run: Run, model: nn.Module, scales: DynamicsScales, data: Transitions) -> float:
    """The rate at which gradient steps help a model most that was not meta-trained for them, on the training tasks."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(run.seed)
    batches = [some_tasks(run, data, generator) for _ in range(8)]

    def loss(rate: float) -> float:
        inner = scale_by_learning_rates({name: p.new_tensor(rate) for name, p in params.items()})
        found = [
            vmap(lambda *task, at=at: losses_of(run, model, scales, params, task, at, inner).adapted)(*tasks).mean()
            for *at, tasks in batches
        ]
        return float(torch.stack(found).mean().nan_to_num(nan=math.inf))

    return min(RATES, key=loss)


# Ways to control


def control(
    run: Run,
    model: nn.Module,
    scales: DynamicsScales,
    seed: int,
    config: AdaptationConfig | None = None,
    number: int = 0,
) -> AdaptiveControl:
    adapter = None if config is None else StreamAdapter(model, config, number)
    generator = torch.Generator().manual_seed(seed)
    return AdaptiveControl(run.planner(run.step(model, scales)), model, scales, adapter=adapter, generator=generator)


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


def own_models(run: Run, hidden: nn.Module, scales: DynamicsScales, tasks: list[Any], seed: int) -> dict[str, Tensor]:
    """The recurrent model, fitted to two episodes of every system: one of the planner on it, one at random."""
    parts = [
        run.episodes(exploring(run, control(run, hidden, scales, seed), seed), tasks, seed)[0],
        run.episodes(random_actions(run, seed), tasks, seed + 1)[0],
    ]
    data = Transitions(*(torch.stack(leaves, 1) for leaves in zip(*parts, strict=True)))  # (N, 2, T, ·)
    named = {name: p.detach() for name, p in hidden.named_parameters()}

    def fitted(*episodes: Tensor) -> Any:
        def loss(params: Any, *episodes: Tensor) -> Tensor:
            return one_step_loss(hidden, scales, params, None, *episodes)[0]

        steps, optimizer = run.size.own_steps, torchopt.adam(1e-3)
        return adapt(loss, named, *episodes, optimizer=optimizer, num_steps=steps, first_order=True).params

    result: dict[str, Tensor] = tree_map(torch.Tensor.detach, vmap(fitted)(*data))
    return result


def ways_of(run: Run, tasks: list[Any], later: list[Any], seed: int) -> dict[str, Callable[[], Any]]:
    """Name -> what makes the policy; models are trained when they are asked for."""
    found = run.once("data", lambda: aggregated(run))
    data = Transitions(*found["data"])
    scales = dynamics_scales(*(leaf[: run.size.tasks] for leaf in data))  # of the first round, as in `aggregated`
    hidden = recurrent(run)
    hidden.load_state_dict(found["model"])
    number = len(tasks)
    adapts = partial(AdaptationConfig, num_steps=NUM_STEPS, window=Window(WINDOW, minimum=LENGTHS[0]), from_anchor=True)

    def start(make: Callable[[Run], nn.Module], weights: Any) -> nn.Module:
        model = make(run)
        model.load_state_dict(weights)
        return model

    def perceptron() -> Any:
        torch.manual_seed(run.seed)
        model = stateless(run)
        train(run, model, scales, data, 3 * run.size.updates, derive_seed(run.seed, 3))
        return meta_trained(run, model, scales, data, 1.0)

    makers = {
        "meta": (recurrent, lambda: meta_trained(run, start(recurrent, found["model"]), scales, data, 1.0)),
        "rebal": (recurrent, lambda: meta_trained(run, start(recurrent, found["model"]), scales, data, 0.0)),
        "mlp": (stateless, perceptron),
    }

    def learned(name: str, *, adapting: bool) -> Any:
        make, trained = makers[name]
        weights = run.once(name, trained)
        config = adapts(optimizer=scale_by_learning_rates(weights["rates"])) if adapting else None
        return control(run, start(make, weights["model"]), scales, seed, config, number)

    def truth() -> Any:
        planners = [run.system.params(tasks), run.system.params(later)]
        return by_turns(run, planners, run.planner(run.system.true_step), lambda *_: None, seed)

    def own() -> Any:
        weights = run.once(
            "own",
            lambda: {
                "before": own_models(run, hidden, scales, tasks, derive_seed(seed, 1)),
                "after": own_models(run, hidden, scales, later, derive_seed(seed, 2)),
            },
        )

        def state_of(params: Any, state: Any, before: Any, observation: Tensor) -> Any:
            if before is None:
                return hidden.init_hidden(number)  # type: ignore[operator]
            x, _ = dynamics_data(scales, *before, observation)
            return vmap(lambda p, x, h: functional_forward(hidden, p, x[None], h[None])[1][0])(params, x, state)

        return by_turns(
            run, [weights["before"], weights["after"]], run.planner(run.step(hidden, scales)), state_of, seed
        )

    def not_meta(**optimizer: Any) -> Any:
        return control(run, hidden, scales, seed, adapts(**optimizer), number)

    carried = AdaptationConfig(
        optimizer=torchopt.adam(0.003), num_steps=NUM_STEPS, window=Window(WINDOW, minimum=LENGTHS[0])
    )
    return {
        "true physics": truth,
        "a model of its own": own,
        OURS: lambda: learned("meta", adapting=True),
        "meta-trained, not adapting": lambda: learned("meta", adapting=False),
        "hidden state alone": lambda: control(run, hidden, scales, seed),
        "not meta-trained, the same steps": lambda: not_meta(learning_rate=best_rate(run, hidden, scales, data)),
        "not meta-trained, Adam carried on": lambda: control(run, hidden, scales, seed, carried, number),
        "ReBAL": lambda: learned("rebal", adapting=True),
        "GrBAL, an MLP": lambda: learned("mlp", adapting=True),
        "GrBAL, an MLP, not adapting": lambda: learned("mlp", adapting=False),
    }


def run_seed(name: str, seed: int, size_name: str, runs: str) -> dict[str, Any]:
    """Rewards (groups, N, T) of every way, as lists."""
    torch.set_num_threads(1)
    size = SIZES[size_name]
    run = Run(SYSTEMS[name], seed, size, Path(runs) / size_name / name / str(seed))
    run.folder.mkdir(parents=True, exist_ok=True)
    key, tasks, later, changes = derive_seed(seed, 1), [], [], []
    for group, (label, reaches) in enumerate(GROUPS.items()):
        for n in range(size.test_tasks):
            first, second = (run.system.draw(key, 1000 * (2 * group + k) + n, reach) for k, reach in enumerate(reaches))
            changing = label == "change"
            tasks.append(first)
            later.append(second if changing else first)
            changes.append({size.episode // 2: second} if changing else None)
    rewards = {}
    for way, make in ways_of(run, tasks, later, key).items():
        path = run.folder / f"{way}.json"
        if not path.exists():
            began = time.perf_counter()
            try:
                _, reward = run.episodes(make(), tasks, key, changes)
                values = reward.unflatten(0, (len(GROUPS), size.test_tasks)).tolist()
            except FloatingPointError as error:  # a model ran away: it is what there is to report
                print(f"{run.folder} {way}: {error}", flush=True)
                values = None
            path.write_text(json.dumps(values))
            print(f"{run.folder} {way}: {time.perf_counter() - began:.0f} s", flush=True)
        rewards[way] = json.loads(path.read_text())
    return rewards


# All runs


def put_together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean returns with intervals over seeds, and what every way has less than ours has, task by task."""
    found: dict[str, Any] = {}
    ours = torch.tensor([run[OURS] for run in runs])  # (seeds, groups, N, T)
    scored = partial(_scored, change=list(GROUPS).index("change"))
    for way in runs[0]:
        if any(run[way] is None for run in runs):
            found[way] = {"failed": sum(run[way] is None for run in runs)}
            continue
        rewards = torch.tensor([run[way] for run in runs])
        returns, differences = scored(rewards), scored(ours) - scored(rewards)
        found[way] = {
            "return": [x.tolist() for x in student_t_interval(returns.mean(2))],
            "ours minus it": [x.tolist() for x in student_t_interval(differences.mean(2))],
            "after a change": rewards[:, -1].mean((0, 1)).tolist(),
        }
    return found


def _scored(rewards: Tensor, change: int) -> Tensor:
    """Returns (seeds, groups, N); of the systems that change, those after it."""
    returns = rewards.sum(-1)
    returns[:, change] = rewards[:, change, :, rewards.shape[-1] // 2 :].sum(-1)
    return returns


def plot(report: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, len(report), figsize=(6 * len(report), 3.6), layout="constrained", squeeze=False)
    for axis, (name, ways) in zip(axes[0], report.items(), strict=True):
        for way, found in ways.items():
            if "failed" in found:
                continue
            after = torch.tensor(found["after a change"])[None]
            middle = after.shape[1] // 2
            smooth = torch.nn.functional.avg_pool1d(after, 5, 1)[0][middle - 24 :]
            axis.plot(range(-22, len(smooth) - 22), smooth, label=way, lw=1.2)
        axis.axvline(0, color="0.8", zorder=0)
        axis.set(title=name, xlabel="steps after a change of physics", ylabel="reward, mean of five steps")
    axes[0][0].legend(fontsize=6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Arguments) -> None:
    wanted = [
        (name, seed, arguments.size, str(arguments.runs))
        for name in arguments.systems
        for seed in range(arguments.seeds)
    ]
    if arguments.jobs == 1:
        made = [run_seed(*one) for one in wanted]
    else:
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            made = list(pool.map(run_seed, *zip(*wanted, strict=True)))
    report = {}
    for name in arguments.systems:
        report[name] = put_together([run for run, one in zip(made, wanted, strict=True) if one[0] == name])
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = " ".join(arguments.systems)
    record = {
        "systems": report,
        "groups": list(GROUPS),
        "command": f"python benchmarks/adaptive_control.py --systems {names} --seeds {arguments.seeds}",
        "settings": {**asdict(SIZES[arguments.size]), "window": WINDOW, "lengths": LENGTHS, "steps": NUM_STEPS},
        "versions": {"ssmrl": ssmrl.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    (arguments.out / "adaptive_control.json").write_text(json.dumps(record) + "\n")
    plot(report, arguments.out / "adaptive_control.png")
    for name, ways in report.items():
        print(f"\n{name:36}" + "".join(f"{group:>30}" for group in GROUPS))
        for way, found in ways.items():
            if "failed" in found:
                print(f"{way:36}failed in {found['failed']} of {arguments.seeds} runs")
                continue
            mean, low, high = found["ours minus it"]
            cells = [
                f"{value:10.0f}  ({m:+.0f}: {a:+.0f} to {b:+.0f})"
                for value, m, a, b in zip(found["return"][0], mean, low, high, strict=True)
            ]
            print(f"{way:36}" + "".join(f"{cell:>30}" for cell in cells))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
