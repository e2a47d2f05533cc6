"""Images from disk, in exactly the layout of each source, and what is said when something is wrong with them."""

import gzip
import hashlib
import io
import multiprocessing
import os
import pickle
import re
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from incubate_lib.cli import main
from incubate_lib.config import DataSettings, MachineSettings, SettingsError, TrainingSettings, load_settings
from incubate_lib.pipeline.graph import open_phase
from incubate_lib.training.data import ImageSet, load_data
from incubate_lib.training.loop import evaluate
from incubate_lib.training.order import Order
from incubate_lib.training.stream import StreamedSet

RNG = np.random.default_rng(0)
HERE = MachineSettings(workers=0)  # no worker processes unless a test is about them
AUGMENTED = TrainingSettings(
    batch_size=4, randaugment="rand-m9-mstd0.5-inc1", erase=0.5, hflip=True, repeats=2, epochs=2, warmup_epochs=0
)


def picture(label: int, size=(20, 24), mode="RGB") -> Image.Image:
    """A noisy picture whose mean brightness tells its class."""
    shape = (*size, 3) if mode == "RGB" else size
    return Image.fromarray((RNG.integers(0, 40, shape) + 60 * label).astype(np.uint8), mode)


# -- writers of the layouts ---------------------------------------------------------------------------------------------------


def write_folder(root, classes=("ant", "bee", "cat"), train=8, val=4, size=(20, 24), mode="RGB"):
    for split, number in {"train": train, "val": val}.items():
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                picture(label, size, mode).save(root / split / name / f"{i}.png")
    return root


def write_cifar(root, cls, monkeypatch):
    """The python version's batches; their official MD5 sums are replaced, because these are other images."""
    fine = cls is datasets.CIFAR100
    folder, number = root / cls.base_folder, 100 if fine else 10
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(entry, size):
        labels = [i % number for i in range(size)]
        data = RNG.integers(0, 256, (size, 3072), dtype=np.uint8)
        return write(entry[0], {"data": data, "fine_labels" if fine else "labels": labels})

    monkeypatch.setattr(cls, "train_list", [batch(entry, 2 * number) for entry in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [batch(entry, number) for entry in cls.test_list])
    names = write(cls.meta["filename"], {cls.meta["key"]: [f"class {i}" for i in range(number)]})
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": names[1]})
    return root


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


def write_fashion(root, zipped: bool):
    folder = root if zipped else root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, number in {"train": 80, "t10k": 20}.items():
        labels = (np.arange(number) % 10).astype(np.uint8)
        images = (RNG.integers(0, 40, (number, 28, 28)) + 20 * labels[:, None, None]).astype(np.uint8)
        for name, array in {f"{part}-images-idx3-ubyte": images, f"{part}-labels-idx1-ubyte": labels}.items():
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return root


def write_shards(root, classes=3):
    root.mkdir(parents=True)
    number = 0
    for shard in ("train-000000.tar", "train-000001.tar", "val-000000.tar"):
        with tarfile.open(root / shard, "w") as tar:
            for _ in range(4 * classes):
                jpeg = io.BytesIO()
                picture(number % classes).save(jpeg, "JPEG")
                for ending, blob in {"jpg": jpeg.getvalue(), "cls": str(number % classes).encode(), "json": b"{}"}.items():
                    member = tarfile.TarInfo(f"sample{number:05}.{ending}")
                    member.size = len(blob)
                    tar.addfile(member, io.BytesIO(blob))
                number += 1
    return root


# -- what is read -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "fashion_mnist", "fashion_mnist zipped", "torch/cifar10"])
def test_torchvisions_sets(source, tmp_path, monkeypatch):
    if source.startswith("fashion"):
        write_fashion(tmp_path / "set", zipped="zipped" in source)
        classes, train_images, test_images, shape = 10, 80, 20, (1, 28, 28)
    else:
        cls = datasets.CIFAR100 if source == "cifar100" else datasets.CIFAR10
        write_cifar(tmp_path / "set", cls, monkeypatch)
        classes, shape = (100, (3, 32, 32)) if source == "cifar100" else (10, (3, 32, 32))
        train_images, test_images = (200, 100) if source == "cifar100" else (100, 10)
    settings = DataSettings(source=source.split()[0], folder=str(tmp_path / "set"))
    train, test = load_data(settings, shape=shape, machine=HERE)
    assert (len(train), len(test), train.num_classes, train.shape) == (train_images, test_images, classes, shape)
    if isinstance(train, ImageSet):
        assert train.images.dtype == torch.uint8
        assert abs(train.normalise(train.images).mean().item()) < 1e-3
        assert (train.labels.bincount() == train_images // classes).all()
    else:
        x, y = next(test.judged())
        assert x.shape == (10, *shape) and y.tolist() == list(range(10))


def open_folder(tmp_path, shape=(3, 16, 16), **more):
    settings = DataSettings(source="folder", folder=str(tmp_path), **more)
    return load_data(settings, shape=shape, machine=HERE)


@pytest.mark.parametrize("source", ["folder", "torch/image_folder", "hfds", "wds/"])
def test_sources_opened_image_by_image_agree(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write = write_shards if source == "wds/" else write_folder
    folder = write(tmp_path / "set")
    settings = {"source": source, "folder": str(folder)}
    if source == "hfds":
        (tmp_path / "cache").mkdir()
        settings = {"source": f"hfds/{folder}", "folder": str(tmp_path / "cache"), "test_split": "validation"}
    train, test = load_data(DataSettings(**settings), shape=(3, 16, 16), machine=HERE)
    assert (len(train), len(test), train.num_classes) == (24, 12, 3)
    x, y = next(test.judged())
    assert x.shape == (12, 3, 16, 16) and sorted(y.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    pixels = x * test.std + test.mean
    for label in range(3):  # the right picture with each label, whatever it went through
        assert pixels[y == label].mean().item() * 255 == pytest.approx(60 * label + 20, abs=4)
    batches = train.batches(Order(len(train), AUGMENTED, seed=1, steps=6))
    seen = [train.finish(x, AUGMENTED).shape for x, _ in batches]
    assert seen == [(4, 3, 16, 16)] * 6


def test_gray_images_stay_gray_or_become_colour(tmp_path):
    write_folder(tmp_path / "set", mode="L")
    for channels in (1, 3):
        train, _ = open_folder(tmp_path / "set", shape=(channels, 16, 16))
        assert train.preview(2, AUGMENTED).shape == (2, channels, 16, 16)


def test_in_memory_equals_the_files(tmp_path):
    write_folder(tmp_path / "set", size=(16, 16))
    train, test = open_folder(tmp_path / "set", in_memory=True)
    assert isinstance(train, ImageSet) and train.shape == (3, 16, 16) and len(test) == 12
    first = np.asarray(Image.open(tmp_path / "set/val/ant/0.png")).transpose(2, 0, 1)
    assert np.array_equal(test.images[0].numpy(), first)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_shares_are_class_balanced_and_splits_do_not_depend_on_them(share, tmp_path):
    write_fashion(tmp_path / "set", zipped=True)
    settings = DataSettings(source="fashion_mnist", folder=str(tmp_path / "set"), eval_split="val", val_images=10)
    whole, val = load_data(settings)
    part, same = load_data(settings.model_copy(update={"train_share": share}))
    other, _ = load_data(settings.model_copy(update={"train_share": share, "split_seed": 1}))
    assert torch.equal(val.images, same.images)
    counts = part.labels.bincount(minlength=10)
    assert len(part) == round(share * 70) and counts.max() - counts.min() <= 1
    known = {image.numpy().tobytes() for image in whole.images}
    assert all(image.numpy().tobytes() in known for image in part.images)
    assert not torch.equal(part.images, other.images), "the seed chooses"
    assert not known & {image.numpy().tobytes() for image in val.images}


# -- what is told ---------------------------------------------------------------------------------------------------------------


def no_train(root):
    (root / "train").rename(root / "training")


def no_classes(root):
    for split in ("train", "val"):
        for folder in (root / split).iterdir():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


def strange_class(root):
    (root / "val" / "dog").mkdir()
    picture(1).save(root / "val" / "dog" / "0.png")


def empty_class(root):
    for file in (root / "train" / "bee").iterdir():
        file.unlink()


def broken_image(root):
    (root / "train" / "bee" / "3.png").write_bytes((root / "train" / "bee" / "2.png").read_bytes()[:200])


def not_an_image(root):
    (root / "val" / "ant" / "1.png").write_text("hello")


WRONG = [
    (no_train, "no subfolder 'train' but training, val"),
    (no_classes, "/train has no subfolders; it must have one for each class"),
    (strange_class, "/val has classes that training lacks: dog"),
    (empty_class, "/train: no images in bee"),
    (broken_image, "1 image(s) cannot be read, the first: "),
    (not_an_image, "1 image(s) cannot be read, the first: "),
    (lambda root: (root / "train").rename(root.parent / "elsewhere") and None, "no subfolder 'train' but val"),
]


@pytest.mark.parametrize(("damage", "message"), WRONG, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("in_memory", [False, True], ids=["streamed", "in memory"])
def test_a_wrong_folder_is_told_before_anything_is_written(damage, message, in_memory, tmp_path, data_folder, capsys):
    write_folder(tmp_path / "set", size=(16, 16))
    damage(tmp_path / "set")
    (tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set", f", in_memory: {str(in_memory).lower()}"))
    assert main(["run", str(tmp_path / "mine.yaml")]) == 2
    told = capsys.readouterr().err
    message = "cannot be read (" if in_memory and "image(s)" in message else message
    assert message in told and told.count("\n") == 1
    if "cannot be read" in message:
        assert ("3.png" if damage is broken_image else "1.png") in told
    assert not data_folder.exists()


def settings_file(folder, more="", size=16):
    return (
        f"data: {{source: folder, folder: '{folder}'{more}}}\n"
        f"model: {{img_size: {size}, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}}\n"
        "partition: {num_modules: 2}\nmachine: {workers: 0}\n"
        "training: {epochs: 1, batch_size: 4, hflip: true, warmup_epochs: 0}\n"
    )


@pytest.mark.parametrize(
    ("make", "more", "size", "message"),
    [
        (lambda root: write_folder(root, size=(16, 20)), ", in_memory: true", 16, "has (3, 16, 20)"),
        (lambda root: write_folder(root, size=(16, 16), mode="L"), ", in_memory: true", 16, "has (1, 16, 16)"),
        (lambda root: picture(0, (8, 8)).save(write_folder(root, size=(16, 16)) / "train/bee/9.png"), ", in_memory: true", 16,
         "9.png is 8 × 8 pixels of mode RGB; with data.in_memory all must be L or RGB and alike, and the first is 16 × 16, RGB"),
        (write_folder, ", train_split: training", 16, "has no subfolder 'training' but train, val"),
        (lambda root: write_folder(root).rename(root.with_name("moved")), "", 16, "/set is not there"),
        (lambda root: root.write_text(""), "", 16, "/set is not a folder"),
        (write_folder, ", crop_pct: 0.9, in_memory: true", 16, "crop_pct has no meaning with in_memory"),
    ],
)  # fmt: skip
def test_images_that_do_not_fit_are_told(make, more, size, message, tmp_path, data_folder, capsys):
    make(tmp_path / "set")
    (tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set", more, size))
    assert main(["run", str(tmp_path / "mine.yaml")]) == 2
    assert message in capsys.readouterr().err
    assert not data_folder.exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("cifar10", "torchvision cannot read 'cifar10'.*machine.download=true fetches it"),
        ("fashion_mnist", "torchvision cannot read 'fashion_mnist'"),
        ("wds/", r"has no shards '\*train\*\.tar'"),
        ("torch/nothing", "Unknown torchvision dataset nothing"),
        ("hfds//no/such/folder", "Hugging Face datasets cannot read it"),
        ("folder", "no subfolder 'train' but nothing"),
    ],
)
def test_an_empty_folder_is_told(source, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SettingsError, match=message):
        load_data(DataSettings(source=source, folder=str(tmp_path)))


def test_a_damaged_idx_file_is_told(tmp_path):
    write_fashion(tmp_path / "set", zipped=True)
    file = tmp_path / "set" / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for damaged in (whole[:-50], gzip.compress(gzip.decompress(whole)[:-9]), gzip.compress(b"hello")):
        file.write_bytes(damaged)
        with pytest.raises(SettingsError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
            load_data(DataSettings(source="fashion_mnist", folder=str(tmp_path / "set")))


def test_shards_that_are_not_what_they_should_be_are_told(tmp_path):
    for files, message in [
        ({"a.jpg": b"x", "a.cls": b"cat"}, "holds b'cat', not the number of a class"),
        ({"a.jpg": b"x"}, "it needs an image and a .cls file"),
        ({"a.cls": b"1"}, "it needs an image and a .cls file"),
    ]:
        for split in ("train", "val"):
            with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
                for name, blob in files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(blob)
                    tar.addfile(member, io.BytesIO(blob))
        with pytest.raises(SettingsError, match=re.escape(message)):
            load_data(DataSettings(source="wds/", folder=str(tmp_path)))
    (tmp_path / "train.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(SettingsError, match=r"shard .*train\.tar cannot be read"):
        load_data(DataSettings(source="wds/", folder=str(tmp_path)))


def test_broken_images_are_named_counted_and_passed_over_on_request_only(tmp_path, capsys):
    write_folder(tmp_path / "set", train=40)
    train, _ = open_folder(tmp_path / "set")
    bad = tmp_path / "set" / "train" / "bee" / "3.png"
    bad.write_bytes(b"")  # after the sample that planning opens
    batches = lambda data: list(data.batches(Order(len(data), TrainingSettings(batch_size=40), seed=0, steps=3)))  # noqa: E731
    with pytest.raises(SettingsError, match=r"1 image\(s\) cannot be read, the first: .*bee/3\.png .*data\.skip_broken=true"):
        batches(train)
    patient, _ = open_folder(tmp_path / "set", skip_broken=True)
    assert [len(y) for _, y in batches(patient)] == [40] * 3
    assert [name.endswith("bee/3.png") for name in patient.broken] == [True]
    (tmp_path / "set" / "val" / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"val/cat/0\.png"):  # judging by another in its place would count that one twice
        list(open_folder(tmp_path / "set", skip_broken=True)[1].judged())
    picture(2).save(tmp_path / "set" / "val" / "cat" / "0.png")
    (tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set", ", skip_broken: true"))
    assert main(["check", str(tmp_path / "mine.yaml")]) == 1
    told = capsys.readouterr().out
    assert "train: 120 images in 3 classes; 120 opened, 1 cannot be read" in told and "bee/3.png: UnidentifiedImageError" in told
    assert "test: 12 images in 3 classes; 12 opened, 0 cannot be read" in told


# -- which images, in which order -----------------------------------------------------------------------------------------


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
        return [x for x, _ in train.batches(order)], list(test.judged())

    (alone, judged), (helped, same) = stream(0, 0), stream(2, 0)
    assert len(alone) == 9 and all(map(torch.equal, alone, helped))
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(judged, same, strict=True))
    assert all(map(torch.equal, stream(2, 4)[0], alone[4:]))


def read_for_ever(folder: str, told: str, stop: str) -> None:
    os.environ["INCUBATE_STOP"] = stop
    settings = DataSettings(source="folder", folder=folder)
    train, _ = load_data(settings, shape=(3, 16, 16), machine=MachineSettings(workers=2))
    reader = iter(train._loader(TrainingSettings(), [[(0, 0)]] * 10_000, 1))
    next(reader)
    Path(told).write_text(" ".join(str(worker.pid) for worker in reader._workers))
    time.sleep(60)


@pytest.mark.parametrize("warned", [False, True])
def test_worker_processes_end_with_the_process_that_reads_from_them(warned, tmp_path):
    """Killed, not asked: nothing of it can clean up. Slurm's warning to all processes of a job does not end them before."""
    write_folder(tmp_path / "set")
    process = multiprocessing.get_context("forkserver").Process(
        target=read_for_ever, args=(str(tmp_path / "set"), str(tmp_path / "told"), str(tmp_path / "STOP") if warned else "")
    )
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "told").exists() or not (tmp_path / "told").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [int(pid) for pid in (tmp_path / "told").read_text().split()]
    assert len(workers) == 2 and all(is_there(pid) for pid in workers)
    if warned:
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.5)
        assert all(is_there(pid) for pid in workers)
    process.kill()
    process.join()
    while any(is_there(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
            labels += [y for _, y in fresh.judged(rank, devices)]
        assert torch.cat(labels).bincount().tolist() == [8, 8, 8]
    assert isinstance(train, StreamedSet)


def test_training_on_a_folder_learns_and_reports_what_it_saw(tmp_path, data_folder):
    write_folder(tmp_path / "set", train=16)
    (tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set", ", crop_pct: 1.0"))
    changes = ["training.epochs=25", "training.lr=4e-3", "training.warmup_epochs=2", "training.clip_grad=1.0"]
    changes += ["training.repeats=2", "training.erase=0.2", "precision=bfloat16"]
    summary = open_phase("meta", str(tmp_path / "mine.yaml"), changes).run()
    assert summary["accuracy"] > 0.9  # chance is a third, and brightness tells the class
    assert summary["images_seen"] == 25 * 48 and summary["steps"] == 300
    assert summary["distinct_images_per_epoch"] == 24 and summary["broken_images"] == 0
    assert 0 < summary["data_share"] < 1


def test_waiting_for_images_is_told(tmp_path, data_folder, capsys):
    write_folder(tmp_path / "set", size=(256, 256))
    (tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set"))
    summary = open_phase("meta", str(tmp_path / "mine.yaml"), ["training.randaugment=rand-m9-mstd0.5-inc1"]).run()
    assert summary["data_share"] > 0.1  # large pictures, a tiny network, no workers
    assert f"{summary['data_share']:.0%} of the training time was spent waiting for images" in capsys.readouterr().out


def test_a_recipe_that_cannot_work_is_told(tmp_path, data_folder):
    write_folder(tmp_path / "set")
    (tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set"))
    for change, message in [
        ("training.randaugment=random", "training.randaugment 'random'"),
        ("training.shift=2", "shift in phase .* not for images that are streamed"),
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
