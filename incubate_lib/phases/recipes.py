"""The recipe of each phase: the model that it trains, from what it starts, and which part of it is the result."""

from pathlib import Path

from torch import Tensor, nn

from incubate_lib.config import PhaseSettings
from incubate_lib.method.incubation import Hybrid, Imitation, assemble, start_module
from incubate_lib.method.network import counted_through
from incubate_lib.phases.networks import at_size, build_meta, build_target, in_target_names, partition_of
from incubate_lib.phases.weights import load_into
from incubate_lib.training.runs import PhaseFolder

Inputs = dict[str, Path]  # folders of the phases that a phase starts from; "weights": a folder or file of weights


def prepare(s: PhaseSettings, inputs: Inputs, num_classes: int) -> nn.Module:
    """Return the model that the phase trains (ready: frozen parts are frozen).

    Without inputs, where only costs are counted, it starts from what was freshly initialised.
    """
    if s.phase in ("incubate", "assemble"):
        return (_incubate if s.phase == "incubate" else _assemble)(s, inputs, num_classes)
    model = (build_meta if s.phase == "meta" else build_target)(s, num_classes)
    if "weights" in inputs:
        load_into(model, inputs["weights"], s.inputs["weights"])
    elif inputs:
        [before] = inputs.values()
        weights = PhaseFolder(before).load_weights()
        model.load_state_dict(at_size(weights, model) if "small_images" in inputs else weights)
    return model


def result(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a phase leaves behind: all of its model, or of a hybrid the module that learned."""
    return model.module_state() if isinstance(model, Hybrid) else model.state_dict()


def networks(s: PhaseSettings, inputs: Inputs, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Return the meta model under the target's names, trained if it is among the inputs, and the target network."""
    meta, target = build_meta(s, num_classes), build_target(s, num_classes)
    if inputs:
        meta.load_state_dict(PhaseFolder(inputs["meta"]).load_weights())
    return in_target_names(s, meta, target), target


def _start(s: PhaseSettings, meta: nn.Module, target: nn.Module, index: int) -> None:
    stem, head = s.inherit_stem, s.inherit_head
    start_module(target, meta, partition_of(s), index, s.start, inherit_stem=stem, inherit_head=head)


def _incubate(s: PhaseSettings, inputs: Inputs, num_classes: int) -> Hybrid:
    meta, target = networks(s, inputs, num_classes)
    _start(s, meta, target, s.module_index)
    return (Imitation if s.imitate else Hybrid)(meta, target, partition_of(s), s.module_index)


def _assemble(s: PhaseSettings, inputs: Inputs, num_classes: int) -> nn.Module:
    """Put incubated modules together; where nothing was incubated, modules as they start."""
    if "meta" in inputs:
        meta, target = networks(s, inputs, num_classes)
        for index in range(len(s.target_depths)):
            _start(s, meta, target, index)
        return target
    target = build_target(s, num_classes)
    if not inputs:
        return target
    partition = partition_of(s)
    trained = [PhaseFolder(inputs[f"module-{i}"]).load_weights() for i in range(partition.num_modules)]
    return assemble(target, partition, [counted_through(partition, *module) for module in enumerate(trained)])


def load_trained(s: PhaseSettings, folder: PhaseFolder, num_classes: int) -> nn.Module:
    """Return the finished network of a meta, assemble, finetune or end_to_end phase as an ordinary timm model."""
    model = (build_meta if s.phase == "meta" else build_target)(s, num_classes)
    model.load_state_dict(folder.load_weights())
    return model.eval()
