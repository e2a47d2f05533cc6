"""Modular Adaptive Training in tables and figures: what full training's best score cost each, and how the kernels looked."""

import math

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm

from incubate_lib.pipeline.graph import Node
from incubate_lib.report.style import Figure, style
from incubate_lib.report.tables.hardware import MIXED, mixed_text, mixes
from incubate_lib.report.tables.plots import draw_curve, legend_below, mean_curve
from incubate_lib.report.tables.records import Results
from incubate_lib.report.tables.statistics import family_text, points_text, spread, verdict_text
from incubate_lib.report.tables.verdict import differences
from incubate_lib.report.words import BASELINE, flop_unit, label, phase_name

COSTS = {"flops": "training FLOPs", "train_seconds": "training seconds"}  # columns of curves


def units_table(node: Node) -> pd.DataFrame:
    """Return the units that a phase's network has: a row a kind, their number, the first of them and the parameters in them."""
    import torch

    from incubate_lib.method.units import count_units, find_units
    from incubate_lib.phases.networks import build_target

    with torch.device("meta"):
        model = build_target(node.settings, node.facts.outputs)
    whole = sum(parameter.numel() for parameter in model.parameters())
    rows = []
    for kind, count in count_units(model).items():
        try:
            units = find_units(model, kind)
        except ValueError as error:  # rows that are not what they seem
            rows.append({"kind": kind, "units": count, "the first": f"not possible: {error}", "of all parameters": ""})
            continue
        inside = sum(_size(model, unit) for unit in units)
        rows.append({"kind": kind, "units": count, "the first": units[0].name, "of all parameters": f"{inside / whole:.0%}"})
    return pd.DataFrame(rows).set_index("kind")


def _size(model, unit) -> int:
    sizes = {name: model.get_parameter(name) for name in unit.rows}
    return sum(
        sizes[name].numel() if ranges is None else sum(end - first for first, end in ranges) * sizes[name][0].numel()
        for name, ranges in unit.rows.items()
    )


def mean_curves(results: Results, cost: str) -> dict[str, pd.DataFrame]:
    """Return for each finished strategy that trains in one phase its `plots.mean_curve`."""
    finished = results.curves["strategy"].isin(results.strategies["strategy"])  # others may share a phase that is trained
    groups = results.curves[finished].groupby("strategy", sort=False)
    return {name: mean_curve(table, cost) for name, table in groups if table["phase"].nunique() == 1}


def reach(results: Results) -> pd.DataFrame:
    """Return what each strategy spent until its mean score over seeds was full training's best one, relative to all that
    full training spent; a row a strategy. Empty without full training.

    Evaluations are some epochs apart, so the true cost is up to that much smaller, for full training, too.
    """
    if BASELINE not in set(results.strategies["strategy"]):
        return pd.DataFrame()
    finals = results.strategies.groupby("strategy", sort=False)
    baseline = finals.get_group(BASELINE)
    metric = results.metric
    goal = metric.best(results.curves[results.curves["strategy"] == BASELINE].groupby("step")["score"].mean())
    rows: dict[str, dict[str, str]] = {}
    for cost, heading in COSTS.items():
        curves = mean_curves(results, cost)
        whole = curves[BASELINE]["cost"].iloc[-1]
        for name, curve in curves.items():
            there = curve[metric.ahead(curve["score"], goal) >= 0]
            mark = mixes(finals.get_group(name), baseline) if cost == "train_seconds" else ""
            row = rows.setdefault(name, {metric.heading: spread(finals.get_group(name)["score"], metric)})
            row[f"{heading}, all"] = f"{curve['cost'].iloc[-1] / whole:.3f}{mark}"
            row[f"{heading} to {metric.written(goal, ' ')}"] = (
                f"{there['cost'].iloc[0] / whole:.3f}{mark}" if len(there) else "never"
            )
    return pd.DataFrame(rows).T.rename(index=label)


def estimator_costs(results: Results) -> pd.DataFrame:
    """Return what computing the kernels cost: evaluations, seconds, and the shares of the phase's time and FLOPs; and of the
    FLOPs of a phase in which all units train, those of the updates without the kernels, and those if all units always rested:
    no choice of units saves more."""
    counts = ["probes", "probe_seconds", "probe_flops", "seconds", "flops", "full_flops", "least_flops"]
    table = results.phases.reindex(columns=["strategy", "phase", *counts])
    mean = table[table["probes"].fillna(0) > 0].groupby(["strategy", "phase"], sort=False)[counts].mean()
    shown = pd.DataFrame({"evaluations": mean["probes"].round(1), "seconds": mean["probe_seconds"].round(2)})
    for cost, heading in {"seconds": "of the training time", "flops": "of the training FLOPs"}.items():
        shown[heading] = (mean[f"probe_{cost}"] / mean[cost]).map("{:.1%}".format)
    updates = {"updates' FLOPs": mean["flops"] - mean["probe_flops"], "if all units rested": mean["least_flops"]}
    for heading, flops in updates.items() if mean["full_flops"].notna().any() else ():  # not in records from before
        shown[heading] = (flops / mean["full_flops"]).map("{:.3f}×".format, na_action="ignore")
    return shown.rename(index=label, level="strategy").reset_index()


def verdict(results: Results) -> str:
    """Say in words what MAT saved and whether its controls do as well, whatever the numbers are."""
    table = reach(results)
    if label("mat") not in table.index or label(BASELINE) not in table.index:
        return "Nothing to say yet: it takes end_to_end and mat."
    finals = results.strategies.pivot(index="seed", columns="strategy", values="score")
    metric, full = results.metric, spread(finals[BASELINE].dropna(), results.metric)
    _, flops_all, flops_to, seconds_all, seconds_to = table.columns
    row = table.loc[label("mat")]
    lines = [
        f"MAT ends at {metric.headed(spread(finals['mat'], metric))}, full training at {metric.headed(full)}; it takes "
        f"{row[flops_all]} of the FLOPs and {row[seconds_all]} of the seconds."
    ]
    if row[flops_to] == "never":
        lines.append(f"On average over seeds it never reaches full training's best {metric.words}.")
    else:
        lines.append(
            f"Full training's best {metric.words} is reached for {row[flops_to]} of its FLOPs and {row[seconds_to]} of its "
            f"seconds; by full training itself for {table.loc[label(BASELINE), flops_to]} of its FLOPs."
        )
    found = against_others(results)
    for row in found.to_dict("records"):
        cost = table[flops_all].get(label(row["other"]))
        difference = f"{points_text(row)}, {verdict_text(row)}"
        lines.append(f"Against {label(row['other'])}{f' ({cost} of the FLOPs)' if cost else ''}: {difference}.")
    lines += [family_text(found["comparisons"].max()), mixed_text(results.strategies)]
    return "\n".join(filter(None, lines))


def against_others(results: Results) -> pd.DataFrame:
    """Return how far MAT is ahead of full training and of every other strategy, a row each: `tables.differences`."""
    names = [name for name in results.strategies["strategy"].unique() if name in set(results.phases["strategy"])]
    return differences(results.strategies, [("mat", name) for name in names if name != "mat"])


# -- figures --------------------------------------------------------------------------------------------------------------


def score_against_costs(results: Results) -> Figure:
    """Draw the score over FLOPs and over seconds for full training, MAT and controls: means over seeds, ± one deviation."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    metric, (unit, factor) = results.metric, flop_unit(results.curves["flops"].max())
    several = f", {MIXED} of several devices" if mixes(results.strategies) else ""
    panels = (("flops", factor, f"training cost ({unit})"), ("train_seconds", 1, f"training time (s){several}"))
    for axis, (cost, scale, name) in zip(axes, panels, strict=True):
        for strategy, curve in mean_curves(results, cost).items():
            look = style(strategy) | {"markersize": 4, "label": f"{label(strategy)} (n = {curve['seeds'].max()})"}
            draw_curve(axis, curve["cost"] / scale, curve, metric, look, alpha=0.1)
        baseline = results.strategies[results.strategies["strategy"] == BASELINE]["score"].mean()
        if baseline == baseline:
            axis.axhline(metric.scale * baseline, color="#555555", linewidth=0.8, linestyle="--")
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(metric.axis())
    legend_below(figure, axes[0], fontsize=10, ncols=3)
    return figure


def eigenvalue_map(table: pd.DataFrame, strategy: str = "mat", seed: int | None = None) -> Figure:
    """Draw the principal eigenvalue of every unit at every evaluation, what rests, and where the threshold was.

    `table` is `Results.mntk`. Units from the input (bottom) to the output (top); a dot marks a unit that rests afterwards.
    """
    part, where = _first_phase(table[table["strategy"] == strategy])
    if part.empty:
        return _nothing(strategy)
    part = part[part["seed"] == (part["seed"].min() if seed is None else seed)]
    names = list(dict.fromkeys(part["unit"]))
    wide = part.pivot(index="unit", columns="epoch").loc[names]
    values, active = wide["eigenvalue"], wide["active"].to_numpy()
    cuts = part.groupby("epoch")["cut"].first()
    figure = Figure(figsize=(11, max(3.6, min(8, 0.14 * len(names) + 1.6))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    positive = values.to_numpy()[values.to_numpy() > 0]
    norm = LogNorm(positive.min(), positive.max()) if len(positive) else None
    picture = left.imshow(values, aspect="auto", origin="lower", norm=norm, cmap="cividis", interpolation="nearest")
    rows, columns = np.nonzero(active == 0)
    left.scatter(columns, rows, s=5, color="white", edgecolors="black", linewidths=0.3)
    every = max(1, -(-len(names) // 16))  # labels that do not touch
    left.set_yticks(range(0, len(names), every), names[::every], fontsize=9)
    times = values.columns.to_numpy()
    digits = max(1, 1 - math.floor(math.log10(np.diff(times).min()))) if len(times) > 1 else 1  # so that no two look alike
    epochs = [f"{epoch:g}" for epoch in times.round(digits)]
    left.set_xticks(range(len(epochs)), epochs, fontsize=10, rotation=90)
    left.set(xlabel="epoch (a dot: rests from here on)", title=f"largest eigenvalue of each unit's kernel{where}")
    figure.colorbar(picture, ax=left, label="λ max")
    right.plot(values.columns, values.T, color="#999999", linewidth=0.5, alpha=0.7)
    right.plot(values.columns, values.median(), color="#0072B2", label="median of units")
    right.plot(cuts.index, cuts, color="#D55E00", linestyle="--", marker="o", markersize=3, label="threshold")
    right.set(yscale="log", xlabel="epoch", ylabel="λ max", title="the threshold among all units")
    right.grid(alpha=0.3)
    right.legend(fontsize=10)
    title = f"{label(strategy)}, seed {int(part['seed'].iloc[0])}; {len(names)} units, {active.mean():.0%} active on average"
    figure.suptitle(title, fontsize=10)
    return figure


def _first_phase(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the rows of the first phase with kernels, of the first module, and which that is where there are several."""
    rows = table[table["module_index"].isna() | (table["module_index"] == table["module_index"].min())]
    rows = rows[rows["phase"] == rows["phase"].iloc[0]] if len(rows) else rows
    return rows, f" ({phase_name(*rows[['phase', 'module_index']].iloc[0])})" if len(rows) < len(table) else ""


def rank_against_eigenvalue(table: pd.DataFrame, strategy: str = "mat") -> Figure:
    """Draw each unit's effective rank against its largest eigenvalue, a panel an evaluation: first, middle, last."""
    part, where = _first_phase(table[(table["strategy"] == strategy) & table["effective_rank"].notna()])
    if part.empty:
        return _nothing(strategy)
    epochs = sorted(part["epoch"].unique())
    chosen = sorted({epochs[0], epochs[len(epochs) // 2], epochs[-1]})
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axis, epoch in zip(axes, chosen, strict=True):
        for on, marker, color, name in ((1, "o", "#D55E00", "active"), (0, "x", "#0072B2", "rests")):
            some = part[(part["epoch"] == epoch) & (part["active"] == on)]
            axis.plot("eigenvalue", "effective_rank", marker, data=some, color=color, alpha=0.7, markersize=4, label=name)
        axis.set(xscale="log", xlabel="λ max", title=f"epoch {epoch:g}{where}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("effective rank")
    axes[0].legend(fontsize=10)
    return figure


def _nothing(strategy: str) -> Figure:
    figure = Figure(figsize=(6, 0.6))
    figure.text(0.02, 0.4, f"No kernels of strategy {strategy} are recorded here.")
    return figure


def gram_pictures(kernels: np.ndarray, names: list[str]) -> Figure:
    """Draw kernels [U, M, M] as pictures: how alike the gradients of two samples are, in cosines."""
    figure = Figure(figsize=(2.6 * len(names), 3.1), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, kernel, name in zip(axes, kernels, names, strict=True):
        picture = axis.imshow(kernel, vmin=-1, vmax=1, cmap="PuOr", interpolation="nearest")
        axis.set(xticks=[], yticks=[], xlabel="sample")
        axis.set_title(name, fontsize=9)
    axes[0].set_ylabel("sample")
    figure.colorbar(picture, ax=list(axes), label="cosine of two gradients", shrink=0.8)
    return figure


SHOWN = ("mat", "deep_incubation_mat")  # strategies whose kernels are kept under version control
PUBLISHED = {"mat": score_against_costs, "mntk": lambda results: eigenvalue_map(results.mntk)}
