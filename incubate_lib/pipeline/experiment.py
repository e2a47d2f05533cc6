"""A run: a name below data/runs, and in its run.json which phases it is made of.

The phases themselves lie in data/phases, where every run that is made of them finds them. run.json holds the plan of a run
under the hash of its settings: called again, nothing is measured or planned. Other settings under the same name get
a new run.json, and the former is kept as run.<n>.json.
"""

import contextlib
import itertools
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from incubate_lib.config import LARGEST_SEED, Settings, SettingsError, data_folder, presets, refuse
from incubate_lib.phases.facts import Facts, measure
from incubate_lib.phases.job import checked
from incubate_lib.training.files import read_json, write_json

STOP_FILE = "STOP"  # in a run's folder: no phase of it is begun any more
INDEX = "run.json"
VERSION = version("incubate-lib")


def source_of(preset: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return a preset, or a settings file, and overrides as notebooks and `incubate run` take them, from any folder."""
    preset = preset if preset in presets() else str(Path(preset).absolute())
    return {"preset": preset, "overrides": list(overrides)}


@dataclass(frozen=True)
class Experiment:
    """A run's folder, and the settings that it has."""

    settings: Settings | None  # none: a study, of which each cell has its own
    path: Path
    given: Facts | None = None
    known_as: str = ""  # the hash under which its record was found: settings that are read from there may have another

    @classmethod
    def of(cls, settings: Settings, facts: Facts | None = None) -> "Experiment":
        return cls(settings, data_folder() / "runs" / settings.name, facts)

    @classmethod
    def of_study(cls, name: str) -> "Experiment":
        """Return the folder of a study; its cells have settings of their own."""
        return cls(None, data_folder() / "studies" / name, known_as="study")

    @cached_property
    def hash(self) -> str:
        return self.known_as or self.settings.digest()

    @cached_property
    def facts(self) -> Facts:
        """What planning must know; measured unless it was given or a record of this version of the package has it already."""
        record = None if self.given else self.record()
        counted = record["facts"].get("flops_per_image", {}) if record else {}
        older = "incubate-0" in counted and "incubate_together" not in counted  # from before modules learned together
        if record and record.get("version") == VERSION and not older:
            return checked(Facts, record["facts"], str(self.path / INDEX))
        return self.given or measure(self.settings)

    def record(self) -> dict[str, Any] | None:
        """Return what is recorded of a run with these settings, the present one or a former; None if there is nothing."""
        return next((record for _, record in self._records() if record["hash"] == self.hash), None)

    def check_sound(self) -> None:
        """Raise SettingsError if there is a run.json that is none, or a file in place of the folder."""
        file = self.path / INDEX
        refuse(self.path.exists() and not self.path.is_dir(), f"{self.path} is no folder, where that of a run should be")
        damaged = os.path.lexists(file) and not is_record(read_json(file))
        again = "delete it, and `incubate run` with the same arguments makes it again from the phases that are there"
        refuse(damaged, f"{file} is damaged; {again}")

    def is_known(self) -> bool:
        """Whether a run with these settings was begun."""
        return self.record() is not None

    def is_present(self) -> bool:
        """Whether the settings of this name that were run last are these."""
        return any(file.name == INDEX and record["hash"] == self.hash for file, record in self._records())

    def _records(self) -> list[tuple[Path, dict[str, Any]]]:
        files = [self.path / INDEX, *sorted(self.path.glob("run.*.json"), reverse=True)]
        found = ((file, read_json(file)) for file in files)
        return [(file, record) for file, record in found if is_record(record)]

    def write(self, phases: Mapping[str, dict[str, Any]], finals: Mapping[tuple[str, int], str]) -> None:
        """Record phases (key → what `Node.record` says) and what ends a strategy, beside those that are recorded; link them.

        Where another run has the name its record is kept under another.
        """
        known = dict(self._records())
        present = self.path / INDEX
        record = self.record() or {"phases": {}, "finals": []}
        both = record["phases"] | phases
        ends = {(name, seed): key for name, seed, key in record["finals"]} | finals
        whole = both == record["phases"] and len(ends) == len(record["finals"])
        if whole and record == known.get(present) and record["version"] == VERSION:
            self._link({key: phase["digest"] for key, phase in both.items()})
            return
        about = {
            "hash": self.hash,
            "version": VERSION,
            "settings": self.settings.model_dump(mode="json") if self.settings else {},
            "facts": self.facts.model_dump(mode="json", exclude_unset=True) if self.settings else {},
            "phases": both,
            "finals": [[*end, key] for end, key in ends.items()],
        }
        self.path.mkdir(parents=True, exist_ok=True)
        if present.exists() and not self.is_present():
            numbers = itertools.count(1)
            os.replace(present, next(path for n in numbers if not (path := self.path / f"run.{n}.json").exists()))
        write_json(present, about)
        for file, former in known.items():
            if file != present and former["hash"] == self.hash:
                file.unlink(missing_ok=True)
        self._link({key: phase["digest"] for key, phase in both.items()})

    def _link(self, digests: dict[str, str]) -> None:
        """Have names for people lead to the phases, and to no others, where the file system has links."""
        if self.settings is None:
            return
        with contextlib.suppress(OSError):
            for link in [path for path in self.path.glob("seed-*/**/*") if path.is_symlink()]:
                if str(link.relative_to(self.path)) not in digests:
                    link.unlink()
            for key, digest in digests.items():
                link = self.path / key
                target = os.path.relpath(data_folder() / "phases" / digest, link.parent)
                if link.exists() and not link.is_symlink():
                    continue  # of before, when phases lay here
                if not link.is_symlink() or os.readlink(link) != target:
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.unlink(missing_ok=True)
                    link.symlink_to(target)

    def check_writable(self) -> None:
        """Raise SettingsError unless the data folder can be read and written, and the record is sound; leaves nothing behind."""
        place = self.path
        try:
            dangling = [part for part in (place, *place.parents) if part.is_symlink() and not part.exists()]
            if dangling:
                raise SettingsError(f"data folder {data_folder()}: {dangling[0]} is a link to nothing, or to itself")
            while not place.exists() and place.parent != place:
                place = place.parent
            os.listdir(place)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            why = f"cannot read and write {place} ({error.strerror}); set INCUBATE_DATA to a folder of yours"
            raise SettingsError(f"data folder {data_folder()}: {why}") from None
        self.check_sound()


def is_record(record: Any) -> bool:
    """Whether a run.json is one of ours."""
    kinds = {"hash": str, "version": str, "settings": dict, "facts": dict, "phases": dict, "finals": list}
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        return False
    named = [phase.get("digest") for phase in record["phases"].values() if isinstance(phase, dict)]
    is_digest = re.compile("[0-9a-f]+").fullmatch  # it becomes a path, as does the key
    if any(os.path.isabs(key) or os.pardir in key.split("/") for key in record["phases"]):
        return False
    return len(named) == len(record["phases"]) and all(isinstance(digest, str) and is_digest(digest) for digest in named)


def check_asked(settings: Settings, strategies: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise SettingsError for strategies and seeds that there cannot be."""
    for name, values in {"seed": [*seeds], "strategy": [*strategies]}.items():
        doubled = sorted({str(v) for v in values if values.count(v) > 1})
        if doubled:
            raise SettingsError(f"{name} {', '.join(doubled)} is given twice")
    if any(seed < 0 for seed in seeds):
        raise SettingsError(f"seed {min(seeds)} is negative; seeds are 0 or larger")
    if any(seed > LARGEST_SEED for seed in seeds):
        raise SettingsError(f"a seed is larger than {LARGEST_SEED}, the largest there is")
    for name in strategies:
        settings.strategy(name)
