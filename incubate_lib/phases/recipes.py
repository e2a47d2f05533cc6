"""The networks of a phase: what it trains, what that is made of, and how a trained one is read again."""

from collections.abc import Sequence

import torch
from torch import nn

from incubate_lib.config import PhaseSettings, Settings
from incubate_lib.config.members import PHASES
from incubate_lib.method.incubation import start_module
from incubate_lib.phases.kinds import Inputs
from incubate_lib.phases.networks import (
    build_meta,
    build_target,
    in_target_names,
    meta_partition_of,
    model_shape,
    partition_of,
)
from incubate_lib.training.costs import Counted, FlopCounts
from incubate_lib.training.runs import PhaseFolder


def prepare(s: PhaseSettings, inputs: Inputs, outputs: int) -> nn.Module:
    """Return the model that the phase trains (ready: frozen parts are frozen).

    Without inputs, where only costs are counted, it starts from what was freshly initialised.
    """
    return PHASES[s.phase].build(s, inputs, outputs)


def networks_of(settings: Settings, depths: tuple[Sequence[int], Sequence[int]], outputs: int) -> Counted:
    """Return the networks of which kinds of phases count what they cost, on the meta device and without drop-path.

    `depths` are the blocks of the target and the meta modules; none: the network is not cut.
    """
    phase = PhaseSettings(
        phase="meta", seed=0, task=settings.task, data=settings.data, model=settings.model, target_depths=depths[0],
        meta_depths=depths[1], cuts=(settings.partition and settings.partition.cuts) or [],
    )  # fmt: skip
    counts = FlopCounts(model_shape(settings.model))
    with torch.device("meta"):
        target = build_target(phase, outputs)
        if not depths[0]:
            return Counted(counts, target)
        meta = build_meta(phase, outputs)
        partitions = partition_of(phase), meta_partition_of(phase)
        return Counted(counts, target, *partitions, meta, in_target_names(phase, meta, target))


def meta_and_target(s: PhaseSettings, inputs: Inputs, outputs: int) -> tuple[nn.Module, nn.Module]:
    """Return the meta model under the target's names, trained if it is among the inputs, and the target network."""
    meta, target = build_meta(s, outputs), build_target(s, outputs)
    if inputs:
        meta.load_state_dict(PhaseFolder(inputs["meta"]).load_weights())
    return in_target_names(s, meta, target), target


def start(s: PhaseSettings, meta: nn.Module, target: nn.Module, index: int) -> None:
    """Give target module `index` the start that the phase's options say, in place."""
    how = {field: s.options[field] for field in ("inherit_stem", "inherit_head")}
    start_module(target, meta, partition_of(s), index, s.options["start"], **how)


def load_trained(s: PhaseSettings, folder: PhaseFolder, outputs: int) -> nn.Module:
    """Return the finished network of a phase that trains a whole one, or assembles it, as an ordinary timm model."""
    model = PHASES[s.phase].finished(s, outputs)
    model.load_state_dict(folder.load_weights())
    return model.eval()
