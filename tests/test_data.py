"""Images from disk: what is read, and what is said when something is wrong with them."""

import gzip
import io
import re
import tarfile

import numpy as np
import pytest
import sentences
import torch
from layouts import (
    AUGMENTED,
    HERE,
    open_folder,
    picture,
    settings_file,
    write_cifar,
    write_fashion,
    write_folder,
    write_shards,
)
from PIL import Image
from torchvision import datasets

from incubate_lib.cli import main
from incubate_lib.config import DataSettings, SettingsError, TrainingSettings
from incubate_lib.data.order import Order
from incubate_lib.data.sets import ImageSet, load_data

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
        x, y = next(test.eval_batches())
        assert x.shape == (10, *shape) and y.tolist() == list(range(10))


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
    x, y = next(test.eval_batches())
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
    (no_train, sentences.no_train_folder("training, val")),
    (no_classes, "/train has no subfolders; it must have one for each class"),
    (strange_class, sentences.classes_lacking("/val", "dog")),
    (empty_class, "/train: no images in bee"),
    (broken_image, sentences.unreadable(1)),
    (not_an_image, sentences.unreadable(1)),
    (lambda root: (root / "train").rename(root.parent / "elsewhere") and None, sentences.no_train_folder("val")),
]


@pytest.mark.parametrize(("damage", "message"), WRONG, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("in_memory", [False, True], ids=["streamed", "in memory"])
def test_a_wrong_folder_is_told_before_anything_is_written(damage, message, in_memory, tmp_path, data_folder, capsys):
    write_folder(tmp_path / "set", size=(16, 16))
    damage(tmp_path / "set")
    (tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set", f", in_memory: {str(in_memory).lower()}"))
    assert main(["run", str(tmp_path / "mine.yaml")]) == 2
    output = capsys.readouterr().err
    message = "cannot be read (" if in_memory and "image(s)" in message else message
    assert message in output and output.count("\n") == 1
    if "cannot be read" in message:
        assert ("3.png" if damage is broken_image else "1.png") in output
    assert not data_folder.exists()


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
        ("hfds//no/such/folder", sentences.DATASETS_CANNOT),
        ("folder", sentences.no_train_folder("nothing")),
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
        ({"a.jpg": b"x", "a.cls": b"cat"}, f"holds b'cat', {sentences.NOT_A_CLASS}"),
        ({"a.jpg": b"x"}, sentences.SAMPLE_NEEDS),
        ({"a.cls": b"1"}, sentences.SAMPLE_NEEDS),
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
    with pytest.raises(SettingsError, match=re.escape(sentences.unreadable(1)) + r".*bee/3\.png .*data\.skip_broken=true"):
        batches(train)
    patient, _ = open_folder(tmp_path / "set", skip_broken=True)
    assert [len(y) for _, y in batches(patient)] == [40] * 3
    assert [name.endswith("bee/3.png") for name in patient.broken] == [True]
    every = torch.arange(len(train))
    with pytest.raises(SettingsError, match=re.escape(sentences.unreadable(1)) + r".*bee/3\.png"):
        train.some(every)
    images, labels = patient.some(every)  # as the probe of MAT is read
    assert len(images) == len(labels) == len(train)
    (tmp_path / "set" / "val" / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"val/cat/0\.png"):  # judging by another in its place would count that one twice
        list(open_folder(tmp_path / "set", skip_broken=True)[1].eval_batches())
    picture(2).save(tmp_path / "set" / "val" / "cat" / "0.png")
    (tmp_path / "mine.yaml").write_text(settings_file(tmp_path / "set"))
    assert main(["check", str(tmp_path / "mine.yaml")]) == 1
    output = capsys.readouterr().out
    assert "train: 120 images in 3 classes; 119 can be read, 1 cannot" in output and "bee/3.png: UnidentifiedImageError" in output
    assert sentences.all_readable("test", 12, 3) in output
