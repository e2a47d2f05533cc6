"""A network that timm lacks: a residual network for small images, three stages of three blocks each."""

from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if (inner, stride) != (outer, 1) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class TinyResNet(nn.Module):
    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 8) -> None:
        super().__init__()
        self.num_classes = num_classes
        widths = [width, 2 * width, 4 * width]
        self.stem = nn.Sequential(nn.Conv2d(in_chans, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks: list[nn.Module] = []
        for i, outer in enumerate(widths):
            inner = widths[max(0, i - 1)]
            blocks += [Block(inner, outer, 1 + (i > 0)), Block(outer, outer, 1), Block(outer, outer, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@register_model
def tiny_resnet(pretrained: bool = False, **kwargs: Any) -> TinyResNet:
    return TinyResNet(**{name: value for name, value in kwargs.items() if name in ("num_classes", "in_chans", "width")})
