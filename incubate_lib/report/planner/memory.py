"""What a phase's step keeps in memory, counted on its network without computing anything."""

import torch

from incubate_lib.config import PhaseSettings
from incubate_lib.method.incubation import Hybrid, Imitation
from incubate_lib.method.network import Partition
from incubate_lib.phases.networks import (
    build_meta,
    build_target,
    in_target_names,
    meta_partition_of,
    model_shape,
    partition_of,
)
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
    key = (kind_of(phase.seeded_as, phase.module_index), phase.phase, phase.model.img_size, bool(phase.training.ema))
    if key not in known:
        classes, shape = node.facts.num_classes, model_shape(phase.model)
        with torch.device("meta"):
            model, partition = network_of(phase, classes, known)
        parts = memory_by_part(model, shape, partition, precision=phase.precision, known=_PARTS)
        memory = sum(parts, StepMemory())
        average = memory.weights if phase.training.ema else 0  # of the weights, kept beside them
        known[key] = memory + StepMemory(weights=average)
    return known[key]


def network_of(phase: PhaseSettings, classes: int, built: dict) -> tuple[torch.nn.Module, Partition | None]:
    """Return what a phase trains, and how it is cut; `built` keeps the networks, which several phases share.

    Without drop-path, which keeps nothing.
    """
    phase = phase.model_copy(update={"training": phase.training.model_copy(update={"drop_path": 0.0})})

    def network(which: str) -> torch.nn.Module:
        key = (which, *phase.target_depths, *phase.meta_depths, phase.model.img_size)
        if key not in built:
            built[key] = (build_meta if which == "meta" else build_target)(phase, classes)
        return built[key].requires_grad_(True)

    if not phase.target_depths:
        return network("target"), None
    if phase.phase == "meta":
        return network("meta"), meta_partition_of(phase)
    partition = partition_of(phase)
    if phase.seeded_as == "incubate":
        made_of = in_target_names(phase, network("meta"), network("target")), network("target")
        return (Imitation if phase.phase == "imitate" else Hybrid)(*made_of, partition, phase.module_index), partition
    return network("target"), partition
