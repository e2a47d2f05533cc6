"""What a phase's step keeps in memory, counted on its network without computing anything."""

from collections.abc import Sequence

from torch import nn

from incubate_lib.data.schedule import micro_batches
from incubate_lib.method.network import Partition
from incubate_lib.phases.networks import model_shape
from incubate_lib.phases.recipes import networks_of
from incubate_lib.pipeline.graph import Node
from incubate_lib.training.memory import StepMemory, memory_by_part

_PARTS: dict = {}  # memory of parts that were gone through; sliders ask often


def peak_bytes(node: Node, known: dict) -> int:
    """Return the peak of a phase's step on each of its devices; 0 where nothing is trained. `known`: as below."""
    if not (node.settings.training and node.settings.training.epochs):
        return 0
    recipe, devices = node.settings.training, node.experiment.settings.machine.team_size
    number, samples = micro_batches(recipe.batch_size, recipe.micro_batch, devices)
    # where devices train together, the buckets by which gradients are averaged are there all the time
    return step_memory_of(node, known).peak(samples, adds_up=number > 1 or devices > 1)


def step_memory_of(node: Node, known: dict) -> StepMemory:
    """Return the memory of a phase's step; `known` keeps networks and what they take, which several phases share."""
    phase, size = node.settings, node.settings.model.img_size
    shared = (bool(phase.training.ema), phase.training.optimizer)
    key = (node.kind.cost(phase.model, phase.options), size, phase.module_index, *shared)
    if key not in known:
        if size not in known:
            settings = node.experiment.settings
            settings = settings.model_copy(update={"model": settings.model.model_copy(update={"img_size": size})})
            known[size] = networks_of(settings, (node.facts.target_depths, node.facts.meta_depths), node.facts.outputs)

        def count(network: nn.Module, partition: Partition | None, shape: Sequence[int] | None = None) -> list[StepMemory]:
            how = {"precision": phase.precision, "optimizer": phase.training.optimizer, "known": _PARTS}
            return memory_by_part(network, shape or model_shape(phase.model), partition, **how)

        memory = node.kind.memory(known[size], phase.module_index, count, phase.options)
        average = memory.weights if phase.training.ema else 0  # of the weights, kept beside them
        known[key] = memory + StepMemory(weights=average)
    return known[key]
