"""Every comparison that README speaks of, a section a table, a table a family."""

import itertools
from collections.abc import Callable

import pandas as pd

from incubate_lib.report.readme.sources import run_of, study_of
from incubate_lib.report.readme.text import markdown, with_minus
from incubate_lib.report.tables import studies
from incubate_lib.report.tables.answers import changes
from incubate_lib.report.tables.mat import against_others
from incubate_lib.report.tables.records import published_runs
from incubate_lib.report.tables.statistics import interval_text, rounded
from incubate_lib.report.tables.studies import WITHOUT
from incubate_lib.report.tables.verdict import differences
from incubate_lib.report.words import label, metric_of

# further families that README speaks of, each a list of pairs
INHERITED = "random_start_inherited_stem_and_head"
BEST = ["growing", "deep_incubation_identity", "stacking", "deep_incubation_stack"]
MORE = {
    "digits-strategies": [
        list(itertools.combinations(BEST, 2)),
        [("deep_incubation_identity", "end_to_end_longer")],
        [(INHERITED, "random_start_half_for_meta")],
    ],
    "fashion-map": [[(INHERITED, "deep_incubation")], [("stacking", "growing")]],
    "fashion-controls": [[(INHERITED, "deep_incubation")], [(INHERITED, "end_to_end_longer")]],
    "fashion-longer": [[("end_to_end_longer", "deep_incubation")]],
    "austen-controls": [[(INHERITED, "stacking")], [(INHERITED, "end_to_end_longer")]],
    "austen-budget": [[("stacking", "growing")]],
    "mat-digits": [[("deep_incubation_mat", "deep_incubation")]],
}


def comparisons() -> str:
    """Return the file that shows every comparison that README speaks of, a section a table, a table a family."""
    names = [*studies.published_studies(), *published_runs()]
    *others, last = dict.fromkeys(study_of(name).metric.differences for name in names)
    scales = f"{', '.join(others)} or {last}" if others else last
    parts = [
        f"# Every comparison\n\nWritten by `incubate figures` from the tables in this folder. Differences are {scales}, "
        "paired by seed. A table is a family: a difference is **clear** if Student's paired t-test, corrected for all "
        "comparisons of its table by Holm's procedure, rejects zero at 5 %. The corrected interval has the level at which "
        "that procedure tests the difference, and excludes zero exactly where it is clear. *95 % alone* is the interval that "
        "the difference would have if it were the only one.\n"
    ]
    for name in names:
        table = study_of(name)
        there = set(table.results["strategy"])
        families = [studies.gains(table)]
        families += [studies.gains(table, control, [it]) for it, control in WITHOUT.items() if {it, control} <= there]
        families += [against_others(run_of(name))] if "mat" in there else []
        families += [differences(table.results, pairs, table.axes) for pairs in MORE.get(name, ())]
        parts += [f"## {name}\n", *(_table(found, table.axes) for found in families)]
        if "recipe" in table.axes:
            found = changes(table)
            axes = [axis for axis in table.axes if axis != "recipe"]
            parts.append(_table(found.assign(of=found["of"].map(label)), [*axes, "of"], ("recipe", str)))
    return "\n".join(parts)


def _table(found: pd.DataFrame, axes: list[str], compared: tuple[str, Callable[[str], str]] = ("strategy", label)) -> str:
    heading, named = compared
    metric, rows = metric_of(found), []
    digits = metric.digits + 1
    for row in found.to_dict("records"):
        gain, half = row["gain"], row["half_alone"]
        rows.append(
            {axis: row[axis] for axis in axes}
            | {
                heading: named(row["strategy"]),
                "against": named(row["other"]),
                "seeds": str(row["seeds"]),
                metric.points: rounded(gain, digits, "+"),
                "95 % alone": interval_text(gain - half, gain + half, digits),
                "corrected": interval_text(row["low"], row["high"], digits),
                "p, corrected": f"{row['p_holm']:.2g}",
                "": "**clear**" if row["clear"] else "inside the noise",
            }
        )
    return with_minus(markdown(rows))
