"""Messages for bad input: a line or two that name the field, the value and what would be right."""

import difflib
from functools import cache
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)
SHOWN = 20  # names of a list in a message
MOST_CLASSES = 1_000_000  # more is no classification but a mistake, an identity number for example
MOST = {"classes": MOST_CLASSES, "images": 10**12}


class SettingsError(ValueError):
    """Bad input from the user: the message names the field, the value and what would be right. Exit status 2."""

    def _render_traceback_(self) -> list[str]:
        """Have IPython show a line instead of thirty: where it was raised says nothing to whoever wrote the input."""
        return [f"SettingsError: {self}"]


def refuse(broken: Any, words: str) -> None:
    """Raise SettingsError with these words if a rule is broken. In a model's validator pydantic adds the place."""
    if broken:
        raise SettingsError(words)


def validated(model: type[Model], values: Any, where: str) -> Model:
    """Return a model of these values; SettingsError that begins with `where` if they are none."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise SettingsError(f"{where}: {error_message(error, model)}") from None


def error_message(error: ValidationError, model: Any = None) -> str:
    """Say in a line or two what is wrong with values of a model: field, value, and what would be right."""
    lines = []
    for item in error.errors()[:3]:
        field = shortened(".".join(str(part) for part in item["loc"] if part != "[key]"))
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown field {field!r}; {nearest(str(item['loc'][-1]), _fields_at(item['loc'][:-1], model))}")
        elif item["type"] == "missing":
            lines.append(f"{field} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = "" if isinstance(item["input"], dict) else f" is {shortened(repr(item['input']))}:"
            lines.append(f"{field}{value} {message}".strip())
    return "; ".join(dict.fromkeys(lines))


def _fields_at(loc: tuple, model: Any) -> list[str]:
    """Return the field names of a model at a place such as ("phases", "meta")."""

    def fields(kind: Any) -> dict[str, Any]:  # also of "that or none"
        return next((one.model_fields for one in (kind, *get_args(kind)) if hasattr(one, "model_fields")), {})

    for part in loc:
        named = get_origin(model) is dict  # by the user: values are all of one kind
        model = get_args(model)[1] if named else getattr(fields(model).get(part), "annotation", None)
    return list(fields(model))


def nearest(name: str, known: Any) -> str:
    """Return the most similar names, or all of them, as the end of an error message."""
    return _nearest(str(name), tuple(known))


@cache
def _nearest(name: str, known: tuple[str, ...]) -> str:
    """Messages are made before it is known whether they are needed: for the many settings of a study again and again."""
    if len(name) > 200:  # comparing takes as long as both are, and shows nothing
        return _listed(known)
    parts = [other for other in known if len(other) > 1 and other in name.split("_")]  # `lr` for `lr_rate`
    alike = [*difflib.get_close_matches(name, known, n=3, cutoff=0.7), *parts]
    close = list(dict.fromkeys(alike or difflib.get_close_matches(name, known, n=3, cutoff=0.5)))[:3]
    return f"did you mean {' or '.join(close)}?" if close else _listed(known)


def _listed(known: tuple[str, ...]) -> str:
    """Return names, and of very many the first and how many there are."""
    shown = ", ".join(known[:SHOWN])
    return f"there are: {shown}" + (f" … ({len(known):,} in all)" if len(known) > SHOWN else "")


def check_numbers(numbers: dict[str, int | None]) -> None:
    """Raise SettingsError for numbers that make no sense, by the names that people gave them under; None is not given."""
    for name, value in numbers.items():
        least = 2 if name.endswith("classes") else 1
        most = next((most for end, most in MOST.items() if name.endswith(end)), 10**6)
        if value is not None and not least <= value <= most:
            limit = f"least {least}" if value < least else f"most {most:,}"
            raise SettingsError(f"{name} is {value}; it must be at {limit}")


def in_a_line(error: Exception) -> str:
    """Return the first line of what an error says, or its kind if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def shortened(value: Any) -> str:
    """Return a value as it would be written, on one line, and only the beginning of a very long one."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
