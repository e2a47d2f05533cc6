"""Strategies: the fields that all kinds have, what differs by phase, and those that are known by name (`strategies.yaml`)."""

from collections.abc import Mapping
from functools import cache, partial
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, create_model, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from incubate_lib.config.errors import nearest, refuse
from incubate_lib.config.members import PHASES, STRATEGIES
from incubate_lib.config.packaged import packaged
from incubate_lib.config.recipes import TrainingSettings
from incubate_lib.config.sections import Frozen, MATSettings, check_name

# `--set strategies.NAME.…` has the dots
StrategyName = Annotated[str, AfterValidator(partial(check_name, dots=False))]
Inner = Annotated[float, Field(gt=0, lt=1)]  # a true part of something


def _changes_of(model: type[Frozen]) -> type[Frozen]:
    """Return a model with the same fields, all optional. Ranges are checked when layers are merged, too."""
    fields = {name: (field.rebuild_annotation() | None, None) for name, field in model.model_fields.items()}
    return create_model(model.__name__.replace("Settings", "Changes"), __base__=Frozen, **fields)


TrainingChanges = _changes_of(TrainingSettings)  # what differs from `training`
MATChanges = _changes_of(MATSettings)


def _check_phase(name: str) -> str:
    """Refuse the name of what is no phase, or of one that has no settings of its own."""
    known = [kind for kind in PHASES if PHASES[kind].is_set_by_name]
    one = name.rpartition("-")
    module = f"all modules of a strategy have one recipe, that of phases.{one[0]}: they train together, or side by side"
    refuse(one[0] in known and one[2].isdigit(), module)
    refuse(name not in known, f"unknown phase; {nearest(name, known)}")
    return name


PhaseName = Annotated[str, AfterValidator(_check_phase)]
PhaseChanges = dict[PhaseName, TrainingChanges]  # training settings that differ by phase


def epochs_in(changes: PhaseChanges, phase: str) -> float | None:
    """Return the number of epochs that is set for a phase."""
    return changes[phase].epochs if phase in changes else None


class SmallImages(Frozen):
    """Phases that begin with small images."""

    # pixels; none: half of the network's, to a whole number of patches
    img_size: Annotated[int, Field(ge=1)] | None = None


class StrategySettings(Frozen):
    """A named way from nothing to a trained network. Each kind has fields of its own."""

    kind: str
    # Modular Adaptive Training, and what differs from the section `mat`; {} is MAT as it is there
    mat: MATChanges | None = None
    # in which it is; none: all but meta
    mat_phases: list[PhaseName] | None = Field(None, min_length=1)
    phases: PhaseChanges = {}

    is_cut: ClassVar[bool] = False  # needs a network that is divided into modules
    # trains the whole network at once, from random weights: what others are compared with, and have the epochs of
    is_whole: ClassVar[bool] = False
    can_be_matched: ClassVar[bool] = True  # whether another strategy may be as long as this one costs

    def get(self, field: str) -> Any:
        """Return a field that only some kinds have; None where this kind has it not."""
        return getattr(self, field, None)

    @property
    def trains(self) -> list[str]:
        """The phases that it trains, in order, by the names that settings have for them."""
        raise NotImplementedError

    @property
    def all_phases(self) -> list[str]:
        """All of its phases: those that it trains, and those that only put something together."""
        return self.trains

    @property
    def adapts(self) -> list[str]:
        """The phases that have Modular Adaptive Training, if it has that."""
        return self.mat_phases or self.trains

    @property
    def matched(self) -> list[str]:
        """The phases whose length follows from `match`, if there is one."""
        return self.trains[-1:]

    def has_epochs(self, general: PhaseChanges) -> bool:
        """Whether settings say how long its last phase is; `general` are those of all strategies."""
        return epochs_in(self.phases, self.all_phases[-1]) is not None

    def check_match(self, said: str, other: "StrategySettings", others: Mapping[str, "StrategySettings"]) -> None:
        """Refuse another strategy that this one cannot be matched to; `said` names the field and its value."""

    def check(self) -> None:
        """Refuse what does not go together, by fields of this kind."""

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_kind(cls, values: Any, handler: ModelWrapValidatorHandler["StrategySettings"]) -> "StrategySettings":
        if cls is not StrategySettings or not isinstance(values, dict):
            return handler(values)
        if "kind" not in values:
            return handler({})  # which says so
        kind = values["kind"]
        refuse(kind not in list(STRATEGIES), f"kind is {kind!r}; {nearest(str(kind), STRATEGIES)}")
        own, others = fields_of(kind), {field for other in STRATEGIES for field in fields_of(other)}
        unused = sorted(values.keys() & others - own)
        refuse(unused, f"{', '.join(unused)} has no meaning for kind {kind!r}")
        for name in values.keys() - own:
            refuse(True, f"unknown field {name!r}; {nearest(str(name), own)}")
        return STRATEGIES[kind].settings.model_validate(values)

    @model_validator(mode="after")
    def _used(self) -> "StrategySettings":
        kind, trained = f"kind {self.kind!r}", ", ".join(self.trains)
        refuse(self.mat is None and self.mat_phases is not None, "mat_phases has no meaning without mat: {}")
        wrong = ", ".join(sorted(set(self.mat_phases or ()) - set(self.trains)))
        refuse(wrong, f"mat_phases names {wrong}, but {kind} trains {trained}")
        unused = ", ".join(f"phases.{phase}" for phase in sorted(self.phases.keys() - set(self.trains)))
        refuse(unused, f"{unused} has no meaning for {kind} that trains {trained}")
        self.check()
        return self

    def is_as_named(self, name: str) -> bool:
        """Whether nothing of a known strategy was changed."""
        known = (table[name] for table in (KNOWN, uncut()) if name in table)
        return any(as_set(self) == as_set(StrategySettings.model_validate(one)) for one in known)


def fields_of(kind: str) -> set[str]:
    """Return the fields of a kind of strategy."""
    return set(STRATEGIES[kind].settings.model_fields)


def as_set(changes: Frozen) -> dict[str, Any]:
    """Return only what was set: in changes an explicit null is not the same as nothing."""
    return changes.model_dump(mode="json", exclude_unset=True)


KNOWN = packaged("strategies.yaml")


def is_cut(name: str) -> bool:
    """Whether a strategy is known by that name, and its network is taken apart."""
    return name in KNOWN and STRATEGIES[KNOWN[name]["kind"]].settings.is_cut


@cache
def uncut() -> dict[str, dict[str, Any]]:
    """Return the known strategies of networks that are not taken apart, without what they would be matched to."""
    of_modules = {name for name, strategy in KNOWN.items() if is_cut(name) or "match_on" in strategy}
    return {
        name: {field: value for field, value in strategy.items() if field != "match" or value not in of_modules}
        for name, strategy in KNOWN.items()
        if name not in of_modules
    }
