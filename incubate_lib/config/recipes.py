"""What a `recipe` stands for: fields of `training`, which settings have in place of its name."""

from contextlib import suppress
from typing import Any

from incubate_lib.config.members import PHASES
from incubate_lib.config.packaged import packaged
from incubate_lib.config.sections import TrainingSettings

RELEASED = packaged("recipes.yaml")  # phase, or every → field → value


def fields_of(recipe: str, phase: str) -> dict[str, Any]:
    """Return the fields that a recipe, ours or released, has in a phase."""
    ours = {name: TrainingSettings.model_fields[name].default for fields in RELEASED.values() for name in fields}
    return ours | (RELEASED["every"] | RELEASED.get(phase, {}) if recipe == "released" else {})


def expanded(settings: dict[str, Any]) -> dict[str, Any]:
    """Return raw settings with the fields of each `recipe` in its place; what is set besides, for all phases or one, stays.

    So results and records know fields only, and a recipe by its name is the same as its fields one by one.
    """
    with suppress(TypeError, ValueError):  # of settings of another shape, which validation tells
        training, phases = dict(settings.get("training") or {}), dict(settings.get("phases") or {})
        strategies, given = dict(settings.get("strategies") or {}), set(training)
        if training.get("recipe") == "released":
            named = [phase for phase in PHASES if PHASES[phase].is_set_by_name]
            phases |= {phase: {"recipe": "released"} | dict(phases.get(phase) or {}) for phase in named}
        if training.get("recipe") in ("ours", "released"):
            del training["recipe"]
        for name, strategy in strategies.items():
            if own := dict(dict(strategy or {}).get("phases") or {}):
                both = {phase: given | set(phases.get(phase) or ()) for phase in own}
                strategies[name] = dict(strategy) | {"phases": {p: _filled(own[p], p, both[p]) for p in own}}
        phases = {phase: _filled(changes, phase, given) for phase, changes in phases.items()}
        return settings | {"training": training, "phases": phases, "strategies": strategies}
    return settings


def _filled(changes: Any, phase: str, given: set[str]) -> Any:
    """Return a phase's changes with the fields of their recipe, but for those that are given."""
    if not isinstance(changes, dict) or changes.get("recipe") not in ("ours", "released"):
        return changes
    fields = {name: value for name, value in fields_of(changes["recipe"], phase).items() if name not in given}
    return fields | {name: value for name, value in changes.items() if name != "recipe"}
