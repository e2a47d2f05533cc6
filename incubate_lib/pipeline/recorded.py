"""A run from nothing but its record, without planning it again: presets change, and a user's settings file may be gone."""

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from operator import contains
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from incubate_lib.config import PhaseSettings, Settings, SettingsError, error_message, refuse
from incubate_lib.config.members import STRATEGIES
from incubate_lib.config.phase import as_given
from incubate_lib.config.strategies import TrainingChanges, fields_of
from incubate_lib.phases.facts import Facts
from incubate_lib.phases.job import Job, checked
from incubate_lib.pipeline.experiment import INDEX, VERSION, Experiment, check_asked, is_record
from incubate_lib.pipeline.graph import Node, Plan, closure
from incubate_lib.training.files import read_json

BEFORE = "experiment.json"  # the record of a run, when phases lay in runs
# what records that are not as they should be lead to
DAMAGE = (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError)


def recorded(experiment: Experiment, wanted: Iterable[tuple[str, int]]) -> Plan | None:
    """Return the plan of some strategies and seeds as it was recorded with these settings; None where it was not."""
    record = experiment.record()
    if record is None or record.get("version") != VERSION:
        return None
    ends = {(name, seed): key for name, seed, key in record["finals"]}
    if not all(end in ends for end in wanted):
        return None
    whole = _plan(experiment, record)
    finals = {end: whole.finals[end] for end in wanted}
    return replace(whole, nodes=closure(finals.values()), finals=finals)


def run_of(settings: Settings, strategies: Collection[str] | None = None, seeds: Collection[int] | None = None) -> Plan:
    """Return what was run with these settings, or some strategies and seeds of it; SettingsError if that was not run."""
    check_asked(settings, [*(strategies or ())], [*(seeds or ())])
    experiment = Experiment.of(settings)
    record = experiment.record()
    if record is None:
        experiment.check_sound()
    none = f"there is no run of these settings in {experiment.path}"
    refuse(record is None, f"{none}; `incubate run` with the same arguments starts one")
    return of_ends(_plan(experiment, record), strategies, seeds)


def of_ends(whole: Plan, strategies: Collection[str] | None = None, seeds: Collection[int] | None = None) -> Plan:
    """Return some strategies and seeds of a run; SettingsError if that was not run."""
    none = f"{whole.experiment.path / INDEX} names no strategy; `incubate run` with the same arguments adds them"
    refuse(not whole.finals, none)
    for what, wanted, place in (("strategy", strategies, 0), ("seed", seeds, 1)):
        ran = list(dict.fromkeys(end[place] for end in whole.finals))
        for one in wanted or ():
            there = ", ".join(map(str, ran))
            refuse(one not in ran, f"{what} {one} was not run in {whole.experiment.path}; there are: {there}")
    asked = (strategies or {name for name, _ in whole.finals}), (seeds or {seed for _, seed in whole.finals})
    finals = {end: final for end, final in whole.finals.items() if all(map(contains, asked, end))}
    return replace(whole, nodes=closure(finals.values()), finals=finals)


def recorded_plan(folder: Path) -> Plan:
    """Return the plan of a run as its folder records it, whatever settings others have now; it is for reading only.

    Nothing is planned or counted anew, so this takes no data. SettingsError says what is missing or damaged.
    """
    return _opened(folder, read_record(folder))


def recorded_plans(folder: Path) -> Iterator[Plan]:
    """Yield the plan that a run has and those that it had before under this name, as far as they are there and sound."""
    for file in (folder / INDEX, *sorted(folder.glob("run.*.json"), reverse=True)):
        if is_record(record := read_json(file)):
            with suppress(SettingsError):
                yield _opened(folder, record)


def _opened(folder: Path, record: dict[str, Any]) -> Plan:
    with told_damage(f"{folder.name} cannot be opened"):
        settings = settings_of(record["settings"])
        made = _plan(Experiment(settings, folder, known_as=record["hash"]), record)
        order = [*settings.run, *settings.strategies]
        finals = dict(sorted(made.finals.items(), key=lambda item: (item[0][1], order.index(item[0][0]))))
        return replace(made, finals=finals)


def _plan(experiment: Experiment, record: dict[str, Any]) -> Plan:
    where = f"{experiment.path.name}: its {INDEX}"
    with told_damage(where):
        facts, nodes = checked(Facts, record["facts"], where), {}
        run = {"facts": facts, "machine": experiment.settings.machine, "run": experiment.path.name}
        for key, about in record["phases"].items():
            own = {name: about[name] for name in ("strategy", "weights") if name in about}
            settings = checked(PhaseSettings, about["settings"], where)
            inputs = {name: nodes[other] for name, other in about["inputs"].items()}
            nodes[key] = Node(key, Job(settings=settings, **run, **own), experiment, inputs)
        known = experiment.settings.strategies
        for name, seed, _ in record["finals"]:
            strange = f"{where} has no strategy and seed that there can be: {name!r}, {seed!r}"
            refuse(name not in known or not isinstance(seed, int), strange)
        return Plan(experiment, [*nodes.values()], {(name, seed): nodes[key] for name, seed, key in record["finals"]})


def read_record(folder: Path) -> dict[str, Any]:
    """Return what the folder says of itself; SettingsError if that is missing or not whole."""
    if not folder.is_dir():
        raise SettingsError(f"there is no run {folder.name}")
    record = read_json(folder / INDEX)
    if is_record(record):
        return record
    why = "it is empty"
    if (folder / INDEX).exists():
        why = f"its {INDEX} is damaged"
    elif any(folder.iterdir()):
        why = f"it has no {INDEX}" + (
            "; `incubate migrate` takes over runs of an earlier version" if (folder / BEFORE).exists() else ""
        )
    raise SettingsError(f"{folder.name} is not a run that can be opened: {why}")


def settings_of(values: dict[str, Any]) -> Settings:
    """Return the settings that a record has; ValidationError if they are none of today's."""
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
