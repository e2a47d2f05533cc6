"""Which runs there are, a row each. What cannot be read becomes a note."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from incubate_lib import tasks
from incubate_lib.config import SettingsError, data_folder
from incubate_lib.pipeline.recorded import DAMAGE, read_record, reason
from incubate_lib.report.tables import records
from incubate_lib.report.tables.records import published_runs, read_table
from incubate_lib.report.words import metric_of
from incubate_lib.training.runs import PhaseFolder

BEST = "best"  # stands before a metric's heading: a column for each metric that there is
COLUMNS = ["name", "state", "date", "settings", "strategies", "seeds", BEST, "device", "note"]
PUBLISHED = "published: "  # before the names of the project's tracked tables
EMPTY = "it is empty"


def runs_table() -> pd.DataFrame:
    """Return a row a run in the data folder, the newest first, and a row a published table of the project.

    Only what is needed is read: of each run its run.json and the summaries that end a strategy. A folder that cannot be read
    has a note instead of numbers.
    Columns: name, state (done, running, unfinished, empty, damaged, published), date (last finished strategy), settings
    (what they are called), strategies (finished, with seeds), seeds, device, note, and before these
    two the best score (mean over seeds), in a column for each metric, such as `best top-1 %`.
    """
    rows = [_row(folder.name, partial(_read_run, folder)) for folder in _folders(data_folder() / "runs")]
    rows.sort(key=lambda row: row["date"], reverse=True)
    for name in published_runs():
        known = {"state": "published", "settings": name, "seeds": None}
        rows.append(_row(PUBLISHED + name, partial(_read_table, name), **known))
    best = list(dict.fromkeys(name for row in rows for name in row if name.startswith(BEST) and name != BEST))
    best = best or [f"{BEST} {tasks.get().score.heading}"]
    place = COLUMNS.index(BEST)
    table = pd.DataFrame(rows, columns=[*COLUMNS[:place], *best, *COLUMNS[place + 1 :]])
    return table.astype({"seeds": "Int64"} | dict.fromkeys(best, float))


def _folders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.glob("*") if entry.is_dir())


def _row(name: str, read: Callable[[dict[str, Any]], None], **known: Any) -> dict[str, Any]:
    """Return a row that `read` fills in; whatever is wrong becomes its note."""
    row = dict.fromkeys(COLUMNS, "") | {"name": name, "seeds": 0} | known
    try:
        read(row)
    except SettingsError as error:
        row |= {"state": "empty" if str(error).endswith(EMPTY) else "damaged", "note": str(error)}
    except DAMAGE as error:
        row |= {"state": "damaged", "note": reason(error)}
    return row


def _read_run(folder: Path, row: dict[str, Any]) -> None:
    record = read_record(folder)
    settings = record["settings"]
    hidden = ("name=", "machine.", "run=", "description=")
    changes = [change for change in settings.get("overrides", []) if not change.startswith(hidden)]
    row.update(settings=str(settings["name"]), note=", ".join(changes))
    folders = {key: PhaseFolder.of(about["digest"]) for key, about in record["phases"].items()}
    ends = []
    for name, seed, key in record["finals"]:
        if summary := folders[key].summary():
            where = summary["provenance"]
            ends.append((name, seed, summary["score"], summary["metric"], where["date"], where["device"]))
    if len(ends) < len(record["finals"]):
        is_at_work = any(phase.status()["state"] == "running" for phase in folders.values())
        row["state"] = "running" if is_at_work else "unfinished"
    else:
        row["state"] = "done" if ends else "empty"
    row.update(_numbers(pd.DataFrame(ends, columns=["strategy", "seed", "score", "metric", "date", "device"])))


def _numbers(ends: pd.DataFrame) -> dict[str, Any]:
    by_strategy, metric = ends.groupby("strategy", sort=False)["score"], metric_of(ends)
    best = {}
    if len(ends):
        best[f"{BEST} {metric.heading}"] = round(metric.scale * metric.best(by_strategy.mean()), metric.digits)
    return best | {
        "strategies": ", ".join(f"{name} ({number})" for name, number in by_strategy.size().items()),
        "seeds": ends["seed"].nunique(),
        "date": max(map(str, ends["date"]), default="")[:16].replace("T", " "),
        "device": ", ".join(sorted(map(str, ends["device"].unique()))),
    }


def _read_table(name: str, row: dict[str, Any]) -> None:
    row.update(_numbers(read_table(records.results_folder() / f"{name}.csv")), note="a table of the project")
