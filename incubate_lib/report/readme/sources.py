"""Where README's numbers come from: rows of tracked tables, and what is compared with what."""

import functools

import pandas as pd

from incubate_lib.report.tables import records, studies
from incubate_lib.report.tables.mat import against_others
from incubate_lib.report.tables.records import Results, published
from incubate_lib.report.tables.studies import StudyTable
from incubate_lib.report.tables.verdict import differences
from incubate_lib.report.words import BASELINE


@functools.cache
def run_of(name: str) -> Results:
    return published(name)


@functools.cache
def study_of(name: str) -> StudyTable:
    return studies.published(name)


def is_study(source: str) -> bool:
    return source.partition(":")[0] in studies.published_studies()


@functools.cache
def rows_of(source: str, strategy: str | None = None) -> pd.DataFrame:
    """Return the rows of a run, a study or one of its cells, and of one strategy."""
    name, _, cell = source.partition(":")
    rows = study_of(name).results if is_study(source) else run_of(name).strategies
    for axis, value in zip(study_of(name).axes, cell.split(","), strict=True) if cell else ():
        rows = rows[rows[axis] == value]
    rows = rows if strategy is None else rows[rows["strategy"] == strategy]
    if rows.empty:
        raise KeyError(f"{source} {strategy or ''} is in no tracked table")
    return rows


def own_comparisons(source: str, strategy: str, other: str) -> pd.DataFrame:
    """Return a strategy's comparisons with `other`, judged in their family: with end to end everything, with others one
    strategy."""
    found = compared_with(source.partition(":")[0], other, None if other == BASELINE else strategy)
    return found[found["strategy"] == strategy]


@functools.cache
def compared_with(name: str, other: str, only: str | None) -> pd.DataFrame:
    if is_study(name):
        return studies.gains(study_of(name), other, only and [only])
    if only == "mat":
        return against_others(run_of(name)).query("other == @other")
    rows = rows_of(name)
    return differences(rows, [(each, other) for each in rows["strategy"].unique() if each != other and only in (None, each)])


def comparison(source: str, strategy: str, other: str) -> pd.Series:
    """Return the row of one comparison."""
    name, _, cell = source.partition(":")
    found = own_comparisons(source, strategy, other)
    for axis, value in zip(study_of(name).axes, cell.split(","), strict=True) if cell else ():
        found = found[found[axis] == value]
    (_, row), *more = found.iterrows()
    if more:
        raise KeyError(f"{source} is {len(found)} cells")
    return row


def verdict(row: pd.Series) -> str:
    return "clear" if row["clear"] else "inside the noise"


def bench_of(name: str) -> pd.DataFrame:
    return pd.read_csv(records.results_folder() / f"bench_{name}.csv").set_index("variant")


def forget() -> None:
    """Read all tables anew from now on."""
    for kept in (run_of, study_of, rows_of, compared_with):
        kept.cache_clear()
