"""How this machine rounds: small seeded sums of each kind that training consists of.

Processors of one name choose other kernels, which add up in another order; weights recorded on one machine can be expected
on another one only where these are the same bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEPT = 8  # values of each


def rounding() -> dict[str, Tensor]:
    """Return a few values of each kind of sum. In one thread, as the phases that they speak for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            values = _products() | {"training": _training()}
    finally:
        torch.set_num_threads(threads)
    return {name: value.detach().flatten()[:KEPT].clone() for name, value in values.items()}


def _products() -> dict[str, Tensor]:
    a, b, images, kernel = torch.randn(48, 96), torch.randn(96, 48), torch.randn(4, 3, 16, 16), torch.randn(8, 3, 4, 4)
    q, k, v = torch.randn(3, 4, 2, 17, 8).unbind()
    return {
        "product": a @ b,
        "product_bfloat16": (a.bfloat16() @ b.bfloat16()).float(),
        "convolution": F.conv2d(images, kernel, stride=4),
        "attention": F.scaled_dot_product_attention(q, k, v),
        "norm": F.layer_norm(a, (96,)),
        "gelu": F.gelu(a),
        "exp": a.exp(),
        "sum": a.sum(0),
    }


def _training() -> Tensor:
    """A small network after twenty updates, in which the last bits of everything have met."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=4), nn.Flatten(2), nn.TransformerEncoderLayer(4, 2, 32, 0.0, "gelu", batch_first=True),
        nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 4),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, fused=True)
    for _ in range(20):
        loss = F.cross_entropy(net(torch.randn(16, 1, 8, 8)), torch.randint(4, (16,)), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return torch.cat([net[0].weight.flatten()[:4], net[5].weight.flatten()[:4]])
