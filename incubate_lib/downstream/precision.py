"""Average precision of boxes and masks, by pycocotools, as COCO reports it."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from incubate_lib.data.scenes.masks import tools

FAILED = {f"{of}_ap{at}": 0.0 for of in ("box", "mask") for at in ("", "50")}


def average_precision(images: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return box_ap, box_ap50, mask_ap and mask_ap50, in 0 … 1, of what each image shows and what was found in it.

    `truth` is an image's entry of COCO with its `objects`, `found` a list of label, score, bbox and segmentation. The mean is
    over IoU 0.5 to 0.95, and over the classes that there are; where nothing was found it is 0.
    """
    tools()  # says what is missing
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects = [one for image in images for one in image["truth"]["objects"]]
    found = [one | {"image_id": image["truth"]["id"]} for image in images for one in image["found"]]
    found = [one | {"category_id": one.pop("label")} for one in found]
    if not found or not objects:
        return dict(FAILED)
    truth = COCO()
    truth.dataset = {
        "images": [{key: value for key, value in image["truth"].items() if key != "objects"} for image in images],
        # numbered afresh: to COCOeval an object with the number 0 is none
        "annotations": [
            one | {"id": i, "category_id": one["label"], "iscrowd": one.get("iscrowd", 0)} for i, one in enumerate(objects, 1)
        ],
        "categories": [{"id": label, "name": str(label)} for label in sorted({one["label"] for one in objects})],
    }
    precision = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        results = truth.loadRes(found)
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            evaluation = COCOeval(truth, results, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            precision |= {f"{name}_ap": float(evaluation.stats[0]), f"{name}_ap50": float(evaluation.stats[1])}
    return precision
