"""A task with a row of outputs for each token: the bits of a digit. A batch is a dict, `image` [B, C, H, W] and `digit` [B]."""

from collections.abc import Mapping, Sequence
from typing import Any

from incubate_lib.tasks import Metric, Task

TOKENS = 4


class DigitBits(Task):
    name = "digit_bits"
    metrics = (Metric("bits", "bits right", "%", scale=100.0, digits=1, is_share=True),)
    num_sums = 3

    def outputs(self, data: Any) -> int:
        return 2

    def check_output(self, output: Any, samples: int, outputs: int) -> None:
        if output.shape != (samples, TOKENS, outputs):
            raise ValueError(f"gives {tuple(output.shape)}; {TOKENS} tokens are needed")

    def ready(self, batch: Any, data: Any, recipe: Any, extra: Any) -> Any:
        return batch | {"image": data.finish(batch["image"], recipe)}

    def inputs(self, batch: Any) -> Any:
        return batch["image"]

    def loss(self, output: Any, batch: Any, recipe: Any = None) -> Any:
        from torch.nn.functional import cross_entropy

        return cross_entropy(output.float().flatten(0, 1), self.bits(batch["digit"]).flatten())

    def sums(self, output: Any, batch: Any) -> Any:
        import torch

        right = (output.argmax(2) == self.bits(batch["digit"])).double().mean(1)
        return torch.stack([torch.ones_like(right).sum(), len(right) * self.loss(output, batch).double(), right.sum()])

    def divided(self, sums: list[float]) -> Mapping[str, float]:
        number, loss, right = sums
        return {"loss": loss / number, "bits": right / number}

    def mistakes(self, output: Any, batch: Any, names: Sequence[str] = ()) -> list[str | None]:
        said = [sum(bit << place for place, bit in enumerate(bits)) for bits in output.argmax(2).tolist()]
        return [None if one == digit else f"{one}" for one, digit in zip(said, batch["digit"].tolist(), strict=True)]

    @staticmethod
    def bits(digits: Any) -> Any:
        import torch

        return digits[:, None] >> torch.arange(TOKENS, device=digits.device) & 1


TASK = DigitBits()
