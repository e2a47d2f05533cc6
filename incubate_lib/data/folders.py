"""Folders of images: where they are, which names in them count, and classes as subfolders. What every source returns."""

import itertools
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from incubate_lib.config import DEFAULT_MACHINE, MOST_CLASSES, DataSettings, MachineSettings, SettingsError, data_folder
from incubate_lib.data.decode import Files, Names

# By operating systems and tools; what begins with a dot is left behind, too.
LEFT_BEHIND = re.compile(
    r"\..*|__macosx|@eadir|thumbs\.db|desktop\.ini|lost\+found|\$recycle\.bin|system volume information", re.I | re.S
)


@dataclass(frozen=True)
class Source:
    """Labelled images of one split: all pixels, or a way to open and decode image i."""

    labels: np.ndarray  # [N] int64
    classes: list[str]  # the name of class i stands at i, whether it has images or not
    pixels: np.ndarray | None = None  # [N, C, H, W] uint8
    opener: Any = None  # has __call__(i) → PIL image of mode L or RGB, and name(i) → what people can look up


def folder_of(settings: DataSettings, machine: MachineSettings = DEFAULT_MACHINE, make: bool = False) -> Path:
    """Return the folder of a source; SettingsError if there is none, and none is to be made."""
    folder = place_of(settings, machine)
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
        message = "is not there" if not folder.exists() else "is not a folder"
        beside = "" if machine.data_folder else " or beside the settings file"
        where = f"a relative name begins in {data_folder() / 'datasets'}{beside}"
        kind = "text" if settings.is_text else "images"
        hint = f"it must hold the {kind} of data.source {settings.source!r}; {where}"
        raise SettingsError(f"data.folder {folder} {message}; {hint}")
    return folder


def place_of(settings: DataSettings, machine: MachineSettings = DEFAULT_MACHINE) -> Path:
    """Return where the folder of a source is, or would be."""
    name = machine.data_folder or settings.folder or settings.source.strip("/").replace("/", "-")
    return data_folder() / "datasets" / os.path.expanduser(name)


def is_left_behind(name: str) -> bool:
    """Whether tools and operating systems leave files and folders of this name behind: `._name.png`, `.ipynb_checkpoints`."""
    return LEFT_BEHIND.fullmatch(name) is not None


def normal(name: str) -> str:
    """Return a name in the form (Unicode's NFC) in which names are compared: a copy from a Mac may spell é in two characters."""
    return unicodedata.normalize("NFC", name)


def numbered(labels: Any, what: str, names: Any = ()) -> tuple[np.ndarray, list[str]]:
    """Return labels [N] int64 that are numbers of classes, and the name of each class; one without a name is called i.

    SettingsError for labels that are no whole numbers, and for numbers so large that they cannot be classes.
    """
    array = np.asarray(labels)
    if len(array) and array.dtype.kind not in "iub":
        strange = next((label for label in array.tolist() if not isinstance(label, int)), array[0])
        hint = "; data.label_column names another column, ClassLabel numbers words" if isinstance(strange, str) else ""
        raise SettingsError(f"{what}: label {strange!r} is no whole number; labels are the numbers of classes, from 0{hint}")
    most = int(array.max(initial=-1))
    if most >= MOST_CLASSES:
        raise SettingsError(f"{what}: label {most} is no class; labels are numbers from 0, and {MOST_CLASSES:,} classes the most")
    return array.astype(np.int64), [*map(str, names), *map(str, range(len(names), most + 1))]


def image_folder(settings: DataSettings, split: str, download: bool) -> Source:
    """Return the images of `<split>/<class>/*.jpg`, as ImageNet is usually kept.

    Classes are those of the training split, sorted by name; images are sorted by path.
    """
    classes = sorted(_class_folders(settings, settings.train_split)[1])
    place, folders = _class_folders(settings, split)
    if strange := sorted(set(folders) - set(classes)):
        raise SettingsError(f"{place} has classes that training lacks: {', '.join(strange[:5])}")
    images = {name: list(_images_below(folders[name])) for name in sorted(folders)}
    if empty := [name for name, paths in images.items() if not paths]:
        raise SettingsError(f"{place}: no images in {', '.join(empty[:5])} ({', '.join(IMG_EXTENSIONS)} count)")
    labels = np.repeat([classes.index(name) for name in images], [len(paths) for paths in images.values()])
    return Source(labels, classes, opener=Files(Names(itertools.chain.from_iterable(images.values()))))


def _class_folders(settings: DataSettings, split: str) -> tuple[Path, dict[str, Path]]:
    """Return where a split lies, and the folder of each class by its name; one name may be spelled in two ways that look
    the same."""
    folder = folder_of(settings)
    place = folder / split
    if settings.source != "folder":  # but timm's, for which `val` may be called `validation`
        from timm.data.dataset_factory import _search_split

        found = Path(_search_split(str(folder), split))
        place = place if found == folder else found
    if not place.is_dir():
        there = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())[:8]) or "nothing"
        raise SettingsError(
            f"data.folder {folder} has no subfolder {place.name!r} but {there} (data.train_split, data.test_split)"
        )
    folders: dict[str, Path] = {}
    for path in sorted(place.iterdir()):
        name = normal(path.name)
        if is_left_behind(name):
            continue
        if path.is_symlink() and not path.exists():
            raise SettingsError(f"{path} is a link to nothing, or to itself; remove it, or mend what it leads to")
        if not path.is_dir():
            continue
        if name in folders:
            twins = " and ".join(ascii(p.name) for p in (folders[name], path))
            raise SettingsError(
                f"{place} has class {name} twice: {twins} differ only in Unicode normalisation; they must be one folder"
            )
        folders[name] = path
    if not folders:
        raise SettingsError(f"{place} has no subfolders; it must have one for each class")
    return place, folders


def links_out(folder: Path) -> list[str]:
    """Return the links below a folder that lead out of it, not followed further: what they lead to counts as if it lay there."""
    real, links = os.path.realpath(folder), []
    for root, folders, files in os.walk(folder):
        paths = (Path(root, name) for name in sorted([*folders, *files]) if not is_left_behind(name))
        links += [str(path) for path in paths if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real)]
    return links


def _images_below(folder: Path) -> Iterator[str]:
    """Yield the images of a folder and its subfolders, in torchvision's order; links are followed, but not in circles."""

    def refuse(error: OSError) -> None:  # a folder that cannot be read is no empty one
        raise SettingsError(f"{error.filename} cannot be read: {error.strerror}")

    found = []
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not is_left_behind(name)]
        for path in (Path(root, name) for name in folders if os.path.islink(os.path.join(root, name))):
            real = path.resolve()
            if any(above.resolve().is_relative_to(real) for above in path.parents):
                raise SettingsError(f"{path} is a link to a folder that it lies in")
        found.append((root, files))
    for root, files in sorted(found, key=lambda item: normal(item[0])):
        for name in sorted(files, key=normal):
            if name.lower().endswith(IMG_EXTENSIONS) and not is_left_behind(name):
                yield os.path.join(root, name)
