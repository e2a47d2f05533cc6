"""The figures of a study, drawn from its tables."""

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.ticker import LogLocator

from incubate_lib import tasks
from incubate_lib.report.style import Figure, style
from incubate_lib.report.tables.plots import legend_below, mean_curve
from incubate_lib.report.tables.records import write_figure
from incubate_lib.report.tables.statistics import rounded
from incubate_lib.report.tables.studies import StudyTable, at_equal_cost, seeds_count, seeds_text
from incubate_lib.report.tables.verdict import baseline_of, cells
from incubate_lib.report.words import about, flop_unit, label

COSTS = {"flops": "all phases, one machine", "critical_flops": "critical path, modules side by side"}


def fronts(table: StudyTable) -> Figure | None:
    """Draw the score against total FLOPs and the critical path: a line a strategy over the axis `budget`.

    A row of panels is a value of other axes. None for a study without budgets: its points would lie above one another.
    """
    if "budget" not in table.axes:
        return None
    others = [axis for axis in table.axes if axis != "budget"]
    metric, groups = table.metric, list(cells(table.results, others))
    figure = Figure(figsize=(11, 3.6 * len(groups) + 0.9), layout="constrained")
    axes = figure.subplots(len(groups), len(COSTS), sharey="row", squeeze=False)
    for line, (place, rows) in zip(axes, groups, strict=True):
        where = ", ".join(f"{axis} {value}" for axis, value in place.items())
        for axis, (cost, title) in zip(line, COSTS.items(), strict=True):
            unit, factor = flop_unit(rows[cost].max())
            for name, group in rows.groupby("strategy", sort=False):
                curve = mean_curve(group, cost, by="budget").sort_values("cost")
                look = style(name) | {"label": label(name), "markersize": 5, "capsize": 3}
                deviation = metric.scale * curve["std"].fillna(0)
                axis.errorbar(curve["cost"] / factor, metric.scale * curve["score"], yerr=deviation, **look)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
            axis.set(xlabel=f"training cost ({unit})", title=f"{title}" + (f"\n{where}" if where else ""))
            axis.grid(alpha=0.3, which="both")
            axis.title.set_fontsize(10)
        line[0].set_ylabel(metric.axis(f", {rows['split'].iloc[0]} split"))
    legend_below(figure, axes[0, 0], fontsize=10, ncols=3, handlelength=3.5)
    figure.suptitle(f"{table.name}: {seeds_text(table)}", fontsize=10)
    return figure


def ranking(table: StudyTable) -> Figure | None:
    """Draw a study of a single cell: each strategy's score, before and after fine-tuning, and what it costs. None for others."""
    if table.axes:
        return None
    metric, groups = table.metric, table.results.groupby("strategy", sort=False)
    deviation = metric.scale * groups["score"].std().fillna(0)
    means = groups[["score", "assembled_score", "flops", "critical_flops"]].mean()
    means = means.sort_values("score", kind="stable", ascending=metric.higher_is_better)
    figure = Figure(figsize=(11, 0.34 * len(means) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    unit, factor = flop_unit(table.results["flops"].max())
    for y, (name, mean) in enumerate(means.iterrows()):
        color = style(name)["color"] if about(name) else "#555555"
        marks = {"color": color, "markersize": 6}
        left.errorbar(metric.scale * mean["score"], y, xerr=deviation[name], fmt="o", capsize=3, **marks)
        left.plot(metric.scale * mean["assembled_score"], y, "o", markerfacecolor="none", **marks)
        pale = {"color": color, "alpha": 0.3, "edgecolor": color, "linewidth": 0.8}
        right.barh(y, mean["flops"] / factor, height=0.62, **pale)
        right.barh(y, mean["critical_flops"] / factor, height=0.62, color=color)
    left.set_yticks(range(len(means)), means.index.map(label), fontsize=10)
    split = table.results["split"].iloc[0]
    left.set_xlabel(f"{metric.axis(f', {split} split')}; hollow: assembled, before fine-tuning")
    right.set_xlabel(f"training cost ({unit}); dark: critical path")
    for axis in (left, right):
        axis.grid(alpha=0.3, axis="x")
        axis.set_axisbelow(True)
    figure.suptitle(f"{table.name}: {seeds_text(table)}", fontsize=10)
    return figure


def gain_map(table: StudyTable) -> Figure | None:
    """Draw the gain over end to end at equal FLOPs as a map: strategies over the values of one axis; of two, a map a strategy.

    None without axes, and where nothing has end to end's FLOPs.
    """
    found = at_equal_cost(table)
    if found.empty or not table.axes:
        return None
    found = found.assign(strategy=found["strategy"].map(label))
    rows, column = ["strategy", *table.axes[:2]][-2:]
    panels = {"": found} if rows == "strategy" else dict(iter(found.groupby("strategy", sort=False)))
    bound = found["gain"].abs().max()
    columns, lines = (max(part[axis].nunique() for part in panels.values()) for axis in (column, rows))
    width = (1.5 * columns + 4.5) if len(panels) == 1 else (1.1 * columns + 1.0) * len(panels) + 1.5
    figure = Figure(figsize=(width, 0.6 * lines + 1.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, part) in zip(axes, panels.items(), strict=True):
        image = _map(axis, part, rows, column, bound)
        axis.set_title(title, fontsize=10, loc="left")
    figure.colorbar(image, ax=list(axes), label=table.metric.differences, shrink=0.8)
    what = f"{table.metric.points} over {label(baseline_of(table.results))} at equal FLOPs"
    how = f"mean of {seeds_count(table)}, paired by seed"
    noise = f"noise: not clear after correction for {found['comparisons'].max()} comparisons"
    figure.suptitle(f"{table.name}: {what}\n{how}; {noise}", fontsize=10)
    return figure


def _map(axis, part: pd.DataFrame, rows: str, column: str, bound: float):
    part = part.set_index([rows, column])
    values = part["gain"].unstack(sort=False)
    for (name, value), row in part.iterrows():
        text = rounded(row["gain"], tasks.metric(row["metric"]).digits, "+") + ("" if row["clear"] else "\nnoise")
        light = np.dot(colormaps["PuOr"](0.5 + row["gain"] / bound / 2)[:3], (0.2126, 0.7152, 0.0722)) > 0.45
        look = {"ha": "center", "va": "center", "fontsize": 10, "color": "black" if light else "white"}
        axis.text(values.columns.get_loc(value), values.index.get_loc(name), text, **look)
    image = axis.imshow(values, cmap="PuOr", vmin=-bound, vmax=bound, aspect="auto")
    axis.set_xticks(range(len(values.columns)), [textwrap.fill(value, 14) for value in values.columns])
    axis.set_yticks(range(len(values)), values.index, fontsize=10)
    axis.set(xlabel=column, ylabel="" if rows == "strategy" else rows)
    return image


def draw(table: StudyTable) -> list[Path]:
    """Draw a study's figures from its tracked tables into figures/."""
    figures = {"": fronts(table) or ranking(table), "_gain": gain_map(table)}
    return [write_figure(figure, f"study_{table.name}{name}") for name, figure in figures.items() if figure is not None]
