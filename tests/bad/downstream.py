"""Bad scenes: annotation files that are not COCO's, maps that do not fit, networks and settings that nothing can stand on."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

from bad.case import Bad, both, file, nothing, png

MINE = """
task: {task}
data: {{source: {source}{more}}}
model: {{{model}}}
training: {{epochs: 1, batch_size: 1, warmup_epochs: 0{training}}}
strategies: {{mine: {{kind: {kind}}}}}
run: [mine]
machine: {{workers: 0}}
"""
VIT = "img_size: 32, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2"
GOOD = {
    "images": [{"id": 5, "width": 32, "height": 32, "file_name": "a.png"}],
    "annotations": [{"id": 9, "image_id": 5, "category_id": 3, "bbox": [2, 2, 8, 8], "area": 64.0, "iscrowd": 0,
                     "segmentation": [[2, 2, 10, 2, 10, 10, 2, 10]]}],
    "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}],
}  # fmt: skip


def settings(
    task: str, source: str, more: str = "", model: str = VIT, training: str = "", kind: str = "end_to_end"
) -> Callable[[Path], object]:
    return file("mine.yaml", MINE.format(task=task, source=source, more=more, model=model, training=training, kind=kind))


def coco(
    change: Callable[[dict], object] = lambda read: None, text: str | None = None, size: int = 32
) -> Callable[[Path], object]:
    """Return what makes a folder in COCO's layout with something changed, and settings for it."""
    read = copy.deepcopy(GOOD)
    change(read)
    parts = [settings("detection", "coco", ", folder: mine")]
    for split in ("train", "val"):
        parts.append(file(f"mine/{split}/a.png", png((size, size))))
        parts.append(file(f"mine/annotations/instances_{split}.json", json.dumps(read) if text is None else text))
    return both(*parts)


def of_annotation(**values: object) -> Callable[[dict], object]:
    return lambda read: read["annotations"][0].update(values)


def ade20k(shade: int = 1, size: int = 32, mode: str = "L", name: str = "a.png", classes: int = 3) -> Callable[[Path], object]:
    """Return what makes a folder in ADE20K's layout, each map of one class, and settings for it."""
    parts = [settings("segmentation", "ade20k", f", folder: mine, num_classes: {classes}")]
    for split in ("train", "val"):
        parts.append(file(f"mine/images/{split}/a.png", png((32, 32))))
        parts.append(file(f"mine/annotations/{split}/{name}", png((size, size), mode, shade)))
    return both(*parts)


def catalogue() -> list[Bad]:
    def bad(name: str, make: Callable[[Path], object] = nothing, says: str = "", preset: str = "mine.yaml") -> Bad:
        return Bad("downstream", name, ("run", preset), make, says)

    def without(part: str) -> Callable[[dict], object]:
        return lambda read: read.pop(part)

    rle = {"size": [32, 32], "counts": [1000, 24]}
    return [
        bad("annotations that are no JSON", coco(text="{"), "is no JSON"),
        bad("annotations that are a list", coco(text="[]"), "is no annotation file of COCO's"),
        bad("annotations of another kind", coco(without("categories")), "is no annotation file of COCO's"),
        bad("no annotations", coco(lambda read: read.update(annotations=[])), "annotations is empty"),
        bad("an image without an id", coco(lambda read: read["images"][0].pop("id")), "whole number as its id"),
        bad("an image twice", coco(lambda read: read["images"].append(read["images"][0])), "id twice"),
        bad("an image without a size", coco(lambda read: read["images"][0].pop("width")), "height and width"),
        bad("a file name that leads out", coco(lambda read: read["images"][0].update(file_name="../a.png")), "file_name"),
        bad("an image that is not there", coco(lambda read: read["images"][0].update(file_name="b.png")), "b.png"),
        bad("an image of another size", coco(size=16), "16 × 16"),
        bad("an object of no image", coco(of_annotation(image_id=6)), "image_id 6"),
        bad("an object of no category", coco(of_annotation(category_id=5)), "category_id 5"),
        bad("a box outside its image", coco(of_annotation(bbox=[30, 30, 8, 8])), "outside its image"),
        bad("a box of three numbers", coco(of_annotation(bbox=[1, 1, 3])), "bbox"),
        bad("a box of negative width", coco(of_annotation(bbox=[8, 8, -3, 3])), "bbox"),
        bad("an area that is a word", coco(of_annotation(area="large")), "area"),
        bad("crowds only", coco(of_annotation(iscrowd=1, segmentation=rle)), "all annotations are crowds"),
        bad("a crowd with polygons", coco(of_annotation(iscrowd=1)), "a crowd has run lengths"),
        bad("a crowd that is a word", coco(of_annotation(iscrowd="yes")), "iscrowd"),
        bad("a polygon of two corners", coco(of_annotation(segmentation=[[1, 1, 2, 2]])), "three corners"),
        bad("no mask", coco(of_annotation(segmentation=None)), "run lengths"),
        bad("a mask of another size", coco(of_annotation(segmentation=rle | {"size": [16, 64]})), "[16, 64]"),
        bad("run lengths that end early", coco(of_annotation(segmentation=rle | {"counts": [5]})), "do not add up"),
        bad("a category without a name", coco(lambda read: read["categories"][0].pop("name")), "has no name"),
        bad("no annotation file", both(coco(), lambda here: (here / "mine/annotations/instances_val.json").unlink()),
            "instances_val.json"),
        bad("a map with a class too many", ade20k(shade=4), "data.num_classes is 3"),
        bad("a map of another size", ade20k(size=16), "16 × 16"),
        bad("a map in colour", ade20k(mode="RGB"), "no map of classes"),
        bad("an image without a map", ade20k(name="b.png"), "lacks the map"),
        bad("maps of a folder that is not there", settings("segmentation", "ade20k", ", folder: nowhere"), "nowhere"),
        bad("a network whose features have no grid",
            settings("segmentation", "digit_maps", ", image_size: 32", "name: crossvit_9_240, img_size: 32, in_chans: 1"),
            "no maps of features"),
        bad("a network whose features are a single place",
            settings("segmentation", "digit_maps", ", image_size: 32", "name: resnet18, img_size: 32, in_chans: 1"), "no grid"),
        bad("strides that are no powers of two", settings("detection", "digit_boxes", ", image_size: 48",
            "img_size: 48, patch_size: 6, embed_dim: 16, depth: 2, num_heads: 2, in_chans: 1"), "powers of two"),
        bad("eleven digits", settings("segmentation", "digit_maps", ", image_size: 32, num_classes: 11"), "ten digits"),
        bad("scenes too small", settings("segmentation", "digit_maps", ", image_size: 16"), "32 pixels"),
        bad("segmentation of what shows one thing", settings("segmentation", "digits", model=f"{VIT}, in_chans: 1"),
            "show one thing"),
        bad("one class for a scene", settings("classification", "digit_boxes", ", image_size: 32", f"{VIT}, in_chans: 1"),
            "show several things"),
        bad("mixup of scenes", settings("detection", "digit_boxes", ", image_size: 32", f"{VIT}, in_chans: 1", ", mixup: 0.8"),
            "mixup"),
        bad("scales in the wrong order", settings("detection", "digit_boxes", training=", scale: [2, 1]"), "scale"),
        bad("a network in pieces", both(settings("segmentation", "digit_maps", ", image_size: 32", f"{VIT}, in_chans: 1"),
            lambda here: (here / "mine.yaml").open("a").write("partition: {num_modules: 2}\n")), "leave out partition"),
        bad("weights that are not there", settings("detection", "digit_boxes", ", image_size: 32", f"{VIT}, in_chans: 1",
            kind='finetune, weights: "runs/none/seed-{seed}/end_to_end"'), "seed-0"),
    ]  # fmt: skip
