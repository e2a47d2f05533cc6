"""A study's tables, and what they say in numbers and sentences."""

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from incubate_lib.config import SettingsError, data_folder, nearest
from incubate_lib.config.study import BASELINE, COLUMNS, DERIVED, load_study, studies
from incubate_lib.pipeline.study import Cost, Walk
from incubate_lib.report.statistics import COLUMNS as JUDGED
from incubate_lib.report.statistics import compare, family_text, gain_text, paired
from incubate_lib.report.tables import flop_unit, from_plan, hardware_of, label, mixed_text, mixes, results_folder

COSTS = ["flops", "critical_flops", "seconds"]


@dataclass(frozen=True)
class StudyTable:
    """Results of a study: a row a cell, strategy and seed; and how the rates were chosen."""

    name: str
    results: pd.DataFrame  # the axes, then COLUMNS
    rates: pd.DataFrame  # the axes, strategy, phase, lr, seed, accuracy on validation images, chosen

    @property
    def axes(self) -> list[str]:
        return [column for column in self.results.columns if column not in COLUMNS]


# -- tables ---------------------------------------------------------------------------------------------------------------


def collect(walk: Walk) -> StudyTable:
    """Read what is finished of the last stage of a study."""
    rows = []
    for trial in walk.last():
        images = trial.plan.experiment.facts.num_images
        for row in from_plan(trial.plan).strategies.to_dict("records"):
            settings, name = trial.plan.experiment.settings, row["strategy"]
            rates = {f"lr_{phase}": settings.training_of(name, phase).lr for phase in settings.strategies[name].trains}
            row |= {"train_images": images} | rates | trial.cell.place
            rows.append({column: row.get(column) for column in (*trial.cell.place, *COLUMNS)})
    columns = [*walk.study.axes, *COLUMNS]
    tried = pd.DataFrame(walk.tried, columns=[*walk.study.axes, "strategy", "phase", "lr", "seed", "accuracy", "chosen"])
    return StudyTable(walk.study.name, pd.DataFrame(rows, columns=columns), tried)


def save(table: StudyTable, *, publish: bool) -> list[Path]:
    """Write the tables to data/studies, or if they are to be published to data/results; return the files."""
    folder = results_folder() if publish else data_folder() / "studies"
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "study_" if publish else ""
    written = []
    for part, rows in {"": table.results, "_rates": table.rates}.items():
        path = folder / f"{prefix}{table.name}{part}.csv"
        rows.to_csv(path, index=False, float_format="%.6g")
        written.append(path)
    return written


def published_studies() -> list[str]:
    """Return the names of the studies whose tables are tracked."""
    names = [path.stem.removeprefix("study_") for path in sorted(results_folder().glob("study_*.csv"))]
    return [name for name in names if not name.endswith("_rates")]


def published(name: str) -> StudyTable:
    """Read the tracked tables of a study; SettingsError with the nearest names if there are none."""
    path = results_folder() / f"study_{name}.csv"
    if not path.exists():
        raise SettingsError(f"no tracked table of a study {name!r}; {nearest(name, published_studies())}")
    return read_tables(path.parent, f"study_{name}", name)


def read_tables(folder: Path, stem: str, name: str) -> StudyTable:
    """Read a study's two tables; the values of axes stay as they are written, "0.10" and "None" too."""
    read = []
    for part in ("", "_rates"):
        path = folder / f"{stem}{part}.csv"
        axes = [column for column in pd.read_csv(path, nrows=0).columns if column not in (*COLUMNS, *DERIVED)]
        read.append(pd.read_csv(path, dtype=dict.fromkeys(axes, str), keep_default_na=False, na_values=[""]))
    return StudyTable(name, *read)


def described(table: StudyTable) -> str:
    """Say in a few lines what a study asks, how large it is, and where it was measured."""
    known = load_study(table.name) if table.name in studies() else None
    cells = len(table.results[table.axes].drop_duplicates()) if table.axes else 1
    lines = [f"{table.name}: {known.question}", f"   {known.description}"] if known else [f"{table.name}:"]
    size = f"   {cells} cells, {table.results['strategy'].nunique()} strategies, {table.results['seed'].nunique()} seeds"
    return "\n".join([*lines, f"{size}; {hardware_of(table.results)}"])


# -- what they say --------------------------------------------------------------------------------------------------------


def gains(table: StudyTable, baseline: str = BASELINE, only: list[str] | None = None) -> pd.DataFrame:
    """Return each strategy's gain in points over the baseline in the same cell, paired by seed; all are one family.

    `only` are the strategies that are compared; left out: all. Columns: the axes, strategy, `statistics.COLUMNS`, then flops,
    critical_flops and seconds relative to the baseline's (seconds NaN where devices differ).
    """
    rows, found = [], []
    for place, cell in _cells(table):
        groups = dict(iter(cell.groupby("strategy", sort=False)))
        for name in (name for name in groups if name != baseline and baseline in groups and name in (only or groups)):
            gain = paired(cell, name, baseline)
            if len(gain):
                found.append(gain)
                rows.append(place | {"strategy": name} | relative_costs(groups[name], groups[baseline]))
    named = pd.DataFrame(rows, columns=[*table.axes, "strategy", *COSTS])
    return pd.concat([named, compare(found)], axis="columns")[[*table.axes, "strategy", *JUDGED, *COSTS]]


def relative_costs(rows: pd.DataFrame, others: pd.DataFrame) -> dict[str, float]:
    """Return the mean costs of some runs over those of others; seconds are NaN where the two are not of one same device."""
    costs = (rows[COSTS].mean() / others[COSTS].mean()).to_dict()
    return costs | ({"seconds": math.nan} if mixes(rows, others) else {})


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
    return (f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}") + " seeds"


def _cells(table: StudyTable):
    if not table.axes:
        yield {}, table.results
        return
    for values, cell in table.results.groupby(table.axes, sort=False):
        yield dict(zip(table.axes, values if isinstance(values, tuple) else (values,), strict=True)), cell


def summary(table: StudyTable) -> pd.DataFrame:
    """Return a table for people: a row a cell and strategy; top-1 as mean ± standard deviation, and costs."""
    from incubate_lib.report.tables import seconds_text, spread

    unit, factor = flop_unit(table.results["flops"].max() if len(table.results) else 1)
    gain = gains(table).set_index([*table.axes, "strategy"]) if len(table.results) else pd.DataFrame()
    rows = []
    for place, cell in _cells(table):
        for name, group in cell.groupby("strategy", sort=False):
            key = (*place.values(), name)
            found = gain.loc[key if len(key) > 1 else key[0]] if key in gain.index or name in gain.index else None
            rows.append(place | {
                "strategy": label(name), "seeds": len(group), "top-1 %": spread(100 * group["accuracy"]),
                "over end to end": "" if found is None else gain_text(found),
                "assembled %": spread(100 * group["assembled_accuracy"].dropna()),
                unit: f"{group['flops'].mean() / factor:.3g}",
                f"critical path {unit}": f"{group['critical_flops'].mean() / factor:.3g}",
                "training s": seconds_text(group["seconds"].mean()) + mixes(group),
            })  # fmt: skip
    return pd.DataFrame(rows)


def answer(table: StudyTable) -> list[str]:
    """Say in sentences what a study says about training in pieces, whatever the numbers are."""
    if BASELINE not in set(table.results["strategy"]):
        return ["There is no end-to-end training in this study to compare with."]
    lines = [*_cheapest(table), *_largest_gain(table), *_against_controls(table), *_against_workers(table), *_assembled(table)]
    lines = [*lines, *filter(None, [mixed_text(table.results)])]
    return lines or ["Nothing is finished yet."]


def reached(table: StudyTable) -> pd.DataFrame:
    """Return the cheapest cell in which each strategy is at least as good on average as end to end in its best cell.

    Cells are compared along the axis `budget`, with the other axes' values kept; without that axis a cell is compared with
    itself. Columns: the other axes, strategy, the budget at which, accuracy, best (end to end's), flops, critical_flops and
    seconds relative to end to end's best, then `statistics.COLUMNS`; the family is every cell that was compared.
    """
    candidates = _against_best(table)
    good = candidates[candidates["accuracy"] >= candidates["best"]].sort_values("flops", kind="stable")
    return good.drop_duplicates([*_other_axes(table), "strategy"]).sort_index().reset_index(drop=True)


def _other_axes(table: StudyTable) -> list[str]:
    return [axis for axis in table.axes if axis != "budget"]


def _against_best(table: StudyTable) -> pd.DataFrame:
    """Compare every cell of every strategy with end to end's best cell, on the seeds that both have; what is not finished is
    left out. The columns are those of `reached`.
    """
    others, budget = _other_axes(table), ["budget"] if "budget" in table.axes else []
    rows, found = [], []
    for values, group in table.results.groupby(others, sort=False) if others else [((), table.results)]:
        place = dict(zip(others, values if isinstance(values, tuple) else (values,), strict=True))
        cells = [cell for _, cell in group.groupby("budget", sort=False)] if budget else [group]
        base = [cell[cell["strategy"] == BASELINE].dropna(subset="accuracy") for cell in cells]
        best = max((cell for cell in base if len(cell)), key=lambda cell: cell["accuracy"].mean(), default=None)
        if best is None:
            continue
        for name in (name for name in group["strategy"].unique() if name != BASELINE):
            for cell in (cell[cell["strategy"] == name] for cell in cells):
                gain = paired(pd.concat([cell, best]), name, BASELINE)
                if gain.empty:
                    continue
                mine, theirs = (part[part["seed"].isin(gain.index)] for part in (cell, best))
                where = place | {"strategy": name} | {axis: cell[axis].iloc[0] for axis in budget}
                means = {"accuracy": mine["accuracy"].mean(), "best": theirs["accuracy"].mean()}
                rows.append(where | means | relative_costs(mine, theirs))
                found.append(gain)
    named = pd.DataFrame(rows, columns=[*others, "strategy", *budget, "accuracy", "best", *COSTS])
    return pd.concat([named, compare(found)], axis="columns")


def _cheapest(table: StudyTable) -> list[str]:
    if "budget" not in table.axes:
        return []
    candidates, found, others = _against_best(table), reached(table), _other_axes(table)

    def named(row: dict) -> str:
        where = ", ".join(f"{axis} {row[axis]}" for axis in others)
        return label(row["strategy"]) + (f" ({where})" if where else "")

    lines = [
        f"{named(row)} reaches end to end's best ({row['best']:.1%}) on average, with {row['accuracy']:.1%}, for "
        f"{row['flops']:.2f} of its FLOPs, {row['critical_flops']:.2f} on the critical path ({gain_text(row)})."
        for row in found.to_dict("records")
    ]
    done = [named(row) for row in found.to_dict("records")]
    compared = dict.fromkeys(named(row) for row in candidates.to_dict("records"))
    lines += [f"{name} does not reach end to end's best at any budget here." for name in compared if name not in done]
    if len(found) and (count := found["comparisons"].max()) > 1:
        lines.append(f"With end to end's best {count} cells were compared, and corrected for that number (Holm).")
    return lines


def _largest_gain(table: StudyTable) -> list[str]:
    equal, lines = at_equal_cost(table), []
    for sign, word in ((1, "gain"), (-1, "loss")):
        row = equal.loc[(sign * equal["gain"]).idxmax()] if len(equal) else None
        if row is None or sign * row["gain"] <= 0:
            continue
        where = ", ".join(f"{axis} {row[axis]}" for axis in table.axes)
        where = f" at {where}" if where else ""
        lines.append(
            f"The largest {word} of {len(equal)} comparisons at equal FLOPs, in points: {label(row['strategy'])}{where}, "
            f"{gain_text(row)}. {family_text(row['comparisons'])}".strip()
        )
    return lines


INCUBATED = ("recommended", "deep_incubation_identity", "deep_incubation_stack", "deep_incubation")  # the recommended ones first
WITHOUT = {
    "recommended": "growing",
    "deep_incubation_identity": "growing",
    "deep_incubation_stack": "stacking",
}  # the same start, never incubated


def _against_controls(table: StudyTable) -> list[str]:
    """Compare incubation with the same start without it, cell by cell."""
    there, lines = set(table.results["strategy"]), []
    for name, control in WITHOUT.items():
        if not {name, control} <= there:
            continue
        found = gains(table, control, [name])
        if found.empty:
            continue
        better, worse = (int((found["clear"] & (sign * found["gain"] > 0)).sum()) for sign in (1, -1))
        lines.append(
            f"Against the same start without incubation ({label(control)}), {label(name)} is clearly better in {better}, clearly "
            f"worse in {worse} and inside the noise in {len(found) - better - worse} of {len(found)} cells (mean "
            f"{found['gain'].mean():+.1f} points), for {found['critical_flops'].mean():.2f} of its critical path. "
            f"{family_text(found['comparisons'].max())}".strip()
        )
    return lines


def _against_workers(table: StudyTable) -> list[str]:
    """Compare incubation with K workers that train the whole network together for as long as its critical path."""
    there, together = set(table.results["strategy"]), "end_to_end_longer"
    name = next((name for name in INCUBATED if {name, together} <= there), None)
    if name is None:
        return []
    found = gains(table, together, [name])
    if found.empty:
        return []
    texts = ", ".join(gain_text(row) for _, row in found.iterrows())
    return [
        f"In the same time ({found['critical_flops'].mean():.2f} of the critical path), K workers that trained the whole network "
        f"together would cost {1 / found['flops'].mean():.1f} times as much; {label(name)} against that, in points: {texts}. "
        f"{family_text(found['comparisons'].max())}".strip()
    ]


def _assembled(table: StudyTable) -> list[str]:
    rows = table.results.dropna(subset=["accuracy", "assembled_accuracy", "meta_accuracy"])
    lines = []
    for name in (name for name in INCUBATED if name in set(rows["strategy"])):
        mine = rows[rows["strategy"] == name]
        mine = mine.assign(added=100 * (mine["accuracy"] - mine["assembled_accuracy"]))
        cells = mine.groupby(table.axes or "strategy")["added"].mean()
        span = f" (by cell from {cells.min():+.1f} to {cells.max():+.1f})" if len(cells) > 1 else ""
        ahead = 100 * (mine["accuracy"] - mine["meta_accuracy"]).mean()
        added = round(mine["added"].mean(), 1) + 0.0  # no "-0.0"
        side = "above" if ahead > 0 else "below"
        lines.append(
            f"{label(name)}: fine-tuning changes the assembled network by {added:+.1f} points{span}; the finished network is "
            f"{abs(ahead):.1f} points {side} its meta model."
        )
    return lines


def costs_text(costs: list[Cost], speed: float | None, jobs: int) -> str:
    """Say what a study will cost: a line a stage and one for all; hours from the speed that phases had here, if that is known."""
    unit, factor = flop_unit(max(cost.flops for cost in costs) or 1)
    lines = []
    for cost in costs:
        left = f"{cost.missing} of {cost.phases} phases to train, {cost.flops / factor:.3g} {unit}" if cost.missing else "done"
        lines.append(f"  {cost.title}: {cost.runs} runs, {left}")
    total = sum(cost.flops for cost in costs)
    if not total:
        return "\n".join([*lines, "Everything is trained."])
    total_text = f"Altogether {total / factor:.3g} {unit}"
    if speed:
        hours = total / speed / jobs / 3600
        total_text += f", about {hours:.1f} hours" if hours >= 1 else f", about {60 * hours:.0f} minutes"
        total_text += (
            f" for {jobs} phases side by side, at the {speed / 1e9:.3g} GFLOP/s that finished ones had here, without evaluation."
        )
    else:
        total_text += "; nothing was trained here yet that would tell how long that takes."
    return "\n".join([*lines, total_text])


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
