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
def benchmark(import_benchmark, tasks, models):
    return import_benchmark("serious_benchmark")


@pytest.fixture(scope="module")
def data(benchmark, models, tasks, tmp_path_factory):
    size = benchmark.SIZES["tiny"]
    return models.Data(size, *tasks.collected("halfcheetah-joint", size.amount, tmp_path_factory.mktemp("data")))


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


def test_a_batch_adapts_to_one_episode_and_is_judged_on_another(data):
    support_x, support_y, _, y = data.batch(torch.Generator().manual_seed(0))
    number = data.size.batch
    assert support_x.shape == (number, *data.size.support, data.inputs)
    assert y.shape == (number, *data.size.query, data.outputs)
    # Windows of the support follow each other: what one ends with, the next one begins with.
    observed = support_x[..., : data.outputs]
    end = observed[:, :-1, -1] * data.scales.observation.std + data.scales.observation.mean
    end = end + data.scales.change.restore(support_y[:, :-1, -1])
    begin = observed[:, 1:, 0] * data.scales.observation.std + data.scales.observation.mean
    torch.testing.assert_close(end, begin, rtol=1e-3, atol=1e-3)
    assert data.batch(torch.Generator().manual_seed(0), windows=6)[2].shape[1] == 6


def test_that_nothing_changes_has_an_error_of_about_1(data, models):
    for errors in models.persistence_errors(data):
        assert 0.2 < sum(errors) / len(errors) < 5


def test_a_perfect_model_has_no_error_and_one_that_predicts_no_change_that_of_persistence(data, models):
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
        torch.tensor(errors), torch.tensor(models.persistence_errors(data)), rtol=1e-3, atol=1e-3
    )
    predicted = data.observed(data.test)[0][0, :, 5:]
    assert float(models.scaled(predicted, predicted, data.far).abs().max()) == 0.0


def test_physics_as_numbers(tasks):
    assert tasks.numbers_of({"gravity": 1.0}, 6).tolist() == [0.0]
    assert tasks.numbers_of({"disabled": (2, 3)}, 4).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert tasks.numbers_of({"disabled": 1}, 3).tolist() == [0.0, 1.0, 0.0]
    several = tasks.numbers_of({"mass": (1.0, torch.e), "damping": 1.0}, 2)  # in the order of their names
    torch.testing.assert_close(several, torch.tensor([0.0, 0.0, 1.0]))


def test_the_oracle_learns_from_the_very_system(data, models):
    torch.manual_seed(0)
    params = dict(models.MODELS["StateSpaceModel"](data.inputs, data.outputs).named_parameters())
    data.size, size = replace(data.size, oracle_steps=40), data.size
    trained = models.oracle_errors(data, "StateSpaceModel", params, seed=0)
    data.size = replace(data.size, oracle_steps=0)
    untrained = models.oracle_errors(data, "StateSpaceModel", params, seed=0)
    data.size = size
    assert sum(trained[0]) < 0.7 * sum(untrained[0])


def test_a_model_that_is_told_the_physics_uses_them(data, models):
    told = models.Told(models.MODELS["MLP"](data.inputs + 2, data.outputs), 2)
    x = torch.randn(3, 5, data.inputs)
    one, other = (
        torch.func.functional_call(told, {"physics": p}, (x,))[0] for p in (torch.zeros(2), torch.tensor([0.0, 1.0]))
    )
    assert (one - other).abs().max() > 1e-3
    found = models.told_errors(data, "MLP", seed=0)
    assert [len(errors) for errors in found] == [len(data.test.action)] * 3
    assert found == models.told_errors(data, "MLP", seed=0)


def test_a_run_makes_a_table_and_goes_on_where_it_was_stopped(benchmark, tmp_path, capsys):
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
    }
    assert arguments.out.with_suffix(".png").stat().st_size > 10_000
    shutil.rmtree(tmp_path / "runs" / "tiny" / "runs" / "halfcheetah-joint-MLP-1")
    benchmark.main(arguments)
    assert "seed 1" in capsys.readouterr().out
    again = json.loads(arguments.out.read_text())
    assert again["report"]["halfcheetah-joint"]["models"]["MLP"]["errors"] == of_model["errors"]
    size = replace(benchmark.SIZES["tiny"], updates=3)
    with pytest.raises(SystemExit, match="of other settings"):
        benchmark.make(size, tmp_path / "runs" / "tiny", 2, ("halfcheetah-joint", "MLP"))


def test_what_is_not_known_is_refused(benchmark):
    with pytest.raises(SystemExit, match=r"--task must be among halfcheetah-gravity.*got moon"):
        benchmark.main(benchmark.Arguments(task=("moon",)))
    with pytest.raises(SystemExit, match="--seeds must be at least 2"):
        benchmark.main(benchmark.Arguments(seeds=1))


def test_the_report_says_what_is_ahead(import_benchmark):
    report = import_benchmark("serious_report")

    def ways(after, before, both, alone):
        of = lambda value: [[value, value + 0.1]] * 3  # noqa: E731
        maml = {"after": of(after), "before": of(before), "milliseconds": 1.0, "left out": 0, "seconds": 1.0}
        joint = {"after": of(both), "before": of(alone), "left out": 0, "seconds": 1.0, "rate": 0.1}
        return {"maml": maml, "joint": joint, "parameters": 3, "megabytes": 1.0, "oracle": of(0.2)}

    found = report.report(
        {
            "task": {
                "persistence": [[1.0, 1.0]] * 3,
                "models": {"good": [ways(0.3, 0.6, 0.5, 0.7)] * 2, "bad": [ways(0.5, 0.6, 0.4, 0.7)] * 2},
            }
        }
    )["task"]
    assert found["models"]["good"]["ahead of (b) and (c)"] == [True] * 3
    assert found["models"]["bad"]["ahead of (b) and (c)"] == [False] * 3
    assert found["models"]["good"]["gap closed"] == pytest.approx([0.8] * 3)
    assert found["persistence"] == [1.0] * 3
