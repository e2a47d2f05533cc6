"""The hybrid viewer: what is frozen and what trains while one module is incubated, and what each part costs.

FLOPs of an image are counted exactly (`training.costs`), bytes of a training step as `training.memory` counts them; both with
the very hybrid that the phase trains, built on the meta device, where nothing is computed and no memory taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from incubate_lib.config import PhaseSettings, Settings, SettingsError
from incubate_lib.method.incubation import Imitation
from incubate_lib.phases.networks import build_target, model_shape
from incubate_lib.phases.recipes import prepare
from incubate_lib.pipeline.graph import Node, Plan, closure
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.style import PAPER, Figure, filling, trained_and_frozen
from incubate_lib.report.widgets import or_sentence, with_picture, with_twin
from incubate_lib.report.words import label
from incubate_lib.training.costs import FlopCounts
from incubate_lib.training.memory import StepMemory, memory_by_part
from incubate_lib.training.schedule import micro_batches

KINDS = {  # of memory → name, colour, hatch
    "weights": ("weights", "#999999", ""),
    "optimizer": ("optimiser state", "#0072B2", "\\\\"),
    "gradients": ("gradients", "#D55E00", "//"),
    "activations": ("activations kept for the backward pass", "#F0E442", ".."),
}
WORK = {"before": "forward only", "target": "forward, all gradients", "behind": "forward, gradient of its input"}


@dataclass(frozen=True)
class Part:
    """One module of a hybrid, or a whole network."""

    name: str
    blocks: int
    trained: bool
    work: str  # of WORK; what is computed of it in a step
    flops: int  # of one image, forward and backward as far as it is needed
    memory: StepMemory

    def bytes_of(self, kind: str, images: int) -> int:
        """Return the bytes of a kind of memory with so many images at once; weights cast to bfloat16 count as activations."""
        if kind == "activations":
            return self.memory.casts + images * self.memory.activations
        return getattr(self.memory, kind)


@dataclass(frozen=True)
class Costs:
    """A network in training, part by part, in the order of its modules."""

    title: str
    parts: list[Part]
    images: int  # at once: a batch, or a micro-batch, on one device

    @property
    def flops(self) -> int:
        """Training FLOPs of one image."""
        return sum(part.flops for part in self.parts)

    @property
    def peak(self) -> int:
        """Bytes at the peak of a step."""
        return sum((part.memory for part in self.parts), StepMemory()).peak(self.images)


class Known:
    """What was counted of parts that the networks of a strategy share."""

    def __init__(self, node: Node) -> None:
        self.flops, self.memory = FlopCounts(model_shape(node.settings.model)), {}


def hybrid_costs(given: Settings | Plan, strategy: str, index: int) -> Costs:
    """Return what the parts of the hybrid of module `index` (0-based) cost while it is incubated.

    The FLOPs add up to the facts' `incubate-<index>`. SettingsError if the strategy incubates no such module.
    """
    nodes = _modules(given, strategy)
    return _hybrid(nodes, index, Known(nodes[0]))


def hybrids_figure(given: Settings | Plan, strategy: str, index: int | None = None) -> Figure:
    """Draw the hybrid of module `index` (0-based), or those of all modules, over the network as end-to-end training has it, to
    scale: FLOPs, bytes. SettingsError if the strategy incubates no such module.
    """
    nodes = _modules(given, strategy)
    return _figure(nodes, range(len(nodes)) if index is None else [index], strategy, Known(nodes[0]))


def _figure(nodes: Sequence[Node], indices: Sequence[int], strategy: str, known: Known) -> Figure:
    return _draw([*(_hybrid(nodes, i, known) for i in indices), _whole(nodes[0], known)], strategy)


@or_sentence
def hybrid_viewer(given: Settings | Plan, strategy: str) -> Any:
    """Return a slider over the modules that switches the picture of one hybrid; its twin shows all.

    What cannot be shown becomes a sentence in its place.
    """
    nodes = _modules(given, strategy)
    known = Known(nodes[0])
    return with_twin(lambda: _slider(nodes, strategy, known), lambda: _figure(nodes, range(len(nodes)), strategy, known))


def _slider(nodes: Sequence[Node], strategy: str, known: Known) -> ipywidgets.Widget:
    options = [(f"module {i + 1} of {len(nodes)}", i) for i in range(len(nodes))]
    menu = ipywidgets.SelectionSlider(options=options, description="incubate", layout={"width": "32rem"})
    return with_picture(menu, lambda index: _figure(nodes, [index], strategy, known))


# -- counting -----------------------------------------------------------------------------------------------------------------


def _modules(given: Settings | Plan, strategy: str) -> list[Node]:
    """Return the phases that incubate the modules of a strategy, in order."""
    made = given if isinstance(given, Plan) else plan(given, [strategy])
    finals = [node for (name, _), node in made.finals.items() if name == strategy]
    if not finals:
        there = ", ".join(dict.fromkeys(name for name, _ in made.finals)) or "none"
        raise SettingsError(f"strategy {strategy} is not part of what was asked for, which is: {there}")
    nodes = [node for node in closure(finals[:1]) if node.settings.phase == "incubate"]
    if not nodes:
        raise SettingsError(f"strategy {strategy} incubates no modules, so it has no hybrids")
    return sorted(nodes, key=lambda node: node.settings.module_index)


def _hybrid(nodes: Sequence[Node], index: int, known: Known) -> Costs:
    if not 0 <= index < len(nodes):
        raise SettingsError(f"index is {index}; this strategy has the modules 0 … {len(nodes) - 1}")
    s = nodes[index].settings
    with torch.device("meta"):
        model, _ = prepare(s, {}, nodes[index].experiment.facts.num_classes)
    flops = dict(known.flops.parts(model))
    memory = list(memory_by_part(model, known.flops.image_shape, precision=s.precision, known=known.memory).values())
    parts = []
    for i, (module, bytes_) in enumerate(zip((*model.prefix, model.target, *model.suffix), memory, strict=True)):
        work = WORK["before" if i < index else "target" if i == index else "behind"]
        counted = flops.get(module, 0)
        if isinstance(model, Imitation):
            counted += flops[model.model_of] if i == index else 0
            work = WORK["target"] + "; its meta module forward" if i == index else work if i < index else "not used"
        parts.append(Part(f"module {i + 1}", len(module.blocks), i == index, work, counted, bytes_))
    return Costs(f"module {index + 1} of {len(nodes)} incubates", parts, _at_once(s, nodes[index]))


def _whole(node: Node, known: Known) -> Costs:
    s, classes = node.settings, node.experiment.facts.num_classes
    with torch.device("meta"):
        model = build_target(s, classes)
    memory = memory_by_part(model, known.flops.image_shape, precision=s.precision, known=known.memory)["network"]
    part = Part("whole network", len(model.blocks), True, WORK["target"], known.flops.per_image(model), memory)
    return Costs("end to end", [part], _at_once(s, node))


def _at_once(s: PhaseSettings, node: Node) -> int:
    """Return the images that one device has at once."""
    return micro_batches(s.training.batch_size, s.training.micro_batch, node.experiment.settings.machine.team_size)[1]


# -- drawing ------------------------------------------------------------------------------------------------------------------


def _draw(rows: Sequence[Costs], strategy: str) -> Figure:
    """Draw a bar a network, twice: FLOPs, and bytes; the last row is the whole network."""
    figure = Figure(figsize=(11, 2.3 + 1.25 * len(rows)), layout="constrained")
    figure.suptitle(label(strategy), fontsize=11)
    above, below = figure.subplots(2, 1)
    _flop_bars(above, rows)
    _memory_bars(below, rows)
    for axis in (above, below):
        axis.set_yticks(range(len(rows)), [row.title for row in rows], fontsize=10)
        axis.set_ylim(len(rows) - 0.45, -0.55)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    return figure


def _flop_bars(axis: Axes, rows: Sequence[Costs]) -> None:
    unit, factor = _flop_unit(rows[-1].flops)
    widest = max(row.flops for row in rows) / factor
    for y, row in enumerate(rows):
        left = 0.0
        for part in row.parts:
            width = part.flops / factor
            axis.barh(y, width, 0.62, left, linewidth=1, **filling(part.trained))
            _annotate(axis, left, width, y, widest, part.name, f"{part.name}, {part.blocks} blocks\n{part.work}")
            left += width
        share = "" if row is rows[-1] else f" ({row.flops / rows[-1].flops:.0%})"
        axis.text(left + 0.01 * widest, y, f"{row.flops / factor:.3g}{share}", va="center", fontsize=10)
    axis.set(xlabel=f"{unit} of one image, forward and backward", xlim=(0, 1.13 * widest))
    axis.legend(handles=trained_and_frozen(), loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)


def _memory_bars(axis: Axes, rows: Sequence[Costs]) -> None:
    totals = [sum(part.bytes_of(kind, row.images) for part in row.parts for kind in KINDS) for row in rows]
    unit, factor = ("GiB", 2**30) if max(totals) >= 2**30 else ("MiB", 2**20)
    widest = max(totals) / factor
    for y, row in enumerate(rows):
        left = 0.0
        for number, part in enumerate(row.parts):
            begin = left
            for kind, (_, colour, hatch) in KINDS.items():
                width = part.bytes_of(kind, row.images) / factor
                axis.barh(y, width, 0.5, left, color=colour, hatch=hatch, edgecolor="black", linewidth=0.3)
                left += width
            axis.plot([begin, begin, left, left], [y - 0.31, y - 0.36, y - 0.36, y - 0.31], color="black", linewidth=1)
            if left - begin > 0.085 * widest or len(row.parts) == 1:
                axis.text((begin + left) / 2, y - 0.38, part.name, ha="center", va="bottom", fontsize=9)
            elif left - begin > 0.02 * widest:
                axis.text((begin + left) / 2, y - 0.38, str(number + 1), ha="center", va="bottom", fontsize=9)
        axis.text(left + 0.01 * widest, y, f"{left:.3g}\n(peak {row.peak / factor:.3g})", va="center", fontsize=9)
    text = (
        f"{unit} of a training step, {rows[0].images} images at once; the peak is below the sum: gradients come as activations go"
    )
    axis.set(xlabel=text, xlim=(0, 1.13 * widest))
    handles = [Patch(facecolor=colour, edgecolor="black", hatch=hatch, label=name) for name, colour, hatch in KINDS.values()]
    axis.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize=9)


def _annotate(axis: Axes, left: float, width: float, y: float, widest: float, short: str, long: str) -> None:
    """Write what fits into a bar: all of it, its number, or nothing."""
    longest = max(map(len, long.splitlines())) * 0.0098 * widest  # of letters of this size in a figure of this width
    text = long if width > longest else short.removeprefix("module ") if width > 0.012 * widest else ""
    if text:
        axis.text(left + width / 2, y, text, ha="center", va="center", fontsize=9, bbox=PAPER)


def _flop_unit(flops: float) -> tuple[str, float]:
    return ("GFLOP", 1e9) if flops >= 1e9 else ("MFLOP", 1e6)
