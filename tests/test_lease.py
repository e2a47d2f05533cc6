"""Who may write into a folder that processes of many hosts share, without file locks."""

import json
import multiprocessing
import os
import re
import resource
import socket
import time

import pytest
import sentences
from patience import wait_for

from incubate_lib.config import load_settings
from incubate_lib.pipeline.strategies import plan
from incubate_lib.training import lease
from incubate_lib.training.files import read_json
from incubate_lib.training.lease import Lease, Lost, holder
from incubate_lib.training.runs import PhaseFolder, whose

context = multiprocessing.get_context("forkserver")


def test_only_one_holds_a_folder(tmp_path):
    first = Lease.take(tmp_path)
    assert first.number == 1 and Lease.take(tmp_path) is None
    with first.held():
        assert holder(tmp_path)["pid"] == os.getpid()
    assert holder(tmp_path) is None
    assert Lease.take(tmp_path).number == 2


def race(folder: str, barrier, won) -> None:
    from pathlib import Path

    barrier.wait()
    if Lease.take(Path(folder)):
        with won.get_lock():
            won.value += 1
    barrier.wait()  # nobody dies, and so lets go, before all have tried


def test_of_many_that_come_at_once_one_wins(tmp_path):
    for attempt in range(3):
        barrier, won = context.Barrier(8), context.Value("i", 0)
        processes = [context.Process(target=race, args=(str(tmp_path / str(attempt)), barrier, won)) for _ in range(8)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert won.value == 1


def of_another_host(folder, **changes) -> Lease:
    """A lease that a process on some other host holds."""
    mine = Lease.take(folder)
    record = json.loads(mine.path.read_text()) | {"host": "elsewhere", "pid": 1} | changes
    mine.path.write_text(json.dumps(record))
    return mine


def test_a_dead_process_of_this_host_is_known_at_once_even_if_its_number_lives_on(tmp_path):
    mine = of_another_host(tmp_path, host=socket.gethostname(), pid=os.getpid())
    born = json.loads(mine.path.read_text())["born"].rpartition(" ")[0] + " 17"
    of_this_number(mine, born)
    assert holder(tmp_path) is None and Lease.take(tmp_path)


def test_a_process_of_another_container_with_this_hosts_name_is_judged_by_its_signs_of_life(tmp_path):
    mine = of_another_host(tmp_path, host=socket.gethostname(), pid=os.getpid())
    of_this_number(mine, "this boot pid:[4711] 17")
    assert holder(tmp_path)["lost_in"] > 0 and Lease.take(tmp_path) is None
    os.utime(mine.path, (0, 0))
    assert Lease.take(tmp_path)


def of_this_number(mine: Lease, born: str) -> None:
    mine.path.write_text(json.dumps(json.loads(mine.path.read_text()) | {"born": born}))


def test_a_record_that_is_not_written_yet_holds(tmp_path):
    (tmp_path / "000001.json").touch()
    assert holder(tmp_path) and Lease.take(tmp_path) is None


@pytest.mark.parametrize("text", ["", '{"host": "elsewh', "[]", "17", '{"host": "elsewhere"}', "\x00\x00"])
def test_a_record_that_stays_unwritten_is_nobody_s(tmp_path, text):
    """It is of a full disk, of a host that lost power, or of something else."""
    (tmp_path / "000001.json").write_text(text)
    (tmp_path / "notes.json").touch()
    assert 0 < holder(tmp_path)["lost_in"] <= lease.WRITING_SECONDS
    before = time.time() - lease.WRITING_SECONDS - 1
    os.utime(tmp_path / "000001.json", (before, before))
    assert holder(tmp_path) is None and Lease.take(tmp_path).number == 2


def test_a_record_from_the_future_is_nobody_s(tmp_path):
    """The clock was set back since; who is alive touches it again."""
    theirs = of_another_host(tmp_path)
    later = time.time() + 3600
    os.utime(theirs.path, (later, later))
    assert holder(tmp_path) is None
    os.utime(theirs.path)
    assert holder(tmp_path)["host"] == "elsewhere"


def on_a_full_disk(folder: str) -> None:
    from pathlib import Path

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # files can be made, and nothing written into them
    try:
        Lease.take(Path(folder))
    except OSError:
        os._exit(17)


def test_a_full_disk_locks_nobody_out(tmp_path):
    process = context.Process(target=on_a_full_disk, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 17
    assert Lease.take(tmp_path).number == 1


def test_it_is_said_who_holds_a_folder_since_when_and_until_when(tmp_path):
    of_another_host(tmp_path, since="2026-11-26 08:15")
    assert re.fullmatch(
        r"process 1 on elsewhere, since 2026-11-26 08:15; without a sign of life from it, it is taken over in 1\d\d s",
        lease.in_words(holder(tmp_path)),
    )


def test_a_process_that_one_may_not_look_at_lives(tmp_path, monkeypatch):
    """Hosts may hide the processes of other users."""
    of_another_host(tmp_path, host=socket.gethostname(), born="this boot 17")
    monkeypatch.setattr(lease, "_born", lambda pid: "alive")
    assert holder(tmp_path)["pid"] == 1 and Lease.take(tmp_path) is None
    os.utime(tmp_path / "000001.json", (0, 0))  # … as long as it gives signs of life: the number may be another's by now
    assert Lease.take(tmp_path)


def test_another_host_is_judged_by_its_signs_of_life_on_the_file_servers_clock(tmp_path, monkeypatch):
    theirs = of_another_host(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this host's clock is decades ahead
    assert holder(tmp_path)["host"] == "elsewhere" and Lease.take(tmp_path) is None
    long_ago = theirs.path.stat().st_mtime - lease.LOST_SECONDS - 1
    os.utime(theirs.path, (long_ago, long_ago))
    monkeypatch.setattr(time, "time", lambda: 0.0)  # … or behind
    assert holder(tmp_path) is None
    mine = Lease.take(tmp_path)
    mine.check()
    with pytest.raises(Lost, match=sentences.TAKEN_OVER):
        theirs.check()


def test_signs_of_life_are_given_whatever_the_process_does(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    mine = Lease.take(tmp_path)
    with mine.held():
        for _ in range(3):  # this process only waits, as for a scan of images, a compilation, an evaluation
            os.utime(mine.path, (0, 0))
            assert wait_for(lambda: mine.path.stat().st_mtime > 0, "a sign of life")
            assert holder(tmp_path), "and to others it is alive"


def test_an_earlier_attempt_of_the_same_job_is_over(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    of_another_host(tmp_path)
    assert holder(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert Lease.take(tmp_path)


def test_records_do_not_pile_up(tmp_path):
    for _ in range(20):
        with Lease.take(tmp_path).held():
            pass
    assert len(list(tmp_path.iterdir())) <= lease.KEPT + 1


def test_who_was_taken_for_dead_writes_nothing_more(data_folder):
    """A host is cut off in the middle of a phase, another one finishes it, the first comes back."""
    node = plan(load_settings("smoke"), ["end_to_end"]).nodes[0]
    cut_off = PhaseFolder(node.folder.path)
    with pytest.raises(Lost), cut_off.claim(whose(node.digest, {}, node.facts.num_images)):
        record = json.loads(cut_off.lease.path.read_text())
        cut_off.lease.path.write_text(json.dumps(record | {"host": "elsewhere"}))
        os.utime(cut_off.lease.path, (0, 0))
        assert node.folder.status()["state"] == "interrupted"
        summary = node.run()
        files = {p: p.read_bytes() for p in node.folder.path.iterdir() if p.is_file()}
        for write in (
            lambda: cut_off.set_status("running", progress={"step": 3}),
            lambda: cut_off.add_metrics({"step": 3}),
            lambda: cut_off.save_checkpoint({"counts": {"step": 3}}),
            lambda: cut_off.finish({}, {"model": {}}),
        ):
            with pytest.raises(Lost):
                write()
        cut_off.add_metrics({"step": 4})
    left = {p: p.read_bytes() for p in node.folder.path.iterdir() if p.is_file()}
    assert {p: blob for p, blob in left.items() if not p.name.endswith(".tmp")} == files
    assert node.summary() == summary and read_json(node.folder.path / "status.json")["state"] == "done"
