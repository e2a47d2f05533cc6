"""What a phase's step keeps in memory, counted on its network without computing anything."""

import torch

from incubate_lib.config import PhaseSettings
from incubate_lib.method.incubation import assemble, make_hybrid, make_imitation
from incubate_lib.method.partition import ViTModule
from incubate_lib.phases.networks import build_parts, build_target, model_shape
from incubate_lib.pipeline.graph import Node
from incubate_lib.training.memory import StepMemory, memory_by_part

_PARTS: dict = {}  # memory of parts that were gone through; sliders ask often


def kind_of(phase: str, module_index: int | None) -> str:
    """Return the name under which a phase's speed is measured; only those that incubate need an index."""
    if phase == "incubate":
        return f"incubate-{module_index}"
    return "meta" if phase == "meta" else "end_to_end"


def step_memory_of(node: Node, known: dict) -> StepMemory:
    """Return the memory of a phase's step; `known` keeps what its network's parts take."""
    phase = node.settings
    key = (kind_of(phase.phase, phase.module_index), phase.imitate, phase.model.img_size, bool(phase.training.ema))
    if key not in known:
        classes, shape = node.experiment.facts.num_classes, model_shape(phase.model)
        with torch.device("meta"):
            model = network_of(phase, classes, known)
        parts = memory_by_part(model, shape, precision=phase.precision, known=_PARTS)
        memory = sum(parts.values(), StepMemory())
        average = memory.weights if phase.training.ema else 0  # of the weights, kept beside them
        known[key] = memory + StepMemory(weights=average)
    return known[key]


def network_of(phase: PhaseSettings, classes: int, built: dict) -> torch.nn.Module:
    """Return what a phase trains; `built` keeps the modules, which several phases share.

    Without drop-path: it keeps nothing, but makes blocks differ that can be counted as one.
    """
    phase = phase.model_copy(update={"training": phase.training.model_copy(update={"drop_path": 0.0})})

    def parts(which: str, depths: list[int]) -> list[ViTModule]:
        key = (which, tuple(depths), phase.model.img_size)
        if key not in built:
            built[key] = build_parts(phase, which, classes)
        return built[key]

    if phase.phase == "incubate":
        i, targets = phase.module_index, parts("target", phase.target_depths)
        return (make_imitation if phase.imitate else make_hybrid)(parts("meta", phase.meta_depths), targets[i], i)
    if phase.phase == "meta":
        return assemble(parts("meta", phase.meta_depths)).requires_grad_(True)
    if phase.target_depths:
        return assemble(parts("target", phase.target_depths)).requires_grad_(True)
    return build_target(phase, classes)
