"""A backend of one's own, known to the package by nothing but `register`: a list in the run's folder, worked off one by one."""

import io
import os
import re
import subprocess
import sys

import pytest
import sentences
from patience import HANG
from project import ROOT, pages
from rich.console import Console

from incubate_lib import backends
from incubate_lib.backends import Attempt, Backend
from incubate_lib.backends.local.pool import Pool
from incubate_lib.cli import main
from incubate_lib.config import Frozen, MachineSettings, SettingsError, load_settings
from incubate_lib.phases.job import read_job
from incubate_lib.pipeline import execution
from incubate_lib.pipeline.background import stop_run
from incubate_lib.pipeline.experiment import STOP_FILE, Experiment
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.live.progress import Reader, headline
from incubate_lib.report.mirror import is_at_work
from incubate_lib.training.files import read_json, write_json

NOTEBOOK = """
import sys
from pathlib import Path
from incubate_lib.pipeline.notebook import execute
name, output, phase = sys.argv[1:]
execute(name, Path(output), {"phase": phase})
"""
WHAT = ["smoke", "--strategies", "end_to_end", "--seeds", "0", "1"]


class ListSettings(Frozen):
    pencil: str = "HB"


class Paper(Backend):
    name = "paper"
    title = "the list"
    options = {"pencil": {"help": "what it is written with"}}

    def settings(self, options):
        return ListSettings(pencil=options.pencil or "HB")

    def submit(self, todo, settings, console, *, analysis=None):
        todo.write()
        (todo.experiment.path / STOP_FILE).unlink(missing_ok=True)
        missing = [node for node in todo.nodes if not node.job.is_complete()]
        listed = [{"key": node.key, "phase": node.job.path, "with": settings.pencil} for node in missing]
        write_json(todo.experiment.path / "list.json", listed)
        for node in missing:
            node.job.write()

    def knows(self, experiment):
        return (experiment.path / "list.json").exists()

    def still_active(self, experiment):
        return len(read_json(experiment.path / "list.json") or [])

    def states(self, todo, lines):
        listed = [row["key"] for row in read_json(todo.experiment.path / "list.json")]
        for line in lines:
            if line.key in listed:
                line.state, line.where = "queued", f"line {listed.index(line.key) + 1}"
        return [self.explain("ink")] if listed else []

    def explain(self, reason):
        return {"ink": "nobody has worked on the list yet"}.get(reason)

    def stop(self, experiment):
        listed = self.still_active(experiment)
        write_json(experiment.path / "list.json", [])
        return f"{listed} line(s) are crossed out" if listed else None

    def attempt(self):
        return Attempt(job=os.environ["PAPER"], restart=2, nodes=3) if "PAPER" in os.environ else None

    def work(self, todo):
        """Do what stands first, in a process that knows nothing of this class."""
        first, *rest = read_json(todo.experiment.path / "list.json")
        job = read_job(first["phase"])
        notebook, copy = job.work
        asked = [notebook, str(job.folder.path / copy), first["phase"]]
        env = os.environ | {"INCUBATE_HEADLESS": "1", "INCUBATE_THREADS": "1"}
        subprocess.run([sys.executable, "-c", NOTEBOOK, *asked], env=env, check=True, timeout=HANG)
        write_json(todo.experiment.path / "list.json", rest)


@pytest.fixture(scope="module")
def paper():
    backends.register(Paper())
    yield backends.get("paper")
    backends.unregister("paper")


def test_a_third_backend_takes_a_run_to_its_end(paper, data_folder, capsys):
    """Nothing in the package says its name."""

    def incubate(*arguments: str) -> str:
        assert main([*arguments]) == 0
        return capsys.readouterr().out

    output = incubate("run", *WHAT, "--backend", "paper", "--pencil", "2B")
    assert "`incubate status` shows how far it is" in output
    todo = plan(load_settings("smoke"), ["end_to_end"], [0, 1])
    assert read_json(todo.experiment.path / "list.json")[0]["with"] == "2B" and backends.of(todo.experiment) is paper
    output = incubate("status", *WHAT)
    assert "the list" in output and output.count("queued") == 2 and "line 2" in output and paper.explain("ink") in output

    paper.work(todo)
    assert main(["run", *WHAT]) == 2 and "1 job(s) of smoke are in the list's queue" in capsys.readouterr().err
    reader = Reader(todo)
    shown = headline(todo, reader.phases(), reader.backend)
    assert sentences.phases_done(1, 2) in shown and "1 queued" in shown and "left" in shown and is_at_work(todo)
    assert "1 line(s) are crossed out" in incubate("stop", "smoke") and (todo.experiment.path / STOP_FILE).exists()
    assert "queued" not in incubate("status", *WHAT) and not is_at_work(todo)

    incubate("run", *WHAT, "--backend", "paper")
    assert [row["key"] for row in read_json(todo.experiment.path / "list.json")] == ["seed-1/end_to_end"]
    paper.work(todo)
    source = {"preset": "smoke", "overrides": []}
    assert execution.analyse(todo, source, Console(file=io.StringIO()), threads=1) == 0
    assert "end_to_end" in incubate("run", *WHAT, "--backend", "paper"), "the table"
    assert incubate("status", *WHAT).count("done") == 2


def test_options_of_another_backend_are_told(paper, data_folder, capsys):
    for arguments, words in [
        (["--pencil", "H"], sentences.is_for_backend("--pencil", "paper")),
        (["--backend", "paper", "--jobs", "2"], sentences.is_for_backend("--jobs", "local")),
        (["--backend", "paper", "--partition", "gpu"], sentences.is_for_backend("--partition", "slurm")),
        (["--backend", "paper", "--dry-run"], sentences.is_for_backend("--dry-run", "slurm")),
    ]:
        assert main(["run", "smoke", *arguments]) == 2 and words in capsys.readouterr().err
    with pytest.raises(SettingsError, match="several nodes need --backend slurm, and its --nodes"):
        backends.check_nodes([MachineSettings(nodes=2)])


def test_a_process_knows_which_attempt_it_is(paper, data_folder, monkeypatch):
    for name in ("SLURM_JOB_ID", "PAPER"):
        monkeypatch.delenv(name, raising=False)
    assert backends.attempt() == Attempt() and backends.attempt().job is None
    assert backends.of(Experiment.of(load_settings("smoke"))) is backends.get("local")
    monkeypatch.setenv("PAPER", "7")
    assert backends.attempt() == Attempt(job="7", restart=2, nodes=3)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    here = backends.attempt()
    assert (here.job, here.restart, here.nodes, str(here)) == ("17", 0, 2, "a Slurm job of 2")
    assert here.on_each_node()[0] == "srun"


def test_the_readme_names_every_backend_and_its_folder():
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(incubate_lib/backends/\w+/)` \|$", pages()["incubate_lib/backends/README.md"], re.M)
    folders = [f"{path.parent.relative_to(ROOT)}/" for path in sorted(ROOT.glob("incubate_lib/backends/*/backend.py"))]
    assert [folder for _, folder in rows] == folders and all(backends.get(name).name == name for name, _ in rows)


def test_a_stop_before_the_first_phase_begins_is_kept(data_folder):
    """Whoever sees a run at work may stop it, however early; an earlier run's wish is forgotten."""
    todo = plan(load_settings("smoke"), ["end_to_end"])
    todo.write()
    (todo.experiment.path / STOP_FILE).touch()
    with execution.only_run(todo.experiment.path):
        assert not (todo.experiment.path / STOP_FILE).exists()
        assert "asked smoke to stop" in stop_run(todo.experiment)
        pool = Pool(todo, 1, Console(quiet=True))
        assert list(pool.rounds()) == [] or pool.status == 130
    assert pool.status == 130 and todo.nodes[0].folder.status()["state"] == "waiting"
