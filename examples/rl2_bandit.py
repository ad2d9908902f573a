"""RL²: a recurrent policy whose hidden state learns the task, trained by PPO on whole trials (Duan et al. 2016).

A trial is one task from start to finish: N pulls of a bandit whose arms pay with probabilities that are drawn anew for
every trial, or ten episodes in a Markov decision process that is. The policy sees its last action and reward, forgets
only between trials, and is trained on the reward of the whole trial: it has to explore, and to use what it found. No
weights change in a trial; what adapts is the state.

    python examples/rl2_bandit.py                            # 5 arms, 10 pulls: minutes on one core
    python examples/rl2_bandit.py --pulls 100
    python examples/rl2_bandit.py --task tabular             # 10 episodes of 10 steps; a memory of fast weights
    python examples/rl2_bandit.py --size tiny
    python examples/rl2_bandit.py --resume                   # go on where a run that was killed left off

Every iteration draws its tasks and its noise from the seed and its number alone, so that a run that goes on from a
checkpoint ends, bit for bit, where it would have ended without the interruption.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from ssmrl.core import GRU, LSTM, DiagonalSSM, StateSpaceModel
from ssmrl.env_runner import Environment, derive_seed, gumbel_noise, policy_inputs, rollout, task_family
from ssmrl.env_runner.tasks.tabular import optimal_return
from ssmrl.meta_rl import PPO, CategoricalHead, PolicyModel, actor_critic_batch
from ssmrl.stop import StopSignal

mpl.use("Agg")
import matplotlib.pyplot as plt

PUBLISHED = {  # Duan et al. 2016, tables 1 and 2: what can be had without learning to learn, and RL²
    ("bandit", 5, 10): {"random": 5.0, "Gittins": 6.6, "Thompson": 5.7, "UCB1": 6.7, "RL²": 6.7},
    ("bandit", 5, 100): {"random": 49.9, "Gittins": 78.3, "Thompson": 74.7, "UCB1": 78.0, "RL²": 78.7},
    ("tabular", 10): {"random": 100.1, "PSRL": 138.1, "RL²": 156.2},
}


@dataclass(frozen=True)
class Size:
    """How much is spent: iterations, environment steps of every one in all its trials, and tasks of the test."""

    iterations: int
    steps: int
    test_tasks: int


SIZES = {
    "bandit": {"tiny": Size(4, 200, 50), "default": Size(200, 40_000, 10_000)},
    "tabular": {"tiny": Size(4, 200, 50), "default": Size(300, 20_000, 5_000)},
}


@dataclass(frozen=True)
class Learning:
    """What suits a kind of task. Rates and weights of the entropy are those of the first iteration, and fall to 0."""

    model: str
    """What remembers, of `MODELS`."""
    lr: float
    """Of Adam."""
    entropy: float
    gamma: tuple[float, float]
    """γ of the first iteration, and from half of them on."""
    lam: float
    """λ of the advantages."""


LEARNING = {
    # The reward of the whole trial is what is sought, and 100 steps are few enough not to discount it.
    "bandit": Learning(model="gru", lr=4e-3, entropy=0.03, gamma=(1.0, 1.0), lam=0.95),
    # A process takes longer to learn. First to use what was seen, which little variance helps, then to explore.
    "tabular": Learning(model="fast-weights", lr=3e-3, entropy=0.1, gamma=(0.8, 0.99), lam=0.5),
}
EPOCHS, MINIBATCHES = 3, 8


@dataclass(frozen=True)
class Arguments:
    """RL² with PPO on bandits and tabular Markov decision processes."""

    task: Literal["bandit", "tabular"] = "bandit"
    """tabular has 10 states and 5 actions, and trials of `episodes` episodes of 10 steps."""
    arms: int = 5
    """Of a bandit."""
    pulls: int = 10
    """Of a bandit: one trial."""
    episodes: int = 10
    """Of a tabular task: one trial."""
    easier: float = 0.2
    """Of a tabular task: the noise of its rewards grows to what it is over this share of the iterations."""
    model: Literal["gru", "lstm", "ssm", "diagonal", "fast-weights"] | None = None
    """What remembers. None: a GRU for a bandit, fast weights for a tabular task, which a GRU is slow to learn."""
    width: int = 64
    """Of its state, and of the layers before and after it."""
    iterations: int | None = None
    """None: those of `size`."""
    seed: int = 0
    """Of everything."""
    size: Literal["tiny", "default"] = "default"
    """tiny runs in seconds, for tests."""
    out: Path = Path("output")
    """Folder for the plot, the figures and the checkpoints."""
    save_every: int = 25
    """Iterations from checkpoint to checkpoint."""
    resume: bool = False
    """Go on from the last checkpoint in `out`, of a run with the same arguments."""
    stop_after: int | None = None
    """End after that many iterations, as if killed."""
    tensorboard: bool = False
    """Write the curves for TensorBoard to `out` as well."""


class FastWeights(nn.Module):
    """A memory of what followed what: M_t = M_{t-1} + k_t v_tᵀ, y_t = log(1 ± q_tᵀ M_t), for each of some heads.

        k_t = softmax(W_k x_{t-1}),   v_t = W_v x_t,   q_t = softmax(W_q x_t)

    Under a key of what was seen at the step before, it adds what came of it, and asks with what is seen now: so it can
    count, and add up rewards, for each state and action. It is linear attention (Schmidhuber 1992; Katharopoulos et al.
    2020, https://arxiv.org/abs/2006.16236) whose keys are one step late. The logarithm is of magnitudes, with the sign
    kept. A sequence is computed at once, in O(T²).

    Args:
        state_dim: slots of a head.
        input_dim: features of x_t.
        output_dim: features of y_t, a multiple of `heads`.
    """

    def __init__(self, state_dim, input_dim, output_dim, heads=2):
        super().__init__()
        self.heads = heads
        self.key, self.query = nn.Linear(input_dim, heads * state_dim), nn.Linear(input_dim, heads * state_dim)
        self.value = nn.Linear(input_dim, output_dim)

    def init_hidden(self, batch_size=1):
        """M (B, heads, slots, values), and the key (B, heads, 1, slots) of the step before."""
        slots, values = len(self.key.bias) // self.heads, len(self.value.bias) // self.heads
        empty = self.value.weight.new_zeros
        return empty(batch_size, self.heads, slots, values), empty(batch_size, self.heads, 1, slots)

    def forward(self, x, hidden_state=None, reset=None):
        if x.dim() == 2:
            y, hidden_state = self(x[:, None], hidden_state, None if reset is None else reset[:, None])
            return y[:, 0], hidden_state
        memory, before = self.init_hidden(len(x)) if hidden_state is None else hidden_state
        reset = torch.zeros(x.shape[:2], dtype=torch.bool) if reset is None else reset
        layers = (self.key, self.query, self.value)
        k, q, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)  # (B, heads, T, ...)
        k, q = torch.cat([before, k.softmax(-1)], 2), q.softmax(-1)
        k, before = k[:, :, :-1].masked_fill(reset[:, None, :, None], 0), k[:, :, -1:]
        trial = reset.long().cumsum(1)  # 0: that of the memory
        same = (trial[:, :, None] == trial[:, None, :]).tril()[:, None]
        kept, last = (trial == 0)[:, None, :, None], (trial == trial[:, -1:])[:, None, :, None]
        y = (q @ k.mT).masked_fill(~same, 0) @ v + (q @ memory).masked_fill(~kept, 0)
        memory = memory.masked_fill(~kept[:, :, -1:], 0) + k.mT @ v.masked_fill(~last, 0)
        y = y.transpose(1, 2).flatten(2)
        return y.sign() * y.abs().log1p(), (memory, before)


MODELS = {"gru": GRU, "lstm": LSTM, "ssm": StateSpaceModel, "diagonal": DiagonalSSM, "fast-weights": FastWeights}


class Memory(nn.Module):
    """A model that remembers between two layers: y_t = MLP(h_t, e_t), h_t = model(h_{t-1}, e_t), e_t = relu(W x_t).

    What an input says about the task, and what of that a decision needs, depends on the state and action it is about:
    neither is linear.
    """

    def __init__(self, kind, input_dim, output_dim, width, steps):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(input_dim, width), nn.ReLU())
        self.model = kind(width, width, width)
        self.readout = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, output_dim))
        if kind is GRU:
            # Biases such that units forget after 1 to T steps: Tallec and Ollivier 2018, https://arxiv.org/abs/1804.11188
            with torch.no_grad():
                self.model.rnn.bias_ih_l0.chunk(3)[1].add_((1 + (steps - 2) * torch.rand(width)).log())

    def init_hidden(self, batch_size=1):
        return self.model.init_hidden(batch_size)

    def forward(self, x, hidden_state=None, reset=None):
        e = self.embed(x)
        h, hidden_state = self.model(e, hidden_state, reset)
        return self.readout(torch.cat([h, e], -1)), hidden_state


def family_of(arguments, noise=1.0):
    """The task family, and the episodes of a trial."""
    if arguments.task == "bandit":
        return task_family("bandit", arms=arguments.arms, pulls=arguments.pulls), 1
    return task_family("tabular-mdp", noise=noise), arguments.episodes


def actor(policy, noise):
    """What `rollout` asks for actions: those that the noise draws, without it the most probable ones."""

    def act(x, state, reset):
        hidden, count = (policy.init_hidden(len(x)), torch.zeros(len(x), dtype=torch.int64)) if state is None else state
        output, hidden = policy(x, hidden, reset)
        chosen = output.distribution
        action = chosen.mode() if noise is None else chosen.sample(noise(count).to(x.dtype))
        return action, (hidden, count + 1)

    return act


def trials(policy, family, tasks, episodes, seed, *, sampled=True):
    """A trial on every task: what the policy saw (B, T, D), and the trajectory."""
    # With SAME_STEP every step is valid, so that trials are rows of equal length.
    environment = Environment(family, tasks=tasks, autoreset_mode="SameStep")
    noise = gumbel_noise(seed, environment.single_action_space.n) if sampled else None
    trajectory, _ = rollout(
        actor(policy, noise),
        environment,
        episodes * family.horizon,
        seed=seed,
        previous=True,
        episodes_per_trial=episodes,
    )
    return policy_inputs(trajectory, environment.single_observation_space, environment.single_action_space), trajectory


def train(arguments, size, policy, folder):
    """Train the policy; the mean return of a trial at every iteration, the seconds, and whether it came to the end."""
    learning, (family, episodes) = LEARNING[arguments.task], family_of(arguments)
    steps, iterations = episodes * family.horizon, arguments.iterations or size.iterations
    rows = max(size.steps // steps, MINIBATCHES)
    optimizer = torch.optim.Adam(policy.parameters(), eps=1e-5)
    ppo = PPO(policy, optimizer, epochs=EPOCHS, minibatches=MINIBATCHES)
    start, curve, seconds = 0, [], 0.0
    found = load_checkpoint(folder) if arguments.resume else None
    if found is not None:
        for damaged in found.skipped:
            print(damaged)
        start, curve, seconds = found.step, found.state["curve"], found.state["seconds"]
        ppo.load_state_dict(found.state["ppo"])
    writer = tensorboard_writer(arguments.out) if arguments.tensorboard else None
    ends = torch.zeros(rows, steps, dtype=torch.bool)
    ends[:, -1] = True
    stop = iterations if arguments.stop_after is None else min(iterations, arguments.stop_after)
    began = time.time() - seconds
    progress = tqdm(total=iterations, initial=start, desc="iterations", file=sys.stdout, mininterval=0.5)
    with progress as bar, StopSignal() as signal:
        for iteration in range(start, stop):
            seed, done = derive_seed(arguments.seed, iteration), iteration / iterations
            optimizer.param_groups[0]["lr"] = learning.lr * (1 - done)
            first, last = learning.gamma
            gamma = first + (last - first) * min(1.0, 2 * done)
            family, _ = family_of(arguments, min(1.0, done / arguments.easier) if arguments.easier else 1.0)
            x, seen = trials(policy, family, family.sample(rows, seed=seed), episodes, seed)
            # Without what a blind policy gets, and such that the returns of trials are of order 1.
            reward = (seen.reward - family.task_blind_return / family.horizon) / math.sqrt(steps)
            batch = actor_critic_batch(
                policy, x, seen.action, reward, seen.reset, ends, torch.zeros_like(ends), gamma=gamma, lam=learning.lam
            )
            generator = torch.Generator().manual_seed(seed)
            update = ppo.update(batch, generator, entropy_weight=learning.entropy * (1 - done))
            curve.append(float(seen.reward.sum(1).mean()))
            if writer is not None:
                writer.add_scalar("return of a trial", curve[-1], iteration)
                for name, value in update._asdict().items():
                    writer.add_scalar(name, value, iteration)
            if signal or (iteration + 1) % arguments.save_every == 0 or iteration + 1 == iterations:
                state = {"ppo": ppo.state_dict(), "curve": curve, "seconds": time.time() - began}
                save_checkpoint(folder, iteration + 1, state)
                signal.exit_if_asked()
            shown = {"return": f"{curve[-1]:.2f}", "KL": f"{update.divergence:.4f}", "H": f"{update.entropy:.2f}"}
            bar.set_postfix(shown)
            bar.update()
    if writer is not None:
        writer.close()
    return curve, time.time() - began, stop == iterations


def tensorboard_writer(path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise SystemExit(f"--tensorboard needs the package `tensorboard` (pip install tensorboard): {error}") from None
    return SummaryWriter(path)


def test(arguments, size, policy):
    """Rewards (N, T) on tasks that were not trained on: of the policy, of its most probable actions, of controls."""
    family, episodes = family_of(arguments)
    tasks = family.sample(size.test_tasks, seed=arguments.seed, split="test")
    rewards = {}
    for name, sampled in (("RL²", True), ("RL², most probable actions", False)):
        seed = derive_seed(arguments.seed, 0, 7)
        _, seen = trials(policy, family, tasks, episodes, seed, sampled=sampled)
        rewards[name] = seen.reward.double().numpy()
    if arguments.task == "bandit":
        p = np.array([task["probabilities"] for task in tasks])
        for name, choose in (("random", random_arm), ("Thompson", thompson), ("UCB1", ucb1)):
            rewards[name] = play_bandits(p, arguments.pulls, choose, np.random.default_rng(arguments.seed))
        return rewards, arguments.pulls * float(p.max(1).mean())
    means = np.array([task["means"] for task in tasks])
    transitions = np.array([task["transitions"] for task in tasks])
    for name, plan in (("random", None), ("PSRL", posterior_sample)):
        generator = np.random.default_rng(arguments.seed)
        rewards[name] = play_processes(means, transitions, episodes, family.horizon, plan, generator)
    best = [optimal_return(m, t, family.horizon) for m, t in zip(means, transitions, strict=True)]
    return rewards, episodes * float(np.mean(best))


# Controls. Each knows how tasks are drawn, and none has learned anything. Letters: N tasks, K arms, S states.


def random_arm(wins, losses, generator):
    return generator.integers(wins.shape[1], size=len(wins))


def thompson(wins, losses, generator):
    """The best arm of a draw from the posterior (Thompson 1933); Beta(1, 1) is what the arms are drawn from."""
    return generator.beta(wins + 1, losses + 1).argmax(1)


def ucb1(wins, losses, generator, factor=0.2):
    """Auer et al. 2002, with the prior as two pulls, and its bonus times a factor that suits these tasks, as in RL²."""
    pulled = wins + losses + 2
    bonus = np.sqrt(2 * np.log(pulled.sum(1, keepdims=True)) / pulled)
    return ((wins + 1) / pulled + factor * bonus).argmax(1)


def play_bandits(p, pulls, choose, generator):
    """Rewards (N, T) of a rule (wins (N, K), losses (N, K), generator) -> arms (N,)."""
    rows, wins, losses, rewards = np.arange(len(p)), np.zeros_like(p), np.zeros_like(p), np.zeros((len(p), pulls))
    for t in range(pulls):
        arm = choose(wins, losses, generator)
        rewards[:, t] = generator.uniform(size=len(p)) < p[rows, arm]
        wins[rows, arm] += rewards[:, t]
        losses[rows, arm] += 1 - rewards[:, t]
    return rewards


def posterior_sample(total, count, seen, generator):
    """Means (N, S, A) and transitions (N, S, A, S) drawn from the posterior: PSRL (Strens 2000; Osband et al. 2013)."""
    # N(1, 1) before rewards with deviation 1, and Dirichlet(1, ..., 1) before transitions, are what tasks are drawn by.
    means = (1 + total) / (1 + count) + generator.standard_normal(total.shape) / np.sqrt(1 + count)
    weights = generator.standard_gamma(1 + seen)
    return means, weights / weights.sum(-1, keepdims=True)


def play_processes(means, transitions, episodes, horizon, plan, generator):
    """Rewards (N, T) of acting by the best policy of what `plan` draws before every episode; None: at random."""
    num_tasks, _, num_actions = means.shape
    rows, below = np.arange(num_tasks), transitions.cumsum(-1)[..., :-1]
    total, count, seen = np.zeros_like(means), np.zeros_like(means), np.zeros_like(transitions)
    rewards = []
    for _ in range(episodes):
        policy = None if plan is None else best_actions(*plan(total, count, seen, generator), horizon)
        state = np.zeros(num_tasks, np.int64)
        for t in range(horizon):
            action = generator.integers(num_actions, size=num_tasks) if policy is None else policy[t][rows, state]
            reward = means[rows, state, action] + generator.standard_normal(num_tasks)
            after = (generator.uniform(size=(num_tasks, 1)) >= below[rows, state, action]).sum(1)
            total[rows, state, action] += reward
            count[rows, state, action] += 1
            seen[rows, state, action, after] += 1
            rewards.append(reward)
            state = after
    return np.stack(rewards, 1)


def best_actions(means, transitions, horizon):
    """For every step the best action (N, S) of a process that is known."""
    value, policy = np.zeros(means.shape[:2]), []
    for _ in range(horizon):
        gain = means + np.einsum("nsaz,nz->nsa", transitions, value)
        policy.append(gain.argmax(-1))
        value = gain.max(-1)
    return policy[::-1]


def per_unit(arguments, reward):
    """The mean reward of every pull, or the mean return of every episode."""
    mean = reward.mean(0)
    return mean if arguments.task == "bandit" else mean.reshape(arguments.episodes, -1).sum(1)


def plot(arguments, curve, rewards, oracle, published, path):
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    axes[0].plot(curve, color="C0", label="RL², training tasks")
    lines = {"random": rewards["random"].sum(1).mean(), "oracle": oracle}
    for n, (name, value) in enumerate({**lines, **{f"{k}, published": v for k, v in published.items()}}.items()):
        axes[0].axhline(value, color="0.3" if name in lines else f"C{n}", lw=0.8, ls="--", label=f"{name} {value:.1f}")
    axes[0].set(xlabel="iteration", ylabel="mean return of a trial")
    axes[0].legend(fontsize=6)
    for name, reward in rewards.items():
        mean = per_unit(arguments, reward)
        axes[1].plot(range(1, len(mean) + 1), mean, label=name, lw=2 if name == "RL²" else 1)
    unit = ("pull", "reward") if arguments.task == "bandit" else ("episode", "return")
    axes[1].axhline(oracle / len(mean), color="0.3", lw=0.8, ls="--", label="oracle")
    axes[1].set(xlabel=f"{unit[0]} of the trial", ylabel=f"mean {unit[1]}", title="test tasks")
    axes[1].legend(fontsize=6)
    fig.tight_layout()
    fig.savefig(path, dpi=110)


def main(arguments: Arguments) -> None:
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # the products of one step are too small for more
    size, (family, episodes) = SIZES[arguments.task][arguments.size], family_of(arguments)
    with Environment(family, tasks=family.sample(1, seed=0)) as one:
        num_states, num_actions = int(one.single_observation_space.n), int(one.single_action_space.n)
    kind, steps = MODELS[arguments.model or LEARNING[arguments.task].model], episodes * family.horizon
    model = Memory(kind, num_states + num_actions + 2, num_actions + 1, arguments.width, steps)
    policy = PolicyModel(model, CategoricalHead(num_actions), has_value=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    curve, seconds, finished = train(arguments, size, policy, arguments.out / "checkpoints")
    if not finished:
        print(f"stopped after {len(curve)} iterations; --resume goes on")
        return
    rewards, oracle = test(arguments, size, policy)
    of_trial = (arguments.arms, arguments.pulls) if arguments.task == "bandit" else (arguments.episodes,)
    published = PUBLISHED.get((arguments.task, *of_trial), {})
    plot(arguments, curve, rewards, oracle, published, arguments.out / "rl2_bandit.png")
    totals = {name: reward.sum(1) for name, reward in rewards.items()}
    figures = {
        "mean return of a trial on test tasks": {**{k: v.mean() for k, v in totals.items()}, "oracle": oracle},
        "standard error": {k: v.std() / math.sqrt(len(v)) for k, v in totals.items()},
        "published": published,
        "in a trial": {name: per_unit(arguments, reward).tolist() for name, reward in rewards.items()},
        "curve": curve,
        "seconds of training": seconds,
        "arguments": {**asdict(arguments), "out": str(arguments.out)},
    }
    (arguments.out / "rl2_bandit.json").write_text(json.dumps(figures, indent=1))
    for name, value in figures["mean return of a trial on test tasks"].items():
        print(f"{name:28s} {value:8.2f}")
    print(f"{seconds:.0f} s of training")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
