"""Which objects an image shows, where, and which pixels are theirs, by Mask R-CNN on top of a network.

A batch is images [B, C, S, S] and a list of dicts with boxes, labels and masks; an evaluated one images and what each shows.
Average precision is pycocotools' own, of the objects as the annotations have them: no sum over images gives it, so what was
found in each is noted. The evaluated loss is what box AP lacks of 1: Mask R-CNN's own losses are of regions drawn to train.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from incubate_lib.tasks import Metric, Task


class Detection(Task):
    name = "detection"
    metrics = tuple(
        Metric(f"{of}_ap{at}", f"{of} AP{at}", "%", scale=100.0, digits=1) for of in ("box", "mask") for at in ("", "50")
    )
    num_sums = 2
    network = "A network that finds objects, their boxes and masks"
    tags = ("object-detection", "image-segmentation")
    is_on_top = True

    def outputs(self, data: Any) -> int:
        return data.num_classes

    def over(self, backbone: Any, shape: Any, outputs: int) -> Any:
        from incubate_lib.downstream.networks import Detector

        return Detector(backbone, shape, outputs)

    def check_output(self, output: Any, samples: int, outputs: int) -> None:
        """What stands on top is this project's own."""

    def ready(self, batch: Any, data: Any, recipe: Any, extra: Any) -> Any:
        import numpy as np
        import torch

        from incubate_lib.data.scenes.masks import decode

        images, size = data.finish(batch[0], recipe), batch[0].shape[-1]
        targets = []
        for seen in batch[1]:
            masks = np.array([decode(mask, size, size) for mask in seen["masks"]], np.uint8).reshape(-1, size, size)
            arrays = {"boxes": seen["boxes"], "labels": seen["labels"], "masks": masks}
            targets.append({name: torch.from_numpy(array).to(images.device) for name, array in arrays.items()})
        return images, targets

    def inputs(self, batch: Any) -> Any:
        images, targets = batch
        return (images, targets) if isinstance(targets[0], dict) else images

    def loss(self, output: Any, batch: Any, recipe: Any = None) -> Any:
        from torch.utils._pytree import tree_leaves

        return sum(tensor.float().sum() for tensor in tree_leaves(output))  # Mask R-CNN's losses, each of weight one

    def sums(self, output: Any, batch: Any) -> Any:
        import torch

        return torch.tensor([len(batch[1]), 0.0], dtype=torch.float64, device=batch[0].device)

    def noted(self, output: Any, batch: Any) -> list[str]:
        if not isinstance(output, list):
            return []
        size = batch[0].shape[-1]
        return [
            json.dumps({"truth": seen.truth, "found": _found(seen, one, size)})
            for seen, one in zip(batch[1], output, strict=True)
        ]

    def evaluated(self, sums: list[float], noted: Collection[str] = ()) -> dict[str, float]:
        from incubate_lib.downstream.precision import average_precision

        found = average_precision([json.loads(text) for text in sorted(noted)])
        return {"loss": 1 - found["box_ap"], "score": found.pop("box_ap")} | found

    def divided(self, sums: list[float]) -> Mapping[str, float]:
        raise NotImplementedError("no sum over images gives average precision")


def _found(seen: Any, output: Any, size: int) -> list[dict[str, Any]]:
    """Return what was found in an image, in COCO's form and its own pixels; boxes are cut where it ends."""
    import torch
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    from incubate_lib.data.scenes.masks import encode

    height, width = seen.truth["height"], seen.truth["width"]
    by = output["boxes"].new_tensor([width / seen.size[1], height / seen.size[0]] * 2)
    boxes = torch.minimum((output["boxes"].float() * by), by.new_tensor([width, height] * 2))
    keep = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
    boxes = boxes[keep]
    masks = paste_masks_in_image(output["masks"].float()[keep], boxes, (height, width)).cpu().numpy() > 0.5
    rows = zip(boxes.tolist(), output["labels"][keep].tolist(), output["scores"][keep].float().tolist(), masks, strict=True)
    return [
        {"label": label, "score": score, "bbox": [left, top, right - left, bottom - top], "segmentation": encode(mask[0])}
        for (left, top, right, bottom), label, score, mask in rows
    ]


TASK = Detection()
