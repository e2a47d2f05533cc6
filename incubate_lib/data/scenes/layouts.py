"""Folders in COCO's and ADE20K's layout, and generated scenes: images, and what is seen in each.

    coco     <split>/*.jpg                  annotations/instances_<split>.json
    ade20k   images/<split>/*.jpg           annotations/<split>/*.png, in which 0 is no class

Annotations of COCO are checked whole when they are read, maps where they are opened.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from incubate_lib.config import DataSettings, SettingsError, refuse
from incubate_lib.data.decode import Files, Names, Opener
from incubate_lib.data.folders import Source, folder_of, is_left_behind
from incubate_lib.data.scenes import digits, masks

UNLABELLED = 255  # in maps, once read
SUFFIXES = (".jpg", ".jpeg", ".png")
ROOM = 1.0  # pixels that a box may reach out of its image: annotations are rounded


@dataclass(frozen=True)
class Scenes(Source):
    """Images with what is seen in them."""

    seen: Callable[[int], Any] | None = None  # of image i: its objects, or a map [H, W] uint8 with UNLABELLED


@dataclass(frozen=True)
class Maps:
    """The classes of pixels, from images whose 0 is no class."""

    opener: Opener
    num_classes: int

    def __call__(self, i: int) -> np.ndarray:
        image = self.opener(i)
        found, name = np.asarray(image), self.opener.name(i)
        if found.ndim != 2:
            raise ValueError(f"{name} is no map of classes, but has the mode {image.mode}")
        if found.max(initial=0) > self.num_classes:
            raise ValueError(f"{name} has class {found.max()}, but data.num_classes is {self.num_classes}")
        return found - np.uint8(1)  # 0 becomes UNLABELLED


@dataclass(frozen=True)
class Objects:
    """The objects of each image, as JSON, which worker processes share."""

    texts: Names

    def __call__(self, i: int) -> dict[str, Any]:
        """Return the image's entry and its annotations, each with a `label` from 1."""
        return json.loads(self.texts[i])


# -- generated ------------------------------------------------------------------------------------------------------------


def generated(settings: DataSettings, split: str, download: bool) -> Scenes:
    """Return scenes of digits: those to train on, and a third as many, or `test_images`, of other digits to test on."""
    is_train = split == settings.train_split
    number = settings.num_images if is_train else settings.test_images or max(1, settings.num_images // 3)
    how = number, settings.image_size, settings.num_classes, settings.split_seed
    refuse(settings.num_classes > 10, f"data.num_classes is {settings.num_classes}, but there are ten digits")
    refuse(settings.image_size < 32, f"data.image_size is {settings.image_size}; scenes of digits have 32 pixels at least")
    images, coco, maps = digits.scenes(*how, "train" if is_train else "val")
    opener = digits.Pictures(images, f"scene of {settings.source}, {split}")
    names = [category["name"] for category in coco["categories"]]
    if settings.source == "digit_maps":
        names = ["background", *names]
        seen = Maps(digits.Pictures(maps, f"map of {settings.source}, {split}"), len(names))
        return Scenes(np.zeros(number, np.int64), names, opener=opener, seen=seen)
    return _of_coco(checked(coco, "scenes"), opener)


# -- ADE20K -----------------------------------------------------------------------------------------------------------------


def ade20k(settings: DataSettings, split: str, download: bool) -> Scenes:
    folder = folder_of(settings)
    images, maps = (_files(folder / part / split) for part in ("images", "annotations"))
    names = {path.stem: path for path in maps}
    refuse(lone := [path.name for path in images if path.stem not in names], f"{folder / 'annotations' / split} lacks the map "
           f"of {lone[0] if lone else ''} ({len(lone)} of {len(images)} images have none)")  # fmt: skip
    maps = [names[path.stem] for path in images]
    opener, seen = Files(Names(map(str, images))), Maps(Files(Names(map(str, maps))), settings.num_classes)
    classes = [str(i + 1) for i in range(settings.num_classes)]
    return Scenes(np.zeros(len(images), np.int64), classes, opener=opener, seen=seen)


def _files(place: Path) -> list[Path]:
    """Return the pictures of a folder by name; SettingsError where there are none."""
    refuse(not place.is_dir(), f"data.folder: there is no {place} (data.train_split, data.test_split)")
    found = sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES and not is_left_behind(p.name))
    refuse(not found, f"{place} holds no pictures ({', '.join(SUFFIXES)})")
    return found


# -- COCO -------------------------------------------------------------------------------------------------------------------


def coco(settings: DataSettings, split: str, download: bool) -> Scenes:
    folder = folder_of(settings)
    place, file = folder / split, folder / "annotations" / f"instances_{split}.json"
    refuse(not place.is_dir(), f"data.folder: there is no {place} (data.train_split, data.test_split)")
    refuse(not file.is_file(), f"data.folder: there is no {file}, which says what is seen in {place}")
    try:
        read = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{file} is no JSON: {error}") from None
    found = checked(read, str(file))
    if split == settings.train_split:  # images that show no object are left out, as usual
        shows = {one["image_id"] for one in found["annotations"] if not one.get("iscrowd")}
        found["images"] = [image for image in found["images"] if image["id"] in shows]
    paths = [place / image["file_name"] for image in found["images"]]
    lost = [path for path in paths if not path.is_file()]
    refuse(lost, f"{file} names {lost[0].name if lost else ''}, which is not in {place} ({len(lost)} of {len(paths)} are not)")
    return _of_coco(found, Files(Names(map(str, paths))))


def _of_coco(found: dict[str, Any], opener: Opener) -> Scenes:
    categories = sorted(found["categories"], key=lambda category: category["id"])
    label = {category["id"]: i + 1 for i, category in enumerate(categories)}
    objects: dict[int, list[Any]] = {image["id"]: [] for image in found["images"]}
    for one in found["annotations"]:
        if one["image_id"] in objects:
            objects[one["image_id"]].append(one | {"label": label[one["category_id"]]})
    texts = Names(json.dumps(image | {"objects": objects[image["id"]]}) for image in found["images"])
    names = [category["name"] for category in categories]
    return Scenes(np.zeros(len(objects), np.int64), names, opener=opener, seen=Objects(texts))


def checked(coco: Any, what: str) -> dict[str, Any]:
    """Return COCO's annotations; SettingsError with the first that is not as it must be, by its id."""
    parts = ("images", "annotations", "categories")
    sound = isinstance(coco, dict) and all(isinstance(coco.get(part), list) for part in parts)
    refuse(not sound, f"{what} is no annotation file of COCO's: it must be an object with the lists {', '.join(parts)}")
    ids = {}
    for part in parts:
        strange = next((one for one in coco[part] if not isinstance(one, dict) or type(one.get("id")) is not int), None)
        refuse(strange is not None, f"{what}: {part} has an entry without a whole number as its id: {str(strange)[:60]}")
        ids[part] = {one["id"]: one for one in coco[part]}
        refuse(len(ids[part]) < len(coco[part]), f"{what}: {part} has an id twice")
        refuse(not ids[part], f"{what}: {part} is empty")
    for number, image in ids["images"].items():
        size = [image.get("height"), image.get("width")]
        refuse(not all(type(n) is int and n > 0 for n in size), f"{what}: image {number} has height and width {size}")
        name = image.get("file_name")
        inside = isinstance(name, str) and name and not Path(name).is_absolute() and ".." not in Path(name).parts
        refuse(not inside, f"{what}: image {number} has the file_name {name!r}")
    for number, category in ids["categories"].items():
        refuse(not isinstance(category.get("name"), str), f"{what}: category {number} has no name")
    for number, one in ids["annotations"].items():
        for field, known in (("image_id", "images"), ("category_id", "categories")):
            refuse(one.get(field) not in ids[known], f"{what}: annotation {number} has {field} {one.get(field)!r}, which is none "
                   f"of its {known}")  # fmt: skip
        image = ids["images"][one["image_id"]]
        wrong = _box_wrong(one.get("bbox"), image) or _rest_wrong(one, image)
        refuse(wrong, f"{what}: annotation {number} {wrong}")
    learned = any(not one.get("iscrowd") for one in coco["annotations"])
    refuse(not learned, f"{what}: all annotations are crowds (iscrowd 1), so there is no object to learn")
    return coco


def _box_wrong(box: Any, image: dict[str, Any]) -> str:
    numbers = isinstance(box, list) and len(box) == 4 and all(type(n) in (int, float) and math.isfinite(n) for n in box)
    if not numbers or min(box[2:]) < 0:
        return f"has the bbox {box!r}; it must be [x, y, width, height] in pixels"
    x, y, width, height = box
    if min(x, y) < -ROOM or x + width > image["width"] + ROOM or y + height > image["height"] + ROOM:
        return f"has the bbox {box}, which is outside its image of {image['width']} × {image['height']} pixels"
    return ""


def _rest_wrong(one: dict[str, Any], image: dict[str, Any]) -> str:
    if one.get("iscrowd", 0) not in (0, 1):
        return f"has iscrowd {one['iscrowd']!r}; it must be 0 or 1"
    area = one.get("area")
    if type(area) not in (int, float) or not 0 <= area < math.inf:
        return f"has the area {area!r}; it must be a number of pixels"
    wrong = masks.what_is_wrong(one.get("segmentation"), image["height"], image["width"], one.get("iscrowd") == 1)
    return wrong and f"has a segmentation that {wrong}"
