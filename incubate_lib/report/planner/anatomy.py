"""The anatomy of a network: its pieces in order, where it is cut, and what each module has and costs.

Everything is counted on the meta device, of the whole network in end-to-end training: nothing is computed, no image is read.
"""

from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.patches import Patch

from incubate_lib.method.network import has_layer
from incubate_lib.phases.networks import build_meta, build_target, in_target_names, model_shape, partition_of
from incubate_lib.pipeline.graph import Node
from incubate_lib.report.style import PAPER, Figure
from incubate_lib.training.costs import FlopCounts
from incubate_lib.training.memory import memory_by_part

# What becomes of a piece in the meta model → how it is filled.
PIECES = {
    "block that the meta model has, too": {"facecolor": "#F5B041"},
    "block that it does without": {"facecolor": "white"},
    "no block: in both": {"facecolor": "#D9D9D9", "hatch": "///"},
}
MODULES = ("#56B4E9", "#B3DDF2")  # by turns


@dataclass(frozen=True)
class Module:
    """What a module of the target network has, and what it costs in end-to-end training."""

    first: str  # its first and its last piece; it is cut behind the latter
    last: str
    blocks: int
    meta_blocks: int
    parameters: int
    flops: int  # of one image, forward and backward
    activations: int  # bytes that one image leaves for the backward pass


@dataclass(frozen=True)
class Anatomy:
    """A network's pieces, of which the names are timm's, and its modules, both in order."""

    network: str
    pieces: list[tuple[str, int, str]]  # name, module (0-based), which of PIECES
    modules: list[Module]

    def table(self) -> pd.DataFrame:
        """Return a row a module, for people."""
        rows = [
            {
                "pieces": f"{module.first} to {module.last}",
                "blocks": module.blocks,
                "in the meta model": module.meta_blocks,
                "parameters": f"{module.parameters:,}",
                "MFLOP an image": f"{module.flops / 1e6:,.4g}",
                "MiB an image": f"{module.activations / 2**20:,.3g}",
            }
            for module in self.modules
        ]
        return pd.DataFrame(rows, index=[f"module {i + 1}" for i in range(len(rows))])

    def figure(self) -> Figure:
        """Draw the pieces side by side, with the names of cuts, and the modules' parameters, FLOPs and memory to scale."""
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=[2, 3])
        for place, (_, _, kind) in enumerate(self.pieces):
            above.bar(place, 1, 0.86, edgecolor="black", linewidth=0.5, **PIECES[kind])
        numbers = [module for _, module, _ in self.pieces]
        for index, module in enumerate(self.modules[:-1]):
            place, height = numbers.index(index + 1) - 0.5, 1.06 + 0.14 * (index % 3)  # names of neighbours have room
            above.plot([place, place], [0, height], color="black", linewidth=1.6)
            above.text(place, height, module.last, ha="center", va="bottom", fontsize=9)
        above.set(xlim=(-0.6, len(self.pieces) - 0.4), ylim=(-0.02, 1.5), yticks=[], xticks=[])
        title = f"{self.network}: {len(self.pieces)} pieces in order, cut into {len(self.modules)} modules behind the ones named"
        above.set_title(title, fontsize=10, loc="left")
        handles = [Patch(label=label, edgecolor="black", **look) for label, look in PIECES.items()]
        above.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, fontsize=9, frameon=False)
        rows = {
            ("million parameters", 1e6): [module.parameters for module in self.modules],
            ("GFLOP of an image", 1e9): [module.flops for module in self.modules],
            ("MiB kept of an image", 2**20): [module.activations for module in self.modules],
        }
        for y, values in enumerate(rows.values()):
            left = 0.0
            for index, value in enumerate(values):
                width = value / max(1, sum(values))
                below.barh(y, width, 0.7, left, edgecolor="black", linewidth=0.8, facecolor=MODULES[index % 2])
                if width > 0.03:
                    words = f"module {index + 1}: {width:.0%}" if width > 0.12 else str(index + 1)
                    below.text(left + width / 2, y, words, ha="center", va="center", fontsize=9, bbox=PAPER)
                left += width
        below.set_yticks(range(len(rows)), [f"{sum(values) / one:,.3g} {unit}" for (unit, one), values in rows.items()])
        below.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xticks=[])
        for axis in (above, below):
            axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
            axis.tick_params(left=False)
        return figure


def anatomy(node: Node) -> Anatomy:
    """Return the anatomy of the network that a phase's modules belong to. ValueError where it is not cut."""
    s, outputs = node.settings, node.facts.outputs
    if not s.meta_depths:
        raise ValueError(f"{node.title} has a network in one piece")
    shape, partition = model_shape(s.model), partition_of(s)
    with torch.device("meta"):
        target = build_target(s, outputs)
        meta = in_target_names(s, build_meta(s, outputs), target)
    there, left_out, between = PIECES
    pieces, stretches = [], partition.chain.stretches
    for place, stretch in enumerate(stretches):
        kind = (there if has_layer(meta, stretch.block) else left_out) if stretch.block else between
        pieces.append((stretch.name, partition.module_of(place), kind))
    flops = FlopCounts(shape).by_module(target.requires_grad_(True), partition)
    memory = memory_by_part(target, shape, partition, precision=s.precision)
    modules = []
    for index in range(partition.num_modules):
        own = [(name, kind) for name, module, kind in pieces if module == index]
        numbers = [[kind for _, kind in own].count(kind) for kind in (there, left_out)]
        parameters = sum(p.numel() for name, p in target.named_parameters() if partition.owner(name) == index)
        costs = parameters, flops[index], memory[index].activations
        modules.append(Module(own[0][0], own[-1][0], sum(numbers), numbers[0], *costs))
    return Anatomy(s.model.name, pieces, modules)
