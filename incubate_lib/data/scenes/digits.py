"""Scenes made of real images: scikit-learn's handwritten digits, of many sizes, over each other, among pieces of other digits.

They are a small task, real and for minutes on a laptop, and no benchmark. Everything follows from a seed.
Whoever has other scenes follow from it raises `SCENES_FORMAT` in config/phase.py: else phases trained on the former ones count.
What is seen in them is in the form of COCO's and of ADE20K's files, and `write` makes a folder that has these.
"""

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from incubate_lib.data.scenes.masks import bounds, encode

NOISE, INK = 0.1, 0.12  # of full white: the background is up to the one, and what is darker than the other
SHOWN = 0, 1, 7, 4, 6, 3, 2, 5, 9, 8  # of so many classes the first: those that differ most
MOST_OBJECTS, PIECES = 3, 3
SIZES = 0.4, 0.6  # a digit's side, as shares of the scene's
STAYS = 0.75  # of a digit is to be seen, or the one that would cover it is left out


@dataclass(frozen=True)
class Pictures:
    """Images [N, H, W] uint8 in memory, opened one by one."""

    pixels: np.ndarray
    what: str

    def __call__(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i])

    def name(self, i: int) -> str:
        return f"{self.what} {i}"


@cache
def scenes(number: int, size: int, classes: int, seed: int, split: str) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """Return images [N, S, S] uint8, COCO's annotations, and ADE20K's maps [N, S, S] uint8.

    In maps 0 is no class: pieces of digits. 1 is the background, and 2 the digit 0. Those of the split "train" are in no scene
    of another split.
    """
    pixels, labels = _digits()
    own = np.arange(len(labels)) % 3 < 2 if split == "train" else np.arange(len(labels)) % 3 == 2
    labels = np.argsort(SHOWN)[labels]
    own = np.flatnonzero(own & (labels < classes))
    rng = np.random.default_rng([seed, split == "train"])
    made = [_scene(rng, pixels[own], labels[own], size) for _ in range(number)]
    annotations = []
    for image, (_, _, objects) in enumerate(made):
        for label, mask in objects:
            annotations.append({
                "id": len(annotations) + 1, "image_id": image + 1, "category_id": label + 1, "iscrowd": 0,
                "segmentation": encode(mask), "bbox": bounds(mask), "area": float(mask.sum()),
            })  # fmt: skip
    maps = np.stack([np.where(pieces, 0, 1).astype(np.uint8) for _, pieces, _ in made])
    for image, (_, _, objects) in enumerate(made):
        for label, mask in objects:
            maps[image][mask] = label + 2
    coco = {
        "images": [{"id": i + 1, "width": size, "height": size, "file_name": f"{i + 1:06}.png"} for i in range(number)],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": str(SHOWN[i])} for i in range(classes)],
    }
    return np.stack([image for image, _, _ in made]), coco, maps


def _scene(
    rng: np.random.Generator, pixels: np.ndarray, labels: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Return an image, where pieces are, and its objects, each a class and the mask of what is seen of it."""
    canvas = rng.uniform(0, NOISE, (size, size))
    for _ in range(rng.integers(PIECES + 1)):  # a quarter of a digit is none
        part = np.zeros((8, 8))
        part[:4, :4] = pixels[rng.integers(len(pixels))][:4, :4]
        shape, (y, x) = _placed(rng, part, size)
        area = canvas[y : y + len(shape), x : x + len(shape)]
        np.maximum(area, 0.7 * shape, out=area)
    pieces = canvas > INK
    objects: list[tuple[int, np.ndarray, float]] = []  # class, mask, pixels before something covered it
    for _ in range(rng.integers(1, MOST_OBJECTS + 1)):
        which = rng.integers(len(pixels))
        shape, (y, x) = _placed(rng, pixels[which], size)
        mask = np.zeros((size, size), bool)
        mask[y : y + len(shape), x : x + len(shape)] = shape > INK
        if not mask.any() or any((before & ~mask).sum() < STAYS * whole for _, before, whole in objects):
            continue
        objects = [(label, before & ~mask, whole) for label, before, whole in objects]
        objects.append((int(labels[which]), mask, mask.sum()))
        area, seen = canvas[y : y + len(shape), x : x + len(shape)], shape > INK
        area[seen] = shape[seen]
    return (255 * canvas).round().astype(np.uint8), pieces, [(label, mask) for label, mask, _ in objects]


def _placed(rng: np.random.Generator, shape: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a digit [8, 8] enlarged, in 0 … 1, and where it is put."""
    side = int(rng.integers(*(round(share * size) for share in SIZES)))
    large = Image.fromarray((16 * shape).clip(0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(large) / 255, rng.integers(0, size - side + 1, 2)


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the digits [N, 8, 8] in 0 … 16, and their labels [N]."""
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    table = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def write(folder: Path, number: int, size: int, classes: int, seed: int, names: dict[str, str]) -> None:
    """Write scenes into a folder in both layouts; `names` are those of splits by what is shown in them (train, val)."""
    for split, name in names.items():
        images, coco, maps = scenes(number, size, classes, seed, split)
        for part in (name, f"images/{name}", f"annotations/{name}"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(coco))
        for entry, image, seen in zip(coco["images"], images, maps, strict=True):
            Image.fromarray(image).save(folder / name / entry["file_name"])
            Image.fromarray(image).save(folder / "images" / name / entry["file_name"])
            Image.fromarray(seen).save(folder / "annotations" / name / entry["file_name"])
