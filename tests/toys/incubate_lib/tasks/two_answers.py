"""A task with several outputs: whether a digit is odd, and whether it is large. The network gives a dict."""

from collections.abc import Mapping
from typing import Any

from incubate_lib.tasks import Metric, Task


class TwoAnswers(Task):
    name = "two_answers"
    metrics = (Metric("right", "both right", "%", scale=100.0, digits=1, is_share=True),)
    num_sums = 3

    def outputs(self, data: Any) -> int:
        return 1

    def check_output(self, output: Any, samples: int, outputs: int) -> None:
        if not isinstance(output, dict) or output.keys() != {"odd", "large"}:
            raise ValueError("gives no odd and large")

    def ready(self, batch: Any, data: Any, recipe: Any, extra: Any) -> Any:
        return data.finish(batch[0], recipe), batch[1]

    def losses(self, output: Any, batch: Any) -> Any:
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits as entropy

        pairs = ((output["odd"], batch[1] % 2), (output["large"], batch[1] > 4))
        told = torch.cat([said for said, _ in pairs], 1), torch.stack([wanted for _, wanted in pairs], 1).float()
        return entropy(*told, reduction="none").mean(1), ((told[0] > 0) == told[1].bool()).all(1)

    def loss(self, output: Any, batch: Any, recipe: Any = None) -> Any:
        return self.losses(output, batch)[0].mean()

    def sums(self, output: Any, batch: Any) -> Any:
        import torch

        loss, right = self.losses(output, batch)
        return torch.stack([torch.ones_like(loss).sum(), loss.sum(), right.sum()]).double()

    def divided(self, sums: list[float]) -> Mapping[str, float]:
        number, loss, right = sums
        return {"loss": loss / number, "right": right / number}


TASK = TwoAnswers()
