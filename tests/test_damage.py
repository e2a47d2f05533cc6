"""Damaged checkpoints, results and settings: named, and never used."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from stopping import stop_after_checkpoints

from incubate_lib.backends.local.pool import Pool
from incubate_lib.config import SettingsError
from incubate_lib.pipeline.graph import Plan
from incubate_lib.pipeline.strategies import open_phase
from incubate_lib.pipeline.view import node_line
from incubate_lib.report.tables.records import check_metrics
from incubate_lib.training.runs import PhaseFolder

pytestmark = pytest.mark.xdist_group("damage")  # one process, so that what is compared with is trained once


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
    "a count is missing": rewrite(lambda state: state["counts"].pop("loss_sum")),
    "of another phase": rewrite(lambda state: state["whose"].update(hash="another")),
    "no dictionary": lambda p: torch.save(torch.zeros(1), p),
}


def flip(blob: bytes) -> bytes:
    middle = len(blob) // 3
    return blob[:middle] + bytes([blob[middle] ^ 1]) + blob[middle + 1 :]


FREQUENT = ["machine.checkpoint_seconds=0.0", "phases.meta.epochs=0.5", "phases.meta.warmup_epochs=0"]  # of 6 steps


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A meta model trained without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INCUBATE_DATA", str(tmp_path_factory.mktemp("sound")))
        return open_phase("meta", "smoke", FREQUENT, seed=5).run()


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("both", [False, True], ids=["newest", "both"])
def test_a_damaged_checkpoint_is_named_and_what_is_sound_is_used(damage, both, sound, data_folder, capsys):
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
    assert summary["weights_sha256"] == sound["weights_sha256"]


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


def test_a_result_without_whole_weights_is_not_finished_and_is_made_again(data_folder, capsys):
    """Everybody who asks is told the same, and what needs the weights gets them."""
    node = open_phase("incubate", "smoke", module_index=0)
    meta = node.inputs["meta"]
    first = meta.run()
    (meta.folder.path / "notebook.ipynb").touch()
    pool = Pool(Plan(meta.experiment, [meta], {}), 1, None, notebooks=False)
    for lose in LOSS.values():
        assert meta.job.is_complete() and node_line(meta).state == meta.folder.status()["state"] == "done"
        lose(meta.folder.weights)
        assert not meta.job.is_complete() and not meta.finished() and not pool.is_done(meta)
        line = node_line(meta)
        assert line.state == meta.folder.status()["state"] == "waiting" and "missing or damaged" in line.note
        assert meta.summary()["weights_sha256"] == first["weights_sha256"], "its numbers are still true"
        capsys.readouterr()
        again = meta.run()
        assert again["weights_sha256"] == first["weights_sha256"] and "missing or damaged" in capsys.readouterr().out
    meta.folder.weights.unlink()
    (meta.folder.path / "summary.json").write_text("{")
    assert node.run()["inputs_sha256"] == {"meta": first["weights_sha256"]}


def test_a_line_that_is_no_evaluation_is_told_but_for_one_that_a_kill_cut_short(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0}\n{"step": 1}\n{"ste')
    check_metrics(PhaseFolder(tmp_path))
    file.write_text('{"step": 0}\n[3]\n{"step": NaN}\n')
    with pytest.raises(SettingsError, match=r"metrics\.jsonl has 2 line\(s\) that are no evaluations"):
        check_metrics(PhaseFolder(tmp_path))


@pytest.mark.parametrize("name", ["phase.json", "status.json"])
def test_a_damaged_record_does_not_cost_the_checkpoints(name, sound, data_folder):
    with pytest.MonkeyPatch.context() as patch:
        folder = stop_after_checkpoints(open_phase("meta", "smoke", FREQUENT, seed=5), patch, 3)
    whole = {name: (folder.path / name).read_bytes() for name in ("phase.json", "status.json")}
    (folder.path / name).write_bytes(whole[name][: len(whole[name]) // 2])
    assert open_phase("meta", "smoke", FREQUENT, seed=5).run()["weights_sha256"] == sound["weights_sha256"]
    assert folder.status()["resumed_at"] > 0
    assert (folder.path / "phase.json").read_bytes() == whole["phase.json"]
    assert folder.metrics()[0]["step"] == 0


def test_a_damaged_status_beside_checkpoints_of_another_phase_means_a_new_start(sound, data_folder):
    with pytest.MonkeyPatch.context() as patch:
        other = stop_after_checkpoints(open_phase("meta", "smoke", FREQUENT, seed=6), patch, 3)
    node = open_phase("meta", "smoke", FREQUENT, seed=5)
    shutil.copytree(other.path, node.folder.path)
    (node.folder.path / "status.json").write_text("{")
    assert node.run()["weights_sha256"] == sound["weights_sha256"] and "resumed_at" not in node.folder.status()


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
