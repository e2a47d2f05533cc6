"""A plain install: what a wheel brings along, and that nothing is written where packages lie."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from project import ROOT

ASK = """
from incubate_lib.config import data_folder, presets
from incubate_lib.pipeline.notebook import notebook_path
from incubate_lib.report.tables.records import published_runs
from incubate_lib.training.team import provenance
import torch
print(data_folder(), notebook_path("01_meta_model"), len(presets()), published_runs(), provenance(torch.device("cpu"))["commit"])
"""


def test_a_wheel_has_the_notebooks_and_keeps_data_out_of_the_packages(tmp_path):
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "build", "--quiet", "--out-dir", tmp_path, ROOT], check=True)  # the wheel out of the sdist
    [wheel] = tmp_path.glob("*.whl")
    site, home = tmp_path / "site", tmp_path / "home"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    ours = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {path.name for path in (site / "incubate_lib" / "notebooks").iterdir()} == ours
    env = {name: value for name, value in os.environ.items() if name != "INCUBATE_DATA"}
    env |= {"PYTHONPATH": str(site), "HOME": str(home)}
    said = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=env, cwd=tmp_path, check=True).stdout
    notebook = site / "incubate_lib" / "notebooks" / "01_meta_model.ipynb"
    presets = len(list((ROOT / "incubate_lib" / "presets").glob("*.yaml")))
    assert said.split() == [str(home / "incubate-data"), str(notebook), str(presets), "[]", "None"]
