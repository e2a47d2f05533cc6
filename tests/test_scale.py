"""`make scale`: all that waits for a GPU, in one command that goes on where it was, tried small on a CPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from layouts import write_fashion
from project import ROOT

from incubate_lib.config.study import studies

SMALL = {
    "model.embed_dim": 16,
    "model.num_heads": 2,
    "precision": "float32",
    "training.batch_size": 8,
    "training.warmup_epochs": 0.1,
    "phases.incubate.warmup_epochs": 0.1,
    "phases.end_to_end.epochs": 2,
}
DEPTHS = {"32": 8, "128": 16}  # blocks, of a network of so many


def small_study() -> dict:
    """Return the study with its networks, images and lengths shrunk, and one seed."""
    study = yaml.safe_load(studies()["fashion-scale"].read_text())
    study["set"] |= SMALL
    axis = {str(value): fields for value, fields in study["axes"]["depth"].items()}
    for depth, blocks in DEPTHS.items():
        axis[depth] |= {"model.depth": blocks, "partition.target_depths": [blocks // 4] * 4}
    return study | {"name": "fashion-scale", "axes": {"depth": axis}, "seeds": [0]}


@pytest.fixture
def project(tmp_path):
    """What `make scale` needs of the project, so that it writes no table into this one; set up as by `make`."""
    shutil.copytree(ROOT / "incubate_lib", tmp_path / "incubate_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "ready").touch()
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small_study()))
    write_fashion(tmp_path / "images", zipped=False)
    return tmp_path


def files(folder: Path, pattern: str) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob(pattern)}


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_it_measures_and_trains_everything_once_and_publishes_both(project):
    path = os.pathsep.join([str(project), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "INCUBATE_DATA": str(project / "own"), "COLUMNS": "200"}
    given = [f"BIN={Path(sys.executable).parent}", "GPU=cpu", "BENCH=smoke --rounds 1", "STUDY=small.yaml"]
    given += [f"OPTIONS=--jobs 2 --set machine.data_folder={project / 'images'}"]

    def scale() -> str:
        done = subprocess.run(["make", "scale", *given], cwd=project, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    scale()
    results = project / "data" / "results"
    table, speeds = (pd.read_csv(results / f"{name}.csv") for name in ("study_fashion-scale", "bench_vit-b-cpu"))
    rows = set(table[["depth", "strategy", "seed"]].itertuples(index=False, name=None))
    strategies = small_study()["strategies"]
    assert rows == {(int(depth), name, 0) for depth in DEPTHS for name in strategies} and len(table) == len(rows)
    costs = table.set_index(["depth", "strategy"])["flops"].unstack("depth")
    assert costs.div(costs.loc["end_to_end"]).stack().between(0.9, 1.1).all(), "at equal cost"
    assert {"end_to_end", "meta", "incubate-0", "incubate-2"} <= set(speeds["variant"])
    trained, written = files(project / "own", "phases/*/model.safetensors"), files(results, "*.csv")
    assert len(trained) == 28
    assert "Everything is trained." in scale()
    assert files(project / "own", "phases/*/model.safetensors") == trained
    bench = results / "bench_vit-b-cpu.csv"
    again = files(results, "*.csv")
    assert again[bench] == written[bench] and {p: text for p, (_, text) in again.items()} == {
        p: text for p, (_, text) in written.items()
    }
