"""What every source of images has to do with: labelled images, the folder they lie in, names that count and names that do not."""

import os
import stat
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from incubate_lib.config import DEFAULT_MACHINE, MADE, DataSettings, MachineSettings, SettingsError, data_folder

Opener = Callable[[int], Image.Image]  # picklable: worker processes get a copy
LEFT_BEHIND = {  # by operating systems, in lower case; what begins with a dot is left behind, too
    "__macosx", "@eadir", "thumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "system volume information",
}  # fmt: skip
MOST_CLASSES = 1_000_000  # more is no classification but a mistake, an identity number for example


@dataclass(frozen=True)
class Source:
    """Labelled images of one split: all pixels, or a way to open and decode image i."""

    labels: np.ndarray  # [N] int64
    classes: list[str]  # the name of class i stands at i, whether it has images or not
    pixels: np.ndarray | None = None  # [N, C, H, W] uint8
    opener: Any = None  # has __call__(i) → PIL image of mode L or RGB, and name(i) → what people can look up


def has_folder(settings: DataSettings) -> bool:
    """Whether the images of this source lie in files of the user's."""
    return settings.source not in MADE


def folder_of(settings: DataSettings, machine: MachineSettings = DEFAULT_MACHINE) -> Path:
    """Return the folder of a source; SettingsError if there is none."""
    folder = place_of(settings, machine)
    if not folder.is_dir():
        message = "is not there" if not folder.exists() else "is not a folder"
        raise SettingsError(f"data.folder {folder} {message}; it must hold the images of data.source {settings.source!r}")
    return folder


def place_of(settings: DataSettings, machine: MachineSettings = DEFAULT_MACHINE) -> Path:
    """Return where the folder of a source is, or would be."""
    name = machine.data_folder or settings.folder or settings.source.strip("/").replace("/", "-")
    return data_folder() / "datasets" / os.path.expanduser(name)


def from_torchvision(settings: DataSettings, cls: Any, download: bool, **arguments: Any) -> Any:
    """Make a torchvision set of a local folder; downloading only when asked."""
    if download:
        folder = place_of(settings)
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = folder_of(settings)
    try:
        return cls(root=str(folder), download=download, **arguments)
    except Exception as error:  # torchvision raises RuntimeError, OSError, URLError, … for a set that is not there
        hint = "" if download else "; machine.download=true fetches it"
        raise SettingsError(f"data.folder {folder}: torchvision cannot read {settings.source!r}: {error}{hint}") from None


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read bytes; OSError for what is no regular file: a pipe without a writer would be waited for for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{os.fspath(path)} is not a regular file but a folder, pipe, socket or device")
    return open(path, "rb")


def is_left_behind(name: str) -> bool:
    """Whether tools and operating systems leave files and folders of this name behind: `._name.png`, `.ipynb_checkpoints`."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def normal(name: str) -> str:
    """Return a name in the form (Unicode's NFC) in which names are compared: a copy from a Mac may spell é in two characters."""
    return unicodedata.normalize("NFC", name)


def numbered(labels: Sequence[Any], what: str, names: Sequence[Any] = ()) -> tuple[np.ndarray, list[str]]:
    """Return labels [N] int64 that are numbers of classes, and the name of each class; one without a name is called i.

    SettingsError for labels that are no whole numbers, and for numbers so large that they cannot be classes.
    """
    array = np.asarray(labels)
    if len(array) and array.dtype.kind not in "iub":
        strange = next((label for label in array.tolist() if not isinstance(label, int)), array[0])
        raise SettingsError(f"{what}: label {strange!r} is no whole number; labels are the numbers of classes, from 0")
    most = int(array.max(initial=-1))
    if most >= MOST_CLASSES:
        raise SettingsError(f"{what}: label {most} is no class; labels are numbers from 0, and {MOST_CLASSES:,} classes the most")
    return array.astype(np.int64), [*map(str, names), *map(str, range(len(names), most + 1))]
