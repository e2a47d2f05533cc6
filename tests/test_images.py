"""Images as people have them: of every mode and format, among what tools leave behind, with labels of all kinds."""

import os
import struct
import tarfile
import threading
import unicodedata
import zlib

import numpy as np
import pytest
import sentences
from layouts import add, check, open_folder, picture, png, write_folder, write_shards
from PIL import EpsImagePlugin, Image
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader

from incubate_lib.config import DataSettings
from incubate_lib.data.sources import open_source

GREY16 = np.array([[0, 255, 256, 257], [4095, 32767, 32768, 65535]] * 8, np.uint16).repeat(4, axis=1)  # [16, 16]
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def one_by_one(tmp_path, image, ending, channels=3, **how):
    """Return what a network gets of an image in a folder, uint8 [C, 16, 16]: streamed and, if it is L or RGB, from memory."""
    root = write_folder(tmp_path / "set", size=(16, 16))
    for path in sorted((root / "val" / "ant").iterdir()):
        path.unlink()
    image.save(root / "val" / "ant" / f"0{ending}", **how)
    _, eval_set = open_folder(root, shape=(channels, 16, 16), crop_pct=1.0)
    return eval_set.preview(1)[0].numpy()


# -- modes and formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".png", ".tif", ".pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_sixteen_bits_keeps_its_upper_byte(ending, channels, tmp_path):
    seen = one_by_one(tmp_path, Image.fromarray(GREY16), ending, channels)
    assert np.array_equal(seen, np.stack([GREY16 >> 8] * channels))


def test_grey_of_sixteen_bits_in_memory(tmp_path):
    root = write_folder(tmp_path / "set", size=(16, 16), mode="L")
    Image.fromarray(GREY16).save(root / "val" / "ant" / "0.png")
    _, eval_set = open_folder(root, shape=(1, 16, 16), in_memory=True)
    assert np.array_equal(eval_set.images[0, 0].numpy(), GREY16 >> 8)


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 70_000)])
@pytest.mark.parametrize("in_memory", [False, True])
def test_numbers_whose_white_nobody_knows_are_no_image(mode, value, in_memory, tmp_path, capsys):
    root = write_folder(tmp_path / "set", size=(16, 16))
    Image.new(mode, (16, 16), value).save(root / "val" / "ant" / "1.tif")
    status, output = check(root, capsys, more=f", in_memory: {str(in_memory).lower()}")
    assert status == 1 and "1.tif: " in output
    assert f"mode {mode} has 32 bits, and nothing says which is white; save it with 8 or 16 bits" in output


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P with transparency", "RGB", "RGBA", "CMYK", "LAB"])
def test_other_modes_are_as_torchvision_has_them(mode, tmp_path):
    how, ending = {}, {"CMYK": ".jpg", "LAB": ".tif"}.get(mode, ".png")
    image = Image.fromarray(COLOURS)
    if mode == "LAB":
        image = Image.frombytes("LAB", (16, 16), image.tobytes())
    elif mode.startswith("P "):
        image, how = image.quantize(16), {"transparency": bytes([0, 128])}
    else:
        image = image.convert(mode)
    seen = one_by_one(tmp_path, image, ending, **how)
    assert np.array_equal(seen, np.asarray(pil_loader(tmp_path / f"set/val/ant/0{ending}")).transpose(2, 0, 1))


@pytest.mark.parametrize("ending", IMG_EXTENSIONS)
def test_every_ending_that_counts_can_be_read(ending, tmp_path):
    seen = one_by_one(tmp_path, Image.fromarray(COLOURS), ending)
    assert np.array_equal(seen, np.asarray(pil_loader(tmp_path / f"set/val/ant/0{ending}")).transpose(2, 0, 1))


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".tif"])
def test_cameras_orientation_is_as_torchvision_has_it_and_told(ending, tmp_path, capsys):
    tags = Image.Exif()
    tags[274] = 6  # to be turned by 90 degrees
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    seen = one_by_one(tmp_path, image, ending, exif=tags)
    assert np.array_equal(seen, np.asarray(pil_loader(tmp_path / f"set/val/ant/0{ending}")).transpose(2, 0, 1))
    status, output = check(tmp_path / "set", capsys)
    assert status == 0
    assert ("1 have a camera's orientation tag (EXIF), which is not followed" in output) == (
        ending != ".tif"
    )  # pillow turns TIFFs
    write_folder(tmp_path / "alike", size=(16, 16))
    image.save(tmp_path / f"alike/val/ant/0{ending}", exif=tags)
    assert check(tmp_path / "alike", capsys, more=", in_memory: true")[1].count("1 have a camera's") == (ending != ".tif")


# -- files that are no images ---------------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("source", ["folder", "folder in memory", "torch/image_folder", "hfds", "wds/"])
def test_no_image_starts_a_program(source, tmp_path, monkeypatch, capsys):
    """Pillow has Ghostscript draw what begins like PostScript, whatever the file is called."""
    (programs := tmp_path / "bin").mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # not looked for yet
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if source == "wds/":
        root = write_shards(tmp_path / "set")
        with tarfile.open(root / "val-000000.tar", "w") as tar:
            add(tar, {"a.jpg": EPS, "a.cls": b"0"})
    else:
        root = write_folder(tmp_path / "set", size=(16, 16))
        (root / "val" / "ant" / "0.png").write_bytes(EPS)
    name, more = source.split()[0], ", in_memory: true" if "memory" in source else ""
    if source == "hfds":
        name, more = f"hfds/{root}", ", test_split: validation"
    status, output = check(root, capsys, name, more)
    assert status == 1 and "is no BMP, JPEG, PNG, PPM, TIFF, WEBP or GIF" in output
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("source", ["folder", "torch/image_folder"])
def test_a_pipe_is_no_image_and_is_not_waited_for(source, tmp_path, capsys):
    root = write_folder(tmp_path / "set")
    pipe = root / "val" / "ant" / "0.png"
    pipe.unlink()
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: open(pipe, "wb").close(), daemon=True)  # who opens the pipe finds its end
    writer.start()
    status, output = check(root, capsys, source)
    assert status == 1 and "0.png is not a regular file but a folder, pipe, socket or device" in output
    os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
    writer.join()


def test_an_image_of_too_many_pixels_is_told(tmp_path, capsys):
    root = write_folder(tmp_path / "set")
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(9)), b"IEND"]
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    (root / "val" / "ant" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    status, output = check(root, capsys)
    assert status == 1 and "0.png: DecompressionBombError: Image size (900000000 pixels)" in output


# -- what tools leave behind ----------------------------------------------------------------------------------------------------


def leave_behind(place):
    """Write below a folder of classes what macOS, Jupyter, Synology and Windows do."""
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".hidden"):
        (place / name).mkdir()
        picture(0).save(place / name / "0.png")
        (place / "bee" / name).mkdir()
        picture(0).save(place / "bee" / name / "0.png")
    (place / ".DS_Store").write_bytes(b"\0")
    (place / "bee" / "Thumbs.db").write_bytes(b"\0")
    (place / "bee" / "._0.png").write_bytes(b"\0\5\26\7")


@pytest.mark.parametrize("source", ["folder", "torch/image_folder"])
def test_what_tools_leave_behind_is_neither_class_nor_image(source, tmp_path, capsys):
    root = write_folder(tmp_path / "set")
    before = open_source(DataSettings(source=source, folder=str(root)))
    for split in ("train", "val"):
        leave_behind(root / split)
    after = open_source(DataSettings(source=source, folder=str(root)))
    for old, new in zip(before, after, strict=True):
        assert old.classes == new.classes == ["ant", "bee", "cat"]
        assert new.labels.tolist() == old.labels.tolist()
        assert [new.opener.name(i) for i in range(len(new.labels))] == [old.opener.name(i) for i in range(len(old.labels))]
    assert check(root, capsys, source)[0] == 0


def test_what_tools_leave_behind_in_shards_is_no_sample(tmp_path, capsys):
    root = write_shards(tmp_path / "set")
    for tar in root.iterdir():
        with tarfile.open(tar, "a") as shard:
            add(shard, {"._sample00001.jpg": b"x", ".DS_Store": b"x", "__MACOSX/._a.jpg": b"x", "./Thumbs.db": b"x"})
            add(shard, {f"./more-{tar.stem}.png": png(), f"./more-{tar.stem}.cls": b"0"})  # tar writes names like these
    (root / "._train-000000.tar").write_bytes(b"\0\5\26\7")
    status, output = check(root, capsys, "wds/")
    assert status == 0 and "train: 26 images in 3 classes" in output and "test: 13 images" in output


@pytest.mark.parametrize("links", [{"bee/again": "bee"}, {"bee/again": ""}, {"bee/on": "cat", "cat/again": "bee"}])
def test_a_link_to_itself_is_no_second_copy_of_the_images(links, tmp_path, capsys):
    root = write_folder(tmp_path / "set")
    for link, to in links.items():
        (root / "train" / link).symlink_to(root / "train" / to)
    status, output = check(root, capsys)
    assert status == 2 and "again is a link to a folder that it lies in" in output


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path, capsys):
    root = write_folder(tmp_path / "set")
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (root / "train" / "ant" / "0.png").rename(tmp_path / "more" / "deep" / "0.png")
    (root / "train" / "ant" / "more").symlink_to(tmp_path / "more")
    assert "train: 24 images in 3 classes" in check(root, capsys)[1]


# -- names in two forms ----------------------------------------------------------------------------------------------------------

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("source", ["folder", "torch/image_folder"])
@pytest.mark.parametrize(("train", "val"), [(NFC, NFD), (NFD, NFC), (NFD, NFD)])
def test_a_name_in_two_unicode_forms_is_one_class(source, train, val, tmp_path, capsys):
    root = write_folder(tmp_path / "set", classes=("ant", "cafz", "tea"))
    for split, name in {"train": train, "val": val}.items():
        (root / split / "ant").rename(root / split / name)
    learn, eval_set = open_source(DataSettings(source=source, folder=str(root)))
    assert learn.classes == eval_set.classes == ["cafz", NFC, "tea"], "in one order, whichever machine the folder was copied from"
    assert [eval_set.classes[i] for i in eval_set.labels] == ["cafz"] * 4 + [NFC] * 4 + ["tea"] * 4
    assert f"/{val}/" in eval_set.opener.name(5)
    status, output = check(root, capsys, source)
    assert status == 0 and sentences.all_readable("test", 12, 3) in output


def test_two_folders_of_one_class_are_told(tmp_path, capsys):
    root = write_folder(tmp_path / "set", classes=(NFC, NFD, "tea"))
    status, output = check(root, capsys)
    assert status == 2 and "has class café twice: 'cafe\\u0301' and 'caf\\xe9' differ only in Unicode normalisation" in output
