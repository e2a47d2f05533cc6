"""Where images come from: the sets that `data.source` can name, the small ones among them, which are read whole as arrays.

Large ones are opened image by image (`opened`). Whatever is wrong with a folder is told here and there, before anything is
trained: missing folder or split, no classes, a class to judge by that training lacks, files that cannot be read.
"""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from incubate_lib.config import DEFAULT_MACHINE, MADE, DataSettings, MachineSettings, SettingsError
from incubate_lib.data.folders import Source, folder_of, from_torchvision, open_regular
from incubate_lib.data.opened import hfds, image_folder, torch_set, wds


def open_source(settings: DataSettings, machine: MachineSettings = DEFAULT_MACHINE) -> tuple[Source, Source | None]:
    """Return the training images and those of the official test split; None where there is only one pool of images.

    Class i has its name at place i of `classes`, and the same in both. Raises SettingsError when folder, split or classes
    are not what they must be.
    """
    kind = settings.source.split("/")[0]
    settings = settings.model_copy(update={"folder": machine.data_folder}) if machine.data_folder else settings
    opened = _SOURCES[kind](settings) if kind in MADE else _SOURCES[kind](settings, machine.download)
    train, test = opened
    for split, source in {"train": train, "test": test}.items():
        if source is not None and not len(source.labels):
            raise SettingsError(f"data.source {settings.source!r}: the {split} split holds no images")
        if source is not None and source.labels.min() < 0:
            raise SettingsError(f"data.source {settings.source!r}: the {split} split has images without a label (-1)")
    if test is not None and len(strange := np.setdiff1d(test.labels, train.labels)):
        some = ", ".join(test.classes[i] for i in strange[:5])
        raise SettingsError(f"data.source {settings.source!r}: the test split has classes that training lacks: {some}")
    return train, test


# -- small sets -------------------------------------------------------------------------------------------------------------


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
    splits = [from_torchvision(settings, cls, download, train=train) for train in (True, False)]
    return tuple(Source(np.array(s.targets), list(s.classes), s.data.transpose(0, 3, 1, 2)) for s in splits)


def _fashion(settings: DataSettings, download: bool) -> tuple[Source, Source]:
    """Fashion-MNIST: 60,000 + 10,000 images, 28 × 28 × 1; torchvision's folder, or the gzipped idx files themselves."""
    from torchvision import datasets

    folder = None if download else folder_of(settings)
    if folder and (folder / "train-images-idx3-ubyte.gz").is_file():
        classes = list(datasets.FashionMNIST.classes)
        return tuple(Source(_idx(folder, f"{p}-labels-idx1", 1), classes, _idx(folder, f"{p}-images-idx3", 3))
                     for p in ("train", "t10k"))  # fmt: skip
    splits = [from_torchvision(settings, datasets.FashionMNIST, download, train=train) for train in (True, False)]
    return tuple(Source(s.targets.numpy(), list(s.classes), s.data.numpy()[:, None]) for s in splits)


def _idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes (its header: 0, 0, type 8, dimensions, then each size, big-endian)."""
    path = folder / f"{name}-ubyte.gz"
    try:
        with open_regular(path) as file:
            blob = gzip.decompress(file.read())
        shape = np.frombuffer(blob, ">i4", dimensions, offset=4)
        if blob[:4] != bytes([0, 0, 8, dimensions]) or len(blob) != 4 + 4 * dimensions + shape.prod():
            raise ValueError("not an idx file of unsigned bytes, or cut short")
    except (OSError, EOFError, ValueError) as error:
        raise SettingsError(f"data.folder: {path} cannot be read: {error}") from None
    values = np.frombuffer(blob, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    return values.astype(np.int64) if dimensions == 1 else values[:, None].copy()


_SOURCES = {
    "digits": _digits, "synthetic": _synthetic, "cifar10": _cifar, "cifar100": _cifar, "fashion_mnist": _fashion,
    "folder": image_folder, "torch": torch_set, "hfds": hfds, "wds": wds,
}  # fmt: skip
