"""Updates that are not finite: raised, left out or rolled back, and how many may be."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torchopt
from torch import nn

from ssmrl import MetaMAML, StateSpaceModel
from ssmrl.adaptation import learning_rates, scale_by_learning_rates
from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from ssmrl.meta_rl import MetaLearner, NonFinite

GOOD, BAD = 1.0, math.nan


def learner_with(nonfinite, optimizer=None, **options):
    meta = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.Adam([meta], 0.1) if optimizer is None else optimizer([meta])
    return MetaLearner(
        lambda m, x: (m * x).square().sum(), meta, outer_optimizer=optimizer, nonfinite=nonfinite, **options
    )


def task(value):
    return torch.full((3, 2), value)


def state_of(learner):
    return copy.deepcopy([learner.meta_params.detach(), learner.outer_step.optimizer.state_dict()["state"]])


def same(a, b):
    leaves = [torch.utils._pytree.tree_leaves(tree) for tree in (a, b)]
    return all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(*leaves, strict=True))


def test_by_default_it_is_an_error_and_all_is_as_before():
    learner = learner_with(None)
    learner.update(task(GOOD))
    before = state_of(learner)
    with pytest.raises(FloatingPointError, match=r"not finite for tasks \[0, 1, 2\]"):
        learner.update(task(BAD))
    assert same(state_of(learner), before)
    assert learner.left_out == 0


@pytest.mark.parametrize("compile", [False, "trace"])
def test_an_update_that_is_left_out_leaves_no_trace(compile):
    learner, other = (learner_with(NonFinite("skip"), compile=compile) for _ in range(2))
    for value in (GOOD, BAD, 2.0):
        loss = learner.update(task(value))
        assert math.isnan(loss) == (value is BAD)
    for value in (GOOD, 2.0):
        other.update(task(value))
    assert same(state_of(learner), state_of(other))
    assert (learner.left_out, other.left_out) == (1, 0)


def test_at_most_so_many_of_the_last_updates_are_left_out():
    learner = learner_with(NonFinite("skip", at_most=2, of_last=4))
    for value in (BAD, BAD, GOOD, GOOD, BAD, GOOD, GOOD, GOOD, BAD, BAD):  # never three of four
        learner.update(task(value))
    assert learner.left_out == 5
    before = state_of(learner)
    with pytest.raises(FloatingPointError, match="3 of the last 4 updates were not finite, of which 2 may"):
        learner.update(task(BAD))
    assert same(state_of(learner), before)
    with pytest.raises(FloatingPointError, match="1 of the last 1 updates"):
        learner_with(NonFinite("skip", at_most=0)).update(task(BAD))


def test_roll_back_goes_to_the_last_copy_with_the_optimizer_and_leaves_the_schedule():
    learner = learner_with(NonFinite("roll back", every=2))
    seen = []
    for value in (1.0, 0.5, 2.0, 1.5, 0.7):
        seen.append(state_of(learner))
        learner.update(task(value))
    learner.outer_step.optimizer.param_groups[0]["lr"] = 0.03
    assert math.isnan(learner.update(task(BAD)))
    assert same(state_of(learner), seen[4])  # copies before the first, third and fifth update
    assert learner.outer_step.optimizer.param_groups[0]["lr"] == 0.03
    assert learner.left_out == 1
    learner.update(task(GOOD))
    assert not same(state_of(learner), seen[4])


def overflowing(params):
    return torch.optim.SGD(params, 1e38)


def test_a_step_that_makes_weights_infinite_is_an_error_or_rolled_back():
    for nonfinite in (None, NonFinite("skip")):
        learner = learner_with(nonfinite, overflowing)
        with pytest.raises(FloatingPointError, match=r"weights of shapes \[\(2,\)\] not finite, and they are lost"):
            learner.update(task(3.0))
    learner = learner_with(NonFinite("roll back", at_most=1), overflowing)
    assert math.isnan(learner.update(task(3.0)))
    assert torch.equal(learner.meta_params, torch.tensor([1.0, 2.0]))
    with pytest.raises(FloatingPointError, match="2 of the last 2 updates were not finite"):
        learner.update(task(3.0))
    assert torch.equal(learner.meta_params, torch.tensor([1.0, 2.0]))


def test_a_parameter_without_elements_is_finite():
    meta = {"w": nn.Parameter(torch.ones(2)), "none": nn.Parameter(torch.zeros(0))}
    learner = MetaLearner(lambda m, x: (m["w"] * x).sum() + m["none"].sum(), meta, outer_lr=0.1)
    assert math.isfinite(learner.update(task(GOOD)))


def test_a_state_that_was_loaded_shares_nothing_with_where_it_is_from():
    first, second = learner_with(None), learner_with(None)
    first.update(task(GOOD))
    second.load_state_dict(first.state_dict())
    before = state_of(second)
    first.update(task(GOOD))
    assert same(state_of(second), before)


@pytest.mark.parametrize("action", ["raise", "skip", "roll back"])
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, action):
    values = [1.0, 0.5, BAD, 2.0, 1.5, BAD, 0.7] if action != "raise" else [1.0, 0.5, 2.0, 1.5, 0.7]
    nonfinite = NonFinite(action, at_most=2, of_last=6, every=2)
    whole, first, second = (learner_with(nonfinite) for _ in range(3))
    for value in values:
        whole.update(task(value))
    for value in values[:4]:
        first.update(task(value))
    save_checkpoint(tmp_path, 4, first.state_dict())
    found = load_checkpoint(tmp_path)
    assert found is not None
    second.load_state_dict(found.state)
    for value in values[4:]:
        second.update(task(value))
    assert same(state_of(second), state_of(whole))
    assert second.left_out == whole.left_out == values.count(BAD)
    if action != "raise":
        with pytest.raises(FloatingPointError, match="3 of the last 6"):
            second.update(task(BAD))


def test_a_state_of_other_meta_parameters_is_refused():
    learner = learner_with(None)
    state = learner.state_dict() | {"meta_params": [torch.zeros(3)]}
    with pytest.raises(ValueError, match=r"of meta-parameters of shapes \[\(2,\)\]; it is of \[\(3,\)\]"):
        learner.load_state_dict(state)


def maml_with(nonfinite=None):
    torch.manual_seed(0)
    model = StateSpaceModel(3, 2, 1, hidden_dim=4)
    rates = learning_rates(dict(model.named_parameters()), 0.1)
    inner = torchopt.chain(scale_by_learning_rates(rates))
    outer = torch.optim.AdamW([*model.parameters(), *rates.values()], 0.01)
    return MetaMAML(model, inner_optimizer=inner, outer_optimizer=outer, nonfinite=nonfinite), rates


def sine_tasks(generator, scale=1.0):
    x = torch.randn(4, 2, 6, 2, generator=generator)
    return [(x[i], scale * x[i, ..., :1], x[i], scale * x[i, ..., :1]) for i in range(4)]


def test_maml_with_learned_rates_goes_on_to_the_same_bits(tmp_path):
    generator = torch.Generator().manual_seed(0)
    batches = [sine_tasks(generator) for _ in range(6)]
    (whole, rates), (first, _), (second, others) = maml_with(), maml_with(), maml_with()
    curve = [whole.meta_update(batch) for batch in batches]
    for batch in batches[:3]:
        first.meta_update(batch)
    save_checkpoint(tmp_path, 3, first.state_dict())
    found = load_checkpoint(tmp_path)
    assert found is not None
    second.load_state_dict(found.state)
    assert [second.meta_update(batch) for batch in batches[3:]] == curve[3:]
    assert same(second.model.state_dict(), whole.model.state_dict())
    assert same([*others.values()], [*rates.values()])


def test_maml_leaves_out_what_runs_away():
    generator = torch.Generator().manual_seed(0)
    maml, _ = maml_with(NonFinite("skip"))
    before = copy.deepcopy(maml.state_dict()["model"])
    assert math.isnan(maml.meta_update(sine_tasks(generator, 1e30)))  # the squared error overflows
    assert same(maml.state_dict()["model"], before)
    assert maml.left_out == 1
    assert math.isfinite(maml.meta_update(sine_tasks(generator)))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"action": "ignore"}, "action must be one of 'raise', 'skip', 'roll back'; got 'ignore'"),
        ({"at_most": -1}, "at_most must be"),
        ({"at_most": 5, "of_last": 5}, "of_last must be larger than at_most; got 5 and 5"),
        ({"every": 0}, "every must be at least 1; got 0"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        NonFinite(**arguments)


def test_only_a_policy_is_taken():
    with pytest.raises(TypeError, match="nonfinite must be a NonFinite; got str"):
        learner_with("skip")
