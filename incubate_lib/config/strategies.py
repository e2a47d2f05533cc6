"""Strategies: the fields of one, what differs by phase, and those that are known by name (`strategies.yaml`)."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, create_model, model_validator
from ruamel.yaml import YAML

from incubate_lib.config.errors import refuse
from incubate_lib.config.sections import Frozen, MATSettings, TrainingSettings, check_name

# `--set strategies.NAME.…` has the dots
StrategyName = Annotated[str, AfterValidator(partial(check_name, dots=False))]
PartPhase = Literal["meta", "incubate", "finetune"]  # of Deep Incubation
Start = Literal["random", "stack", "identity"]  # of each target module
Inner = Annotated[float, Field(gt=0, lt=1)]  # a true part of something


def _changes_of(model: type[Frozen]) -> type[Frozen]:
    """Return a model with the same fields, all optional. Ranges are checked when layers are merged, too."""
    fields = {name: (field.rebuild_annotation() | None, None) for name, field in model.model_fields.items()}
    return create_model(model.__name__.replace("Settings", "Changes"), __base__=Frozen, **fields)


TrainingChanges = _changes_of(TrainingSettings)  # what differs from `training`
MATChanges = _changes_of(MATSettings)


class PhaseChanges(Frozen):
    """Training settings that differ by phase."""

    meta: TrainingChanges = TrainingChanges()
    incubate: TrainingChanges = TrainingChanges()
    finetune: TrainingChanges = TrainingChanges()
    end_to_end: TrainingChanges = TrainingChanges()


class LowResolution(Frozen):
    """Small images first: cheaper updates at the beginning (FixRes, arXiv 1906.06423, and progressive resizing)."""

    # pixels; none: half of the network's, to a whole number of patches
    img_size: Annotated[int, Field(ge=1)] | None = None
    share: Inner = 0.5  # of the training FLOPs; the rest is spent at the network's own size


# fields that have a meaning for some kinds only, by kind
OWN = {
    "end_to_end": {"match", "match_on", "budget", "low_resolution"},
    "finetune": {"weights"},
    "deep_incubation": {"start", "inherit_stem", "inherit_head", "incubate", "weights"}
    | {"match", "budget", "shares", "lr_scale", "warmup_share"},
}


class StrategySettings(Frozen):
    """A named way from nothing to a trained network."""

    kind: Literal["end_to_end", "deep_incubation", "finetune"]
    start: Start = "random"
    inherit_stem: bool = False  # module 1 starts with the meta model's embedding
    inherit_head: bool = False  # module K starts with the meta model's norm and head
    weights: str | None = None  # deep_incubation: a trained meta model, finetune: the network; relative to data/
    # how modules learn: from labels through the hybrid (the paper), by imitating the meta module's features, or not at all:
    # they keep their starting weights
    incubate: Literal["labels", "features", "none"] = "labels"
    # as long as costs the training FLOPs of that one; end_to_end of an end_to_end: as many epochs
    match: str | None = None
    # critical_path: what K workers can do together in that one's time
    match_on: Literal["flops", "critical_path"] = "flops"
    budget: Annotated[float, Field(gt=0)] = 1.0  # share of what is matched that it may cost
    shares: dict[Literal["meta", "incubate"], Inner] | None = None  # of that budget; fine-tuning has the rest
    # deep_incubation: what its phases have instead of training.lr and training.warmup_epochs, where nothing is set for a
    # phase itself (phases.<phase>, here or for all strategies): times training.lr, and of the phase's own epochs. Phases
    # that it does not train are passed over.
    lr_scale: dict[PartPhase, Annotated[float, Field(gt=0)]] | None = None
    warmup_share: dict[PartPhase, Annotated[float, Field(ge=0, le=1)]] | None = None
    low_resolution: LowResolution | None = None  # end_to_end: begin with small images
    # Modular Adaptive Training, and what differs from the section `mat`; {} is MAT as it is there
    mat: MATChanges | None = None
    # in which it is; none: all but meta
    mat_phases: list[Literal[PartPhase, "end_to_end"]] | None = Field(None, min_length=1)
    phases: PhaseChanges = PhaseChanges()

    @property
    def needs_meta(self) -> bool:
        """Whether there is a meta model."""
        starts = self.start != "random" or self.inherit_stem or self.inherit_head
        return self.kind == "deep_incubation" and (self.incubate != "none" or starts)

    @property
    def trains(self) -> list[str]:
        """The phases that it trains, in order."""
        if self.kind == "end_to_end":
            return ["end_to_end", "finetune"] if self.low_resolution else ["end_to_end"]
        meta = ["meta"] if self.needs_meta and not self.weights else []
        incubate = ["incubate"] if self.kind == "deep_incubation" and self.incubate != "none" else []
        return [*meta, *incubate, "finetune"]

    @model_validator(mode="after")
    def _used(self) -> "StrategySettings":
        given, trained, cut = self.model_fields_set, ", ".join(self.trains), self.kind == "deep_incubation"
        kind, read = f"kind {self.kind!r}", self.weights and cut
        refuse(self.mat is None and self.mat_phases is not None, "mat_phases has no meaning without mat: {}")
        wrong = ", ".join(sorted(set(self.mat_phases or ()) - set(self.trains)))
        refuse(wrong, f"mat_phases names {wrong}, but {kind} trains {trained}")
        unused = (set().union(*OWN.values()) - OWN[self.kind]) & given
        unused |= {f"phases.{phase}" for phase in self.phases.model_fields_set - set(self.trains)}
        where = kind + " with weights" * bool(read)
        where += f" that trains {trained}" if self.incubate == "none" else ""
        refuse(unused, f"{', '.join(sorted(unused))} has no meaning for {where}")
        needed = "weights: the folder or .safetensors file of the network to start from"
        refuse(self.kind == "finetune" and not self.weights, f"{kind} needs {needed}")
        unmatched = not self.match and {"shares", "budget", "match_on"} & given
        refuse(unmatched, "shares, budget and match_on have no meaning without match")
        wrong = ", ".join(sorted(set(self.shares or ()) - set(self.trains)))
        refuse(wrong, f"shares names {wrong}, but this strategy trains {trained}")
        both = self.shares and self.phases.finetune.epochs is not None
        refuse(both, "shares leave the rest to fine-tuning; do not set phases.finetune.epochs besides")
        refuse(read and not self.needs_meta, "weights are those of a meta model, which this strategy does without")
        spent = sum((self.shares or {}).values())
        refuse(spent >= 1, f"shares add up to {spent:g}, which leaves nothing for fine-tuning")
        refuse(self.mat is not None and self.low_resolution, "mat and low_resolution do not go together")
        return self

    def is_as_named(self, name: str) -> bool:
        """Whether nothing of a known strategy was changed."""
        known = (table[name] for table in (STRATEGIES, UNCUT) if name in table)
        return any(as_set(self) == as_set(StrategySettings.model_validate(one)) for one in known)


def as_set(changes: Frozen) -> dict[str, Any]:
    """Return only what was set: in changes an explicit null is not the same as nothing."""
    return changes.model_dump(mode="json", exclude_unset=True)


def packaged(name: str) -> dict[str, Any]:
    """Return a table that stands beside this module."""
    return YAML(typ="safe", pure=True).load(Path(__file__).with_name(name))


STRATEGIES = packaged("strategies.yaml")
UNCUT = {  # of networks that are not taken apart
    name: {field: value for field, value in strategy.items() if value != "deep_incubation"}
    for name, strategy in STRATEGIES.items()
    if strategy["kind"] == "end_to_end" and "match_on" not in strategy
}
