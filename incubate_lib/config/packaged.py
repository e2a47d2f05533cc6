"""Tables in files beside these modules."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML


def packaged(name: str) -> dict[str, Any]:
    """Return the table in a file beside this module."""
    return YAML(typ="safe", pure=True).load(Path(__file__).with_name(name))
