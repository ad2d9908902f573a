"""The public names, and that importing them does nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module

import pytest

import ssmrl

HOMES = {
    "core": ["GRU", "LSTM", "MLP", "DiagonalSSM", "StateModel", "StateSpaceModel", "Transformer"],
    "adaptation": ["AdaptationConfig", "Adapted", "Adapter", "StreamAdapter", "adapt", "mse_loss"],
    "meta_rl": ["MetaLearner", "MetaMAML", "Task"],
    "env_runner": ["Environment"],
}
PLACES = [(home, name) for home, names in HOMES.items() for name in names]


def fresh(code: str) -> str:
    """What `code` prints in a new interpreter; any warning or error fails."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_the_public_names_are_these():
    assert sorted(ssmrl.__all__) == sorted(name for _, name in PLACES)


@pytest.mark.parametrize(("home", "name"), PLACES)
def test_a_public_name_is_that_of_its_sub_package(home, name):
    package = import_module(f"ssmrl.{home}")
    assert getattr(ssmrl, name) is getattr(package, name)
    assert name in package.__all__


@pytest.mark.parametrize("home", HOMES)
def test_everything_a_sub_package_lists_is_there(home):
    package = import_module(f"ssmrl.{home}")
    for name in package.__all__:
        assert hasattr(package, name), name


def test_dir_lists_the_public_names():
    assert dir(ssmrl) == sorted([*ssmrl.__all__, "__version__"])


def test_a_star_import_brings_all_names():
    assert fresh("from ssmrl import *\nimport ssmrl\nprint(set(ssmrl.__all__) <= set(globals()))") == "True\n"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ssmrl' has no attribute 'MAML'"):
        ssmrl.MAML  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'MAML' from 'ssmrl'"):
        exec("from ssmrl import MAML")


def test_the_version_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", ssmrl.__version__)


def test_importing_ssmrl_loads_no_environment_and_no_plotting():
    heavy = "{'gymnasium', 'matplotlib', 'mujoco'} & set(sys.modules)"
    assert fresh(f"import sys, ssmrl\nprint({heavy})") == "set()\n"
    names = ", ".join(name for home, name in PLACES if home != "env_runner")
    assert fresh(f"import sys\nfrom ssmrl import {names}\nprint({heavy})") == "set()\n"


def test_importing_everything_changes_no_setting():
    # What the dependencies do when they are imported is theirs, so they come first.
    code = f"""
import logging, random, signal, sys, warnings
import gymnasium, numpy, safetensors.torch, torch, torchopt

def settings():
    return (
        list(warnings.filters), warnings.showwarning, random.getstate(), repr(numpy.random.get_state()),
        torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.enabled, logging.root.level, list(logging.root.handlers), logging.root.manager.disable,
        numpy.geterr(), sys.getrecursionlimit(), signal.getsignal(signal.SIGINT),
        {{name for name in gymnasium.registry if not name.startswith('ssmrl/')}},
    )

before = settings()
import ssmrl
from ssmrl import {", ".join(name for _, name in PLACES)}
after = settings()
print([i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b])
"""
    assert fresh(code) == "[]\n"
