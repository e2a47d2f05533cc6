"""Every test run has a data folder of its own: nothing of the user's is read or touched."""

import os
import tempfile

os.environ["INCUBATE_DATA"] = tempfile.mkdtemp(prefix="incubate-tests-")
os.environ["OMP_NUM_THREADS"] = "1"  # workers run side by side, and sums come out the same in every process

import pytest
import torch

from incubate_lib.phases import facts

torch.set_num_threads(1)


# What takes longest starts first, so that no process ends long after the other: groups, which stay in one process, then
# files whose tests go to any. (pyproject.toml has pytest-xdist keep this order.)
FIRST = (
    "notebooks", "slurm", "chain", "presets", "study", "resume", "strategies", "torchrun", "watch", "look", "mirror",
    "test_lab", "test_devices", "test_oracle", "test_training",
)  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(items):
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
    items.sort(key=rank)
    return (yield)


@pytest.fixture(scope="session", autouse=True)
def counted_once():
    """FLOPs are counted once in each process for the same networks and strategies: that takes seconds, and nearly every test
    plans the preset smoke anew, in a data folder of its own."""
    known, count = {}, facts.count

    def counted(settings, num_images, num_classes):
        about = settings.model_dump_json(exclude={"name", "description", "training", "phases", "run", "machine"})
        key = about, num_images, num_classes
        if any(strategy.weights for strategy in settings.strategies.values()):  # a file, which may change
            return count(settings, num_images, num_classes)
        if key not in known:
            known[key] = count(settings, num_images, num_classes)
        return known[key].model_copy(deep=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "count", counted)
        yield


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty data folder for one test."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"
