"""Put an experiment's results under version control: tables in data/results, and figures drawn from those tables."""

from pathlib import Path

from incubate_lib.report import plots
from incubate_lib.report.tables import Results, published, results_folder


def publish(results: Results) -> list[Path]:
    """Write the tables, read them again, draw the figures from what was read; return the files."""
    written = []
    for part, table in {"": results.strategies, "_phases": results.phases, "_curves": results.curves}.items():
        path = results_folder() / f"{results.name}{part}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(path, index=False, float_format="%.6g")
        written.append(path)
    for name, draw in plots.PUBLISHED.items():
        path = results_folder().parents[1] / "figures" / f"{results.name}_{name}.png"
        path.parent.mkdir(exist_ok=True)
        draw(published(results.name)).savefig(path, dpi=150)
        written.append(path)
    return written
