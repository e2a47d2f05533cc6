"""What is submitted beside jobs in the queue. Slurm's commands are imitated; the real ones are in test_slurm.py."""

import json
import os
import re
import shutil
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from incubate_lib import backends
from incubate_lib.backends.slurm import backend
from incubate_lib.backends.slurm.queue import job_of, submitted
from incubate_lib.backends.slurm.settings import SlurmSettings
from incubate_lib.config import SettingsError, load_settings
from incubate_lib.pipeline.background import stop_run
from incubate_lib.pipeline.graph import Plan
from incubate_lib.pipeline.strategies import plan

COMMANDS = {  # those that wait for nobody run at once
    "sinfo": "echo 'cpu|cpu*|4|(null)|4|1-00:00:00'",
    "squeue": "cat queue 2>/dev/null || true",
    "sbatch": """
case "$*" in *--test-only*) exit 0;; esac
cat > /dev/null
number=$(( $(cat count 2>/dev/null || echo 100) + 1 )); echo $number | tee count
state=RUNNING
for option in "$@"; do case "$option" in --job-name=*) name=${option#*=};; --dependency=*) state=PENDING;; esac; done
echo "$number|$state|None||$name" >> queue
""",
    "scancel": """
case "$*" in *--signal*) exit 0;; esac
for number in "$@"; do sed -i "s/^$number|[A-Z]*|/$number|CANCELLED|/" queue; done
""",
}


class Queue:
    """An imitated cluster, on which jobs do nothing."""

    def __init__(self, folder) -> None:
        self.file = folder / "queue"
        for name, text in COMMANDS.items():
            path = folder / name
            path.write_text(f"#!{shutil.which('bash')}\ncd {folder}\n{text}\n")
            path.chmod(0o755)

    def states(self) -> dict[str, str]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return {number: state for number, state, *_ in (line.split("|") for line in lines)}

    def ends(self, number: str, state: str = "FAILED") -> None:
        self.file.write_text(re.sub(rf"(?m)^{number}\|[A-Z]*\|", f"{number}|{state}|", self.file.read_text()))


@pytest.fixture
def queue(tmp_path, data_folder, monkeypatch):
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Queue(folder)


def planned(*overrides: str) -> Plan:
    return plan(load_settings("smoke", list(overrides)), ["deep_incubation"])


def submit(todo: Plan, *overrides: str) -> None:
    source = {"preset": "smoke", "overrides": list(overrides)} | todo.arguments
    hand_over(todo, source)


def hand_over(todo: Plan, analysis: dict | None) -> None:
    backends.get("slurm").submit(todo, SlurmSettings(gpus_per_node=0), Console(quiet=True), analysis=analysis)


def test_jobs_of_other_settings_are_not_taken_for_these(queue):
    """Under one name: neither those of a run, nor those of a study whose file was changed."""
    before, change = planned(), "training.lr=5e-4"
    submit(before)
    number = len(queue.states())
    with pytest.raises(SettingsError, match=rf"{number} job\(s\) of smoke with other settings are active; stop them first"):
        submit(planned(change), change)
    with pytest.raises(SettingsError, match="other settings"):
        hand_over(planned(change), None)
    submit(planned())
    assert len(queue.states()) == number and before.experiment.is_present()


def test_a_run_that_is_called_while_its_jobs_still_stop_waits_for_them(queue, monkeypatch):
    """Whatever it submitted would wait for jobs that end unfinished, and be cancelled with them."""
    submit(planned())
    (saving,) = (number for number, state in queue.states().items() if state == "RUNNING")
    stop_run(planned().experiment)
    assert [number for number, state in queue.states().items() if state != "CANCELLED"] == [saving]
    seen = []

    def wait(_) -> None:
        seen.append(queue.states())
        queue.ends(saving)

    monkeypatch.setattr(backend, "time", SimpleNamespace(sleep=wait, monotonic=time.monotonic))
    submit(planned())
    assert len(seen) == 1 and len(seen[0]) == 7, "nothing was submitted while one was still saving"
    assert len(queue.states()) == 14


def test_a_phase_that_another_run_has_just_submitted_has_one_job(queue, monkeypatch):
    todo, other = planned(), planned("name=other", "phases.finetune.lr=1e-3")
    call = backend.call

    def meanwhile(*command: str, **how) -> str:
        if command[0] == "sbatch":
            monkeypatch.setattr(backend, "call", call)
            submit(other)
        return call(*command, **how)

    monkeypatch.setattr(backend, "call", meanwhile)
    submit(todo)
    mine, theirs = submitted(todo.experiment), submitted(other.experiment)
    shared = {key for key in mine.keys() & theirs.keys() if mine[key].digest == theirs[key].digest and mine[key].digest}
    assert len([key for key in shared if mine[key] == theirs[key]]) >= len(shared) - 1  # but the one that was on its way
    assert all(job_of(node.folder) in (mine[node.key], theirs.get(node.key)) for node in todo.nodes)


def test_an_analysis_finds_the_images_beside_the_users_settings(queue, tmp_path, monkeypatch):
    """Its settings are a copy, beside which there are none."""
    (tmp_path / "mine" / "pictures").mkdir(parents=True)
    todo = planned()
    data = todo.experiment.settings.data.model_copy(update={"folder": str(tmp_path / "mine" / "pictures")})
    settings = todo.experiment.settings.model_copy(update={"data": data})
    object.__setattr__(todo.experiment, "settings", settings)
    submit(todo, "training.lr=2e-3")
    (about,) = re.findall(r"^about='(.*)'$", (todo.experiment.path / "slurm.sh").read_text(), re.M)
    assert json.loads(about)["parameters"]["overrides"] == ["training.lr=2e-3", f"data.folder={json.dumps(data.folder)}"]


def test_an_analysis_is_cancelled_at_once_and_never_begins_again_by_itself(queue):
    todo = planned()
    submit(todo)
    script = (todo.experiment.path / "slurm.sh").read_text()
    assert "requeue Incomplete" in script and not re.search("^trap .*(again|out_of_time)", script, re.M)
    phase = (todo.nodes[0].folder.path / "slurm.sh").read_text()
    assert len(re.findall("^trap .*(?:again|out_of_time)", phase, re.M)) == 2
    (meta,) = (number for number, state in queue.states().items() if state == "RUNNING")
    analysis = submitted(todo.experiment)["06_analysis"].id
    queue.ends(meta, "COMPLETED")
    queue.ends(analysis, "RUNNING")
    stop_run(todo.experiment)
    assert queue.states()[analysis] == "CANCELLED"


def test_without_slurm_a_run_that_was_once_there_is_stopped_where_it_trains(queue, monkeypatch):
    todo = planned()
    submit(todo)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SettingsError, match="no squeue on the path"):
        stop_run(todo.experiment)
    local = backends.get()
    monkeypatch.setattr(type(local), "stop", lambda *_: "asked the process here")
    assert stop_run(todo.experiment) == "asked the process here"
