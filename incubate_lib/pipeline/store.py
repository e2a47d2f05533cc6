"""data/phases as a whole: phases that no run names any more, and runs of earlier versions, which held their phases."""

import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from incubate_lib.config import SettingsError, data_folder
from incubate_lib.phases.facts import Facts
from incubate_lib.phases.job import FILE, checked
from incubate_lib.pipeline.experiment import Experiment, is_record
from incubate_lib.pipeline.graph import Node, Plan
from incubate_lib.pipeline.recorded import BEFORE, settings_of, told_damage
from incubate_lib.pipeline.strategies import plan
from incubate_lib.training.files import read_json, write_atomic, write_json
from incubate_lib.training.runs import PhaseFolder

Log = Callable[[str], None]


@dataclass(frozen=True)
class Unused:
    """A phase that no run names."""

    folder: PhaseFolder
    title: str
    size: int  # bytes

    def __str__(self) -> str:
        return f"{self.folder.path.name}  {self.size / 2**20:8.1f} MiB  {self.folder.status()['state']:<11}  {self.title}"


def unused() -> list[Unused]:
    """Return the phases that no run or study names, present or former, and that nobody trains.

    SettingsError for an index that cannot be read: it may name any of them.
    """
    named = {phase["digest"] for record in _indices() for phase in record["phases"].values()}
    found = []
    for path in sorted((data_folder() / "phases").glob("*")):
        folder = PhaseFolder(path)
        if path.name not in named and folder.trainer() is None:
            about = read_json(path / FILE)
            about = about if isinstance(about, dict) else {}
            title = ", ".join(str(about[name]) for name in ("run", "strategy") if name in about)
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            found.append(Unused(folder, title, size))
    return found


def _indices() -> Iterator[dict[str, Any]]:
    for place in data_folder().glob("runs/[!.]*"):  # beside studies lie their tables
        if not place.is_dir():
            raise SettingsError(f"{place} is no folder, where that of a run should be; move it away first")
    for file in (*data_folder().glob("runs/*/run*.json"), *data_folder().glob("studies/*/run.json")):
        record = read_json(file)
        if not is_record(record):
            raise SettingsError(f"{file} is damaged, and may name any phase; move it away first")
        yield record


def delete(phases: list[Unused]) -> None:
    for phase in phases:
        shutil.rmtree(phase.folder.path)


def of_other_devices(run: Plan) -> list[Node]:
    """Return the phases of a run that were trained on another device than this machine's."""
    from incubate_lib.training.team import pick_device, provenance

    here = provenance(pick_device())["device"]
    done = [(node, node.folder.summary()) for node in run.nodes]
    return [node for node, summary in done if summary and summary["provenance"]["device"] != here]


def set_aside(nodes: list[Node]) -> None:
    """Have phases trained again by whoever needs them; what was trained stays, until `incubate clean` deletes it."""
    for node in nodes:
        path = node.folder.path
        numbers = itertools.count(1)
        aside = next(place for number in numbers if not (place := path.with_name(f"{path.name}.{number}")).exists())
        path.rename(aside)


# -- runs of earlier versions -------------------------------------------------------------------------------------------------


def migrate(log: Log) -> list[Path]:
    """Take over runs whose phases lie in their own folders; return those folders, which are left as they are.

    What is finished counts as finished, and what is not goes on from its checkpoint. A phase that is there already is kept.
    """
    folders = [file.parent for file in data_folder().glob(f"runs/*/{BEFORE}")]
    # of one name the one without a hash behind it last: it is the present one
    folders.sort(key=lambda folder: (re.sub("-[0-9a-f]{6}$", "", folder.name), -len(folder.name)))
    done = []
    for folder in folders:
        try:
            log(f"{folder.name}: {_take_over(folder)}")
            done.append(folder)
        except SettingsError as error:
            log(f"{folder.name}: left as it is, because {error}")
    return done


def _take_over(folder: Path) -> str:
    record = read_json(folder / BEFORE)
    if not isinstance(record, dict) or not {"hash", "settings", "facts"} <= record.keys():
        raise SettingsError(f"its {BEFORE} is damaged")
    facts = checked(Facts, record["facts"], f"{folder.name}/{BEFORE}")
    with told_damage(f"its {BEFORE}, or the name of a seed's folder, is damaged"):
        settings = settings_of(record["settings"])
        parts = [part for part in folder.glob("seed-*/*") if part.name in settings.strategies]
        seeds = sorted({int(part.parent.name.removeprefix("seed-")) for part in parts})
    names = [name for name in settings.strategies if any(part.name == name for part in parts)]
    if not names:
        raise SettingsError("no strategy of it was begun")
    made = plan(settings, names, seeds, facts=facts)
    is_study = (data_folder() / "studies" / settings.name).is_dir()
    home = Experiment.of_study(settings.name) if is_study else replace(made.experiment, known_as=record["hash"])
    counts = dict.fromkeys(("taken over", "half-finished", "there already", "of other settings"), 0)
    hashes: dict[str, str] = {}  # of weights before → now
    begun = {}
    for node in made.nodes:
        config = read_json(folder / node.key / "config.json")
        if config is None:
            continue
        begun[node.key] = node.record()
        counts[_move(folder / node.key, node, config, hashes)] += 1
    ends = {end: node.key for end, node in made.finals.items() if node.key in begun}
    home.write(begun, ends)
    return ", ".join(f"{number} phase(s) {what}" for what, number in counts.items() if number) or "nothing was begun"


def _move(old: Path, node: Node, config: dict[str, Any], hashes: dict[str, str]) -> str:
    """Copy a phase to where it belongs now, the files that are replaced as a whole as links; return what became of it."""
    if config.get("hash") != node.digest:
        return "of other settings"
    new = node.folder
    if new.summary() or new.status()["state"] != "waiting":
        return "there already"
    new.path.mkdir(parents=True, exist_ok=True)
    for file in (file for file in old.iterdir() if file.is_file() and file.name != "config.json"):
        if file.suffix in (".safetensors", ".pt"):
            _link(file, new.path / file.name)
        else:
            shutil.copy2(file, new.path / file.name)
    used = {name: hashes.get(sha, sha) for name, sha in config.get("inputs_sha256", {}).items()}
    if summary := new.summary():
        before = summary["weights_sha256"]
        hashes[before] = _renamed(new, node) or before
        write_json(new.path / "summary.json", summary | {"inputs_sha256": used, "weights_sha256": hashes[before]})
    status = read_json(new.path / "status.json") or {"state": "stopped"}
    write_json(new.path / "status.json", status | {"hash": node.digest, "inputs_sha256": used})
    node.job.write()
    return "taken over" if summary else "half-finished"


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # another file system, or one without links
        shutil.copy2(file, place)


def _renamed(folder: PhaseFolder, node: Node) -> str | None:
    """Give a module's tensors the network's names, if they have its own; return their SHA-256, or None if nothing changed."""
    from safetensors.torch import load_file, save

    index = node.settings.module_index
    if not index:
        return None
    before, last = sum(node.settings.target_depths[:index]), sum(node.settings.target_depths[: index + 1]) - 1
    tensors = load_file(folder.weights)
    if any(name.startswith(f"blocks.{last}.") for name in tensors) or not any(name.startswith("blocks.0.") for name in tensors):
        return None
    number = re.compile(r"^blocks\.(\d+)\.")
    blob = save({number.sub(lambda m: f"blocks.{int(m[1]) + before}.", name): value for name, value in tensors.items()})
    write_atomic(folder.weights, blob)
    return hashlib.sha256(blob).hexdigest()
