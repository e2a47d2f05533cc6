"""A network that gives a dict of two outputs."""

from typing import Any

from timm.models import register_model
from torch import Tensor, nn


class TwoHeads(nn.Module):
    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.odd, self.large = nn.Linear(32, num_classes), nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        return {"odd": self.odd(x), "large": self.large(x)}


@register_model
def two_heads(pretrained: bool = False, **kwargs: Any) -> TwoHeads:
    return TwoHeads(kwargs["num_classes"], kwargs["in_chans"])
