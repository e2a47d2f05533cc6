"""data/phases as a whole: runs of before are taken over, runs share phases, and what no run names can be deleted."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import sentences
import torch
from patience import Hooks, wait_for
from rounding import rounding

from incubate_lib.cli import main
from incubate_lib.config import SettingsError, load_settings
from incubate_lib.phases import train as phases
from incubate_lib.phases.job import read_job
from incubate_lib.pipeline import execution, store
from incubate_lib.pipeline.background import stop_run
from incubate_lib.pipeline.recorded import recorded_plan
from incubate_lib.pipeline.strategies import open_phase, plan, with_matched
from incubate_lib.training.files import read_json

BEFORE = Path(__file__).with_name("before.zip")  # written by 88f03c4: a finished strategy, and one stopped at step 21 of 100
STRATEGIES = ["deep_incubation", "end_to_end"]


@pytest.fixture
def before(data_folder):
    with zipfile.ZipFile(BEFORE) as archive:
        archive.extractall(data_folder)
    return data_folder


def test_a_run_of_before_is_taken_over_and_goes_on_to_the_same_bits(before, monkeypatch):
    old = {path: path.read_bytes() for path in before.rglob("*") if path.is_file()}
    said = []
    assert [folder.name for folder in store.migrate(said.append)] == ["before"]
    assert said == ["before: 5 phase(s) taken over, 1 phase(s) half-finished"]
    assert {path: path.read_bytes() for path in old} == old, "deletes and changes nothing"
    todo = plan(load_settings(str(before / "before.yaml")), STRATEGIES)
    finished = {node.key for node in todo.nodes if node.finished()}
    assert finished == {node.key for node in todo.nodes} - {"seed-0/end_to_end"}
    trained, fit = [], phases.fit
    monkeypatch.setattr(phases, "fit", lambda *a, **k: trained.append(k["title"]) or fit(*a, **k))
    torch.set_num_threads(1)
    todo.run()
    final = todo.finals["end_to_end", 0]
    assert trained == [final.title] and final.folder.status()["resumed_at"] == 21
    expected = read_json(before / "expected.json")
    if {name: values.tolist() for name, values in rounding().items()} != expected["rounding"]:
        pytest.skip("this machine rounds otherwise than the one on which the phase was begun")
    assert final.summary()["weights_sha256"] == expected["end_to_end"]


def test_what_is_taken_over_twice_stays_and_what_is_damaged_is_left(before):
    broken = before / "runs" / "broken"
    shutil.copytree(before / "runs" / "before", broken)
    (broken / "experiment.json").write_text("{")
    said = []
    store.migrate(said.append)
    assert said[1] == "broken: left as it is, because its experiment.json is damaged"
    files = {path: path.stat().st_mtime_ns for path in (before / "phases").rglob("*") if path.is_file()}
    said.clear()
    store.migrate(said.append)
    assert said[0] == "before: 6 phase(s) there already"
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_modules_that_had_names_of_their_own_get_the_networks(before):
    """Until 2a4be15 a module counted its blocks from 0; what was made from it speaks of the hash that it had then."""
    from safetensors.torch import load_file, save_file

    run = before / "runs" / "before" / "seed-0" / "deep_incubation"
    file = run / "incubate-1" / "model.safetensors"
    now = load_file(file)
    save_file({name.replace("blocks.2.", "blocks.0.").replace("blocks.3.", "blocks.1."): t for name, t in now.items()}, file)
    store.migrate(lambda line: None)
    todo = plan(load_settings(str(before / "before.yaml")), ["deep_incubation"])
    module = next(node for node in todo.nodes if node.key.endswith("incubate-1"))
    assert module.folder.load_weights().keys() == now.keys()
    assert all(node.finished() for node in todo.nodes)


def test_phases_that_no_run_names_are_listed_and_deleted_on_request(data_folder, capsys):
    first, other = (open_phase("meta", "smoke", more) for more in ([], ["training.lr=1e-3"]))
    first.run(), other.run()
    assert store.unused() == [], "a former run names its phases, too"
    (data_folder / "runs" / "smoke" / "run.1.json").unlink()
    assert [phase.folder.path for phase in store.unused()] == [first.folder.path]
    assert main(["clean"]) == 0 and first.folder.path.exists()
    assert "1 phase(s)" in capsys.readouterr().out
    assert main(["clean", "--delete"]) == 0 and not first.folder.path.exists() and other.finished()
    (data_folder / "runs" / "smoke" / "run.json").write_text("[]")
    with pytest.raises(SettingsError, match=r"run.json is damaged, and may name any phase"):
        store.unused()


def test_other_settings_of_a_name_keep_the_former_record_and_come_back(data_folder):
    folder = data_folder / "runs" / "smoke"
    hashes = []
    for rate in ("1e-3", "2e-3", "1e-3"):
        todo = plan(load_settings("smoke", [f"training.lr={rate}"]), ["end_to_end"])
        todo.write()
        hashes.append(read_json(folder / "run.json")["hash"])
    assert hashes[0] == hashes[2] != hashes[1]
    assert [read_json(path)["hash"] for path in folder.glob("run.*.json")] == [hashes[1]]
    link = folder / "seed-0" / "end_to_end"
    assert link.is_symlink() and link.resolve() == todo.nodes[0].folder.path.resolve()


def test_an_unchanged_call_plans_nothing_and_imports_no_torch(data_folder):
    plan(load_settings("smoke"), ["end_to_end"]).write()
    code = "import sys; from incubate_lib.config import load_settings; from incubate_lib.pipeline import strategies; "
    code += "strategies.Builder = None; todo = strategies.plan(load_settings('smoke'), ['end_to_end']); "
    code += "print(len(todo.nodes), 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1 False\n"


def test_a_record_of_a_phase_says_all_that_training_takes(data_folder):
    """A process elsewhere is given the path alone; the settings file may be gone."""
    node = open_phase("incubate", "smoke", module_index=1)
    node.inputs["meta"].run()
    node.experiment.write({n.key: n.record() for n in (node.inputs["meta"], node)}, {})
    node.job.write()
    code = "import sys; from incubate_lib.phases.job import read_job; from incubate_lib.phases.run import run_phase; "
    code += "print(run_phase(read_job(sys.argv[1]))['steps'])"
    result = subprocess.run([sys.executable, "-c", code, node.job.path], capture_output=True, text=True)
    assert result.stdout.split()[-1] == "24", result.stderr
    assert open_phase("incubate", path=node.job.path).finished() == node.finished()
    with pytest.raises(SettingsError, match=sentences.PHASE_SAYS_ALL):
        open_phase("incubate", "smoke", path=node.job.path)
    with pytest.raises(SettingsError, match="is a phase 'incubate', and this is for phases 'meta'"):
        open_phase("meta", path=node.job.path)
    (node.folder.path / "phase.json").write_text('{"settings": 3}')
    with pytest.raises(SettingsError, match=f"phase.json is {sentences.OTHER_VERSION}"):
        open_phase("incubate", path=node.job.path)


# -- the way of a phase -------------------------------------------------------------------------------------------------------


def test_few_functions_of_ours_lie_between_the_command_and_the_first_update(data_folder, tmp_path):
    """Summed over the processes that wait for one another: the command, the notebook's, its kernel."""
    hooks = Hooks(tmp_path)
    hooks.hold("end_to_end", 0)
    stacks = tmp_path / "stacks"
    command = [sys.executable, "-m", "incubate_lib.cli", "run", "smoke", "--strategies", "end_to_end"]
    env = os.environ | hooks.env | {"INCUBATE_DATA": str(data_folder), "TEST_STACKS": str(stacks)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    folder = plan(load_settings("smoke"), ["end_to_end"]).nodes[0].folder
    wait_for(lambda: folder.status()["state"] == "running", "the phase to train")
    tree = psutil.Process(process.pid)
    pids = [tree.pid, *(child.pid for child in tree.children(recursive=True))]

    def asked() -> bool:
        stacks.write_text("")
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.1)  # one after the other: they write into one file
        return "in hooked_step" in stacks.read_text()  # not before: what a step costs is counted on the way there

    wait_for(asked, "the first update")
    ours = re.findall(r'File "\S*/(incubate_lib/\S+)", line \d+ in (\w+)', stacks.read_text())
    process.terminate()
    process.wait()
    print(*(f"{function}  {file}" for file, function in ours), sep="\n")
    assert len(ours) + 1 <= 12, "with Trainer.step itself, in whose place the phase is held"
    assert {"run_phase", "fit"} <= {function for _, function in ours}


# -- two runs that need the same phase ----------------------------------------------------------------------------------------


def run_in_background(hooks: Hooks, data: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "incubate_lib.cli", "run", "smoke", "--strategies", "end_to_end", *more]
    env = os.environ | hooks.env | {"INCUBATE_DATA": str(data)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def test_a_phase_opens_by_its_file_whatever_its_run_has_by_now(data_folder):
    todo = plan(load_settings("smoke"), ["deep_incubation"])
    todo.write()
    for node in todo.nodes:
        node.job.write()
    module = next(node for node in todo.nodes if node.settings.module_index == 1)
    plan(load_settings("smoke", ["phases.meta.epochs=1"]), ["end_to_end"]).write()  # the name has other settings by now
    assert open_phase("incubate", path=module.job.path).inputs["meta"].digest == module.inputs["meta"].digest
    shutil.rmtree(todo.experiment.path)  # a study's phases have no run of their own either
    alone = open_phase("incubate", path=module.job.path)
    assert alone.job == read_job(module.job.path) and alone.inputs["meta"].digest == module.inputs["meta"].digest
    assert with_matched(alone).nodes == [alone.inputs["meta"], alone]


def test_a_phase_has_one_trainer_and_goes_on_for_the_run_that_waits(data_folder, tmp_path):
    """The first run trains what both need; the second says whose it is; the first, stopped, leaves it going."""
    hooks = Hooks(tmp_path)
    hooks.hold("end_to_end", 5)
    first = run_in_background(hooks, data_folder, "--set", "name=first")
    todo = plan(load_settings("smoke", ["name=first"]), ["end_to_end"])
    folder = todo.nodes[0].folder
    wait_for(lambda: folder.trainer(), "the first run to train")
    second = run_in_background(hooks, data_folder, "--set", "name=second")
    other = data_folder / "runs" / "second"
    wait_for(lambda: execution.is_running(other) and (other / "run.json").exists(), "the second run to be at work")
    message = stop_run(todo.experiment)
    assert f"goes on, because {sentences.needed_by('second')}" in message
    hooks.let_go("end_to_end")
    said, told = first.communicate()[0], second.communicate()[0]
    assert first.returncode == 130 and f"goes on: {sentences.needed_by('second')}" in said, said
    assert second.returncode == 0 and "(run first), which trains it" in told, told
    assert folder.status()["attempt"] == 1 and recorded_plan(other).nodes[0].finished()
