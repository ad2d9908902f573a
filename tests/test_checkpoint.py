from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ssmrl import checkpoint
from ssmrl.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from ssmrl.env_runner import Environment, task_family

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
DTYPES = [torch.bool, *FLOATS, *INTEGERS, *FLOAT8]
FILES = ["tensors.safetensors", "state.json", "manifest.json"]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """That everything is flushed has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def require_same(a: Any, b: Any) -> None:
    """Of one type and structure, leaves bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        assert [type(key) for key in a] == [type(key) for key in b]
        for key in a:
            require_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            require_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, b.device.type, b.requires_grad) == (b.dtype, b.shape, "cpu", False)
        assert torch.equal(bits(a), bits(b))
    elif isinstance(a, (np.ndarray, np.generic)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, float):
        assert struct.pack("d", a) == struct.pack("d", b)
    else:
        assert a == b


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def state_of(n: int) -> dict[str, Any]:
    """A state whose every part says n."""
    return {
        "n": n,
        "x": torch.full((300,), float(n)),
        "c": torch.full((2,), n, dtype=torch.complex128),
        "a": np.full(3, n, ">i4"),
        "list": [n, (str(n), float(n), {n: bytes([n % 256])}), 2**100 + n, float("inf")],
    }


def there(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in the order of saves."""
    return [int(name[:12]) for name in sorted(os.listdir(folder), key=lambda name: name[13:]) if name[0] == "0"]


def loaded(folder: Path, step: int | None = None) -> Checkpoint:
    found = load_checkpoint(folder, step)
    assert found is not None
    return found


def sign(path: Path, **changes: Any) -> None:
    """Make the manifest fit what is in a checkpoint, as one who wants to harm would."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in FILES[:2]:
        content = (path / name).read_bytes()
        manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


# What comes back


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = int(np.prod(shape, dtype=int)) * torch.empty((), dtype=dtype).element_size()
    content = bytearray(draw(st.binary(min_size=count, max_size=count)))
    if dtype is torch.bool:
        content = bytearray(x & 1 for x in content)
    flat = torch.frombuffer(content, dtype=dtype) if count else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


NUMPY_DTYPES = st.one_of(
    hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes(sizes=(16, 32, 64))
) | hnp.complex_number_dtypes(sizes=(64, 128))
ARRAYS = hnp.arrays(NUMPY_DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
TEXT = st.text(st.characters(), max_size=5)
KEYS = TEXT | st.integers(-(2**70), 2**70)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    TEXT,
    st.binary(max_size=5),
    tensors(),
    ARRAYS,
    hnp.arrays(NUMPY_DTYPES, 1).map(lambda array: array[0]),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(state=TREES)
def test_a_tree_comes_back_bit_for_bit(state, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    path = save_checkpoint(folder, 7, state)
    found = loaded(folder)
    assert found[:2] + found[2:] == found
    assert (found.step, found.path, found.skipped) == (7, path, ())
    require_same(state, found.state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_and_layout_come_back(dtype, tmp_path):
    whole = torch.arange(24).reshape(4, 6).to(torch.float32).to(dtype)
    state = [whole, whole.T, whole[1, 1], whole[:0], whole[::2, 1:3], whole[:1].expand(3, 6), whole[0], whole[0]]
    save_checkpoint(tmp_path, 0, state)
    require_same(state, loaded(tmp_path).state)


def test_conjugate_and_negative_views_come_back(tmp_path):
    z = torch.tensor([1 + 2j, 3 - 4j])
    save_checkpoint(tmp_path, 0, [z.conj(), z.conj().imag])
    conjugate, negative = loaded(tmp_path).state
    assert conjugate.tolist() == [1 - 2j, 3 + 4j]
    assert negative.tolist() == [-2, 4]


def test_gradients_and_shared_memory_are_not_kept(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    save_checkpoint(tmp_path, 0, [parameter, parameter.data, np.ones(2)])
    first, second, array = loaded(tmp_path).state
    assert type(first) is torch.Tensor
    assert not first.requires_grad
    first[0], array[0] = 5, 5
    assert second.tolist() == parameter.tolist() == [1, 1]


@pytest.mark.parametrize(
    "number",
    [2**53 - 1, 2**53, -(2**53), 2**128 - 1, -(10**5000), 0.1, -0.0, 5e-324, float("inf"), -float("inf")]
    + [struct.unpack(">d", bytes.fromhex(digits))[0] for digits in ("7ff8000000000000", "fff8000000001234")],
    ids=lambda number: str(type(number)),
)
def test_numbers_come_back_exactly(number, tmp_path):
    save_checkpoint(tmp_path, 0, number)
    require_same(number, loaded(tmp_path).state)


def test_two_surrogates_stay_two(tmp_path):
    save_checkpoint(tmp_path, 0, {"\ud83d\ude00": "\ud83d\ude00 \U0001f600"})
    require_same({"\ud83d\ude00": "\ud83d\ude00 \U0001f600"}, loaded(tmp_path).state)


@pytest.mark.parametrize("name", ["PCG64", "MT19937", "Philox", "SFC64"])
def test_numpys_generators_go_on(name, tmp_path):
    bit_generator = getattr(np.random, name)(3)
    generator = np.random.Generator(bit_generator)
    generator.integers(10, size=3, dtype=np.uint32)
    save_checkpoint(tmp_path, 0, dict(bit_generator.state))
    expected = generator.standard_normal(5)
    bit_generator.state = loaded(tmp_path).state
    np.testing.assert_array_equal(generator.standard_normal(5), expected)


def test_torchs_generators_go_on(tmp_path):
    generator = torch.Generator().manual_seed(1)
    save_checkpoint(tmp_path, 0, generator.get_state())
    expected = torch.randn(5, generator=generator)
    generator.set_state(loaded(tmp_path).state)
    assert torch.equal(torch.randn(5, generator=generator), expected)


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_environments_go_on(kind, tmp_path):
    def made(seed):
        tasks = family.sample(2, seed=seed)
        environment = Environment(family, tasks=tasks, seed=seed, vectorization_mode=kind, max_episode_steps=4)
        environment.reset()
        return environment

    family = task_family("cartpole-physics")
    environment, other = made(0), made(1)
    environment.step(np.array([0, 1]))
    save_checkpoint(tmp_path, 0, environment.save())
    other.restore(loaded(tmp_path).state)
    for t in range(9):
        for a, b in zip(environment.step(np.array([t % 2, 1])), other.step(np.array([t % 2, 1])), strict=True):
            np.testing.assert_equal(a, b)


def train(folder: Path, num_steps: int) -> list[float]:
    """Go on from what is in the folder."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    generator = torch.Generator().manual_seed(1)
    found, first = load_checkpoint(folder), 0
    if found is not None:
        first = found.step
        model.load_state_dict(found.state["model"])
        optimizer.load_state_dict(found.state["optimizer"])
        schedule.load_state_dict(found.state["schedule"])
        generator.set_state(found.state["generator"])
    losses = []
    for step in range(first + 1, first + num_steps + 1):
        x = torch.randn(16, 3, generator=generator)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        save_checkpoint(folder, step, {**state, "generator": generator.get_state()})
    return losses


def test_two_times_3_steps_of_adam_are_6(tmp_path):
    whole = train(tmp_path / "whole", 6)
    assert train(tmp_path / "halves", 3) + train(tmp_path / "halves", 3) == whole
    require_same(loaded(tmp_path / "whole").state, loaded(tmp_path / "halves").state)


# What is refused


class Pair(NamedTuple):
    a: int
    b: int


class Named(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "leaf",
    [
        Pair(1, 2),
        Named("a"),
        {1, 2},
        object(),
        1j,
        bytearray(b"a"),
        torch.Size([1]),
        torch.float32,
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
        np.array([None]),
        np.array(["a"]),
        np.ma.masked_array([1]),
        np.zeros(1, [("a", int)]),
        np.datetime64("2020-01-01"),
        np.longdouble(1),
        np.str_("a"),
        lambda: None,
    ],
    ids=lambda leaf: type(leaf).__name__,
)
def test_another_type_is_named_with_its_place_and_leaves_no_trace(leaf, tmp_path):
    with pytest.raises(
        TypeError, match=r"^state\['a'\]\[3\]\[1\] is of a type that is not saved: .*" + type(leaf).__name__
    ):
        save_checkpoint(tmp_path / "folder", 0, {"a": [0, 1, 2, {1: leaf}]})
    assert not (tmp_path / "folder").exists()


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning", "ignore:ComplexHalf:UserWarning")
def test_quantized_and_complex32_tensors_are_refused(tmp_path):
    for tensor in (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), torch.ones(1, dtype=torch.complex32)):
        with pytest.raises(TypeError, match=rf"^state is of a type that is not saved: torch.Tensor {tensor.dtype}"):
            save_checkpoint(tmp_path, 0, tensor)


@pytest.mark.parametrize("key", [None, True, 1.0, (1,), b"a", np.int64(1), Named("a")], ids=repr)
def test_another_type_of_key_is_named_with_its_place(key, tmp_path):
    with pytest.raises(TypeError, match=r"keys of a dict must be of type str or int; those of state\[0\] are "):
        save_checkpoint(tmp_path, 0, [{key: 1}])


def test_a_tree_that_is_too_deep_or_has_a_cycle_is_refused(tmp_path):
    deep: list[Any] = []
    for _ in range(99):
        deep = [deep, 0]
    save_checkpoint(tmp_path, 0, [*deep, 0])
    require_same(loaded(tmp_path).state, [*deep, 0])
    cycle: list[Any] = [{}]
    cycle[0]["a"] = cycle
    with pytest.raises(ValueError, match=r"nested at most 100 deep; state\[0\]\['a'\]\[0\].* is deeper"):
        save_checkpoint(tmp_path, 0, cycle)


@pytest.mark.parametrize("step", [-1, 1.0, True, None, "1", 10**12])
def test_a_wrong_step_is_refused(step, tmp_path):
    with pytest.raises(ValueError, match="`step` must be an integer from 0"):
        save_checkpoint(tmp_path, step, 0)


@pytest.mark.parametrize("keep", [0, -1, 1.0, True, None])
def test_a_wrong_keep_is_refused(keep, tmp_path):
    with pytest.raises(ValueError, match="`keep` must be a positive integer"):
        save_checkpoint(tmp_path, 0, 0, keep=keep)


# Which are there


def test_without_a_checkpoint_there_is_none(tmp_path):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "missing") is None
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").write_text("ours")
    assert load_checkpoint(str(tmp_path)) is None


def test_a_step_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of step 4"):
        load_checkpoint(tmp_path, 4)
    save_checkpoint(tmp_path, 3, "a")
    with pytest.raises(CheckpointError, match="no checkpoint of step 4"):
        load_checkpoint(tmp_path, 4)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_keep_are_kept_and_nothing_else_is_there(keep, tmp_path):
    (tmp_path / "notes").mkdir()
    for step in range(5):
        path = save_checkpoint(tmp_path, step, state_of(step), keep=keep)
        assert (tmp_path / "latest").read_text() == path.name + "\n"
        assert sorted(os.listdir(path)) == sorted(FILES)
        expected = list(range(max(0, step - keep + 1), step + 1))
        assert there(tmp_path) == expected
        assert len(os.listdir(tmp_path)) == len(expected) + 2
        for old in expected:
            require_same(loaded(tmp_path, old).state, state_of(old))


def test_saving_a_step_again_replaces_it_and_no_other(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state_of(step))
    first = loaded(tmp_path, 2).path
    save_checkpoint(tmp_path, 2, "again")
    assert there(tmp_path) == [1, 3, 2]
    assert not first.exists()
    assert loaded(tmp_path, 2).state == loaded(tmp_path).state == "again"


def test_a_run_that_went_back_goes_on_from_what_it_saved_last(tmp_path):
    for step in (8, 9, 10, 4):
        save_checkpoint(tmp_path, step, step)
    assert there(tmp_path) == [9, 10, 4]
    assert loaded(tmp_path).step == 4


def test_more_than_a_million_saves_stay_in_order(tmp_path):
    path = save_checkpoint(tmp_path, 1, "old")
    path.rename(tmp_path / "000000000001-999999")
    assert save_checkpoint(tmp_path, 0, "new").name == "000000000000-1000000"
    assert loaded(tmp_path).state == "new"


def test_what_is_not_ours_is_left_alone(tmp_path):
    theirs = [".000000000001-000001.partial.txt", "000000000001", "1-1", ".partial", "latest.partial"]
    for name in theirs:
        (tmp_path / name).write_text("theirs")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("theirs")
    (tmp_path / ".000000000001-000001.partial").symlink_to(outside)
    (tmp_path / "000000000001-000001").symlink_to(outside)
    for step in range(5):
        save_checkpoint(tmp_path, step, step, keep=1)
    assert (tmp_path / "000000000001-000001").is_symlink()
    assert not os.path.lexists(tmp_path / ".000000000001-000001.partial")
    assert [(tmp_path / name).read_text() for name in theirs] == ["theirs"] * 5
    assert (outside / "file").read_text() == "theirs"


# Damage


def test_a_damaged_newest_one_is_named_and_the_one_before_is_used(tmp_path):
    paths = [save_checkpoint(tmp_path, step, state_of(step)) for step in (1, 2, 3)]
    (paths[2] / "state.json").unlink()
    (paths[1] / "tensors.safetensors").write_bytes(b"")
    found = loaded(tmp_path)
    require_same(found.state, state_of(1))
    assert len(found.skipped) == 2
    assert f"'{paths[2]}' is damaged: " in found.skipped[0]
    assert "state.json" in found.skipped[0]
    assert f"'{paths[1]}' is damaged: " in found.skipped[1]
    assert "'tensors.safetensors' is {'bytes': " in found.skipped[1]
    save_checkpoint(tmp_path, 3, state_of(3))
    assert loaded(tmp_path).skipped == ()


@pytest.mark.parametrize("text", ["[]", "5", "null", '"a"', "{}", "[[1,2]]"])
def test_if_all_are_damaged_all_are_named(text, tmp_path):
    paths = [save_checkpoint(tmp_path, step, step) for step in (1, 2)]
    for path in paths:
        (path / "manifest.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=rf"is valid.*{paths[1].name}.*manifest.json.*{paths[0].name}.*manifest.json"
    ):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=paths[0].name):
        load_checkpoint(tmp_path, 1)


def test_a_newest_one_that_is_lost_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, "first")
    path = save_checkpoint(tmp_path, 2, "second")
    shutil.rmtree(path)
    found = loaded(tmp_path)
    assert found.state == "first"
    assert path.name in found.skipped[0]
    assert "No such file" in found.skipped[0]
    assert save_checkpoint(tmp_path, 2, "again").name > path.name


@pytest.mark.parametrize("text", ["../../outside", "", "x" * 10**6, "000000000001-000001\n\n", "\udcff"])
def test_a_damaged_latest_leads_nowhere(text, tmp_path):
    save_checkpoint(tmp_path, 1, "state")
    (tmp_path / "latest").write_bytes(text.encode("utf-8", "surrogateescape"))
    found = loaded(tmp_path)
    assert (found.state, found.skipped) == ("state", ())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["gone", "empty", "half", "longer", "bit", "link", "pipe", "directory", "other"])
def test_a_damaged_file_is_named(kind, name, tmp_path):
    path, other = save_checkpoint(tmp_path / "a", 1, state_of(1)), save_checkpoint(tmp_path / "b", 2, state_of(2))
    file = path / name
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 4
    file.rename(tmp_path / "original")
    match kind:
        case "empty":
            file.write_bytes(b"")
        case "half":
            file.write_bytes((tmp_path / "original").read_bytes()[: len(content) // 2])
        case "longer":
            file.write_bytes((tmp_path / "original").read_bytes() + b"\0")
        case "bit":
            file.write_bytes(content)
        case "link":
            file.symlink_to(tmp_path / "original")
        case "pipe":
            os.mkfifo(file)
        case "directory":
            file.mkdir()
        case "other":
            shutil.copy(other / name, file)
    what = "step" if (kind, name) == ("other", "manifest.json") else name
    with pytest.raises(CheckpointError, match=rf"'{path}' is damaged: .*{what}"):
        load_checkpoint(tmp_path / "a")


def test_swapped_checkpoints_are_found(tmp_path):
    first, second = (save_checkpoint(tmp_path, step, state_of(step)) for step in (1, 2))
    first.rename(tmp_path / "between")
    second.rename(first)
    (tmp_path / "between").rename(second)
    with pytest.raises(CheckpointError, match=r"'step' is 1; it is 2.*'step' is 2; it is 1"):
        load_checkpoint(tmp_path)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    path = save_checkpoint(tmp_path / "outside", 1, state_of(1))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="it is not a directory"):
        load_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("name", ["../state.json", "/etc/passwd", "..\\state.json", "more.json"])
def test_a_manifest_of_other_files_is_refused(name, tmp_path):
    path = save_checkpoint(tmp_path, 1, state_of(1))
    sign(path, **{name: {"bytes": 1, "sha256": "0"}})
    with pytest.raises(CheckpointError, match=r"manifest.json says that .* it is None"):
        load_checkpoint(tmp_path)


def test_a_format_that_is_not_known_is_named(tmp_path):
    path = save_checkpoint(tmp_path, 1, state_of(1))
    sign(path, format="ssmrl checkpoint 2")
    with pytest.raises(CheckpointError, match="'format' is 'ssmrl checkpoint 2'; it is 'ssmrl checkpoint 1'"):
        load_checkpoint(tmp_path)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("written", [pickle.dumps, None], ids=["pickle", "torch.save"])
def test_a_pickle_with_the_right_name_is_not_executed(written, name, tmp_path):
    path = save_checkpoint(tmp_path / "a", 1, state_of(1))
    if written is None:
        torch.save(Bomb(tmp_path / "executed"), path / name)
    else:
        (path / name).write_bytes(written(Bomb(tmp_path / "executed")))
    for signed in (False, True):
        if signed and name != "manifest.json":
            sign(path)
        with pytest.raises(CheckpointError, match="is damaged"):
            load_checkpoint(tmp_path / "a")
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000 + "]" * 100_000, "recursion"),
        ("[" * 200 + "]" * 200, "nested more than 100 deep"),
        ('{"tuple":[' * 150 + "]}" * 150, "nested more than 100 deep"),
        ("{}", "state is not a value: {}"),
        ('{"tuple":[],"dict":[]}', "state is not a value"),
        ('[{"set":[1]}]', r"state\[0\] is not a value"),
        ('{"tuple":3}', "state is not a value"),
        ('{"int":7}', "state is not a value"),
        ('{"int":"zz"}', "invalid literal"),
        ('{"int":"__import__"}', "invalid literal"),
        ('{"float":"00"}', "unpack requires"),
        ('{"bytes":"0"}', "fromhex"),
        ('{"str":"ff"}', "decode"),
        ('{"dict":[[1]]}', "not enough values"),
        ('{"dict":[[[1],1]]}', "nested more|another type"),
        ('{"dict":[[1.5,1]]}', "state has a key of another type"),
        ('{"dict":[[true,1]]}', "state has a key of another type"),
        ('{"dict":[["a",1],["a",2]]}', "state has a key of another type, or one twice: 'a'"),
        ('{"dict":{"a":1}}', "state is not a value"),
        ('{"tensor":"float32"}', "must hold state as 'float32'"),
        ('{"tensor":"load"}', "must hold state as 'load'"),
        ('{"array":"O"}', "state is not a value"),
        ('{"array":"<f4,<f4"}', "state is not a value"),
        ('{"array":"<f4"}', "must hold state as 'float32'"),
        ("nonsense", "Expecting value"),
    ],
    ids=lambda text: text[:20],
)
def test_a_hostile_state_is_refused(text, match, tmp_path):
    path = save_checkpoint(tmp_path, 1, None)
    (path / "state.json").write_text(text)
    sign(path)
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(tmp_path)


def header(tensors: dict[str, Any], content: bytes = b"", size: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


def entry(shape: list[int], end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (header({"state": entry([2**40], 2**42)}), "is damaged"),
        (header({"state": entry([2**62, 2**62], 4)}, bytes(4)), "is damaged"),
        (header({"state": entry([0, 2**62, 2**62], 0)}), "is damaged"),
        (header({}, size=2**63), "is damaged"),
        (header({"state": entry([1], 4), "more": entry([1], 4)}, bytes(8)), "is damaged"),
        (header({"state": entry([1], 4)}, bytes(8)), "is damaged"),
        (header({"state": entry([1], 4, "I32")}, bytes(4)), "must hold state as 'float32'"),
        (header({"../state": entry([1], 4)}, bytes(4)), "must hold state as 'float32'"),
        (header({}), "must hold state as 'float32'"),
    ],
)
def test_hostile_tensors_are_refused(content, match, tmp_path):
    path = save_checkpoint(tmp_path, 1, torch.ones(1))
    (path / "tensors.safetensors").write_bytes(content)
    sign(path)
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(tmp_path)


def test_tensors_that_are_not_in_the_tree_are_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, torch.ones(1))
    (path / "state.json").write_text("1")
    sign(path)
    with pytest.raises(CheckpointError, match=r"holds what is not in state.json: \['state'\]"):
        load_checkpoint(tmp_path)


def only_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(only_plain, value))
    if isinstance(value, dict):
        return all(map(only_plain, value.values()))
    allowed = (type(None), bool, int, float, str, bytes, torch.Tensor, np.ndarray, np.generic)
    return isinstance(value, allowed) and getattr(value, "dtype", None) != np.dtype(object)


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON tree: what holds it, and its key."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [place for key in keys for place in [(tree, key), *nodes(tree[key])]]


def mutate(path: Path, other: Path, rng: random.Random) -> str:
    """Damage one file in one way; "signed": with a manifest that fits it."""
    file = path / rng.choice(FILES)
    content = bytearray(file.read_bytes())
    start, end = sorted(rng.randrange(len(content)) for _ in range(2))
    kind = rng.choice(["bits", "cut", "longer", "zeros", "noise", "doubled", "foreign", "swapped", "tree", "tree"])
    match kind:
        case "bits":
            for _ in range(rng.randint(1, 3)):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "cut":
            del content[start : end + 1]
        case "longer":
            content += rng.randbytes(rng.randint(1, 100))
        case "zeros":
            content[start : end + 1] = bytes(end + 1 - start)
        case "noise":
            content[start : end + 1] = rng.randbytes(end + 1 - start)
        case "doubled":
            content[start:start] = content[start : end + 1]
        case "foreign":
            content = bytearray(rng.choice([b"", b"{}", b"\x80\x04N.", b"PK\x03\x04", b"\xff" * 9, rng.randbytes(64)]))
        case "swapped":
            content = bytearray((other / rng.choice(FILES)).read_bytes())
        case "tree":
            tree = json.loads((path / "state.json").read_text())
            for _ in range(rng.randint(1, 3)):
                holder, key = rng.choice(nodes(tree))
                new: Any = rng.choice(
                    [None, -1, 1e300, "", "ff", [], {}, {"tuple": []}, {"array": ">f8"}, {"tensor": "bool"}]
                )
                holder[key] = new if rng.random() < 0.5 else json.loads(json.dumps(rng.choice(nodes(tree))[0]))
            file, content = path / "state.json", bytearray(json.dumps(tree).encode())
    changed = bytes(content) != file.read_bytes()
    file.write_bytes(content)
    signed = file.name != "manifest.json" and (kind == "tree" or rng.random() < 0.5)
    if signed:
        sign(path)
    return "signed" if signed else "damaged" if changed else "same"


def fuzz(tmp_path: Path, seeds: range) -> None:
    first, second = (save_checkpoint(tmp_path / name, 1, state_of(n)) for n, name in enumerate("ab"))
    refused = 0
    for seed in seeds:
        folder = tmp_path / "fuzzed"
        shutil.copytree(first, folder / first.name)
        kind = mutate(folder / first.name, second, random.Random(seed))
        state, reason = None, None
        try:
            state = loaded(folder).state
        except CheckpointError as error:
            reason = str(error)
        if reason is not None:
            assert kind != "same"
            assert f"'{folder / first.name}' is damaged: " in reason
            refused += 1
        elif kind == "signed":
            assert only_plain(state)
        else:  # the manifest's versions are for people, and its white space is nobody's
            require_same(state, state_of(0))
        shutil.rmtree(folder)
    assert refused > 0.7 * len(seeds)


def test_200_fuzzed_variants_are_refused_or_harmless(tmp_path):
    fuzz(tmp_path, range(200))


@pytest.mark.slow
def test_2000_fuzzed_variants_are_refused_or_harmless(tmp_path):
    fuzz(tmp_path, range(200, 2200))


# Faults and kills


def test_everything_is_flushed_before_its_name_is_moved(tmp_path, monkeypatch):
    """And names are durable before anything older is deleted."""
    log: list[str] = []
    folder = tmp_path / "folder"

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        found = [p for p in [tmp_path, *tmp_path.rglob("*")] if os.path.samestat(p.lstat(), status)]
        assert status.st_size > 0
        log.append(f"fsync {found[0].name}")

    def replace(source: Path, target: Path) -> None:
        log.append(f"replace {source.name} {target.name}")
        source.rename(target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save_checkpoint(folder, 1, "old")
    assert log[0] == f"fsync {tmp_path.name}"
    log.clear()
    save_checkpoint(folder, 2, "new", keep=1)
    new, old = "000000000002-000002", "000000000001-000001"
    assert sorted(log[:3]) == sorted(f"fsync {name}" for name in FILES)
    assert sorted(log[3:5]) == [f"fsync .{new}.partial", "fsync .latest.partial"]
    assert log[5:] == [
        f"replace .{new}.partial {new}",
        "fsync folder",
        "replace .latest.partial latest",
        "fsync folder",
        f"replace {old} .{old}.partial",
    ]


class Killed(BaseException):
    """Nothing catches it: the process is gone."""


class Calls:
    """Counts the calls that change a disk, and lets the one with a given number fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: int, error: BaseException) -> None:
        self.count, self.fails, self.error, self.dead = 0, fails, error, False
        for name in ("fsync", "replace", "mkdir", "unlink", "rmdir", "open"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        monkeypatch.setattr(checkpoint, "open", self.opened, raising=False)

    def counted(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return function(*args, **kwargs)

        return call

    def tick(self) -> None:
        self.count += 1
        if self.count == self.fails or self.dead:
            self.dead = isinstance(self.error, Killed)
            raise self.error

    def opened(self, *args: Any) -> Any:
        self.tick()
        file = open(*args)  # noqa: SIM115 (the caller closes it)
        write = file.write

        def half(content: bytes) -> Any:
            try:
                self.tick()
            except BaseException:
                write(content[: len(content) // 2])
                raise
            return write(content)

        wrapped = _Wrapped(file)
        wrapped.write = half
        return wrapped


class _Wrapped:
    write: Any

    def __init__(self, file: Any) -> None:
        self.file = file
        self.flush, self.fileno = file.flush, file.fileno

    def __enter__(self) -> _Wrapped:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def fails_once_at_every_call(tmp_path: Path, error: BaseException, step: int) -> None:
    """Save the fourth of four checkpoints with a fault at the first call, at the second, ..."""
    for fails in range(1, 200):
        folder = tmp_path / str(fails)
        for old in (1, 2, 3):
            save_checkpoint(folder, old, state_of(old))
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = Calls(monkeypatch, fails, error)
            raised = None
            try:
                save_checkpoint(folder, step, state_of(10 + step))
            except type(error) as caught:
                raised = caught
        assert raised is (error if calls.count >= fails else None)
        found = loaded(folder)
        is_new = found.step == step and found.state["n"] == 10 + step
        require_same(found.state, state_of(10 + step if is_new else 3))
        assert found.skipped == ()
        for old in there(folder):
            assert loaded(folder, old).skipped == ()
        for old in (2, 3):
            if old != step or not is_new:
                require_same(loaded(folder, old).state, state_of(old))
        strays = [name for name in os.listdir(folder) if name[0] == "."]
        assert strays == [] or isinstance(error, Killed)
        save_checkpoint(folder, 20, state_of(20))
        require_same(loaded(folder).state, state_of(20))
        assert len(os.listdir(folder)) == 4
        assert there(folder)[-1] == 20
        if calls.count < fails:
            assert is_new
            assert fails > 20
            return
    raise AssertionError("no end")


@pytest.mark.parametrize("step", [3, 4], ids=["again", "new"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ENOENT, errno.EIO])
def test_an_error_of_any_call_loses_nothing_and_leaves_nothing(number, step, tmp_path):
    fails_once_at_every_call(tmp_path, OSError(number, os.strerror(number)), step)


@pytest.mark.parametrize("step", [3, 4], ids=["again", "new"])
def test_an_interrupt_in_any_call_loses_nothing_and_leaves_nothing(step, tmp_path):
    fails_once_at_every_call(tmp_path, KeyboardInterrupt(), step)


@pytest.mark.parametrize("step", [3, 4], ids=["again", "new"])
def test_a_kill_before_any_call_loses_nothing_and_the_next_save_cleans_up(step, tmp_path):
    fails_once_at_every_call(tmp_path, Killed(), step)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_an_error(tmp_path):
    save_checkpoint(tmp_path, 1, "first")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            save_checkpoint(tmp_path, 2, "second")
    finally:
        tmp_path.chmod(0o700)
    assert loaded(tmp_path).state == "first"
    assert len(os.listdir(tmp_path)) == 2


def test_a_folder_without_a_parent_or_that_is_a_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_checkpoint(tmp_path / "missing" / "folder", 1, "state")
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(OSError, match="file"):
        save_checkpoint(tmp_path / "file", 1, "state")
    with pytest.raises(NotADirectoryError):
        load_checkpoint(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


# Imports once, then forks a process that saves constantly for each line it reads, and says when that one is gone.
SAVER = """
import os, sys
import torch
from ssmrl.checkpoint import load_checkpoint, save_checkpoint
from tests.test_checkpoint import state_of
torch.set_num_threads(1)
folder, acknowledged, keep = sys.argv[1], sys.argv[2], int(sys.argv[3])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        if line.strip() == "fast":
            os.fsync = lambda descriptor: None
        found = load_checkpoint(folder)
        n = 0 if found is None else found.state["n"] + 1
        file = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        while True:
            save_checkpoint(folder, n // 2, state_of(n), keep=keep)
            os.pwrite(file, b"%12d" % n, 0)
            n += 1
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


class Saver:
    """A process that saves constantly."""

    def __init__(self, tmp_path: Path, keep: int) -> None:
        self.folder, self.acknowledged = tmp_path / "folder", tmp_path / "acknowledged"
        command = [sys.executable, "-c", SAVER, str(self.folder), str(self.acknowledged), str(keep)]
        root = Path(__file__).parents[1]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(self, flushes: bool) -> None:
        """Let it save; without flushing a save takes a tenth of the time, and kills meet what else it does."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("flushing\n" if flushes else "fast\n")
        self.process.stdin.flush()
        self.child = int(self.process.stdout.readline())

    def kill(self) -> None:
        assert self.process.stdout is not None
        os.kill(self.child, signal.SIGKILL)
        assert self.process.stdout.readline() == "gone\n"

    def last(self) -> int:
        """Return the last that it knows to be saved."""
        text = self.acknowledged.read_bytes() if self.acknowledged.exists() else b""
        return int(text) if text else -1

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


def await_progress(saver: Saver, last: int) -> None:
    deadline = time.monotonic() + 60
    while saver.last() <= last:
        assert time.monotonic() < deadline, "nothing was saved for a minute"
        time.sleep(0.002)


def kill_often(tmp_path: Path, times: int) -> None:
    rng, last = random.Random(0), -1
    with Saver(tmp_path, keep=2) as saver:
        for i in range(times):
            saver.start(flushes=i % 2 == 0)
            if i % 4:  # else it may be killed before its first save
                await_progress(saver, last)
            time.sleep(rng.uniform(0, 0.08))
            saver.kill()
            last = max(last, saver.last())
            found = load_checkpoint(saver.folder)
            if found is None:
                assert last == -1
                continue
            n = found.state["n"]
            assert (found.step, found.skipped) == (n // 2, ())
            assert last <= n <= last + 1
            require_same(found.state, state_of(n))
            # keep, one more that is not deleted yet or is replaced, what is half done or half deleted, and latest
            assert len(os.listdir(saver.folder)) <= 2 + 2 + 2 + 1
            last = n
    assert last >= times // 2
    save_checkpoint(saver.folder, last, "end", keep=2)
    assert len(os.listdir(saver.folder)) == 3


@needs_fork
def test_20_kills_at_random_moments_lose_at_most_one_update(tmp_path):
    kill_often(tmp_path, 20)


@needs_fork
@pytest.mark.slow
def test_200_kills_at_random_moments_lose_at_most_one_update(tmp_path):
    kill_often(tmp_path, 200)


@needs_fork
def test_a_reader_sees_the_old_or_the_new_while_another_process_saves(tmp_path):
    with Saver(tmp_path, keep=1) as saver:
        saver.start(flushes=False)
        seen: list[int] = []
        end = time.monotonic() + 1.5
        while time.monotonic() < end or len(set(seen)) < 10:
            before = saver.last()
            found = load_checkpoint(saver.folder)
            if found is None:
                assert before == -1
                continue
            assert found.skipped == ()
            assert before <= found.state["n"]
            require_same(found.state, state_of(found.state["n"]))
            seen.append(found.state["n"])
        saver.kill()
    assert seen == sorted(seen)
