"""Deep Incubation (arXiv 2212.04129, section 3): hybrids, starting weights, assembly.

1. train a tiny meta model end to end; 2. for each i train target module i alone inside the frozen meta model
(`make_hybrid`); 3. put the trained modules together (`assemble`); 4. fine-tune the result end to end.
Steps 1, 2 and 4 use the ordinary loss on the labels, so any training loop will do.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from incubate_lib.method.partition import HEAD, STEM, ViTModule, join

Start = Literal["random", "stack", "identity"]


class Hybrid(nn.Module):
    """The meta model with one module replaced by a target module; only the target is trainable, or ever in train mode."""

    def __init__(self, prefix: nn.Module, target: ViTModule, suffix: nn.Module) -> None:
        super().__init__()
        self.prefix, self.target, self.suffix = prefix, target, suffix

    def train(self, mode: bool = True) -> "Hybrid":
        """Put the target in train mode; frozen modules stay in eval mode, or their drop-path would be noise."""
        super().train(False)
        self.training = mode
        self.target.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits. No gradient is needed before the target; behind it, it passes through."""
        with torch.no_grad():
            x = self.prefix(x)
        return self.suffix(self.target(x))


class Imitation(Hybrid):
    """A hybrid whose target learns what its meta module computes, instead of labels: the paper's control (its section 4.3).

    In train mode its outputs are losses, in eval mode the hybrid's logits.
    """

    def __init__(self, prefix: nn.Module, target: ViTModule, suffix: nn.Module, model_of: ViTModule) -> None:
        super().__init__(prefix, target, suffix)
        self.model_of = model_of.requires_grad_(False)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to each image's loss [B]: the mean squared distance of the two modules' outputs.

        It is divided by the variance of the meta module's outputs, so that every module's losses are of one size.
        """
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            x = self.prefix(x)
            wanted = self.model_of(x)
        distance = (self.target(x) - wanted).float().square().flatten(1).mean(1)
        return distance / wanted.float().var()


def make_hybrid(meta_modules: Sequence[ViTModule], target: ViTModule, index: int) -> Hybrid:
    """Replace module `index` (0-based) of the meta model by `target` and freeze all others, in place.

    Freezing happens here, before anybody can wrap or compile the hybrid. Raises ValueError when the target does not
    belong at that place or does not fit the meta model's width.
    """
    if not 0 <= index < len(meta_modules):
        raise ValueError(f"index {index} is outside the meta model's modules 0 … {len(meta_modules) - 1}")
    if (target.index, len(target.depths)) != (index, len(meta_modules)):
        raise ValueError(f"{target.label} cannot stand in for module {index + 1} of {len(meta_modules)}")
    if target.embed_dim != meta_modules[index].embed_dim:
        raise ValueError(f"{target.label} has width {target.embed_dim}, the meta model {meta_modules[index].embed_dim}")
    prefix, suffix = nn.Sequential(*meta_modules[:index]), nn.Sequential(*meta_modules[index + 1 :])
    prefix.requires_grad_(False)
    suffix.requires_grad_(False)
    target.requires_grad_(True)
    return Hybrid(prefix, target, suffix).train()


def make_imitation(meta_modules: Sequence[ViTModule], target: ViTModule, index: int) -> Imitation:
    """Return the hybrid of `make_hybrid` whose target imitates meta module `index`; the same errors."""
    hybrid = make_hybrid(meta_modules, target, index)
    return Imitation(hybrid.prefix, hybrid.target, hybrid.suffix, meta_modules[index])


@torch.no_grad()
def start_module(target: ViTModule, meta: ViTModule, start: Start, inherit_stem: bool, inherit_head: bool) -> ViTModule:
    """Set the starting weights of `target` from its meta module, in place, and return it.

    `random` (the paper) leaves the blocks as they were initialised; `stack` fills them with copies of the meta
    blocks; `identity` puts the meta blocks first and lets the residual branches of all others start at zero, so that
    the module computes what its meta module computes. Raises ValueError when the blocks cannot start that way.
    """
    depth, meta_depth = len(target.blocks), len(meta.blocks)
    if start != "random" and depth < meta_depth:
        raise ValueError(f"{target.label} has {depth} blocks, fewer than the {meta_depth} it should start from")
    for i, block in enumerate(target.blocks):
        if start == "stack":
            block.load_state_dict(meta.blocks[i * meta_depth // depth].state_dict())
        elif start == "identity" and i < meta_depth:
            block.load_state_dict(meta.blocks[i].state_dict())
        elif start == "identity":
            if type(block) is not Block:
                raise ValueError(f"start 'identity' needs timm's plain Block, not {type(block).__name__}")
            for layer in (block.attn.proj, block.mlp.fc2):
                for parameter in layer.parameters():
                    parameter.zero_()
    inherited = (STEM if inherit_stem and target.is_first else ()) + (HEAD if inherit_head and target.is_last else ())
    source, own = meta.state_dict(), target.state_dict()
    for name in own:
        if name.split(".")[0] in inherited:
            own[name].copy_(source[name])
    return target


def assemble(modules: Sequence[ViTModule]) -> VisionTransformer:
    """Put target modules 1 … K together to one ordinary timm ViT, sharing their weights.

    Raises ValueError that names every missing, doubled, out-of-order or misfitting module.
    """
    if not modules:
        raise ValueError("no modules to assemble")
    depths, width = modules[0].depths, modules[0].embed_dim
    for module in modules:
        if (module.depths, module.embed_dim) != (depths, width):
            raise ValueError(
                f"{module.label} (depths {module.depths}, width {module.embed_dim}) does not fit "
                f"{modules[0].label} (depths {depths}, width {width})"
            )
        if len(module.blocks) != depths[module.index]:
            raise ValueError(f"{module.label} has {len(module.blocks)} blocks, not {depths[module.index]}")
    order = [module.index for module in modules]
    wrong = {
        "missing": sorted(set(range(len(depths))) - set(order)),
        "doubled": sorted(i for i, n in Counter(order).items() if n > 1),
    }
    if not any(wrong.values()):
        wrong = {"out of order": [i for place, i in enumerate(order) if i != place]}
    if any(wrong.values()):
        message = "; ".join(f"{why}: module {', '.join(str(i + 1) for i in who)}" for why, who in wrong.items() if who)
        raise ValueError(f"cannot assemble {len(depths)} modules: {message}")
    return join(modules)
