"""Every test run has a data folder of its own: nothing of the user's is read or touched."""

import os
import tempfile

os.environ["INCUBATE_DATA"] = tempfile.mkdtemp(prefix="incubate-tests-")
os.environ["OMP_NUM_THREADS"] = "1"  # workers run side by side, and sums come out the same in every process

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Notebooks share one worker, because later ones use what earlier ones trained. They start first, and the cluster: they
    take longest."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.xdist_group("notebooks"))
    items.sort(key=lambda item: (item.path.suffix != ".ipynb", item.path.stem != "test_slurm"))


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty data folder for one test."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"
