"""Model files: atomic, checked, and without pickle."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch
from torch import nn

from ssmrl.core import StateSpaceModel
from ssmrl.core.serialization import read_model_file, write_model_file


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    StateSpaceModel(4, 3, 2, 5).save(path)
    return path


def test_the_file_is_plain_safetensors_with_a_json_header(saved):
    tensors = safetensors.torch.load_file(saved)
    assert tensors["state_input.weight"].shape == (4, 3)
    with safetensors.safe_open(saved, framework="pt") as file:
        header = file.metadata()
    assert header["class"] == "StateSpaceModel"
    assert json.loads(header["arguments"]) == {"state_dim": 4, "input_dim": 3, "output_dim": 2, "hidden_dim": 5}


def test_every_flipped_byte_of_the_weights_is_noticed(saved):
    content = saved.read_bytes()
    for position in range(len(content) - 40, len(content), 7):
        saved.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(ValueError, match="damaged: its contents do not match its checksum"):
            StateSpaceModel.load(saved)


def test_changed_arguments_are_noticed(saved):
    content = saved.read_bytes()
    assert content.count(b'\\"hidden_dim\\": 5') == 1
    saved.write_bytes(content.replace(b'\\"hidden_dim\\": 5', b'\\"hidden_dim\\": 6'))
    with pytest.raises(ValueError, match="damaged: its contents do not match its checksum"):
        StateSpaceModel.load(saved)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model.safetensors' is damaged or no safetensors file"):
        StateSpaceModel.load(saved)


def test_a_pickle_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        StateSpaceModel.load(tmp_path / "weights.pt")


def test_somebody_elses_safetensors_file_is_refused(tmp_path):
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"was not written by save\(\).*got None"):
        StateSpaceModel.load(tmp_path / "foreign.safetensors")


def test_another_class_is_refused_by_name(tmp_path):
    write_model_file(tmp_path / "gru", "GRU", {"state_dim": 1}, {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"holds a GRU, not a StateSpaceModel; load it with GRU\.load"):
        StateSpaceModel.load(tmp_path / "gru")


@pytest.mark.parametrize(
    ("arguments", "tensors"),
    [
        ({"state_dim": 4, "unknown": 1}, {"w": torch.zeros(2)}),
        ({"state_dim": 4, "input_dim": 3, "output_dim": 2}, {"w": torch.zeros(2)}),
        ({"state_dim": -4, "input_dim": 3, "output_dim": 2}, {"w": torch.zeros(2)}),
    ],
)
def test_contents_that_do_not_fit_the_class_are_one_clear_error(tmp_path, arguments, tensors):
    write_model_file(tmp_path / "odd", "StateSpaceModel", arguments, tensors)
    with pytest.raises(ValueError, match="odd' does not fit this version of StateSpaceModel"):
        StateSpaceModel.load(tmp_path / "odd")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no model file at .*missing"):
        StateSpaceModel.load(tmp_path / "missing")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    before = saved.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        StateSpaceModel(4, 3, 2, 5).save(saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_tensors_of_every_kind_survive(tmp_path):
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "bfloat16": torch.randn(3).bfloat16(),
        "integers": torch.arange(4).view(2, 2).T,
    }
    write_model_file(tmp_path / "f", "C", {"a": 1}, tensors)
    arguments, loaded = read_model_file(tmp_path / "f", "C")
    assert arguments == {"a": 1}
    for name, value in tensors.items():
        assert torch.equal(loaded[name], value)
        assert loaded[name].dtype == value.dtype


def test_load_puts_the_model_on_the_device(saved):
    assert StateSpaceModel.load(saved, device="meta").state_input.weight.is_meta
    assert StateSpaceModel.load(saved).state_input.weight.device.type == "cpu"
