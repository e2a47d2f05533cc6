"""Differences paired by seed, and which of them stand out of the noise: the one place where that is decided.

The rule. Comparisons that are shown together (a study's with end to end, a run's, those of one sentence) are a *family*. A
difference is **clear** if Student's paired t-test rejects zero at 5 % after Holm's step-down correction for the size of its
family, so the chance that a family without any true difference shows a clear one is at most 5 %. Its interval has the level
at which Holm's procedure tests it, at least 95 %, and excludes zero exactly where the difference is clear.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

ALPHA = 0.05
COLUMNS = ["seeds", "better", "gain", "low", "high", "p", "clear", "family"]


def paired(table: pd.DataFrame, strategy: str, other: str) -> pd.Series:
    """Return how far a strategy is ahead of another in points of top-1: a value for each seed that both have.

    `table` has a row a strategy and seed, with accuracy as a fraction.
    """
    ours, theirs = (table[table["strategy"] == name].set_index("seed")["accuracy"] for name in (strategy, other))
    return 100 * (ours - theirs).dropna()


def compare(differences: Sequence[pd.Series]) -> pd.DataFrame:
    """Judge a family of differences, each with a value a seed; return a row for each, in their order.

    Columns: seeds and better (how many there are, how many are above zero), gain (their mean), low and high (its interval,
    NaN for one seed), p (two-sided, after Holm's correction), clear, and family (the number of comparisons corrected for:
    those of at least two seeds). A difference without any value is refused.
    """
    from scipy.special import stdtr, stdtrit  # Student's t; scipy.stats takes seconds to import

    values = [np.asarray(difference.dropna(), dtype=float) for difference in differences]
    if any(len(value) == 0 for value in values):
        raise ValueError("a difference without a common seed cannot be judged")
    rows = pd.DataFrame({
        "seeds": [len(value) for value in values], "better": [int((value > 0).sum()) for value in values],
        "gain": [value.mean() for value in values], "low": math.nan, "high": math.nan, "p": math.nan, "clear": False,
    }, columns=COLUMNS[:-1]).astype({"gain": float})  # fmt: skip
    errors = {i: value.std(ddof=1) / math.sqrt(len(value)) for i, value in enumerate(values) if len(value) > 1}
    alone = {i: _p(stdtr, rows["gain"][i], error, rows["seeds"][i] - 1) for i, error in errors.items()}
    divisor, rejects, largest = len(errors), True, 0.0
    for rank, i in enumerate(sorted(alone, key=alone.get)):  # the smallest p first
        largest = max(largest, min(1.0, (len(errors) - rank) * alone[i]))
        half = errors[i] * stdtrit(rows["seeds"][i] - 1, 1 - ALPHA / divisor / 2)
        rejects = rejects and bool(abs(rows["gain"][i]) > half)
        rows.loc[i, ["low", "high", "p"]] = rows["gain"][i] - half, rows["gain"][i] + half, largest
        rows.loc[i, "clear"] = rejects
        divisor -= rejects  # after the first that is not clear the level stays, so that no later interval excludes zero
    return rows.assign(family=len(errors))


def _p(stdtr, mean: float, error: float, freedom: int) -> float:
    """Return the two-sided p-value of a mean; without any spread it is 0, or 1 where the mean is zero, too."""
    if error == 0:
        return float(mean == 0)
    return float(2 * stdtr(freedom, -abs(mean) / error))


def gain_text(row: pd.Series) -> str:
    """Return a difference with its interval, and whether it stands out of the noise."""
    if math.isnan(row["low"]):
        return f"{row['gain']:+.1f} (one seed)"
    return f"{row['gain']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]" + ("" if row["clear"] else ", inside the noise")


def judged_text(row: pd.Series) -> str:
    """Return the verdict on a difference in words, with the number of seeds on its side."""
    if row["seeds"] < 2:
        return "one seed only, so nothing is said about chance"
    return f"{'clear' if row['clear'] else 'inside the noise'} at 95 %, {row['better']} of {row['seeds']} seeds better"


def family_text(count: int) -> str:
    """Say what was corrected for; nothing where a single comparison is shown."""
    return f"Corrected for {count} comparisons (Holm)." if count > 1 else ""
