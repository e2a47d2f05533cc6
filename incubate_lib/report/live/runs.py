"""Which runs there are, a row each. What cannot be read becomes a note."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from incubate_lib.config import SettingsError, data_folder
from incubate_lib.config.study import studies
from incubate_lib.pipeline.execution import is_running
from incubate_lib.pipeline.recorded import DAMAGE, read_record, reason
from incubate_lib.report.tables import records
from incubate_lib.report.tables.records import published_runs
from incubate_lib.training.lease import holder
from incubate_lib.training.runs import read_json

COLUMNS = ["name", "state", "date", "settings", "strategies", "seeds", "best top-1 %", "device", "note"]
PUBLISHED = "published: "  # before the names of the project's tracked tables
EMPTY = "it is empty"


def runs_table(cells: bool = False) -> pd.DataFrame:
    """Return a row a run in the data folder, the newest first, and a row a published table of the project.

    The runs of a study are one row, unless `cells` are wanted. Only what is needed is read: of each run its experiment.json and
    the summaries that end a strategy. A folder that cannot be read has a note instead of numbers.
    Columns: name, state (done, running, unfinished, empty, damaged, study, published), date (last finished strategy), settings
    (what they are called), strategies (finished, with seeds), seeds, best top-1 % (mean over seeds), device, note.
    """
    known = {*studies(), *(entry.name for entry in _folders(data_folder() / "studies"))}
    rows, folded = [], {}
    for entry in _folders(data_folder() / "runs"):
        study = re.sub("-[0-9a-f]{6}$", "", entry.name)
        if study in known and not cells:
            folded.setdefault(study, []).append(Path(entry.path))
        else:
            rows.append(_run_row(Path(entry.path)))
    rows += [_study_row(name, runs) for name, runs in folded.items()]
    table = pd.DataFrame([*sorted(rows, key=lambda row: row["date"], reverse=True), *_published_rows()], columns=COLUMNS)
    return table.astype({"seeds": "Int64", "best top-1 %": float})


def _folders(path: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(path) as entries:
            return sorted((entry for entry in entries if entry.is_dir()), key=lambda entry: entry.name)
    except OSError:
        return []


def _run_row(folder: Path) -> dict[str, Any]:
    """Return a run's row, its numbers and its state; whatever is wrong with it is its note."""
    row = dict.fromkeys(COLUMNS, "") | {"name": folder.name, "seeds": 0, "best top-1 %": None}
    try:
        settings = read_record(folder)["settings"]
        row |= {"settings": str(settings["name"]), "note": ", ".join(_changes(settings))}
        ends, missing = _ends(folder)
        state = "done" if ends and not missing else _state(missing) if missing else "empty"
        return row | {"state": state} | _numbers(ends)
    except SettingsError as error:
        return row | {"state": "empty" if str(error).endswith(EMPTY) else "damaged", "note": str(error)}
    except DAMAGE as error:
        return row | {"state": "damaged", "note": reason(error)}


def _ends(folder: Path) -> tuple[list[tuple[str, str, dict[str, Any]]], list[Path]]:
    """Return (strategy, seed, summary) of what is finished in a run, and the folders of strategies that are not."""
    ends, missing = [], []
    for seed in (entry for entry in _folders(folder) if entry.name.startswith("seed-")):
        for part in (entry for entry in _folders(Path(seed.path)) if entry.name != "meta"):
            summary = read_json(Path(part.path, "finetune", "summary.json")) or read_json(Path(part.path, "summary.json"))
            if summary is None:
                missing.append(Path(part.path))
            else:
                ends.append((part.name, seed.name, summary))
    return ends, missing


def _numbers(ends: Sequence[tuple[str, str, dict[str, Any]]]) -> dict[str, Any]:
    accuracies: dict[str, list[float]] = {}
    for name, _, summary in ends:
        accuracies.setdefault(name, []).append(summary["accuracy"])
    where = [summary["provenance"] for _, _, summary in ends]
    return {
        "strategies": ", ".join(f"{name} ({len(values)})" for name, values in accuracies.items()),
        "seeds": len({seed for _, seed, _ in ends}),
        "best top-1 %": round(100 * max(map(fmean, accuracies.values())), 1) if accuracies else None,
        "date": max((place["date"] for place in where), default="")[:16].replace("T", " "),
        "device": ", ".join(sorted({place["device"] for place in where})),
    }


def _changes(settings: dict[str, Any]) -> list[str]:
    hidden = ("name=", "machine.", "run=", "description=")
    return [change for change in settings.get("overrides", []) if not change.startswith(hidden)]


def _state(parts: Sequence[Path]) -> str:
    """Return `running` if a living process holds a phase of these strategies."""
    for part in parts:
        for path in part.glob("**/status.json"):
            if (read_json(path) or {}).get("state") == "running" and holder(path.parent / "lease"):
                return "running"
    return "unfinished"


def _study_row(name: str, runs: Sequence[Path]) -> dict[str, Any]:
    """Return the row of a study: numbers of the runs that are judged on test images; those that choose rates only count."""
    row = dict.fromkeys(COLUMNS, "") | {"name": name, "state": "study", "settings": name, "seeds": 0, "best top-1 %": None}
    cells, damaged = [], 0
    for run in runs:
        try:
            if read_record(run)["settings"]["data"]["eval_split"] == "test":
                cells.append(_numbers(_ends(run)[0]))
        except (SettingsError, *DAMAGE):
            damaged += 1
    cells = [cell for cell in cells if cell["strategies"]]
    if cells:
        row |= {
            "date": max(cell["date"] for cell in cells), "seeds": max(cell["seeds"] for cell in cells),
            "best top-1 %": max(cell["best top-1 %"] for cell in cells), "device": _both(cells, "device"),
            "strategies": _both([{"s": re.sub(r" \(\d+\)", "", cell["strategies"])} for cell in cells], "s"),
        }  # fmt: skip
    state = "study, running" if is_running(data_folder() / "studies" / name) else "study"
    note = f"a study: {len(runs)} runs, {len(cells)} of them judged on test images" + (f", {damaged} damaged" if damaged else "")
    return row | {"state": state, "note": note}


def _both(cells: Sequence[dict[str, Any]], column: str) -> str:
    return ", ".join(dict.fromkeys(word for cell in cells for word in cell[column].split(", ")))


def _published_rows() -> list[dict[str, Any]]:
    rows = []
    for name in published_runs():
        row = dict.fromkeys(COLUMNS, "") | {"name": PUBLISHED + name, "state": "published", "settings": name, "seeds": None}
        try:
            table = pd.read_csv(records.results_folder() / f"{name}.csv")
            by_strategy = table.groupby("strategy", sort=False)["accuracy"]
            row |= {
                "date": str(table["date"].max())[:16].replace("T", " "), "seeds": table["seed"].nunique(),
                "strategies": ", ".join(f"{s} ({n})" for s, n in by_strategy.size().items()),
                "best top-1 %": round(100 * by_strategy.mean().max(), 1),
                "device": ", ".join(sorted(map(str, table["device"].unique()))), "note": "a table of the project",
            }  # fmt: skip
        except DAMAGE as error:
            row |= {"state": "damaged", "note": reason(error)}
        rows.append(row)
    return rows
