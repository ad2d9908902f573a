"""PPO: its loss against one written out step by step, finite differences, masks, what an update leaves, learning."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Normal
from torch.utils._pytree import tree_map

from ssmrl.core import GRU, LSTM, MLP, StateSpaceModel, functional_forward
from ssmrl.meta_rl import Categorical, CategoricalHead, Gaussian, GaussianHead, NonFinite, PolicyModel
from ssmrl.meta_rl.actor_critic import ActorCriticBatch, actor_critic_batch, some_rows
from ssmrl.meta_rl.ppo import PPO, ppo_loss

ROWS, STEPS = 4, 6
MODELS = {
    "gru": lambda outputs: GRU(4, 3, outputs),
    "lstm": lambda outputs: LSTM(4, 3, outputs),
    "ssm": lambda outputs: StateSpaceModel(4, 3, outputs, hidden_dim=5),
    "mlp": lambda outputs: MLP(3, outputs, hidden_dim=5),
    "stateless": lambda outputs: nn.Linear(3, outputs),
}
KINDS = [(name, head) for name in MODELS for head in ("categorical", "gaussian")]
over_kinds = pytest.mark.parametrize(("name", "head"), KINDS)


def make(name="gru", head="categorical", *, seed=0):
    torch.manual_seed(seed)
    kind: Any = CategoricalHead(3) if head == "categorical" else GaussianHead(3, log_std=-0.4)
    return PolicyModel(MODELS[name](4), kind, has_value=True).double()


def make_batch(head="categorical", *, seed=1, rows=ROWS):
    """Rows with resets, steps that are invalid, and an old policy that is not the new one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    reset = torch.zeros(rows, STEPS, dtype=torch.bool)
    reset[:, 0] = reset[1, 3] = reset[2, 2] = reset[2, 5] = True
    valid = torch.ones_like(reset)
    valid[0, 4:] = valid[2, 4] = False
    if head == "categorical":
        old: Any = Categorical(0.3 * normal(rows, STEPS, 3))
        action = torch.randint(3, (rows, STEPS), generator=generator)
    else:
        old = Gaussian(0.2 * normal(rows, STEPS, 3), 0.1 * normal(rows, STEPS, 3) - 0.4)
        action = old.sample(normal(rows, STEPS, 3))
    x, (advantage, target, value) = normal(rows, STEPS, 3), normal(3, rows, STEPS)
    return ActorCriticBatch(x, action, reset, valid, advantage, target, value, old)


def near(policy, batch):
    """The batch with an old policy so close to this one that a part of the ratios is clipped, and a part is not."""
    with torch.no_grad():
        new = policy(batch.x, None, batch.reset)[0].distribution
    generator = torch.Generator().manual_seed(2)
    old = [leaf + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in new]
    return batch._replace(old=type(new)(*old))


def made(kind: Any, *args: Any, **kwargs: Any) -> Any:
    return kind(*args, **kwargs)


def reference(policy, batch, clip, value_weight, entropy_weight):
    """The loss and its parts by PyTorch's own distributions, one step of one row at a time."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in ("surrogate", "value", "entropy", "kl", "clipped")}
    for row in range(len(batch.x)):
        state = None
        for t in range(STEPS):
            if state is None or batch.reset[row, t]:
                state = policy.init_hidden(1)
            output, state = policy(batch.x[row, t][None], state)
            if not batch.valid[row, t]:
                continue
            leaves = [leaf[0] for leaf in output.distribution]
            old_leaves = [leaf[row, t] for leaf in batch.old]
            if len(leaves) == 1:
                new, old = (made(TorchCategorical, logits=logits) for (logits,) in (leaves, old_leaves))
            else:
                new, old = (made(Normal, mean, log_std.exp()) for mean, log_std in (leaves, old_leaves))
            action, advantage = batch.action[row, t], batch.advantage[row, t]
            ratio = (new.log_prob(action).sum() - old.log_prob(action).sum()).exp()
            gain = min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            parts["surrogate"].append(-gain)
            parts["value"].append((output.value[0] - batch.target[row, t]) ** 2 / 2)
            parts["entropy"].append(new.entropy().sum())
            parts["kl"].append(torch.distributions.kl_divergence(old, new).sum())
            parts["clipped"].append((abs(ratio - 1) > clip).double())
    means = {name: torch.stack(values).mean() for name, values in parts.items()}
    return means["surrogate"] + value_weight * means["value"] - entropy_weight * means["entropy"], means


@over_kinds
def test_the_loss_and_its_gradient_are_those_of_single_steps_and_torchs_distributions(name, head):
    policy = make(name, head)
    batch = near(policy, make_batch(head))
    terms = ppo_loss(policy, {}, batch, clip=0.1, value_weight=0.7, entropy_weight=0.3)
    expected, parts = reference(policy, batch, 0.1, 0.7, 0.3)
    torch.testing.assert_close(terms.loss, expected)
    assert terms.entropy is not None
    got = (terms.surrogate, terms.value, terms.entropy, terms.divergence, terms.clipped)
    torch.testing.assert_close(torch.stack(got), torch.stack([*parts.values()]), check_dtype=False)
    assert 0.1 < float(terms.clipped) < 0.95
    ours, theirs = (torch.autograd.grad(loss, [*policy.parameters()]) for loss in (terms.loss, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@over_kinds
def test_the_gradient_agrees_with_finite_differences(name, head):
    policy, batch = make(name, head), make_batch(head)
    params = {key: p.detach().requires_grad_() for key, p in policy.named_parameters()}

    def loss(*leaves):
        return ppo_loss(policy, dict(zip(params, leaves, strict=True)), batch, entropy_weight=0.2).loss

    assert torch.autograd.gradcheck(loss, [*params.values()])


def test_parameters_that_are_given_are_used_in_place_of_the_policys_own():
    policy, other, batch = make(), make(seed=5), make_batch()
    given = ppo_loss(policy, dict(other.named_parameters()), batch).loss
    torch.testing.assert_close(given, ppo_loss(other, {}, batch).loss)
    assert given != ppo_loss(policy, {}, batch).loss


@over_kinds
def test_invalid_steps_have_no_influence_whatever_they_hold(name, head):
    policy, batch = make(name, head), make_batch(head)
    away = ~batch.valid

    def spoil(leaf):
        mask = away.reshape(*away.shape, *[1] * (leaf.dim() - 2))
        return leaf.masked_fill(mask, torch.nan) if leaf.is_floating_point() else leaf.masked_fill(mask, -9)

    spoiled = batch._replace(
        x=spoil(batch.x),
        action=spoil(batch.action),
        advantage=spoil(batch.advantage),
        target=spoil(batch.target),
        old=type(batch.old)(*map(spoil, batch.old)),
    )
    params = [*policy.parameters()]
    terms, same = ppo_loss(policy, {}, batch, entropy_weight=0.2), ppo_loss(policy, {}, spoiled, entropy_weight=0.2)
    for mine, other in zip(terms, same, strict=True):
        torch.testing.assert_close(mine, other)
    gradients = [torch.autograd.grad(loss, params) for loss in (terms.loss, same.loss)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_batch_is_the_mean_of_its_rows_and_their_order_does_not_matter():
    policy, batch = make(), make_batch()
    batch = batch._replace(valid=torch.ones_like(batch.valid))
    whole = ppo_loss(policy, {}, batch, entropy_weight=0.1)
    rows = [ppo_loss(policy, {}, some_rows(batch, torch.tensor([row])), entropy_weight=0.1) for row in range(ROWS)]
    torch.testing.assert_close(torch.stack([row.loss for row in rows]).mean(), whole.loss)
    turned = ppo_loss(policy, {}, some_rows(batch, torch.tensor([2, 0, 3, 1])), entropy_weight=0.1)
    torch.testing.assert_close(turned.loss, whole.loss)


def test_a_state_before_the_first_step_is_gone_on_from():
    policy, batch = make(), make_batch()
    batch = batch._replace(reset=torch.zeros_like(batch.reset), valid=torch.ones_like(batch.valid))
    with torch.no_grad():
        states = [None]
        for t in range(STEPS):
            states.append(policy(batch.x[:, t], states[-1])[1])
    later = tree_map(lambda leaf: leaf[:, 2:], batch._replace(hidden_state=()))._replace(hidden_state=states[2])
    _, parts = reference(policy, batch._replace(valid=torch.arange(STEPS).expand(ROWS, -1) >= 2), 0.2, 0.5, 0.0)
    value = float(parts["value"].detach())
    assert float(ppo_loss(policy, {}, later).value) == pytest.approx(value)
    assert float(ppo_loss(policy, {}, later._replace(hidden_state=None)).value) != pytest.approx(value)


def test_at_the_policy_that_acted_the_gradient_is_the_policy_gradient():
    policy, batch = make(), make_batch()
    with torch.no_grad():
        batch = batch._replace(old=policy(batch.x, None, batch.reset)[0].distribution)
    terms = ppo_loss(policy, {}, batch, value_weight=0.0)
    assert float(terms.divergence) == pytest.approx(0, abs=1e-12)
    assert float(terms.clipped) == 0
    log_prob = policy(batch.x, None, batch.reset)[0].distribution.log_prob(batch.action)
    plain = -(log_prob * batch.advantage)[batch.valid].mean()
    for mine, other in zip(*(torch.autograd.grad(x, [*policy.parameters()]) for x in (terms.loss, plain)), strict=True):
        torch.testing.assert_close(mine, other)


def of_seed(seed):
    return torch.Generator().manual_seed(seed)


def test_one_step_on_all_rows_is_a_step_of_the_optimizer_on_the_clipped_gradient():
    policy, batch = make(), make_batch()
    params = [*policy.parameters()]
    before = [p.detach().clone() for p in params]
    loss = ppo_loss(policy, {}, batch, clip=0.1, value_weight=0.9, entropy_weight=0.2).loss
    gradients = torch.autograd.grad(loss, params)
    norm = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    settings: dict[str, Any] = {"clip": 0.1, "value_weight": 0.9, "epochs": 1, "minibatches": 1}
    ppo = PPO(policy, torch.optim.SGD(params, lr=0.5), max_grad_norm=norm / 4, **settings)
    done = ppo.update(batch, of_seed(0), entropy_weight=0.2)
    assert done.gradient_norm == pytest.approx(norm)
    assert done.loss == pytest.approx(float(loss.detach()))
    assert done.steps == 1
    for p, old, gradient in zip(params, before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * gradient / 4, rtol=1e-5, atol=1e-7)
        assert p.grad is None


def test_every_epoch_takes_every_row_once_in_an_order_of_its_own(monkeypatch):
    policy, batch = make(), make_batch(rows=7)
    batch = batch._replace(advantage=torch.arange(7.0).double()[:, None].expand(7, STEPS))
    seen = []

    def spy(policy, params, batch, **settings):
        seen.append(batch.advantage[:, 0].int().tolist())
        return ppo_loss(policy, params, batch, **settings)

    monkeypatch.setattr("ssmrl.meta_rl.ppo.ppo_loss", spy)
    optimizer = torch.optim.Adam(policy.parameters())
    done = PPO(policy, optimizer, epochs=2, minibatches=3).update(batch, of_seed(3))
    assert done.steps == 6
    assert [len(rows) for rows in seen] == [3, 2, 2, 3, 2, 2]
    epochs = [[row for rows in part for row in rows] for part in (seen[:3], seen[3:])]
    assert all(sorted(epoch) == [*range(7)] for epoch in epochs)
    assert epochs[0] != epochs[1]


def after_updates(seed, *, head="gaussian", **settings):
    policy, batch = make("gru", head), make_batch(head)
    ppo = PPO(policy, torch.optim.Adam(policy.parameters(), lr=0.01), epochs=3, minibatches=2, **settings)
    done = [ppo.update(batch, of_seed(seed + i), entropy_weight=0.01) for i in range(2)]
    return done, torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_a_seed_gives_the_same_bits_and_another_one_other_numbers():
    first, again, other = after_updates(0), after_updates(0), after_updates(7)
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("changed", [{"clip": 0.01}, {"value_weight": 0.0}, {"max_grad_norm": 0.01}])
def test_every_setting_changes_what_is_learned(changed):
    assert not torch.equal(after_updates(0)[1], after_updates(0, **changed)[1])


def test_a_divergence_over_the_bound_ends_the_update_before_its_step():
    policy, batch = make(), make_batch()
    with torch.no_grad():
        batch = batch._replace(old=policy(batch.x, None, batch.reset)[0].distribution)
    start = copy.deepcopy(policy.state_dict())
    settings: dict[str, Any] = {"epochs": 50, "minibatches": 1, "max_grad_norm": None}
    ppo = PPO(policy, torch.optim.SGD(policy.parameters(), lr=0.1), max_divergence=1e-3, **settings)
    done = ppo.update(batch, of_seed(0))
    assert 0 < done.steps < 50
    assert float(ppo_loss(policy, {}, batch).divergence) > 1e-3  # found, and no step made after it
    policy.load_state_dict(start)
    settings["epochs"] = done.steps - 1
    if settings["epochs"]:
        PPO(policy, torch.optim.SGD(policy.parameters(), lr=0.1), **settings).update(batch, of_seed(0))
    assert float(ppo_loss(policy, {}, batch).divergence) <= 1e-3


def test_what_the_values_explained_is_of_those_that_acted():
    policy, batch = make(), make_batch()
    ppo = PPO(policy, torch.optim.SGD(policy.parameters(), lr=0.0), epochs=1, minibatches=1)
    target, value = batch.target[batch.valid], batch.value[batch.valid]
    expected = 1 - float((target - value).var(correction=0) / target.var(correction=0))
    assert ppo.update(batch, of_seed(0)).explained_variance == pytest.approx(expected)
    assert ppo.update(batch._replace(value=batch.target), of_seed(0)).explained_variance == 1
    constant = batch._replace(target=torch.ones_like(batch.target))
    assert ppo.update(constant, of_seed(0)).explained_variance == 0


def snapshot(policy, optimizer):
    return copy.deepcopy((policy.state_dict(), optimizer.state_dict()))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("field", ["advantage", "target", "x"])
def test_what_is_not_finite_leaves_policy_and_optimizer_untouched(field, used):
    """The bad row comes after steps on good ones, which are undone."""
    policy, batch = make(), make_batch()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    ppo = PPO(policy, optimizer, epochs=1, minibatches=ROWS)
    if used:
        ppo.update(batch, of_seed(0))
    before = snapshot(policy, optimizer)
    last = int(torch.randperm(ROWS, generator=of_seed(1))[-1])
    bad = getattr(batch, field).clone()
    bad[last, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"The loss \(nan\) .* optimizer are as before the update"):
        ppo.update(batch._replace(**{field: bad}), of_seed(1))
    after = snapshot(policy, optimizer)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert all(p.grad is None for p in policy.parameters())
    ppo.update(batch, of_seed(1))  # and goes on
    assert all(p.isfinite().all() for p in policy.parameters())


def test_a_gradient_that_is_not_finite_is_found_where_the_loss_is():
    policy, batch = make("stateless"), make_batch()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    huge = batch._replace(x=batch.x.clone().fill_(1e200), target=torch.zeros_like(batch.target))
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(0.0)
    before = snapshot(policy, optimizer)
    finite = ppo_loss(policy, {}, huge).loss
    assert finite.isfinite()
    spoiled = huge._replace(advantage=huge.advantage * 1e200)
    with pytest.raises(FloatingPointError, match=r"norm of its gradient \(inf|nan\)"):
        PPO(policy, optimizer, epochs=1, minibatches=1).update(spoiled, of_seed(0))
    torch.testing.assert_close(snapshot(policy, optimizer), before, rtol=0, atol=0)


@pytest.mark.parametrize("action", ["skip", "roll back"])
def test_what_is_not_finite_is_left_out_and_a_run_goes_on_to_the_same_bits(action):
    nonfinite = NonFinite(action, at_most=1, every=2)
    batches = [make_batch(seed=n) for n in range(1, 6)]
    batches[2] = batches[2]._replace(target=batches[2].target * math.nan)

    def run(seed):
        policy = make(seed=seed)
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
        return PPO(policy, optimizer, epochs=2, minibatches=2, nonfinite=nonfinite)

    whole, first, second = run(0), run(0), run(1)
    done = [whole.update(batch, of_seed(n)) for n, batch in enumerate(batches)]
    assert [math.isnan(update.loss) for update in done] == [False, False, True, False, False]
    assert [update.steps for update in done] == [4, 4, 0, 4, 4]
    for n, batch in enumerate(batches[:3]):
        first.update(batch, of_seed(n))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for n, batch in enumerate(batches[3:], start=3):
        second.update(batch, of_seed(n))
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert second.left_out == 1
    without = run(0)  # copies are made before every second update
    for n in (0, 1, 3, 4):
        without.update(batches[n], of_seed(n))
    torch.testing.assert_close(without.policy.state_dict(), whole.policy.state_dict(), rtol=0, atol=0)
    with pytest.raises(FloatingPointError, match="2 of the last 6 updates were not finite"):
        whole.update(batches[2], of_seed(0))


@pytest.mark.parametrize("minibatches", [1, 4])
def test_a_step_that_makes_weights_infinite_is_undone(minibatches):
    """With one minibatch no later loss tells."""
    policy, batch = make(), make_batch()
    optimizer = torch.optim.SGD(policy.parameters(), math.inf)
    settings: dict[str, Any] = {"epochs": 1, "minibatches": minibatches, "max_grad_norm": None}
    before = snapshot(policy, optimizer)
    with pytest.raises(FloatingPointError, match="as before the update"):
        PPO(policy, optimizer, **settings).update(batch, of_seed(0))
    torch.testing.assert_close(snapshot(policy, optimizer), before, rtol=0, atol=0)
    ppo = PPO(policy, optimizer, **settings, nonfinite=NonFinite("skip"))
    assert math.isnan(ppo.update(batch, of_seed(0)).loss)
    torch.testing.assert_close(snapshot(policy, optimizer), before, rtol=0, atol=0)


def test_parameters_that_the_optimizer_does_not_hold_stay_and_gather_no_gradient():
    policy, batch = make(), make_batch()
    readout = [*policy.model.readout.parameters()]
    frozen = copy.deepcopy([*policy.model.rnn.parameters()])
    PPO(policy, torch.optim.Adam(readout), epochs=1, minibatches=2).update(batch, of_seed(0))
    for p, start in zip(policy.model.rnn.parameters(), frozen, strict=True):
        assert torch.equal(p, start)
        assert p.grad is None


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"clip": 0.0}, ValueError, "clip must be > 0; got 0"),
        ({"value_weight": -1.0}, ValueError, "value_weight must be finite and >= 0; got -1.0"),
        ({"epochs": 0}, ValueError, "epochs and minibatches must be at least 1; got 0 and 4"),
        ({"minibatches": 2.5}, TypeError, "minibatches must be an integer >= 0; got 2.5"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be > 0; got 0"),
        ({"max_divergence": -0.1}, ValueError, "max_divergence must be finite and >= 0; got -0.1"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer; got str"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))])}, ValueError, "it holds none"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, error, match):
    policy = make()
    settings = {"optimizer": torch.optim.Adam(policy.parameters())} | change
    with pytest.raises(error, match=match):
        PPO(policy, **settings)


def test_a_policy_without_a_value_is_refused():
    policy = PolicyModel(nn.Linear(3, 3), CategoricalHead(3)).double()
    match = r"must have a value: PolicyModel\(model, head, has_value=True\)"
    with pytest.raises(ValueError, match=match):
        PPO(policy, torch.optim.SGD(policy.parameters()))
    with pytest.raises(ValueError, match=match):
        ppo_loss(policy, {}, make_batch())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"advantage": torch.zeros(ROWS)}, r"`target` must have the shape"),
        ({"target": torch.zeros(ROWS, STEPS, 1)}, r"`target` must have the shape \(..., T\) = \(4, 6\)"),
        ({"valid": torch.ones(ROWS, STEPS)}, "`valid` must be Bool"),
        ({"x": torch.zeros(ROWS, 3)}, r"`x` must have shape \(B, T, D\) with \(B, T\) = \(4, 6\); got \(4, 3\)"),
        ({"action": torch.zeros(ROWS, STEPS, 1, 1)}, r"`action` must have shape \(B, T\) or \(B, T, A\)"),
        ({"reset": torch.zeros(ROWS, 2) > 0}, r"`reset` must have shape \(B, T\)"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        ppo_loss(make(), {}, make_batch()._replace(**change))


def test_fewer_rows_than_minibatches_are_refused():
    policy = make()
    ppo = PPO(policy, torch.optim.Adam(policy.parameters()), minibatches=ROWS + 1)
    with pytest.raises(ValueError, match="a row for each of the 5 minibatches; got 4"):
        ppo.update(make_batch(), of_seed(0))


def test_an_entropy_without_a_formula_is_left_out_or_refused():
    torch.manual_seed(0)
    policy = PolicyModel(nn.Linear(3, 4), GaussianHead(3, squash=True), has_value=True).double()
    batch = make_batch("gaussian")
    with torch.no_grad():
        old = policy(batch.x)[0].distribution
    batch = batch._replace(action=batch.action.tanh(), old=old)
    assert ppo_loss(policy, {}, batch).entropy is None
    ppo = PPO(policy, torch.optim.Adam(policy.parameters()))
    assert ppo.update(batch, of_seed(0)).entropy is None
    with pytest.raises(ValueError, match="entropy_weight must be 0, as a TanhGaussian has no entropy"):
        ppo.update(batch, of_seed(0), entropy_weight=0.1)


def test_a_policy_with_memory_learns_to_repeat_what_it_saw_and_one_without_cannot():
    """The first input says which of three actions is right at all later steps, whose inputs say nothing."""

    def reward_of(name):
        torch.manual_seed(0)
        policy = PolicyModel(MODELS[name](4), CategoricalHead(3), has_value=True)
        ppo = PPO(policy, torch.optim.Adam(policy.parameters(), lr=0.03), epochs=3, minibatches=2)
        rows, steps = 128, 4
        reset, ends = torch.zeros(2, rows, steps, dtype=torch.bool)
        reset[:, 0] = ends[:, -1] = True
        for iteration in range(40):
            generator = of_seed(iteration)
            right = torch.randint(3, (rows,), generator=generator)
            x = torch.zeros(rows, steps, 3)
            x[:, 0] = nn.functional.one_hot(right, 3).float()
            noise = -torch.rand(rows, steps, 3, generator=generator).log().neg().log()
            with torch.no_grad():
                output: Any = functional_forward(policy, {}, x, reset=reset)[0]
            action = output.distribution.sample(noise)
            reward = (action == right[:, None]).float() * (torch.arange(steps) > 0)
            batch = actor_critic_batch(policy, x, action, reward, reset, ends, torch.zeros_like(ends))
            ppo.update(batch, generator)
        return float(reward[:, 1:].mean())

    assert reward_of("gru") > 0.9
    assert reward_of("mlp") < 0.5
