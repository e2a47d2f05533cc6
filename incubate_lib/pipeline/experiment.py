"""The folder of one set of settings below data/runs, and what is known of it before anything is trained."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from incubate_lib.config import Settings, SettingsError, data_folder, presets
from incubate_lib.phases.facts import Facts, measure
from incubate_lib.training.files import read_json, write_json

STOP_FILE = "STOP"  # in the experiment's folder: phases save and stop when they see it


def source_of(preset: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return a preset, or a settings file, and overrides as notebooks and `incubate run` take them, from any folder."""
    preset = preset if preset in presets() else str(Path(preset).absolute())
    return {"preset": preset, "overrides": list(overrides)}


@dataclass(frozen=True)
class Experiment:
    """The folder of one set of settings, below data/runs."""

    settings: Settings
    path: Path
    given: Facts | None = None

    @classmethod
    def of(cls, settings: Settings, facts: Facts | None = None) -> "Experiment":
        """Find the folder for these settings: `<name>`; `<name>-<hash>` for a variant, made by `--set` or by an edited file."""
        runs = data_folder() / "runs"
        plain, variant = runs / settings.name, runs / f"{settings.name}-{settings.digest()[:6]}"
        is_plain = not settings.is_variant and _owner(plain) in (None, settings.digest())
        return cls(settings, plain if is_plain else variant, facts)

    @cached_property
    def facts(self) -> Facts:
        """What planning must know; measured unless it was given or the experiment's folder has it already."""
        if self.is_known():
            return Facts.model_validate(read_json(self.path / "experiment.json")["facts"])
        return self.given or measure(self.settings)

    def is_known(self) -> bool:
        """Whether this experiment has been started before."""
        return _owner(self.path) == self.settings.digest()

    def started(self) -> tuple[list[str], list[int]]:
        """Return the strategies and seeds that have a folder here, in the settings' order."""
        seeds = sorted(int(p.name.removeprefix("seed-")) for p in self.path.glob("seed-*"))
        names = {p.name for p in self.path.glob("seed-*/*")}
        return [name for name in self.settings.strategies if name in names], seeds

    def create(self) -> None:
        """Make the folder and say in it whose it is; SettingsError if other settings took it first."""
        if _owner(self.path) is None:
            record = {"hash": self.settings.digest(), "settings": self.settings.model_dump(mode="json")}
            record["facts"] = self.facts.model_dump(mode="json")
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "experiment.json", record)
        if _owner(self.path) != self.settings.digest():
            hint = "give yours another name (--set name=…)"
            raise SettingsError(f"{self.path} belongs to other settings; {hint}")

    def check_writable(self) -> None:
        """Raise SettingsError unless the data folder can be read and written; leaves nothing behind."""
        place = self.path
        try:
            while not place.exists() and place.parent != place:
                place = place.parent
            os.listdir(place)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            why = f"cannot read and write {place} ({error.strerror}); set INCUBATE_DATA to a folder of yours"
            raise SettingsError(f"data folder {data_folder()}: {why}") from None


def _owner(path: Path) -> str | None:
    """Return the hash of the settings an experiment's folder belongs to; None if it is nobody's yet."""
    record = read_json(path / "experiment.json")
    return record.get("hash", "nobody we know") if isinstance(record, dict) else record and "nobody we know"
