"""Put an experiment's results under version control: tables in data/results, and figures drawn from those tables."""

from pathlib import Path

import pandas as pd

from incubate_lib import config
from incubate_lib.config import SettingsError
from incubate_lib.report.planner.bench import growth
from incubate_lib.report.tables import mat, plots
from incubate_lib.report.tables.records import Results, published, published_runs, results_folder


def publish(results: Results) -> list[Path]:
    """Write the tables, read them again, draw the figures from what was read; return the files."""
    written = []
    tables = {"": results.strategies, "_phases": results.phases, "_curves": results.curves}
    if len(results.mntk):
        tables["_mntk"] = results.mntk[results.mntk["strategy"].isin(mat.SHOWN)]  # of controls nobody asks
    for part, table in tables.items():
        path = results_folder() / f"{results.name}{part}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index=False, float_format="%.6g")
        written.append(path)
    return written + _draw(published(results.name))


def redraw() -> list[Path]:
    """Draw every tracked figure again from the tracked tables; return the files."""
    from incubate_lib.report.tables import studies, study_plots

    written = []
    for path in sorted(results_folder().glob("bench_*.csv")):
        table = pd.read_csv(path)
        written += [_draw_growth(table, path.stem)] if "series" in table else []
    for name in published_runs():
        written += _draw(published(name))
    for name in studies.published_studies():
        written += study_plots.draw(studies.published(name))
    return written


def _draw(results: Results) -> list[Path]:
    written = []
    for name, draw in (plots.PUBLISHED | (mat.PUBLISHED if len(results.mntk) else {})).items():
        path = results_folder().parents[1] / "figures" / f"{results.name}_{name}.png"
        path.parent.mkdir(exist_ok=True)
        draw(results).savefig(path, dpi=150)
        written.append(path)
    return written


def check_name(name: str) -> str:
    """Return the name under which a measurement is kept; SettingsError unless it can be part of a file's name."""
    try:
        return config.check_name(name)
    except ValueError as error:
        raise SettingsError(f"--save {name!r}: {error}") from None


def publish_bench(table: pd.DataFrame, name: str) -> list[Path]:
    """Write what `incubate bench` measured, and draw its growth, if that is what it is, from the file; return the files."""
    path = results_folder() / f"bench_{check_name(name)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, float_format="%.6g")
    return [path, _draw_growth(pd.read_csv(path), path.stem)] if "series" in table else [path]


def _draw_growth(table: pd.DataFrame, name: str) -> Path:
    figure = results_folder().parents[1] / "figures" / f"{name}.png"
    figure.parent.mkdir(exist_ok=True)
    growth(table).savefig(figure, dpi=150)
    return figure
