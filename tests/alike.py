"""Whether two data folders hold the same results: tensors and curves to the last bit, summaries but for when and where.

Read from the disk alone, by file formats: no code of the commits that wrote them.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from renamed import CHANGES, Change, flat, renamed, renamed_keys
from safetensors.torch import load_file

# Seconds, memory, place, versions and ids are another thing each time, FLOPs and steps are not; which phase it is, `Phase` says.
# `classes` are not in summaries of before; score and weights say the same.
NOT_COMPARED = re.compile(
    r"(\w+_)?(seconds|memory|hash|sha256)|provenance|metric|date|commit|dirty|versions|device|host|pid|threads"
    r"|data_share|strategy|phase|module_index|copied_from|inputs|classes"
)
ORDER = ("meta", "incubate", "assemble", "end_to_end", "finetune")  # so that what differs first is told first


class Phase(NamedTuple):
    """Which phase a result is of. `strategy` is empty where several share it."""

    run: str
    seed: int
    strategy: str
    phase: str

    def __str__(self) -> str:
        return "/".join(part for part in (self.run, f"seed-{self.seed}", self.strategy, self.phase) if part)


def found(data: Path, changes: Sequence[Change] = CHANGES) -> dict[Phase, Path]:
    """Return the folders of all finished phases in a data folder, whichever layout it has, by today's names."""
    places = {}
    for phase, folder in {**_by_name(data), **_by_digest(data)}.items():
        strategy = phase.strategy and renamed(phase.strategy, "strategies", changes)
        places[phase._replace(strategy=strategy, phase=renamed(phase.phase, "phases", changes))] = folder
    rank = {name: place for place, name in enumerate(ORDER)}
    return dict(sorted(places.items(), key=lambda item: (rank.get(item[0].phase.split("-")[0], len(ORDER)), item[0])))


def _by_name(data: Path) -> dict[Phase, Path]:
    """runs/<run>/seed-N/meta, …/<strategy>/<phase>, or …/<strategy> where that is one phase."""
    return {
        _phase(file.parent.relative_to(data / "runs").as_posix(), file.parent): file.parent
        for file in data.glob("runs/*/seed-*/**/summary.json")
    }


def _by_digest(data: Path) -> dict[Phase, Path]:
    """phases/<digest>; runs/<run>/run.json says which they are: {"phases": {"seed-0/<strategy>/<phase>": {"digest": …}}}."""
    places = {}
    for record in data.glob("runs/*/run.json"):
        for key, phase in json.loads(record.read_text())["phases"].items():
            folder = data / "phases" / phase["digest"]
            if (folder / "summary.json").exists():
                places[_phase(f"{record.parent.name}/{key}", folder)] = folder
    return places


def _phase(key: str, folder: Path) -> Phase:
    run, seed, *rest = key.split("/")
    name = rest[-1]
    if len(rest) == 1:  # the only phase of its strategy, or one that strategies share
        name = json.loads((folder / "summary.json").read_text())["phase"]
    strategy = "" if rest == ["meta"] else rest[0]
    return Phase(run, int(seed.removeprefix("seed-")), strategy, name)


def tensors(folder: Path, changes: Sequence[Change] = CHANGES) -> dict[str, torch.Tensor]:
    """Return a phase's weights by today's names."""
    stored = renamed_keys(load_file(folder / "model.safetensors"), "tensors", changes)
    index, depths = _module(folder)
    if not index or any(name.startswith(f"blocks.{sum(depths[: index + 1]) - 1}.") for name in stored):
        return stored
    # Modules of before counted their blocks from 0, now they have the network's names.
    number = re.compile(r"blocks\.(\d+)\.")
    return {number.sub(lambda m: f"blocks.{int(m[1]) + sum(depths[:index])}.", name): t for name, t in stored.items()}


def _module(folder: Path) -> tuple[int | None, list[int]]:
    """Return the number of a phase's module, if it is one, and the depths of all."""
    if (file := folder / "config.json").exists():  # when phases lay in runs
        config = json.loads(file.read_text())
        return config["module_index"], config["target_depths"]
    settings = json.loads((folder / "phase.json").read_text())["settings"]
    return settings.get("options", {}).get("module_index"), settings["target_depths"]


def curves(folder: Path, changes: Sequence[Change] = CHANGES) -> dict[str, Any]:
    """Return all values in a phase's lines of JSON that are compared, by file, line and column."""
    values = {}
    for file in sorted(folder.glob("*.jsonl")):
        name = renamed(file.name, "files", changes)
        for place, line in enumerate(file.read_text().splitlines() if name else ()):
            values |= {f"{name}:{place + 1} {key}": value for key, value in _compared(json.loads(line), changes).items()}
    return values


def summary(folder: Path, changes: Sequence[Change] = CHANGES) -> dict[str, Any]:
    """Return all values in a phase's summary that are compared."""
    values = _compared(json.loads((folder / "summary.json").read_text()), changes)
    if "mat.units" in values:
        values["mat.units"] = len(values["mat.units"])  # a module's were named after the module, now after the network
    return {f"summary {key}": value for key, value in values.items()}


def _compared(row: dict[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """Return the columns of a record but for those, and what lies below those, that are another thing each time."""
    values = renamed_keys(flat(row), "columns", changes)
    return {name: value for name, value in values.items() if not any(map(NOT_COMPARED.fullmatch, name.split(".")))}


def differences(old: Path, new: Path, changes: Sequence[Change] = CHANGES) -> Iterator[str]:
    """Say in a line each what differs between two data folders; of a phase whose numbers differ only what does so first."""
    before, after = found(old, changes), found(new, changes)
    if not before and not after:
        yield "no phase is there"
    for phase in [*before, *(phase for phase in after if phase not in before)]:
        if phase not in before or phase not in after:
            yield f"{phase}: only {'before' if phase in before else 'after'}"
            continue
        told = [
            line for part in (curves, tensors, summary)
            for line in _unequal(part(before[phase], changes), part(after[phase], changes))
        ]  # fmt: skip
        if told:
            more = f" (and {len(told) - 1} more of this phase)" if len(told) > 1 else ""
            yield f"{phase}: {told[0]}{more}"


def _unequal(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*before, *after]):
        if name not in before or name not in after:
            yield f"{name} is only {'before' if name in before else 'after'}"
        elif told := unlike(before[name], after[name]):
            yield f"{name} {told}"


def unlike(before: Any, after: Any) -> str | None:
    """Say how two values differ, and by how much; None if they are the same bits."""
    if isinstance(before, torch.Tensor):
        kinds = [f"{str(value.dtype)[6:]} {list(value.shape)}" for value in (before, after)]
        if kinds[0] != kinds[1]:
            return f"was {kinds[0]}, is {kinds[1]}"
        if torch.equal(before, after):
            return None
        apart = (after.double() - before.double()).abs()
        return f"differs by up to {apart.max():.3g} in {int((apart != 0).sum())} of {apart.numel()} values"
    if before == after:
        return None
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        place, told = next((i, told) for i, pair in enumerate(zip(before, after)) if (told := unlike(*pair)))
        return f"[{place}] {told}"
    apart = f", apart by {abs(after - before):.3g}" if all(_is_number(value) for value in (before, after)) else ""
    return f"was {before!r}, is {after!r}{apart}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
