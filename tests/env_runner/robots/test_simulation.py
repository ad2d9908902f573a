"""What robots cannot go on from; that their simulation is a loop bit for bit is in tests/env_runner/test_native.py."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from ssmrl.env_runner import Environment, UnstableSimulationError

pytest.importorskip("mujoco.batch")


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_an_unstable_simulation_names_its_row_and_task(kind):
    tasks = [{"gravity": 1.0}, {"gravity": 1e12}]
    environment = Environment("ssmrl/Walker2d-v5", tasks=tasks, seed=0, vectorization_mode=kind)
    environment.reset()
    message = r"row 1 .*'gravity': 1000000000000" if kind == "native" else "'gravity': 1000000000000"
    with pytest.raises(UnstableSimulationError, match=message):
        deque((environment.step(np.zeros((2, 6), np.float32)) for _ in range(20)), maxlen=0)
