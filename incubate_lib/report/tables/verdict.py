"""What records say in words: each strategy against end to end, the meta model alone, fine-tuning that made a network worse."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from incubate_lib import tasks
from incubate_lib.config.members import PHASES
from incubate_lib.pipeline.graph import Node
from incubate_lib.report.tables.hardware import mixes
from incubate_lib.report.tables.statistics import compare, family_text, paired, points_text, verdict_text
from incubate_lib.report.words import BASELINE, label, metric_of
from incubate_lib.tasks import Metric

SMALL_DIFFERENCE = 2.5  # points, about what strategies differ by; a set that tells less apart is named
COSTS = ["flops", "critical_flops", "seconds"]


def is_worse(metric: Metric, before: list[float], after: list[float], images: int) -> bool:
    """Whether scores, one a seed, became worse by more than chance explains.

    The mean loss must exceed two standard errors, of an evaluation on so many images and, with several seeds, over these. How
    uncertain an evaluation is, is known of shares only, so that one seed says nothing of other scores.
    """
    b, a, losses = fmean(before), fmean(after), [metric.sign * (x - y) for x, y in zip(before, after, strict=True)]
    error = 0.0
    if metric.is_share:
        error = math.sqrt((b * (1 - b) + a * (1 - a)) / images)
    elif len(losses) < 2:
        return False
    if len(losses) > 1:
        error = max(error, stdev(losses) / math.sqrt(len(losses)))
    return fmean(losses) > 2 * error


def lowered(nodes: Iterable[Node]) -> str:
    """Say of which strategies fine-tuning made the score worse, and what to try: a line each, nothing where it did not.

    `nodes` are phases of any kind and number of seeds, such as `Plan.finals.values()`; finished fine-tuning counts.
    """
    lines = []
    for name, group in _by_strategy([node for node in nodes if node.settings.phase == "finetune" and node.summary()]).items():
        summaries = [node.summary() for node in group]
        before, after = ([s[key] for s in summaries] for key in ("start_score", "score"))
        metric = tasks.metric(summaries[0]["metric"])
        if is_worse(metric, before, after, summaries[0]["eval_images"]):
            strategy = group[0].experiment.settings.strategies[name]
            shorter = "larger strategies.{}.shares" if strategy.get("shares") else "fewer strategies.{}.phases.finetune.epochs"
            lines.append(
                f"Fine-tuning {'lowered' if metric.higher_is_better else 'raised'} {label(name)} from "
                f"{metric.scale * fmean(before):.{metric.digits}f} to {metric.written(fmean(after), ' ')} "
                f"({_seeds(group)}; more than chance explains). Try a lower strategies.{name}.phases.finetune.lr (it was "
                f"{group[0].settings.training.lr:g}), or {shorter.format(name)}."
            )
    return "\n".join(lines)


def doubts(nodes: Iterable[Node]) -> str:
    """Say what to be careful about: fine-tuning or incubation that made a score worse, and a set too small to tell strategies
    apart; a line each. `nodes` as for `lowered`."""
    nodes = list(nodes)
    return "\n".join(filter(None, [lowered(nodes), _worse_modules(nodes), _few_samples(nodes)]))


def _worse_modules(nodes: list[Node]) -> str:
    """Say which modules had a better score before they learned than after."""
    lines = []
    for name, group in _by_strategy(nodes).items():
        found: dict[int, list[dict[str, Any]]] = {}
        modules = {node.digest: node for final in group for node in final.upstream("incubate")}
        for node in modules.values():
            if not (summary := node.summary()):  # a run is reported before all of it is done
                continue
            own = [summary] if node.settings.module_index is not None else []
            for module in summary.get("modules", own):  # of several that learned in one phase, or the phase's own
                found.setdefault(module["module_index"], []).append(summary | module)
        worse = []
        for index, summaries in sorted(found.items()):
            before, after = ([summary[key] for summary in summaries] for key in ("start_score", "score"))
            metric = tasks.metric(summaries[0]["metric"])
            if is_worse(metric, before, after, summaries[0]["eval_images"]):
                ends = (metric.written(fmean(scores), " ") for scores in (before, after))
                worse.append(f"{index + 1} ({' → '.join(ends)})")
        if worse:
            lines.append(
                f"Incubation made modules of {label(name)} worse: {', '.join(worse)}. More updates, or a lower "
                "phases.incubate.lr, may help."
            )
    return "\n".join(lines)


def _few_samples(nodes: list[Node]) -> str:
    """Say how far two strategies differ by the choice of the samples alone, where that is more than a point or two."""
    summaries = [summary for node in nodes if (summary := node.summary())]
    if not summaries or not (metric := tasks.metric(summaries[0]["metric"])).is_share:
        return ""
    number, mean = summaries[0]["eval_images"], fmean(summary["score"] for summary in summaries)
    error = metric.scale * 2 * math.sqrt(2 * mean * (1 - mean) / number)
    if error < SMALL_DIFFERENCE:
        return ""
    return f"Of {number:,} samples to evaluate on, chance alone makes differences of up to {error:.0f} points."


def _by_strategy(nodes: list[Node]) -> dict[str, list[Node]]:
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        groups.setdefault(node.strategy, []).append(node)
    return groups


def _seeds(group: list[Node]) -> str:
    return f"mean of {len(group)} seeds" if len(group) > 1 else "one seed"


def differences(table: pd.DataFrame, pairs: Iterable[tuple[str, str]], axes: Sequence[str] = ()) -> pd.DataFrame:
    """Return how far the first strategy of each pair is ahead of the second, paired by seed; all are one family.

    A row a cell and pair that have a seed in common; cells are those of a study with these axes, without axes there is one.
    Columns: the axes, strategy, other, metric (the cell's), score and other_score (means over the common seeds), flops,
    critical_flops and seconds (the first's over the second's; seconds NaN where devices differ), then `statistics.COLUMNS`.
    """
    rows, found = [], []
    for (place, cell), (name, other) in itertools.product(cells(table, axes), pairs):
        gain = paired(cell, name, other)
        if gain.empty:
            continue
        cell = cell[cell["seed"].isin(gain.index)]
        mine, theirs = (cell[cell["strategy"] == each] for each in (name, other))
        means = {"metric": metric_of(cell).name, "score": mine["score"].mean(), "other_score": theirs["score"].mean()}
        costs = mine.reindex(columns=COSTS).mean() / theirs.reindex(columns=COSTS).mean()
        if mixes(mine, theirs):
            costs["seconds"] = math.nan
        found.append(gain)
        rows.append(place | {"strategy": name, "other": other} | means | costs.to_dict())
    named = pd.DataFrame(rows, columns=[*axes, "strategy", "other", "metric", "score", "other_score", *COSTS])
    return pd.concat([named, compare(found)], axis="columns")


def cells(rows: pd.DataFrame, axes: Sequence[str]) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """Yield each cell's place, its values along the axes, and its rows."""
    for values, cell in rows.groupby(list(axes), sort=False) if axes else [((), rows)]:
        yield dict(zip(axes, values, strict=True)), cell


def baseline_of(table: pd.DataFrame) -> str:
    """Return what others are compared with: end to end or, where all is trained further, what starts from its network."""
    return next((name for name in (BASELINE, f"from_{BASELINE}") if name in set(table["strategy"])), BASELINE)


def against_baseline(table: pd.DataFrame, axes: Sequence[str] = ()) -> list[str]:
    """Say of each strategy, in each cell of the axes, how it does against end to end, and what was corrected for."""
    base = baseline_of(table)
    found = differences(table, [(name, base) for name in table["strategy"].unique() if name != base], axes)
    text = []
    for row in found.to_dict("records"):
        what = ", ".join([label(row["strategy"]), *(f"{axis} {row[axis]}" for axis in axes)])
        text.append(
            f"{what}: {points_text(row)} than {label(base)} ({verdict_text(row)}), for {row['flops']:.2f} times its training "
            f"FLOPs, {row['critical_flops']:.2f} times on the critical path."
        )
    return [*text, *filter(None, [family_text(found["comparisons"].max())])] if text else []


def not_from_nothing(phases: pd.DataFrame) -> list[str]:
    """Return the strategies that start from weights of a file: no meta model and no network was trained from random ones."""
    table = phases.reindex(columns=["strategy", "phase", "steps"]).dropna(subset="strategy")
    others = table.groupby("strategy")["phase"].agg(set)
    begun = {row.strategy for row in table.itertuples() if PHASES[row.phase].begins(row.steps, others[row.strategy])}
    return [name for name in table["strategy"].unique() if name not in begun]


def meta_alone(table: pd.DataFrame, phases: pd.DataFrame) -> str:
    """Say what the small shared network reaches by itself: the depth must be worth its cost."""
    meta = phases[phases["phase"] == "meta"].drop_duplicates(["seed", "flops", "score"])
    means = table.groupby("strategy")[["score", "flops"]].mean()
    if meta.empty or BASELINE not in means.index:
        return ""
    if meta["seed"].duplicated().any() or meta["flops"].nunique() > 1:  # strategies may have meta models of their own
        return ""
    share = meta["flops"].mean() / means.loc[BASELINE, "flops"]
    metric, alone = metric_of(table, meta), meta["score"].mean()
    text = f"The meta model alone has {metric.written(alone, ' ')}"
    text += f" for {share:.2f} times end to end's training FLOPs" if share else ""
    behind = [label(name) for name in means.index if metric.ahead(means.loc[name, "score"], alone) <= 0]
    return text + (f"; not better on average: {', '.join(behind)}." if behind else ", and every strategy is better on average.")
