"""Put an experiment's results under version control: tables in data/results, and figures drawn from those tables."""

from pathlib import Path

import pandas as pd

from incubate_lib import config
from incubate_lib.config import SettingsError
from incubate_lib.report.planner.bench import growth
from incubate_lib.report.tables import mat, plots, records
from incubate_lib.report.tables.records import Results, published, published_runs, write_figure, write_table


def publish(results: Results) -> list[Path]:
    """Write the tables, read them again, draw the figures from what was read; return the files."""
    tables = {part: getattr(results, part) for part in records.COLUMNS}
    tables["mntk"] = results.mntk[results.mntk["strategy"].isin(mat.SHOWN)]  # of controls nobody asks
    written = {part: table for part, table in tables.items() if part != "mntk" or len(table)}
    files = [write_table(table, records.table_file(results.name, part)) for part, table in written.items()]
    return files + _draw(published(results.name))


def redraw() -> list[Path]:
    """Draw every tracked figure again from the tracked tables, and the method; return the files."""
    from incubate_lib.report.drawing import method
    from incubate_lib.report.tables import studies, study_plots

    written = [write_figure(method().figure(), "method")]
    for path in sorted(records.results_folder().glob("bench_*.csv")):
        table = pd.read_csv(path)
        written += [write_figure(growth(table), path.stem)] if "series" in table else []
    for name in published_runs():
        written += _draw(published(name))
    for name in studies.published_studies():
        written += study_plots.draw(studies.published(name))
    return written


def _draw(results: Results) -> list[Path]:
    figures = plots.PUBLISHED | (mat.PUBLISHED if len(results.mntk) else {})
    return [write_figure(draw(results), f"{results.name}_{name}") for name, draw in figures.items()]


def check_name(name: str) -> str:
    """Return the name under which a measurement is kept; SettingsError unless it can be part of a file's name."""
    try:
        return config.check_name(name)
    except ValueError as error:
        raise SettingsError(f"--save {name!r}: {error}") from None


def publish_bench(table: pd.DataFrame, name: str) -> list[Path]:
    """Write what `incubate bench` measured, and draw its growth, if that is what it is, from the file; return the files."""
    path = write_table(table, records.results_folder() / f"bench_{check_name(name)}.csv")
    return [path, write_figure(growth(pd.read_csv(path)), path.stem)] if "series" in table else [path]
