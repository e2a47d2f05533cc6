"""Where README's numbers come from: rows of tracked tables, and what is compared with what."""

import functools

import pandas as pd

from incubate_lib.report.tables import records, studies
from incubate_lib.report.tables.answers import changes
from incubate_lib.report.tables.mat import against_others
from incubate_lib.report.tables.records import Results, published
from incubate_lib.report.tables.studies import StudyTable
from incubate_lib.report.words import BASELINE


@functools.cache
def run_of(name: str) -> Results:
    return published(name)


@functools.cache
def study_of(name: str) -> StudyTable:
    """Return a study, or a run as one: it has no axes, so all of it is one cell."""
    if name in studies.published_studies():
        return studies.published(name)
    return StudyTable(name, run_of(name).strategies.drop(columns=["images_seen", "steps"]), pd.DataFrame())


def at_cell(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """Return the rows of a study's table that are of the cell which a source names, or all."""
    name, _, cell = source.partition(":")
    for axis, value in zip(study_of(name).axes, cell.split(","), strict=True) if cell else ():
        table = table[table[axis] == value]
    return table


@functools.cache
def rows_of(source: str, strategy: str | None = None) -> pd.DataFrame:
    """Return the rows of a run, a study or one of its cells, and of one strategy."""
    rows = at_cell(study_of(source.partition(":")[0]).results, source)
    rows = rows if strategy is None else rows[rows["strategy"] == strategy]
    if rows.empty:
        raise KeyError(f"{source} {strategy or ''} is in no tracked table")
    return rows


@functools.cache
def compared_with(name: str, other: str, only: str | None = None) -> pd.DataFrame:
    """Return the comparisons of a family: of everything with `other`, of one strategy with it, or of MAT with everything.

    Where networks are trained further, what starts from end to end's is what end to end is elsewhere.
    """
    if only == "mat" and other != BASELINE:
        return against_others(run_of(name)).query("other == @other")
    return studies.gains(study_of(name), "" if other == BASELINE else other, (only,) if only else ())


def own_comparisons(source: str, strategy: str, other: str) -> pd.DataFrame:
    """Return a strategy's comparisons with `other`, tested in their family: with end to end everything, with others one
    strategy."""
    found = compared_with(source.partition(":")[0], other, None if other == BASELINE else strategy)
    return at_cell(found[found["strategy"] == strategy], source)


def comparison(source: str, strategy: str, other: str = BASELINE) -> pd.Series:
    """Return the row of one comparison."""
    (_, row), *more = own_comparisons(source, strategy, other).iterrows()
    if more:
        raise KeyError(f"{source} is several cells")
    return row


def change(source: str, strategy: str) -> dict | None:
    """Return the row of a recipe, which the source names, against the first of its study; None where they are the same."""
    name, _, recipe = source.partition(":")
    found = changes(study_of(name))
    rows = found[(found["of"] == strategy) & (found["strategy"] == recipe)].to_dict("records")
    return rows[0] if rows else None


def bench_of(name: str) -> pd.DataFrame:
    return pd.read_csv(records.results_folder() / f"bench_{name}.csv").set_index("variant")


@functools.cache
def networks() -> pd.DataFrame:
    """Return timm's model files with the networks of each that were tried (tests/battery.py): those that pass, if any do."""
    table = pd.read_csv(records.results_folder() / "networks.csv", keep_default_na=False)
    table["result"] = pd.Categorical(table["result"], ["passes", "within 1e-6", "no"], ordered=True)
    table = table.sort_values(["file", "result"], kind="stable")
    passes = table["result"] < "no"
    return table[passes | ~passes.groupby(table["file"]).transform("any")]


def forget() -> None:
    """Read all tables anew from now on."""
    for kept in (run_of, study_of, rows_of, compared_with, networks):
        kept.cache_clear()
