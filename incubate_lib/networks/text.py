"""Plain transformers for text out of timm's blocks: one that is causal, one that sees all of a context.

Before the blocks a convolution over four tokens tells each what stands around it, or before it. Without that small networks
that read characters learn little more than which character follows which. Positions are sinusoids (arXiv 1706.03762).

Letters: B batch, T tokens, D channels, V tokens of the vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from incubate_lib.networks.experts import SwitchMlp

REACH = 4  # tokens that the first layer sees at once
default_cfgs = generate_default_cfgs({name: {"input_size": (64,)} for name in ("text_causal", "text_masked")})


class CausalAttention(Attention):
    """timm's attention, in which no token sees those behind it."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = True) -> Tensor:
        """Map [B, T, D] to [B, T, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(x.transpose(1, 2).flatten(2))


class Stem(nn.Module):
    """Embeds tokens, and lets each see its neighbours and know its place."""

    def __init__(self, vocabulary: int, width: int, context: int, is_causal: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Conv1d(width, width, REACH)
        self.before = REACH - 1 if is_causal else REACH // 2
        rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
        angles = torch.arange(context)[:, None] * rates
        positions = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, T] to [B, T, D]."""
        embedded = F.pad(self.embedding(x).transpose(1, 2), (self.before, REACH - 1 - self.before))
        return self.mix(embedded).transpose(1, 2) + self.positions[: x.shape[1]]


class TextTransformer(nn.Module):
    """A transformer that maps tokens [B, T] to logits of each token's place [B, T, V]."""

    def __init__(
        self,
        *,
        is_causal: bool,
        num_classes: int = 256,
        context: int = 64,
        embed_dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        num_experts: int = 0,  # in the place of each block's MLP; none: a plain one
        capacity: float = 1.25,  # places of all experts, in tokens of a context
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.is_causal, self.num_classes = is_causal, num_classes
        self.stem = Stem(num_classes, embed_dim, context, is_causal)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        blocks = [Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=rate) for rate in rates]
        for block in blocks if is_causal else ():
            block.attn = CausalAttention(embed_dim, num_heads, qkv_bias=True)
        for block in blocks if num_experts else ():
            block.mlp = SwitchMlp(embed_dim, int(embed_dim * mlp_ratio), num_experts, capacity)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)
        self.apply(_initialised)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))))

    def no_weight_decay(self) -> set[str]:
        return {"stem.embedding.weight"}


def _initialised(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _made(arguments: dict[str, Any], is_causal: bool) -> nn.Module:
    ours = {name: value for name, value in arguments.items() if not name.startswith(("pretrained", "cache_dir"))}
    return TextTransformer(is_causal=is_causal, **ours)


@register_model
def text_causal(**arguments: Any) -> nn.Module:
    """Guesses the next token."""
    return _made(arguments, is_causal=True)


@register_model
def text_masked(**arguments: Any) -> nn.Module:
    """Guesses what is masked."""
    return _made(arguments, is_causal=False)
