"""Figures. Each takes tables and returns a matplotlib Figure; markers and line styles distinguish what colours distinguish."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogFormatter

from incubate_lib.config.members import PHASES
from incubate_lib.report.style import FROZEN, ONE_BY_ONE, PAPER, TRAINED, Figure, filling, style, trained_and_frozen
from incubate_lib.report.tables.records import Results
from incubate_lib.report.words import BASELINE, flop_unit, label, metric_of
from incubate_lib.tasks import Metric


def image_rows(rows: dict[str, np.ndarray], num: int = 10) -> Figure:
    """Draw rows of uint8 images [N, C, H, W], e.g. originals over augmented ones."""
    figure = Figure(figsize=(num * 0.8, len(rows) * 1.05), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.14)
    axes = figure.subplots(len(rows), num, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        for axis in line:
            axis.set(xticks=[], yticks=[])
        line[0].set_title(name, loc="left", fontsize=9).set_in_layout(False)  # or it would widen the first image
    return figure


def network_diagram(depths: Sequence[int], what: str) -> Figure:
    """Draw a whole network that trains end to end, module by module; `what` is `meta` or `target`. No depths: one piece."""
    modules = [(f"{what} {i + 1}", blocks, True) for i, blocks in enumerate(depths)]
    return _boxes(modules or [("network", 0, True)])


def hybrid_diagram(target_depths: Sequence[int], meta_depths: Sequence[int], index: int) -> Figure:
    """Draw a hybrid: frozen meta modules, and the target module at `index` (0-based)."""
    boxes = [(f"meta {i + 1}", blocks, False) for i, blocks in enumerate(meta_depths)]
    boxes[index] = (f"target {index + 1}", target_depths[index], True)
    return _boxes(boxes)


def _boxes(boxes: Sequence[tuple[str, int, bool]]) -> Figure:
    """Draw modules (name, blocks, whether it trains) from left to right, as wide as they are deep."""
    figure = Figure(figsize=(9, 1.9), layout="constrained")
    axis = figure.subplots()
    x = 0.0
    for name, blocks, trained in boxes:
        width = 0.5 + 0.16 * (blocks or 12)
        box = FancyBboxPatch((x, 0), width, 1, boxstyle="round,pad=0.04", linewidth=1.2, **filling(trained))
        axis.add_patch(box)
        text = f"{name}\n{blocks} block{'s' if blocks > 1 else ''}" if blocks else name
        axis.text(x + width / 2, 0.5, text, ha="center", va="center", fontsize=9, bbox=PAPER)
        if x:
            axis.annotate("", (x - 0.05, 0.5), (x - 0.3, 0.5), arrowprops={"arrowstyle": "->"})
        x += width + 0.35
    axis.text(-0.12, 0.5, "image →", ha="right", va="center")
    axis.text(x - 0.25, 0.5, "→ class", ha="left", va="center")
    handles = trained_and_frozen()[: 1 if all(trained for _, _, trained in boxes) else 2]
    axis.legend(handles=handles, loc="lower center", ncols=2, frameon=False, bbox_to_anchor=(0.5, 0.85))
    axis.set(xlim=(-1, x + 0.5), ylim=(-0.15, 1.25))
    axis.axis("off")
    return figure


def learning_curves(curves: dict[str, pd.DataFrame], reference: dict[str, float | None] | None = None) -> Figure:
    """Draw loss and score over epochs, one line a name; `reference` adds horizontal lines of scores, if there are any."""
    metric = metric_of(*curves.values())
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, table) in enumerate(curves.items()):
        appearance = style(ONE_BY_ONE[i % len(ONE_BY_ONE)])
        dots = {**appearance, "markersize": 3}
        left.plot(table["epoch"], table["train_loss"], **dots | {"linestyle": ":"}, label=f"{name}, training (regularised)")
        left.plot(table["epoch"], table["loss"], **dots | {"linestyle": "-"}, label=f"{name}, evaluation")
        right.plot(table["epoch"], metric.scale * table["score"], **dots, label=name)
    known = {name: value for name, value in (reference or {}).items() if value is not None}
    for i, (name, value) in enumerate(known.items()):
        line = {"color": "#777777", "linestyle": ["--", ":"][i % 2], "linewidth": 1}
        right.axhline(metric.scale * value, label=f"{name} ({metric.written(value)})", **line)
        right.update_datalim([(right.dataLim.x0, metric.scale * value)])  # or the line may lie under the frame
    right.autoscale_view()
    left.set(xlabel="epoch", ylabel="loss")
    right.set(xlabel="epoch", ylabel=metric.axis())
    for axis in (left, right):
        axis.legend(fontsize=9)
        axis.grid(alpha=0.3)
    return figure


def module_bars(phases: pd.DataFrame) -> Figure:
    """Draw, per module, the hybrid's score before and after incubation, the meta model's as a line, and the cost."""
    metric, modules = metric_of(phases), phases[phases["module_index"].notna()].groupby("module_index")
    mean, sd = modules[["start_score", "score", "flops"]].mean(), modules["score"].std().fillna(0)
    unit, factor = flop_unit(mean["flops"].max())
    names = [f"module {int(i) + 1}" for i in mean.index]
    place = np.arange(len(names))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    before = {"color": "white", "hatch": "..", "label": "before incubation"}
    after = {"color": TRAINED, "yerr": metric.scale * sd, "capsize": 3, "label": "after"}
    left.bar(place - 0.2, metric.scale * mean["start_score"], 0.4, edgecolor="black", **before)
    left.bar(place + 0.2, metric.scale * mean["score"], 0.4, edgecolor="black", **after)
    meta = phases.loc[phases["phase"] == "meta", "score"].mean()
    label_of_meta = f"meta model ({metric.written(meta)})"
    left.axhline(metric.scale * meta, color="black", linestyle="--", linewidth=1, label=label_of_meta)
    left.set(ylabel=metric.axis(" of the hybrid"), ylim=(0, metric.most and 1.05 * metric.scale * metric.most))
    left.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, frameon=False)
    right.bar(place, mean["flops"] / factor, 0.5, color=FROZEN, edgecolor="black")
    right.set(ylabel=f"training cost ({unit})")
    for axis in (left, right):
        axis.set_xticks(place, names)
    seeds = phases["seed"].nunique()
    figure.suptitle(f"mean of {seeds} seeds, bars ± std" if seeds > 1 else "one seed", fontsize=9)
    return figure


def score_vs_cost(results: Results) -> Figure:
    """Draw the score against total training cost and against the critical path: each seed, and mean ± std.

    Strategies that are matched in cost stand above one another: large marks are empty, so that none hides another.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    table, metric = results.strategies, results.metric
    meta = results.phases[results.phases["phase"] == "meta"].drop_duplicates("seed")
    unit, factor = flop_unit(table["flops"].max())
    widest = table["flops"].max() / factor
    axes = figure.subplots(1, 2, sharey=True)
    panels = {"flops": "all phases, one machine", "critical_flops": "critical path, modules side by side"}
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        for name, group in table.groupby("strategy", sort=False):
            look = {key: style(name)[key] for key in ("color", "marker")}
            costs, scores = group[column] / factor, metric.scale * group["score"]
            axis.scatter(costs, scores, s=9 * (len(group) > 1), **look)
            _mean(axis, costs.mean(), scores, label(name), markersize=9, **look)
        if len(meta):  # what the small network reaches, and for how little
            look = {"color": "#777777", "marker": "*", "markersize": 10}
            _mean(axis, meta["flops"].mean() / factor, metric.scale * meta["score"], "the meta model alone", **look)
        axis.set(title=title, xlabel=f"training cost ({unit})", xlim=(0, 1.12 * widest))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(metric.axis(f", {table['split'].iloc[0]} split"))
    legend_below(figure, axes[0], fontsize=9, ncols=2)
    return figure


def _mean(axis, x: float, values: pd.Series, name: str, **look) -> None:
    """Mark the mean of values, one a seed, with a bar of one standard deviation if there are several."""
    error = values.std() if len(values) > 1 else None
    look |= {"capsize": 4, "linestyle": "none", "label": f"{name} (n = {len(values)})"}
    look |= {"markerfacecolor": "none", "markeredgewidth": 1.6}
    axis.errorbar(x, values.mean(), yerr=error, **look)


def legend_below(figure: Figure, axis, **look) -> None:
    """Explain what one of a figure's panels shows, below all of them."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", frameon=False, **look)


def convergence(results: Results) -> Figure:
    """Draw the score over the training cost spent: meta model, modules one after another, the jump at assembly, fine-tuning.

    The mean over seeds, with ± one standard deviation as a band; end-to-end training on the same axis.
    """
    names = [n for n in results.curves["strategy"].unique() if n != BASELINE]
    unit, factor = flop_unit(results.phases.groupby(["strategy", "seed"])["flops"].sum().max())
    figure = Figure(figsize=(10, 3.9 * max(1, len(names))), layout="constrained")
    axes = figure.subplots(max(1, len(names)), 1, sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, names or [BASELINE], strict=True):
        for drawn in dict.fromkeys((BASELINE, name)):
            _phases(axis, results, drawn, factor)
        seeds = results.strategies.loc[results.strategies["strategy"] == name, "seed"].nunique()
        against = f" against {label(BASELINE)}" if BASELINE in set(results.curves["strategy"]) else ""
        axis.set(ylabel=results.metric.axis(), title=f"{label(name)}{against} (n = {seeds})")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, loc="lower right" if results.metric.higher_is_better else "upper right")  # where no curve ends
    axes[-1].set_xlabel(f"training cost spent ({unit}), modules one after another")
    return figure


STAR = {"marker": "*", "markersize": 15, "markeredgecolor": "black", "linestyle": "none", "zorder": 5}


def _phases(axis, results: Results, name: str, factor: float) -> None:
    """Draw a strategy's phases, each from where the costs of those before it end, and its assembled network as a star."""
    where = ["phase", "module_index"]
    curves, phases = (
        table[table["strategy"] == name].fillna({"module_index": -1}).groupby(where, sort=False)
        for table in (results.curves, results.phases)
    )
    look, metric, spent = style(name), results.metric, 0.0
    is_cut, lines = any(phase == "assemble" for phase, _ in phases.groups), dict(iter(curves))
    for (phase, module), group in phases:
        if phase == "assemble":
            assembled = group["score"].mean()
            legend = f"assembled, before fine-tuning ({metric.written(assembled, ' ')})"
            axis.plot(spent / factor, metric.scale * assembled, color=look["color"], label=legend, **STAR)
        elif (phase, module) in lines:
            linestyle, legend = look["linestyle"], None if spent else label(name)
            if is_cut:
                kind = PHASES[phase]
                linestyle, legend = kind.line, f"{kind.counted_as}s: one module at a time" if module >= 0 else kind.label
            curve = mean_curve(lines[phase, module], "flops")
            line = look | {"linestyle": linestyle, "markersize": 3, "label": None if module > 0 else legend}
            draw_curve(axis, (spent + curve["cost"]) / factor, curve, metric, line, alpha=0.15)
        if is_cut and (module >= 0 or phase == "assemble"):
            axis.axvline(spent / factor, color="#BBBBBB", linewidth=0.7)
        spent += group["flops"].mean()


def mean_curve(curves: pd.DataFrame, cost: str, by: str = "step") -> pd.DataFrame:
    """Return a row an evaluation of a phase: mean cost and score, its deviation over seeds (`std`), number of seeds."""
    return curves.groupby(by).agg(cost=(cost, "mean"), score=("score", "mean"), std=("score", "std"), seeds=("seed", "nunique"))


def draw_curve(axis, x: pd.Series, curve: pd.DataFrame, metric: Metric, look: dict, alpha: float) -> None:
    """Draw a `mean_curve` as people read its metric, with a band of one standard deviation."""
    mean, deviation = metric.scale * curve["score"], metric.scale * curve["std"].fillna(0)
    if metric.is_log:
        axis.set_yscale("log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.plot(x, mean, **look)
    axis.fill_between(x, mean - deviation, mean + deviation, color=look["color"], alpha=alpha, linewidth=0)


PUBLISHED = {"score_vs_cost": score_vs_cost, "convergence": convergence}
