"""The table people look at, of strategies side by side."""

import pandas as pd

from incubate_lib.report.tables.hardware import hardware_of, mixes
from incubate_lib.report.tables.records import Results
from incubate_lib.report.tables.statistics import spread
from incubate_lib.report.words import BASELINE, flop_unit, label, seconds_text


def comparison(results: Results) -> pd.DataFrame:
    """Return the table people look at: a column a strategy, mean ± std over seeds, costs relative to end-to-end."""
    table, metric, rows = results.strategies, results.metric, []
    base = table[table["strategy"] == BASELINE]
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


def hardware(results: Results) -> str:
    """Return where and when the numbers were measured, in one line."""
    return hardware_of(results.strategies)
