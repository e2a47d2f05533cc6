"""A run from nothing but the records in its folders: every phase that was begun, and what each started from.

Not by planning its preset again: presets change, and a user's settings file may be gone. So runs of older layouts can be looked
at, too, as far as they have what is asked for. Such a plan is for looking only.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from incubate_lib.config import Settings, SettingsError, error_message
from incubate_lib.config.members import STRATEGIES
from incubate_lib.config.phase import as_given, of_identity
from incubate_lib.config.strategies import TrainingChanges, fields_of
from incubate_lib.phases.facts import Facts
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.pipeline.graph import Node, Plan, closure
from incubate_lib.training.files import read_json

# what records that are not as they should be lead to
DAMAGE = (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError)


def recorded_plan(folder: Path) -> Plan:
    """Return the plan of a run as its folders tell it: every phase that was begun, and the last one of each strategy.

    Nothing is planned or counted anew, so this takes no data. SettingsError says what is missing or damaged.
    """
    folder = Path(folder)
    record = read_record(folder)
    with told_damage(f"{folder.name} cannot be opened"):
        settings = _settings(record["settings"])
        experiment = Experiment(settings, folder, Facts.model_validate(record["facts"]))
        nodes = _nodes(experiment)
        finals = {}
        for node in nodes.values():
            parts = node.key.split("/")
            whole = node.settings.phase in ("end_to_end", "finetune") and not node.settings.options.get("small_images")
            if whole and (len(parts) == 2 or parts[2] == "finetune"):
                finals[parts[1], node.settings.seed] = node
        order = [*settings.run, *settings.strategies]
        finals = dict(sorted(finals.items(), key=lambda item: (item[0][1], order.index(item[0][0]))))
        flops = {node.key: (node.summary() or {}).get("train_flops", 0) for node in nodes.values()}
    return Plan(experiment, closure(nodes.values()), finals, flops)


def read_record(folder: Path) -> dict[str, Any]:
    """Return what the folder says of itself; SettingsError if that is missing or not whole."""
    if not folder.is_dir():
        raise SettingsError(f"there is no run {folder.name}")
    record = read_json(folder / "experiment.json")
    if record is None:
        why = "it has no experiment.json" if any(folder.iterdir()) else "it is empty"
        if (folder / "experiment.json").exists():
            why = "its experiment.json is damaged"
        raise SettingsError(f"{folder.name} is not a run that can be opened: {why}")
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise SettingsError(f"{folder.name} is not a run that can be opened: its experiment.json has no settings")
    return record


def _settings(values: dict[str, Any]) -> Settings:
    strategies = {name: _strategy(value) for name, value in values.get("strategies", {}).items()}
    own = {"strategies": strategies, "phases": _changes(values.get("phases", {}))}
    return Settings.model_validate_json(json.dumps(as_given(Settings, values) | own))


def _strategy(values: dict[str, Any]) -> dict[str, Any]:
    """Return what must be given of a strategy; older records hold the fields of other kinds, too."""
    own = fields_of(values["kind"])
    others = {field for kind in STRATEGIES for field in fields_of(kind)} - own
    kept = {name: value for name, value in values.items() if name not in others}
    return as_given(STRATEGIES[values["kind"]].settings, kept) | {"phases": _changes(values.get("phases", {}))}


def _changes(phases: dict[str, Any]) -> dict[str, Any]:
    """Return the phases that have settings of their own, with those."""
    given = {name: as_given(TrainingChanges, changes) for name, changes in phases.items()}
    return {name: changes for name, changes in given.items() if changes}


@dataclass(frozen=True, eq=False, repr=False)
class RecordedNode(Node):
    """A phase as its folder tells it; what was written before today's settings had all their fields counts, too."""

    digest: str = ""  # the hash that was recorded

    def _used(self) -> dict[str, str]:
        known = (self.folder.summary() or {}).get("inputs_sha256", {})  # the oldest records have none
        return {name: sha for name, sha in super()._used().items() if name in known}


def _nodes(experiment: Experiment) -> dict[str, Node]:
    """Return the phases of a run that have settings, by key, linked as their settings' hashes of inputs tell."""
    nodes: dict[str, Node] = {}
    for path in sorted(experiment.path.glob("seed-*/**/config.json")):
        config = read_json(path)
        if isinstance(config, dict):
            about = {name: value for name, value in config.items() if name not in ("hash", "inputs_sha256")}
            settings = of_identity(about)
            key = str(path.parent.relative_to(experiment.path))
            strategy = key.split("/")[1]
            nodes[key] = RecordedNode(key, strategy, settings, experiment, digest=config["hash"])
    for node in nodes.values():
        seed, strategy = node.key.split("/")[:2]
        for name, digest in node.settings.inputs.items():
            found = [n for n in nodes.values() if n.digest == digest and n.key.startswith(f"{seed}/")]
            found.sort(key=lambda n: not n.key.startswith(f"{seed}/{strategy}/"))  # its own first
            if found:  # else a file of weights, or a phase whose folder is gone
                node.inputs[name] = found[0]
    return nodes


@contextmanager
def told_damage(what: str) -> Iterator[None]:
    """Turn what damaged records lead to into a SettingsError that begins with `what`."""
    try:
        yield
    except SettingsError:
        raise
    except DAMAGE as error:
        raise SettingsError(f"{what}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """Say what is wrong with records that led to this error."""
    if isinstance(error, ValidationError):
        return f"other settings than today's ({error_message(error, Settings)})"
    if isinstance(error, KeyError):
        return f"its records have no {error.args[0]!r}"
    return f"its records are not as expected ({error})"
