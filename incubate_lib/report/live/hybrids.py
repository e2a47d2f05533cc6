"""The hybrid viewer: what is frozen and what trains while one module is incubated, and what each part costs.

FLOPs of an image are counted exactly (`training.costs`), bytes of a training step as `training.memory` counts them; both with
the very hybrid that the phase trains, built on the meta device, where nothing is computed and no memory taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from torch import nn

from incubate_lib.config import Settings, SettingsError
from incubate_lib.config.members import PHASES, TASKS
from incubate_lib.data.schedule import micro_batches
from incubate_lib.method.network import has_layer
from incubate_lib.phases.recipes import networks_of
from incubate_lib.pipeline.graph import Node, Plan, closure
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.style import PAPER, Figure, filling, trained_and_frozen
from incubate_lib.report.widgets import or_sentence, with_picture, with_twin
from incubate_lib.report.words import LOOKS, label
from incubate_lib.tasks import Task
from incubate_lib.training.memory import StepMemory, memory_by_part

KINDS = LOOKS["memory"]


@dataclass(frozen=True)
class Part:
    """One module of a hybrid, or a whole network."""

    name: str
    blocks: int
    trained: bool
    work: str  # what is computed of it in a step
    flops: int  # of one image, forward and backward as far as it is needed
    memory: StepMemory

    def bytes(self, images: int) -> dict[str, int]:
        """Return the bytes of each kind of memory with so many images at once; weights cast to bfloat16 count as activations."""
        activations = self.memory.casts + images * self.memory.activations
        return {kind: getattr(self.memory, kind) for kind in KINDS} | {"activations": activations}


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


class Hybrids:
    """The hybrids of a strategy; parts that they share are counted once. SettingsError if it incubates no modules."""

    def __init__(self, given: Settings | Plan, strategy: str) -> None:
        made = given if isinstance(given, Plan) else plan(given, [strategy])
        finals = [node for (name, _), node in made.finals.items() if name == strategy]
        if not finals:
            there = ", ".join(dict.fromkeys(name for name, _ in made.finals)) or "none"
            raise SettingsError(f"strategy {strategy} is not part of what was asked for, which is: {there}")
        every = [(node, alone) for node in closure(finals[:1]) for alone in node.kind.alone(node.settings)]
        nodes = [node for node, alone in every if alone.module_index is not None]  # one as often as modules learn in it
        if not nodes:
            raise SettingsError(f"strategy {strategy} incubates no modules, so it has no hybrids")
        self.strategy, self.nodes = strategy, sorted(nodes, key=lambda node: node.settings.module_index or 0)
        first = self.nodes[0]
        depths = first.facts.target_depths, first.facts.meta_depths
        settings = first.experiment.settings.model_copy(update={"model": first.settings.model})  # of small images, maybe
        self._networks, self._memory = networks_of(settings, depths, first.facts.outputs), {}

    def costs(self, index: int) -> Costs:
        """Return what the parts of the hybrid of module `index` (0-based) cost while it is incubated.

        The sum of the FLOPs is that of the phase in the facts. SettingsError if there is no such module.
        """
        if not 0 <= index < len(self.nodes):
            raise SettingsError(f"index is {index}; this strategy has the modules 0 … {len(self.nodes) - 1}")
        node = self.nodes[index]
        flops = node.kind.count_modules(self._networks, index)
        network, partition = node.kind.trains(self._networks, index)
        memory = self._memory_of(node, network)
        before, inside, behind = node.kind.work
        works = [before] * index + [inside] + [behind] * (len(self.nodes) - index - 1)
        kept = [[b for b in partition.blocks(i) if has_layer(network, b)] for i in range(len(works))]
        parts = [Part(f"module {i + 1}", len(kept[i]), i == index, works[i], flops[i], memory[i]) for i in range(len(works))]
        return Costs(f"module {index + 1} of {len(self.nodes)} incubates", parts, _at_once(node))

    def whole(self) -> Costs:
        """Return what the network costs as end-to-end training has it."""
        node = self.nodes[0]
        network, partition = PHASES["end_to_end"].trains(self._networks, None)
        flops, memory = self._networks.counts.per_image(network, partition), self._memory_of(node, network)
        blocks, memory = len(partition.chain.blocks), sum(memory, StepMemory())
        part = Part("whole network", blocks, True, "forward, all gradients", flops, memory)
        return Costs("end to end", [part], _at_once(node))

    def _memory_of(self, node: Node, network: nn.Module) -> list[StepMemory]:
        shape, partition = self._networks.counts.image_shape, self._networks.partition
        how = {"precision": node.settings.precision, "optimizer": node.settings.training.optimizer}
        return memory_by_part(network, shape, partition, **how, known=self._memory)

    def figure(self, index: int | None = None) -> Figure:
        """Draw the hybrid of module `index` (0-based), or those of all modules, over the network as end-to-end training has it,
        to scale: FLOPs, bytes. SettingsError if there is no such module.
        """
        indices = range(len(self.nodes)) if index is None else [index]
        rows = [*map(self.costs, indices), self.whole()]
        figure = Figure(figsize=(11, 2.3 + 1.25 * len(rows)), layout="constrained")
        figure.suptitle(label(self.strategy), fontsize=11)
        for axis, bars in zip(figure.subplots(2, 1), (_flop_bars, _memory_bars), strict=True):
            bars(axis, rows, TASKS[self.nodes[0].settings.task])
            axis.set_yticks(range(len(rows)), [row.title for row in rows], fontsize=10)
            axis.set_ylim(len(rows) - 0.45, -0.55)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(left=False)
        return figure


def _at_once(node: Node) -> int:
    """Return the images that one device has at once."""
    s, team = node.settings, node.machine.team_size
    return micro_batches(s.training.batch_size, s.training.micro_batch, team)[1]


@or_sentence
def hybrid_viewer(given: Settings | Plan, strategy: str) -> Any:
    """Return a slider over the modules that switches the picture of one hybrid; its twin shows all.

    What cannot be shown becomes a sentence in its place.
    """
    hybrids = Hybrids(given, strategy)
    options = [(f"module {i + 1} of {len(hybrids.nodes)}", i) for i in range(len(hybrids.nodes))]

    def slider() -> ipywidgets.Widget:
        menu = ipywidgets.SelectionSlider(options=options, description="module", layout={"width": "32rem"})
        return with_picture(menu, hybrids.figure)

    return with_twin(slider, hybrids.figure)


# -- drawing: a bar a network, the last of which is the whole one -------------------------------------------------------------


def _flop_bars(axis: Axes, rows: Sequence[Costs], task: Task) -> None:
    unit, factor = ("GFLOP", 1e9) if rows[-1].flops >= 1e9 else ("MFLOP", 1e6)
    widest = max(row.flops for row in rows) / factor
    for y, row in enumerate(rows):
        left = 0.0
        for part in row.parts:
            width = part.flops / factor
            axis.barh(y, width, 0.62, left, linewidth=1, **filling(part.trained))
            words = f"{part.name}, {part.blocks} blocks\n{part.work}"
            # of letters of this size in a figure of this width; what has no room is left out
            if width <= max(map(len, words.splitlines())) * 0.0098 * widest:
                words = part.name.removeprefix("module ") if width > 0.012 * widest else ""
            if words:
                axis.text(left + width / 2, y, words, ha="center", va="center", fontsize=9, bbox=PAPER)
            left += width
        share = "" if row is rows[-1] else f" ({row.flops / rows[-1].flops:.0%})"
        axis.text(left + 0.01 * widest, y, f"{row.flops / factor:.3g}{share}", va="center", fontsize=10)
    _explain(axis, f"{unit} of one {task.sample}, forward and backward", widest, trained_and_frozen())


def _memory_bars(axis: Axes, rows: Sequence[Costs], task: Task) -> None:
    largest = max(sum(sum(part.bytes(row.images).values()) for part in row.parts) for row in rows)
    unit, factor = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    widest = largest / factor
    for y, row in enumerate(rows):
        left = 0.0
        for part in row.parts:
            begin = left
            for kind, size in part.bytes(row.images).items():
                width = size / factor
                axis.barh(y, width, 0.5, left, edgecolor="black", linewidth=0.3, **KINDS[kind])
                left += width
            bracket = [y - 0.31, y - 0.36, y - 0.36, y - 0.31]
            axis.plot([begin, begin, left, left], bracket, color="black", linewidth=1)
            name = part.name
            if left - begin <= 0.085 * widest and len(row.parts) > 1:
                name = name.removeprefix("module ") if left - begin > 0.02 * widest else ""
            axis.text((begin + left) / 2, y - 0.38, name, ha="center", va="bottom", fontsize=9)
        words = f"{left:.3g}\n(peak {row.peak / factor:.3g})"
        axis.text(left + 0.01 * widest, y, words, va="center", fontsize=9)
    words = f"{unit} of a training step, {rows[0].images} {task.samples} at once"
    words += "; the peak is below the sum: gradients come as activations go"
    _explain(axis, words, widest, [Patch(edgecolor="black", **look) for look in KINDS.values()])


def _explain(axis: Axes, words: str, widest: float, handles: Sequence[Patch]) -> None:
    axis.set(xlabel=words, xlim=(0, 1.13 * widest))
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1), "frameon": False}
    axis.legend(handles=handles, ncols=len(handles), fontsize=9, **above)
