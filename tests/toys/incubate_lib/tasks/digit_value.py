"""A task of another kind: how large a digit is, as a number. A batch is images [B, C, H, W] and labels [B]."""

from collections.abc import Mapping, Sequence
from typing import Any

from incubate_lib.tasks import Metric, Task


class DigitValue(Task):
    name = "digit_value"
    metrics = (
        Metric("mean_error", "mean error", digits=2, higher_is_better=False),
        Metric("root", "root mean square", digits=2, higher_is_better=False),
    )
    num_sums = 3

    def outputs(self, data: Any) -> int:
        return 1

    def ready(self, batch: Any, data: Any, recipe: Any, extra: Any) -> Any:
        return data.finish(batch[0], recipe), batch[1]

    def loss(self, output: Any, batch: Any, recipe: Any = None) -> Any:
        return (output.float().squeeze(1) - batch[1]).square().mean()

    def sums(self, output: Any, batch: Any) -> Any:
        import torch

        error = (output.float().squeeze(1) - batch[1]).double()
        return torch.stack([torch.ones_like(error).sum(), error.square().sum(), error.abs().sum()])

    def divided(self, sums: list[float]) -> Mapping[str, float]:
        number, squares, distances = sums
        return {"loss": squares / number, "mean_error": distances / number, "root": (squares / number) ** 0.5}

    def mistakes(self, output: Any, batch: Any, names: Sequence[str] = ()) -> list[str | None]:
        pairs = zip(batch[1].tolist(), output.squeeze(1).tolist(), strict=True)
        return [f"{label}, not {guess:.1f}" if abs(label - guess) > 0.5 else None for label, guess in pairs]


TASK = DigitValue()
