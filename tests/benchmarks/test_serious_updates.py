"""What equal gradients cost MAML: one beginning and the same queries for both trainings, beside what is saved."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("mujoco")


@pytest.fixture(scope="module")
def benchmark(import_benchmark):
    for name in ("serious_tasks", "serious_models", "serious_controls"):
        import_benchmark(name)
    return import_benchmark("serious_benchmark")


@pytest.fixture(scope="module")
def updates(import_benchmark, benchmark):
    return import_benchmark("serious_updates")


def test_the_trainings_differ_in_inner_steps_and_in_the_number_of_updates(updates, benchmark, tmp_path, monkeypatch):
    size = benchmark.SIZES["tiny"]
    learners = updates.Learners(updates.MODEL, benchmark.data_of(size, tmp_path, "halfcheetah-gravity"))
    shared = updates.shared_part(learners, 3)
    calls = []

    def trained(learner, data, made, total, generator, windows=None):
        empty = not learner.outer_step.optimizer.state
        calls.append((learner.inner_steps, made, total, windows, empty, generator.get_state(), learners.weights()))
        with torch.no_grad():  # as a training that goes far
            for p in [*learners.model.parameters(), *learners.rates.values()]:
                p.mul_(0.5 + 0.1 * len(calls))
        learner.outer_step.optimizer.state["step"] = 1

    monkeypatch.setattr(updates, "trained", trained)
    found = updates.of_seed(learners, 3)
    assert [call[:4] for call in calls] == [(0, range(2), 2, None), (0, range(8), 8, None), (3, range(8), 8, None)]
    for *_, empty, random, (weights, rates) in calls:  # all of them begin alike, where both halves meet
        torch.testing.assert_close(weights, shared, rtol=0, atol=0)
        assert len(set(map(float, rates.values()))) == 1
        assert rates == calls[0][-1][1]
        assert torch.equal(random, calls[0][-2])
        assert empty
    for way in (updates.NONE_FEW, updates.NONE_MANY):
        assert found[way] != found[way + updates.ADAPTED]
    assert found[updates.NONE_FEW] != found[updates.NONE_MANY]
    assert set(found) == {*updates.NONE, updates.MAML_MANY + updates.ADAPTED}


def test_what_is_saved_stands_beside_them(updates, benchmark, tmp_path, monkeypatch):
    task, size = "halfcheetah-gravity", benchmark.SIZES["tiny"]
    about = {"task": (task,), "size": "tiny", "jobs": 1, "runs": tmp_path / "runs"}
    arguments = updates.Arguments(**about, out=tmp_path / "updates.json")
    with pytest.raises(SystemExit, match=r"StateSpaceModel-0 must have a result .* run serious_benchmark.py"):
        updates.main(arguments)
    given = benchmark.Arguments(**about, method=(updates.MODEL,), out=tmp_path / "serious.json")
    benchmark.main(given)
    updates.main(arguments)
    of_model = json.loads(given.out.read_text())["report"][task]["models"][updates.MODEL]
    figures = json.loads(arguments.out.read_text())
    assert figures["updates"] == {"few": 2, "many": 8}
    found, runs = figures["report"][task], tmp_path / "runs" / "tiny"
    for way in ("(a) MAML, adapted", "(b) all systems, adapted", "(c) all systems"):
        assert found["errors"][way] == of_model["errors"][way]

    folders = [runs / "updates" / f"{task}-{seed}" for seed in range(2)]
    kept = [benchmark.load_checkpoint(folder).state for folder in folders]
    both = [
        updates.of_seeds([one["errors"][way] for one in kept])
        for way in (updates.NONE[3], updates.MAML_MANY + ", adapted")
    ]
    assert found["of MAML"][updates.MAML_MANY][updates.NONE[3]][1][0] == pytest.approx(
        float((both[0] / both[1]).mean(0)[1])
    )

    monkeypatch.setattr(updates, "of_seed", None)  # in this process nothing is made again
    assert updates.make(size, runs, 2, task)[1] == found
    updates.save_checkpoint(folders[1], 1, {**kept[1], "errors": {"another way": kept[1]["errors"][updates.NONE_FEW]}})
    with pytest.raises(ValueError, match="of other settings"):
        updates.make(size, runs, 2, task)
    with pytest.raises(ValueError, match="of these settings"):
        updates.saved(replace(size, updates=3), runs, task, 0)
