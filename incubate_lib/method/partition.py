"""Cut an ordinary timm Vision Transformer into modules and put it together again.

Ownership follows Deep Incubation (arXiv 2212.04129): module 1 owns patch embedding, class token and position
embedding, module K owns the final norm and the head. Modules *share* their weights with the model they were cut
from: nothing is copied, `copy.deepcopy` is the caller's choice.

Letters used for shapes: B batch, C channels, H and W pixels, N tokens, D embed_dim.
"""

import copy
from collections.abc import Sequence

from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

STEM = ("patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre")
HEAD = ("norm", "attn_pool", "fc_norm", "head_drop", "head")


class ViTModule(VisionTransformer):
    """A contiguous part of a timm ViT: the stem if it is the first, some blocks, the head if it is the last.

    It *is* a VisionTransformer with the pieces it does not own taken out, so its state dict has timm's names, with
    blocks counted within the module, as in the released code's `model_stages`. Made by `split`, not by hand.
    """

    index: int  # 0-based place in the network
    depths: tuple[int, ...]  # blocks of every module of the network it belongs to

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == len(self.depths) - 1

    @property
    def label(self) -> str:
        """Name for people, counted from one."""
        return f"module {self.index + 1} of {len(self.depths)}"

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] (first module) or tokens [B, N, D] to tokens, or to logits (last module)."""
        if self.is_first:
            x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing and self.training else self.blocks(x)
        return self.forward_head(self.norm(x)) if self.is_last else x


def split(model: VisionTransformer, depths: Sequence[int]) -> list[ViTModule]:
    """Cut `model` into `len(depths)` modules of `depths[i]` blocks, which share its weights.

    Raises TypeError for anything but a plain timm VisionTransformer (subclasses change the forward pass), ValueError
    when the depths are not positive or do not add up.
    """
    if type(model) is not VisionTransformer:
        raise TypeError(f"split() needs a timm VisionTransformer, not {type(model).__name__}")
    if not depths or min(depths) < 1:
        raise ValueError(f"depths {list(depths)}: every module needs at least one block")
    if sum(depths) != len(model.blocks):
        raise ValueError(f"depths {list(depths)} add up to {sum(depths)}, but the network has {len(model.blocks)} blocks")
    modules, start = [], 0
    for index, depth in enumerate(depths):
        module = _shell(model, ViTModule)
        module.index, module.depths = index, tuple(depths)
        module.blocks = nn.Sequential(*model.blocks[start : start + depth])
        for name in (() if module.is_first else STEM) + (() if module.is_last else HEAD):
            setattr(module, name, None)
        modules.append(module)
        start += depth
    return modules


def join(modules: Sequence[ViTModule]) -> VisionTransformer:
    """Make one ordinary timm ViT of all modules in order, sharing their weights; the inverse of `split`.

    It trusts its input; `incubation.assemble` checks first.
    """
    model = _shell(modules[0], VisionTransformer)
    del model.index, model.depths
    model.blocks = nn.Sequential(*(block for module in modules for block in module.blocks))
    for name in HEAD:
        setattr(model, name, getattr(modules[-1], name))
    return model


def _shell(model: nn.Module, cls: type) -> nn.Module:
    """A `cls` with the attributes of `model` and registries of its own, so that pieces can be exchanged."""
    shell = cls.__new__(cls)
    shell.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in model.__dict__.items()})
    return shell
