"""One phase's resolved settings, and what names it: the hash of all that its result depends on."""

import hashlib
import json
from typing import Any, Literal, get_args

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from incubate_lib.config.members import PHASES
from incubate_lib.config.packaged import packaged
from incubate_lib.config.recipes import TrainingSettings
from incubate_lib.config.sections import COMPOSED, DataSettings, Frozen, MATSettings, ModelSettings, Seed

TASK = "classification"
# of everything a phase's result depends on besides its settings; raise it when old results must not be reused
FORMAT = 3
SCENES_FORMAT = 1  # of generated scenes alone; 1 is in no identity
ALWAYS = packaged("identity.yaml")  # section → the fields that an identity has whatever they are


class PhaseSettings(Frozen):
    """Everything that one phase's result depends on, resolved."""

    phase: str  # which kind: a file in phases/kinds
    # what it is seeded and set as, if not as its kind: `incubate` for whatever learns in a hybrid
    group: str = ""
    seed: Seed
    task: str = TASK
    data: DataSettings
    model: ModelSettings
    target_depths: list[int]
    meta_depths: list[int]
    cuts: list[str] = []  # the layers behind which modules end, where the blocks of each do not say it
    options: dict[str, Any] = {}  # of its kind, which has checked them
    precision: Literal["float32", "bfloat16"] = "float32"
    training: TrainingSettings | None = None  # none for assemble, and for a meta model that is read from a file
    mat: MATSettings | None = None  # with the kind of units resolved
    inputs: dict[str, str] = {}  # hashes of the phases it starts from; "weights": of a file
    format: int = FORMAT

    @property
    def seeded_as(self) -> str:
        return self.group or self.phase

    @property
    def module_index(self) -> int | None:
        """The module that learns, 0-based, where it is one."""
        return self.options.get("module_index")

    def digest(self) -> str:
        """Return the hash of all that decides the result and its record."""
        return digest(identity(self))


def identity(phase: PhaseSettings) -> dict[str, Any]:
    """Return what a phase is, for its hash.

    What is trained stays good when settings get new fields: beyond those of identity.yaml, one enters only where it has
    another value than its default.
    """
    values = as_ever(phase, "phase")
    for section in ("data", "model", "training", "mat"):
        if getattr(phase, section) is not None:
            values[section] = as_ever(getattr(phase, section), section)
    always = {"module_index": None, "start": None, "inherit_stem": False, "inherit_head": False}
    values |= {"phase": phase.seeded_as} | always | _given(values.pop("options", {}))
    values.pop("group", None)
    if phase.phase != phase.seeded_as and not values.get("imitate"):  # whose identity never said its kind otherwise
        values["kind"] = phase.phase
    if phase.data.source in COMPOSED and SCENES_FORMAT > 1:
        values["scenes"] = SCENES_FORMAT
    return values


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None and value is not False}


def of_identity(values: dict[str, Any]) -> PhaseSettings:
    """Return the phase that has this identity; ValidationError if it is none of today's settings."""
    kind = values.get("kind") or ("imitate" if values.get("imitate") else None)
    values = {name: value for name, value in values.items() if name not in ("kind", "scenes")}
    options = _given({name: value for name, value in values.items() if name not in PhaseSettings.model_fields})
    own = as_given(PhaseSettings, {name: value for name, value in values.items() if name in PhaseSettings.model_fields})
    if kind:
        own |= {"phase": kind, "group": own["phase"]}
    kind = PHASES[own["phase"]] if "phase" in own else None
    own["options"] = kind.options.model_validate(options).model_dump(mode="json") if kind else options
    return PhaseSettings.model_validate_json(json.dumps(own))


def as_given(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """Return what must be given to get these values: records hold defaults, too, which are refused where they mean nothing."""
    kept = {}
    for name, value in values.items():
        field = model.model_fields.get(name)  # none: an unknown name, which validation will report
        default = field.get_default(call_default_factory=True) if field and not field.is_required() else ...
        if default is not ... and value == to_jsonable_python(default):
            continue
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        kept[name] = as_given(inner, value) if inner and isinstance(value, dict) else value
    return kept


def as_ever(settings: Frozen, section: str) -> dict[str, Any]:
    """Return the fields of a section that identities always had, and those among the later ones that are set."""
    values, fields = settings.model_dump(mode="json"), type(settings).model_fields
    return {name: v for name, v in values.items() if name in ALWAYS[section] or v != fields[name].get_default()}


def digest(value: Any) -> str:
    """Return 12 hex digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
