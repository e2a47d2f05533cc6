"""What a run was: its images, its network, where and by which command it was trained, and the settings file that gives it."""

import contextlib
import shlex
from typing import Any

from incubate_lib import tasks
from incubate_lib.config import Settings, SettingsError, load_settings, presets
from incubate_lib.config.phase import as_given
from incubate_lib.config.strategies import KNOWN, StrategySettings, as_set, uncut
from incubate_lib.pipeline.graph import Plan
from incubate_lib.report.tables.records import Results
from incubate_lib.report.words import in_yaml


def about(run: Plan, results: Results) -> dict[str, str]:
    """Return in words what was trained on what, by which command and commit; `results` has the finished strategies of `run`."""
    settings, facts = run.experiment.settings, run.experiment.facts
    commits = ", ".join(dict.fromkeys(filter(None, results.strategies["commit"]))) or "not known"
    evaluated = next(summary["eval_images"] for node in run.finals.values() if (summary := node.summary()))
    parts = " + ".join(map(str, facts.target_depths)), " + ".join(map(str, facts.meta_depths))
    network = f"{settings.model}, {facts.outputs:,} outputs"
    if settings.partition:
        network += f"; K = {len(facts.target_depths)} modules of {parts[0]} blocks; the meta model has {parts[1]}"
    return {
        "data": f"{settings.data.source}: {facts.num_images:,} {tasks.get(settings.task).samples} to train on, {evaluated:,} to "
        f"{'test on' if settings.data.eval_split == 'test' else 'choose settings by'}",
        "network": network,
        "command": command(run),
        "commit": commits + (" (+: with changes that were not committed)" if "+" in commits else ""),
    }


def command(run: Plan) -> str:
    """Return the command that gives a run: of a preset, or of the file that `settings_file` returns."""
    settings, asked = run.experiment.settings, run.arguments
    words = ["incubate", "run", f"{settings.name}.yaml"]
    if settings.name in presets():
        with contextlib.suppress(SettingsError):  # of a file that is called as a preset, but has more
            if load_settings(settings.name, settings.overrides).model_dump() == settings.model_dump():
                words = ["incubate", "run", settings.name]
                words += [word for override in settings.overrides for word in ("--set", override)]
    if asked["strategies"] != settings.run:
        words += ["--strategies", *asked["strategies"]]
    if asked["seeds"] != [0]:
        words += ["--seeds", *map(str, asked["seeds"])]
    return shlex.join(words)


def settings_file(settings: Settings) -> str:
    """Return the YAML that gives these settings again: what has its default, or no meaning here, is left out."""
    values = as_given(Settings, settings.model_dump(mode="json", exclude={"overrides", "phases", "strategies"}))
    # what people look for, also where it is the default
    values["data"] = {"source": settings.data.source} | values.get("data", {})
    values["model"] = {"name": settings.model.name} | values.get("model", {})
    values["phases"] = {name: as_set(changes) for name, changes in settings.phases.items() if as_set(changes)}
    known = uncut() if settings.partition is None else KNOWN
    own = {name: _changed(strategy, known.get(name)) for name, strategy in settings.strategies.items()}
    values["strategies"] = {name: changes for name, changes in own.items() if changes}
    order = [name for name in Settings.model_fields if values.get(name) not in (None, {})]
    return in_yaml({name: values[name] for name in order})


def _changed(strategy: StrategySettings, known: dict[str, Any] | None) -> dict[str, Any]:
    """Return the fields in which a strategy differs from the one that is known by its name; all that were set if none is."""
    if known is None or known["kind"] != strategy.kind:
        return as_set(strategy)
    before = as_set(StrategySettings.model_validate(known))
    return {field: value for field, value in as_set(strategy).items() if field not in before or value != before[field]}
