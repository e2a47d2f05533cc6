"""Small networks of many families, divided into modules, and the meta models that are left of them."""

import functools
from pathlib import Path

import timm
import torch
import yaml
from timm.models.mlp_mixer import MlpMixer
from timm.models.vgg import VGG

from incubate_lib.method.chain import find_chain
from incubate_lib.method.network import divide, without

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 6}
NETWORKS = {  # plain ViTs that differ in where stem and head keep their weights, then other families
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit-average": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg"}),
    "vit-registers": ("vit_tiny_patch16_224", VIT | {"reg_tokens": 2, "no_embed_class": True}),
    "vit-map": ("vit_tiny_patch16_224", VIT | {"global_pool": "map", "class_token": False}),
    "clip": ("vit_base_patch16_clip_224", VIT),
    "deit-layer-scale": ("deit_tiny_patch16_224", VIT | {"init_values": 0.1, "qkv_bias": False}),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", {
        "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 4), "num_heads": (2, 2),
    }),
    "mixer": (MlpMixer, {"img_size": 32, "patch_size": 8, "num_blocks": 6, "embed_dim": 16}),
    "resnet": ("resnet18", {"channels": (8, 8, 16, 16), "layers": (2, 2, 2, 3)}),
    "resnet-preact": ("resnetv2_18", {"channels": (8, 8, 16, 16), "stem_chs": 8, "layers": (2, 2, 2, 3)}),
    "convnext": ("convnext_atto", {"depths": (2, 2, 3, 2), "dims": (8, 8, 16, 16)}),
    "mobilenet": ("mobilenetv2_035", {}),
    "vgg": (VGG, {"cfg": (8, 8, "M", 8, 8, "M", 16, 16, 16, "M")}),
}  # fmt: skip
PLAIN = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "in_chans": 1, "num_classes": 5}
K = 3
SHAPE = (3, 32, 32)


def build(name, seed=0, **options):
    """A network of NETWORKS whose branches all count: none starts at zero, which would hide errors."""
    stock, own = NETWORKS[name]
    torch.manual_seed(seed)
    make = functools.partial(timm.create_model, stock) if isinstance(stock, str) else stock
    model = make(num_classes=5, **own | options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 4:
                parameter.add_(0.1 * torch.rand_like(parameter))
    return model.eval()


def divided(name, **options):
    with torch.device("meta"):
        chain = find_chain(build(name, **options), SHAPE)
    number = len(chain.blocks)
    return divide(chain, [number * (i + 1) // K - number * i // K for i in range(K)])


def pair(name, seed=0, **options):
    """The meta model, with one block in each module, the target and how that is divided."""
    partition = divided(name)
    rest = [block for i in range(K) for block in partition.blocks(i)[1:]]
    return without(build(name, seed), rest), build(name, seed + 1, **options), partition


def some_images():
    return torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(1))


BASE = {
    "data": {"source": "digits", "test_images": 100, "train_share": 0.08},
    "training": {"epochs": 2, "batch_size": 32, "lr": 3e-3, "warmup_epochs": 0},
    "machine": {"checkpoint_seconds": 0},
    "run": ["deep_incubation_identity"],
}
SMALL = {  # settings of small networks that learn on digits
    "resnet": {
        "model": {
            "name": "cifar_resnet20", "img_size": 8, "in_chans": 1, "options": {"channels": [4, 8, 8], "layers": [2, 3, 2]},
        },
        "partition": {"cuts": ["layer2.1"]},
        "training": BASE["training"] | {"optimizer": "sgd", "lr": 0.1},
    },
    "swin": {
        "model": {
            "name": "swin_tiny_patch4_window7_224", "img_size": 8, "patch_size": 1, "in_chans": 1, "embed_dim": 8,
            "num_heads": [2, 2], "options": {"depths": [2, 3], "window_size": 4},
        },
        "partition": {"num_modules": 2},
    },
}  # fmt: skip


def settings_file(folder: Path, name: str) -> str:
    """Write the settings of one of SMALL; return the file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(BASE | SMALL[name]))
    return str(path)
