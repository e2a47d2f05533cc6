"""Small networks of every kind that Modular Adaptive Training knows, images for them, and masks over their units."""

import copy

import timm
import torch
import torch.nn.functional as F
from torch import nn

from incubate_lib.data.sets import ImageSet
from incubate_lib.method.chain import find_chain
from incubate_lib.method.network import Partition, divide, in_names_of


def vit(depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=24, depth=depth, num_heads=3, in_chans=1, num_classes=4
    )


def vgg() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vgg11_bn", in_chans=1, num_classes=4, mlp_ratio=1 / 512)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", in_chans=1, num_classes=4)


NETWORKS = {
    "heads": (vit, 8), "sublayers": (vit, 8), "blocks": (vit, 8), "conv_layers": (vgg, 32), "filters": (resnet, 32),
}  # fmt: skip


def cut(model: nn.Module, depths: list[int]) -> Partition:
    """Return how a Vision Transformer is cut into modules of so many blocks."""
    shape = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    return divide(find_chain(copy.deepcopy(model), shape), depths)


def made_of(
    meta: nn.Module, meta_depths: list[int], target: nn.Module, depths: list[int]
) -> tuple[nn.Module, nn.Module, Partition]:
    """Return what hybrids are made of: the meta model under the target's names, the target, how that is cut."""
    partition = cut(target, depths)
    return in_names_of(meta, cut(meta, meta_depths), target, partition), target, partition


def images_for(size: int) -> torch.Tensor:
    return torch.randn(8, 1, size, size, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, images: torch.Tensor, run=None) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    F.cross_entropy((run or model)(images).float(), torch.arange(8) % 4).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def masks(number: int) -> list[torch.Tensor]:
    """Some rest, others rest, the upper half trains, all train again."""
    generator = torch.Generator().manual_seed(2)
    some = torch.rand(number, generator=generator) < 0.5
    some[0] = True
    return [some, ~some | (torch.arange(number) == number - 1), torch.arange(number) >= number // 2, torch.ones(number).bool()]


KERNELS = {
    "vit": lambda **more: timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=3, in_chans=1, num_classes=3, **more
    ),
    "vgg": lambda: timm.create_model("vgg11", in_chans=1, num_classes=3, mlp_ratio=1 / 512),
    "vgg_bn": lambda: timm.create_model("vgg11_bn", in_chans=1, num_classes=3, mlp_ratio=1 / 512),
    "resnet": lambda: timm.create_model("resnet10t", in_chans=1, num_classes=3),
}


def with_kernels(name: str, **more) -> tuple[nn.Module, torch.Tensor]:
    """A network in float64, its batch norms used to some images, and a probe."""
    torch.manual_seed(0)
    model = KERNELS[name](**more).double()
    images = torch.randn(3, 1, *((8, 8) if name == "vit" else (32, 32)), dtype=torch.float64)
    with torch.no_grad():
        model.train()(images)
    return model, images


def image_set(n=50, classes=4):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=g, dtype=torch.uint8)
    return ImageSet(images, torch.arange(n) % classes, torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.25), classes)
