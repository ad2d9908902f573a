"""The training of the study of adaptive control: what its numbers mean, and what it refuses."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from ssmrl.meta_rl import Transitions


@pytest.fixture(scope="module")
def training(import_benchmark) -> Any:
    return import_benchmark("control_training")


def parts(training, tmp_path, kind="classic"):
    sizes = importlib.import_module("control_run").SIZES["tiny"]
    size = replace(sizes[kind], windows=(4, 8), after=6, ahead=3, episode=24)
    pendulum = importlib.import_module("control_systems").SYSTEMS["pendulum"]
    run = training.Run(replace(pendulum, gains=kind == "robot"), 0, size, tmp_path)
    generator = torch.Generator().manual_seed(0)
    observation = torch.randn(4, 24, 3, generator=generator)
    action = torch.rand(4, 24, 1, generator=generator)
    data = Transitions(observation, action, torch.randn(4, 24, 3, generator=generator))
    scales = training.scales_of(run, data)
    torch.manual_seed(0)
    return run, run.recurrent(scales), scales, data


def test_without_steps_nothing_gets_better_and_with_them_the_window_does(training, tmp_path):
    run, model, scales, data = parts(training, tmp_path)
    names = [name for name, _ in model.named_parameters()]
    still = {name: torch.tensor(0.0) for name in names}
    before, after = training.errors_ahead(run, model, scales, still, data)
    assert before.shape == (4,)
    torch.testing.assert_close(before, after)
    before, after = training.errors_ahead(run, model, scales, {name: torch.tensor(0.02) for name in names}, data)
    assert (before - after).abs().min() > 1e-3
    wild = {name: torch.tensor(1e6) for name in names}
    before, after = training.errors_ahead(run, model, scales, wild, data)
    torch.testing.assert_close(before, after)  # such steps make the window's own loss worse: they do not stand


def test_a_step_without_a_finite_gradient_is_left_out_and_told(training, tmp_path, capsys):
    run, model, scales, data = parts(training, tmp_path)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    broken = data._replace(action=torch.full_like(data.action, torch.nan))
    training.train(run, model, scales, broken, 2, 0)
    assert "2 of 2 training steps" in capsys.readouterr().out
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    training.train(run, model, scales, data, 2, 0)
    assert not any(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_of_a_robot_the_rate_of_gains_is_learned_and_nothing_else(training, tmp_path):
    run, model, scales, data = parts(training, tmp_path, "robot")
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    found = training.with_a_rate(replace(run, size=replace(run.size, meta_updates=8)), model, scales, data)
    assert [*found["rates"]] == ["gain"]
    assert float(found["rates"]["gain"]) != pytest.approx(run.size.rate, abs=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in found["model"].items())
    chosen = training.best_rates(run, model, scales, data)
    assert [*chosen["rates"]] == ["gain"]
    assert max(map(float, chosen["loss"])) == 10.0


def test_the_rate_of_gains_is_learned_on_actuators_that_are_reversed(training, tmp_path, monkeypatch):
    run, model, scales, data = parts(training, tmp_path, "robot")
    drawn, signs = [], []
    some_tasks = training.some_tasks

    def keeping(*args):
        drawn.append(some_tasks(*args))
        return drawn[-1]

    def noting(learner, tasks):
        signs.append(tasks[1] / drawn[-1][2][1])
        return 0.0

    monkeypatch.setattr(training, "some_tasks", keeping)
    monkeypatch.setattr(training.MetaLearner, "update", noting)
    training.with_a_rate(replace(run, size=replace(run.size, meta_updates=800)), model, scales, data)
    assert all(torch.allclose(sign, sign[:, :1].expand_as(sign)) for sign in signs)  # the same for a whole episode
    every = torch.stack([sign[:, 0] for sign in signs])
    torch.testing.assert_close(every.abs(), torch.ones_like(every))
    assert 0.1 < float((every < 0).float().mean()) < 0.3


def test_training_leaves_the_gains_of_actuators_at_1(training, tmp_path):
    run, model, scales, data = parts(training, tmp_path, "robot")
    before = model.model.state_input.weight.clone()
    training.train(run, model, scales, data, 2, 0)
    assert torch.equal(model.gain, torch.ones(1))
    assert not torch.equal(model.model.state_input.weight, before)


def test_a_folder_of_other_settings_is_refused(training, tmp_path):
    run, *_ = parts(training, tmp_path)
    run.open()
    run.open()
    with pytest.raises(ValueError, match="is of other settings"):
        replace(run, size=replace(run.size, horizon=7)).open()


def test_the_best_rate_is_told_beside_what_it_is_worth(training, tmp_path):
    run, model, scales, data = parts(training, tmp_path)
    found = training.best_rates(run, model, scales, data)
    assert found["loss"][str(found["rate"])] == min(found["loss"].values())
    assert [float(rate) for rate in found["rates"].values()] == pytest.approx([found["rate"]] * len(found["rates"]))


def test_as_published_a_step_of_a_rate_that_stays_and_no_regard_to_the_model_before_it(training, tmp_path):
    run, model, scales, data = parts(training, tmp_path)
    control_run = importlib.import_module("control_run")
    published = replace(run, size=control_run.as_published(run.size))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    found = training.meta_trained(published, model, scales, data)
    assert [float(rate) for rate in found["rates"].values()] == pytest.approx([control_run.FIXED] * len(weights))
    assert not any(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    learned = training.meta_trained(run, model, scales, data)
    assert all((rate != run.size.rate).any() for rate in learned["rates"].values())


@pytest.mark.parametrize("wild", [1, 21])
def test_of_meta_updates_a_few_may_run_away(training, tmp_path, monkeypatch, capsys, wild):
    run, model, scales, data = parts(training, tmp_path)
    run = replace(run, size=replace(run.size, meta_updates=25))
    broken, drawn = data._replace(action=torch.full_like(data.action, torch.nan)), iter(range(25))
    some_tasks = training.some_tasks
    monkeypatch.setattr(
        training, "some_tasks", lambda run, data, g: some_tasks(run, broken if next(drawn) < wild else data, g)
    )
    if wild > 1:
        with pytest.raises(FloatingPointError, match="21 of the last 21 updates"):
            training.meta_trained(run, model, scales, data)
    else:
        training.meta_trained(run, model, scales, data)
        assert "1 of 25 meta-updates" in capsys.readouterr().out


def test_without_weight_what_runs_away_before_it_adapts_does_not_matter(training, tmp_path, monkeypatch, capsys):
    run, model, scales, data = parts(training, tmp_path)
    found = training.losses_of
    monkeypatch.setattr(training, "losses_of", lambda *args: found(*args)._replace(unadapted=torch.tensor(torch.inf)))
    training.meta_trained(replace(run, size=replace(run.size, meta_updates=1)), model, scales, data)
    assert "left out" not in capsys.readouterr().out
    training.meta_trained(replace(run, size=replace(run.size, meta_updates=1, unadapted=1.0)), model, scales, data)
    assert "1 of 1 meta-updates" in capsys.readouterr().out
