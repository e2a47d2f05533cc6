"""What carries over: how the networks of a run do where they are trained further, in other runs and in studies."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pandas as pd

from incubate_lib.config import data_folder
from incubate_lib.config.study import Cell
from incubate_lib.phases.job import FILE
from incubate_lib.pipeline.experiment import INDEX, is_record
from incubate_lib.pipeline.graph import Plan
from incubate_lib.pipeline.recorded import DAMAGE, recorded_plan
from incubate_lib.report.tables.records import from_plan
from incubate_lib.report.tables.statistics import family_text, gain_text, spread
from incubate_lib.report.tables.studies import read_tables
from incubate_lib.report.tables.verdict import cells, differences
from incubate_lib.report.words import BASELINE, label, metric_of, phase_name
from incubate_lib.training.files import read_json
from incubate_lib.training.runs import PhaseFolder

WHERE, NOTHING = "trained further in", "nothing"


def carried_over(run: Plan) -> tuple[pd.DataFrame, str]:
    """Return a row for each network of a run that was trained further, and for those that began from nothing beside it; and what
    was corrected for. The table is empty where there are none.

    They are found by the SHA-256 of the weights that they started from, as runs and studies of the data folder recorded it, so
    no weights are read. Only strategies of a single phase are shown: others do not have the recipe of those.
    """
    starts = _starts(run)
    tables = [_named(table, starts) for table in (*_of_runs(run, starts), *_of_studies())] if starts else []
    if not (tables := [table for table in tables if len(table)]):
        return pd.DataFrame(), ""
    rows, base = pd.concat(tables), label(BASELINE)
    found = differences(rows, [(name, base) for name in rows["strategy"].unique() if name != base], [WHERE])
    gains = {(row[WHERE], row["strategy"]): gain_text(row) for row in found.to_dict("records")}
    shown = []
    for place, cell in cells(rows, [WHERE]):
        metric = metric_of(cell)
        for name, group in cell.groupby("strategy", sort=False):
            about = place | {"from": name, "seeds": len(group), "score": f"{metric.heading} {spread(group['score'], metric)}"}
            shown.append(about | {f"over {base}'s": gains.get((place[WHERE], name), "")})
    return pd.DataFrame(shown), family_text(found["comparisons"].max())


def _starts(run: Plan) -> dict[str, str]:
    """Return how the finished networks of a run are called, by the SHA-256 of their weights; those that end a strategy as it."""
    ends = [(final, label(name)) for (name, _), final in run.finals.items()]
    parts = [(n, f"{label(n.strategy)}, {phase_name(n.settings.phase, n.settings.module_index)}") for n in run.nodes]
    return {summary["weights_sha256"]: name for node, name in (*parts, *ends) if (summary := node.summary())}


def _named(table: pd.DataFrame, starts: dict[str, str]) -> pd.DataFrame:
    """Return the rows that start from these weights, and of the same seeds those that start from none, each called by its start.

    `table` has a column `inputs`: what each starts from, None where that is not known.
    """
    known = [NOTHING if given == {} else starts.get((given or {}).get("weights")) for given in table["inputs"]]
    table = table.assign(start=known).dropna(subset="start")
    table = table[table["seed"].isin(table.loc[table["start"] != NOTHING, "seed"])]
    first = table.groupby([WHERE, "start"])["strategy"].transform("first") == table["strategy"]
    return table.assign(strategy=table["start"].where(first, table["start"] + ", " + table["strategy"].map(label)))


def _of_runs(run: Plan, starts: dict[str, str]) -> Iterator[pd.DataFrame]:
    """Yield the finished strategies of the other runs that start from these weights."""
    for file in sorted(data_folder().glob(f"runs/*/{INDEX}")):
        if file.parent == run.experiment.path or not is_record(record := read_json(file)):
            continue
        with suppress(*DAMAGE):  # what is damaged elsewhere is told when that is reported
            inputs = {key: phase["settings"].get("inputs", {}) for key, phase in record["phases"].items()}
            if not any(given.get("weights") in starts for given in inputs.values()):
                continue
            table = from_plan(recorded_plan(file.parent)).strategies
            ends = {(name, seed): inputs[key] for name, seed, key in record["finals"]}
            given = [ends[end] for end in zip(table["strategy"], table["seed"], strict=True)]
            yield table.assign(inputs=given, **{WHERE: file.parent.name})


def _of_studies() -> Iterator[pd.DataFrame]:
    """Yield the results of studies that have a table, cell by cell."""
    for file in sorted(data_folder().glob(f"studies/*/{INDEX}")):
        folder, name = file.parents[1], file.parent.name
        if not (folder / f"{name}.csv").exists() or not is_record(record := read_json(file)):
            continue
        digests = {key: phase["digest"] for key, phase in record["phases"].items()}
        digests |= {key[key.rfind("/seed-") :]: digest for key, digest in digests.items()}  # of a phase that cells share
        with suppress(*DAMAGE):  # as above
            study = read_tables(folder, name, name)
            for place, cell in cells(study.results, study.axes):
                where = Cell(place=place, overrides=[]).label
                ends = [f"/seed-{row.seed}/{row.strategy}" for row in cell.itertuples()]
                found = [digests.get(where + end) or digests.get(end) for end in ends]
                given = [_inputs(*of) for of in zip(found, cell["score"], strict=True)]
                yield cell.assign(inputs=given, **{WHERE: f"{name}, {where}" if place else name})


def _inputs(digest: str | None, score: float) -> dict[str, Any] | None:
    """Return what a phase starts from; None unless it has the score that a table has of it, and of a table of before."""
    job, summary = digest and read_json(PhaseFolder.of(digest).path / FILE), digest and PhaseFolder.of(digest).summary()
    return job["settings"]["inputs"] if job and summary and f"{summary['score']:.6g}" == f"{score:.6g}" else None
