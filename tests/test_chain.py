"""The whole chain: real notebooks through papermill, in real processes, from the command line; the first run of all anew."""

import hashlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import command_line
import nbformat
import papermill
import pytest
import sentences
from patience import HANG, Hooks, join, wait_for
from project import ROOT
from rich.console import Console

from incubate_lib import backends
from incubate_lib.backends.local import pool
from incubate_lib.config import load_settings
from incubate_lib.phases.job import Job
from incubate_lib.pipeline import execution, notebook, warm
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.pipeline.strategies import plan
from incubate_lib.training.files import read_json

pytestmark = pytest.mark.xdist_group("chain")  # one process, so that the chain runs once
INCUBATE = [str(Path(sys.executable).parent / "incubate")]
ALL = ["--strategies", "end_to_end", "deep_incubation", "deep_incubation_stack", "deep_incubation_identity"]


def incubate(*arguments, folder):
    return command_line.incubate(*arguments, env=os.environ | {"INCUBATE_DATA": str(folder), "COLUMNS": "200"})


def planned(folder: Path, *overrides: str) -> None:
    """Plan a run of smoke here, where torch is imported already: the command line need not measure then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INCUBATE_DATA", str(folder))
        Experiment.of(load_settings("smoke", list(overrides))).write({}, {})


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """One run of the smoke preset with every start."""
    folder = tmp_path_factory.mktemp("chain")
    env = os.environ | {"INCUBATE_DATA": str(folder), "COLUMNS": "200"}
    command = [*INCUBATE, "run", "smoke", *ALL, "--jobs", "2"]
    return folder, subprocess.run(command, capture_output=True, text=True, env=env, timeout=HANG)


def weights(data: Path) -> dict[str, str]:
    """Return the SHA-256 of what phases ended in, by the digest of each."""
    return {p.parent.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in data.glob("phases/*/model.safetensors")}


def states(data: Path) -> list[str | None]:
    """Return the state of each phase as it stands in its folder."""
    return [(read_json(path) or {}).get("state") for path in data.glob("phases/*/status.json")]


def test_the_chain_runs_to_a_verdict(chain):
    folder, result = chain
    assert result.returncode == 0, result.stdout + result.stderr
    run = folder / "runs" / "smoke"
    names = read_json(run / "run.json")["phases"].keys()
    starts = ["deep_incubation", "deep_incubation_stack", "deep_incubation_identity"]
    phases = ["incubate-0", "incubate-1", "incubate-2", "assemble", "finetune"]
    assert names == {"seed-0/meta", "seed-0/end_to_end", *(f"seed-0/{s}/{p}" for s in starts for p in phases)}
    assert all((run / name / file).exists() for name in names for file in ("summary.json", "notebook.ipynb"))
    assert len(names) == len(list(folder.glob("phases/*/summary.json")))
    assert sentences.THAN_END_TO_END in result.stdout and (run / "report.html").exists()
    assert f"{sentences.is_matched('end_to_end', 'deep_incubation')}: end_to_end 6.032 epochs instead of 2." in result.stdout
    for start in starts:
        before, after = (read_json(run / f"seed-0/{start}/{phase}/summary.json") for phase in ("assemble", "finetune"))
        assert after["inputs_sha256"] == {"assemble": before["weights_sha256"]}


def test_modules_ran_side_by_side(chain):
    folder, _ = chain
    run, spans = folder / "runs" / "smoke", []
    for key in read_json(run / "run.json")["phases"]:
        meta = nbformat.read(run / key / "notebook.ipynb", 4).metadata.papermill
        spans.append((meta.start_time, meta.end_time, key))
    spans.sort()
    assert any(a[1] > b[0] and "incubate-" in a[2] and "incubate-" in b[2] for a, b in itertools.pairwise(spans))


def test_executed_copies_hold_results_but_nothing_of_the_machine(chain):
    folder, _ = chain
    copies = [*folder.glob("phases/*/notebook.ipynb"), *folder.glob("runs/*/06_analysis.ipynb")]
    assert len(copies) == 18
    for path in copies:
        text = path.read_text()
        for place in (str(folder), str(ROOT), str(Path.home()) + "/", sys.prefix):
            assert place not in text, f"{place} in {path}"
        nb = nbformat.reads(text, 4)
        nbformat.validate(nb)
        assert "widgets" not in nb.metadata
        assert "image/png" in text
        assert not any(o.output_type == "error" for c in nb.cells if c.cell_type == "code" for o in c.outputs)


def test_again_nothing_is_done_and_torch_is_not_even_imported(chain):
    folder, _ = chain

    def files():
        return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "lease" not in p.parts}

    before = files()
    code = (
        "import sys; from incubate_lib.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    )
    env = os.environ | {"INCUBATE_DATA": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", code, "run", "smoke", *ALL], capture_output=True, text=True, env=env, timeout=HANG
    )
    assert result.returncode == 0 and result.stdout.rstrip().endswith("False"), result.stdout + result.stderr
    assert files() == before


def test_status_and_report_of_a_finished_run(chain):
    folder, _ = chain
    output = incubate("status", "smoke", *ALL, folder=folder).stdout
    assert output.count(" done ") == 17 and "waiting" not in output
    result = incubate("report", "smoke", *ALL, folder=folder)
    assert result.returncode == 0 and "Deep Incubation, identity start" in result.stdout
    page = (folder / "runs/smoke/report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == page.count("<img alt=") >= 9
    for part in ("The phases of seed 0", "Learning curves", sentences.MACHINE_EACH, "What each worker trains",
                 "What the strategies differ in"):  # fmt: skip
        assert re.search(rf"<h2[^>]*>{re.escape(part)}", page), f"{part}: what widgets show stands in the report"
    assert not re.search(r'(src|href)="(?!data:|#)', page), "the report must not need any other file"


def test_the_identity_start_begins_where_the_meta_model_ended(chain):
    run = chain[0] / "runs/smoke/seed-0"
    meta = read_json(run / "meta/summary.json")["score"]
    starts = [read_json(run / f"deep_incubation_identity/incubate-{i}/summary.json")["start_score"] for i in range(3)]
    assert starts == [meta] * 3


def test_killed_and_interrupted_runs_end_in_the_same_weights(chain, tmp_path):
    """SIGKILL of the command line, Ctrl-C, `incubate stop`, then the same command to its end."""
    command = ["run", "smoke", "--strategies", "end_to_end", "deep_incubation_stack", "--jobs", "2"]  # 7 phases
    data, hooks = tmp_path / "data", Hooks(tmp_path)
    env = os.environ | hooks.env | {"INCUBATE_DATA": str(data)}
    done = lambda: len(list(data.glob("phases/*/summary.json")))  # noqa: E731
    planned(data)
    hooks.hold("incubate-1", 3)  # never done before it is let go; the two phases after it wait for it

    def begin():
        return command_line.Begun(*command, env=env)

    process = begin()
    wait_for(lambda: done() >= 1, "the first finished phase")
    process.kill()

    for finished, stop in [
        (2, lambda process: os.killpg(process.pid, signal.SIGINT)),  # as a terminal does it
        (4, lambda process: incubate("stop", "smoke", folder=data)),
    ]:
        process = begin()
        wait_for(
            lambda finished=finished: done() >= finished and "running" in states(data),
            f"{finished} finished phases and one that runs",
        )
        stop(process)
        result = process.end()
        assert result.returncode == 130 and "goes on from here" in result.stdout
        assert done() < 7
        assert {*states(data)} <= {"done", "stopped", "interrupted"}, states(data)

    hooks.let_go("incubate-1")
    result = incubate(*command, folder=data)
    assert result.returncode == 0, result.stdout + result.stderr
    ours, theirs = weights(data), weights(chain[0])
    assert len(ours) == 7 and ours == {key: theirs[key] for key in ours}


def test_the_warm_process_survives_signals_to_the_whole_group():
    """Terminals and schedulers signal every process of a group; only the pool may act on it, even while it warms up."""
    code = textwrap.dedent("""
        import os, signal, time
        from multiprocessing import forkserver
        from incubate_lib.pipeline import warm
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        warm.prepare()
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(0, number)
        time.sleep(0.5)
        print(os.waitpid(forkserver._forkserver._forkserver_pid, os.WNOHANG))
    """)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True, timeout=HANG)
    assert result.stdout == "(0, 0)\n", result.stdout + result.stderr


def test_a_failed_notebook_stops_what_depends_on_it_and_nothing_else(tmp_path):
    wild = "phases.incubate.lr=1e30"
    planned(tmp_path, wild)
    result = incubate("run", "smoke", "--strategies", "end_to_end", "deep_incubation", "--set", wild, folder=tmp_path)
    assert result.returncode == 1
    run = next((tmp_path / "runs").iterdir())
    for module in range(3):
        assert f"FAILED seed-0/deep_incubation/incubate-{module}: FloatingPointError" in result.stdout
        log = (run / f"seed-0/deep_incubation/incubate-{module}").resolve() / "log.txt"
        assert str(log) in result.stdout and "loss is" in log.read_text()
        assert (log.parent / "notebook.failed.ipynb").exists() and not (log.parent / "notebook.ipynb").exists()
    assert re.search(r"at step \d+ of \d+ \(lr 1e\+30", result.stdout)
    # named is the module that was seen to fail first
    assert re.search(r"skipped seed-0/deep_incubation/assemble: needs seed-0/deep_incubation/incubate-\d\n", result.stdout)
    assert "skipped seed-0/deep_incubation/finetune" in result.stdout
    assert is_done(run / "seed-0/end_to_end") and is_done(run / "seed-0/meta")
    assert not (run / "seed-0/deep_incubation/assemble/summary.json").exists()


def test_a_notebook_that_fails_before_its_kernel_starts_ends_and_tells_why(tmp_path, monkeypatch):
    """The phase's file is not there; what an earlier run left in status.json must not hide that."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    todo = plan(load_settings("smoke"), ["end_to_end"])
    todo.write()
    monkeypatch.setattr(Job, "path", "phases/0123/phase.json")
    todo.nodes[-1].folder.path.mkdir(parents=True)
    todo.nodes[-1].folder.set_status("stopped", error="an old one")
    output = io.StringIO()
    phases = pool.Pool(todo, 2, Console(file=output, width=500))
    for _ in phases.rounds():
        time.sleep(0.1)
    assert phases.status == 1
    assert re.search(rf"FAILED seed-0/end_to_end: \S*{sentences.not_there('phases/0123/phase.json')}", output.getvalue())


def test_one_run_at_a_time_in_an_experiment(tmp_path, monkeypatch):
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    todo = plan(load_settings("smoke"), ["end_to_end"])
    todo.write()
    with execution.only_run(todo.experiment.path):
        result = incubate("run", "smoke", folder=tmp_path)
    assert result.returncode == 2 and f"another `incubate run` (process {os.getpid()} on" in result.stderr


@pytest.mark.parametrize(
    ("visible", "devices", "jobs"), [("0,1,2,3", 1, 4), ("0,1,2,3,4,5,6,7", 4, 2), ("2", 1, 1), ("0,1", 4, 1), ("", 1, None)]
)
def test_each_phase_has_its_gpus_for_itself(visible, devices, jobs, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cores = min(4, len(os.sched_getaffinity(0)))
    assert backends.get().places(devices) == (cores if jobs is None else jobs)
    assert pool.gpus() == [gpu for gpu in visible.split(",") if gpu]


def test_phases_side_by_side_see_different_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    todo = plan(load_settings("smoke", ["machine.devices=2"]), ["end_to_end", "deep_incubation"])
    seen = []
    monkeypatch.setattr(pool, "start", lambda *arguments, **_: seen.append(arguments[-1]))
    phases = pool.Pool(todo, 2, Console())
    for key in ("seed-0/meta", "seed-0/end_to_end"):
        phases.consider(next(task for task in phases.tasks.values() if task.node.key == key))
    assert seen == [["4", "5"], ["6", "7"]]


def is_done(path: Path) -> bool:
    return (path / "summary.json").exists() and (path / "notebook.ipynb").exists()


def test_plain_papermill_runs_a_notebook_and_agrees_with_the_chain(chain, tmp_path, monkeypatch):
    """`papermill notebooks/02_incubate_module.ipynb out.ipynb -p module_index 2`, the meta model trained on the way."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.ipynb"
    source = notebook.notebook_path("02_incubate_module")
    papermill.execute_notebook(str(source), str(out), {"preset": "smoke", "module_index": 2}, progress_bar=False)
    ours, theirs = weights(tmp_path), weights(chain[0])
    assert ours and all(theirs[key] == value for key, value in ours.items())
    assert len(json.dumps(nbformat.read(out, 4).cells)) < 500_000


def test_a_node_is_complete_only_with_its_notebook(chain, tmp_path, monkeypatch):
    monkeypatch.setenv("INCUBATE_DATA", str(chain[0]))
    node = plan(load_settings("smoke")).nodes[0]
    assert node.job.is_complete()
    copy = node.folder.path / "notebook.ipynb"
    copy.rename(tmp_path / "aside.ipynb")
    assert not node.job.is_complete()
    (tmp_path / "aside.ipynb").rename(copy)


def test_mat_and_its_controls_go_through_the_notebooks_to_a_report(tmp_path, monkeypatch):
    strategies = ["end_to_end", "mat", "mat_multirate", "deep_incubation_mat"]
    how = ["mat.threshold=quantile", "mat.alpha=0.6", "mat.probe=4", "mat.stop_error=true"]
    overrides = [part for value in how for part in ("--set", value)]
    planned(tmp_path, *how)
    result = incubate("run", "smoke", "--jobs", "2", "--strategies", *strategies, *overrides, folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    run = next((tmp_path / "runs").iterdir())
    summaries = {name: read_json(run / "seed-0" / name / "summary.json") for name in ("end_to_end", "mat", "mat_multirate")}
    cost = {name: summary["train_flops"] for name, summary in summaries.items()}
    assert cost["mat"] < cost["mat_multirate"] < cost["end_to_end"] + summaries["mat"]["mat"]["flops"]
    assert summaries["mat"]["steps"] == summaries["end_to_end"]["steps"] and len(summaries["mat"]["mat"]["units"]) == 12
    module = read_json(run / "seed-0" / "deep_incubation_mat" / "incubate-1" / "summary.json")
    assert [unit.split(".")[0] for unit in module["mat"]["units"]] == ["network"] * 4
    assert "mat" not in read_json(run / "seed-0" / "meta" / "summary.json")
    page = (run / "report.html").read_text()
    assert "Modular Adaptive Training" in page and "What computing the kernels cost" in page
    rows, spent = page.partition(sentences.MACHINE_EACH)[2].split("<tr>"), cost["mat"] / cost["end_to_end"]
    assert any("<th>MAT</th>" in row and f"({spent:.2f}×)" in row for row in rows), "with what it spent, not what it might have"

    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    parameters = {"preset": "smoke", "overrides": how, "strategies": strategies}
    name = "07_modular_adaptive_training"
    job = warm.start(name, parameters, tmp_path, "07.ipynb", threads=1)
    assert join(job, name) == 0, (tmp_path / "log.txt").read_text()
    text = (tmp_path / "07.ipynb").read_text()
    assert "Runs of this machine" in text and text.count("image/png") == 4 and "MAT ends at" in text
