"""The fields of settings as tables of a page: name, type, default, and what the comment beside each says."""

import inspect
import io
import re
import tokenize
from typing import Any

from incubate_lib.config import Frozen, Settings, TrainingSettings, load_settings
from incubate_lib.config.members import STRATEGIES
from incubate_lib.config.recipes import RELEASED, fields_of
from incubate_lib.report.readme.text import markdown
from incubate_lib.report.words import BASELINE


def fields(section: str) -> str:
    """A section of a settings file (`training`, "" for the top), or a kind of strategy (`strategies.end_to_end`)."""
    place, _, kind = section.partition(".")
    model = STRATEGIES[kind].settings if kind else _model(Settings.model_fields[place].annotation) if place else Settings
    own = inspect.get_annotations(model)  # what is inherited is listed with its own class
    said = comments(model)
    rows = [
        {"field": f"`{name}`", "default": _default(model.model_fields[name]), "what it is": said.get(name, "")}
        for name in own
        if name in model.model_fields
    ]
    return markdown(rows)


def recipes(preset: str) -> str:
    """What `recipe` stands for: a field a row, with what ours, the released code's and a preset's phases have."""
    settings, kinds = load_settings(preset), [phase for phase in RELEASED if phase != "every"]
    has = {phase: settings.training_of(BASELINE if phase == BASELINE else "deep_incubation", phase) for phase in kinds}
    rows = []
    for name in [name for name in TrainingSettings.model_fields if name in fields_of("released", "")]:
        sides = {recipe: {phase: fields_of(recipe, phase)[name] for phase in kinds} for recipe in ("ours", "released")}
        sides[f"`{preset}`"] = {phase: getattr(of, name) for phase, of in has.items()}
        shown = {side: _by_phase(values) for side, values in sides.items()}
        rows.append({"field": f"`{name}`"} | shown | {"what it is": comments(TrainingSettings)[name]})
    return markdown(rows)


def _by_phase(values: dict[str, Any]) -> str:
    """Return a value of all phases, or each with those that have it."""
    phases: dict[str, list[str]] = {}
    for phase, value in values.items():
        phases.setdefault(str(value).lower(), []).append(phase)
    return "; ".join(f"{text} ({', '.join(of)})" if len(phases) > 1 else text for text, of in phases.items())


def comments(model: type) -> dict[str, str]:
    """Return the comment of each field of a class: behind it, or in the lines above it."""
    said, above, name = {}, [], ""
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(model)).readline):
        text = token.string.removeprefix("#").strip()
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            above.append(text)
        elif token.type == tokenize.COMMENT and token.line.startswith(f"    {name}: "):
            said[name] = text
        elif token.type == tokenize.NAME and (field := re.match(r" {4}(\w+): ", token.line)) and token.start[1] == 4:
            name = field[1]
            if above:
                said[name] = " ".join(above)
            above = []
        elif token.type == tokenize.NAME or (token.type == tokenize.NL and not token.line.strip()):
            above = []
    return said


def _model(annotation: Any) -> type:
    """Return the settings class in an annotation that may allow None, too."""
    kinds = (kind for kind in (annotation, *getattr(annotation, "__args__", ())) if isinstance(kind, type))
    return next(kind for kind in kinds if issubclass(kind, Frozen))


def _default(field: Any) -> str:
    if field.is_required():
        return "needed"
    if isinstance(field.default, Frozen) or field.default is None or field.default in ("", {}):
        return ""
    value = field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
