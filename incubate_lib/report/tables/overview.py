"""Over studies: the best way to train in pieces against the best end-to-end training, and what the same score costs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pandas as pd

from incubate_lib.report.tables.answers import against_best
from incubate_lib.report.tables.statistics import judged_text, rounded, spread
from incubate_lib.report.tables.studies import StudyTable
from incubate_lib.report.tables.verdict import cells, differences
from incubate_lib.report.words import BASELINE, label
from incubate_lib.tasks import Metric

# a network and a data set each; other studies vary one of these, and would count it several times
APART = (
    "digits-budget",
    "fashion-budget",
    "fashion-map",
    "fashion-families",
    "fashion-whole",
    "austen-budget",
    "austen-wide",
    "austen-masked",
)
NO_PIECES = ("end_to_end", "mat", "meta_alone", "from_", "random_modules", "imitation")  # how strategies begin that are none

FIFTH = 0.2  # of end to end's critical path
ROUNDED = 1.01  # equal costs differ by a part of an update


@dataclass(frozen=True)
class Setting:
    """One network on one set of data: what is best at any budget."""

    study: str
    place: str
    shown: dict[str, str]  # for people: heading → text
    gain: float  # of the strategy of pieces with the best mean over end to end's best mean, in points
    is_clear: bool  # after correction for all strategies of pieces and budgets, as it is the best of so many
    path: float  # share of end to end's critical path that suffices for its best mean; NaN where none does
    is_meta_better: bool  # whether the meta model alone, for no more cost, has at least end to end's best mean
    # whether at some budget end to end, or a strategy of pieces, is clearly ahead of the meta model's network, which may have all
    # of that budget, and stops where it is best; none: nobody trained that
    whole_pays: bool | None
    pieces_pay: bool | None


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
        cost = every[(every["strategy"] == BASELINE) & (every["budget"] == means[BASELINE].idxmax())]["flops"].mean()
        alone = every[every["flops"] < ROUNDED * cost].groupby(["strategy", "budget"])["meta_score"].mean()
        meta = metric.best(alone)
        fastest = f"{rounded(path, 2)}: {label(enough['strategy'].iloc[0])}" if len(enough) else "not reached"
        shown = {
            "end to end's best": written(BASELINE, means[BASELINE].idxmax()),
            "best in pieces": f"{written(best['strategy'], best['budget'])}: {label(best['strategy'])}",
            "ahead by": judged_text(best),
            "path to end to end's best": fastest,
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
                is_meta_better=bool(metric.sign * meta >= means[BASELINE].max()),
                whole_pays=clearly_over_shallow(every, [BASELINE], metric),
                pieces_pay=clearly_over_shallow(every, compared["strategy"].unique(), metric),
            )
        )
    return found


def clearly_over_shallow(rows: pd.DataFrame, names: Iterable[str], metric: Metric) -> bool | None:
    """Return whether one of some strategies is clearly ahead of the meta model's network at some budget; none without such rows.

    That network is as good as at its best budget up to each: nobody has to train it longer than is good for it.
    """
    shallow = rows[rows["strategy"] == "meta_alone"].dropna(subset="score")
    if shallow.empty:
        return None
    means = metric.sign * shallow.groupby("budget")["score"].mean()
    budgets = shallow.groupby("budget")["flops"].mean().sort_values().index
    at_best = [
        shallow[shallow["budget"] == means[budgets[: i + 1]].idxmax()].assign(budget=budget) for i, budget in enumerate(budgets)
    ]
    table = pd.concat([rows[rows["strategy"] != "meta_alone"], *at_best])
    found = differences(table, [(name, "meta_alone") for name in names], ["budget"])
    return bool((found["clear"] & (found["gain"] > 0)).any())


def in_short(tables: Iterable[StudyTable]) -> str:
    """Say in a few sentences what all settings of some studies say, whatever the numbers are."""
    every = [setting for table in tables for setting in settings(table)]
    ahead = [setting for setting in every if setting.gain > 0]
    clear, behind = sum(s.is_clear for s in ahead), sum(s.is_clear for s in every if s.gain < 0)
    paths = [setting.path for setting in every if not math.isnan(setting.path)]
    ends = dict.fromkeys(rounded(of(paths), 2) for of in (min, max) if paths)
    shares = f", for {' to '.join(ends)} of its critical path" if paths else ""
    known = [setting for setting in every if setting.whole_pays is not None]
    deep = [setting for setting in known if setting.whole_pays or setting.pieces_pay]
    whole, pieces = sum(s.whole_pays for s in deep), sum(s.pieces_pay for s in deep)
    sooner = sum(setting.path <= FIFTH * ROUNDED for setting in deep)
    better, total = sum(setting.is_meta_better for setting in every), len(every)
    return (
        f"In {len(ahead)} of {total} cases, each a network on one set of data, the best strategy of pieces is ahead of the best "
        f"end-to-end training, clearly in {clear}; it is clearly behind in {behind}. In {len(paths)} of {total} some strategy "
        f"of pieces reaches end to end's best mean{shares}. But in {better} of {total} the shallow meta model alone, for no "
        f"more than end to end's cost, is at least as good on average. In {len(known)} cases we also gave that shallow network "
        f"whole budgets: a deep one is clearly better in {len(deep)} of them, trained end to end in {whole}, in pieces in "
        f"{pieces}. Of these {len(deep)}, pieces reach end to end's best for a fifth of its critical path in {sooner}."
    )
