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
    calls = []

    def trained(learner, data, made, total, generator, windows=None):
        calls.append((learner, made, total, windows, generator.get_state(), learners.weights()))

    monkeypatch.setattr(updates, "trained", trained)
    found = updates.of_seed(learners, 3)
    of = [(learner.inner_steps, made, total, windows) for learner, made, total, windows, *_ in calls]
    assert of == [(0, range(2), 2, None), (0, range(8), 8, None), (3, range(8), 8, None)]
    for *_, random, (weights, _) in calls:  # all of them begin alike
        torch.testing.assert_close(weights, calls[0][-1][0], rtol=0, atol=0)
        assert torch.equal(random, calls[0][-2])
    for way in (updates.NONE_FEW, updates.NONE_MANY):  # alike, as nothing was trained
        assert found[way] == found[updates.NONE_FEW]
        assert found[way] != found[way + updates.ADAPTED]
    assert len(found) == 5


def test_what_is_saved_stands_beside_them(updates, benchmark, tmp_path, monkeypatch):
    about = {"task": ("halfcheetah-gravity",), "size": "tiny", "jobs": 1, "runs": tmp_path / "runs"}
    arguments = updates.Arguments(**about, out=tmp_path / "updates.json")
    with pytest.raises(SystemExit, match=r"StateSpaceModel-0 must have a result .* run serious_benchmark.py"):
        updates.main(arguments)
    given = benchmark.Arguments(**about, method=(updates.MODEL,), out=tmp_path / "serious.json")
    benchmark.main(given)
    updates.main(arguments)
    of_model = json.loads(given.out.read_text())["report"]["halfcheetah-gravity"]["models"][updates.MODEL]
    figures = json.loads(arguments.out.read_text())
    assert figures["updates"] == {"few": 2, "many": 8}
    found = figures["report"]["halfcheetah-gravity"]
    for way in ("(a) MAML, adapted", "(b) all systems, adapted", "(c) all systems"):
        assert found["errors"][way] == of_model["errors"][way]
    mean, low, high = found["relative"][f"{updates.NONE_MANY}, adapted, to {updates.MAML_MANY}"][0]
    assert low < mean < high
    monkeypatch.setattr(updates, "of_seed", None)  # nothing is made again
    updates.main(arguments)
    assert json.loads(arguments.out.read_text())["report"] == figures["report"]
    with pytest.raises(ValueError, match="of these settings"):
        updates.saved(replace(benchmark.SIZES["tiny"], updates=3), tmp_path / "runs" / "tiny", "halfcheetah-gravity", 0)
