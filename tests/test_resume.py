"""A kill at any moment loses nothing finished, and resuming ends in the same bits."""

import contextlib
import json
import math
import multiprocessing
import os
import re
import signal
import threading
from pathlib import Path

import pytest
import torch
from patience import join, wait_for
from stopping import stop_after_checkpoints

from incubate_lib.config import load_settings
from incubate_lib.pipeline import execution, warm
from incubate_lib.pipeline.strategies import open_phase, plan
from incubate_lib.training import loop
from incubate_lib.training.files import read_json
from incubate_lib.training.runs import METRICS, MNTK, PhaseFolder, whose
from incubate_lib.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("resume")  # one process, so that what is compared with is trained once
context = multiprocessing.get_context("forkserver")
# everything random is on: drop-path (preset), mixup (numpy's generator), shift (torch's)
OVERRIDES = [
    "training.epochs=4",
    "training.mixup=0.4",
    "training.cutmix=0.5",
    "machine.checkpoint_seconds=0.1",
    "run=[end_to_end, deep_incubation]",
]


def train(folder: str, overrides: list[str] = OVERRIDES) -> None:
    """Run the whole graph in this process."""
    os.environ["INCUBATE_DATA"] = folder
    torch.set_num_threads(1)
    plan(load_settings("smoke", overrides)).run()


def outcome(folder: Path) -> dict:
    """Return everything that must not depend on kills: final weights and all evaluations, without their seconds."""
    found = {}
    for path in sorted(folder.glob("phases/*/summary.json")):
        phase = PhaseFolder(path.parent)
        rows = [{k: v for k, v in row.items() if k != "train_seconds"} for row in phase.metrics()]
        found[path.parent.name] = (phase.summary()["weights_sha256"], phase.summary()["score"], rows)
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = context.Process(target=train, args=(str(folder),))
    process.start()
    process.join()
    assert process.exitcode == 0
    return outcome(folder)


def train_and_die(folder: str, steps: int, seconds: float) -> None:
    """Run the whole graph, saving at every fifth step; die on the way, so many steps after a new checkpoint and a little later.

    All of it is counted in steps and in this process's own time on a core, so that a busy machine changes nothing: whoever
    dies has saved something new before. A timer's signal ends a process at once, as SIGKILL does; it may come at any moment.
    """
    since = None  # this process's first checkpoint
    save, step = PhaseFolder.save_checkpoint, Trainer.step

    def save_seldom(self, state):
        nonlocal since
        if state["counts"]["step"] % 5 == 0:
            save(self, state)
            since = since or 0

    def count(self, number):
        nonlocal since
        if since is not None:
            since += 1
            if since == steps:
                signal.setitimer(signal.ITIMER_PROF, seconds)
        return step(self, number)

    PhaseFolder.save_checkpoint, Trainer.step = save_seldom, count
    loop.STATUS_SECONDS, loop.SAVING_SHARE = 0.0, math.inf
    train(folder, [*OVERRIDES, "machine.checkpoint_seconds=0"])


def test_killed_at_many_moments_it_ends_in_the_same_weights(tmp_path, uninterrupted):
    kills, resumed = 0, []
    while True:
        where = 2 + 13 * (kills % 5), 0.001 + 0.01 * (kills % 7)  # at different places of phases, evaluations, checkpoints
        process = context.Process(target=train_and_die, args=(str(tmp_path), *where))
        process.start()
        if join(process, "the run to end or to die") == 0:
            break
        assert process.exitcode == -signal.SIGPROF
        kills += 1
    assert kills >= 4
    for path in tmp_path.glob("phases/*/status.json"):
        resumed.append((read_json(path)).get("resumed_at", 0))
    assert sum(step > 0 for step in resumed) >= 2, "no kill fell into the middle of a phase"
    assert len(uninterrupted) == 7
    assert outcome(tmp_path) == uninterrupted
    assert not list(tmp_path.glob("**/checkpoint*")), "checkpoints of finished phases are litter"


def test_other_processes_and_another_order_give_the_same_weights(tmp_path, uninterrupted):
    process = context.Process(target=train_backwards, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert outcome(tmp_path) == uninterrupted


def train_backwards(folder: str) -> None:
    """Each phase in a process of its own, the last module first."""
    os.environ["INCUBATE_DATA"] = folder
    nodes = plan(load_settings("smoke", OVERRIDES)).nodes
    modules = [n for n in nodes if n.settings.phase == "incubate"]
    for node in [nodes[0], *reversed(modules), *nodes]:
        pid = os.fork()  # nothing of torch has run here yet
        if not pid:
            torch.set_num_threads(1)
            node.run()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0


def test_two_processes_never_train_the_same_phase(data_folder, tmp_path):
    """The second, of another run, waits for the first, and takes over when the first is killed."""
    node = open_phase("meta", "smoke")
    first = context.Process(target=hold, args=(str(data_folder),), daemon=True)
    first.start()
    wait_for(lambda: node.folder.status()["state"] == "running", "the first process to hold the phase")
    output = tmp_path / "told"
    second = context.Process(target=run_meta, args=(str(data_folder), str(output)))
    second.start()
    wait_for(lambda: output.exists() and "waiting for process" in output.read_text(), "the second process to say that it waits")
    assert re.search(rf"waiting for process {first.pid} on \S+, since [-\d: ]+ \(run smoke\)", output.read_text())
    assert second.is_alive() and node.folder.status()["pid"] == first.pid and node.folder.status()["attempt"] == 1
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert join(second, "the second process to train") == 0
    assert node.summary() and node.folder.status()["attempt"] == 2


def test_a_killed_phase_is_told_as_interrupted(data_folder):
    node = open_phase("meta", "smoke")
    process = context.Process(target=hold, args=(str(data_folder),), daemon=True)
    process.start()
    wait_for(lambda: node.folder.status()["state"] == "running", "a process to hold the phase")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert node.folder.status()["state"] == "interrupted"


def run_meta(folder: str, output: str) -> None:
    os.environ["INCUBATE_DATA"] = folder
    torch.set_num_threads(1)
    with open(output, "w") as file, contextlib.redirect_stdout(file):
        open_phase("meta", "smoke", ["name=other"]).run()


def hold(folder: str) -> None:
    os.environ["INCUBATE_DATA"] = folder
    node = open_phase("meta", "smoke")
    node.job.write()
    with node.folder.claim(whose(node.digest, {}, node.facts.num_images)):
        signal.pause()  # for ever: it is killed


def test_a_report_of_what_is_not_finished_is_not_taken_for_whole(data_folder):
    """A phase may come to disagree with its input behind the back of a run."""
    todo = plan(load_settings("smoke"), ["end_to_end"])
    todo.write()
    for name in ("06_analysis.ipynb", "report.html"):
        (todo.experiment.path / name).touch()
    (todo.experiment.path / "analysed.json").write_text('{"end_to_end 0": "0123"}')
    assert not execution.analysed(todo)


@pytest.mark.parametrize("cut", [b'{"step": 0, "epo', b"\xff" + bytes(20)], ids=["half", "no text"])
def test_a_line_cut_short_by_a_kill_is_not_glued_to_the_next(cut, data_folder):
    settings = load_settings("smoke", ["mat.probe=4", "mat.warmup_epochs=0.5", "phases.end_to_end.epochs=1"])
    node = plan(settings, ["mat"]).nodes[0]
    with contextlib.suppress(KeyboardInterrupt), node.folder.claim(whose(node.digest, {}, node.facts.num_images)):
        for file in (METRICS, MNTK):
            (node.folder.path / file).write_bytes(cut)
        raise KeyboardInterrupt
    node.run()
    for file, steps in ((METRICS, [0, 12]), (MNTK, [0, 6])):
        rows = [json.loads(line) for line in (node.folder.path / file).read_text().splitlines()]
        assert [row["step"] for row in rows] == steps


def test_a_phase_that_went_on_elsewhere_names_both_devices(data_folder, monkeypatch):
    """Its seconds are of both, so tables must not add them to those of one."""
    node = open_phase("meta", "smoke", ["machine.checkpoint_seconds=0"])
    stop_after_checkpoints(node, monkeypatch, 3)
    monkeypatch.setenv("INCUBATE_DATA", str(data_folder))
    [here] = node.folder.status()["devices"]
    node.folder.set_status(devices=["a GPU"])
    assert node.run()["provenance"]["device"] == f"a GPU then {here}"


@pytest.mark.parametrize(("images", "kept"), [(191, True), (120, False)])
def test_a_checkpoint_of_other_images_is_forgotten(images, kept, data_folder):
    """No setting says how many images there are in a folder."""
    node = open_phase("meta", "smoke")
    with contextlib.suppress(KeyboardInterrupt), node.folder.claim(whose(node.digest, {}, 191)):
        node.folder.save_checkpoint({"counts": {"step": 5}})
        raise KeyboardInterrupt
    with contextlib.suppress(KeyboardInterrupt), node.folder.claim(whose(node.digest, {}, images)):
        state, _ = node.folder.load_checkpoint(lambda state: None)
        assert (state and state["counts"]["step"]) == (5 if kept else None)
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "how",
    [
        ["mat.units=heads", "mat.alpha=0.3"],  # rows of parameters, each with momentum of its own
        ["mat.units=sublayers", "mat.alpha=0.3", "mat.stop_error=true", "training.ema=0.9"],
        ["mat.units=blocks", "mat.alpha=0.3", "mat.beta=0.05", "strategies.mat.mat.rank=random"],
        ["mat.units=sublayers", "mat.alpha=0.3", "strategies.mat.mat.slow_every=3"],
    ],
)
def test_mat_stopped_and_resumed_equals_uninterrupted(how, tmp_path, monkeypatch):
    """Eigenvalues, masks and counted costs included, wherever it was stopped."""
    found = []
    for stops in ([], [6, 2, 7]):  # the first right before the units are looked at
        monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / str(len(stops))))
        overrides = [*how, "mat.probe=4", "mat.every_epochs=0.5", "phases.end_to_end.epochs=3", "mat.threshold=quantile"]
        node = plan(load_settings("smoke", [*overrides, "machine.checkpoint_seconds=0"]), ["mat"]).nodes[0]
        for number in stops:
            stop_after_checkpoints(node, monkeypatch, number)
            monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / str(len(stops))))
        summary = node.run()
        rows = [
            [{k: v for k, v in row.items() if "seconds" not in k} for row in node.folder.metrics(file)]
            for file in (METRICS, MNTK)
        ]
        assert summary["train_flops_executed"] > summary["train_flops"]
        found.append((summary["weights_sha256"], summary["train_flops"], rows, summary["train_flops_executed"]))
    assert found[0] == found[1]
    probes = found[0][2][1]
    assert [row["step"] for row in probes] == list(range(0, 36, 6)) and len({tuple(row["active"]) for row in probes}) > 1
    assert found[0][1] < 36 * 16 * node.facts.flops_per_image["target"] + summary["mat"]["flops"]


def test_a_phase_starts_although_the_warm_process_is_killed_at_that_moment(tmp_path, monkeypatch):
    """It is stopped first, so that it is asked, and dies before it answers."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    node = open_phase("meta", "smoke", ["training.epochs=1"])
    warm.prepare()
    pid = warm.forkserver._forkserver._forkserver_pid
    os.kill(pid, signal.SIGSTOP)
    killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killer.start()
    node.job.write()
    process = warm.start("", {"phase": node.job.path}, node.folder.path, None, threads=1)
    join(process)
    assert warm.forkserver._forkserver._forkserver_pid != pid
    assert process.exitcode == 0 and node.finished()
