"""Parameters of a notebook, checked by itself: plain papermill only warns of an unknown one, and trains with the default."""

import ast
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from incubate_lib.config import SettingsError, load_settings, nearest, refuse
from incubate_lib.pipeline.experiment import check_asked

LEAST_PROBE = 2  # images: kernels compare them


def check_injected(cells: Sequence[str]) -> None:
    """Raise SettingsError for what papermill put in that this notebook has no parameter for, or that is of another type.

    `cells` are the sources of the cells that were run: IPython's `In`.
    """
    places = [i for i, cell in enumerate(cells) if cell.startswith("# Parameters")]
    if not places:
        return
    for cell in reversed(cells[: places[-1]]):
        nodes = ast.parse(cell).body
        if nodes and all(isinstance(node, ast.AnnAssign) for node in nodes):  # what it was put behind
            known = {node.target.id: ast.unparse(node.annotation) for node in nodes}
            values = {node.target.id: ast.literal_eval(node.value) for node in nodes}
            given = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cells[places[-1]]).body}
            for name, value in given.items():
                check_value("this notebook", name, value, known)
            _check_together(values | given, [given["strategy"]] if "strategy" in given else [])
            return


def _check_together(values: dict[str, Any], strategy: Sequence[str]) -> None:
    """Raise SettingsError for parameters with which a later cell could do nothing; a resolved phase says all itself.

    `strategy` is the one that was asked for: not every network has the one that is the default.
    """
    probe, seeds = values.get("probe", LEAST_PROBE), values.get("seeds", [values.get("seed")])
    refuse(probe < LEAST_PROBE, f"parameter probe is {probe}; it must be at least {LEAST_PROBE} images")
    refuse(not seeds, "parameter seeds is empty; name at least one")
    if values.get("phase") or seeds == [None]:  # none: nothing of this notebook is trained
        return
    settings = load_settings(values["preset"], values.get("overrides", ()))
    for names in (values.get("strategies", ()), strategy):
        check_asked(settings, names, seeds)


def check_value(notebook: str, name: str, value: Any, known: dict[str, str]) -> None:
    """Raise SettingsError for a parameter that a notebook does not have, or of another type than `known` says: name → type."""
    if name not in known:
        raise SettingsError(f"{notebook} has no parameter {name!r}; {nearest(name, known)}")
    try:
        TypeAdapter(known[name]).validate_python(value, strict=True)
    except ValidationError:
        raise SettingsError(f"{notebook}: parameter {name} is {value!r}; it must be {known[name]}") from None
