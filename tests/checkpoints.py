"""Small networks and checkpoints of them in the layout of the released code."""

import argparse
import copy
import itertools
from functools import partial

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

KINDS = {"B": {"qkv_bias": True, "eps": 1e-6}, "H": {"qkv_bias": False, "eps": 1e-5}}
DEPTHS = {"meta": [1, 1, 1, 1], "hybrid": [1, 3, 1, 1], "final": [3, 3, 3, 3]}


def network(depth, *, kind="B", eps=None, seed=0, width=16, img_size=8, **more):
    """A small ViT as the released code builds it, with weights of which none is zero or one."""
    torch.manual_seed(seed)
    norm = partial(nn.LayerNorm, eps=eps or KINDS[kind]["eps"])
    arguments = {"patch_size": 4, "in_chans": 1, "num_classes": 4, "num_heads": 2, "qkv_bias": KINDS[kind]["qkv_bias"]} | more
    model = VisionTransformer(img_size=img_size, embed_dim=width, depth=depth, norm_layer=norm, **arguments)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def stages_of(state, depths):
    """Cut a flat state dict as the released code does: blocks counted within the stage."""
    stages, ends = [{} for _ in depths], list(itertools.accumulate(depths))
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            i = next(i for i, end in enumerate(ends) if int(number) < end)
            stages[i][f"blocks.{int(number) - ends[i] + depths[i]}.{rest}"] = tensor
        else:
            stages[-1 if name.startswith(("norm.", "head.")) else 0][name] = tensor
    return stages


def released(model, depths):
    """What the released code saves: every weight three times, and what it needs to go on training."""
    state = model.state_dict()
    stages = stages_of(state, depths)
    copies = {f"stages.{i}.{name}": tensor for i, stage in enumerate(stages) for name, tensor in stage.items()}
    trained = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trained.parameters())
    trained(torch.rand(2, *images_of(model))).sum().backward()
    optimizer.step()
    return {
        "model": state | copies, "model_stages": stages, "optimizer": optimizer.state_dict(), "epoch": 99,
        "lr_scheduler": {"base_values": [5e-4], "t_initial": 100}, "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "args": argparse.Namespace(model="vit_base_patch16_224", divided_depths=depths, lr=5e-4, phase="PT"),
    }  # fmt: skip


def opened(folder):
    """Return the network in a folder that was written for timm, as timm opens it; before 1.0.26 it had to be told the file."""
    output = {"pretrained": True}
    if tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 26):
        output = {"checkpoint_path": folder / "model.safetensors"}
    return timm.create_model(f"local-dir:{folder}", **output).eval()


def images_of(model):
    return (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


def saved(path, content):
    torch.save(content, path)
    return str(path)


def same_logits(a, b):
    x = torch.rand(3, *images_of(a), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(a(x), b(x))
