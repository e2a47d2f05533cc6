"""What `incubate bench` says: its tables for the terminal, its ratios in words, a figure. Reads rows, measures nothing."""

import math
import re

import numpy as np
import pandas as pd
from rich.table import Table

from incubate_lib import tasks
from incubate_lib.config.members import PHASES
from incubate_lib.report.style import Figure, style
from incubate_lib.report.words import flop_unit
from incubate_lib.tasks import Task

LOOP_LIMIT = 1.03  # what our loop may cost end to end, against a bare one
BUSY = 1.3  # slowest round against fastest
STEEP = 1.1  # an exponent of time against FLOPs from here on is clearly above 1
OURS, TWIN = r"incubate-\d+", r"incubate-\d+-released"
ENDS = {None: "", "bare": ", bare loop", "released": ", released freezing", "apart": ", one by one"}
SERIES = {"depth": "blocks", "image_size": "px"}


def label(variant: str) -> str:
    """Return a variant's name for people, modules counted from one."""
    name, number, end = re.fullmatch(r"(\w+)(?:-(\d+))?(?:-([a-z]+))?", variant).groups()
    return PHASES[name].counted_as + (f", module {int(number) + 1}" if number else "") + ENDS[end]


def task_of(table: pd.DataFrame) -> Task:
    """Return what the networks of a table learn; tables from before other tasks do not say it."""
    return tasks.get(table["task"].iloc[0]) if "task" in table else tasks.get()


def a_second(table: pd.DataFrame) -> dict[str, pd.Series]:
    """Return what steps go through in a second: samples, by what their task calls them, and of text tokens and characters."""
    parts = {name: table[name] for name in ("tokens", "characters") if name in table and table[name].notna().all()}
    speed = table["batch"] / table["step_seconds"]
    return {task_of(table).samples: speed} | {name: speed * each for name, each in parts.items()}


def machine_line(table: pd.DataFrame) -> str:
    """Return what was measured where and when, in one line."""
    first = table.iloc[0]
    rate = table["matmul_flops_per_second"].median() / 1e9
    return (
        f"{first['model']}, {first['precision']}, compile {first['compile']}, batch {first['batch']}, rounds {first['rounds']}; "
        f"{first['device']}, {first['threads']} thread(s), torch {first['torch']}, {first['date'][:10]}; "
        f"a large matrix product here: {rate:,.0f} GFLOP/s"
    )


def doubts(table: pd.DataFrame) -> list[str]:
    """Say so, in a line, if the rounds differ so much that the figures cannot be trusted."""
    spread = (table["step_seconds_max"] / table["step_seconds_min"]).max()
    busy = "this machine was busy; measure again when it is quiet."
    return [f"Rounds differ by up to {spread:.1f} times: {busy}"] if spread > BUSY else []


def bench_table(table: pd.DataFrame) -> Table:
    """Return the rows of `training.bench.bench` as a table: medians over rounds, in brackets the extremes."""
    ends = {"bare": "bare", "apart": "one by one"}
    beside = table["against"].map({name: ends.get(str(name).rpartition("-")[2], "ours") for name in table["against"]})
    cells = {
        "": table["variant"].map(label),
        **{f"{name}/s": speed.map("{:,.1f}".format) for name, speed in a_second(table).items() if name != "characters"},
        f"GFLOP/{task_of(table).sample}": (table["step_flops"] / table["batch"] / 1e9).map("{:,.5g}".format),
        **_shared(table),
        "time": (table["ratio"].map("{:.3f} × ".format) + beside).where(table["ratio"].notna(), ""),
    }
    return _rich(cells)


def growth_table(table: pd.DataFrame) -> Table:
    """Return the rows of `phases.bench.growth` as a table."""
    cells = {
        "size": table["size"].astype(str) + " " + table["series"].map(SERIES),
        "": table["variant"].map(label),
        "GFLOP/step": (table["step_flops"] / 1e9).map("{:,.4g}".format),
        **_shared(table),
    }
    return _rich(cells)


def _shared(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return the columns that both tables have; those that are not known here are left out."""
    unit, size = flop_unit(table["flops_per_second"].max())
    times = table[["step_seconds", "step_seconds_min", "step_seconds_max"]].mul(1e3)
    columns = {
        "ms/step": ["{} ({} – {})".format(*map(_digits, row)) for row in times.itertuples(index=False)],
        f"{unit}/s": (table["flops_per_second"] / size).map("{:,.4g}".format),
        "of matmul": table["share_of_matmul"].map("{:.0%}".format),
    }
    if table["peak_flops_per_second"].notna().all():
        columns["of peak"] = (table["flops_per_second"] / table["peak_flops_per_second"]).map("{:.0%}".format)
    if table["peak_memory_bytes"].notna().all():
        columns["peak MiB"] = (table["peak_memory_bytes"] / 2**20).map("{:,.1f}".format)
    return columns


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _rich(cells: dict[str, list[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in cells:
        table.add_column(name, justify="left" if name in ("", "size") else "right", no_wrap=True)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    return table


def ratios_in_words(table: pd.DataFrame) -> list[str]:
    """Say what our loop costs, what right freezing saves, and what pieces cost against the whole."""
    rows = table.set_index("variant")
    whole, meta = rows.loc["end_to_end"], rows.loc["meta"]
    ours, twins = (table[table["variant"].str.fullmatch(pattern)] for pattern in (OURS, TWIN))
    if whole["ratio"] <= LOOP_LIMIT:
        verdict = "kept"
    elif whole["ratio_min"] <= LOOP_LIMIT and whole["rounds"] > 1:
        verdict = "not kept here, but rounds differ: repeat it with more --rounds on a quiet machine"
    else:
        verdict = "not kept"
    share = ours["step_flops"].to_numpy() / ours["step_flops"].sum()  # weights: drift between modules does no harm
    seconds, flops = (float((share * twins[column]).sum()) for column in ("ratio", "flops_ratio"))
    memory = ""
    if ours["peak_memory_bytes"].notna().all():
        most = twins["peak_memory_bytes"].to_numpy() / ours["peak_memory_bytes"].to_numpy()
        memory = f" and up to {most.max():.3f} times the memory"
    modules = ", ".join(
        f"module {number} {_span(row)}, FLOPs {row['flops_ratio']:.3f}"
        for number, (_, row) in enumerate(twins.iterrows(), start=1)
    )
    pair = ["step_seconds", "step_flops"]
    parts = {"meta model": meta[pair], "hybrids": ours[pair].sum(), "dearest hybrid": ours[pair].max()}
    costs = [
        f"{name} {part['step_seconds'] / whole['step_seconds']:.3f} of the time "
        f"(FLOPs {part['step_flops'] / whole['step_flops']:.3f})"
        for name, part in parts.items()
    ]
    speed = ", ".join(f"{each['end_to_end']:,.1f} {name}" for name, each in a_second(rows).items())
    return [
        f"Speed: end to end goes through {speed} a second, at {whole['flops_per_second'] / 1e9:,.4g} GFLOP/s.",
        f"Our loop: end to end takes {_span(whole)} times as long as a bare loop over the same network, the meta model "
        f"{_span(meta)} times; end to end at most {LOOP_LIMIT} is allowed: {verdict}.",
        f"Right freezing: with the released code's freezing all {len(ours)} hybrids together take {seconds:.3f} times as long as "
        f"ours (FLOPs {flops:.3f}){memory}; {modules}.",
        f"In pieces: {task_of(table).a_sample} costs, against end to end, {'; '.join(costs)}. Time above FLOPs means that small "
        "pieces use this machine less well.",
        *(
            f"Together: an update of all modules in one phase takes {_span(row)} times as long as one by one, reading and "
            f"augmenting apart (FLOPs {row['flops_ratio']:.3f})."
            for _, row in table[table["variant"] == "incubate_together"].iterrows()  # not in tables from before
        ),
    ]


def _span(row: pd.Series) -> str:
    spread = f" ({row['ratio_min']:.3f} – {row['ratio_max']:.3f})" if row["rounds"] > 1 else ""
    return f"{row['ratio']:.3f}{spread}"


def exponent(points: pd.DataFrame, column: str = "step_seconds") -> float:
    """Return p of the best fit seconds ∝ FLOPs^p, in logarithms; NaN for fewer than two sizes."""
    flops, seconds = np.log(points["step_flops"]), np.log(points[column])
    return float(np.polyfit(flops, seconds, 1)[0]) if flops.nunique() > 1 else math.nan


def growth_in_words(table: pd.DataFrame) -> list[str]:
    """Say how time grows with the counted FLOPs: over the whole series, and over its three largest sizes."""
    lines = []
    for (series, variant), points in table.groupby(["series", "variant"], sort=False):
        points = points.sort_values("size")
        # small sizes, where overheads fade, must not hide what the large ones do
        parts = points, points.tail(3)
        whole, large = map(exponent, parts)
        if not math.isfinite(whole):
            verdict = "one size says nothing"
        elif max(whole, large) < STEEP:
            verdict = "no faster than FLOPs do"
        elif max(exponent(part, "step_seconds_min") for part in parts) < STEEP:
            verdict = "the fastest rounds grow no faster than FLOPs do, so this may be noise"
        else:
            verdict = "FASTER than FLOPs do: see where the rate falls"
        lowest, highest = points["size"].iloc[[0, -1]]
        lines.append(
            f"{label(variant)}, {lowest} to {highest} {SERIES[series]}: time grows as FLOPs^{whole:.2f}, over the three "
            f"largest as FLOPs^{large:.2f}: {verdict}."
        )
    return lines


def growth(table: pd.DataFrame) -> Figure:
    """Draw the measured time of a step against its counted FLOPs, over depth and over image size, both axes logarithmic.

    `table` has the rows of `phases.bench.growth`. Bars span the rounds; the grey line has slope 1.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    series = table["series"].unique()
    axes = figure.subplots(1, len(series), squeeze=False)[0]
    for axis, name in zip(axes, series, strict=True):
        part = table[table["series"] == name]
        for variant, points in part.groupby("variant", sort=False):
            look = style("end_to_end" if variant == "end_to_end" else "deep_incubation")
            time, cost = points["step_seconds"], points["step_flops"] / 1e9
            spread = [time - points["step_seconds_min"], points["step_seconds_max"] - time]
            look = {"color": look["color"], "marker": look["marker"], "linestyle": "none", "capsize": 3}
            axis.errorbar(cost, time, yerr=spread, label=f"{label(variant)}: time ∝ FLOPs^{exponent(points):.2f}", **look)
        for size, points in part.groupby("size"):
            top = points.sort_values("step_flops").iloc[-1]
            place = (top["step_flops"] / 1e9, top["step_seconds"])
            axis.annotate(f"{size}", place, (-4, 6), textcoords="offset points", ha="right", fontsize=9)
        ends = np.array([part["step_flops"].min(), part["step_flops"].max()])
        slope_one = ends * (part["step_seconds"] / part["step_flops"]).median()
        line = {"color": "#777777", "linewidth": 1, "zorder": 0, "label": "as FLOPs (slope 1), through the median"}
        axis.plot(ends / 1e9, slope_one, **line)
        title = f"{name.replace('_', ' ')} (numbers at the points: {SERIES[name]})"
        axis.set(xscale="log", yscale="log", xlabel="counted cost of a step (GFLOP)", title=title)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=9)
    axes[0].set_ylabel("measured time of a step (s)")
    figure.suptitle(machine_line(table).replace("; ", "\n", 1), fontsize=9)
    return figure
