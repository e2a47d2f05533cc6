"""A task over text: which token stands there. A batch is what text yields, tokens [B, T], what is asked for, and characters."""

from collections.abc import Mapping
from typing import Any

from incubate_lib.tasks import Metric, Task


class CopiedText(Task):
    name = "copied_text"
    metrics = (Metric("copied", "tokens copied", "%", scale=100.0, digits=1, is_share=True),)
    num_sums = 3
    sample = "line"

    def outputs(self, data: Any) -> int:
        return data.num_classes

    def check_output(self, output: Any, samples: int, outputs: int) -> None:
        if output.ndim != 3:
            raise ValueError(f"gives {tuple(output.shape)}; a row for each token is needed")

    def ready(self, batch: Any, data: Any, recipe: Any, extra: Any) -> Any:
        return data.finish(batch, recipe)

    def loss(self, output: Any, batch: Any, recipe: Any = None) -> Any:
        from torch.nn.functional import cross_entropy

        return cross_entropy(output.float().flatten(0, 1), self.inputs(batch).flatten())

    def sums(self, output: Any, batch: Any) -> Any:
        import torch

        right = (output.argmax(-1) == self.inputs(batch)).double().mean(1)
        return torch.stack([torch.ones_like(right).sum(), len(right) * self.loss(output, batch).double(), right.sum()])

    def divided(self, sums: list[float]) -> Mapping[str, float]:
        number, loss, right = sums
        return {"loss": loss / number, "copied": right / number}


TASK = CopiedText()
