"""Where images come from. Small sets are read whole, as arrays; of large ones only the labels, and a way to open each.

Whatever is wrong with a folder is told here, before anything is trained: missing folder or split, no classes, a class
to judge by that training lacks, files that cannot be read.
"""

import glob
import gzip
import importlib.util
import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from incubate_lib.config import DEFAULT_MACHINE, MADE, DataSettings, MachineSettings, SettingsError, data_folder

Opener = Callable[[int], Image.Image]  # picklable: worker processes get a copy


@dataclass(frozen=True)
class Source:
    """Labelled images of one split: all pixels, or a way to open and decode image i."""

    labels: np.ndarray  # [N] int64
    classes: list[str]
    pixels: np.ndarray | None = None  # [N, C, H, W] uint8
    opener: Any = None  # has __call__(i) → PIL image and name(i) → what people can look up


def open_source(settings: DataSettings, machine: MachineSettings = DEFAULT_MACHINE) -> tuple[Source, Source | None]:
    """Return the training images and those of the official test split; None where there is only one pool of images.

    Raises SettingsError when folder, split or classes are not what they must be.
    """
    kind = settings.source.split("/")[0]
    settings = _here(settings, machine)
    opened = _SOURCES[kind](settings) if kind in MADE else _SOURCES[kind](settings, machine.download)
    train, test = opened
    for split, source in {"train": train, "test": test}.items():
        if source is not None and not len(source.labels):
            raise SettingsError(f"data.source {settings.source!r}: the {split} split holds no images")
        if source is not None and source.labels.min() < 0:
            raise SettingsError(f"data.source {settings.source!r}: the {split} split has images without a label (-1)")
    if test is not None and (strange := sorted(set(test.classes) - set(train.classes))):
        some = ", ".join(strange[:5])
        raise SettingsError(f"data.folder {folder_of(settings)}: {settings.test_split} has classes that training lacks: {some}")
    return train, test


def has_folder(settings: DataSettings) -> bool:
    """Whether the images of this source lie in files of the user's."""
    return settings.source not in MADE


def folder_of(settings: DataSettings, machine: MachineSettings = DEFAULT_MACHINE) -> Path:
    """Return the folder of a source; SettingsError if there is none."""
    settings = _here(settings, machine)
    folder = _place(settings)
    if not folder.is_dir():
        told = "is not there" if not folder.exists() else "is not a folder"
        raise SettingsError(f"data.folder {folder} {told}; it must hold the images of data.source {settings.source!r}")
    return folder


def _here(settings: DataSettings, machine: MachineSettings) -> DataSettings:
    return settings.model_copy(update={"folder": machine.data_folder}) if machine.data_folder else settings


def _place(settings: DataSettings) -> Path:
    name = settings.folder or settings.source.strip("/").replace("/", "-")
    return data_folder() / "datasets" / Path(name).expanduser()


# -- arrays ---------------------------------------------------------------------------------------------------------------


def _digits(settings: DataSettings) -> tuple[Source, None]:
    """scikit-learn's 1,797 handwritten digits, 8 × 8 pixels, one channel, read from inside its package.

    Importing scikit-learn for one small table would cost every notebook several seconds.
    """
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    table = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.int64)
    images = (table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    return Source(table[:, -1], [str(digit) for digit in range(10)], images), None


def _synthetic(settings: DataSettings) -> tuple[Source, None]:
    """Generated images: a smooth random pattern a class, under noise. Learnable, not trivial."""
    import torch.nn.functional as F

    rng = np.random.default_rng(settings.split_seed)
    size, channels, classes = settings.image_size, settings.channels, settings.num_classes
    coarse = rng.normal(size=(classes, channels, 3, 3))
    patterns = F.interpolate(torch.from_numpy(coarse), size=(size, size), mode="bilinear").numpy()
    labels = np.arange(settings.num_images) % classes
    noisy = 128 + 45 * (patterns[labels] + rng.normal(size=(settings.num_images, channels, size, size)))
    pixels = noisy.clip(0, 255).round().astype(np.uint8)
    return Source(labels.astype(np.int64), [f"pattern {i}" for i in range(classes)], pixels), None


def _cifar(settings: DataSettings, download: bool) -> tuple[Source, Source]:
    """torchvision's CIFAR-10 and CIFAR-100: 50,000 + 10,000 images, 32 × 32 × 3.

    The archive's python pickles are unpickled by torchvision, after their MD5 sums were found to be the official ones.
    """
    from torchvision import datasets

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[settings.source]
    splits = [_torchvision(settings, cls, download, train=train) for train in (True, False)]
    return tuple(Source(np.array(s.targets), list(s.classes), s.data.transpose(0, 3, 1, 2)) for s in splits)


def _fashion(settings: DataSettings, download: bool) -> tuple[Source, Source]:
    """Fashion-MNIST: 60,000 + 10,000 images, 28 × 28 × 1; torchvision's folder, or the gzipped idx files themselves."""
    from torchvision import datasets

    folder = None if download else folder_of(settings)
    if folder and (folder / "train-images-idx3-ubyte.gz").is_file():
        classes = list(datasets.FashionMNIST.classes)
        return tuple(Source(_idx(folder, f"{p}-labels-idx1", 1), classes, _idx(folder, f"{p}-images-idx3", 3))
                     for p in ("train", "t10k"))  # fmt: skip
    splits = [_torchvision(settings, datasets.FashionMNIST, download, train=train) for train in (True, False)]
    return tuple(Source(s.targets.numpy(), list(s.classes), s.data.numpy()[:, None]) for s in splits)


def _idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes (its header: 0, 0, type 8, dimensions, then each size, big-endian)."""
    path = folder / f"{name}-ubyte.gz"
    try:
        blob = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(blob, ">i4", dimensions, offset=4)
        if blob[:4] != bytes([0, 0, 8, dimensions]) or len(blob) != 4 + 4 * dimensions + shape.prod():
            raise ValueError("not an idx file of unsigned bytes, or cut short")
    except (OSError, EOFError, ValueError) as error:
        raise SettingsError(f"data.folder: {path} cannot be read: {error}") from None
    values = np.frombuffer(blob, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    return values.astype(np.int64) if dimensions == 1 else values[:, None].copy()


def _torchvision(settings: DataSettings, cls: Any, download: bool, **arguments: Any) -> Any:
    """Make a torchvision set of a local folder; downloading only when asked."""
    if download:
        folder = _place(settings)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = folder_of(settings)
    try:
        return cls(root=str(folder), download=download, **arguments)
    except Exception as error:  # torchvision raises RuntimeError, OSError, URLError, … for a set that is not there
        hint = "" if download else "; machine.download=true fetches it"
        raise SettingsError(f"data.folder {folder}: torchvision cannot read {settings.source!r}: {error}{hint}") from None


def _decoded(file: Any) -> Image.Image:
    """Read an image to its end and close the file, whether it is sound or not."""
    with file:
        image = Image.open(file)
        image.load()
        return image


# -- images opened one by one -----------------------------------------------------------------------------------------------


class Names:
    """A list of strings in two tensors, which worker processes share: 1.3 million of Python's would take 150 MB in each."""

    def __init__(self, names: list[str]) -> None:
        blobs = [os.fsencode(name) for name in names]
        self.ends = torch.from_numpy(np.cumsum([0, *map(len, blobs)]))
        self.text = torch.frombuffer(bytearray(b"".join(blobs)), dtype=torch.uint8)

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self.text[self.ends[i] : self.ends[i + 1]].numpy().tobytes())


@dataclass(frozen=True)
class Files:
    """Image files."""

    paths: Names

    def __call__(self, i: int) -> Image.Image:
        return _decoded(open(self.paths[i], "rb"))

    def name(self, i: int) -> str:
        return self.paths[i]


@dataclass(frozen=True)
class Indexed:
    """A map-style set of (PIL image or open file, label), from torchvision or from timm's readers."""

    items: Any
    label: str

    def __call__(self, i: int) -> Image.Image:
        image = self.items[i][0]
        return image if isinstance(image, Image.Image) else _decoded(image)

    def name(self, i: int) -> str:
        return f"{self.label}, image {i}"


@dataclass(frozen=True)
class Shards:
    """Images inside tar files, found by their place, so that any of them can be read in any order."""

    tars: list[str]
    places: np.ndarray  # [N, 3]: which tar, offset, size
    names: Names

    def __call__(self, i: int) -> Image.Image:
        which, offset, size = self.places[i]
        with open(self.tars[which], "rb") as file:
            file.seek(offset)
            return _decoded(io.BytesIO(file.read(size)))

    def name(self, i: int) -> str:
        return f"{self.names[i]} in {self.tars[self.places[i][0]]}"


def _image_folder(settings: DataSettings, download: bool) -> tuple[Source, Source]:
    """A folder of `train/<class>/*.jpg` and `val/<class>/*.jpg`, as ImageNet is usually kept."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    folder = folder_of(settings)

    def scan(split: str, known: list[str] | None = None) -> tuple[list[str], list[tuple[str, str]]]:
        place = folder / split
        if not place.is_dir():
            there = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())[:8]) or "nothing"
            raise SettingsError(
                f"data.folder {folder} has no subfolder {split!r} but {there} (data.train_split, data.test_split)"
            )
        classes = sorted(p.name for p in place.iterdir() if p.is_dir())
        if not classes:
            raise SettingsError(f"{place} has no subfolders; it must have one for each class")
        index = {name: i for i, name in enumerate(known or classes)}
        if strange := [name for name in classes if name not in index]:
            raise SettingsError(f"{place} has classes that training lacks: {', '.join(strange[:5])}")
        found = make_dataset(str(place), {c: index[c] for c in classes}, IMG_EXTENSIONS, allow_empty=True)
        if empty := sorted(set(classes) - {(known or classes)[label] for _, label in found}):
            raise SettingsError(f"{place}: no images in {', '.join(empty[:5])} ({', '.join(IMG_EXTENSIONS)} count)")
        return classes, found

    classes, train = scan(settings.train_split)
    _, test = scan(settings.test_split, classes)
    return tuple(Source(np.array([label for _, label in part]), classes, opener=Files(Names([path for path, _ in part])))
                 for part in (train, test))  # fmt: skip


def _torch(settings: DataSettings, download: bool) -> tuple[Source, Source]:
    """timm's `torch/<name>`: a torchvision set by name."""
    from timm.data import create_dataset

    def make(root: str, download: bool, split: str) -> Any:
        return create_dataset(settings.source, root=root, split=split, download=download)

    sources = []
    for split in (settings.train_split, settings.test_split):
        items = _torchvision(settings, make, download, split=split)
        labels = next((getattr(items, name) for name in ("targets", "labels", "_labels") if hasattr(items, name)), None)
        if labels is None:
            labels = [label for _, label in items]
        classes = [str(c) for c in getattr(items, "classes", range(int(max(labels)) + 1))]
        sources.append(Source(np.asarray(labels, dtype=np.int64), classes, opener=Indexed(items, f"{settings.source} {split}")))
    return tuple(sources)


def _hfds(settings: DataSettings, download: bool) -> tuple[Source, Source]:
    """timm's `hfds/<name or folder>`: Hugging Face datasets, from its cache or a local folder; `folder` is the cache."""
    try:
        import datasets
        import huggingface_hub
        from timm.data import create_dataset

        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = not download

        sources = []
        for split in (settings.train_split, settings.test_split):
            cache = None if settings.folder is None else str(folder_of(settings))
            reader = create_dataset(settings.source, root=cache, split=split).reader
            labels = np.asarray(reader.dataset[reader.label_key], dtype=np.int64)
            names = getattr(reader.dataset.features[reader.label_key], "names", None)
            classes = list(names or map(str, range(int(labels.max()) + 1)))
            sources.append(Source(labels, classes, opener=Indexed(reader, f"{settings.source} {split}")))
        return tuple(sources)
    except SettingsError:
        raise
    except ImportError:
        raise SettingsError("data.source 'hfds/…' needs the package datasets: pip install datasets") from None
    except Exception as error:  # datasets raises many kinds for what is not there
        told = " ".join(str(error).split())
        raise SettingsError(f"data.source {settings.source!r}: Hugging Face datasets cannot read it: {told}") from None


def _wds(settings: DataSettings, download: bool) -> tuple[Source, Source]:
    """timm's `wds/`: WebDataset shards, `<key>.jpg` beside `<key>.cls` in tar files named by split and wildcards.

    timm streams shards; here their index is read once, so that shares, splits, exact resuming and evaluation that
    counts each image once work as for any other source.
    """
    folder = folder_of(settings)
    sources = []
    for split in (settings.train_split, settings.test_split):
        pattern = split if "*" in split or split.endswith(".tar") else f"*{split}*.tar"
        tars = sorted(glob.glob(str(folder / pattern)))
        if not tars:
            raise SettingsError(f"data.folder {folder} has no shards {pattern!r} (data.train_split, data.test_split)")
        places, names, labels = [], [], []
        for which, tar in enumerate(tars):
            for key, members in _samples(tar).items():
                image = next((members[end] for end in ("jpg", "jpeg", "png", "webp") if end in members), None)
                if image is None or "cls" not in members:
                    raise SettingsError(f"{tar}: sample {key!r} has {', '.join(members)}; it needs an image and a .cls file")
                places.append((which, image.offset_data, image.size))
                names.append(image.name)
                with open(tar, "rb") as file:
                    file.seek(members["cls"].offset_data)
                    text = file.read(members["cls"].size).strip()
                if not text.isdigit():
                    raise SettingsError(f"{tar}: {members['cls'].name} holds {text[:20]!r}, not the number of a class")
                labels.append(int(text))
        classes = [str(i) for i in sorted(set(labels))]
        sources.append(Source(np.array(labels, dtype=np.int64), classes, opener=Shards(tars, np.array(places), Names(names))))
    return tuple(sources)


def _samples(tar: str) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Return the members of a shard by key and ending."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.isfile():
                    folder, _, file = member.name.rpartition("/")
                    key, _, ending = file.partition(".")
                    found.setdefault(f"{folder}/{key}", {})[ending.lower()] = member
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SettingsError(f"shard {tar} cannot be read: {error}") from None
    return found


_SOURCES = {
    "digits": _digits, "synthetic": _synthetic, "cifar10": _cifar, "cifar100": _cifar, "fashion_mnist": _fashion,
    "folder": _image_folder, "torch": _torch, "hfds": _hfds, "wds": _wds,
}  # fmt: skip
