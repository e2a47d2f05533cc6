"""Put an experiment's results under version control: tables in data/results, and figures drawn from those tables."""

import re
from pathlib import Path

import pandas as pd

from incubate_lib.config import SettingsError
from incubate_lib.report import mat, plots
from incubate_lib.report.tables import Results, published, results_folder


def publish(results: Results) -> list[Path]:
    """Write the tables, read them again, draw the figures from what was read; return the files."""
    written = []
    tables = {"": results.strategies, "_phases": results.phases, "_curves": results.curves}
    figures = plots.PUBLISHED
    if len(results.mntk):
        tables["_mntk"] = results.mntk[results.mntk["strategy"].isin(mat.SHOWN)]  # of controls nobody asks
        figures = figures | mat.PUBLISHED
    for part, table in tables.items():
        path = results_folder() / f"{results.name}{part}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index=False, float_format="%.6g")
        written.append(path)
    for name, draw in figures.items():
        path = results_folder().parents[1] / "figures" / f"{results.name}_{name}.png"
        path.parent.mkdir(exist_ok=True)
        draw(published(results.name)).savefig(path, dpi=150)
        written.append(path)
    return written


def check_name(name: str) -> str:
    """Return the name under which a measurement is kept; SettingsError unless it can be part of a file's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise SettingsError(f"--save {name!r}: use letters, digits, dots, dashes and underscores")
    return name


def publish_bench(table: pd.DataFrame, name: str) -> list[Path]:
    """Write what `incubate bench` measured, and draw its growth, if that is what it is, from the file; return the files."""
    path = results_folder() / f"bench_{check_name(name)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, float_format="%.6g")
    if "series" not in table:
        return [path]
    figure = results_folder().parents[1] / "figures" / f"bench_{name}.png"
    figure.parent.mkdir(exist_ok=True)
    plots.growth(pd.read_csv(path)).savefig(figure, dpi=150)
    return [path, figure]
