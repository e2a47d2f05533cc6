"""Differences paired by seed, and which of them stand out of the noise: the one place where that is decided.

The rule. Comparisons that are shown together (a study's with end to end, a run's, those of one sentence) are a *family*. A
difference is **clear** if Student's paired t-test rejects zero at 5 % after Holm's step-down correction for the size of its
family, so the chance that a family without any true difference shows a clear one is at most 5 %. Its interval has the level
at which Holm's procedure tests it, at least 95 %, and excludes zero exactly where the difference is clear.
"""

import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np
import pandas as pd

from incubate_lib import tasks
from incubate_lib.report.words import metric_of

ALPHA = 0.05
COLUMNS = ["seeds", "better", "gain", "low", "high", "half_alone", "p_holm", "clear", "comparisons"]


def paired(table: pd.DataFrame, strategy: str, other: str) -> pd.Series:
    """Return how far a strategy is ahead of another in its metric's points: a value for each seed that both have.

    `table` has a row a strategy and seed; ValueError where one has several, as those of several cells would have.
    """
    if table.duplicated(["strategy", "seed"]).any():
        raise ValueError("a strategy has several rows of one seed; compare one cell at a time")
    ours, theirs = (table[table["strategy"] == name].set_index("seed")["score"] for name in (strategy, other))
    return metric_of(table).ahead(ours, theirs).dropna()


def compare(differences: Sequence[pd.Series]) -> pd.DataFrame:
    """Judge a family of differences, each with a value a seed; return a row for each, in their order.

    Columns: seeds and better (how many there are, how many are above zero), gain (their mean), low and high (its interval,
    NaN for one seed), half_alone (half of the 95 % interval that the difference would have by itself), p_holm (two-sided,
    corrected), clear, and comparisons (how many are corrected for: those of at least two seeds). ValueError for a difference
    without any value.
    """
    from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes seconds to import

    values = [np.asarray(difference.dropna(), dtype=float) for difference in differences]
    if any(len(value) == 0 for value in values):
        raise ValueError("a difference without a common seed cannot be tested")
    rows = pd.DataFrame(columns=COLUMNS, index=range(len(values))).assign(
        seeds=[len(value) for value in values], better=[int((value > 0).sum()) for value in values],
        gain=[float(value.mean()) for value in values], low=math.nan, high=math.nan, half_alone=math.nan, p_holm=math.nan,
        clear=False,
    )  # fmt: skip
    errors = {i: value.std(ddof=1) / math.sqrt(len(value)) for i, value in enumerate(values) if len(value) > 1}

    def half(i: int, divisor: int) -> float:
        return errors[i] * stdtrit(rows["seeds"][i] - 1, 1 - ALPHA / divisor / 2)

    alone = {i: _p(stdtr, rows["gain"][i], error, rows["seeds"][i] - 1) for i, error in errors.items()}
    divisor, rejects, largest = len(errors), True, 0.0
    for rank, i in enumerate(sorted(alone, key=alone.get)):  # the smallest p first
        gain, width = rows["gain"][i], half(i, divisor)
        largest = max(largest, min(1.0, (len(errors) - rank) * alone[i]))
        rejects = rejects and bool(abs(gain) > width)
        rows.loc[i, ["low", "high", "half_alone", "p_holm"]] = gain - width, gain + width, half(i, 1), largest
        rows.loc[i, "clear"] = rejects
        divisor -= rejects  # after the first that is not clear the level stays, so that no later interval excludes zero
    return rows.assign(comparisons=len(errors))


def _p(stdtr, mean: float, error: float, freedom: int) -> float:
    """Return the two-sided p-value of a mean; without any spread it is 0, or 1 where the mean is zero, too."""
    if error == 0:
        return float(mean == 0)
    return float(2 * stdtr(freedom, -abs(mean) / error))


def gain_text(row: pd.Series) -> str:
    """Return a difference with its interval, and whether it stands out of the noise; `row` says which metric it is of."""
    digits = tasks.metric(row["metric"]).digits
    gain = rounded(row["gain"], digits, "+")
    if math.isnan(row["low"]):
        return f"{gain} (one seed)"
    return f"{gain} {interval_text(row['low'], row['high'], digits)}" + ("" if row["clear"] else ", inside the noise")


def judged_text(row: Mapping[str, Any]) -> str:
    """Return a difference with its interval and the verdict, also where that is "clear"."""
    return gain_text(row) + (", clear" if row["clear"] else "")


def interval_text(low: float, high: float, digits: int = 1) -> str:
    """Return an interval with so many decimals; with more where a bound would be shown as zero, which it may exclude."""

    def bound(value: float) -> str:
        texts = [rounded(value, more, "+") for more in range(digits, digits + 4)]
        return next((text for text in texts if text.strip("+-0.")), texts[0])

    return f"[{bound(low)}, {bound(high)}]"


def points_text(row: pd.Series) -> str:
    """Return a difference in words: "2.5 points better"; `row` says which metric it is of."""
    gain, metric = row["gain"], tasks.metric(row["metric"])
    side = "better" if gain > 0 else "worse" if gain < 0 else "better or worse"
    return metric.apart(rounded(abs(gain), metric.digits), side)


def verdict_text(row: pd.Series) -> str:
    """Return the verdict on a difference in words, with the number of seeds on its side."""
    if row["seeds"] < 2:
        return "one seed only, so nothing is said about chance"
    return f"{'clear' if row['clear'] else 'inside the noise'} at 95 %, {row['better']} of {row['seeds']} seeds better"


def family_text(count: int) -> str:
    """Say what was corrected for; nothing where a single comparison is shown."""
    return f"Corrected for {count} comparisons (Holm)." if count > 1 else ""


def counted(count: int, one: str, more: str = "") -> str:
    """Return a number of things: "1 seed", "5 seeds"."""
    return f"{count} {one if count == 1 else more or one + 's'}"


def rounded(value: float, digits: int = 1, sign: str = "") -> str:
    """Return a number with so many decimals, a five rounded away from zero as people do it; `sign` "+" shows both signs.

    What is rounded is the decimal number that the tables' six digits mean, not the binary one next to it, so that equal
    halves go one way. Zero has no sign.
    """
    if math.isnan(value):
        return "nan"
    exact = Decimal(f"{value:.9g}").quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return f"{exact if exact else abs(exact):{sign if exact else ''},f}"


def spread(scores: pd.Series, metric: tasks.Metric) -> str:
    """Return mean ± standard deviation over seeds, without the unit; a single seed is marked as such."""
    values = metric.scale * scores.dropna()
    if values.empty:
        return "–"
    mean = rounded(values.mean(), metric.digits)
    return f"{mean} ± {rounded(values.std(), metric.digits)}" if len(values) > 1 else f"{mean} (one seed)"
