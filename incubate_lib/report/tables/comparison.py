"""Strategies side by side: the table of scores and costs, and how many samples of each class are right."""

from collections.abc import Sequence

import pandas as pd

from incubate_lib.pipeline.graph import Plan
from incubate_lib.report.tables.hardware import hardware_of, mixes
from incubate_lib.report.tables.records import Results
from incubate_lib.report.tables.statistics import spread
from incubate_lib.report.tables.verdict import baseline_of
from incubate_lib.report.words import flop_unit, label, seconds_text


def comparison(results: Results) -> pd.DataFrame:
    """Return the table people look at: a column a strategy, mean ± std over seeds, costs relative to end-to-end."""
    table, metric, rows = results.strategies, results.metric, []
    base = table[table["strategy"] == baseline_of(table)]
    unit, factor = flop_unit(table["flops"].max() if len(table) else 1)
    headings = {"flops": unit, "critical_flops": f"critical path {unit}"}
    headings |= {"seconds": "training s", "critical_seconds": "critical path s"}
    for name, group in table.groupby("strategy", sort=False):
        row = {"strategy": label(name), "seeds": len(group), metric.heading: spread(group["score"], metric)}
        row[metric.headed("meta model")] = spread(group["meta_score"], metric)
        row[metric.headed("assembled")] = spread(group["assembled_score"], metric)
        for cost, heading in headings.items():
            mean, is_time = group[cost].mean(), "seconds" in cost
            row[heading] = seconds_text(mean) if is_time else f"{mean / factor:.2f}"
            row[heading] += f" ({mean / base[cost].mean():.2f}×)" if len(base) else ""
            row[heading] += mixes(group, base) if is_time else ""
        rows.append(row)
    return pd.DataFrame(rows).set_index("strategy").T.rename_axis(columns=None)


def by_class(run: Plan, names: Sequence[str] = (), most: int = 20) -> pd.DataFrame:
    """Return a row a class, the worst first: its samples, and how many percent of them each finished network of a run has right,
    the mean over seeds. Of more than `most` classes only the worst and the best are kept, half of `most` each.

    Empty where no summary has counts: of tasks without classes, and of networks that were trained before counts were kept.
    `names` are those of the classes, where they are known.
    """
    shares, samples = {}, []
    for (strategy, seed), final in run.finals.items():
        if counts := (final.summary() or {}).get("classes"):
            samples = counts["samples"]
            shares[label(strategy), seed] = 100 * pd.Series(counts["right"]) / pd.Series(samples)  # none: NaN, and left out below
    if not shares:
        return pd.DataFrame()
    table = pd.DataFrame(shares).T.groupby(level=0, sort=False).mean().T.dropna()
    table.insert(0, "images", pd.Series(samples))
    table.insert(0, "class", [names[i] if i < len(names) else str(i) for i in table.index])
    table = table.iloc[table.iloc[:, 2:].mean(axis=1).argsort(kind="stable")]
    return table if len(table) <= most else pd.concat([table[: most // 2], table[-(most // 2) :]])


def hardware(results: Results) -> str:
    """Return where and when the numbers were measured, in one line."""
    return hardware_of(results.strategies)
