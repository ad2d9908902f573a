"""The serious benchmark: its windows and scores, and a run at a tiny size that goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from ssmrl.meta_rl import dynamics_data

pytest.importorskip("mujoco")


@pytest.fixture(scope="module")
def tasks(import_benchmark):
    return import_benchmark("serious_tasks")


@pytest.fixture(scope="module")
def models(import_benchmark):
    return import_benchmark("serious_models")


@pytest.fixture(scope="module")
def controls(import_benchmark):
    return import_benchmark("serious_controls")


@pytest.fixture(scope="module")
def benchmark(import_benchmark, tasks, models):
    return import_benchmark("serious_benchmark")


@pytest.fixture(scope="module")
def data(benchmark, tmp_path_factory):
    return benchmark.data_of(benchmark.SIZES["tiny"], tmp_path_factory.mktemp("data"), "halfcheetah-joint")


def with_size(data, **changed):
    """The same data and another size."""
    train = type(data.train)(*(torch.cat(both) for both in zip(data.held_out, data.train, strict=True)))
    return type(data)(replace(data.size, **changed), train, data.test, dead_actuators=data.dead_actuators)


def test_every_task_has_episodes_that_do_not_end(tasks):
    amount = tasks.Amount(2, 1, episodes=1, steps=30)
    sizes = {}
    for name, task in tasks.TASKS.items():
        episodes = tasks.episodes_of(task, amount, "train")
        assert episodes.observation.shape[:3] == (2, 1, 31)
        assert torch.isfinite(episodes.observation).all()
        sizes[name] = (episodes.observation.shape[-1], episodes.action.shape[-1])
    assert sizes["ant-leg"] == (27, 8)
    assert sizes["humanoid-mass"] == (45, 17)


def test_windows_are_what_was_seen(data, tasks):
    systems, episode, starts = torch.tensor([2, 0]), torch.tensor([1, 3]), torch.tensor([[30, 41], [20, 90]])
    x, y = tasks.windows_at(data.scales, data.train, systems, episode, starts, 5)
    assert x.shape == (2, 2, 5, data.inputs)
    seen, acted = data.train.observation[0, 3, 90:96], data.train.action[0, 3, 90:95]
    expected = dynamics_data(data.scales, seen[:-1], acted, seen[1:])
    torch.testing.assert_close((x[1, 1], y[1, 1]), expected)


def test_a_batch_adapts_to_one_episode_and_is_judged_on_another_of_the_same_system(data, tasks):
    number, episodes, steps, size = data.train.observation.shape
    # Every observation says which system and episode it is of; every action at which step it was.
    label = torch.arange(number)[:, None] * 100.0 + torch.arange(episodes)
    labelled = tasks.Episodes(
        label[:, :, None, None].expand(number, episodes, steps, size)
        + 1e-3 * torch.randn(number, episodes, steps, size),
        torch.arange(steps - 1.0)[:, None].expand_as(data.train.action),
        data.train.physics,
    )
    test = tasks.Episodes(labelled.observation[:1], labelled.action[:1], labelled.physics[:1])
    other = type(data)(replace(data.size, amount=replace(data.size.amount, held_out=1)), labelled, test)
    for batch in (other.batch(torch.Generator().manual_seed(0)), other.tested(other.train)):
        support_x, _, x, y = batch
        assert support_x.shape[1:3] == other.size.support
        assert y.shape[1:3] == other.size.query
        seen, asked = (
            part[..., :size] * other.scales.observation.std + other.scales.observation.mean for part in (support_x, x)
        )
        assert torch.equal((seen / 100).round().flatten(1)[:, 0], (asked / 100).round().flatten(1)[:, 0])
        which = [(part.mean((1, 2, 3)) % 100).round() for part in (seen, asked)]
        assert (which[0] != which[1]).all()
        steps_of = support_x[..., size:] * other.scales.action.std + other.scales.action.mean
        # Windows of the support follow each other: what one ends with, the next one goes on from.
        torch.testing.assert_close(steps_of[:, 1:, 0], steps_of[:, :-1, -1] + 1, rtol=1e-3, atol=1e-2)
    assert other.batch(torch.Generator().manual_seed(0), windows=6)[2].shape[1] == 6


def test_a_component_that_never_moves_is_refused(data, tasks):
    still = data.train.observation.clone()
    still[..., 3] = 1.0
    with pytest.raises(ValueError, match=r"must move in the training; \[3\] do not"):
        type(data)(data.size, data.train._replace(observation=still), data.test)


def test_that_nothing_changes_has_an_error_of_about_1(data, controls):
    for errors in controls.persistence_errors(data):
        assert 0.2 < sum(errors) / len(errors) < 5


def test_a_perfect_model_has_no_error_and_one_that_predicts_no_change_that_of_persistence(data, models, controls):
    class Still(torch.nn.Module):
        """Predicts that observations stay."""

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            change = data.scales.change
            return (-change.mean / change.std).expand(*x.shape[:-1], data.outputs) + self.w

    params = {"w": torch.zeros(len(data.test.action))}
    errors = models.errors(Still(), data, params, data.test, data.size.context)
    torch.testing.assert_close(
        torch.tensor(errors), torch.tensor(controls.persistence_errors(data)), rtol=1e-3, atol=1e-3
    )
    predicted = data.observed(data.test)[0][0, :, 5:]
    assert float(models.scaled(predicted, predicted, data.far).abs().max()) == 0.0


def test_physics_as_numbers(tasks):
    assert tasks.numbers_of({"gravity": 1.0}, 6).tolist() == [0.0]
    assert tasks.numbers_of({"disabled": (2, 3)}, 4).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert tasks.numbers_of({"disabled": 1}, 3).tolist() == [0.0, 1.0, 0.0]
    several = tasks.numbers_of({"mass": (1.0, torch.e), "damping": 1.0}, 2)  # in the order of their names
    torch.testing.assert_close(several, torch.tensor([0.0, 0.0, 1.0]))


def test_the_oracle_learns_from_the_very_system(data, models, controls):
    torch.manual_seed(0)
    params = dict(models.made("StateSpaceModel", data).named_parameters())
    untrained, trained = (
        controls.oracle_errors(with_size(data, oracle_steps=steps), "StateSpaceModel", params, seed=0)
        for steps in (0, 40)
    )
    assert sum(trained[0]) < 0.7 * sum(untrained[0])


def test_steps_move_weights_and_gains_at_rates_of_their_own_where_actuators_may_be_dead(data, models):
    model = models.made("MLP", data)
    assert model.gain.tolist() == [1.0] * 6
    torch.testing.assert_close(model.origin * data.scales.action.std + data.scales.action.mean, torch.zeros(6))
    assert [tuple(steps) for steps in models.steps_to_choose_from(data)] == [
        (rate, gain_rate) for rate in (0.0, 0.01, 0.1) for gain_rate in (0.0, 3.0) if rate + gain_rate > 0
    ]
    params = dict(model.named_parameters())
    rates = models.rates_of(models.Steps(0.1, 3.0), params)
    assert float(rates.pop("gain")) == 3.0
    assert [float(rate) for rate in rates.values()] == pytest.approx([0.1] * len(rates))
    assert set(models.rates_of(models.Steps(0.0, 3.0), params)) == {"gain"}
    numbers = type(data)(data.size, data.train, data.test)
    assert not hasattr(models.made("MLP", numbers), "gain")
    assert [tuple(steps) for steps in models.steps_to_choose_from(numbers)] == [(0.01, 0.0), (0.1, 0.0)]


def test_only_what_has_a_rate_moves_and_its_gradient_alone_is_clipped(data, models):
    torch.manual_seed(0)
    model = models.made("MLP", data)
    params = dict(model.named_parameters())
    x, y, *_ = data.tested(data.test)
    found = models.adapted(model, params, models.rates_of(models.Steps(0.0, 3.0), params), 1, x, y)
    for name, p in params.items():
        if name != "gain":
            torch.testing.assert_close(found[name], p.detach().expand_as(found[name]), rtol=0, atol=0)
    for n in range(len(x)):
        gradient = torch.autograd.grad(models.one_step(model, params, x[n], y[n]), params["gain"])[0]
        clipped = gradient / gradient.norm().clamp(min=1.0)
        torch.testing.assert_close(found["gain"][n], params["gain"].detach() - 3.0 * clipped)


def test_steps_are_chosen_on_the_systems_held_out(data, models):
    torch.manual_seed(0)
    model = models.made("MLP", data)
    params = {name: p.detach() for name, p in model.named_parameters()}
    choices = [models.Steps(0.0, 1e4), models.Steps(0.03, 0.0), models.Steps(1e4, 1e4)]  # the others go too far
    assert models.best_steps(model, data, params, choices) == choices[1]
    assert models.best_steps(model, data, params, choices[::-1]) == choices[1]


def test_maml_begins_with_weights_and_rates_that_it_is_given(data, models):
    learners = models.Learners("MLP", data)
    params = dict(models.made("MLP", data).named_parameters())
    learners.go_on_from(params, models.beginnings_of_maml(data)[1])
    rates = {name: float(rate.detach()) for name, rate in learners.rates.items()}
    assert rates.pop("gain") == data.size.gain_rate
    assert list(rates.values()) == pytest.approx([0.1] * len(rates))
    torch.testing.assert_close(learners.weights()[0], {name: p.detach() for name, p in params.items()})


def test_what_is_told_replaces_the_actions_of_dead_actuators_or_goes_in_beside_them(controls):
    x, dead = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([0.0, 1.0])
    assert controls.tell(x, dead, torch.tensor([-7.0, -8.0])).tolist() == [[1.0, 2.0, 3.0, -8.0]]
    assert controls.tell(x, dead, None).tolist() == [[1.0, 2.0, 3.0, 4.0, 0.0, 1.0]]


def test_a_model_that_is_told_the_physics_uses_those_of_the_system(data, tasks, controls):
    number, episodes, steps, size = 24, 3, 120, 4
    physics = torch.linspace(-1, 1, number)[torch.randperm(number, generator=torch.Generator().manual_seed(0))][:, None]
    # How an observation changes is what the physics are, and nothing else; noise makes components move.
    change = physics[:, :, None, None].expand(number, episodes, steps, size)
    start = torch.randn(number, episodes, 1, size, generator=torch.Generator().manual_seed(1))
    observation = torch.cat([start, start + change.cumsum(2)], 2)
    action = torch.randn(number, episodes, steps, 2, generator=torch.Generator().manual_seed(2))
    every = tasks.Episodes(observation, action, physics)
    amount = replace(data.size.amount, held_out=4)
    told = type(data)(replace(data.size, amount=amount, updates=40, batch=8), every, every)
    right = controls.told_errors(told, "MLP", seed=0)
    told.test = every._replace(physics=-physics)
    wrong = controls.told_errors(told, "MLP", seed=0)
    assert sum(right[0]) < 0.2 * sum(wrong[0])


def test_a_run_makes_a_table_and_goes_on_where_it_was_stopped(benchmark, data, models, tmp_path, capsys, monkeypatch):
    chosen = {"task": ("halfcheetah-joint",), "method": ("MLP",), "size": "tiny", "jobs": 1}
    arguments = benchmark.Arguments(**chosen, runs=tmp_path / "runs", out=tmp_path / "s.json")
    benchmark.main(arguments)
    first = json.loads(arguments.out.read_text())
    of_model = first["report"]["halfcheetah-joint"]["models"]["MLP"]
    assert set(of_model["errors"]) == {
        "(a) MAML, adapted",
        "(a) not yet adapted",
        "(b) all systems, adapted",
        "(c) all systems",
        "(b) by the best steps",
    }
    assert arguments.out.with_suffix(".png").stat().st_size > 10_000
    assert first["report"]["halfcheetah-joint"]["physics in the test"] == 1
    folder = tmp_path / "runs" / "tiny" / "runs" / "halfcheetah-joint-MLP-1"
    before = benchmark.load_checkpoint(folder).state["result"]
    joint, choices = before["joint"], models.steps_to_choose_from(data)
    assert joint["after"] == joint["after, any steps"][choices.index(models.Steps(**joint["steps"]))]
    shutil.rmtree(folder)
    capsys.readouterr()
    benchmark.main(arguments)
    told = capsys.readouterr().out
    assert "seed 1" in told
    assert "seed 0" not in told
    again = benchmark.load_checkpoint(folder).state["result"]
    measured = {"milliseconds", "megabytes"}
    for way in ("maml", "joint"):  # alone in its process as behind another seed
        assert {k: v for k, v in again[way].items() if k not in measured} == {
            k: v for k, v in before[way].items() if k not in measured
        }
    shutil.rmtree(folder)
    with pytest.raises(RuntimeError, match=r"results of seeds \[1\] are missing"):
        benchmark.results_of(benchmark.SIZES["tiny"], tmp_path / "runs" / "tiny", 2, ("halfcheetah-joint",), ("MLP",))
    monkeypatch.setitem(benchmark.SIZES, "tiny", replace(benchmark.SIZES["tiny"], updates=3))
    with pytest.raises(SystemExit, match="of other settings"):
        benchmark.main(arguments)


def test_what_is_not_known_is_refused(benchmark):
    with pytest.raises(SystemExit, match=r"--task must be among halfcheetah-gravity.*got moon"):
        benchmark.main(benchmark.Arguments(task=("moon",)))
    with pytest.raises(SystemExit, match="--seeds must be at least 2"):
        benchmark.main(benchmark.Arguments(seeds=1))


def test_hours_are_those_of_all_trainings(benchmark):
    models = {"one": [{"cpu seconds": 1800.0}] * 2, "other": [{"cpu seconds": 3600.0}]}
    assert benchmark.cpu_hours_of({"task": {"models": models}}) == 2.0


def test_the_report_compares_ways_seed_by_seed(import_benchmark):
    report = import_benchmark("serious_report")

    def ways(after, both, alone, *, any_steps=9.0, level=0.0, ran_away=0.0):
        of = lambda value: [[value + level, value + level + ran_away]] * 3  # noqa: E731
        cost = {"milliseconds": 1.0, "megabytes": None, "left out": 0}
        maml = {"after": of(after), "before": of(1.0), "rates": {"w": 0.1}, **cost}
        joint = {"after": of(both), "before": of(alone), **cost}
        steps = {"steps": {"rate": 0.1, "gain_rate": 0.0}, "after, any steps": [of(both), of(any_steps)]}
        return {"maml": maml, "joint": joint | steps, "parameters": 3, "cpu seconds": 7.0}

    def found(runs, **more):
        models = {"one": [{**run, **more} for run in runs]}
        return report.report({"task": {"persistence": [[1.0, 1.0]] * 3, "physics": 2, "models": models}})["task"]

    # Seeds differ by more than ways do, and every seed has the same order.
    clear = found([ways(0.3, 0.34, 0.4), ways(0.3, 0.35, 0.41, level=1.0), ways(0.3, 0.34, 0.4, level=2.0)])
    assert clear["models"]["one"]["ahead of (b) and (c)"] == [True] * 3
    assert clear["models"]["one"]["errors"]["(a) MAML, adapted"][0][2] > 1.4
    assert clear["models"]["one"]["cpu seconds"] == [7.0] * 3
    # Whole seeds are drawn again: from all of the lowest one to all of the highest.
    assert clear["models"]["one"]["bootstrap"]["(a) MAML, adapted"][0] == pytest.approx([1.3, 0.3, 2.3], abs=0.02)
    assert clear["physics in the test"] == 2
    # The best steps are those of each seed.
    best = found([ways(0.3, 0.5, 0.6, any_steps=0.4), ways(0.3, 0.2, 0.6, any_steps=0.7)])["models"]["one"]
    assert best["errors"]["(b) by the best steps"][0][0] == pytest.approx(0.3)
    assert best["less than"]["(b) by the best steps"][0][0] == pytest.approx(0.0)
    # In the mean (a) is better, in one seed it is not.
    unclear = found([ways(0.3, 0.5, 0.6), ways(0.3, 0.29, 0.6), ways(0.3, 0.4, 0.6)])
    assert unclear["models"]["one"]["ahead of (b) and (c)"] == [False] * 3
    assert unclear["oracle"] is None
    both = found([ways(0.3, 0.5, 0.7), ways(0.4, 0.5, 0.7)], oracle=[[0.2, 0.2]] * 3, told=[[0.25, 0.25]] * 3)
    mean, low, high = both["models"]["one"]["gap closed"][0]
    assert mean == pytest.approx(0.7)  # 0.8 and 0.6
    assert low < 0.6 < 0.8 < high
    assert both["told"][0][0] == pytest.approx(0.25)
    worse = found([ways(0.3, 0.5, 0.7), ways(0.3, 0.5, 0.7)], oracle=[[0.8, 0.8]] * 3, told=[[0.3, 0.3]] * 3)
    assert worse["models"]["one"]["gap closed"] == [None] * 3
    away = found([ways(0.3, 0.5, 0.7, ran_away=100.0), ways(0.3, 0.5, 0.7)])
    assert away["models"]["one"]["ran away"]["(b) all systems, adapted"] == 3
