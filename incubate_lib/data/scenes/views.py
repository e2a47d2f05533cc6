"""Images and what is seen in them, as networks take both: squares of one size to train on, whole images to evaluate on.

To train, an image is scaled by a random factor, cropped or padded, and mirrored, and all that is seen in it with it. To find
objects an image is evaluated as large as the square holds it. To tell the class of each pixel its shorter side fills the
square, which slides over the rest; what squares say where they overlap is averaged.
"""

import math
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter

from incubate_lib.config import SettingsError, TrainingSettings
from incubate_lib.data.scenes import masks
from incubate_lib.data.scenes.layouts import UNLABELLED
from incubate_lib.data.stream import StreamedSet, _Reader

EVALUATED = 2**20  # pixels evaluated at once, or one image
STRIDE = 2 / 3  # of a square: how far it slides
SMALLEST = 1.0  # pixels of a box's side that is learned
UNUSED = ("randaugment", "erase", "mixup", "cutmix")  # do not know what is seen in an image


@dataclass(frozen=True)
class Seen:
    """What an evaluated image shows, and where its squares lie."""

    truth: Any  # as the source has it
    size: tuple[int, int]  # height and width to which the image was resized
    places: tuple[tuple[int, int], ...]  # top and left of each square


@dataclass
class SceneSet(StreamedSet):
    """Batches are (images [B, C, S, S], what is seen): maps [B, S, S] int64, or a list of dicts with boxes [n, 4] float32
    (left, top, right, bottom), labels [n] int64 from 1 and run lengths of masks; of evaluated images a list of `Seen`."""

    def __post_init__(self) -> None:
        if self.shape[1] != self.shape[2]:
            raise SettingsError(f"the model takes images of {self.shape[1]} × {self.shape[2]} pixels; scenes are made squares")
        super().__post_init__()

    def some(self, index: Tensor) -> tuple[Tensor, Any]:
        reader = self._reader(None)
        items = [reader[i, 0] for i in index.tolist()]
        images, seen = self._sound(*_collated(items))
        first = np.cumsum([0, *(len(one.places) for one in seen[:-1])])  # the first square of each
        seen = [Seen(one.truth, one.size, one.places[:1]) for one in seen]
        return self.normalise(images[first].to(self.device)), seen

    @property
    def evaluated_at_once(self) -> int:
        return max(1, EVALUATED // self.shape[1] ** 2)

    def read_ahead(self, batch: int, batches: int, workers: int) -> int:
        return 2 * super().read_ahead(batch, batches, workers)  # maps, and more squares than images

    def _reader(self, recipe: TrainingSettings | None) -> "_SceneReader":
        if recipe is not None and (unused := [name for name in UNUSED if getattr(recipe, name)]):
            raise SettingsError(f"{', '.join(unused)}: not for data.source {self.settings.source!r}, where it would move or hide "
                                "what is seen in an image")  # fmt: skip
        mode = "L" if self.shape[0] == 1 else "RGB"
        how = partial(view, size=self.shape[1], recipe=recipe)
        skip = self.settings.skip_broken and recipe is not None
        return _SceneReader(self.source.opener, self.source.seen, self.index, how, mode, skip)

    def _collate(self) -> Any:
        return _collated


@dataclass(frozen=True)
class _SceneReader(_Reader):
    """As for other images, but `labels` are what is seen, by the number of the image."""

    def open(self, i: int) -> tuple[Any, tuple[str, str] | None]:
        image, error = super().open(i)
        if image is None:
            return None, error
        try:
            return (image, fitting(self.labels(int(self.index[i])), image)), None
        except Exception as error:  # of maps as of images
            return None, (self.opener.name(int(self.index[i])), f"{type(error).__name__}: {error}")

    def made(self, at: int, image: Any) -> tuple[Tensor, Any]:
        return self.transform(*image)


def fitting(seen: Any, image: Image.Image) -> Any:
    """Return what is seen in an image; ValueError where it is of another size than the image."""
    size = seen.shape if isinstance(seen, np.ndarray) else (seen["height"], seen["width"])
    if tuple(size) != image.size[::-1]:
        what = "its map is" if isinstance(seen, np.ndarray) else "its annotations say it is"
        raise ValueError(f"{what} of {size[1]} × {size[0]} pixels, but the image of {image.width} × {image.height}")
    return seen


def _collated(items: list[Any]) -> tuple[Tensor | None, Any, list[tuple[str, str]], list[str]]:
    """Return images or squares in one tensor, what is seen, and what was wrong."""
    images, seen, broken, faults = zip(*items, strict=True)
    whole = all(image is not None for image in images)
    broken = [error for errors in broken for error in errors]
    of_pixels = whole and isinstance(seen[0], Tensor)
    joined = None if not whole else torch.cat([image if image.ndim == 4 else image[None] for image in images])
    return joined, torch.stack(seen) if of_pixels else list(seen), broken, [fault for fault in faults if fault]


# -- one image ----------------------------------------------------------------------------------------------------------------


def view(image: Image.Image, seen: Any, size: int, recipe: TrainingSettings | None) -> tuple[Tensor, Any]:
    """Return an image as the network takes it, uint8, and what is seen in it; of a recipe drawn anew each time."""
    is_map = isinstance(seen, np.ndarray)
    side = (min if is_map else max)(image.size)
    factor = size / side
    if recipe is None:
        squares, resized, places = _squares(_resized(image, factor), size, slides=is_map)
        return squares, Seen(seen, resized, places)
    if recipe.scale:
        factor *= random.uniform(*recipe.scale)
    if recipe.color_jitter:
        image = ColorJitter(*(3 * (recipe.color_jitter,)))(image)
    image = _resized(image, factor)
    top, left = (random.randint(min(0, length - size), max(0, length - size)) for length in (image.height, image.width))
    top, left = (top, left) if is_map else (max(0, top), max(0, left))  # objects: padded below and to the right
    flips = recipe.hflip and random.random() < 0.5
    pixels = _cut(np.asarray(image), top, left, size, 0)
    pixels = torch.from_numpy(np.ascontiguousarray(pixels[:, ::-1] if flips else pixels))
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
    if is_map:
        resized = np.asarray(Image.fromarray(seen).resize(image.size, Image.Resampling.NEAREST))
        found = _cut(resized, top, left, size, UNLABELLED)
        return pixels, torch.from_numpy(np.ascontiguousarray(found[:, ::-1] if flips else found)).long()
    return pixels, _objects(seen, image.size, top, left, size, flips)


def _resized(image: Image.Image, factor: float) -> Image.Image:
    size = tuple(max(1, round(length * factor)) for length in image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


def _cut(pixels: np.ndarray, top: int, left: int, size: int, fill: int) -> np.ndarray:
    """Return a square [size, size, …] of an image [H, W, …]; what lies outside is filled."""
    height, width = pixels.shape[:2]
    square = np.full((size, size, *pixels.shape[2:]), fill, pixels.dtype)
    y, x = max(0, top), max(0, left)
    part = pixels[y : min(height, top + size), x : min(width, left + size)]
    square[y - top : y - top + part.shape[0], x - left : x - left + part.shape[1]] = part
    return square


def _squares(image: Image.Image, size: int, slides: bool) -> tuple[Tensor, tuple[int, int], tuple[tuple[int, int], ...]]:
    """Return the squares [n, C, S, S] of an image, its size, and their places."""
    pixels = np.asarray(image)
    tops, lefts = (_starts(length, size) if slides else [0] for length in pixels.shape[:2])
    places = tuple((top, left) for top in tops for left in lefts)
    squares = torch.from_numpy(np.stack([_cut(pixels, *place, size, 0) for place in places]))
    squares = squares[:, None] if squares.ndim == 3 else squares.permute(0, 3, 1, 2).contiguous()
    return squares, pixels.shape[:2], places


def _starts(length: int, size: int) -> list[int]:
    """Return where squares begin that slide over a side, the last one at its end."""
    steps = math.ceil(max(0, length - size) / max(1, int(STRIDE * size)))
    return [min(step * int(STRIDE * size), length - size) for step in range(steps + 1)] if steps else [0]


def _objects(seen: Any, resized: tuple[int, int], top: int, left: int, size: int, flips: bool) -> dict[str, Any]:
    """Return what is learned of an image's objects in a square: those of which something is seen there, and no crowds."""
    width, height = resized
    by = width / seen["width"], height / seen["height"]
    boxes, labels, found = [], [], []
    for one in seen["objects"]:
        x, y, w, h = one["bbox"]
        whole = np.array([x * by[0] - left, y * by[1] - top, (x + w) * by[0] - left, (y + h) * by[1] - top])
        box = whole.clip(0, size)
        if one.get("iscrowd") or min(box[2] - box[0], box[3] - box[1]) < SMALLEST:
            continue
        mask = _cut(masks.decode(masks.scaled(one["segmentation"], *by), height, width), top, left, size, 0)
        if not mask.any():
            continue
        if (box != whole).any():  # cut off: as large as what is left
            x, y, w, h = masks.bounds(mask)
            box = np.array([x, y, x + w, y + h])
        if flips:
            mask, box = mask[:, ::-1], np.array([size - box[2], box[1], size - box[0], box[3]])
        boxes.append(box)
        labels.append(one["label"])
        found.append(masks.encode(mask))
    return {"boxes": np.array(boxes, np.float32).reshape(-1, 4), "labels": np.array(labels, np.int64), "masks": found}
