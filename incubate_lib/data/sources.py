"""Where images come from: the sets that `data.source` can name.

Whatever is wrong with a folder is reported when its source is opened, before anything is trained: missing folder or split, no
classes, a class to evaluate on that training lacks, files that cannot be read.
"""

import gzip
import importlib.util
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_dataset
from torchvision.datasets import FashionMNIST

from incubate_lib.config import DEFAULT_MACHINE, SCENES, DataSettings, MachineSettings, SettingsError, data_folder, refuse
from incubate_lib.data.decode import Files, Names, Rows, open_regular
from incubate_lib.data.folders import Source, folder_of, image_folder, numbered
from incubate_lib.data.shards import wds

LARGEST_FILE = 2**30  # bytes of an idx file, unpacked; Fashion-MNIST's largest has 47 million


def open_source(settings: DataSettings, machine: MachineSettings = DEFAULT_MACHINE) -> tuple[Source, Source | None]:
    """Return the training images and those of the official test split; None where there is only one pool of images.

    Class i has its name at place i of `classes`, and the same in both. Raises SettingsError when folder, split or classes
    are not what they must be.
    """
    kind = settings.source.split("/")[0]
    if settings.is_text:
        return Source(np.zeros(1, dtype=np.int64), []), None  # no classes; `text.contexts` reads it
    what = f"data.source {settings.source!r}: the"
    if machine.data_folder:
        settings = settings.model_copy(update={"folder": machine.data_folder})
    if kind in _MADE:
        train, test = _MADE[kind](settings), None
    else:
        read = _READ.get(kind, _torchvision)
        names = settings.train_split, settings.test_split
        train, test = (read(settings, split, machine.download) for split in names)
    for split, source in {"train": train, "test": test}.items():
        if source is not None and not len(source.labels):
            raise SettingsError(f"{what} {split} split holds no images")
        if source is not None and source.labels.min() < 0:
            raise SettingsError(f"{what} {split} split has images without a label (-1)")
    if test is not None and len(strange := np.setdiff1d(test.labels, train.labels)):
        some = ", ".join(test.classes[i] for i in strange[:5])
        raise SettingsError(f"{what} test split has classes that training lacks: {some}")
    return train, test


def _digits(settings: DataSettings) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8 × 8 pixels, one channel, read from inside its package.

    Importing scikit-learn for one small table would cost every notebook several seconds.
    """
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    table = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.int64)
    images = (table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    return Source(table[:, -1], [str(digit) for digit in range(10)], images)


def _synthetic(settings: DataSettings) -> Source:
    """Generated images: a smooth random pattern a class, under noise. Learnable, not trivial."""
    rng = np.random.default_rng(settings.split_seed)
    size, channels, classes = settings.image_size, settings.channels, settings.num_classes
    coarse = rng.normal(size=(classes, channels, 3, 3))
    patterns = F.interpolate(torch.from_numpy(coarse), size=(size, size), mode="bilinear").numpy()
    labels = np.arange(settings.num_images) % classes
    noisy = 128 + 45 * (patterns[labels] + rng.normal(size=(settings.num_images, channels, size, size)))
    pixels = noisy.clip(0, 255).round().astype(np.uint8)
    return Source(labels.astype(np.int64), [f"pattern {i}" for i in range(classes)], pixels)


def _torchvision(settings: DataSettings, split: str, download: bool) -> Source:
    """A set of torchvision's by timm's name, from a local folder; downloading only when asked. Small ones are read whole.

    CIFAR's archive has python pickles; torchvision unpickles them after their MD5 sums were found to be the official ones.
    """
    if settings.source.lower() in ("torch/folder", "torch/image_folder"):
        return image_folder(settings, split, download)
    whole, what = not settings.source.startswith("torch/"), f"{settings.source} {split}"
    folder = folder_of(settings, make=download)
    if settings.source == "fashion_mnist" and (folder / "train-images-idx3-ubyte.gz").is_file():
        return _zipped_fashion(folder, "train" if split == "train" else "t10k")
    try:
        name = settings.source.removeprefix("torch/")
        items = create_dataset(f"torch/{name}", root=str(folder), split=split, download=download)
    except Exception as error:  # torchvision raises RuntimeError, OSError, URLError, … for what is not there
        hint = "" if download else "; machine.download=true fetches it"
        raise SettingsError(f"data.folder {folder}: torchvision cannot read {settings.source!r}: {error}{hint}") from None
    files = _files_of(items)
    held = [name for name in ("targets", "labels", "_labels") if hasattr(items, name)]
    labels = getattr(items, held[0]) if held else [label for _, label in files or items]
    labels, classes = numbered(labels, what, getattr(items, "classes", ()))
    if whole:
        pixels = np.asarray(items.data)
        return Source(labels, classes, pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2))
    opener = Files(Names(path for path, _ in files)) if files else Rows(items, 0, what)
    return Source(labels, classes, opener=opener)


def _files_of(items: Any) -> list[tuple[str, int]]:
    """Return (path, label) of each image of a torchvision set that lies in files; nothing for one in memory."""
    if hasattr(items, "all_categories"):  # iNaturalist
        kind, folders = items.target_type[0], items.all_categories
        number = [i if kind == "full" else items.categories_map[i][kind] for i in range(len(folders))]
        return [(os.path.join(items.root, folders[i], file), number[i]) for i, file in items.index]
    return getattr(items, "imgs", [])


def _zipped_fashion(folder: Path, split: str) -> Source:
    """Fashion-MNIST's gzipped idx files themselves: 60,000 + 10,000 images, 28 × 28 × 1."""
    labels, pixels = _idx(folder, f"{split}-labels-idx1", 1), _idx(folder, f"{split}-images-idx3", 3)
    return Source(labels.astype(np.int64), list(FashionMNIST.classes), pixels[:, None].copy())


def _idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes (its header: 0, 0, type 8, dimensions, then each size, big-endian)."""
    path = folder / f"{name}-ubyte.gz"
    try:
        with open_regular(path) as packed, gzip.open(packed) as file:
            head = file.read(4 + 4 * dimensions)
            shape = np.frombuffer(head, ">i4", dimensions, offset=4)
            size = math.prod(map(int, shape))
            if head[:4] != bytes([0, 0, 8, dimensions]) or shape.min() < 0 or size > LARGEST_FILE:
                raise ValueError(f"it does not begin like a file of unsigned bytes in {dimensions} dimension(s)")
            pixels = file.read(size + 1)  # and no more, however much is packed into the file
        return np.frombuffer(pixels, np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError from sizes that do not fit, too
        raise SettingsError(f"data.folder: {path} cannot be read: {error}") from None


def _hugging_face(settings: DataSettings, split: str, download: bool) -> Source:
    """timm's `hfds/<name or folder>`: Hugging Face datasets, from its cache or a local folder; `folder` is the cache."""
    cache, what = settings.folder and str(folder_of(settings)), f"{settings.source} {split}"
    name = settings.source.removeprefix("hfds/")
    place = Path(name).resolve()
    around = any(inner.is_relative_to(place) for inner in (Path.cwd().parent, data_folder()))
    refuse(not name or around, f"data.source {settings.source!r}: name a set of the Hub or its folder, not one around everything")
    try:
        import datasets
        import huggingface_hub

        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = not download
        table = datasets.load_dataset(name, split=split, cache_dir=cache)
        given = {field: getattr(settings, field) for field in ("image_column", "label_column")}
        missing = [f"data.{field} is {column!r}" for field, column in given.items() if column not in table.column_names]
        refuse(missing, f"{what}: {' and '.join(missing)}, but its columns are {', '.join(table.column_names)}")
        table = table.cast_column(settings.image_column, datasets.Image(decode=False))
        labels = table[settings.label_column]
        names = getattr(table.features[settings.label_column], "names", ())
    except SettingsError:
        raise
    except ImportError:
        raise SettingsError("data.source 'hfds/…' needs the package datasets: pip install datasets") from None
    except Exception as error:  # datasets raises many kinds for what is not there
        message = " ".join(str(error).split())
        raise SettingsError(f"data.source {settings.source!r}: Hugging Face datasets cannot read it: {message}") from None
    return Source(*numbered(labels, what, names), opener=Rows(table, settings.image_column, what))


def _scenes(settings: DataSettings, split: str, download: bool) -> Source:
    from incubate_lib.data.scenes import layouts

    read = {"coco": layouts.coco, "ade20k": layouts.ade20k}.get(settings.source, layouts.generated)
    return read(settings, split, download)


_MADE = {"digits": _digits, "synthetic": _synthetic}
_READ = {"folder": image_folder, "hfds": _hugging_face, "wds": wds} | dict.fromkeys(SCENES, _scenes)  # others are torchvision's
