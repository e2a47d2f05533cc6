"""The tables of README."""

from collections.abc import Callable

import pandas as pd

from incubate_lib.report.planner.bench import OURS, TWIN
from incubate_lib.report.readme.sources import bench_of, comparison, rows_of, run_of, study_of
from incubate_lib.report.readme.text import markdown
from incubate_lib.report.readme.values import NUMBERS, gain
from incubate_lib.report.tables.hardware import mixes
from incubate_lib.report.tables.statistics import rounded, spread
from incubate_lib.report.words import BASELINE, label, seconds_text


def budget(study: str) -> str:
    """A study over budgets: a row a budget, top-1 and the critical path; the best mean of a row is bold."""
    table = study_of(study)
    whole = table.results[table.results["strategy"] == BASELINE].groupby("budget", sort=False)
    largest = whole["critical_flops"].mean().max()
    heads = {BASELINE: "end to end", "deep_incubation": "Deep Incubation, the paper's random start",
             "deep_incubation_identity": "Deep Incubation, recommended",
             "growing": "the same start without incubation (`growing`)"}  # fmt: skip
    rows = []
    for place, cell in table.results.groupby("budget", sort=False):
        means = {name: cell.loc[cell["strategy"] == name, "accuracy"].mean() for name in heads}
        cells = []
        for name in heads:
            mine = cell[cell["strategy"] == name]
            score = spread(100 * mine["accuracy"])
            score = f"**{score}**" if rounded(100 * means[name]) == rounded(100 * max(means.values())) else score
            cells.append(f"{score} ({rounded(mine['critical_flops'].mean() / largest, 2)})")
        flops = whole["flops"].mean()[place]
        rows.append([f"{place} ({rounded(flops / 1e12)} TFLOP)" if flops == whole["flops"].mean().max() else place, *cells])
    return markdown(["budget", *heads.values()], rows)


def chain(run: str) -> str:
    """A run at equal cost: a column a strategy."""
    results, rows = run_of(run), []
    names = list(results.strategies["strategy"].unique())
    groups = {name: results.strategies[results.strategies["strategy"] == name] for name in names}

    def costs(column: str, show: Callable[[float], str]) -> list[str]:
        base = groups[BASELINE]
        return [
            show(group[column].mean())
            + ("" if name == BASELINE else f" ({rounded(group[column].mean() / base[column].mean(), 2)}×)")
            + (mixes(group, base) if "seconds" in column else "")
            for name, group in groups.items()
        ]

    compared = {name: comparison(run, name, BASELINE) for name in names if name != BASELINE}
    rows = [
        ["top-1, test, %", *(spread(100 * group["accuracy"]) for group in groups.values())],
        ["points over end to end, paired by seed", "",
         *(f"{gain(run, name)} ({row['better']} of {row['seeds']} seeds better)" for name, row in compared.items())],
        ["assembled, before any fine-tuning, %", *(spread(100 * group["assembled_accuracy"].dropna())
                                                   for group in groups.values())],
        ["training TFLOP, all phases", *costs("flops", lambda value: rounded(value / 1e12, 2))],
        ["training TFLOP, critical path (four machines)", *costs("critical_flops", lambda value: rounded(value / 1e12, 2))],
        ["training seconds, all phases", *costs("seconds", seconds_text)],
        ["training seconds, critical path", *costs("critical_seconds", seconds_text)],
    ]  # fmt: skip
    return markdown(["", *map(label, names)], rows)


def adaptive(run: str) -> str:
    """A run with MAT and its controls: a row a strategy, costs relative to end to end's."""
    results = run_of(run)
    base = rows_of(run, BASELINE)
    rows = []
    for name, group in results.strategies.groupby("strategy", sort=False):
        rates = results.phases.loc[results.phases["strategy"] == name, "lr"].dropna().unique()
        rate = f" (lr {rates[0]:g})" if len(rates) == 1 else ""
        by_seed = " ".join(rounded(100 * value) for value in group.sort_values("seed")["accuracy"])
        flops, seconds = (group[column].mean() / base[column].mean() for column in ("flops", "seconds"))
        cell = [f"{rounded(flops, 2)}×", f"{rounded(seconds, 2)}×"]
        if name == BASELINE:
            cell = [f"{rounded(base['flops'].mean() / 1e12, 2)} TFLOP", f"{seconds_text(base['seconds'].mean())} s"]
        over = "" if name == BASELINE else gain(run, name)
        rows.append([label(name) + rate, spread(100 * group["accuracy"]), over, by_seed, cell[0], cell[1] + mixes(group, base)])
    numbers = sorted(results.strategies["seed"].unique())
    head = [
        "",
        "top-1, test, %",
        "points over end to end",
        f"by seed, {numbers[0]} to {numbers[-1]}",
        "training FLOPs",
        "training time",
    ]
    return markdown(head, rows)


def speed(name: str) -> str:
    """A bench of one network: a row a kind of step."""
    rows = bench_of(name)
    ours, twins = (rows[rows.index.str.fullmatch(pattern)] for pattern in (OURS, TWIN))
    per_image = rows["step_flops"] / rows["batch"] / 1e9
    share = ours["step_flops"].to_numpy() / ours["step_flops"].sum()

    def row(title: str, those: pd.DataFrame, more: str = "") -> list[str]:
        memory = [f"{rounded(value / 2**20, 0)}" for value in those["peak_memory_bytes"]]
        seconds = [rounded(value, 2) for value in those["step_seconds"]]
        return [
            title,
            ", ".join(rounded(per_image[i], 2) for i in those.index),
            ", ".join(seconds) + more,
            ", ".join(memory) + " MiB",
        ]

    whole = rows.loc["end_to_end"]
    time, flops = (rounded(float((share * twins[column]).sum()), 3) for column in ("ratio", "flops_ratio"))
    most = (twins["peak_memory_bytes"].to_numpy() / ours["peak_memory_bytes"].to_numpy()).max()
    return markdown(["", "GFLOP an image", "seconds a step", "peak memory of a step"], [
        row("end to end", rows.loc[["end_to_end"]]),
        row("the same in a bare loop over stock timm", rows.loc[["end_to_end-bare"]],
            f" (ours takes {rounded(whole['ratio'], 3)} times as long within rounds)"),
        row("meta model", rows.loc[["meta"]]),
        row(f"hybrids, modules 1 to {len(ours)}", ours),
        [f"the {NUMBERS[len(ours)]} together, released freezing against ours", f"{flops} times", f"{time} times",
         f"up to {rounded(most, 2)} times"],
    ])  # fmt: skip


TABLES: dict[str, Callable[..., str]] = {f.__name__: f for f in (budget, chain, adaptive, speed)}
