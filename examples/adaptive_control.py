"""Swing up pendulums whose gravity, mass and length are unknown, by planning on a model that adapts while it is used.

From nothing: random actions of many pendulums, then rounds in which a recurrent model is trained on all that was seen
and plans the next actions itself (the cross-entropy method). The model is then meta-trained so that a few gradient
steps on the last transitions make its predictions right, 15 steps ahead. At the end it controls pendulums that it has
never met: with physics in the range of the training, outside of it, and with physics that leave it in mid-episode.
Beside it are the planner on the true physics, the same model without adaptation, the model before meta-training, which
knows the physics by its hidden state alone, and that model with the same gradient steps.

    python examples/adaptive_control.py               # minutes, on two cores
    python examples/adaptive_control.py --resume      # go on with a run that was stopped
    python examples/adaptive_control.py --size tiny
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
import torch
import tyro
from torch.func import vmap
from tqdm import tqdm

from ssmrl import AdaptationConfig, Environment, StateSpaceModel, StreamAdapter
from ssmrl.adaptation import Guard, Window, learning_rates, reset_on_rise, scale_by_learning_rates
from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from ssmrl.env_runner import derive_seed, make_with_physics, rollout
from ssmrl.meta_rl import (
    AdaptiveControl,
    BoxActions,
    MetaLearner,
    NonFinite,
    Planner,
    Transitions,
    adaptive_planning_loss,
    dynamics_scales,
    model_step,
    planning_loss,
    student_t_interval,
)
from ssmrl.stop import StopSignal

mpl.use("Agg")
import matplotlib.pyplot as plt

NOMINAL = {"g": 10.0, "m": 1.0, "l": 1.0}
WINDOW, NUM_STEPS, AHEAD, AFTER = 64, 6, 15, 24  # of transitions adapted to, gradient steps, and what is judged then
LENGTHS = (8, 16, 32, 64)  # of the windows of meta-training: an episode begins with short ones
RATES = (0.003, 0.01, 0.03, 0.1)  # to choose from, for the model that is not meta-trained
TASKS_AT_A_TIME, EPISODES_AT_A_TIME = 16, 24
EXPLORATION = 0.5  # deviation of the noise on actions in training, of half of the tasks; a fifth of it for the others
INSIDE, OUTSIDE = (0.0, 2.0), (2.0, 3.0)  # |u| of the factors 1.5^u on physics, in training and beyond
GROUPS = {"in the range": (INSIDE, INSIDE), "outside the range": (OUTSIDE, OUTSIDE), "changing": (INSIDE, OUTSIDE)}


@dataclass(frozen=True)
class Size:
    """How much is spent: rounds of data, tasks in each, steps of an episode, updates, and tasks of each test."""

    rounds: int
    tasks: int
    steps: int
    updates: int
    meta_updates: int
    test_tasks: int


SIZES = {"tiny": Size(2, 4, 100, 3, 3, 2), "default": Size(4, 200, 200, 1000, 1200, 40)}


@dataclass(frozen=True)
class Arguments:
    """Control pendulums of unknown physics by planning on a model that adapts."""

    seed: int = 0
    """Of everything."""
    size: Literal["tiny", "default"] = "default"
    """tiny runs in seconds, for tests."""
    candidates: int = 64
    """Sequences of actions in each of the planner's three rounds."""
    horizon: int = 20
    """Steps that it looks ahead."""
    threads: int = 2
    """Of PyTorch."""
    save_every: int = 200
    """Meta-updates between two checkpoints."""
    resume: bool = False
    """Go on from the last checkpoint in the folder."""
    stop_after: int | None = None
    """Stop after this many rounds of data, at their checkpoint."""
    out: Path = Path("output")
    """Folder for the plot, the figures and checkpoints."""


# The pendulum


def draw_physics(seed, index, reach):
    """Nominal physics times 1.5^u each, |u| uniform in `reach`."""
    generator = np.random.default_rng(derive_seed(seed, index))
    u = generator.uniform(*reach, len(NOMINAL)) * generator.choice([-1, 1], len(NOMINAL))
    return {name: value * float(1.5**factor) for (name, value), factor in zip(NOMINAL.items(), u, strict=True)}


def cost(observation, action, after):
    """The negative of Gymnasium's reward."""
    cosine, sine, speed = observation.unbind(-1)
    return torch.atan2(sine, cosine).square() + 0.1 * speed.square() + 0.001 * action[:, 0].square()


def possible(observation):
    """Bring a prediction to where observations can be: the angle on the circle, the speed within its limits."""
    cosine, sine, speed = observation.unbind(-1)
    length = torch.sqrt(cosine.square() + sine.square()).clamp_min(1e-6)
    return torch.stack([cosine / length, sine / length, speed.clamp(-8.0, 8.0)], -1)


def true_step(physics, hidden_state, observation, action):
    """Gymnasium's equations, for the planner that knows the physics."""
    cosine, sine, speed = observation.unbind(-1)
    g, m, length = physics["g"], physics["m"], physics["l"]
    acceleration = 3 * g / (2 * length) * sine + 3 / (m * length.square()) * action[:, 0]
    after = (speed + 0.05 * acceleration).clamp(-8.0, 8.0)
    angle = torch.atan2(sine, cosine) + 0.05 * after
    following = torch.stack([angle.cos(), angle.sin(), after], -1)
    return cost(observation, action, following), following, hidden_state


# Policies


def make_planner(arguments, step):
    actions = BoxActions([-2.0], [2.0])
    return Planner(step, actions, horizon=arguments.horizon, candidates=arguments.candidates, rounds=3)


def control(arguments, model, scales, num_streams, seed, config=None):
    """The policy that plans on the model, and adapts it if it is told how."""
    planner = make_planner(arguments, model_step(model, scales, cost, project=possible))
    adapter = None if config is None else StreamAdapter(model, config, num_streams)
    generator = torch.Generator().manual_seed(seed)
    return AdaptiveControl(planner, model, scales, adapter=adapter, generator=generator)


def knows_the_physics(arguments, physics, later, change, seed):
    """The policy that plans on the true physics, which change at a step."""
    planner, generator = make_planner(arguments, true_step), torch.Generator().manual_seed(seed)
    before, after = ({name: torch.tensor([one[name] for one in many]) for name in NOMINAL} for many in (physics, later))

    def policy(observation, state, reset):
        plan, t = (planner.init(len(reset)), 0) if state is None else state
        noise = planner.noise(len(reset), generator)
        action, plan = planner(before if t < change else after, None, observation, plan, noise, reset=reset)
        return action, (plan, t + 1)

    return policy


def random_torques(seed):
    """Torques that are held for some steps."""
    generator = torch.Generator().manual_seed(seed)

    def policy(observation, held, reset):
        fresh = torch.rand(len(reset), 1, generator=generator) * 4 - 2
        keep = torch.rand(len(reset), 1, generator=generator) < 0.7
        action = fresh if held is None else torch.where(keep, held, fresh)
        return action, action

    return policy


def exploring(policy, seed):
    """The same policy with noise on its actions, more of it in every other row."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(observation, state, reset):
        action, state = policy(observation, state, reset)
        scale = torch.where(torch.arange(len(action)) % 2 == 0, EXPLORATION / 5, EXPLORATION)[:, None]
        action = (action + 2 * scale * torch.randn(action.shape, generator=generator)).clamp(-2.0, 2.0)
        return action, state._replace(action=action)

    return noisy


def run(policy, physics, steps, seed, label, changes=None):
    """Let a policy control pendulums for an episode: what happened, and the rewards (N, T)."""
    changes = [None] * len(physics) if changes is None else changes
    makers = [
        partial(make_with_physics, "Pendulum-v1", one, changes=c) for one, c in zip(physics, changes, strict=True)
    ]
    with Environment(makers, seed=seed, autoreset_mode="Disabled") as environment, progress(steps, label) as bar:
        record, _ = rollout(policy, environment, steps, progress=bar.update)
    return Transitions(record.observation, record.action, record.next_observation), record.reward


def progress(total, label):
    return tqdm(total=total, desc=label, file=sys.stdout, mininterval=0.5, dynamic_ncols=True)


# Training


def scales_of(size, data):
    """Those of the first round, whatever came after it."""
    return dynamics_scales(*(leaf[: size.tasks] for leaf in data))


def rate_at(update, total, peak):
    """Up over a tenth of the updates, then down to 0 as a cosine."""
    part = (update + 1) / total
    return peak * min(10 * part, 0.5 * (1 + math.cos(math.pi * part)))


def train(model, scales, data, updates, generator, label):
    """Train the model on whole episodes, to be planned with: its hidden state has to tell the physics."""
    step = model_step(model, scales, cost, project=possible)
    optimizer = torch.optim.Adam(model.parameters())
    length = data.action.shape[1]
    params = dict(model.named_parameters())
    with progress(updates, label) as bar:
        for update in range(updates):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(update, updates, 2e-3)
            rows = torch.randint(len(data.action), (EPISODES_AT_A_TIME,), generator=generator)
            starts = (torch.rand(4, generator=generator) * (length - AHEAD)).long().tolist()
            episodes = Transitions(*(leaf[rows] for leaf in data))
            loss = planning_loss(model, step, scales, params, None, episodes, starts=starts, horizon=AHEAD)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()


def losses_of(model, scales, meta, task, begin, window, optimizer):
    """What meta-training and the choice of a rate minimise, of one task (T, ·): before and after a window."""
    step = model_step(model, scales, cost, project=possible)
    episode = Transitions(*(leaf[None] for leaf in task))
    settings = {"begin": begin, "window": window, "horizon": AHEAD, "num_steps": NUM_STEPS}
    return adaptive_planning_loss(model, step, scales, meta, episode, optimizer=optimizer, **settings)


def some_tasks(data, generator, number=TASKS_AT_A_TIME):
    """Where a window begins, how long it is, and episodes up to some steps after it."""
    rows = torch.randint(len(data.action), (number,), generator=generator)
    window = LENGTHS[int(torch.randint(len(LENGTHS), (1,), generator=generator))]
    begin = int(torch.randint(data.action.shape[1] - window - AFTER + 1, (1,), generator=generator))
    return begin, window, tuple(leaf[rows, : begin + window + AFTER] for leaf in data)


def meta_train(arguments, size, model, scales, data, found, save):
    """MAML with learned rates, for predictions after the steps alone. Returns the rates."""
    params = dict(model.named_parameters())
    rates = learning_rates(params, 0.01, per_element=True)
    optimizer = torch.optim.Adam([*params.values(), *rates.values()])
    generator, begun, at = torch.Generator().manual_seed(arguments.seed), 0, (0, 0)

    def loss(meta, task):
        inner = scale_by_learning_rates(meta["rates"])
        return losses_of(model, scales, meta["params"], task, *at, inner).adapted

    learner = MetaLearner(
        loss,
        {"params": params, "rates": rates},
        outer_optimizer=optimizer,
        max_grad_norm=1.0,
        nonfinite=NonFinite("skip", at_most=20),  # the steps of a task may run away
    )
    if found is not None:
        begun = found["updates"]
        generator.set_state(found["generator"])
        learner.load_state_dict(found["learner"])
    bar = tqdm(total=size.meta_updates, initial=begun, desc="meta-training", file=sys.stdout, mininterval=0.5)
    with bar, StopSignal() as stop:
        for update in range(begun, size.meta_updates):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(update, size.meta_updates, 1.5e-3)
            *at, tasks = some_tasks(data, generator)
            bar.set_postfix(loss=f"{learner.update(tasks):.3f}", left_out=learner.left_out, refresh=False)
            bar.update()
            if stop or (update + 1) % arguments.save_every == 0 or update + 1 == size.meta_updates:
                state = {"generator": generator.get_state(), "learner": learner.state_dict()}
                save({"updates": update + 1, **state})
                stop.exit_if_asked()
    return {name: rate.detach() for name, rate in rates.items()}


def best_rate(model, scales, data, seed):
    """The rate at which gradient steps help a model most that was not meta-trained for them, on the training tasks."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    batches = [some_tasks(data, generator) for _ in range(8)]

    def loss(rate):
        inner = scale_by_learning_rates({name: p.new_tensor(rate) for name, p in params.items()})
        found = [
            vmap(lambda *task, at=at: losses_of(model, scales, params, task, *at, inner).adapted)(*tasks).mean()
            for *at, tasks in batches
        ]
        return torch.stack(found).mean().nan_to_num(nan=math.inf).item()

    return min(RATES, key=loss)


# Test and plot


def test(arguments, size, hidden, model, rates, rate, scales):
    """Rewards of every way, (groups, N, T)."""
    number, change, seed = size.test_tasks, size.steps // 2, derive_seed(arguments.seed, 1)
    physics, later, changes = [], [], []
    for group, (name, reaches) in enumerate(GROUPS.items()):
        for n in range(number):
            one, other = (draw_physics(seed, 1000 * (2 * group + k) + n, reach) for k, reach in enumerate(reaches))
            changing = name == "changing"
            physics.append(one)
            later.append(other if changing else one)
            changes.append({change: other} if changing else None)

    adapts = partial(
        AdaptationConfig,
        num_steps=NUM_STEPS,
        window=Window(WINDOW, minimum=LENGTHS[0]),
        from_anchor=True,
        guard=Guard(allowance=0.3),
        reset=reset_on_rise(3.0, keep=LENGTHS[0]),  # what was seen before a change of physics is of no use after it
    )
    policy = partial(control, arguments, scales=scales, num_streams=len(physics), seed=seed)
    ways: dict[str, Callable] = {
        "true physics": knows_the_physics(arguments, physics, later, change, seed),
        "meta-trained, adapting": policy(model, config=adapts(optimizer=scale_by_learning_rates(rates))),
        "meta-trained, not adapting": policy(model),
        "hidden state alone": policy(hidden),
        f"hidden state and steps of {rate}": policy(hidden, config=adapts(learning_rate=rate)),
    }
    rewards = {}
    for name, way in ways.items():
        _, reward = run(way, physics, size.steps, seed, name, changes)
        rewards[name] = reward.unflatten(0, (len(GROUPS), number))
    return rewards


def plot(rewards, change, path):
    """What every way has more than the hidden state alone, task by task, and rewards around the change."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for n, (way, reward) in enumerate(rewards.items()):
        more = (reward - rewards["hidden state alone"]).sum(-1)
        mean, low, high = (x.tolist() for x in student_t_interval(more.T))
        error = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
        axes[0].errorbar([g + 0.12 * (n - 2) for g in range(len(mean))], mean, error, fmt="o", label=way)
        after = reward[2, :, change - 20 :].mean(0)
        smooth = torch.nn.functional.avg_pool1d(after[None], 5, 1)[0]
        axes[1].plot(range(-18, len(smooth) - 18), smooth)
    axes[0].set_xticks(range(len(GROUPS)), GROUPS)
    axes[0].set(ylabel="return more than the hidden state alone", title="pendulums never met, mean of tasks and 95 %")
    figure.legend(loc="outside lower center", ncols=len(rewards), fontsize=8)
    axes[1].axvline(0, color="0.8", zorder=0)
    axes[1].set(xlabel="steps after a change of physics", ylabel="reward, mean of five steps")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    size, folder = SIZES[arguments.size], arguments.out / "checkpoints"
    model = StateSpaceModel(state_dim=32, input_dim=4, output_dim=3, hidden_dim=64)
    found = load_checkpoint(folder) if arguments.resume else None
    state = {"rounds": 0, "data": None, "hidden": None, "meta": None} if found is None else found.state
    if found is not None:
        for damaged in found.skipped:
            print(damaged)
    arguments.out.mkdir(parents=True, exist_ok=True)

    def save():
        state["model"] = model.state_dict()
        save_checkpoint(folder, state["rounds"] + (state["meta"]["updates"] if state["meta"] else 0), state)

    if found is not None:
        model.load_state_dict(state["model"])
    for r in range(state["rounds"], size.rounds):
        seed = derive_seed(arguments.seed, 2, r)
        physics = [draw_physics(seed, n, INSIDE) for n in range(size.tasks)]
        policy = random_torques(seed)
        if r:
            scales = scales_of(size, state["data"])
            policy = exploring(control(arguments, model, scales, size.tasks, seed), seed)
        new, reward = run(policy, physics, size.steps, seed, f"round {r}")
        print(f"round {r}: mean return {reward.sum(1).mean():.0f}")
        old = [] if state["data"] is None else [state["data"]]
        data = Transitions(*(torch.cat(leaves) for leaves in zip(*old, new, strict=True)))
        scales = scales_of(size, data)
        generator = torch.Generator().manual_seed(seed)
        updates = 3 * size.updates if r == size.rounds - 1 else size.updates
        train(model, scales, data, updates, generator, f"training {r}")
        state |= {"rounds": r + 1, "data": tuple(data)}
        if r == size.rounds - 1:
            state["hidden"] = {name: p.clone() for name, p in model.state_dict().items()}
        save()
        if state["rounds"] == arguments.stop_after:
            print(f"stopped after {r + 1} rounds; --resume goes on")
            return

    data = Transitions(*state["data"])
    scales = scales_of(size, data)
    hidden = StateSpaceModel(state_dim=32, input_dim=4, output_dim=3, hidden_dim=64)
    hidden.load_state_dict(state["hidden"])

    def save_meta(meta):
        state["meta"] = meta
        save()

    rates = meta_train(arguments, size, model, scales, data, state["meta"], save_meta)
    rate = best_rate(hidden, scales, data, arguments.seed)
    rewards = test(arguments, size, hidden, model, rates, rate, scales)
    plot(rewards, size.steps // 2, arguments.out / "adaptive_control.png")
    report = {
        "returns: way, group, task": {way: reward.sum(-1).tolist() for way, reward in rewards.items()},
        "returns after the change": {
            way: reward[2, :, size.steps // 2 :].sum(-1).tolist() for way, reward in rewards.items()
        },
        "groups": list(GROUPS),
        "arguments": {**asdict(arguments), "out": str(arguments.out)},
    }
    (arguments.out / "adaptive_control.json").write_text(json.dumps(report) + "\n")
    print(f"\n{'mean return':32}" + "".join(f"{group:>26}" for group in GROUPS))
    for way, reward in rewards.items():
        print(f"{way:32}" + "".join(f"{value:26.0f}" for value in reward.sum(-1).mean(1).tolist()))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
