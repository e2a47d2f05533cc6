"""The notebooks as a person has them: a real JupyterLab in a real browser, with mouse and keyboard.

INCUBATE_SCREENSHOTS names a folder for pictures of every notebook, screen by screen.
"""

import os
from pathlib import Path

import lab
import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from patience import Hooks, wait_for
from project import ROOT
from test_notebooks import TRACKED

from incubate_lib.config import load_settings
from incubate_lib.pipeline import execution
from incubate_lib.pipeline.notebook import check_parameters
from incubate_lib.pipeline.strategies import open_phase, plan
from incubate_lib.training.files import read_json

missing = [] if os.environ.get("INCUBATE_REQUIRE_LAB") else lab.missing()  # then they fail instead
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"no {', '.join(missing)} here: JupyterLab is tested with Debian's chromium"
)  # in no group: every process that tests has a server and a browser, which start in seconds
SMOKE = {"preset": "smoke"}
EPOCH = 12  # steps of an epoch of smoke
SERIES = {  # parameters other than the committed ones, so that it takes seconds; words that stand there when it has run
    "00_quickstart": (SMOKE | {"depth": 6, "meta_epochs": 2, "epochs": 1}, "Measured on"),
    "01_meta_model": (SMOKE, "The meta model's accuracy on the"),
    "02_incubate_module": (SMOKE, "after incubation"),
    "03_assemble": (SMOKE, "Assembled, before any fine-tuning"),
    "04_finetune": (SMOKE, "Cost:"),
    "05_end_to_end": (SMOKE, "End to end reaches"),
    "06_analysis": (SMOKE, "Runs of this machine"),
    "07_modular_adaptive_training": ({"probe": 4}, "add up to their common kernel"),
    "08_planner": (SMOKE, "vit-h"),
    "09_studies": ({}, "digits-budget"),
    "10_dashboard": (SMOKE, "only meta model right"),
    "11_language": ({"epochs": 0.02, "masked": ""}, "contexts of 64 tokens"),
    "12_downstream": ({"epochs": 0.1, "detection": ""}, "Measured on"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder in which the preset smoke has run."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INCUBATE_DATA", str(folder))
        plan(load_settings("smoke")).run()
    return folder


@pytest.fixture(scope="module")
def hooks(tmp_path_factory):
    """What holds the training of kernels, so that it is not over before a test has looked."""
    return Hooks(tmp_path_factory.mktemp("hooks"))


@pytest.fixture(scope="module")
def jupyter(data, hooks, tmp_path_factory):
    screenshots = os.environ.get("INCUBATE_SCREENSHOTS")
    folder, env = tmp_path_factory.mktemp("lab"), hooks.env | {"INCUBATE_DATA": str(data)}
    with lab.Lab(folder, env=env, screenshots=Path(screenshots) if screenshots else None) as started:
        yield started
        alive = started.processes()
    assert len(alive) == 1, "a kernel outlived its tab"
    assert not started.processes()


@pytest.fixture
def open_notebook(jupyter):
    """Open a notebook of the series with parameters, as papermill would run it; tabs and kernels end with the test."""
    opened = []

    def opens(name: str, parameters: dict, copy: str = "") -> lab.NotebookPage:
        check_parameters(name, parameters)
        nb = parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb")), parameters)
        opened.append(jupyter.open(jupyter.add(f"notebooks/{copy or name}.ipynb", nb)))
        return opened[-1]

    yield opens
    for page in opened:
        page.close()


def weights(data: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in data.glob("phases/*/model.safetensors")}


def look_closer_at_06_analysis(page):
    """The menu of phases changes the picture."""
    options = page.options()
    assert len(options) == len(set(options)) == 1 + 5 + 5, "one strategy has one phase, two have five with curves"
    first = page.picture()
    page.choose(options[1])
    wait_for(lambda: page.picture() != first, "another picture")
    page.choose(options[0])
    wait_for(lambda: page.picture() == first, "the first picture")


def look_closer_at_08_planner(page):
    """A slider plans anew."""
    first = page.picture()
    page.enter(1, label="machines (1 to 16)")
    wait_for(lambda: page.picture() != first, "another chart")


LOOK_CLOSER = {"06_analysis": look_closer_at_06_analysis, "08_planner": look_closer_at_08_planner}


@pytest.mark.parametrize("name", [Path(path).stem for path in TRACKED])
def test_notebook_opens_and_runs_to_its_end(open_notebook, data, name):
    """Opened after a run, it shows its results and trains nothing of it again."""
    parameters, words = SERIES.get(name, ({}, ""))
    trained = weights(data)
    page = open_notebook(name, parameters)
    page.run_all()
    assert page.errors() == []
    assert words in page.text()
    assert any("image/png" in output.get("data", {}) for output in page.outputs())
    assert weights(data).items() >= trained.items()
    if name in LOOK_CLOSER:
        LOOK_CLOSER[name](page)
    page.screenshots(name) if os.environ.get("INCUBATE_SCREENSHOTS") else page.screenshot(name)


def test_the_page_may_be_reloaded_in_the_middle_of_training(open_notebook, data, hooks, monkeypatch):
    """The kernel goes on, its training ends, and what it trained is read when the cells are run again."""
    longer = ["training.epochs=3"]
    monkeypatch.setenv("INCUBATE_DATA", str(data))
    phase = open_phase("end_to_end", "smoke", longer)
    status, run = phase.folder.path / "status.json", phase.experiment.path.name
    hooks.hold(run, EPOCH + 1)
    page = open_notebook("05_end_to_end", SMOKE | {"overrides": longer}, "reloaded")
    page.start_all()
    wait_for(lambda: ((read_json(status) or {}).get("progress") or {}).get("step"), "the first step")
    saved, kernel = page.save(), page.state()["kernel"]
    page.reload(answers=False)
    wait_for(lambda: page.state()["kernel"] == kernel, "the same kernel")
    assert read_json(status)["state"] == "running"
    told = page.text("this.run()")
    assert f"`incubate status {run}`" in told and "while the page is reloaded" in told
    page.screenshot("reloaded")
    kept = [cell.execution_count for cell in saved.cells if cell.cell_type == "code"]
    assert kept[0] == 1 and kept[-1] is None, "saved in the middle"
    hooks.let_go(run)
    wait_for(lambda: read_json(status)["state"] != "running", "the training to end")
    assert page.state()["kernel"] == kernel
    record = read_json(status)
    assert record["state"] == "done" and record["attempt"] == 1
    page.run_all()
    assert page.errors() == [] and "End to end reaches" in page.text()
    assert read_json(status) == record, "trained once"


def test_a_run_in_the_background_is_watched_over_a_reload_and_stopped(open_notebook, data, hooks, monkeypatch):
    """The dashboard starts it; neither the page nor the kernel is needed; the button of a reopened page stops it."""
    longer = ["training.epochs=4", "phases.meta.epochs=5"]
    monkeypatch.setenv("INCUBATE_DATA", str(data))
    todo = plan(load_settings("smoke", longer))
    run = todo.experiment.path.name
    hooks.hold(run, EPOCH + 1)
    page = open_notebook("10_dashboard", SMOKE | {"overrides": longer, "start": True}, "watched")
    page.run_all()
    assert page.errors() == []

    def steps() -> int:
        return sum(((read_json(n.folder.path / "status.json") or {}).get("progress") or {}).get("step", 0) for n in todo.nodes)

    wait_for(steps, "the first step")
    page.save()
    page.reload()
    before = steps()
    hooks.hold(run, 2 * EPOCH + 1)
    wait_for(lambda: steps() > before, "a step while the page is reloaded")
    wait_for(lambda: "running" in page.page.inner_text("body"), "the widget, shown again")
    page.screenshot("watched")
    page.press("Stop: save and pause")
    wait_for(lambda: not execution.is_running(todo.experiment.path), "the end of the run")
    states = {node.key: node.folder.status()["state"] for node in todo.nodes}
    assert "stopped" in states.values() and "failed" not in states.values(), states
    assert any((node.folder.path / "checkpoint.pt").exists() for node in todo.nodes)
    wait_for(lambda: "stopped" in page.page.inner_text("body"), "the widget says so")
    page.screenshot("stopped")


def test_training_in_this_kernel_is_watched_and_stopped(jupyter, data, hooks, monkeypatch):
    """While a cell trains, the widget of the cell before it shows how far it is, and its button is heard."""
    longer = ["training.epochs=5"]
    monkeypatch.setenv("INCUBATE_DATA", str(data))
    phase = open_phase("end_to_end", "smoke", longer)
    folder = phase.folder
    hooks.hold(phase.experiment.path.name, EPOCH + 1)
    cells = [
        "from incubate_lib.pipeline.strategies import open_phase\nfrom incubate_lib.report.live.watch import watch",
        f"phase = open_phase('end_to_end', 'smoke', {longer})",
        f"watch('smoke', {longer}, strategies=['end_to_end'], every=1.0)",
        "phase.run()",
    ]
    page = jupyter.open(jupyter.add("here.ipynb", code_notebook(cells)))
    page.start_all()
    wait_for(lambda: "1 running" in page.page.inner_text("body"), "the widget to show it")
    page.screenshot("here")
    page.press("Stop: save and pause")
    page.wait()
    assert [error.partition(":")[0] for error in page.errors()] == ["Stopped"]
    assert folder.status()["state"] == "stopped" and (folder.path / "checkpoint.pt").exists()
    wait_for(lambda: "1 stopped" in page.page.inner_text("body"), "the widget says so")
    page.close()


def code_notebook(sources: list[str]) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in sources],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )


def test_mouse_and_keyboard_move_widgets_and_a_failing_cell_is_noticed(jupyter):
    """What the tests above rely on."""
    cells = [
        "import ipywidgets\nfrom IPython.display import display",
        "epochs = ipywidgets.IntSlider(description='epochs', min=0, max=100)\n"
        "other = ipywidgets.IntSlider(description='other')\n"
        "epochs.observe(lambda change: setattr(other, 'value', change.new), 'value')\n"
        "press, said = ipywidgets.Button(description='Double it'), ipywidgets.HTML()\n"
        "press.on_click(lambda _: setattr(said, 'value', f'twice {epochs.value} is {2 * epochs.value}'))\n"
        "display(other, epochs, press, said)",
        "1 / 0",
        "print('never')",
    ]
    page = jupyter.open(jupyter.add("widgets.ipynb", code_notebook(cells)))
    page.run_all()
    assert page.errors() == ["ZeroDivisionError: division by zero"]
    assert "never" not in page.text()

    def says(words: str) -> None:
        page.press("Double it")
        wait_for(lambda: page.widget("html").inner_text().strip() == words, words, lambda: page.widget("html").inner_text())

    def is_known(value: str) -> None:  # to the kernel: a page that is busy sends a slider's last value after the button's press
        wait_for(
            lambda: page.widget("slider", "other").locator(".widget-readout").inner_text() == value, f"the kernel to know {value}"
        )

    assert page.drag(0.5, label="epochs") == "50"
    is_known("50")
    says("twice 50 is 100")
    page.enter(7, label="epochs")
    is_known("7")
    says("twice 7 is 14")
    page.screenshot("widgets")
    page.close()
    assert page.path not in [session["path"] for session in jupyter.ask("GET", "api/sessions")]
