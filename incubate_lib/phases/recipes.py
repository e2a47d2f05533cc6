"""The networks of a phase: what it trains, what that is made of, and how a trained one is read again."""

from torch import nn

from incubate_lib.config import PhaseSettings
from incubate_lib.config.members import PHASES
from incubate_lib.method.incubation import start_module
from incubate_lib.phases.kinds import Inputs
from incubate_lib.phases.networks import build_meta, build_target, in_target_names, partition_of
from incubate_lib.training.runs import PhaseFolder


def prepare(s: PhaseSettings, inputs: Inputs, num_classes: int) -> nn.Module:
    """Return the model that the phase trains (ready: frozen parts are frozen).

    Without inputs, where only costs are counted, it starts from what was freshly initialised.
    """
    return PHASES[s.phase].build(s, inputs, num_classes)


def meta_and_target(s: PhaseSettings, inputs: Inputs, num_classes: int) -> tuple[nn.Module, nn.Module]:
    """Return the meta model under the target's names, trained if it is among the inputs, and the target network."""
    meta, target = build_meta(s, num_classes), build_target(s, num_classes)
    if inputs:
        meta.load_state_dict(PhaseFolder(inputs["meta"]).load_weights())
    return in_target_names(s, meta, target), target


def start(s: PhaseSettings, meta: nn.Module, target: nn.Module, index: int) -> None:
    """Give target module `index` the start that the phase's options say, in place."""
    how = {field: s.options[field] for field in ("inherit_stem", "inherit_head")}
    start_module(target, meta, partition_of(s), index, s.options["start"], **how)


def load_trained(s: PhaseSettings, folder: PhaseFolder, num_classes: int) -> nn.Module:
    """Return the finished network of a phase that trains a whole one, or assembles it, as an ordinary timm model."""
    model = (build_meta if s.phase == "meta" else build_target)(s, num_classes)
    model.load_state_dict(folder.load_weights())
    return model.eval()
