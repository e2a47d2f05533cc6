"""Over studies: the best way to train in pieces against the best end-to-end training, and what the same score costs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

import pandas as pd

from incubate_lib.report.tables.answers import against_best
from incubate_lib.report.tables.statistics import judged_text, rounded, spread
from incubate_lib.report.tables.studies import StudyTable
from incubate_lib.report.tables.verdict import cells, differences
from incubate_lib.report.words import BASELINE, label

# a network and a data set each; other studies vary one of these, and would count it several times
APART = ("digits-budget", "fashion-budget", "fashion-map", "fashion-families", "fashion-whole", "austen-budget", "austen-wide")
NO_PIECES = ("end_to_end", "mat", "meta_alone", "from_", "random_modules", "imitation")  # how strategies begin that are none

FIFTH = 0.2  # of end to end's critical path


@dataclass(frozen=True)
class Setting:
    """One network on one set of data: what is best at any budget."""

    study: str
    place: str
    shown: dict[str, str]  # for people: heading → text
    gain: float  # of the strategy of pieces with the best mean over end to end's best mean, in points
    is_clear: bool  # after correction for all strategies of pieces and budgets, as it is the best of so many
    path: float  # share of end to end's critical path that suffices for its best mean; NaN where none does
    is_meta_best: bool  # whether the meta model alone, for its cost or less, has a better mean than all whole networks
    # whether at some budget end to end is clearly ahead of the meta model's network with all of it; none: nobody trained that
    depth_pays: bool | None


def settings(table: StudyTable) -> list[Setting]:
    """Return a study's settings: one for each combination of its axes but the budget."""
    metric, found = table.metric, []
    results = table.results if "budget" in table.axes else table.results.assign(budget="")
    axes = [axis for axis in table.axes if axis != "budget"]
    for place, every in cells(results, axes):
        group = every[~every["strategy"].str.startswith(NO_PIECES) | (every["strategy"] == BASELINE)]
        compared = against_best(replace(table, results=group.drop(columns=axes)))
        if compared.empty:
            continue
        means = metric.sign * group.groupby(["strategy", "budget"])["score"].mean()

        def written(strategy: str, budget: str, group: pd.DataFrame = group) -> str:
            rows = group[(group["strategy"] == strategy) & (group["budget"] == budget)]
            return metric.headed(spread(rows["score"], metric)) + (f" at {budget}" if budget else "")

        best = compared.loc[(metric.sign * compared["score"]).idxmax()]
        enough = compared[metric.ahead(compared["score"], compared["best"]) >= 0].sort_values("critical_flops", kind="stable")
        path = enough["critical_flops"].iloc[0] if len(enough) else math.nan
        meta = metric.best(every.groupby(["strategy", "budget"])["meta_score"].mean())
        alone = differences(every, [("meta_alone", BASELINE)], ["budget"])
        shown = {
            "end to end's best": written(BASELINE, means[BASELINE].idxmax()),
            "best in pieces": f"{written(best['strategy'], best['budget'])}: {label(best['strategy'])}",
            "ahead by": judged_text(best),
            "path to end to end's best": f"{rounded(path, 2)}: {label(enough['strategy'].iloc[0])}" if len(enough) else "longer",
            "meta model alone": "–" if pd.isna(meta) else rounded(metric.scale * meta, metric.digits),
        }
        found.append(
            Setting(
                study=table.name,
                place=", ".join(place.values()),
                shown=shown,
                gain=best["gain"],
                is_clear=bool(best["clear"]),
                path=path,
                is_meta_best=bool(metric.sign * meta > means.max()),
                depth_pays=bool((alone["clear"] & (alone["gain"] < 0)).any()) if len(alone) else None,
            )
        )
    return found


def in_short(tables: Iterable[StudyTable]) -> str:
    """Say in three sentences what all settings of some studies say, whatever the numbers are."""
    every = [setting for table in tables for setting in settings(table)]
    ahead = [setting for setting in every if setting.gain > 0]
    clear, behind = sum(s.is_clear for s in ahead), sum(s.is_clear for s in every if s.gain < 0)
    paths = [setting.path for setting in every if not math.isnan(setting.path)]
    least, middle = (rounded(of(paths), 2) for of in (min, median)) if paths else ("", "")
    known = [setting for setting in every if setting.depth_pays is not None]
    deep = [setting for setting in known if setting.depth_pays]
    sooner = sum(setting.path <= FIFTH for setting in deep)
    shares = f", for {least} of its critical path at least and {middle} in the median" if paths else ""
    return (
        f"In {len(ahead)} of {len(every)} settings the best strategy of pieces is ahead of the best end-to-end training (clearly "
        f"in {clear}), and clearly behind in {behind}. It reaches end to end's best score in {len(paths)} of {len(every)}"
        f"{shares}. In {sum(s.is_meta_best for s in every)} of {len(every)} the shallow meta model alone is better than any "
        f"whole network. Where it had the whole budget (in {len(known)} of {len(every)}), depth pays clearly in {len(deep)}, and "
        f"pieces reach end to end's best for a fifth of its critical path in {sooner} of those."
    )
