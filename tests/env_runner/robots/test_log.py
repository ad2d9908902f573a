"""Where MuJoCo's messages go."""

from __future__ import annotations

import pytest

from ssmrl.env_runner.robots import RobotEnv

pytest.importorskip("mujoco.batch")


def test_nothing_is_written_into_the_working_directory_and_warnings_are_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", logger="ssmrl"):
        RobotEnv("HalfCheetah-v5")
    assert list(tmp_path.iterdir()) == []
    assert any("settotalmass" in record.message for record in caplog.records)
