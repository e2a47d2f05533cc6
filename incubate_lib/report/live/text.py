"""What a network makes of text, for people to read."""

import pandas as pd
import torch
from torch import Tensor

from incubate_lib.data.text.contexts import NOT_ASKED
from incubate_lib.phases.recipes import load_trained
from incubate_lib.pipeline.graph import Node


@torch.no_grad()
def predictions(node: Node, num: int = 3, length: int = 120, seed: int = 0) -> pd.DataFrame:
    """Return `num` contexts of the text that is evaluated on, and what a phase's finished network makes of each.

    A causal one goes on for `length` tokens, drawn at random as it thinks them likely; of masked ones it says the likeliest.
    """
    network = load_trained(node.settings, node.folder, node.facts.outputs)
    data = node.data()[1]
    x, asked, _ = data.some(torch.linspace(0, len(data) - 1, num).long())
    read = data.vocabulary.decode
    if network.is_causal:
        generator = torch.Generator().manual_seed(seed)
        behind = _drawn(network, x, length, generator)[:, x.shape[1] :]
        rows = [(read(before), read(after)) for before, after in zip(x.tolist(), behind.tolist(), strict=True)]
        return pd.DataFrame(rows, columns=["it begins", "the network goes on"])
    likely, where = network(x).argmax(-1), asked != NOT_ASKED
    parts = (torch.where(where, data.vocabulary.mask, x), torch.where(where, likely, x), torch.where(where, asked, x))
    rows = [tuple(map(read, row)) for row in zip(*(part.tolist() for part in parts), strict=True)]
    return pd.DataFrame(rows, columns=["what is asked for", "what the network says", "what stands there"])


def _drawn(network: torch.nn.Module, x: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Return tokens [B, T] with as many more behind them, each drawn from what the network says."""
    context = x.shape[1]
    for _ in range(length):
        likely = network(x[:, -context:])[:, -1].softmax(-1)
        x = torch.cat([x, torch.multinomial(likely, 1, generator=generator)], 1)
    return x
