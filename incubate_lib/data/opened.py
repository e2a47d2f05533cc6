"""Images that are opened one by one: of a folder, of torchvision, of Hugging Face datasets, of WebDataset shards.

Images are read as torchvision's and timm's loaders read them: as they are stored, not turned by a camera's orientation tag
(EXIF; pillow itself turns TIFFs), transparency left out, palettes, CMYK and more made RGB. Two things differ. Sixteen bits of
grey keep their upper byte, where these loaders make nearly all of them white. And only the formats below are opened: pillow
knows others for which it starts a program.
"""

import glob
import io
import itertools
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from incubate_lib.config import DataSettings, SettingsError
from incubate_lib.data.folders import Source, folder_of, from_torchvision, is_left_behind, normal, numbered, open_regular

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "GIF")  # of IMG_EXTENSIONS, and what the web calls .jpg, too
BITS, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # tags of TIFF and EXIF
TAR_BLOCK = 512  # bytes; two empty blocks end a tar file


# -- one image ----------------------------------------------------------------------------------------------------------------


def decoded(file: BinaryIO) -> Image.Image:
    """Read an image to its end as L or RGB, and close the file, whether it is sound or not. Damaged files raise anything."""
    with file:
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise UnidentifiedImageError(f"is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from None
        image.load()
    return plain(image)


def plain(image: Image.Image) -> Image.Image:
    """Return an image of any mode as L or RGB, 8 bits a channel; ValueError for modes whose black and white nobody knows."""
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _upper_byte(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has 32 bits, and nothing says which is white; save it with 8 or 16 bits of grey")
    if image.mode == "P" and "transparency" in image.info:  # straight to RGB, which is the same, makes pillow warn
        image = image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _upper_byte(image: Image.Image) -> Image.Image:
    """Return 16-bit grey as L: of each number the upper byte, as pillow takes it of colours with 16 bits."""
    tags = getattr(image, "tag_v2", {})  # only a TIFF may have 12 bits, or 0 for white
    grey = (np.asarray(image) >> (tags.get(BITS, (16,))[0] - 8)).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == 0 else grey)


def is_turned(image: Image.Image) -> bool:
    """Whether a tag of the camera's (EXIF) says that the image is to be turned or mirrored before it is shown."""
    try:
        return image.getexif().get(ORIENTATION, 1) != 1
    except Exception:  # damaged tags raise anything, and nobody needs them
        return False


# -- ways to open image i -------------------------------------------------------------------------------------------------------


class Names:
    """A list of strings in two tensors, which worker processes share: 1.3 million of Python's would take 150 MB in each."""

    def __init__(self, names: Iterable[str]) -> None:
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
        return decoded(open_regular(self.paths[i]))

    def name(self, i: int) -> str:
        return self.paths[i]


@dataclass(frozen=True)
class Indexed:
    """A map-style set of (PIL image, label) that torchvision holds in memory."""

    items: Any
    label: str

    def __call__(self, i: int) -> Image.Image:
        return plain(self.items[i][0])

    def name(self, i: int) -> str:
        return f"{self.label}, image {i}"


@dataclass(frozen=True)
class Rows:
    """A table of Hugging Face datasets, with a column of encoded images or of their paths."""

    table: Any
    column: str
    label: str

    def __call__(self, i: int) -> Image.Image:
        image = self.table[i][self.column]
        return decoded(io.BytesIO(image["bytes"]) if image["bytes"] else open_regular(image["path"]))

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
            return decoded(io.BytesIO(file.read(size)))

    def name(self, i: int) -> str:
        return f"{self.names[i]} in {self.tars[self.places[i][0]]}"


# -- folders ------------------------------------------------------------------------------------------------------------------


def image_folder(settings: DataSettings, download: bool) -> tuple[Source, Source]:
    """A folder of `train/<class>/*.jpg` and `val/<class>/*.jpg`, as ImageNet is usually kept."""
    folder = folder_of(settings)
    return _of_splits(folder, [folder / split for split in (settings.train_split, settings.test_split)])


def _of_splits(folder: Path, splits: list[Path]) -> tuple[Source, Source]:
    """Return the sources of two folders of class folders; classes are sorted by name, images by path."""
    classes, sources = None, []
    for place in splits:
        if not place.is_dir():
            there = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())[:8]) or "nothing"
            raise SettingsError(
                f"data.folder {folder} has no subfolder {place.name!r} but {there} (data.train_split, data.test_split)"
            )
        folders = _class_folders(place)
        classes = classes or sorted(folders)
        if strange := sorted(set(folders) - set(classes)):
            raise SettingsError(f"{place} has classes that training lacks: {', '.join(strange[:5])}")
        images = {name: list(_images_below(folders[name])) for name in sorted(folders)}
        if empty := [name for name, paths in images.items() if not paths]:
            raise SettingsError(f"{place}: no images in {', '.join(empty[:5])} ({', '.join(IMG_EXTENSIONS)} count)")
        number = {name: i for i, name in enumerate(classes)}
        labels = np.repeat([number[name] for name in images], [len(paths) for paths in images.values()])
        paths = itertools.chain.from_iterable(images.values())
        sources.append(Source(labels, classes, opener=Files(Names(paths))))
    return tuple(sources)


def _class_folders(place: Path) -> dict[str, Path]:
    """Return the folder of each class by its name; one name may be spelled in two ways that look the same."""
    folders: dict[str, Path] = {}
    for path in sorted(place.iterdir()):
        name = normal(path.name)
        if is_left_behind(name) or not path.is_dir():
            continue
        if name in folders:
            twins = " and ".join(ascii(p.name) for p in (folders[name], path))
            raise SettingsError(
                f"{place} has class {name} twice: {twins} differ only in Unicode normalisation; they must be one folder"
            )
        folders[name] = path
    if not folders:
        raise SettingsError(f"{place} has no subfolders; it must have one for each class")
    return folders


def _images_below(folder: Path) -> Iterator[str]:
    """Yield the images of a folder and its subfolders, in torchvision's order; links to folders are followed."""

    def refuse(error: OSError) -> None:  # a folder that cannot be read is no empty one
        raise SettingsError(f"{error.filename} cannot be read: {error.strerror}")

    found, ways = [], {str(folder): (folder.resolve(),)}  # of each folder to come: where it and those above it really are
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not is_left_behind(name)]
        way = ways.pop(root)
        for path in (Path(root, name) for name in folders):
            real = path.resolve() if path.is_symlink() else way[-1] / path.name
            if path.is_symlink() and any(above.is_relative_to(real) for above in way):  # or each image would come 40 times
                raise SettingsError(f"{path} is a link to a folder that it lies in")
            ways[str(path)] = (*way, real)
        found.append((root, [name for name in files if name.lower().endswith(IMG_EXTENSIONS) and not is_left_behind(name)]))
    for root, files in sorted(found, key=lambda item: normal(item[0])):
        yield from (os.path.join(root, name) for name in sorted(files, key=normal))


# -- timm's sources -------------------------------------------------------------------------------------------------------------


def torch_set(settings: DataSettings, download: bool) -> tuple[Source, Source]:
    """timm's `torch/<name>`: a torchvision set by name."""
    from timm.data import create_dataset
    from timm.data.dataset_factory import _search_split

    wanted = (settings.train_split, settings.test_split)
    if settings.source.lower() in ("torch/folder", "torch/image_folder"):
        folder = folder_of(settings)
        found = [Path(_search_split(str(folder), split)) for split in wanted]  # `val` may be called `validation`
        return _of_splits(folder, [folder / split if place == folder else place for split, place in zip(wanted, found)])

    def make(root: str, download: bool, split: str) -> Any:
        return create_dataset(settings.source, root=root, split=split, download=download)

    sources = []
    for split in wanted:
        items, what = from_torchvision(settings, make, download, split=split), f"{settings.source} {split}"
        files = _files_of(items)
        labels = next((getattr(items, name) for name in ("targets", "labels", "_labels") if hasattr(items, name)), None)
        if labels is None:
            labels = [label for _, label in files or items]
        labels, classes = numbered(labels, what, getattr(items, "classes", ()))
        opener = Files(Names(path for path, _ in files)) if files else Indexed(items, what)
        sources.append(Source(labels, classes, opener=opener))
    return tuple(sources)


def _files_of(items: Any) -> list[tuple[str, int]]:
    """Return (path, label) of each image of a torchvision set that lies in files; nothing for one in memory."""
    if hasattr(items, "all_categories"):  # iNaturalist
        kind = items.target_type[0]
        return [
            (os.path.join(items.root, items.all_categories[i], file), i if kind == "full" else items.categories_map[i][kind])
            for i, file in items.index
        ]
    return getattr(items, "imgs", [])


def hfds(settings: DataSettings, download: bool) -> tuple[Source, Source]:
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
            what, table = f"{settings.source} {split}", reader.dataset
            names = getattr(table.features[reader.label_key], "names", ())
            labels, classes = numbered(table[reader.label_key], what, names)
            sources.append(Source(labels, classes, opener=Rows(table, reader.image_key, what)))
        return tuple(sources)
    except SettingsError:
        raise
    except ImportError:
        raise SettingsError("data.source 'hfds/…' needs the package datasets: pip install datasets") from None
    except Exception as error:  # datasets raises many kinds for what is not there
        message = " ".join(str(error).split())
        raise SettingsError(f"data.source {settings.source!r}: Hugging Face datasets cannot read it: {message}") from None


def wds(settings: DataSettings, download: bool) -> tuple[Source, Source]:
    """timm's `wds/`: WebDataset shards, `<key>.jpg` beside `<key>.cls` in tar files named by split and wildcards.

    timm streams shards; here their index is read once, so that shares, splits, exact resuming and evaluation that
    counts each image once work as for any other source.
    """
    folder = folder_of(settings)
    sources = []
    for split in (settings.train_split, settings.test_split):
        pattern = split if "*" in split or split.endswith(".tar") else f"*{split}*.tar"
        tars = [tar for tar in sorted(glob.glob(str(folder / pattern))) if not is_left_behind(os.path.basename(tar))]
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
                if not text.isdigit() or len(text) > 18:  # digits of an int64
                    raise SettingsError(f"{tar}: {members['cls'].name} holds {text[:20]!r}, not the number of a class")
                labels.append(int(text))
        labels, classes = numbered(labels, f"{settings.source} {split}")
        sources.append(Source(labels, classes, opener=Shards(tars, np.array(places), Names(names))))
    return tuple(sources)


def _samples(tar: str) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Return the members of a shard by key and ending."""
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with open_regular(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.isdir() or any(is_left_behind(part) for part in member.name.split("/") if part.strip(".")):
                    continue
                if not member.isfile():
                    raise SettingsError(f"{tar}: {member.name} is a link or a device; shards hold the files themselves")
                folder, _, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                sample = found.setdefault(f"{folder}/{key}", {})
                if (ending := ending.lower()) in sample:
                    raise SettingsError(f"{tar}: {member.name} stands there twice")
                sample[ending] = member
            _check_end(tar, file, archive.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise SettingsError(f"shard {tar} cannot be read: {error}") from None
    return found


def _check_end(tar: str, file: BinaryIO, end: int) -> None:
    """Raise SettingsError unless a tar file ends as it must: tarfile itself takes any end between two members for the end."""
    file.seek(end)
    mark = file.read(2 * TAR_BLOCK)
    if mark != bytes(2 * TAR_BLOCK):
        message = "is damaged" if len(mark) == 2 * TAR_BLOCK else "is cut short"
        raise SettingsError(
            f"shard {tar} {message}: there is no end mark (two empty blocks) at byte {end:,}; copy or make it again"
        )
    while rest := file.read(1 << 20):
        if rest != bytes(len(rest)):
            raise SettingsError(f"shard {tar} goes on after its end mark at byte {end:,}: shards cannot be joined by cat")
