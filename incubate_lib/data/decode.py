"""From a source's i-th image to a decoded one: files, rows of a table, parts of tar files.

Images are read as torchvision's and timm's loaders read them: as they are stored, not turned by a camera's orientation tag
(EXIF; pillow itself turns TIFFs), transparency left out, palettes, CMYK and more made RGB. Two things differ. Sixteen bits of
grey keep their upper byte, where these loaders make nearly all of them white. And only the formats below are opened: pillow
knows others for which it starts a program.
"""

import io
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

Opener = Callable[[int], Image.Image]  # picklable: worker processes get a copy
# Of torchvision's IMG_EXTENSIONS, and what the web calls .jpg, too:
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "GIF")
BITS, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # tags of TIFF and EXIF


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
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, which is the same, makes pillow warn
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


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read bytes; OSError for what is no regular file: a pipe without a writer would be waited for for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{os.fspath(path)} is not a regular file but a folder, pipe, socket or device")
    return open(path, "rb")


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
class Rows:
    """A table of which a column holds images: PIL's, or Hugging Face's mappings of encoded bytes or a path."""

    table: Any
    column: Any
    label: str

    def __call__(self, i: int) -> Image.Image:
        image = self.table[i][self.column]
        if isinstance(image, Image.Image):
            return plain(image)
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
        with open(self.tars[which], "rb") as tar:
            tar.seek(offset)
            return decoded(io.BytesIO(tar.read(size)))

    def name(self, i: int) -> str:
        return f"{self.names[i]} in {self.tars[self.places[i][0]]}"
