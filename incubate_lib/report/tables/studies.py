"""A study's tables, and what they say in numbers and sentences."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from incubate_lib.config import SettingsError, data_folder, nearest
from incubate_lib.config.study import COLUMNS, RATE, is_column, load_study, studies
from incubate_lib.pipeline.graph import closure
from incubate_lib.pipeline.study import Cost, Pace, Walk
from incubate_lib.report.planner.memory import peak_bytes
from incubate_lib.report.tables import records
from incubate_lib.report.tables.hardware import hardware_of, mixes
from incubate_lib.report.tables.records import from_plan, read_table, write_table
from incubate_lib.report.tables.statistics import counted, gain_text, spread
from incubate_lib.report.tables.verdict import baseline_of, cells, differences
from incubate_lib.report.words import flop_unit, label, metric_of, seconds_text
from incubate_lib.tasks import Metric


@dataclass(frozen=True)
class StudyTable:
    """Results of a study: a row a cell, strategy and seed; and how the rates were chosen."""

    name: str
    results: pd.DataFrame  # the axes, then COLUMNS
    rates: pd.DataFrame  # the axes, strategy, phase, lr, seed, metric, score on validation images, chosen

    @property
    def metric(self) -> Metric:
        """What the scores are of; SettingsError for several metrics."""
        return metric_of(self.results)

    @property
    def axes(self) -> list[str]:
        return [column for column in self.results.columns if not is_column(column)]


# -- tables ---------------------------------------------------------------------------------------------------------------


def collect(walk: Walk) -> StudyTable:
    """Read what is finished of the last stage of a study."""
    rows = []
    for trial in walk.last():
        images, known = trial.plan.experiment.facts.num_images, {}
        for row in from_plan(trial.plan).strategies.to_dict("records"):
            settings, name = trial.plan.experiment.settings, row["strategy"]
            rates = {f"{RATE}{phase}": settings.training_of(name, phase).lr for phase in settings.strategies[name].trains}
            row |= {"train_images": images} | trial.cell.place
            final = trial.plan.finals[name, row["seed"]]
            peaks = {node: peak_bytes(node, known) for node in closure([final])}
            apart = [peak for node, peak in peaks.items() if node.kind.has_modules]
            row |= {"memory": max(peaks.values()), "module_memory": max(apart, default=None)}
            rows.append({column: row.get(column) for column in (*trial.cell.place, *COLUMNS)} | rates)
    columns = list(dict.fromkeys([*walk.study.axes, *COLUMNS, *itertools.chain(*rows)]))
    tried = pd.DataFrame(walk.tried, columns=[*walk.study.axes, "strategy", "phase", "lr", "seed", "metric", "score", "chosen"])
    return StudyTable(walk.study.name, pd.DataFrame(rows, columns=columns), tried)


def save(table: StudyTable, *, publish: bool) -> list[Path]:
    """Write the tables to data/studies, and if they are to be published to data/results, too; return the files."""
    places = [data_folder() / "studies" / table.name]
    places += [records.results_folder() / f"study_{table.name}"] if publish else []
    parts = {"": table.results, "_rates": table.rates}
    return [write_table(rows, Path(f"{place}{part}.csv")) for place in places for part, rows in parts.items()]


def published_studies() -> list[str]:
    """Return the names of the studies whose tables are tracked."""
    names = [path.stem.removeprefix("study_") for path in sorted(records.results_folder().glob("study_*.csv"))]
    return [name for name in names if not name.endswith("_rates")]


def published(name: str) -> StudyTable:
    """Read the tracked tables of a study; SettingsError with the nearest names if there are none."""
    if name not in (known := published_studies()):
        raise SettingsError(f"no tracked table of a study {name!r}; {nearest(name, known)}")
    return read_tables(records.results_folder(), f"study_{name}", name)


def read_tables(folder: Path, stem: str, name: str) -> StudyTable:
    """Read a study's two tables; the values of axes stay as they are written, "0.10" and "None" too."""
    read = []
    for part in ("", "_rates"):
        path = folder / f"{stem}{part}.csv"
        axes = [column for column in read_table(path, nrows=0).columns if not is_column(column)]
        read.append(read_table(path, dtype=dict.fromkeys(axes, str), keep_default_na=False, na_values=[""]))
    return StudyTable(name, *read)


def described(table: StudyTable) -> str:
    """Say in a few lines what a study asks, how large it is, and where it was measured."""
    known = load_study(table.name) if table.name in studies() else None
    cells = len(table.results[table.axes].drop_duplicates()) if table.axes else 1
    lines = [f"{table.name}: {known.question}", f"   {known.description}"] if known else [f"{table.name}:"]
    strategies, seeds = (table.results[column].nunique() for column in ("strategy", "seed"))
    size = [counted(cells, "cell"), counted(strategies, "strategy", "strategies"), counted(seeds, "seed")]
    return "\n".join([*lines, f"   {', '.join(size)}; {hardware_of(table.results)}"])


# -- what they say --------------------------------------------------------------------------------------------------------


def gains(table: StudyTable, baseline: str = "", only: Sequence[str] = ()) -> pd.DataFrame:
    """Return each strategy's `differences` from the baseline in the same cell; `only` some strategies', left out: all."""
    names, baseline = only or table.results["strategy"].unique(), baseline or baseline_of(table.results)
    return differences(table.results, [(name, baseline) for name in names if name != baseline], table.axes)


def at_equal_cost(table: StudyTable) -> pd.DataFrame:
    """Return the gains of strategies that cost what end to end costs in the same cell."""
    found = gains(table)
    return found[found["flops"].between(0.95, 1.05)]


def seeds_text(table: StudyTable) -> str:
    """Say what stands behind each point with its bars."""
    return f"mean ± standard deviation of {seeds_count(table)}"


def seeds_count(table: StudyTable) -> str:
    """Say how many seeds stand behind each point."""
    counts = table.results.groupby([*table.axes, "strategy"])["seed"].nunique()
    fewest, most = counts.min(), counts.max()
    return counted(most, "seed") if fewest == most else f"{fewest} to {most} seeds"


def summary(table: StudyTable) -> pd.DataFrame:
    """Return a table for people: a row a cell and strategy; the score as mean ± standard deviation, and costs."""
    unit, factor = flop_unit(table.results["flops"].max() if len(table.results) else 1)
    found, metric = gains(table), table.metric
    gain = dict(
        zip(found[[*table.axes, "strategy"]].itertuples(index=False, name=None), map(gain_text, found.to_dict("records")))
    )
    rows = []
    for place, cell in cells(table.results, table.axes):
        for name, group in cell.groupby("strategy", sort=False):
            rows.append(place | {
                "strategy": label(name),
                "seeds": len(group),
                metric.heading: spread(group["score"], metric),
                f"over {label(baseline_of(table.results))}": gain.get((*place.values(), name), ""),
                metric.headed("assembled"): spread(group["assembled_score"], metric),
                unit: f"{group['flops'].mean() / factor:.3g}",
                f"critical path {unit}": f"{group['critical_flops'].mean() / factor:.3g}",
                "training s": seconds_text(group["seconds"].mean()) + mixes(group),
            })  # fmt: skip
    return pd.DataFrame(rows)


# the same start, never incubated
WITHOUT = {
    "deep_incubation_recommended": "growing", "deep_incubation_identity": "growing", "deep_incubation_stack": "stacking",
}  # fmt: skip


def costs_text(costs: list[Cost], pace: Pace | None, jobs: int) -> str:
    """Say what a study will cost: a line a stage and one for all; hours from the pace that phases had here, if that is known."""
    unit, factor = flop_unit(max(cost.flops for cost in costs) or 1)
    lines = []
    for cost in costs:
        left = f"{cost.missing} of {cost.phases} phases to train, {cost.flops / factor:.3g} {unit}" if cost.missing else "done"
        lines.append(f"  {cost.title}: {cost.runs} runs, {left}")
    total = sum(cost.flops for cost in costs)
    if not any(cost.missing for cost in costs):
        return "\n".join([*lines, "Everything is trained."])
    lines.append(f"Altogether {total / factor:.3g} {unit}")
    if not pace:
        return "\n".join(lines) + "; no speed was measured here yet, so hours are not known."
    hours = pace.seconds(costs) / jobs / 3600
    time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
    measured = f"{pace.flops_per_second / 1e9:.3g} GFLOP/s and {pace.eval_seconds:.2g} s of evaluation each"
    return "\n".join(lines) + f", about {time} for {jobs} phases side by side. Finished phases had {measured}."


def doubts(table: StudyTable) -> list[str]:
    """Return what a reader should know before believing the rates: chosen ones at the grid's edge."""
    grid = table.rates["lr"].unique()
    if len(grid) < 2:
        return []
    edge = table.rates[table.rates["chosen"] & table.rates["lr"].isin([grid.min(), grid.max()])]
    lines = []
    for (name, phase), group in edge.groupby(["strategy", "phase"], sort=False):
        rates = ", ".join(f"{rate:g}" for rate in sorted(group["lr"].unique()))
        cells = group[table.axes].drop_duplicates().shape[0] if table.axes else 1
        lines.append(f"{label(name)}, {phase}: the chosen rate {rates} is at the grid's edge in {cells} cell(s)")
    return lines
