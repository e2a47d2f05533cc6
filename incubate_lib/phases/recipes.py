"""The recipe of each phase: the model that it trains, from what it starts, and which part of it is the result."""

from pathlib import Path

from torch import nn

from incubate_lib.config import PhaseSettings
from incubate_lib.method.incubation import assemble, make_hybrid, make_imitation, start_module
from incubate_lib.method.partition import ViTModule
from incubate_lib.phases.networks import at_size, build_parts, build_target
from incubate_lib.phases.weights import load_into
from incubate_lib.training.runs import PhaseFolder

Inputs = dict[str, Path]  # folders of the phases that a phase starts from; "weights": a folder or file of weights


def prepare(s: PhaseSettings, inputs: Inputs, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Return the model that the phase trains (ready: frozen parts are frozen) and the part of it that is the result.

    Without inputs, where only costs are counted, it starts from what was freshly initialised.
    """
    if s.phase == "incubate":
        return _incubate(s, inputs, num_classes)
    if s.phase == "assemble":
        model = _assemble(s, inputs, num_classes)
    else:
        model = assemble(build_parts(s, "meta", num_classes)) if s.phase == "meta" else build_target(s, num_classes)
        if "weights" in inputs:
            load_into(model, inputs["weights"], s.inputs["weights"])
        elif inputs:
            [before] = inputs.values()
            weights = PhaseFolder(before).load_weights()
            model.load_state_dict(at_size(weights, model) if "small_images" in inputs else weights)
    return model, model


def _meta_modules(s: PhaseSettings, inputs: Inputs, num_classes: int) -> list[ViTModule]:
    """Return the modules of the meta model, trained if it is among the inputs."""
    meta = build_parts(s, "meta", num_classes)
    if inputs:
        assemble(meta).load_state_dict(PhaseFolder(inputs["meta"]).load_weights())
    return meta


def _incubate(s: PhaseSettings, inputs: Inputs, num_classes: int) -> tuple[nn.Module, nn.Module]:
    meta = _meta_modules(s, inputs, num_classes)
    target = build_parts(s, "target", num_classes)[s.module_index]
    start_module(target, meta[s.module_index], s.start, s.inherit_stem, s.inherit_head)
    return (make_imitation if s.imitate else make_hybrid)(meta, target, s.module_index), target


def _assemble(s: PhaseSettings, inputs: Inputs, num_classes: int) -> nn.Module:
    """Put incubated modules together; where nothing was incubated, modules as they start."""
    modules = build_parts(s, "target", num_classes)
    if "meta" in inputs:
        for module, small in zip(modules, _meta_modules(s, inputs, num_classes), strict=True):
            start_module(module, small, s.start, s.inherit_stem, s.inherit_head)
    elif inputs:
        for module in modules:
            module.load_state_dict(PhaseFolder(inputs[f"module-{module.index}"]).load_weights())
    return assemble(modules)


def load_trained(s: PhaseSettings, folder: PhaseFolder, num_classes: int) -> nn.Module:
    """Return the finished network of a meta, assemble, finetune or end_to_end phase as an ordinary timm model."""
    model = assemble(build_parts(s, "meta", num_classes)) if s.phase == "meta" else build_target(s, num_classes)
    model.load_state_dict(folder.load_weights())
    return model.eval()
