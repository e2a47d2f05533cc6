"""Which class an image belongs to. A batch is images [B, C, H, W] and labels [B], or [B, classes] where images are mixed."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from incubate_lib.tasks import Metric, Task


class Classification(Task):
    name = "classification"
    metrics = (Metric("accuracy", "top-1", "%", scale=100.0, digits=1),)

    def outputs(self, data: Any) -> int:
        return data.num_classes

    def start(self, data: Any, settings: Any) -> Mixup | None:
        if not (settings.mixup or settings.cutmix):
            return None
        return Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.label_smoothing, num_classes=data.num_classes)

    def ready(self, batch: Any, data: Any, settings: Any, extra: Mixup | None) -> Any:
        x, y = batch
        x = data.finish(x, settings)
        return (x, y) if extra is None else extra(x, y)

    def loss(self, output: Tensor, batch: Any, settings: Any) -> Tensor:
        smoothing = 0.0 if settings.mixup or settings.cutmix else settings.label_smoothing  # Mixup smooths its own targets
        return F.cross_entropy(output.float(), batch[1], label_smoothing=smoothing)

    def sums(self, output: Tensor, batch: Any) -> Tensor:
        y, logits = batch[1], output.float()
        loss = F.cross_entropy(logits, y, reduction="sum").double()
        return torch.stack([torch.ones_like(loss) * len(y), loss, (logits.argmax(1) == y).sum().double()])

    def divided(self, sums: list[float]) -> Mapping[str, float]:
        number, loss, correct = sums
        return {"loss": loss / number, "accuracy": correct / number}


TASK = Classification()
