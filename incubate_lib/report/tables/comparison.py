"""The table people look at, of strategies side by side."""

import pandas as pd

from incubate_lib.report.tables.hardware import hardware_of, mixes
from incubate_lib.report.tables.records import Results
from incubate_lib.report.tables.statistics import spread
from incubate_lib.report.words import BASELINE, flop_unit, label, seconds_text


def comparison(results: Results) -> pd.DataFrame:
    """Return the table people look at: a column a strategy, mean ± std over seeds, costs relative to end-to-end."""
    table, rows = results.strategies, []
    costs = ["flops", "critical_flops", "seconds", "critical_seconds"]
    means = table.groupby("strategy", sort=False)[costs].mean()
    base = means.loc[BASELINE] if BASELINE in means.index else None
    unit, factor = flop_unit(table["flops"].max() if len(table) else 1)
    for name, group in table.groupby("strategy", sort=False):
        mean = means.loc[name]
        mixed = mixes(group, table[table["strategy"] == BASELINE])

        def ratio(cost: str, mean: pd.Series = mean) -> str:
            return "" if base is None else f" ({mean[cost] / base[cost]:.2f}×)"

        rows.append({
            "strategy": label(name),
            "seeds": len(group),
            "top-1 %": spread(100 * group["accuracy"]),
            "meta model %": spread(100 * group["meta_accuracy"].dropna()),
            "assembled %": spread(100 * group["assembled_accuracy"].dropna()),
            unit: f"{mean['flops'] / factor:.2f}" + ratio("flops"),
            f"critical path {unit}": f"{mean['critical_flops'] / factor:.2f}" + ratio("critical_flops"),
            "training s": seconds_text(mean["seconds"]) + ratio("seconds") + mixed,
            "critical path s": seconds_text(mean["critical_seconds"]) + ratio("critical_seconds") + mixed,
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("strategy").T.rename_axis(columns=None)


def hardware(results: Results) -> str:
    """Return where and when the numbers were measured, in one line."""
    return hardware_of(results.strategies)
