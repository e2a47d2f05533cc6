"""Every test run has a data folder of its own: nothing of the user's is read or touched."""

import functools
import os
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

os.environ["INCUBATE_DATA"] = tempfile.mkdtemp(prefix="incubate-tests-")
os.environ["OMP_NUM_THREADS"] = "1"  # workers run side by side, and sums come out the same in every process
# pytest-xdist's processes have it in common
os.environ["TEST_COUNTS"] = os.environ.get("TEST_COUNTS") or tempfile.mkdtemp(prefix="incubate-counts-")
sys.path.append(str(Path(__file__).parent / "hooks"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[-1], os.environ.get("PYTHONPATH")]))

import pytest
import torch
from counted import once

from incubate_lib.phases import facts
from incubate_lib.pipeline import warm

torch.set_num_threads(1)


# What takes longest starts first, so that no process ends long after the other: groups, which stay in one process, then
# files whose tests go to any. (pyproject.toml has pytest-xdist keep this order.)
FIRST = (
    "notebooks", "slurm", "chain", "presets", "study", "resume", "test_remade", "damage", "strategies", "torchrun", "watch",
    "look", "mirror", "test_lab", "test_devices", "test_oracle", "test_training",
)  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items, config):
    """Notebooks share one process, because later ones use what earlier ones trained.

    A wrapper, because it has to come before pytest-xdist reads the groups.
    """

    def rank(item) -> int:
        group = item.get_closest_marker("xdist_group")
        name = group.args[0] if group else item.path.stem
        return FIRST.index(name) if name in FIRST else len(FIRST)

    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.xdist_group("notebooks"))
            item.runtest = functools.partial(in_a_warm_kernel, item.runtest)
            config.option.nbmake_kernel = "warm"
    items.sort(key=rank)
    return (yield)


def in_a_warm_kernel(runtest) -> None:
    """Run a notebook in a fork of this process's warm one."""
    forkserver.set_forkserver_preload(warm.PRELOAD)
    forkserver.ensure_running()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_WARM", forkserver._forkserver._forkserver_address)
        patch.setenv("JUPYTER_PATH", str(Path(__file__).parent / "hooks"))  # where the kernel is described
        runtest()


@pytest.fixture(scope="session", autouse=True)
def counted_once():
    """As in the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "count", once(facts.count))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_warm_process():
    """All forks of this process are of the one that imports everything, whoever asks for one first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver._forkserver, "_preload_modules", warm.PRELOAD)
        patch.setattr(forkserver._forkserver, "set_forkserver_preload", lambda modules: None)
        patch.setattr(forkserver, "set_forkserver_preload", lambda modules: None)
        yield


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty data folder for one test."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"
