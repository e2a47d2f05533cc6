"""Bad image sets: folders, WebDataset shards, idx files, CIFAR's batches, tables of Hugging Face, generated images."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

from bad.case import Bad, both, file, nothing, png

SETTINGS = """
data: {{source: {source}{more}}}
model: {{img_size: 16, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2{channels}}}
partition: {{num_modules: 2}}
training: {{epochs: 1, batch_size: 4, warmup_epochs: 0}}
run: [end_to_end]
machine: {{workers: 0}}
"""


def settings(source: str, more: str = "", channels: int = 3) -> Callable[[Path], object]:
    return file("mine.yaml", SETTINGS.format(source=source, more=more, channels=f", in_chans: {channels}"))


def folder(train: int = 4, val: int = 2, classes: tuple[str, ...] = ("ant", "bee")) -> Callable[[Path], object]:
    """Return what makes `images/<split>/<class>/<i>.png`."""
    pictures = {f"images/train/{name}/{i}.png": i for name in classes for i in range(train)}
    pictures |= {f"images/val/{name}/{i}.png": i for name in classes for i in range(val)}
    return both(*(file(path, png(shade=10 * i)) for path, i in pictures.items()))


def huge_png() -> bytes:
    """Return a picture whose header says 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20)) * 3
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def link(place: str, to: str) -> Callable[[Path], object]:
    def make(here: Path) -> None:
        (here / place).parent.mkdir(parents=True, exist_ok=True)
        (here / place).symlink_to(to)

    return make


def empty(*places: str) -> Callable[[Path], object]:
    return lambda here: [(here / place).mkdir(parents=True, exist_ok=True) for place in places]


def pipe(place: str) -> Callable[[Path], object]:
    return both(file(place, ""), lambda here: (here / place).unlink(), lambda here: os.mkfifo(here / place))


def tar(name: str, members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member, content in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def samples(label: Callable[[int], object] = lambda i: i % 2, count: int = 8) -> dict[str, bytes]:
    """Return the members of a shard."""
    labels = {f"s{i}.cls": str(label(i)).encode() for i in range(count)}
    return {f"s{i}.png": png(shade=i) for i in range(count)} | labels


def shards(train: bytes, val: bytes | None = None) -> Callable[[Path], object]:
    val = tar("val", samples()) if val is None else val
    return both(file("images/train-0.tar", train), file("images/val-0.tar", val))


def linked(kind: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("s0.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    return buffer.getvalue()


def idx(shape: tuple[int, ...], content: bytes, kind: int = 8) -> bytes:
    return gzip.compress(bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}i", *shape) + content)


def fashion(**parts: bytes) -> Callable[[Path], object]:
    """Return what makes Fashion-MNIST's four files; those that are given are put in place of sound ones."""
    whole = {}
    for part, number in {"train": 40, "t10k": 20}.items():
        whole[f"{part}_images"] = idx((number, 28, 28), bytes(number * 784))
        whole[f"{part}_labels"] = idx((number,), bytes(i % 10 for i in range(number)))
    numbers = {"images": "idx3", "labels": "idx1"}
    names = {key: f"images/{key.replace('_', '-')}-{numbers[key.split('_')[1]]}-ubyte.gz" for key in whole}
    return both(*(file(names[key], content) for key, content in (whole | parts).items() if content))


SOUND = tar("train", samples())
GROUND = folder()
FOLDERS = {  # what is wrong → what is made, after a sound folder unless it begins anew
    "not there": nothing,
    "a file": file("images", "x"),
    "empty": empty("images"),
    "without a split": empty("images/other"),
    "without val": folder(val=0, classes=()),
    "without classes": empty("images/train", "images/val"),
    "classes without images": empty("images/train/ant", "images/train/bee", "images/val/ant"),
    "a class without images": both(GROUND, empty("images/train/cat")),
    "of one class": folder(classes=("ant",)),
    "a class to judge that training lacks": both(GROUND, file("images/val/cat/0.png", png())),
    "splits are files": both(file("images/train", "x"), file("images/val", "x")),
    "images beside the classes": both(file("images/train/0.png", png()), empty("images/val")),
    "only files left behind": both(file("images/train/.DS_Store/0.png", png()), file("images/val/.DS_Store/0.png", png())),
    "texts for images": both(file("images/train/ant/0.txt", "x"), file("images/val/ant/0.txt", "x")),
    "a link to itself for a class": both(GROUND, link("images/train/cat", "cat")),
    "a link to nothing for an image": both(GROUND, link("images/train/ant/x.png", "nowhere.png")),
    "a link to its own folder": both(GROUND, link("images/train/ant/more", ".")),
    "a link to the folder above": both(GROUND, link("images/train/ant/more", "../..")),
    "a link to the root": both(GROUND, link("images/train/ant/more", "/")),
    "links around each other": both(GROUND, link("images/train/ant/b", "../bee"), link("images/train/bee/a", "../ant")),
    "an image that links to itself": both(GROUND, link("images/train/ant/x.png", "x.png")),
    "a link to a device": both(GROUND, link("images/train/ant/x.png", "/dev/zero")),
    "a pipe for an image": both(GROUND, pipe("images/train/ant/x.png")),
    "an empty image": both(GROUND, file("images/train/ant/x.png", "")),
    "a text for an image": both(GROUND, file("images/train/ant/x.png", "hello")),
    "an image cut short": both(GROUND, file("images/train/ant/x.png", png((64, 64))[:60])),
    "an image of 60,000 × 60,000 pixels": both(GROUND, file("images/train/ant/x.png", huge_png())),
    "an HTML page for an image": both(GROUND, file("images/val/ant/x.jpg", "<html>404</html>")),
    "an SVG": both(GROUND, file("images/train/ant/x.png", "<svg xmlns='http://www.w3.org/2000/svg'/>")),
    "zeros for an image": both(GROUND, file("images/train/ant/x.png", bytes(9999))),
    "fewer images than a batch": folder(train=1),
}
PLACES = {  # values of data.folder and others
    "no name": "folder: ''",
    "a NUL in it": 'folder: "a\\0b"',
    "a line end in it": 'folder: "a\\nb"',
    "of nobody": "folder: ~nobody_here/x",
    "a device": "folder: /dev/null",
    "too long": f"folder: {'a/' * 3000}",
    "a name too long": f"folder: {'a' * 300}",
    "a number": "folder: 5",
    "the root's": "folder: /",
    "no name of the split": "folder: images, train_split: ''",
    "a split elsewhere": "folder: images, train_split: ../../etc",
    "a split from the root": "folder: images, train_split: /",
    "a split with a NUL": 'folder: images, train_split: "a\\0"',
    "the same split twice": "folder: images, test_split: 'val '",
    "in memory, with another size": "folder: images, in_memory: true, crop_pct: 0.5",
    "padded": "folder: images, pad: 2",
}
SHARDS = {
    "no shards": empty("images"),
    "only val": file("images/val-0.tar", SOUND),
    "an empty file": shards(b""),
    "an empty archive": shards(tar("a", {})),
    "cut short": shards(SOUND[:-5000]),
    "cut within a picture": shards(SOUND[:700]),
    "no archive": shards(b"hello" * 500),
    "zipped": shards(gzip.compress(SOUND)),
    "joined": shards(SOUND + SOUND),
    "a damaged header": shards(b"X" * 200 + SOUND[200:]),
    "a damaged header within": shards(SOUND[:1024] + b"X" * 300 + SOUND[1324:]),
    "a link": shards(linked(tarfile.SYMTYPE)),
    "a hard link": shards(linked(tarfile.LNKTYPE)),
    "a device": shards(linked(tarfile.CHRTYPE)),
    "a pipe": both(file("images/val-0.tar", SOUND), pipe("images/train-0.tar")),
    "a folder": both(file("images/val-0.tar", SOUND), empty("images/train-0.tar")),
    "no label": shards(tar("a", {"s.png": png()})),
    "no picture": shards(tar("a", {"s.cls": b"0"})),
    "a word for a label": shards(tar("a", samples(lambda i: "ant"))),
    "labels below 0": shards(tar("a", samples(lambda i: -1))),
    "labels of fractions": shards(tar("a", samples(lambda i: 0.5))),
    "huge labels": shards(tar("a", samples(lambda i: 10**17))),
    "labels of 30 digits": shards(tar("a", samples(lambda i: 10**30))),
    "empty labels": shards(tar("a", samples(lambda i: ""))),
    "two labels each": shards(tar("a", samples(lambda i: "0 1"))),
    "labels of other digits": shards(tar("a", samples(lambda i: "²"))),
    "of one class": shards(tar("a", samples(lambda i: 0)), tar("b", samples(lambda i: 0))),
    "a class that training lacks": shards(SOUND, tar("b", samples(lambda i: i))),
    "an empty picture": shards(tar("a", samples() | {"s0.png": b""})),
    "a text for a picture": shards(tar("a", samples() | {"s0.png": b"hello"})),
    "a picture of 60,000 × 60,000 pixels": shards(tar("a", samples() | {"s0.png": huge_png()})),
    "a label of 1 MB": shards(tar("a", samples() | {"s0.cls": b"1" * 1000000})),
    "linked to itself": both(file("images/val-0.tar", SOUND), link("images/train-0.tar", "train-0.tar")),
}
FASHION = {
    "not there": {"train_labels": b""},
    "nothing to judge by": {"t10k_images": b""},
    "not zipped": {"train_images": bytes(99)},
    "zipped, cut short": {"train_images": idx((40, 28, 28), bytes(40 * 784))[:30]},
    "empty": {"train_images": gzip.compress(b"")},
    "no header": {"train_images": gzip.compress(b"abc")},
    "fewer pixels than it says": {"train_images": idx((40, 28, 28), bytes(99))},
    "more pixels than it says": {"train_images": idx((40, 28, 28), bytes(99999))},
    "sizes below 0": {"train_images": idx((-40, -28, 28), bytes(40 * 784))},
    "huge sizes": {"train_images": idx((2**31 - 1, 28, 28), bytes(99))},
    "of other numbers": {"train_images": idx((40, 28, 28), bytes(40 * 784 * 4), kind=13)},
    "pictures of another size": {"train_images": idx((40, 20, 20), bytes(40 * 400))},
    "a label too few": {"train_labels": idx((39,), bytes(39))},
    "labels above 9": {"train_labels": idx((40,), bytes([200] * 40))},
    "no images": {"train_images": idx((0, 28, 28), b""), "train_labels": idx((0,), b"")},
    "labels for pictures": {"train_images": idx((40,), bytes(40))},
    "3 GB of zeros": {"train_images": gzip.compress(bytes(1 << 26)) * 48},
}


def batches(content: bytes) -> Callable[[Path], object]:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    return both(*(file(f"images/cifar-10-batches-py/{name}", content) for name in names))


MORE = {  # name → source, further fields, files
    "CIFAR-10 that is not there": ("cifar10", "", nothing),
    "CIFAR-10 in a file": ("cifar10", ", folder: images", file("images", "x")),
    "CIFAR-10 of other bytes": ("cifar10", ", folder: images", batches(b"x")),
    "CIFAR-10 that runs code": ("cifar10", ", folder: images", batches(pickle.dumps(os.getcwd))),
    "CIFAR-100 in an empty folder": ("cifar100", ", folder: images", empty("images")),
    "Fashion-MNIST in an empty folder": ("fashion_mnist", ", folder: images", empty("images")),
    "torchvision's without a name": ("torch/", ", folder: images", empty("images")),
    "torchvision's unknown set": ("torch/fish", ", folder: images", empty("images")),
    "torchvision's ImageNet in an empty folder": ("torch/imagenet", ", folder: images", empty("images")),
    "torchvision's set without labels": ("torch/image_folder", ", folder: images", empty("images")),
    "Hugging Face without a name": ("hfds/", "", nothing),
    "Hugging Face, not there": ("hfds/no/such", "", nothing),
    "Hugging Face, a name of dots": ("hfds/../..", "", nothing),
    "Hugging Face, a broken table": ("hfds/images", "", file("images/train.parquet", "x")),
    "Hugging Face, words alone": ("hfds/images", "", file("images/train.csv", "text,label\na,0\nb,1\n")),
    "Hugging Face, an empty folder": ("hfds/images", "", empty("images")),
    "shards without a name": ("wds/", ", folder: images", nothing),
    "an unknown source": ("imagenet", "", nothing),
    "a source of a path": ("/data/images", "", nothing),
}


def catalogue() -> list[Bad]:
    found = []
    images = ", folder: '{here}/images'"
    for kind, cases in {"image folders": FOLDERS, "shards": SHARDS}.items():
        source = "folder" if kind == "image folders" else "wds/x"
        for number, (name, make) in enumerate(cases.items()):
            command = ("check", "mine.yaml") if number % 2 else ("run", "mine.yaml")
            found.append(Bad(kind, f"{name}, {command[0]}", command, both(_here(settings(source, images)), make)))
    for name, value in PLACES.items():
        value = value.replace("images", "'{here}/images'")
        make = both(GROUND, _here(settings("folder", f", {value}")))
        found.append(Bad("image folders", f"place: {name}", ("run", "mine.yaml"), make))
    linked_out = both(GROUND, file("other/0.png", png()), link("images/train/ant/more", "../../../other"))
    make = both(_here(settings("folder", images)), linked_out)
    found.append(Bad("image folders", "a link out of the folder", ("check", "mine.yaml"), make, "more", may_be_told=True))
    for field in ("machine.data_folder", "machine.scratch"):
        make, command = both(_here(settings("folder", images)), GROUND), ("run", "mine.yaml", "--set", f"{field}=/dev/null/x")
        found.append(Bad("image folders", f"{field} cannot be", command, make, "/dev/null/x"))
    for name, parts in FASHION.items():
        make = both(_here(settings("fashion_mnist", images, 1)), fashion(**parts))
        size = ("--set", "model.img_size=28", "--set", "model.patch_size=7")
        found.append(Bad("other image sets", f"idx: {name}", ("run", "mine.yaml", *size), make))
    for name, (source, more, make) in MORE.items():
        source, more = (
            text.replace("images", "{here}/images") if ":" in text or "hfds/i" in text else text for text in (source, more)
        )
        found.append(Bad("other image sets", name, ("run", "mine.yaml"), both(_here(settings(source, more)), make)))
    return found


def _here(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return what makes the settings, with {here} in them replaced."""

    def placed(here: Path) -> None:
        make(here)
        path = here / "mine.yaml"
        path.write_text(path.read_text().replace("{here}", str(here)))

    return placed
