"""Masks of objects as COCO keeps them: polygons or run lengths, which pycocotools reads and writes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from incubate_lib.config import SettingsError

Mask = Any  # COCO's: a list of polygons, each [x, y, x, y, …], or {"size": [H, W], "counts": …}


def tools() -> Any:
    """Return pycocotools.mask; SettingsError where the package is missing."""
    try:
        from pycocotools import mask
    except ImportError:
        raise SettingsError("detection needs the package pycocotools: pip install pycocotools") from None
    return mask


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask [H, W] as compressed run lengths that JSON can hold."""
    coded = tools().encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(map(int, coded["size"])), "counts": coded["counts"].decode()}


def decode(mask: Mask, height: int, width: int) -> np.ndarray:
    """Return a mask as [height, width] uint8, drawn at that size; of run lengths resized if they have another."""
    if isinstance(mask, list):
        own = tools().frPyObjects(mask, height, width)
        return tools().decode(tools().merge(own))
    coded = tools().frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask
    found = tools().decode(coded)
    if found.shape == (height, width):
        return found
    return np.asarray(Image.fromarray(found).resize((width, height), Image.Resampling.NEAREST))


def scaled(mask: Mask, factor_x: float, factor_y: float) -> Mask:
    """Return polygons for an image of another size; run lengths as they are, which `decode` resizes."""
    if not isinstance(mask, list):
        return mask
    return [[value * (factor_y if i % 2 else factor_x) for i, value in enumerate(polygon)] for polygon in mask]


def bounds(mask: np.ndarray) -> list[float]:
    """Return the box of a mask as COCO has it: x, y, width, height."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] - columns[0] + 1), float(rows[-1] - rows[0] + 1)]


def what_is_wrong(mask: Any, height: int, width: int, is_crowd: bool) -> str:
    """Return what is wrong with the mask of an object in an image of that size; nothing where it fits."""
    if isinstance(mask, list):
        if is_crowd:
            return "is a list of polygons, but iscrowd is 1: a crowd has run lengths"
        sound = mask and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and _numbers(p) for p in mask)
        return "" if sound else "must be polygons of at least three corners, [x, y, x, y, …]"
    if not isinstance(mask, dict) or not {"size", "counts"} <= mask.keys():
        return "must be a list of polygons or run lengths with size and counts"
    if list(mask["size"]) != [height, width]:
        return f"is of {mask['size']} pixels, but the image of [{height}, {width}] (height, width)"
    counts = mask["counts"]
    if isinstance(counts, list):
        fits = all(type(n) is int and n >= 0 for n in counts) and sum(counts) == height * width
        return "" if fits else f"has run lengths that do not add up to the image's {height * width} pixels"
    try:
        tools().area({"size": mask["size"], "counts": counts})
    except Exception as error:  # of whatever is no string of run lengths
        return f"has run lengths that cannot be read ({error})"
    return ""


def _numbers(values: Sequence[Any]) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)
