"""What records say in words: each strategy against end to end, the meta model alone, fine-tuning that made a network worse."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean, stdev

import pandas as pd

from incubate_lib.pipeline.graph import Node
from incubate_lib.report.tables.hardware import mixes
from incubate_lib.report.tables.statistics import compare, family_text, paired, points_text, verdict_text
from incubate_lib.report.words import BASELINE, label

COSTS = ["flops", "critical_flops", "seconds"]


def is_lower(before: list[float], after: list[float], images: int) -> bool:
    """Whether accuracies (0 … 1, one a seed) fell by more than chance explains.

    The mean loss must exceed two standard errors, of judging by so many images and, with several seeds, over these.
    """
    b, a, losses = fmean(before), fmean(after), [x - y for x, y in zip(before, after, strict=True)]
    error = math.sqrt((b * (1 - b) + a * (1 - a)) / images)
    if len(losses) > 1:
        error = max(error, stdev(losses) / math.sqrt(len(losses)))
    return fmean(losses) > 2 * error


def lowered(nodes: Iterable[Node]) -> str:
    """Say of which strategies fine-tuning lowered the accuracy, and what to try: a line each, nothing where it did not.

    `nodes` are phases of any kind and number of seeds, such as `Plan.finals.values()`; finished fine-tuning counts.
    """
    tuned: dict[str, list[Node]] = {}
    for node in nodes:
        if node.settings.phase == "finetune" and node.summary():
            tuned.setdefault(node.strategy, []).append(node)
    lines = []
    for name, group in tuned.items():
        summaries = [node.summary() for node in group]
        before, after = ([s[key] for s in summaries] for key in ("start_accuracy", "accuracy"))
        if is_lower(before, after, summaries[0]["judge_images"]):
            strategy = group[0].experiment.settings.strategies[name]
            shorter = "larger strategies.{}.shares" if strategy.get("shares") else "fewer strategies.{}.phases.finetune.epochs"
            lines.append(
                f"Fine-tuning lowered {label(name)} from {100 * fmean(before):.1f} to {100 * fmean(after):.1f} % "
                f"({_seeds(group)}; more than chance explains). Try a lower strategies.{name}.phases.finetune.lr (it was "
                f"{group[0].settings.training.lr:g}), or {shorter.format(name)}."
            )
    return "\n".join(lines)


def _seeds(group: list[Node]) -> str:
    return f"mean of {len(group)} seeds" if len(group) > 1 else "one seed"


def differences(table: pd.DataFrame, pairs: Iterable[tuple[str, str]], axes: Sequence[str] = ()) -> pd.DataFrame:
    """Return how far the first strategy of each pair is ahead of the second, in points, paired by seed; all are one family.

    A row a cell and pair that have a seed in common; cells are those of a study with these axes, without axes there is one.
    Columns: the axes, strategy, other, accuracy and other_accuracy (means over the common seeds), flops, critical_flops and
    seconds (the first's over the second's; seconds NaN where devices differ), then `statistics.COLUMNS`.
    """
    rows, found = [], []
    for (place, cell), (name, other) in itertools.product(cells(table, axes), pairs):
        gain = paired(cell, name, other)
        if gain.empty:
            continue
        cell = cell[cell["seed"].isin(gain.index)]
        mine, theirs = (cell[cell["strategy"] == each] for each in (name, other))
        means = {"accuracy": mine["accuracy"].mean(), "other_accuracy": theirs["accuracy"].mean()}
        costs = mine.reindex(columns=COSTS).mean() / theirs.reindex(columns=COSTS).mean()
        if mixes(mine, theirs):
            costs["seconds"] = math.nan
        found.append(gain)
        rows.append(place | {"strategy": name, "other": other} | means | costs.to_dict())
    named = pd.DataFrame(rows, columns=[*axes, "strategy", "other", "accuracy", "other_accuracy", *COSTS])
    return pd.concat([named, compare(found)], axis="columns")


def cells(rows: pd.DataFrame, axes: Sequence[str]) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """Yield each cell's place, its values along the axes, and its rows."""
    for values, cell in rows.groupby(list(axes), sort=False) if axes else [((), rows)]:
        yield dict(zip(axes, values, strict=True)), cell


def against_baseline(table: pd.DataFrame) -> list[str]:
    """Say of each strategy how it does against end to end, and what was corrected for."""
    found = differences(table, [(name, BASELINE) for name in table["strategy"].unique() if name != BASELINE])
    text = [
        f"{label(row['strategy'])}: {points_text(row['gain'])} than end to end ({verdict_text(row)}), for "
        f"{row['flops']:.2f} times its training FLOPs, {row['critical_flops']:.2f} times on the critical path."
        for row in found.to_dict("records")
    ]
    return [*text, family_text(found["comparisons"].max())] if text else []


def not_from_nothing(phases: pd.DataFrame) -> list[str]:
    """Return the strategies that start from weights of a file: no meta model and no network was trained from random ones."""
    table = phases.reindex(columns=["strategy", "phase", "steps"]).dropna(subset="strategy")
    begun = set(table.loc[table["phase"].isin(["meta", "end_to_end"]) & (table["steps"] > 0), "strategy"])
    phases = table.groupby("strategy")["phase"].agg(set)
    begun |= {name for name, those in phases.items() if "assemble" in those and "meta" not in those}  # of random modules
    return [name for name in table["strategy"].unique() if name not in begun]


def meta_alone(table: pd.DataFrame, phases: pd.DataFrame) -> str:
    """Say what the small shared network reaches by itself: the depth must be worth its cost."""
    meta = phases[phases["phase"] == "meta"].drop_duplicates(["seed", "flops"])
    if meta.empty or meta["flops"].nunique() > 1:  # of strategies with meta models of their own each has another
        return ""
    means = table.groupby("strategy")[["accuracy", "flops"]].mean()
    share = meta["flops"].mean() / means.loc[BASELINE, "flops"]
    text = f"The meta model alone has {100 * meta['accuracy'].mean():.1f} %"
    text += f" for {share:.2f} times end to end's training FLOPs" if share else ""
    behind = [label(name) for name in means.index if means.loc[name, "accuracy"] <= meta["accuracy"].mean()]
    return text + (f"; not better on average: {', '.join(behind)}." if behind else ", and every strategy is better on average.")
