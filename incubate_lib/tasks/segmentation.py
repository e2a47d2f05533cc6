"""Which class each pixel of an image belongs to, by UPerNet on top of a network.

A batch is images [B, C, S, S] and maps [B, S, S] in which 255 is no class; an evaluated one the squares of its images
[N, C, S, S], which may be several for each, and what each image shows and where its squares lie (`data/scenes/views.py`).
"""

from collections.abc import Mapping
from typing import Any

from incubate_lib.tasks import Metric, Task

UNLABELLED = 255
MOST = 255  # classes: maps have 8 bits
COUNTS = 3  # a class: pixels of it, pixels said to be of it, and both


class Segmentation(Task):
    name = "segmentation"
    metrics = (
        Metric("mean_iou", "mIoU", "%", scale=100.0, digits=1),
        Metric("pixel_accuracy", "pixels right", "%", scale=100.0, digits=1),
    )
    num_sums = 2 + COUNTS * MOST
    network = "A network that tells the class of each pixel of an image"
    tags = ("image-segmentation",)
    is_on_top = True

    def outputs(self, data: Any) -> int:
        if not 2 <= data.num_classes <= MOST:
            raise ValueError(f"there are {data.num_classes} classes of pixels; it takes 2 to {MOST}")
        return data.num_classes

    def over(self, backbone: Any, shape: Any, outputs: int) -> Any:
        from incubate_lib.downstream.networks import UPerNet

        return UPerNet(backbone, shape, outputs)

    def check_output(self, output: Any, samples: int, outputs: int) -> None:
        found = tuple(getattr(output, "shape", ()))
        if len(found) != 4 or found[:2] != (samples, outputs):
            raise ValueError(f"gives {found} for {samples} images, where the task needs ({samples}, {outputs}, height, width)")

    def ready(self, batch: Any, data: Any, recipe: Any, extra: Any) -> Any:
        return data.finish(batch[0], recipe), batch[1]

    def loss(self, output: Any, batch: Any, recipe: Any = None) -> Any:
        import torch
        from torch.nn.functional import cross_entropy

        maps = batch[1]
        if not torch.is_tensor(maps):
            maps = torch.stack([_filled(seen, output.shape[-1], output.device) for seen in maps])
        smoothing = recipe.label_smoothing if recipe else 0.0
        summed = cross_entropy(output.float(), maps, ignore_index=UNLABELLED, label_smoothing=smoothing, reduction="sum")
        return summed / (maps != UNLABELLED).sum().clamp(min=1)  # not NaN where no pixel has a class

    def sums(self, output: Any, batch: Any) -> Any:
        import torch
        from torch.nn.functional import cross_entropy

        classes, squares = output.shape[1], iter(output.float())
        sums = torch.zeros(self.num_sums, dtype=torch.float64, device=output.device)
        for seen in batch[1]:
            scores = _whole(seen, [next(squares) for _ in seen.places])[None]
            truth = torch.from_numpy(seen.truth).to(output.device).long()
            loss = cross_entropy(scores, truth[None], ignore_index=UNLABELLED, reduction="sum")
            known = truth != UNLABELLED
            found, truth = scores[0].argmax(0)[known], truth[known]
            parts = truth, found, truth[truth == found]
            counts = torch.stack([torch.bincount(part, minlength=classes) for part in parts], 1)
            sums[0] += 1
            sums[1] += loss.double() / known.sum().clamp(min=1)
            sums[2 : 2 + COUNTS * classes] += counts.flatten().double()
        return sums

    def divided(self, sums: list[float]) -> Mapping[str, float]:
        """Classes that neither the maps nor the network has are no part of the mean, as is usual."""
        number, loss, *counts = sums
        classes = [counts[i : i + COUNTS] for i in range(0, len(counts), COUNTS)]
        ious = [both / (truth + found - both) for truth, found, both in classes if truth + found]
        pixels = sum(truth for truth, _, _ in classes)
        right = sum(both for _, _, both in classes) / pixels if pixels else 0.0
        return {"loss": loss / number, "mean_iou": sum(ious) / len(ious) if ious else 0.0, "pixel_accuracy": right}


def _whole(seen: Any, squares: list[Any]) -> Any:
    """Return the class scores [K, H, W] of an image, at the size of its map, from those of its squares [K, S, S]."""
    import torch
    from torch.nn.functional import interpolate

    height, width = seen.size
    size = squares[0].shape[-1]
    scores = squares[0].new_zeros(len(squares[0]), max(height, size), max(width, size))
    times = torch.zeros_like(scores[:1])
    for (top, left), square in zip(seen.places, squares, strict=True):
        scores[:, top : top + size, left : left + size] += square
        times[:, top : top + size, left : left + size] += 1
    scores = (scores / times.clamp(min=1))[:, :height, :width]
    if seen.truth.shape == seen.size:
        return scores
    return interpolate(scores[None], size=seen.truth.shape, mode="bilinear", align_corners=False)[0]


def _filled(seen: Any, size: int, device: Any) -> Any:
    """Return an evaluated image's map brought to a square, for a loss: no more than a check needs."""
    import torch
    from torch.nn.functional import interpolate

    truth = torch.from_numpy(seen.truth)[None, None].float()
    return interpolate(truth, size=(size, size), mode="nearest")[0, 0].long().to(device)


TASK = Segmentation()
