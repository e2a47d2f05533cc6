"""Which class an image belongs to. A batch is images [B, C, H, W] and labels [B], or [B, classes] where images are mixed."""

from collections.abc import Mapping, Sequence
from typing import Any

from incubate_lib.tasks import Metric, Task


class Classification(Task):
    name = "classification"
    metrics = (Metric("accuracy", "top-1", "%", scale=100.0, digits=1, is_share=True),)
    num_sums = 3
    has_classes = True
    network = "An image classifier"
    tags = ("image-classification",)

    def outputs(self, data: Any) -> int:
        if getattr(data, "is_text", False):
            raise ValueError("it is text; the tasks 'language' and 'masked_language' learn that")
        if data.num_classes < 2:
            raise ValueError(f"there is {data.num_classes} class; telling images apart takes at least 2")
        return data.num_classes

    def output_names(self, classes: Sequence[str]) -> list[str]:
        return list(classes)

    def unlearned(self, data: Any) -> list[int]:
        from incubate_lib.data.sets import unused_classes

        return unused_classes(data.labels, data.num_classes)

    def chance(self, outputs: int) -> float:
        return 1 / outputs

    def start(self, data: Any, recipe: Any) -> Any:
        if not (recipe.mixup or recipe.cutmix):
            return None
        from timm.data import Mixup

        return Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=data.num_classes)

    def ready(self, batch: Any, data: Any, recipe: Any, extra: Any) -> Any:
        import torch

        x, y = batch
        x = data.finish(x, recipe)
        if extra is None:
            return x, y
        size = min(len(x), recipe.batch_size // recipe.mixup_draws) if recipe.mixup_draws else len(x)  # images of a draw
        parts = [extra(*part) for part in zip(x.split(size), y.split(size), strict=True)]
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    def side_by_side(self, batch: Any) -> Any:
        return batch[1].argsort()

    def loss(self, output: Any, batch: Any, recipe: Any = None) -> Any:
        from torch.nn.functional import cross_entropy

        is_mixed = recipe is None or recipe.mixup or recipe.cutmix  # Mixup smooths its own targets
        return cross_entropy(output.float(), batch[1], label_smoothing=0.0 if is_mixed else recipe.label_smoothing)

    def contrast(self, features: Any, batch: Any) -> Any:
        from incubate_lib.method.local import contrast

        return contrast(features, batch[1])

    def sums(self, output: Any, batch: Any) -> Any:
        import torch
        from torch.nn.functional import cross_entropy

        y, logits = batch[1], output.float()
        loss = cross_entropy(logits, y, reduction="sum").double()
        return torch.stack([torch.ones_like(loss) * len(y), loss, (logits.argmax(1) == y).sum().double()])

    def divided(self, sums: list[float]) -> Mapping[str, float]:
        number, loss, correct = sums
        return {"loss": loss / number, "accuracy": correct / number}

    def classes(self, output: Any, batch: Any) -> tuple[Any, Any]:
        return batch[1], output.argmax(1) == batch[1]

    def mistakes(self, output: Any, batch: Any, names: Sequence[str] = ()) -> list[str | None]:
        pairs = zip(batch[1].tolist(), output.argmax(1).tolist(), strict=True)
        called = dict(enumerate(names))
        return [None if y == guess else f"{called.get(y, y)}, not {called.get(guess, guess)}" for y, guess in pairs]


TASK = Classification()
