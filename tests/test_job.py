"""What follows from how an attempt at a phase ended; the real jobs are in test_slurm.py."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
import sentences
import torch

from incubate_lib.backends.slurm import job
from incubate_lib.backends.slurm.attempts import AGAIN, NO_WORD, WARNED, has_ended, stuck
from incubate_lib.config import DataSettings, MachineSettings, SettingsError
from incubate_lib.data.scratch import stage
from incubate_lib.pipeline.strategies import open_phase
from incubate_lib.training.files import read_json, write_json
from incubate_lib.training.trainer import compiled


@pytest.fixture
def phase(data_folder, tmp_path, monkeypatch):
    """A phase whose job has just ended."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("INCUBATE_STOP", str(tmp_path / "STOP-17-2"))
    node = open_phase("end_to_end", "smoke")
    node.job.write()
    return node, {"phase": node.job.path, "notebook": True, "attempts": 3}


def attempts(node, *ends, job="17", step=0) -> None:
    found = [
        {"job": job, "restart": i, "node": "n1", "began": 0.0, "from_step": step, "log_from": 0, "saved_step": step, "ended": end}
        for i, end in enumerate(ends)
    ]
    for last in found:
        if last["ended"] is None:
            del last["ended"], last["saved_step"]
    write_json(node.folder.path / "attempts.json", found)


def say(node, text: str, saved: int = 0) -> None:
    (node.folder.path / "log.txt").write_text(text)
    node.folder.set_status("stopped", saved_step=saved)


def test_a_failure_is_tried_again_until_it_repeats_itself(phase, monkeypatch):
    node, about = phase
    say(node, "error: OSError: device 4711 is away\n")
    attempts(node, "OSError: device 12 is away", None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert job.verdict(about, 1) == AGAIN
    attempts(node, "OSError: device 12 is away", "OSError: device 13 is away", None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert job.verdict(about, 1) == job.GIVEN_UP
    assert node.folder.status()["state"] == "failed"
    assert node.folder.status()["error"] == f"{sentences.GIVEN_UP}OSError: device 4711 is away"


@pytest.mark.parametrize(
    ("ends", "saved"),
    [(("MemoryError: much", "OSError: a"), 0), (("OSError: a", "OSError: a"), 5)],
    ids=["otherwise", "progress"],
)
def test_a_failure_of_another_kind_or_with_progress_is_tried_again(ends, saved, phase):
    node, about = phase
    say(node, "error: OSError: a\n", saved)
    attempts(node, *ends, None)
    assert job.verdict(about, 1) == AGAIN


def test_attempts_of_an_earlier_job_do_not_count(phase):
    node, about = phase
    say(node, "error: OSError: a\n")
    attempts(node, *["OSError: a"] * 3, job="16")
    assert job.verdict(about, 1) == AGAIN


@pytest.mark.parametrize("error", ["SettingsError: batch_size", "FloatingPointError: loss is nan"])
def test_what_would_fail_the_same_way_is_not_tried_again(error, phase):
    node, about = phase
    say(node, f"error: {error}\n")
    attempts(node, "OSError: a", "OSError: b", None)
    assert job.verdict(about, 1) == 1 and node.folder.status()["error"] == error


def test_bad_input_is_not_tried_again_and_a_warning_before_it_counts_more(phase):
    """A phase without a notebook says what was wrong, and by its exit status that it was the input."""
    node, about = phase
    say(node, "error: 8 images at once need more than the 1 GiB of this GPU\n")
    attempts(node, "OSError: a", "OSError: b", None)
    assert job.verdict(about, 2) == 1 and node.folder.status()["error"].startswith("8 images at once")
    attempts(node, "OSError: a", "OSError: b", None)
    open(os.environ["INCUBATE_STOP"], "w").close()
    assert job.verdict(about, 2) == AGAIN


def test_what_another_job_trains_is_left_to_it_and_looked_for_again(phase):
    """Two runs may have submitted one phase at once; the later one goes on, and what waits for the earlier one must not end."""
    node, about = phase
    attempts(node, None, job="18")
    before = (node.folder.path / "attempts.json").read_bytes()
    assert job.verdict(about, 1) == AGAIN and (node.folder.path / "attempts.json").read_bytes() == before
    node.folder.stop_file.touch()
    assert job.verdict(about, 1) == job.STOPPED


def test_a_warning_means_another_attempt_and_a_stop_does_not(phase):
    node, about = phase
    say(node, "error: Stopped: at step 3", 3)
    attempts(node, "OSError: a", "OSError: b", None)
    stop = os.environ["INCUBATE_STOP"]
    open(stop, "w").close()
    assert job.verdict(about, 1) == AGAIN and not os.path.exists(stop)
    assert has_ended(node.folder, "17") and not has_ended(node.folder, "18")
    assert read_json(node.folder.path / "attempts.json")[-1]["ended"] == WARNED
    node.folder.stop_file.touch()
    assert job.verdict(about, 1) == job.STOPPED and job.attempt(about) == job.STOPPED


def test_what_cannot_even_begin_counts_as_an_attempt(phase):
    node, about = phase
    say(node, "")
    attempts(node, "ended with exit status 213", "ended with exit status 213")
    assert job.verdict(about, 13) == AGAIN
    assert [a["ended"] for a in read_json(node.folder.path / "attempts.json")][-1] == "ended with exit status 13"


def test_an_attempt_on_a_node_that_was_taken_for_dead_leaves_the_later_one_alone(phase, monkeypatch, capsys):
    node, about = phase
    say(node, f"error: Lost: {sentences.TAKEN_OVER}\n")
    attempts(node, "OSError: a", None, None)
    before = (node.folder.path / "attempts.json").read_bytes()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert job.verdict(about, 1) == 1 and "a later attempt took over" in capsys.readouterr().out
    assert (node.folder.path / "attempts.json").read_bytes() == before


@pytest.mark.parametrize("luck", [NO_WORD, WARNED])
def test_bad_luck_is_given_up_later_than_failures(luck, phase, monkeypatch):
    """Preempted again and again before the first step; a node that goes down and down."""
    node, about = phase
    attempts(node, *[luck] * 8)
    assert not stuck(read_json(node.folder.path / "attempts.json"), "17", 3)
    attempts(node, *[luck] * 9)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "9")
    monkeypatch.setattr(job.execution, "start", lambda *a, **k: pytest.fail("begun again"))
    assert job.attempt(about) == job.GIVEN_UP == job.verdict(about, job.GIVEN_UP)
    assert f"{sentences.GIVEN_UP}{luck}" == node.folder.status()["error"]


def test_failures_that_alternate_do_not_go_on_for_ever(phase):
    node, _ = phase
    attempts(node, *["OSError: a", "MemoryError: b"] * 4, "OSError: a")
    assert stuck(read_json(node.folder.path / "attempts.json"), "17", 3)


@pytest.mark.parametrize("ends", [(None, "OSError: a"), ("OSError: a", None), (None, None, NO_WORD)])
def test_an_attempt_that_nobody_closed_is_bad_luck(ends, phase, monkeypatch):
    """Its node was lost, or it was taken for dead while the next one began."""
    node, about = phase
    say(node, "error: OSError: a\n")
    attempts(node, *ends)
    assert not stuck(read_json(node.folder.path / "attempts.json"), "17", 3)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(len(ends)))  # the next one of this job could not even begin
    assert job.verdict(about, 1) == AGAIN
    found = read_json(node.folder.path / "attempts.json")
    assert len(found) == len(ends) + 1 and all("ended" in a for a in found[len(ends) - 1 :])
    attempts(node, *[None] * 9)
    assert stuck(read_json(node.folder.path / "attempts.json"), "17", 3) and not stuck([], "17", 3)


def test_changed_settings_are_told(phase):
    node, about = phase
    file = node.folder.path / "phase.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 7'))
    for then in (lambda: job.verdict(about, 1), lambda: job.attempt(about)):
        with pytest.raises(SettingsError, match="has other settings than its folder"):
            then()
    assert node.folder.status()["state"] == "waiting"


def test_a_phase_that_cannot_be_read_is_told(phase, capsys):
    node, about = phase
    (node.folder.path / "phase.json").write_text("{")
    assert job.main(["attempt", json.dumps(about)]) == 1 and "phase.json is damaged" in capsys.readouterr().out
    assert node.folder.status()["state"] == "failed" and "phase.json is damaged" in node.folder.status()["error"]


# -- data on a local disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def images(data_folder):
    folder = data_folder / "datasets" / "mine"
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "val/b").symlink_to(folder / "train/b")
    return folder


DATA = DataSettings(source="folder", folder="mine")


def test_images_are_copied_to_scratch_once(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAST", str(tmp_path / "fast"))
    machine = stage(DATA, MachineSettings(scratch="$FAST/images"))
    copy = Path(machine.data_folder)
    assert copy.parents[1] == tmp_path / "fast" / "images" and machine.scratch is None
    assert copy.parent.stat().st_mode & 0o777 == 0o700 and copy.parent.owner() == tmp_path.owner()
    assert (copy / "val/b/2.png").read_bytes() == b"train/b/2.png" and "copying 4 files" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    assert stage(DATA, MachineSettings(scratch="$FAST/images")) == machine
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*")} == before
    time.sleep(0.01)
    (images / "train/a/new.png").write_bytes(b"new")
    again = stage(DATA, MachineSettings(scratch="$FAST/images"))
    assert again.data_folder != machine.data_folder and os.path.exists(again.data_folder + "/train/a/new.png")


def test_a_half_copied_folder_is_not_used(images, tmp_path):
    machine = stage(DATA, MachineSettings(scratch=str(tmp_path / "fast")))
    copy = Path(machine.data_folder)
    half = copy.with_name(f"{copy.name}.{socket.gethostname()}.half")
    copy.rename(half)
    (half / "train/a/1.png").write_bytes(b"half")
    stage(DATA, MachineSettings(scratch=str(tmp_path / "fast")))
    assert (copy / "train/a/1.png").read_bytes() == b"train/a/1.png" and not half.exists()


PLANTED = {
    "a link": lambda folder, elsewhere: folder.symlink_to(elsewhere),
    "a link to nothing": lambda folder, elsewhere: folder.symlink_to(elsewhere / "nothing"),
    "a file": lambda folder, elsewhere: folder.touch(mode=0o600),
    "open to others": lambda folder, elsewhere: (folder.mkdir(), folder.chmod(0o777)),
    "another user's": lambda folder, elsewhere: folder.mkdir(mode=0o700),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_what_others_may_have_put_into_a_shared_folder_is_not_used(plant, images, tmp_path, monkeypatch):
    """Copies of images, and what torch.compile unpickles: their names can be guessed."""
    shared, elsewhere = tmp_path / "shared", tmp_path / "elsewhere"
    shared.mkdir()
    elsewhere.mkdir()
    if plant == "another user's":
        monkeypatch.setattr(os, "getuid", lambda: 4711)
    PLANTED[plant](shared / f"incubate-{os.getuid()}", elsewhere)
    output = r".*incubate-\d+ is not a folder that only you can write to .* another place with"
    with pytest.raises(OSError, match=rf"machine\.scratch {output} machine\.scratch, .*exFAT"):
        stage(DATA, MachineSettings(scratch=str(shared)))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(shared))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with pytest.raises(SettingsError, match=rf"machine\.compile 'default': {output} TORCHINDUCTOR_CACHE_DIR"):
        compiled(torch.nn.Linear(1, 1), "default", backend="eager")
    assert not list(elsewhere.iterdir()) and "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_what_inductor_keeps_lies_in_a_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "chosen"))
    compiled(torch.nn.Linear(1, 1), "default", backend="eager")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "chosen") and len(list(tmp_path.iterdir())) == 1
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compiled(torch.nn.Linear(1, 1), "default", backend="eager")
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent == tmp_path / f"incubate-{os.getuid()}"


def test_a_scratch_that_cannot_be_is_told(images, tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=r"machine\.scratch is '\$NOWHERE', and that variable is not set on"):
        stage(DATA, MachineSettings(scratch="$NOWHERE"))
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    stage(DATA, MachineSettings(scratch="~no_such_user"))  # as shells do it: then it is a name like any other
    assert (tmp_path / "~no_such_user").is_dir()
    with pytest.raises(OSError, match=r"machine\.scratch .*: Not a directory"):
        stage(DATA, MachineSettings(scratch=str(tmp_path / "file/below")))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 3}))
    with pytest.raises(OSError, match=r"machine\.scratch .*: 0\.0 GB are free, but"):
        stage(DATA, MachineSettings(scratch=str(tmp_path / "fast")))
    assert stage(DataSettings(), MachineSettings(scratch="$NOWHERE")).scratch == "$NOWHERE"  # nothing to copy
