"""The ResNets for CIFAR of He et al. (arXiv 1512.03385, section 4.2): 6n + 2 layers, three stages of n blocks.

timm's own ResNets have four stages behind a stem that reduces images to a quarter of their side, which leaves nothing of
32 pixels. Where a stage halves the side, its shortcut is a convolution with batch norm, as timm's are (option B of the paper).
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

CHANNELS = (16, 32, 64)
BLOCKS = {f"cifar_resnet{6 * n + 2}": n for n in (3, 5, 9, 18)}  # of a stage


class CifarResNet(ResNet):
    """A ResNet of three stages behind a single convolution, for images of 32 pixels."""

    def __init__(
        self, layers: tuple[int, ...], in_chans: int = 3, channels: tuple[int, ...] = CHANNELS, **arguments: Any
    ) -> None:
        stem = channels[0]
        super().__init__(
            BasicBlock, layers, in_chans=in_chans, channels=channels, stem_type="deep", stem_width=stem // 2, **arguments
        )
        self.conv1 = nn.Conv2d(in_chans, stem, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = self.layer4 = nn.Identity()
        layers_out = ["act1", *(f"layer{i + 1}" for i in range(len(channels)))]
        reductions = [1, *(2**i for i in range(len(channels)))]
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": layer}
            for width, reduction, layer in zip([stem, *channels], reductions, layers_out, strict=True)
        ]


def _registered(name: str) -> Any:
    def make(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return build_model_with_cfg(CifarResNet, name, pretrained, **{"layers": (BLOCKS[name],) * len(CHANNELS)} | arguments)

    make.__name__, make.__module__ = name, __name__
    return register_model(make)


default_cfgs = generate_default_cfgs(
    {name: {"num_classes": 10, "input_size": (3, 32, 32), "first_conv": "conv1", "classifier": "fc"} for name in BLOCKS}
)
globals().update({name: _registered(name) for name in BLOCKS})  # timm finds the constructors by name in their module
