"""Which runs there are, a row each. What cannot be read becomes a note."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from incubate_lib import tasks
from incubate_lib.config import SettingsError, data_folder
from incubate_lib.config.study import studies
from incubate_lib.pipeline.execution import is_running
from incubate_lib.pipeline.recorded import DAMAGE, read_record, reason
from incubate_lib.report.tables import records
from incubate_lib.report.tables.records import published_runs, read_table
from incubate_lib.report.words import metric_of
from incubate_lib.training.files import read_json
from incubate_lib.training.runs import PhaseFolder, renamed

BEST = "best"  # stands before a metric's heading: a column for each metric that there is
COLUMNS = ["name", "state", "date", "settings", "strategies", "seeds", BEST, "device", "note"]
PUBLISHED = "published: "  # before the names of the project's tracked tables
EMPTY = "it is empty"


def runs_table(cells: bool = False) -> pd.DataFrame:
    """Return a row a run in the data folder, the newest first, and a row a published table of the project.

    The runs of a study are one row, unless `cells` are wanted. Only what is needed is read: of each run its experiment.json and
    the summaries that end a strategy. A folder that cannot be read has a note instead of numbers.
    Columns: name, state (done, running, unfinished, empty, damaged, study, published), date (last finished strategy), settings
    (what they are called), strategies (finished, with seeds), seeds, device, note, and before these
    two the best score (mean over seeds), in a column for each metric, such as `best top-1 %`.
    """
    known = {*studies(), *(folder.name for folder in _folders(data_folder() / "studies"))}
    rows, folded = [], {}
    for folder in _folders(data_folder() / "runs"):
        study = re.sub("-[0-9a-f]{6}$", "", folder.name)
        if study in known and not cells:
            folded.setdefault(study, []).append(folder)
        else:
            rows.append(_row(folder.name, partial(_read_run, folder)))
    for name, runs in folded.items():
        rows.append(_row(name, partial(_read_study, name, runs), state="study", settings=name))
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
    settings = read_record(folder)["settings"]
    hidden = ("name=", "machine.", "run=", "description=")
    changes = [change for change in settings.get("overrides", []) if not change.startswith(hidden)]
    row.update(settings=str(settings["name"]), note=", ".join(changes))
    ends, missing = _ends(folder)
    if missing:
        begun = [path.parent for part in missing for path in part.glob("**/status.json")]
        running = any(PhaseFolder(path).status().get("state") == "running" for path in begun)
        row["state"] = "running" if running else "unfinished"
    else:
        row["state"] = "empty" if ends.empty else "done"
    row.update(_numbers(ends))


def _ends(folder: Path) -> tuple[pd.DataFrame, list[Path]]:
    """Return what is finished in a run, a row a strategy and seed, and the folders of strategies that are not."""
    ends, missing = [], []
    parts = [part for seed in sorted(folder.glob("seed-*")) for part in _folders(seed)]
    for part in (part for part in parts if part.name != "meta"):
        summary = read_json(part / "finetune" / "summary.json") or read_json(part / "summary.json")
        if summary is None:
            missing.append(part)
        else:
            where = summary["provenance"]
            score = renamed(summary)["score"], summary.get("metric")
            ends.append((part.name, part.parent.name, *score, where["date"], where["device"]))
    return pd.DataFrame(ends, columns=["strategy", "seed", "score", "metric", "date", "device"]), missing


def _numbers(ends: pd.DataFrame) -> dict[str, Any]:
    by_strategy, metric = ends.groupby("strategy", sort=False)["score"], metric_of(ends)
    best = {}
    if len(ends):
        best[f"{BEST} {metric.heading}"] = round(metric.scale * _best(metric, by_strategy.mean()), metric.digits)
    return best | {
        "strategies": ", ".join(f"{name} ({number})" for name, number in by_strategy.size().items()),
        "seeds": ends["seed"].nunique(),
        "date": max(map(str, ends["date"]), default="")[:16].replace("T", " "),
        "device": ", ".join(sorted(map(str, ends["device"].unique()))),
    }


def _best(metric: tasks.Metric, scores: pd.Series) -> float:
    return scores.max() if metric.higher_is_better else scores.min()


def _read_study(name: str, runs: Sequence[Path], row: dict[str, Any]) -> None:
    """Tell the numbers of the runs that are judged on test images; those that choose rates only count."""
    judged, damaged = [], 0
    for run in runs:
        try:
            if read_record(run)["settings"]["data"]["eval_split"] == "test":
                judged.append(_ends(run)[0])
        except (SettingsError, *DAMAGE):
            damaged += 1
    cells = pd.DataFrame([_numbers(ends) for ends in judged if len(ends)])
    note = f"a study: {len(runs)} runs, {len(cells)} of them judged on test images"
    note += f", {damaged} damaged" if damaged else ""
    row.update(note=note, state="study, running" if is_running(data_folder() / "studies" / name) else "study")
    if len(cells):
        cells["strategies"] = cells["strategies"].str.replace(r" \(\d+\)", "", regex=True)
        row.update(cells[["date", "seeds"]].max())
        metric = metric_of(*judged)
        row[f"{BEST} {metric.heading}"] = _best(metric, cells[f"{BEST} {metric.heading}"])
        for column in ("strategies", "device"):
            row[column] = ", ".join(dict.fromkeys(", ".join(cells[column]).split(", ")))


def _read_table(name: str, row: dict[str, Any]) -> None:
    row.update(_numbers(read_table(records.results_folder() / f"{name}.csv")), note="a table of the project")
