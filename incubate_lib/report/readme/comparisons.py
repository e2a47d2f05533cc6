"""Every comparison that README speaks of, a section a table, a table a family."""

import itertools

import pandas as pd

from incubate_lib.report.readme.sources import compared_with, run_of, study_of
from incubate_lib.report.readme.text import markdown, with_minus
from incubate_lib.report.tables import studies
from incubate_lib.report.tables.mat import against_others
from incubate_lib.report.tables.records import published_runs
from incubate_lib.report.tables.statistics import interval_text, paired, rounded
from incubate_lib.report.tables.verdict import differences
from incubate_lib.report.words import BASELINE, label


def comparisons() -> str:
    """Return the file that shows every comparison that README speaks of, a section a table, a table a family."""
    parts = [
        "# Every comparison\n\nWritten by `incubate figures` from the tables in this folder. Differences are points of top-1, "
        "paired by seed. A table is a family: **clear** is what Student's paired t-test, corrected for all comparisons of its "
        "table by Holm's procedure, tells from zero at 5 %. The corrected interval has the level at which that procedure tests "
        "the difference, and excludes zero exactly where it is clear; beside it the 95 % interval that the difference would "
        "have if it were the only one.\n"
    ]
    for name in studies.published_studies():
        table = study_of(name)
        parts.append(f"## {name}\n")
        parts.append(_comparison_table(studies.gains(table).assign(other=BASELINE), table.axes))
        there = set(table.results["strategy"])
        for strategy, control in studies.WITHOUT.items():
            if {strategy, control} <= there:
                parts.append(_comparison_table(studies.gains(table, control, [strategy]).assign(other=control), table.axes))
        if not table.axes:
            best = ["growing", "deep_incubation_identity", "stacking", "deep_incubation_stack"]
            parts.append(_comparison_table(differences(table.results, list(itertools.combinations(best, 2))), []))
            pairs = [("deep_incubation_identity", "end_to_end_longer")]
            pairs += [("random_start_inherited_stem_and_head", "random_start_half_for_meta")]
            parts += [_comparison_table(differences(table.results, [pair]), []) for pair in pairs]
    for name in published_runs():
        rows = run_of(name).strategies
        parts.append(f"## {name}\n")
        parts.append(_comparison_table(compared_with(name, BASELINE, None), []))
        if "mat" in set(rows["strategy"]):
            parts.append(_comparison_table(against_others(run_of(name)), []))
            inside = [("deep_incubation_mat", "deep_incubation")]
            parts += [_comparison_table(differences(rows, inside), [])] if len(paired(rows, *inside[0])) else []
    return "\n".join(parts)


def _comparison_table(found: pd.DataFrame, axes: list[str]) -> str:
    rows = []
    for row in found.to_dict("records"):
        gain, half = row["gain"], row["half_alone"]
        intervals = (gain - half, gain + half), (row["low"], row["high"])
        rows.append([
            *(row[axis] for axis in axes), label(row["strategy"]), label(row["other"]), str(row["seeds"]), rounded(gain, 2, "+"),
            *(interval_text(low, high, 2) for low, high in intervals), f"{row['p_holm']:.2g}",
            "**clear**" if row["clear"] else "inside the noise",
        ])  # fmt: skip
    head = [*axes, "strategy", "against", "seeds", "points", "95 % alone", "corrected", "p, corrected", ""]
    return with_minus(markdown(head, rows))
