"""Images that are opened as they are needed: which, in which order, by which processes; judged each once."""

import mmap
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import layouts
import numpy as np
import pytest
import sentences
import torch
from layouts import AUGMENTED, open_folder, settings_file, write_folder
from patience import wait_for

from incubate_lib.config import DataSettings, MachineSettings, SettingsError, TrainingSettings, load_settings
from incubate_lib.data.order import Order
from incubate_lib.data.sets import ImageSet, load_data
from incubate_lib.data.stream import PREFETCH, StreamedSet, check_shared_memory
from incubate_lib.pipeline.strategies import open_phase
from incubate_lib.training.files import read_json, write_json
from incubate_lib.training.loop import evaluate


@pytest.mark.parametrize("devices", [1, 2, 3, 6])
def test_devices_share_the_micro_batches_of_one(devices):
    """Whatever the number of devices, an update consists of the same micro-batches; an epoch holds no image twice."""
    recipe = TrainingSettings(batch_size=12, micro_batch=2, epochs=3)
    orders = [Order(50, recipe, seed=4, steps=8, rank=r, devices=devices) for r in range(devices)]
    parts = [[images.tolist() for _, _, images in order] for order in orders]
    alone = [images.tolist() for _, _, images in Order(50, recipe, seed=4, steps=8)]
    per_update = 6 // devices
    together = [
        parts[k % devices][step * per_update + k // devices] for step in range(8) for k in range(6)
    ]  # micro-batch k of an update belongs to rank k mod N
    assert together == alone
    epoch = [i for micro in alone[: 4 * 6] for i in micro]
    assert len(set(epoch)) == len(epoch) == 48
    resumed = [images.tolist() for _, _, images in Order(50, recipe, seed=4, start=5, steps=8)]
    assert resumed == alone[5 * 6 :]


def test_repeated_augmentation_shows_a_third_of_the_images():
    recipe = TrainingSettings(batch_size=12, repeats=3, epochs=1)
    epoch = torch.cat([images for _, _, images in Order(120, recipe, seed=0, steps=10)])
    assert len(epoch) == 120 and len(epoch.unique()) == 40
    assert (epoch.bincount(minlength=120)[epoch.unique()] == 3).all()


def test_worker_processes_change_nothing(tmp_path):
    """The same pixels from no worker and from two, from the start and from the middle."""
    write_folder(tmp_path / "set")

    def stream(workers, start):
        settings = DataSettings(source="folder", folder=str(tmp_path / "set"))
        how = MachineSettings(workers=workers)
        train, test = load_data(settings, shape=(3, 16, 16), machine=how)
        order = Order(len(train), AUGMENTED, seed=1, start=start, steps=9)
        return [x for x, _ in train.batches(order)], list(test.eval_batches())

    (alone, eval_batches), (helped, same) = stream(0, 0), stream(2, 0)
    assert len(alone) == 9 and all(map(torch.equal, alone, helped))
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(eval_batches, same, strict=True))
    assert all(map(torch.equal, stream(2, 4)[0], alone[4:]))


def test_no_worker_is_left_when_all_images_are_read_or_no_more_are_wanted(tmp_path):
    """A notebook's kernel is ended while it holds them: their semaphores would outlive it."""
    write_folder(tmp_path / "set")
    settings, how = DataSettings(source="folder", folder=str(tmp_path / "set")), MachineSettings(workers=2)
    _, test = load_data(settings, shape=(3, 16, 16), machine=how)
    before = set(multiprocessing.active_children())
    for read in (list, next):
        read(test.eval_batches(keep=False))
        assert set(multiprocessing.active_children()) == before
    list(test.eval_batches())
    assert len(set(multiprocessing.active_children()) - before) == 2
    list(test.eval_batches(keep=False))
    assert set(multiprocessing.active_children()) == before


def test_devices_of_other_machines_take_no_cores_of_this_one(tmp_path, monkeypatch):
    write_folder(tmp_path / "set")
    monkeypatch.setenv("INCUBATE_THREADS", "16")  # of a node
    settings, of_two = DataSettings(source="folder", folder=str(tmp_path / "set")), MachineSettings(devices=2)
    train, _ = load_data(settings, shape=(3, 16, 16), machine=of_two)
    assert [train.loader(TrainingSettings(), [], devices).num_workers for devices in (1, 2, 8)] == [16, 8, 8]


def read_for_ever(folder: str, output: str, stop: str) -> None:
    os.environ["INCUBATE_STOP"] = stop
    settings = DataSettings(source="folder", folder=folder)
    train, _ = load_data(settings, shape=(3, 16, 16), machine=MachineSettings(workers=2))
    reader = iter(train.loader(TrainingSettings(), [[(0, 0)]] * 1_000_000, 1))
    for number, _ in enumerate(reader):
        write_json(Path(output), {"read": number, "workers": [worker.pid for worker in reader._workers]})


@pytest.mark.parametrize("warned", [False, True])
def test_worker_processes_end_with_the_process_that_reads_from_them(warned, tmp_path):
    """Killed, not asked: nothing of it can clean up. Slurm's warning to all processes of a job does not end them before."""
    write_folder(tmp_path / "set")
    output = tmp_path / "told.json"
    process = multiprocessing.get_context("forkserver").Process(
        target=read_for_ever, args=(str(tmp_path / "set"), str(output), str(tmp_path / "STOP") if warned else "")
    )
    process.start()
    workers = wait_for(lambda: read_json(output), "the first images")["workers"]
    assert len(workers) == 2 and all(is_there(pid) for pid in workers)
    if warned:
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        before = read_json(output)["read"]
        wait_for(lambda: read_json(output)["read"] > before + 3 * PREFETCH * len(workers), "images that were read since")
        assert all(is_there(pid) for pid in workers)
    process.kill()
    process.join()
    wait_for(lambda: not any(is_there(pid) for pid in workers), "the workers to end")


def is_there(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_every_image_is_judged_once_whatever_the_number_of_devices(tmp_path):
    write_folder(tmp_path / "set")
    train, _ = open_folder(tmp_path / "set")
    for devices in (1, 2, 5):
        labels = []
        for rank in range(devices):
            fresh, _ = open_folder(tmp_path / "set")
            labels += [y for _, y in fresh.eval_batches(rank, devices)]
        assert torch.cat(labels).bincount().tolist() == [8, 8, 8]
    assert isinstance(train, StreamedSet)


def test_training_on_a_folder_learns_and_reports_what_it_saw(tmp_path, data_folder, monkeypatch):
    monkeypatch.setattr(layouts, "RNG", np.random.default_rng(0))  # the same images whichever tests ran before
    write_folder(tmp_path / "set", train=16)
    (tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set", ", crop_pct: 1.0"))
    changes = ["training.epochs=25", "training.lr=5e-4", "training.warmup_epochs=2", "training.clip_grad=1.0"]
    changes += ["training.repeats=2", "training.erase=0.2", "precision=bfloat16"]
    summary = open_phase("meta", str(tmp_path / "mine.yaml"), changes).run()
    # Chance is a third, and brightness tells the class. At twice this rate two sets of images in ten end with two classes as one.
    assert summary["score"] > 0.9
    assert summary["images_seen"] == 25 * 48 and summary["steps"] == 300
    assert summary["distinct_images_per_epoch"] == 24 and summary["broken_images"] == 0
    assert 0 < summary["data_share"] < 1


@pytest.mark.parametrize(("seconds", "output"), [(1.0, True), (0.25, False)])
def test_waiting_for_images_is_told(seconds, output, tmp_path, data_folder, monkeypatch, capsys):
    """By a clock that only moves while images are waited for, and three seconds in what is done with them."""
    now, batches, finish = [0.0], StreamedSet.batches, StreamedSet.finish

    def waiting(self, order):
        for batch in batches(self, order):
            now[0] += seconds
            yield batch

    def working(self, images, recipe):
        now[0] += 3.0
        return finish(self, images, recipe)

    monkeypatch.setattr(StreamedSet, "batches", waiting)
    monkeypatch.setattr(StreamedSet, "finish", working)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    write_folder(tmp_path / "set")
    (tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set"))
    summary = open_phase("meta", str(tmp_path / "mine.yaml")).run()
    assert summary["data_share"] == pytest.approx(seconds / (seconds + 3))
    assert ("25% of the training time was spent waiting for images" in capsys.readouterr().out) == output


def test_a_recipe_that_cannot_work_is_told(tmp_path, data_folder):
    write_folder(tmp_path / "set")
    (tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set"))
    for change, message in [
        ("training.randaugment=random", "training.randaugment 'random'"),
        ("training.shift=2", sentences.not_for_images("shift", "phase .*", "streamed")),
        ("training.batch_size=100", "training.batch_size is 100"),
    ]:
        with pytest.raises(SettingsError, match=message):
            open_phase("meta", str(tmp_path / "mine.yaml"), [change])
    assert load_settings(str(tmp_path / "mine.yaml")).data.is_streamed


def test_evaluation_of_streamed_images_equals_that_of_the_same_in_memory(tmp_path):
    write_folder(tmp_path / "set", size=(16, 16))
    streamed = open_folder(tmp_path / "set", crop_pct=1.0)[1]
    held = open_folder(tmp_path / "set", in_memory=True)[1]
    held = ImageSet(held.images, held.labels, streamed.mean, streamed.std, 3)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
    assert evaluate(model, streamed) == pytest.approx(evaluate(model, held))


def with_shared_memory(size: int, *command: str) -> subprocess.CompletedProcess:
    """Run a command with a /dev/shm of its own of so many bytes."""
    mounted = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    return subprocess.run(["unshare", "--mount", "sh", "-c", mounted, "sh", *command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def own_shared_memory():
    if not shutil.which("unshare") or with_shared_memory(1 << 20, "true").returncode:
        pytest.skip("a /dev/shm of one's own needs the rights to mount")


@pytest.mark.parametrize("workers", [2])
def test_training_runs_in_the_shared_memory_that_is_asked_for_and_is_refused_in_less(workers, own_shared_memory, tmp_path):
    """Exactly what is asked for: workers read as far ahead as they may, images are judged meanwhile, and all comes to an end."""
    write_folder(tmp_path / "set")
    train, eval_set = (set_.read_ahead(*batch, workers) for set_, batch in zip(sets_of(tmp_path / "set"), [(4, 60), (12, 1)]))
    script = [sys.executable, str(Path(__file__).with_name("small_shared_memory.py")), str(tmp_path / "set"), str(workers)]
    result = with_shared_memory(train + eval_set, *script)
    assert result.returncode == 0 and result.stdout == "12 judged, 480 trained on\n", result.stderr
    refused = with_shared_memory(train + eval_set - mmap.PAGESIZE, *script)
    assert refused.returncode == 1 and not refused.stdout
    output = f"can fill {(train + eval_set) / 1e6:.0f} MB and would then wait for ever; set machine.workers to {workers - 1}"
    assert "SettingsError: /dev/shm has room for" in refused.stderr and f"machine.workers {workers} {output}" in refused.stderr


def sets_of(folder):
    return load_data(DataSettings(source="folder", folder=str(folder)), shape=(3, 64, 64))


def room_of(size: int):
    """What os.statvfs says of a file system of so many bytes, of which a quarter is taken."""
    return os.statvfs_result((4096, 4096, size // 4096, size // 4096, size // 4096 * 3 // 4, 0, 0, 0, 0, 255))


@pytest.mark.parametrize(
    ("threads", "devices", "size", "message"),
    [
        (None, 1, 64e6, "room for 48 MB"),  # what is free
        ("1", 1, 64e6, "room for 32 MB"),  # one of two cores: another phase runs beside this one
        ("1", 2, 64e6, "room for 16 MB"),
        (None, 1, 0.9e9, None),
        ("1", 1, 1.1e9, None),
        ("1", 2, 0.9e9, "machine.workers to 1 or fewer"),
    ],
)
def test_a_phase_is_refused_before_it_would_wait_for_shared_memory(threads, devices, size, message, tmp_path, monkeypatch):
    write_folder(tmp_path / "set")
    settings = DataSettings(source="folder", folder=str(tmp_path / "set"))
    how = MachineSettings(workers=2, devices=devices)
    train, eval_set = load_data(settings, shape=(3, 1024, 1024), machine=how)
    recipe = TrainingSettings(batch_size=8 * devices, epochs=100)
    monkeypatch.setattr(os, "statvfs", lambda path: room_of(int(size)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setenv("INCUBATE_THREADS", threads) if threads else monkeypatch.delenv("INCUBATE_THREADS", raising=False)
    if message is None:
        return check_shared_memory(eval_set, train, recipe, devices)
    with pytest.raises(SettingsError, match=message):
        check_shared_memory(eval_set, train, recipe, devices)
    none, same = (replace(part, machine=MachineSettings(workers=0, devices=devices)) for part in (train, eval_set))
    check_shared_memory(same, none, recipe, devices)


def test_one_device_that_judges_has_all_the_room_of_a_machine_with_four(tmp_path, monkeypatch):
    write_folder(tmp_path / "set")
    eval_set = replace(sets_of(tmp_path / "set")[1], machine=MachineSettings(workers=2, devices=4))
    monkeypatch.setattr(os, "statvfs", lambda path: room_of(3 * eval_set.read_ahead(12, 1, 2) // 2))
    monkeypatch.delenv("INCUBATE_THREADS", raising=False)
    check_shared_memory(eval_set)
    with pytest.raises(SettingsError, match="has room for"):
        check_shared_memory(eval_set, devices=4)
