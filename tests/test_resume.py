"""Runs that are cut in two: N + N updates in two processes are 2N in one, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchopt
from torch import nn
from torch.func import vmap

from ssmrl import AdaptationConfig, MetaMAML, StateSpaceModel, StreamAdapter
from ssmrl.adaptation import Guard, Window, learning_rates, reset_on_rise, scale_by_learning_rates
from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from ssmrl.core import GRU
from ssmrl.env_runner import (
    Environment,
    PerTaskState,
    RolloutCarry,
    RunningMoments,
    by_task,
    gumbel_noise,
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
    PPO,
    CategoricalHead,
    GaussianHead,
    GradientOuter,
    NonFinite,
    PolicyMAML,
    PolicyModel,
    actor_critic_batch,
    linear_advantages,
)

N = 3


class Supervised:
    """MetaMAML with learned rates, a schedule of the outer rate, and an update that is left out."""

    def __init__(self):
        model = StateSpaceModel(4, 3, 2, hidden_dim=6)
        self.rates = learning_rates(dict(model.named_parameters()), 0.1)
        outer = torch.optim.AdamW([*model.parameters(), *self.rates.values()], 0.01)
        inner = torchopt.chain(scale_by_learning_rates(self.rates))
        self.maml = MetaMAML(
            model,
            inner_optimizer=inner,
            inner_steps=2,
            outer_optimizer=outer,
            nonfinite=NonFinite("roll back", every=2),
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, 2 * N)
        self.generator = torch.Generator().manual_seed(0)

    def update(self, number):
        x = torch.randn(2, 4, 2, 5, 3, generator=self.generator)
        y = x[..., :2].cumsum(-2) * (1e30 if number == N - 1 else 1)  # whose square is not finite
        loss = self.maml.meta_update((x[0], y[0], x[1], y[1]))
        self.schedule.step()
        return [loss]

    def state_dict(self):
        return {
            "maml": self.maml.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state):
        self.maml.load_state_dict(state["maml"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])


class Robots:
    """PolicyMAML with ProMP on directions of HalfCheetah; the cut is amid episodes."""

    TASKS, ROWS = 2, 2

    def __init__(self):
        family = task_family("halfcheetah-dir")
        tasks = [{"direction": d} for d in (-1.0, 1.0) for _ in range(self.ROWS)]
        self.environment = Environment(
            family, tasks=tasks, autoreset_mode="SameStep", out_of_bounds="clip", max_episode_steps=7
        )
        self.moments = init_moments((17,))
        self.policy = PolicyModel(
            nn.Sequential(nn.Linear(17, 8), nn.Tanh(), nn.Linear(8, 6)), GaussianHead(6, log_std=-0.5)
        )
        self.maml = PolicyMAML(self.policy, torchopt.sgd(0.1))
        self.outer = GradientOuter(self.maml, outer_lr=0.01, num_steps=2)
        self.rng = np.random.default_rng(0)
        self.carry: RolloutCarry | None = None

    def collect(self, params, k):
        moments = self.moments
        noise = normal_noise(int(self.rng.integers(2**31)), 6)

        def act(params, x, hidden_state, reset, noise):
            return self.policy.act(params, normalize(moments, x), hidden_state, reset, noise)

        def batch_of(params, trajectory):
            return self.maml.losses.batch(
                params, trajectory, linear_advantages(trajectory), normalize(moments, trajectory.observation)
            )

        flat, self.carry = rollout(
            per_task(act, params, noise=noise),
            self.environment,
            5,
            carry=self.carry,
            seed=None if self.carry is not None else 0,
        )
        trajectory = by_task(flat, self.TASKS)
        self.moments = update_moments(moments, flat.observation, flat.valid)
        return vmap(batch_of)(params, trajectory), trajectory.reward.mean((1, 2))

    def update(self, number):
        collected = self.maml.collect(self.collect, self.TASKS)
        return [*self.outer.step(collected), *collected.returns.flatten().tolist()]

    def state_dict(self):
        assert self.carry is not None
        return {
            "outer": self.outer.state_dict(),
            "environment": self.environment.save(),
            "carry": self.carry._asdict() | {"hidden_state": self.carry.hidden_state._asdict()},
            "moments": self.moments._asdict(),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state):
        self.outer.load_state_dict(state["outer"])
        self.environment.reset(seed=1)
        self.environment.restore(state["environment"])
        self.carry = RolloutCarry(**state["carry"])
        self.carry = self.carry._replace(hidden_state=PerTaskState(**self.carry.hidden_state))
        self.moments = RunningMoments(**state["moments"])
        self.rng.bit_generator.state = state["rng"]


class Memory:
    """RL²: PPO of a recurrent policy on trials of bandits."""

    def __init__(self):
        self.policy = PolicyModel(GRU(8, 1 + 3 + 2, 3 + 1), CategoricalHead(3), has_value=True)
        self.ppo = PPO(self.policy, torch.optim.Adam(self.policy.parameters(), 0.01), epochs=2, minibatches=2)
        self.rng = np.random.default_rng(0)
        self.generator = torch.Generator().manual_seed(0)

    def update(self, number):
        family = task_family("bandit", arms=3, pulls=6)
        seed = int(self.rng.integers(2**31))
        environment = Environment(family, tasks=family.sample(8, seed=seed), autoreset_mode="SameStep")
        noise = gumbel_noise(seed, 3)

        def act(x, state, reset):
            hidden, count = (None, torch.zeros(len(x), dtype=torch.int64)) if state is None else state
            output, hidden = self.policy(x, hidden, reset)
            return output.distribution.sample(noise(count).to(x.dtype)), (hidden, count + 1)

        seen, _ = rollout(act, environment, 6, seed=seed, previous=True)
        x = policy_inputs(seen, environment.single_observation_space, environment.single_action_space)
        ends = torch.zeros_like(seen.reset)
        ends[:, -1] = True
        batch = actor_critic_batch(self.policy, x, seen.action, seen.reward, seen.reset, ends, torch.zeros_like(ends))
        done = self.ppo.update(batch, self.generator, entropy_weight=0.01)
        return [float(seen.reward.mean()), done.loss, done.divergence]

    def state_dict(self):
        return {
            "ppo": self.ppo.state_dict(),
            "rng": self.rng.bit_generator.state,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state):
        self.ppo.load_state_dict(state["ppo"])
        self.rng.bit_generator.state = state["rng"]
        self.generator.set_state(state["generator"])


class Streams:
    """StreamAdapter on live robots of unknown mass, of which one goes and another comes."""

    ROWS = 3

    def __init__(self):
        family = task_family("halfcheetah-mass")
        self.environment = Environment(
            family, tasks=family.sample(self.ROWS, seed=0), autoreset_mode="SameStep", max_episode_steps=5
        )
        model = StateSpaceModel(4, 17 + 6, 17, hidden_dim=6)
        config = AdaptationConfig(
            num_steps=2,
            optimizer=torchopt.adam(0.01),
            average=0.5,
            window=Window(3, minimum=2),
            reset=reset_on_rise(1.05, fast=0.9, slow=0.3),
            guard=Guard(allowance=2.0),
        )
        self.adapter = StreamAdapter(model, config, num_streams=self.ROWS)
        self.generator = torch.Generator().manual_seed(0)
        self.state: Any = None
        self.seen = torch.as_tensor(self.environment.reset(seed=0)[0], dtype=torch.float32)
        self.reset = torch.ones(self.ROWS, dtype=torch.bool)

    def update(self, number):
        action = torch.rand(self.ROWS, 6, generator=self.generator) * 2 - 1
        x = torch.cat([self.seen, action], 1)
        after = self.environment.step(action.numpy())
        y = torch.as_tensor(after[0], dtype=torch.float32) - self.seen
        prediction, state = self.adapter(x, self.state, self.reset)
        report = self.adapter.update(x, y, self.state, reset=self.reset)
        self.seen, self.state = self.seen + y, state
        self.reset = torch.as_tensor(after[2] | after[3])
        if number == N - 1:
            self.adapter.drop(torch.tensor([False, True, False]))
        if number == N:
            self.adapter.add()
        return [float(prediction.sum()), *report.loss.tolist(), *report.outcome.tolist()]

    def state_dict(self):
        return {
            "adapter": self.adapter.state_dict(),
            "model": self.adapter.model.state_dict(),
            "environment": self.environment.save(),
            "generator": self.generator.get_state(),
            "live": [self.seen, self.state, self.reset],
        }

    def load_state_dict(self, state):
        self.adapter.model.load_state_dict(state["model"])
        self.adapter.load_state_dict(state["adapter"])
        self.environment.restore(state["environment"])
        self.generator.set_state(state["generator"])
        self.seen, self.state, self.reset = state["live"]


RUNS = {"supervised": Supervised, "robots": Robots, "memory": Memory, "streams": Streams}


def go_on(folder, until):
    """Every kind of run, from its last checkpoint to so many updates, after which it is saved."""
    for name, kind in RUNS.items():
        found = load_checkpoint(folder / name)
        torch.manual_seed(0 if found is None else 1)  # what was not saved would show
        run: Any = kind()
        curve: list[Any] = []
        if found is not None:
            curve = found.state["curve"]
            run.load_state_dict(found.state["run"])
        while len(curve) < until:
            curve.append(run.update(len(curve)))
        save_checkpoint(folder / name, until, {"run": run.state_dict(), "curve": curve})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs of 2N updates in one process, and of N and N in two."""
    whole, halves = (tmp_path_factory.mktemp(name) for name in ("whole", "halves"))
    for folder, until in ((whole, 2 * N), (halves, N), (halves, 2 * N)):
        command = [sys.executable, "-W", "error", __file__, str(folder), str(until)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    return whole, halves


@pytest.mark.parametrize("name", RUNS)
def test_two_times_n_updates_in_two_processes_are_2n_in_one(folders, name):
    checkpoint = partial(load_checkpoint, step=2 * N)
    found = [checkpoint(folder / name) for folder in folders]
    (first,) = [load_checkpoint(folders[1] / name, step=N)]
    for file in ("tensors.safetensors", "state.json"):  # weights, moments, curves, states of generators: all of it
        one, two = ((c.path / file).read_bytes() for c in found if c is not None)
        assert one == two
    assert first is not None
    curve = first.state["curve"]
    assert len(curve) == N
    whole = found[0]
    assert whole is not None
    assert [repr(v) for v in whole.state["curve"][:N]] == [repr(v) for v in curve]
    assert len({repr(v) for v in whole.state["curve"]}) == 2 * N  # no update is like another
    assert (first.path / "tensors.safetensors").read_bytes() != (whole.path / "tensors.safetensors").read_bytes()


if __name__ == "__main__":
    torch.set_num_threads(1)
    go_on(Path(sys.argv[1]), int(sys.argv[2]))
