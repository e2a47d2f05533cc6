"""Pages and pictures that are written from the templates beside this file."""

from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from incubate_lib.report.words import TEMPLATES

_FILES = FileSystemLoader(TEMPLATES)
_ENGINE = Environment(loader=_FILES, autoescape=True, trim_blocks=True, undefined=StrictUndefined)


def page(template: str, **values: Any) -> str:
    """Return a template filled in; whatever is no markup is escaped."""
    return _ENGINE.get_template(template).render(**values)
