"""What a new machine relies on."""

import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from project import ROOT, block

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CARD = {"torch", "timm", "jupyterlab", "papermill", "matplotlib", "pandas", "ipywidgets", "pytest", "nbmake"}
CONDA_NAMES = {
    "torch": "pytorch",
    "playwright": "playwright-python",
    "matplotlib": "matplotlib-base",
    "jupyter-client": "jupyter_client",
}


def requirements(lines):
    """Return name → version bounds."""
    pairs = (re.fullmatch(r"\s*([A-Za-z0-9_.-]+)\s*(.*)", line).groups() for line in lines)
    return {name: bounds.replace(" ", "") for name, bounds in pairs}


def test_conda_environment_is_in_step_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    conda = requirements(line for line in environment["dependencies"] if isinstance(line, str))
    wanted = requirements(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])
    wanted = {CONDA_NAMES.get(name, name): bounds for name, bounds in wanted.items()}
    wanted["python"] = PROJECT["requires-python"]
    assert conda.pop("pip") == ""
    assert conda == wanted
    assert environment["dependencies"][-1] == {"pip": ["--editable ."]}, "conda writes these lines to a requirements file"


def test_the_cards_packages_are_required():
    assert set(requirements(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"])) >= CARD


@pytest.mark.xdist_group("together")
def test_tests_of_a_group_share_a_process(request):
    """pytest-xdist writes the group into the id; where it cannot, long fixtures are quietly made once in each process."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("the tests run in one process")
    assert request.node.nodeid.endswith("@together")


def test_constraints_are_names_and_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 100
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+", line) for line in lines)


def test_importing_the_package_and_asking_for_help_load_nothing_heavy():
    code = "import sys, incubate_lib, incubate_lib.cli; incubate_lib.cli.parser().format_help(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "timm", "numpy", "pandas", "pydantic", "matplotlib", "papermill"} & set(loaded)


def test_rooms_import_in_one_direction():
    """config ← method ← data ← tasks ← backends' interface ← training ← phases ← strategies ← pipeline ← backends ← report
    ← cli: it never reads from where it is used."""
    order = ["config", "method", "networks", "data", "downstream", "tasks", "backends", "training", "phases", "strategies"]
    order += ["pipeline", "members", "report", "cli"]
    members = {path.parent.name for path in (ROOT / "incubate_lib/backends").glob("*/__init__.py")}
    for path in (ROOT / "incubate_lib").rglob("*.py"):
        parts = path.relative_to(ROOT / "incubate_lib").with_suffix("").parts
        if parts[0] not in order:
            continue
        room = "members" if parts[0] == "backends" and len(parts) > 2 else parts[0]
        for imported in re.findall(r"^\s*(?:from|import) incubate_lib\.([\w.]+)", path.read_text(), re.M):
            first, *rest = imported.split(".")
            first = "members" if first == "backends" and rest and rest[0] in members else first
            assert order.index(first) <= order.index(room), f"{path} imports {imported}"


def test_every_name_in_the_tree_of_the_layout_exists():
    tree = block("text", "notebooks/ ")
    names = [line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")]
    assert len(names) >= 10
    assert all((ROOT / name).exists() for name in names if name != "data/runs/"), names


def test_ruff_is_content():
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    result = subprocess.run([sys.executable, "-m", "ruff", "format", "--check", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
