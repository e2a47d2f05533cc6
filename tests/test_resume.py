"""A kill at any moment loses nothing finished, and resuming ends in the same bits."""

import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from patience import join, wait_for
from rich.console import Console

from incubate_lib import backends
from incubate_lib.backends.local import pool as local
from incubate_lib.backends.local.pool import Pool
from incubate_lib.backends.slurm import queue as slurm
from incubate_lib.backends.slurm.settings import SlurmSettings
from incubate_lib.config import SettingsError, load_settings
from incubate_lib.config.study import load_study
from incubate_lib.phases import train as phases
from incubate_lib.phases.facts import Facts
from incubate_lib.pipeline import execution, study
from incubate_lib.pipeline.strategies import open_phase, plan
from incubate_lib.pipeline.view import node_line
from incubate_lib.training import loop
from incubate_lib.training.runs import METRICS, MNTK, PhaseFolder, Stopped, read_json
from incubate_lib.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("resume")  # one process, so that what is compared with is trained once
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["incubate_lib.phases.run", "torch._dynamo"])
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
    for path in sorted(folder.glob("runs/*/seed-0/**/summary.json")):
        phase = PhaseFolder(path.parent)
        rows = [{k: v for k, v in row.items() if k != "train_seconds"} for row in phase.metrics()]
        found[str(path.parent.relative_to(folder))] = (phase.summary()["weights_sha256"], phase.summary()["accuracy"], rows)
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
        if state["step"] % 5 == 0:
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
    for path in tmp_path.glob("runs/*/seed-0/**/status.json"):
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


def stop_after_checkpoints(node, monkeypatch, number: int) -> PhaseFolder:
    """Run a phase until it has saved `number` checkpoints, then stop it."""
    saved, original = [], PhaseFolder.save_checkpoint

    def save(self, state):
        original(self, state)
        saved.append(state["step"])

    monkeypatch.setattr(PhaseFolder, "save_checkpoint", save)
    monkeypatch.setattr("incubate_lib.training.loop.STATUS_SECONDS", 0.0)
    monkeypatch.setattr("incubate_lib.training.loop.SAVING_SHARE", math.inf)  # after every step
    monkeypatch.setattr(phases, "_stop_asked", lambda *_: lambda: len(saved) >= number)
    with pytest.raises(Stopped, match="the next run goes on from here"):
        node.run()
    monkeypatch.undo()
    assert len(saved) >= number
    return node.folder


def rewrite(change):
    """Return what saves a checkpoint again, sound in form, with another content."""

    def damage(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return damage


DAMAGE = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "a flipped bit in the weights": lambda p: p.write_bytes(flip(p.read_bytes())),
    "empty": lambda p: p.write_bytes(b""),
    "not a checkpoint": lambda p: p.write_text("hello"),
    "a weight is missing": rewrite(lambda state: state["model"].pop("head.bias")),
    "a weight has another shape": rewrite(lambda state: state["model"].update({"head.bias": torch.zeros(5)})),
    "momentum of another shape": rewrite(lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(5))),
    "a count is missing": rewrite(lambda state: state.pop("loss_sum")),
    "of another phase": rewrite(lambda state: state["whose"].update(hash="another")),
    "no dictionary": lambda p: torch.save(torch.zeros(1), p),
}


def flip(blob: bytes) -> bytes:
    middle = len(blob) // 3
    return blob[:middle] + bytes([blob[middle] ^ 1]) + blob[middle + 1 :]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A meta model trained without interruption, in a data folder that the damaged ones copy their facts from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INCUBATE_DATA", str(tmp_path_factory.mktemp("sound")))
        node = open_phase("meta", "smoke", FREQUENT, seed=5)
        return node.run(), node.experiment.path / "experiment.json"


FREQUENT = ["machine.checkpoint_seconds=0.0"]


def plan_as(known: Path, data_folder: Path) -> None:
    """Take over what planning has measured before."""
    (data_folder / "runs" / known.parent.name).mkdir(parents=True)
    shutil.copy(known, data_folder / "runs" / known.parent.name)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("both", [False, True], ids=["newest", "both"])
def test_a_damaged_checkpoint_is_named_and_what_is_sound_is_used(damage, both, sound, data_folder, capsys):
    expected, known = sound
    plan_as(known, data_folder)
    with pytest.MonkeyPatch.context() as patch:
        folder = stop_after_checkpoints(open_phase("meta", "smoke", FREQUENT, seed=5), patch, 3)
    DAMAGE[damage](folder.path / "checkpoint.pt")
    if both:
        DAMAGE[damage](folder.path / "checkpoint.previous.pt")
    capsys.readouterr()
    summary = open_phase("meta", "smoke", FREQUENT, seed=5).run()
    output = capsys.readouterr().out
    assert "checkpoint.pt is not sound" in output and ("checkpoint.previous.pt is not sound" in output) == both
    assert ("resumed_at" in folder.status()) == (not both)
    assert summary["weights_sha256"] == expected["weights_sha256"]


def test_finished_phases_are_only_read(data_folder, monkeypatch):
    node = open_phase("meta", "smoke")
    first = node.run()
    files = {p: p.stat().st_mtime_ns for p in node.folder.path.iterdir()}
    monkeypatch.setattr("incubate_lib.phases.train.fit", lambda *a, **k: pytest.fail("trained again"))
    assert open_phase("meta", "smoke").run() == first
    assert {p: p.stat().st_mtime_ns for p in node.folder.path.iterdir()} == files


def test_changed_settings_get_a_folder_of_their_own_and_share_what_is_the_same(data_folder, monkeypatch):
    original = open_phase("incubate", "smoke", module_index=1)
    original.run()
    before = {p: p.read_bytes() for p in data_folder.rglob("*") if p.is_file()}
    changed = open_phase("incubate", "smoke", ["phases.incubate.lr=1e-3"], module_index=1)
    assert changed.experiment.path != original.experiment.path
    trained = []
    original_fit = phases.fit
    monkeypatch.setattr(phases, "fit", lambda *a, **k: trained.append(k["title"]) or original_fit(*a, **k))
    changed.run()
    assert len(trained) == 1 and "module 2" in trained[0]  # the meta model was copied, not trained again
    assert changed.inputs["meta"].summary()["copied_from"] == "smoke/seed-0/meta"
    assert {p: p.read_bytes() for p in before} == before


def test_another_fine_tuning_copies_everything_before_it(data_folder, monkeypatch):
    open_phase("assemble", "smoke").run()
    trained, original_fit = [], phases.fit
    monkeypatch.setattr(phases, "fit", lambda *a, **k: trained.append(k["title"]) or original_fit(*a, **k))
    node = open_phase("finetune", "smoke", ["phases.finetune.epochs=1"])
    assert node.run()["steps"] == 12
    assert trained == ["seed 0 finetune, deep_incubation"]
    assert node.inputs["assemble"].summary()["copied_from"] == "smoke/seed-0/deep_incubation/assemble"


def test_an_edited_file_never_reuses_the_old_run(data_folder, tmp_path):
    text = "name: mine\npartition: {num_modules: 2}\n"
    text += "model: {img_size: 8, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, in_chans: 1}\n"
    text += "data: {source: synthetic, test_images: 96}\ntraining: {epochs: 1, batch_size: 16, lr: LR}\n"
    summaries = []
    for lr in ("1e-3", "2e-3", "1e-3"):
        (tmp_path / "mine.yaml").write_text(text.replace("LR", lr))
        node = open_phase("meta", str(tmp_path / "mine.yaml"))
        summaries.append((node.run()["weights_sha256"], node.experiment.path.name))
    assert summaries[0] == summaries[2] != summaries[1]
    assert summaries[0][1] == "mine" and summaries[1][1].startswith("mine-")


def test_a_folder_of_other_settings_is_left_as_it_is(data_folder):
    node = open_phase("meta", "smoke")
    node.run()
    other = node.settings.model_copy(update={"seed": 7})
    with pytest.raises(SettingsError, match="belongs to other settings"), node.folder.claim(other):
        pass


def test_two_processes_never_train_the_same_phase(data_folder, tmp_path):
    """The second waits for the first, and takes over when the first is killed."""
    node = open_phase("meta", "smoke")
    first = context.Process(target=hold, args=(str(data_folder),), daemon=True)
    first.start()
    wait_for(lambda: node.folder.status()["state"] == "running", "the first process to hold the phase")
    output = tmp_path / "told"
    second = context.Process(target=run_meta, args=(str(data_folder), str(output)))
    second.start()
    wait_for(lambda: output.exists() and "waiting for process" in output.read_text(), "the second process to say that it waits")
    assert f"waiting for process {first.pid} on" in output.read_text()
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
        open_phase("meta", "smoke").run()


def hold(folder: str) -> None:
    os.environ["INCUBATE_DATA"] = folder
    node = open_phase("meta", "smoke")
    node.experiment.create()
    with node.folder.claim(node.settings):
        signal.pause()  # for ever: it is killed


def test_a_damaged_result_is_refused_by_what_needs_it(data_folder):
    node = open_phase("incubate", "smoke", module_index=0)
    meta = node.inputs["meta"]
    meta.run()
    blob = meta.folder.weights.read_bytes()
    meta.folder.weights.write_bytes(flip(blob))
    with pytest.raises(SettingsError, match=r"model\.safetensors is damaged; delete it and run again"):
        node.run()
    with pytest.raises(SettingsError, match="missing or damaged; run again"):
        node.folder.load_weights()
    meta.folder.weights.unlink()
    assert node.run()["inputs_sha256"] == {"meta": hashlib.sha256(blob).hexdigest()}


LOSS = {
    "deleted": Path.unlink,
    "empty": lambda p: p.write_bytes(b""),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "something else": lambda p: p.write_text("no weights are here"),
}


def test_a_result_without_whole_weights_is_not_finished_and_is_made_again(sound, data_folder, capsys):
    """Everybody who asks is told the same, and what needs the weights gets them."""
    plan_as(sound[1], data_folder)
    node = open_phase("incubate", "smoke", module_index=0)
    meta = node.inputs["meta"]
    first = meta.run()
    (meta.folder.path / "notebook.ipynb").touch()
    for lose in LOSS.values():
        assert execution.is_complete(meta) and node_line(meta).state == meta.folder.status()["state"] == "done"
        lose(meta.folder.weights)
        assert not execution.is_complete(meta) and not meta.finished() and not Pool([], 1, None, notebooks=False).is_done(meta)
        line = node_line(meta)
        assert line.state == meta.folder.status()["state"] == "waiting" and "missing or damaged" in line.note
        assert meta.summary()["weights_sha256"] == first["weights_sha256"], "its numbers are still true"
        capsys.readouterr()
        again = meta.run()
        assert again["weights_sha256"] == first["weights_sha256"] and "missing or damaged" in capsys.readouterr().out
    meta.folder.weights.unlink()
    (meta.folder.path / "summary.json").write_text("{")
    assert node.run()["inputs_sha256"] == {"meta": first["weights_sha256"]}


SHORT = {"partition.num_modules": 2, "training.epochs": 1, "machine.checkpoint_seconds": 100}
SHORT_OVERRIDES = [f"{name}={value}" for name, value in SHORT.items()]


def attempts(todo) -> set[tuple[str, int]]:
    return {(node.settings.phase, node.folder.status()["attempt"]) for node in todo.nodes}


def lose_meta(todo, as_elsewhere: bool) -> None:
    """Train a chain and delete its meta model, which was this machine's, or one with the last bits of another machine."""
    meta = todo.nodes[0]
    meta.run()
    if as_elsewhere:
        tensors = {name: tensor + 1e-3 for name, tensor in meta.folder.load_weights().items()}
        meta.folder.finish(meta.summary(), tensors)
    todo.run()
    assert attempts(todo) == {(phase, 1) for phase in ("meta", "incubate", "assemble", "finetune")}
    meta.folder.weights.unlink()


@pytest.mark.parametrize("as_elsewhere", [False, True], ids=["same bits", "other bits"])
def test_what_starts_from_a_phase_trained_again_is_made_again_only_if_the_bits_differ(as_elsewhere, data_folder, monkeypatch):
    monkeypatch.setattr(local, "fair_threads", lambda jobs: 1)  # as here: the same bits
    todo = plan(load_settings("smoke", SHORT_OVERRIDES), ["deep_incubation"])
    lose_meta(todo, as_elsewhere)
    old = {node: node.folder.summary()["weights_sha256"] for node in todo.nodes}
    output = io.StringIO()
    pool = Pool([(todo, {"preset": "smoke", "overrides": SHORT_OVERRIDES})], 2, Console(file=output), notebooks=False)
    assert local.finish(pool) == 0
    assert all(node.finished() for node in todo.nodes)
    rest = 2 if as_elsewhere else 1
    assert attempts(todo) == {("meta", 2), ("incubate", rest), ("assemble", rest), ("finetune", rest)}
    assert all((node.summary()["weights_sha256"] != sha) == as_elsewhere for node, sha in old.items())
    assert "seed 0 meta: its weights are missing or damaged; it is trained again; what starts from it" in output.getvalue()


def test_a_study_makes_again_what_starts_from_a_phase_trained_again(data_folder, tmp_path, monkeypatch):
    file = tmp_path / "one.yaml"
    file.write_text(json.dumps({"preset": "smoke", "strategies": ["deep_incubation"], "seeds": [0], "set": SHORT}))
    (trial,) = study.walk(load_study(str(file))).last()
    lose_meta(trial.plan, as_elsewhere=True)
    _, status = study.run(load_study(str(file)), backends.get(), local.LocalSettings(jobs=2), Console(file=io.StringIO()))
    assert status == 0 and all(node.finished() for node in trial.plan.nodes)
    assert {number for _, number in attempts(trial.plan)} == {2}


def test_jobs_are_submitted_for_what_starts_from_a_phase_trained_again(data_folder, capsys, monkeypatch):
    """Whether the bits differ is seen when the input is there: a job that finds its phase complete ends at once."""
    todo = plan(load_settings("smoke", SHORT_OVERRIDES), ["deep_incubation"])
    todo.run()
    for node in todo.nodes:
        (node.folder.path / "notebook.ipynb").touch()
    module = todo.nodes[1]
    module.folder.weights.unlink()
    source = {"preset": "smoke", "overrides": SHORT_OVERRIDES}
    monkeypatch.setenv("PATH", "")  # scripts are made without a cluster
    capsys.readouterr()
    slurm.submit(todo, source, SlurmSettings(), Console(file=io.StringIO()), dry_run=True)
    names = re.findall(r"^# sbatch .*--job-name=(\S+)", capsys.readouterr().out, re.M)
    final = todo.finals["deep_incubation", 0]
    keys = [module.key, final.inputs["assemble"].key, final.key, "06_analysis"]
    assert names == [f"{todo.experiment.path.name}/{key}" for key in keys]


def test_a_report_of_what_is_not_finished_is_not_taken_for_whole(sound, data_folder):
    """A phase may come to disagree with its input behind the back of a run."""
    plan_as(sound[1], data_folder)
    todo = plan(load_settings("smoke"), ["end_to_end"])
    for name in ("06_analysis.ipynb", "report.html"):
        (todo.experiment.path / name).touch()
    (todo.experiment.path / "analysed.json").write_text('{"end_to_end 0": "0123"}')
    assert not execution.analysed(todo)


def test_a_damaged_config_does_not_cost_the_checkpoints(sound, data_folder, capsys):
    expected, known = sound
    plan_as(known, data_folder)
    with pytest.MonkeyPatch.context() as patch:
        folder = stop_after_checkpoints(open_phase("meta", "smoke", FREQUENT, seed=5), patch, 3)
    whole = (folder.path / "config.json").read_bytes()
    (folder.path / "config.json").write_bytes(whole[: len(whole) // 2])
    assert open_phase("meta", "smoke", FREQUENT, seed=5).run()["weights_sha256"] == expected["weights_sha256"]
    assert folder.status()["resumed_at"] > 0 and "config.json is damaged" in capsys.readouterr().out
    assert (folder.path / "config.json").read_bytes() == whole
    assert folder.metrics()[0]["step"] == 0


def test_a_damaged_config_beside_checkpoints_of_another_phase_means_a_new_start(sound, data_folder):
    expected, known = sound
    plan_as(known, data_folder)
    with pytest.MonkeyPatch.context() as patch:
        other = stop_after_checkpoints(open_phase("meta", "smoke", FREQUENT, seed=6), patch, 3)
    node = open_phase("meta", "smoke", FREQUENT, seed=5)
    shutil.copytree(other.path, node.folder.path)
    (node.folder.path / "config.json").write_text("{")
    assert node.run()["weights_sha256"] == expected["weights_sha256"] and "resumed_at" not in node.folder.status()


def test_a_finished_phase_without_its_config_is_left_as_it_is(sound, data_folder):
    plan_as(sound[1], data_folder)
    node = open_phase("meta", "smoke")
    node.run()
    (node.folder.path / "config.json").write_text("")
    other = node.settings.model_copy(update={"seed": 7})
    with pytest.raises(SettingsError, match="belongs to other settings"), node.folder.claim(other):
        pass
    assert node.finished()


@pytest.mark.parametrize("cut", [b'{"step": 0, "epo', b"\xff" + bytes(20)], ids=["half", "no text"])
def test_a_line_cut_short_by_a_kill_is_not_glued_to_the_next(cut, sound, data_folder):
    settings = load_settings("smoke", ["mat.probe=4", "mat.warmup_epochs=0.5", "phases.end_to_end.epochs=1"])
    node = plan(settings, ["mat"], facts=Facts.model_validate(read_json(sound[1])["facts"])).nodes[0]
    with contextlib.suppress(KeyboardInterrupt), node.folder.claim(node.settings):
        for file in (METRICS, MNTK):
            (node.folder.path / file).write_bytes(cut)
        raise KeyboardInterrupt
    node.run()
    for file, steps in ((METRICS, [0, 12]), (MNTK, [0, 6])):
        rows = [json.loads(line) for line in (node.folder.path / file).read_text().splitlines()]
        assert [row["step"] for row in rows] == steps


def test_modules_of_two_meta_models_never_meet(data_folder):
    """Same settings, other weights (another device, a retrained meta model): what was made from the first is made again."""
    node, other = (open_phase("incubate", "smoke", module_index=i) for i in (1, 2))
    first, meta = node.run(), node.inputs["meta"]
    assert node.summary() == first and first["inputs_sha256"] == {"meta": meta.summary()["weights_sha256"]}
    tensors = {name: tensor + 0.1 for name, tensor in meta.folder.load_weights().items()}
    meta.folder.finish(meta.summary(), tensors)
    assert node.summary() is None
    variant = open_phase("incubate", "smoke", ["phases.finetune.epochs=1"], module_index=1)
    second = node.run()
    assert second["weights_sha256"] != first["weights_sha256"] and node.folder.status()["attempt"] == 2
    assert second["inputs_sha256"] == other.run()["inputs_sha256"] == {"meta": meta.summary()["weights_sha256"]}
    assert variant.run()["copied_from"] == "smoke/seed-0/deep_incubation/incubate-1"
    shutil.rmtree(meta.folder.path)  # to save space: what is finished stays finished
    assert node.summary() == second


def test_other_images_than_planned_with_are_told(data_folder, tmp_path):
    text = "model: {img_size: 8, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2, in_chans: 1}\n"
    text += "data: {source: synthetic, test_images: 96}\npartition: {num_modules: 2}\ntraining: {batch_size: 16}\n"
    (tmp_path / "mine.yaml").write_text(text)
    node = open_phase("meta", str(tmp_path / "mine.yaml"))
    node.experiment.create()
    file = node.experiment.path / "experiment.json"
    file.write_text(file.read_text().replace('"num_images": 288', '"num_images": 300'))
    with pytest.raises(
        SettingsError, match=r"there are 288 training images in 4 classes, but 300 in 4 when this experiment began"
    ):
        open_phase("meta", str(tmp_path / "mine.yaml")).run()


def test_a_phase_does_not_depend_on_what_does_not_concern_it(data_folder):
    plain, halves = (
        open_phase("end_to_end", "smoke", ["phases.end_to_end.epochs=1", *more]) for more in ([], ["partition.num_modules=2"])
    )
    assert plain.digest == halves.digest
    deep = open_phase("meta", "smoke", ["model.depth=9"])
    assert deep.digest == open_phase("meta", "smoke").digest


def test_nothing_is_unpickled(tmp_path):
    """A checkpoint that would run code when unpickled is refused, and its code is not run."""
    ran = tmp_path / "ran"
    torch.save({"step": Evil(str(ran))}, tmp_path / "checkpoint.pt")
    state, complaints = PhaseFolder(tmp_path).load_checkpoint()
    assert state is None and "not sound" in complaints[0]
    assert not ran.exists()


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


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
    assert found[0][1] < 36 * 16 * node.experiment.facts.flops_per_image["target"] + summary["mat"]["flops"]
