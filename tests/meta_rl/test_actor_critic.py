"""Rows for an actor and a critic: values, also after cuts, against the policy run step by step and GAE written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssmrl.core import GRU, MLP
from ssmrl.meta_rl import CategoricalHead, GaussianHead, PolicyModel
from ssmrl.meta_rl.actor_critic import actor_critic_batch

ROWS, STEPS = 3, 7


def make_policy(kind="gru"):
    torch.manual_seed(0)
    model = GRU(5, 3, 5) if kind == "gru" else MLP(3, 5, hidden_dim=6)
    return PolicyModel(model, CategoricalHead(4), has_value=True).double()


def data(seed=0):
    """Trials that end at several steps; `reset` is where the next one begins."""
    generator = torch.Generator().manual_seed(seed)
    x, next_x = torch.randn(2, ROWS, STEPS, 3, generator=generator, dtype=torch.float64)
    action = torch.randint(4, (ROWS, STEPS), generator=generator)
    reward = torch.randn(ROWS, STEPS, generator=generator, dtype=torch.float64)
    terminated, truncated, reset = torch.zeros(3, ROWS, STEPS, dtype=torch.bool)
    reset[:, 0] = True
    terminated[0, 2] = terminated[1, 6] = True  # row 1 ends with its trial, 0 and 2 in the middle of one
    truncated[0, 4] = truncated[2, 1] = truncated[2, 2] = True
    reset[0, 3] = reset[0, 5] = reset[2, 2] = reset[2, 3] = True
    return {
        "x": x,
        "action": action,
        "reward": reward,
        "reset": reset,
        "terminated": terminated,
        "truncated": truncated,
        "next_x": next_x,
    }


def by_steps(policy, given, row, gamma, lam, hidden_state=None):
    """Values and advantages of one row, from one call of the policy per step, without masks."""
    one = {name: leaf[row] for name, leaf in given.items()}
    values, after, state = [], [], hidden_state
    for t in range(STEPS):
        state = policy.init_hidden(1) if state is None or one["reset"][t] else state
        output, state = policy(one["x"][None, t], state)
        values.append(output.value[0])
        after.append(policy(one["next_x"][None, t], state)[0].value[0])  # in the state after step t
    advantages, later = [torch.zeros(())] * STEPS, 0.0
    for t in reversed(range(STEPS)):
        if one["terminated"][t]:
            delta, later = one["reward"][t] - values[t], 0.0
        elif one["truncated"][t] or t == STEPS - 1:
            delta, later = one["reward"][t] + gamma * after[t] - values[t], 0.0
        else:
            delta = one["reward"][t] + gamma * values[t + 1] - values[t]
        advantages[t] = later = delta + gamma * lam * later
    return torch.stack(values), torch.stack(advantages)


@pytest.mark.parametrize("kind", ["gru", "mlp"])
def test_values_and_advantages_are_those_of_the_policy_run_step_by_step(kind):
    policy, given = make_policy(kind), data()
    batch = actor_critic_batch(policy, **given, gamma=0.9, lam=0.7, normalize=False)
    for row in range(ROWS):
        with torch.no_grad():
            value, advantage = by_steps(policy, given, row, 0.9, 0.7)
        torch.testing.assert_close(batch.value[row], value)
        torch.testing.assert_close(batch.advantage[row], advantage)
        torch.testing.assert_close(batch.target[row], advantage + value)


def test_the_old_distributions_are_those_of_the_inputs_though_rows_have_cuts():
    policy, given = make_policy(), data()
    old = actor_critic_batch(policy, **given).old
    expected = policy(given["x"], None, given["reset"])[0].distribution
    torch.testing.assert_close(old.logits, expected.logits)
    assert not old.logits.requires_grad


def test_a_state_before_the_first_step_is_gone_on_from():
    policy, given = make_policy(), data()
    given["reset"][:, 0] = False
    state = torch.randn(ROWS, 5, dtype=torch.float64)
    batch = actor_critic_batch(policy, **given, hidden_state=state, gamma=0.9, lam=0.7, normalize=False)
    for row in range(ROWS):
        with torch.no_grad():
            value, advantage = by_steps(policy, given, row, 0.9, 0.7, state[row, None])
        torch.testing.assert_close(batch.value[row], value)
        torch.testing.assert_close(batch.advantage[row], advantage)
    assert batch.hidden_state is state


def test_trials_that_terminate_need_no_next_input_and_return_the_sum_of_their_rewards():
    policy, given = make_policy(), data()
    given["terminated"] = torch.zeros(ROWS, STEPS, dtype=torch.bool)
    given["terminated"][:, -1] = True
    given["truncated"] = torch.zeros_like(given["terminated"])
    del given["next_x"]
    batch = actor_critic_batch(policy, **given, gamma=1.0, lam=1.0, normalize=False)
    torch.testing.assert_close(batch.target, given["reward"].flip(1).cumsum(1).flip(1))


def test_advantages_are_normalised_if_asked():
    policy, given = make_policy(), data()
    raw = actor_critic_batch(policy, **given, normalize=False)
    batch = actor_critic_batch(policy, **given)
    mean, deviation = raw.advantage.mean(), raw.advantage.std(correction=0)
    torch.testing.assert_close(batch.advantage, (raw.advantage - mean) / deviation)
    torch.testing.assert_close(batch.target, raw.target)


def test_invalid_steps_have_no_influence_whatever_they_hold():
    """Rows 0 and 2 stop after 5 steps: as if they were that long, and the rest were not there."""
    policy, given = make_policy(), data()
    valid = torch.ones(ROWS, STEPS, dtype=torch.bool)
    valid[0, 5:] = valid[2, 5:] = False
    there = valid[..., None].double().log()  # 0, and -inf where invalid
    junk = given | {
        "x": given["x"] + there,
        "reward": torch.where(valid, given["reward"], torch.nan),
        "action": torch.where(valid, given["action"], -7),
        "next_x": torch.where(valid[..., None], given["next_x"], torch.nan),
    }
    batch = actor_critic_batch(policy, **junk, valid=valid, normalize=False)
    short = {name: leaf[[0, 2], :5] for name, leaf in given.items()}
    expected = actor_critic_batch(policy, **short, normalize=False)
    for name in ("value", "advantage", "target"):
        torch.testing.assert_close(getattr(batch, name)[[0, 2], :5], getattr(expected, name))
    assert batch.advantage[~valid].eq(0).all()
    assert batch.x.isfinite().all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"next_x": None}, r"`next_x` must be .* row 0 is cut after step 4 .*; got None. For RL² pack"),
        (
            {"next_x": torch.zeros(ROWS, STEPS, 4)},
            r"`next_x` must have the shape .* of `x`; got \(3, 7, 4\)",
        ),
        ({"x": torch.zeros(ROWS, STEPS)}, r"`x` must have shape \(B, T, D\) with \(B, T\) = \(3, 7\); got \(3, 7\)"),
        ({"action": torch.zeros(ROWS, 1)}, r"`action` must have shape \(B, T\) or \(B, T, A\) .*; got \(3, 1\)"),
        ({"reset": torch.zeros(1, STEPS) > 0}, r"`valid` must have the shape"),
        ({"terminated": torch.zeros(ROWS, STEPS)}, "`terminated` must be Bool; got torch.float32"),
        ({"reward": torch.zeros(ROWS, STEPS, 1)}, "`terminated` must have the shape"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\]; got 1.1"),
        ({"lam": -1.0}, r"lam must be in \[0, 1\]; got -1.0"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        actor_critic_batch(make_policy(), **(data() | change))


def test_a_cut_after_which_the_policy_remembers_is_refused():
    given = data()
    given["reset"][2, 2] = False
    with pytest.raises(ValueError, match=r"must forget after a cut; row 2 is cut after step 1 .* False at step 2"):
        actor_critic_batch(make_policy(), **given)


def test_a_policy_without_a_value_is_refused():
    policy = PolicyModel(nn.Linear(3, 2), GaussianHead(2)).double()
    with pytest.raises(ValueError, match=r"must have a value: PolicyModel\(model, head, has_value=True\)"):
        actor_critic_batch(policy, **data())
