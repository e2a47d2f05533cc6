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
    with suppress(TypeError):  # of settings of another shape, which validation tells
        training, phases, strategies = (_copied(settings.get(name)) for name in ("training", "phases", "strategies"))
        given = set(training)
        if training.get("recipe") == "released":
            named = [phase for phase in PHASES if PHASES[phase].is_set_by_name]
            phases |= {phase: {"recipe": "released"} | _copied(phases.get(phase)) for phase in named}
        if training.get("recipe") in ("ours", "released"):
            del training["recipe"]
        for name, strategy in strategies.items():
            if own := _copied(_copied(strategy).get("phases")):
                filled = {phase: _filled(own[phase], phase, given | set(_copied(phases.get(phase)))) for phase in own}
                strategies[name] = strategy | {"phases": filled}
        phases = {phase: _filled(changes, phase, given) for phase, changes in phases.items()}
        return settings | {"training": training, "phases": phases, "strategies": strategies}
    return settings


def _copied(value: Any) -> dict[str, Any]:
    """Return a copy of a mapping; TypeError for anything but that and nothing."""
    if not isinstance(value, dict | None):
        raise TypeError
    return dict(value or {})


def _filled(changes: Any, phase: str, given: set[str]) -> Any:
    """Return a phase's changes with the fields of their recipe, but for those that are given."""
    if not isinstance(changes, dict) or changes.get("recipe") not in ("ours", "released"):
        return changes
    fields = {name: value for name, value in fields_of(changes["recipe"], phase).items() if name not in given}
    return fields | {name: value for name, value in changes.items() if name != "recipe"}
