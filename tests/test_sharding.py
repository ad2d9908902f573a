"""Tasks that are shared among ranks: two processes learn what one does."""

from __future__ import annotations

import datetime
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchopt
from torch import nn
from torch.func import vmap

from ssmrl import AdaptationConfig, MetaMAML, StateSpaceModel, StreamAdapter
from ssmrl.adaptation import Guard, Window, learning_rates, mse_loss, reset_on_rise, scale_by_learning_rates
from ssmrl.adaptation.tree import tree_leaves
from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from ssmrl.core import GRU
from ssmrl.meta_rl import (
    PPO,
    CategoricalHead,
    GaussianHead,
    GradientOuter,
    MetaLearner,
    NonFinite,
    PolicyBatch,
    PolicyMAML,
    PolicyModel,
    TrustRegionOuter,
    actor_critic_batch,
    post_adaptation_loss,
)
from ssmrl.sharding import Rows, Shards
from ssmrl.stop import StopSignal

WORLD = 2
LR = 0.5  # of gradient descent: weights say what the meta-gradient was


def tasks_of(number, seed=0, steps=6):
    x = torch.randn(2, number, 2, steps, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x[0], x[0, ..., :2].sin(), x[1], x[1, ..., :2].sin()


def model_of(rank=0):
    torch.manual_seed(rank)  # another one on every rank: that of the first is taken
    return StateSpaceModel(3, 3, 2, hidden_dim=4).double()


def trained(maml, batches, *state):
    losses = [maml.meta_update(batch, *state) for batch in batches]
    return {"losses": losses, **{name: p.detach() for name, p in maml.model.named_parameters()}}


def stacked(number, **options):
    def run(group, rank):
        model = model_of(rank)
        maml = MetaMAML(
            model,
            0.1,
            inner_steps=2,
            outer_optimizer=torch.optim.SGD(model.parameters(), LR),
            process_group=group,
            **options,
        )
        return trained(maml, [tasks_of(number, seed) for seed in range(2)])

    return run


def ragged_with_learned_state_and_rates(group, rank):
    model = model_of(rank)
    rates = learning_rates(dict(model.named_parameters()), 0.1)
    state = torch.zeros(7 * 2, 3, dtype=torch.float64, requires_grad=True)  # one for each of 7 tasks
    outer = torch.optim.SGD([*model.parameters(), *rates.values(), state], LR)
    maml = MetaMAML(
        model,
        inner_optimizer=torchopt.chain(scale_by_learning_rates(rates)),
        outer_optimizer=outer,
        process_group=group,
    )
    tasks = [tuple(t[0] for t in tasks_of(1, n, steps=3 + n % 3)) for n in range(7)]
    return (
        trained(maml, [tasks], state) | {"state": state.detach()} | {f"rate {n}": r.detach() for n, r in rates.items()}
    )


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(3, 2)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.used(x)


def a_parameter_without_a_gradient(group, rank):
    torch.manual_seed(rank)
    model = Unused().double()
    outer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5)
    return trained(MetaMAML(model, 0.1, outer_optimizer=outer, process_group=group), [tasks_of(3), tasks_of(1)])


def line(params, x, y):
    return mse_loss(x @ params["w"], y)


def any_loss(group, rank):
    w = nn.Parameter(torch.full((3, 2), 1.0 + rank, dtype=torch.float64))

    def loss(meta, task):
        return post_adaptation_loss(line, meta, task[:2], task[2:], optimizer=torchopt.sgd(0.1), num_steps=2)

    outer = torch.optim.SGD([w], LR)
    learner = MetaLearner(loss, {"w": w}, outer_optimizer=outer, chunk_size=2, max_grad_norm=0.1, process_group=group)
    return {"losses": [learner.update(tasks_of(5, seed)) for seed in range(2)], "w": w.detach()}


def what_is_not_finite(group, rank):
    """In the last task, which is the last rank's."""
    broken = tuple(t.clone() for t in tasks_of(4))
    broken[3][-1] *= 1e200
    model = model_of(rank)
    maml = MetaMAML(model, 0.1, process_group=group, nonfinite=NonFinite("skip", at_most=1))
    found = trained(maml, [broken, tasks_of(4)])
    try:
        maml.meta_update(broken)
    except FloatingPointError as error:
        return found | {"left out": maml.left_out, "error": str(error)}
    raise AssertionError("it must be an error")


class Shift(nn.Module):
    """A buffer with gaps in its memory, and a parameter that is not learned: both others on every rank."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.randn(4)[::2])
        self.scale = nn.Parameter(torch.randn(2), requires_grad=False)

    def forward(self, x):
        return x * self.scale + self.shift


def a_policy_with_tasks_of_its_own(kind):
    """Of five tasks the first rank collects with three."""

    def run(group, rank):
        torch.manual_seed(rank)
        model = nn.Sequential(Shift(), nn.Linear(2, 1))
        policy = PolicyModel(model, GaussianHead(1, log_std=-0.5)).double()
        params = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        rates = learning_rates(params, 0.1)
        maml = PolicyMAML(policy, torchopt.chain(scale_by_learning_rates(rates)))
        outer_optimizer = torch.optim.SGD([*params.values(), *rates.values()], LR)
        settings: dict[str, Any] = {"exploration_weight": 0.3, "process_group": group}
        outer: Any
        if kind == "gradient":
            outer = GradientOuter(
                maml, outer_optimizer=outer_optimizer, num_steps=2, divergence_weight=0.01, **settings
            )
        else:
            outer = TrustRegionOuter(maml, curvature_share=0.5, max_divergence=0.02, **settings)
        mine = slice(0, 5) if group is None else slice(0, 3) if rank == 0 else slice(3, 5)

        def of_task(params, x, noise, reset, goal):
            batch = PolicyBatch(x, None, reset, ~reset | reset, None, ())  # type: ignore[arg-type]
            old = maml.losses.distribution(params, batch)
            action = old.sample(noise)
            reward = -(action[..., 0] - goal).square()
            return batch._replace(action=action, advantage=reward - reward.mean(), old=old), reward.mean()

        def collect(params, k):
            generator = torch.Generator().manual_seed(k)
            x, noise = (torch.randn(5, 6, 4, size, dtype=torch.float64, generator=generator)[mine] for size in (2, 1))
            reset = torch.zeros(x.shape[:3], dtype=torch.bool)
            reset[..., 0] = True
            with torch.no_grad():
                return vmap(of_task)(params, x, noise, reset, torch.linspace(-1, 1, 5, dtype=torch.float64)[mine])

        losses: list[float] = []
        for _ in range(2):
            done = outer.step(maml.collect(collect, mine.stop - mine.start))
            losses += done if kind == "gradient" else [float(done.loss), float(done.loss_after), done.fraction]
        return {"losses": losses, "rates": torch.stack([r.detach() for r in rates.values()])} | {
            n: p.detach() for n, p in params.items()
        }

    return run


def a_policy_with_memory_and_rows_of_its_own(group, rank, minibatches=1, max_divergence=None):
    """Of five rows the first rank has three; one that is not finite is the other's."""
    torch.manual_seed(rank)
    policy = PolicyModel(GRU(4, 3, 4), CategoricalHead(3), has_value=True).double()
    optimizer = torch.optim.SGD(policy.parameters(), LR)
    ppo = PPO(
        policy,
        optimizer,
        minibatches=minibatches,
        max_divergence=max_divergence,
        nonfinite=NonFinite("skip"),
        process_group=group,
    )
    mine = slice(0, 5) if group is None else slice(0, 3) if rank == 0 else slice(3, 5)
    found = []
    for n in range(3):
        generator = torch.Generator().manual_seed(n)
        x, reward = (torch.randn(5, 6, size, dtype=torch.float64, generator=generator) for size in (3, 1))
        action = torch.randint(3, (5, 6), generator=generator)
        reset, valid = torch.zeros(2, 5, 6, dtype=torch.bool)
        reset[:, 0], valid[:, :], valid[4, 3:] = True, True, False
        ends = torch.zeros_like(reset)
        ends[:, -1] = ends[4, 2] = True
        if n == 1:
            x[-1, 0] = math.nan
        rows = [part[mine] for part in (x, action, reward[..., 0], reset, ends, torch.zeros_like(ends), valid)]
        batch = actor_critic_batch(policy, *rows, process_group=group)
        done = ppo.update(batch, torch.Generator().manual_seed(n), entropy_weight=0.01)
        found += [value for value in done if value is not None]
    assert ppo.left_out == 1
    return {"found": found} | {name: p.detach() for name, p in policy.named_parameters()}


LIVE = AdaptationConfig(
    num_steps=2,
    optimizer=torchopt.adam(0.05),
    average=0.5,
    window=Window(4, minimum=2),
    reset=reset_on_rise(1.5),
    guard=Guard(allowance=1.0),
)


def live(adapter, seed, steps=6):
    """What a loop of so many steps sees of every stream."""
    generator = torch.Generator().manual_seed(seed)
    state, seen = None, []
    for _ in range(steps):
        x = torch.randn(adapter.num_streams, 3, dtype=torch.float64, generator=generator)
        reset = torch.rand(adapter.num_streams, generator=generator) < 0.2
        y = 2 * x[:, :2].sin()
        y[1] /= x[1, 0] > -1  # not finite now and then
        output, after = adapter(x, state, reset)
        seen += [output, *tree_leaves(after), *adapter.update(x, y, state, reset=reset)]
        state = after
    return seen


WAITING = AdaptationConfig(num_steps=2, optimizer=torchopt.adam(0.05), from_anchor=True, every=2)


def streams(group, rank, found=None, config=LIVE):
    """Live streams that come and go; with what another run found, it goes on from there."""
    adapter = StreamAdapter(model_of(rank), config, num_streams=5, process_group=group)
    before, seen = None, []
    if found is not None:
        adapter.load_state_dict(found)
    else:
        assert adapter.counts is None
        seen = [*adapter.in_use()[0].values(), *live(adapter, 0)]
        before = adapter.snapshot()
        for masked in (adapter.reset, adapter.drop):
            masked(torch.tensor([True, False, False, True, False]))
            seen += live(adapter, 1)
        assert adapter.add(5).tolist() == [0, 3, 5, 6, 7]
        assert adapter.add().tolist() == [8]  # of two ranks one gets none
        adapter.reset(torch.tensor([False] * 5 + [True] * 4))
        seen += live(adapter, 2)
        found = adapter.state_dict()
    seen += [*live(adapter, 3), *(adapter.counts or ()), adapter.active]
    seen += [*adapter.in_use()[0].values(), *adapter.params(0).values(), *adapter.params(5).values()]
    if before is not None:
        adapter.restore(before)
        seen += live(adapter, 1)
    return seen, found


def seen_of_streams(config):
    return lambda group, rank: {f"{n}": leaf for n, leaf in enumerate(streams(group, rank, config=config)[0])}


def a_signal_to_one(group, rank):
    """The last rank hears it in the third update; all stop after that, with the same code."""
    updates = 0
    try:
        with StopSignal(group) as stop:
            while updates < 9:
                updates += 1
                if updates == 3 and (group is None or rank == WORLD - 1):
                    signal.raise_signal(signal.SIGTERM)
                if stop:
                    stop.exit_if_asked()
    except SystemExit as exit:
        return {"updates": updates, "code": exit.code}
    raise AssertionError("it must have stopped")


def a_signal_that_ends_a_loop(group, rank):
    """The handlers that were there before get it afterwards, on all ranks."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with StopSignal(group) as stop:
            if group is None or rank == WORLD - 1:
                signal.raise_signal(signal.SIGTERM)
            assert stop
            assert not heard
    finally:
        signal.signal(signal.SIGTERM, before)
    return {"heard": heard}


SCENARIOS = {
    "even": stacked(8),
    "uneven": stacked(5),
    "fewer tasks than ranks": stacked(1),
    "traced": stacked(5, compile="trace"),
    "in chunks": stacked(7, chunk_size=2),
    "first order": stacked(3, first_order=True),
    "ragged": ragged_with_learned_state_and_rates,
    "a parameter without a gradient": a_parameter_without_a_gradient,
    "any loss": any_loss,
    "a policy": a_policy_with_tasks_of_its_own("gradient"),
    "a policy in a trust region": a_policy_with_tasks_of_its_own("trust region"),
    "a policy with memory": a_policy_with_memory_and_rows_of_its_own,
    "streams": seen_of_streams(LIVE),
    "streams that wait, not all at once": seen_of_streams(WAITING),
    "a signal": a_signal_to_one,
    "a signal, and a loop that ends": a_signal_that_ends_a_loop,
    "not finite": what_is_not_finite,
}


def reductions(group, rank):
    """Sums in many buckets, of two dtypes."""
    params = [
        nn.Parameter(torch.zeros(n, dtype=d))
        for n, d in ((3, torch.float64), (5, torch.float32), (0, torch.float64), (4, torch.float64))
    ]
    for n, p in enumerate(params[:3]):
        p.grad = torch.full_like(p, float(n + 1 + rank))
    losses = torch.arange(4.0, dtype=torch.float64) * (rank + 1)
    Shards(group, bucket_bytes=30).sum(params, losses)
    return {"losses": losses, "gradients": [None if p.grad is None else p.grad for p in params]}


def rows(group, rank):
    """Of several dtypes, with a negative zero, a NaN, and leaves without elements."""
    generator = torch.Generator().manual_seed(0)
    tree = [
        torch.tensor([-0.0, 0.0, math.nan, math.inf, 1.0], dtype=torch.float64),
        torch.randn(5, 2, 3, generator=generator),
        torch.arange(5),
        torch.tensor([True, False, True, True, False]),
        torch.zeros(5, 0),
        torch.randn(1, 5, generator=generator).T,
    ]
    dealt = Rows(group)
    mine = dealt.mine(tree)
    return [tree, mine, dealt.whole(mine, 5)]


def no_tasks(group, rank):
    learner = MetaLearner(lambda w, x: (w * x).sum(), nn.Parameter(torch.ones(2)), process_group=group, own_tasks=True)
    try:
        learner.update(torch.ones(3 if rank == 0 else 0, 2))
    except ValueError as error:
        return str(error)
    raise AssertionError("it must be an error")


def too_few(group):
    try:
        StreamAdapter(model_of(), num_streams=1, process_group=group)
    except ValueError as error:
        return str(error)
    raise AssertionError("it must be an error")


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """What every rank found in every scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "error", __file__, str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(outputs)
    found = [load_checkpoint(folder / f"of rank {rank}") for rank in range(WORLD)]
    return [checkpoint.state for checkpoint in found if checkpoint is not None]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_learn_what_one_does(of_ranks, name):
    expected = SCENARIOS[name](None, 0)
    for found in of_ranks:
        assert found[name].keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, str):
                assert found[name][key] == value
            else:
                torch.testing.assert_close(
                    torch.as_tensor(found[name][key]), torch.as_tensor(value), rtol=1e-12, atol=1e-12, equal_nan=True
                )
    assert all(  # bit for bit, or ranks drift apart
        torch.equal(torch.as_tensor(a).nan_to_num(), torch.as_tensor(b).nan_to_num())
        for a, b in zip(of_ranks[0][name].values(), of_ranks[1][name].values(), strict=True)
        if not isinstance(a, str)
    )


def test_what_is_not_finite_is_so_on_every_rank(of_ranks):
    for found in of_ranks:
        assert math.isnan(found["not finite"]["losses"][0])
        assert math.isfinite(found["not finite"]["losses"][1])
        assert found["not finite"]["left out"] == 2
        assert "not finite for tasks [3]" in found["not finite"]["error"]


def test_sums_in_buckets(of_ranks):
    for found in of_ranks:
        reduced = found["reductions"]
        assert reduced["losses"].tolist() == [0.0, 3.0, 6.0, 9.0]
        first, second, empty, none = reduced["gradients"]
        assert first.tolist() == [3.0] * 3
        assert second.tolist() == [5.0] * 5
        assert empty.numel() == 0
        assert none is None


def test_any_number_of_ranks_goes_on_with_the_streams_of_two(of_ranks):
    for found in of_ranks:
        assert found["state of streams"]["streams"]["leaves"][0].shape[0] == 9
        alone, expected = streams(None, 0, found["state of streams"])[0], found["goes on"]
        assert len(alone) == len(expected)
        for a, b in zip(alone, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_rows_are_dealt_in_turn_and_come_back_bit_for_bit(of_ranks):
    for rank, found in enumerate(of_ranks):
        tree, mine, whole = found["rows"]
        for leaf, part, again in zip(tree, mine, whole, strict=True):
            assert leaf.dtype == again.dtype
            assert leaf.numpy().tobytes() == again.numpy().tobytes()
            assert leaf[rank::WORLD].numpy().tobytes() == part.numpy().tobytes()


def test_minibatches_of_every_rank_are_one_and_end_together(of_ranks):
    """The permutations of rows are others than those of one process, so that ranks are compared alone."""
    first, second = (found["minibatches"] for found in of_ranks)
    assert first.keys() == second.keys()
    for a, b in zip(first.values(), second.values(), strict=True):
        assert torch.equal(torch.as_tensor(a).nan_to_num(), torch.as_tensor(b).nan_to_num())
    steps = first["found"][8::9]
    assert steps[1] == 0
    assert 0 < steps[0] < 8  # it ended before its 4 epochs of 2


def test_a_rank_without_tasks_is_an_error_on_all(of_ranks):
    for rank, found in enumerate(of_ranks):
        expected = (
            "must be a pytree of tensors" if rank == 1 else "Every rank must have at least one task; they have [3, 0]."
        )
        assert expected in found["no tasks"]


def test_fewer_streams_than_ranks_are_refused(of_ranks):
    for found in of_ranks:
        assert found["too few"] == "num_streams must be at least the number of ranks, 2; got 1."


def test_shares_cover_all_tasks_and_differ_by_one_at_most():
    shards = Shards()
    assert shards.share(7) == slice(0, 7)
    for size in (1, 2, 3, 8):
        for number in (0, 1, 5, 8, 17):
            shards.size = size
            parts = []
            for rank in range(size):
                shards.rank = rank
                parts.append(range(number)[shards.share(number)])
            assert [n for part in parts for n in part] == list(range(number))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_is_no_group_is_refused():
    others: list[Any] = ["nccl", -100]
    for group in others:
        with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup"):
            MetaMAML(model_of(), process_group=group)


ELASTIC = """
import datetime, os, signal, sys
import torch
import torch.distributed as dist
from ssmrl import MetaMAML, StateSpaceModel
from ssmrl.checkpoint import load_checkpoint, save_checkpoint

folder, killed = sys.argv[1], sys.argv[2] == "killed"
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=10))  # whoever waits for the dead gives up then
torch.manual_seed(0)
maml = MetaMAML(StateSpaceModel(3, 3, 2, hidden_dim=4), 0.1, process_group=dist.group.WORLD)
generator, curve = torch.Generator().manual_seed(0), []
found = load_checkpoint(folder)
if found is not None:
    curve = found.state["curve"]
    maml.load_state_dict(found.state["maml"])
    generator.set_state(found.state["generator"])
for update in range(len(curve), 12):
    if killed and update == 8 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    x = torch.randn(5, 2, 6, 3, generator=generator)
    curve.append(maml.meta_update((x, x[..., :2], x, x[..., :2])))
    if dist.get_rank() == 0 and (update + 1) % 3 == 0:
        state = {"maml": maml.state_dict(), "generator": generator.get_state(), "curve": curve}
        save_checkpoint(folder, update + 1, state)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_rank_that_is_killed_comes_back_and_the_curve_goes_on(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(ELASTIC)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    ends = {}  # more than one restart: gloo does not always find its peers at the first attempt after a kill
    for how in ("whole", "killed"):
        command = [*launch, "--max-restarts", "9", str(script), str(tmp_path / how), how]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
        assert ("exitcode: -9" in done.stderr) == (how == "killed")
        ends[how] = load_checkpoint(tmp_path / how)
    whole, killed = ends["whole"], ends["killed"]
    assert whole is not None
    assert killed is not None
    assert killed.step == 12
    assert killed.state["curve"] == whole.state["curve"]
    for name, p in whole.state["maml"]["model"].items():
        assert torch.equal(killed.state["maml"]["model"][name], p)


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    minute = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD, timeout=minute
    )
    results: dict[str, Any] = {name: run(dist.group.WORLD, rank) for name, run in SCENARIOS.items()}
    results["state of streams"] = streams(dist.group.WORLD, rank)[1]
    results["goes on"] = streams(dist.group.WORLD, rank, results["state of streams"])[0]
    results["rows"], results["too few"] = rows(dist.group.WORLD, rank), too_few(dist.group.WORLD)
    results["minibatches"] = a_policy_with_memory_and_rows_of_its_own(dist.group.WORLD, rank, 2, 0.02)
    results["no tasks"] = no_tasks(dist.group.WORLD, rank)
    results["reductions"] = reductions(dist.group.WORLD, rank)
    save_checkpoint(folder / f"of rank {rank}", 0, results)
    dist.destroy_process_group()
