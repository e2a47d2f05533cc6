"""What a study says about training in pieces, in sentences."""

import pandas as pd

from incubate_lib.config.study import BASELINE
from incubate_lib.report.tables.hardware import mixed_text
from incubate_lib.report.tables.statistics import counted, family_text, gain_text
from incubate_lib.report.tables.studies import WITHOUT, StudyTable, at_equal_cost, gains
from incubate_lib.report.tables.verdict import against_baseline, cells, differences
from incubate_lib.report.words import label


def answer(table: StudyTable) -> list[str]:
    """Say in sentences what a study says about training in pieces, whatever the numbers are."""
    if BASELINE not in set(table.results["strategy"]):
        return against_baseline(table.results, table.axes) or ["There is no end-to-end training in this study to compare with."]
    lines = [
        *_changes(table),
        *_cheapest(table),
        *_largest_gain(table),
        *_against_controls(table),
        *_against_workers(table),
        *_assembled(table),
    ]
    lines = lines or against_baseline(table.results, table.axes)
    lines = lines or ["There is nothing to compare: no other strategy has a finished seed in common with end to end."]
    return [*lines, *filter(None, [mixed_text(table.results)])]


def reached(table: StudyTable) -> pd.DataFrame:
    """Return the cheapest cell in which each strategy is at least as good on average as end to end in its best cell.

    Cells are compared along the axis `budget`, with the other axes' values kept. Columns: the other axes, the budget at which,
    strategy, metric, score, best (end to end's), flops, critical_flops and seconds relative to end to end's best, then
    `statistics.COLUMNS`; the family is every cell that was compared.
    """
    candidates = against_best(table)
    good = candidates[table.metric.ahead(candidates["score"], candidates["best"]) >= 0].sort_values("flops", kind="stable")
    return good.drop_duplicates([*_other_axes(table), "strategy"]).sort_index().reset_index(drop=True)


def changes(table: StudyTable) -> pd.DataFrame:
    """Return how far each value of the axis `recipe` is ahead of its first, for each strategy, paired by seed.

    The columns are those of `differences`, with the strategy as `of`, and values as `strategy` and `other`; all are one family.
    A recipe that says nothing of a strategy's phases trains the same networks, and is not compared.
    """
    first, *names = table.results["recipe"].unique()
    axes = [*_other_axes(table, "recipe"), "of"]
    turned = table.results.rename(columns={"strategy": "of", "recipe": "strategy"})
    parts = []
    for _, cell in turned.groupby(axes, sort=False):
        scores = {name: rows.set_index("seed")["score"].to_dict() for name, rows in cell.groupby("strategy", sort=False)}
        parts.append(cell[[name == first or scores[name] != scores.get(first) for name in cell["strategy"]]])
    return differences(pd.concat(parts), [(name, first) for name in names], axes)


def _other_axes(table: StudyTable, but: str = "budget") -> list[str]:
    return [axis for axis in table.axes if axis != but]


def against_best(table: StudyTable) -> pd.DataFrame:
    """Compare every cell of every strategy with end to end's best cell, on the seeds that both have; what is not finished is
    left out. The columns are those of `reached`.
    """
    others = _other_axes(table)
    parts = []
    for _, group in cells(table.results, others):
        base = group[group["strategy"] == BASELINE].dropna(subset="score")
        means = table.metric.sign * base.groupby("budget", sort=False)["score"].mean()
        best = base[base["budget"] == means.idxmax()] if len(base) else base
        for place, part in cells(group[group["strategy"] != BASELINE], ["budget"]):
            parts += [part, best.assign(**place)]
    pairs = [(name, BASELINE) for name in table.results["strategy"].unique() if name != BASELINE]
    found = differences(pd.concat([table.results[:0], *parts]), pairs, [*others, "budget"])
    order = {column: list(table.results[column].unique()).index for column in (*others, "strategy")}
    found = found.sort_values(list(order), key=lambda c: c.map(order[c.name]), kind="stable", ignore_index=True)
    return found.drop(columns="other").rename(columns={"other_score": "best"})


def _changes(table: StudyTable) -> list[str]:
    """Say what each other recipe changes."""
    if "recipe" not in table.axes or (found := changes(table)).empty:
        return []
    lines = []
    for place, rows in cells(found, [*_other_axes(table, "recipe"), "of"]):
        texts = "; ".join(f"{row['strategy']} {gain_text(row)}" for row in rows.to_dict("records"))
        where = "".join(f", {axis} {value}" for axis, value in place.items() if axis != "of")
        lines.append(f"{label(place['of'])}{where}: recipes against {rows['other'].iloc[0]}, in {table.metric.points}: {texts}.")
    return [*lines, *filter(None, [family_text(found["comparisons"].max())])]


def _cheapest(table: StudyTable) -> list[str]:
    if "budget" not in table.axes:
        return []
    candidates, found, others = against_best(table), reached(table), _other_axes(table)
    written = table.metric.written

    def named(row: dict) -> str:
        where = ", ".join(f"{axis} {row[axis]}" for axis in others)
        return label(row["strategy"]) + (f" ({where})" if where else "")

    lines = [
        f"{named(row)} reaches end to end's best ({written(row['best'])}) on average, with {written(row['score'])}, for "
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
            f"The largest {word} of {counted(len(equal), 'comparison')} at equal FLOPs, in {table.metric.points}: "
            f"{label(row['strategy'])}{where}, {gain_text(row)}. {family_text(row['comparisons'])}".strip()
        )
    return lines


# the best ones first
INCUBATED = ("deep_incubation_recommended", "deep_incubation_identity", "deep_incubation_stack", "deep_incubation")


def _against_controls(table: StudyTable) -> list[str]:
    """Compare incubation with the same start without it, cell by cell."""
    there, metric, lines = set(table.results["strategy"]), table.metric, []
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
            f"{found['gain'].mean():+.{metric.digits}f} {metric.points}), for {found['critical_flops'].mean():.2f} of its "
            f"critical path. {family_text(found['comparisons'].max())}".strip()
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
        f"together would cost {1 / found['flops'].mean():.1f} times as much; {label(name)} against that, in "
        f"{table.metric.points}: {texts}. {family_text(found['comparisons'].max())}".strip()
    ]


def _assembled(table: StudyTable) -> list[str]:
    rows = table.results.dropna(subset=["score", "assembled_score", "meta_score"])
    metric, digits, lines = table.metric, table.metric.digits, []
    for name in (name for name in INCUBATED if name in set(rows["strategy"])):
        mine = rows[rows["strategy"] == name]
        mine = mine.assign(added=metric.scale * (mine["score"] - mine["assembled_score"]))
        cells = mine.groupby(table.axes or "strategy")["added"].mean()
        span = f" (by cell from {cells.min():+.{digits}f} to {cells.max():+.{digits}f})" if len(cells) > 1 else ""
        above = metric.scale * (mine["score"] - mine["meta_score"]).mean()
        added = round(mine["added"].mean(), digits) + 0.0  # no "-0.0"
        side = "above" if above > 0 else "below"
        lines.append(
            f"{label(name)}: fine-tuning changes the assembled network by {added:+.{digits}f} {metric.points}{span}; the "
            f"finished network is {abs(above):.{digits}f} {metric.points} {side} its meta model."
        )
    return lines
