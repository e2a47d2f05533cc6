"""The tables of the pages."""

import math
from collections.abc import Callable

import pandas as pd

from incubate_lib.report.planner.bench import OURS, TWIN, a_second, task_of
from incubate_lib.report.readme import sources
from incubate_lib.report.readme.fields import fields, recipes
from incubate_lib.report.readme.sources import bench_of, comparison, rows_of, run_of, study_of
from incubate_lib.report.readme.text import markdown
from incubate_lib.report.readme.values import NUMBERS, change, gain
from incubate_lib.report.tables import mat
from incubate_lib.report.tables.hardware import mixes
from incubate_lib.report.tables.overview import APART, ROUNDED, settings
from incubate_lib.report.tables.statistics import rounded, spread
from incubate_lib.report.tables.verdict import cells
from incubate_lib.report.words import BASELINE, label, seconds_text


def budget(study: str) -> str:
    """A study over budgets: a row a budget, the score and the critical path; the best mean of a row is bold."""
    whole = rows_of(study, BASELINE).groupby("budget")[["flops", "critical_flops"]].mean()
    rows = []
    for place, cell in study_of(study).results.groupby("budget", sort=False):
        is_largest = whole["flops"][place] == whole["flops"].max()
        row = {"budget": f"{place} ({rounded(whole['flops'].max() / 1e12)} TFLOP)" if is_largest else place}
        for name, score in _scores(study, cell).items():
            path, base = cell.loc[cell["strategy"] == name, "critical_flops"].mean(), whole["critical_flops"][place]
            path = base if math.isclose(path, base, rel_tol=ROUNDED - 1) else path  # matched costs differ by a part of an update
            row[label(name)] = f"{score} ({rounded(path / whole['critical_flops'].max(), 2)})"
        rows.append(row)
    return markdown(rows)


def costs(study: str) -> str:
    """What each strategy costs at a study's largest budget; memory is that of an update on each device, counted."""
    results = study_of(study).results
    whole = results[results["budget"] == rows_of(study, BASELINE).groupby("budget")["flops"].mean().idxmax()]
    baseline, rows = whole[whole["strategy"] == BASELINE], []
    base = baseline.mean(numeric_only=True)
    for name, group in whole.groupby("strategy", sort=False):
        mean = group.mean(numeric_only=True)
        shares = {column: f"{rounded(mean[column] / base[column], 2)}×" for column in ("flops", "critical_flops", "seconds")}
        module, largest = (
            "–" if pd.isna(size := mean[column]) else f"{size / 2**20:.1f}" for column in ("module_memory", "memory")
        )
        rows.append(
            {
                "": label(name),
                "FLOPs": shares["flops"],
                "critical path": shares["critical_flops"],
                "training time": shares["seconds"] + mixes(group, baseline),
                "MiB to train a module": module,
                "MiB of its largest phase": largest,
            }
        )
    return markdown(rows)


def overview() -> str:
    """The studies that stand apart: a row a setting, the best of pieces against the best end to end."""
    found = [setting for name in APART for setting in settings(study_of(name))]
    return markdown([{"": f"{s.study}{f', {s.place}' if s.place else ''}"} | s.shown for s in found])


def scores(study: str) -> str:
    """A study of other axes: a row a cell, a column a strategy; the best mean of a row is bold."""
    rows = []
    for place, cell in cells(study_of(study).results, study_of(study).axes):
        rows.append(place | {label(name): score for name, score in _scores(study, cell).items()})
    return markdown(rows)


def changed(study: str) -> str:
    """A study of recipes: what each changes against the first, a row a recipe, a column a strategy."""
    first, *others = study_of(study).results["recipe"].unique()
    names = study_of(study).results["strategy"].unique()
    return markdown(
        [{f"against {first}": other} | {label(name): change(f"{study}:{other}", name) for name in names} for other in others]
    )


def _scores(study: str, cell: pd.DataFrame) -> dict[str, str]:
    """Return the score of each strategy of a cell, mean ± standard deviation; the best mean is bold."""
    metric, means = study_of(study).metric, cell.groupby("strategy", sort=False)["score"].mean()
    best = metric.written(max(means, key=lambda mean: metric.sign * mean))
    bold = {name: "**" * (metric.written(mean) == best) for name, mean in means.items()}
    return {
        name: f"{bold[name]}{spread(cell.loc[cell['strategy'] == name, 'score'], metric)}{bold[name]}" for name in means.index
    }


def _tera(flops: float) -> str:
    return rounded(flops / 1e12, 2)


def chain(run: str) -> str:
    """A run at equal cost: a column a strategy."""
    base, metric, columns = rows_of(run, BASELINE), run_of(run).metric, {}
    for name, group in run_of(run).strategies.groupby("strategy", sort=False):

        def cost(column: str, show: Callable[[float], str], name: str = name, group: pd.DataFrame = group) -> str:
            ratio = f" ({rounded(group[column].mean() / base[column].mean(), 2)}×)" if name != BASELINE else ""
            return show(group[column].mean()) + ratio + (mixes(group, base) if "seconds" in column else "")

        columns[label(name)] = {
            metric.headed(f"{metric.label}, test", ", "): spread(group["score"], metric),
            f"{metric.points} over end to end, paired by seed": "" if name == BASELINE else _over(run, name),
            metric.headed("assembled, before any fine-tuning", ", "): spread(group["assembled_score"], metric),
            "training TFLOP, all phases": cost("flops", _tera),
            "training TFLOP, critical path (four machines)": cost("critical_flops", _tera),
            "training seconds, all phases": cost("seconds", seconds_text),
            "training seconds, critical path": cost("critical_seconds", seconds_text),
        }
    return markdown(pd.DataFrame(columns).rename_axis("").reset_index().to_dict("records"))


def _over(run: str, name: str) -> str:
    row = comparison(run, name)
    return f"{gain(run, name)} ({row['better']} of {row['seeds']} seeds better)"


def adaptive(run: str) -> str:
    """A run with MAT and its controls: a row a strategy, costs relative to end to end's."""
    results, base = run_of(run), rows_of(run, BASELINE)
    metric, seeds, rows = results.metric, results.strategies["seed"], []
    for name, group in results.strategies.groupby("strategy", sort=False):
        rates = results.phases.loc[results.phases["strategy"] == name, "lr"].dropna().unique()
        flops, seconds = (f"{rounded(group[column].mean() / base[column].mean(), 2)}×" for column in ("flops", "seconds"))
        if name == BASELINE:
            flops, seconds = f"{_tera(base['flops'].mean())} TFLOP", f"{seconds_text(base['seconds'].mean())} s"
        by_seed = metric.scale * group.sort_values("seed")["score"]
        rows.append(
            {
                "": label(name) + (f" (lr {rates[0]:g})" if len(rates) == 1 else ""),
                metric.headed(f"{metric.label}, test", ", "): spread(group["score"], metric),
                f"{metric.points} over end to end": "" if name == BASELINE else gain(run, name),
                f"by seed, {seeds.min()} to {seeds.max()}": " ".join(rounded(value, metric.digits) for value in by_seed),
                "training FLOPs": flops,
                "training time": seconds + mixes(group, base),
            }
        )
    return markdown(rows)


def updates(run: str) -> str:
    """A run with MAT: what each strategy spent until its mean score was full training's best, and what its updates cost beside
    the least they could cost; relative to full training."""
    results = run_of(run)
    reached, costs = mat.reach(results), mat.estimator_costs(results).set_index("strategy")
    until = [column for column in reached if column.startswith(f"{mat.COSTS['flops']} to ")]
    table = reached[until].join(costs.reindex(columns=["updates' FLOPs", "if all units rested"])).fillna("")
    return markdown([{"": name} | row.to_dict() for name, row in table.iterrows()])


def speed(name: str) -> str:
    """A bench of one network: a row a kind of step."""
    bench = bench_of(name)
    sample, speeds = task_of(bench).a_sample, {f"{name} a second": speed for name, speed in a_second(bench).items()}
    bench = bench.assign(**speeds)
    ours, twins = (bench[bench.index.str.fullmatch(pattern)] for pattern in (OURS, TWIN))
    share = ours["step_flops"].to_numpy() / ours["step_flops"].sum()
    titles = {
        "end to end": ["end_to_end"],
        "the same in a bare loop": ["end_to_end-bare"],
        "meta model": ["meta"],
        f"hybrids, modules 1 to {len(ours)}": ours.index,
    }
    rows = []
    for title, names in titles.items():
        those = bench.loc[names]
        rows.append(
            {
                "": title,
                f"GFLOP {sample}": ", ".join(rounded(v, 2 if v > 1 else 4) for v in those["step_flops"] / those["batch"] / 1e9),
                "seconds a step": ", ".join(f"{value:#.3g}" for value in those["step_seconds"]),
                **{of: ", ".join(rounded(v, 2 if v < 10 else 0) for v in those[of]) for of in speeds},
                "peak memory of a step": ", ".join(rounded(value / 2**20, 0) for value in those["peak_memory_bytes"]) + " MiB",
            }
        )
    ratio = rounded(bench.loc["end_to_end", "ratio"], 3)
    rows[1]["seconds a step"] += f" (ours takes {ratio} times as long within rounds)"
    time, flops = (rounded(float((share * twins[column]).sum()), 3) for column in ("ratio", "flops_ratio"))
    most = (twins["peak_memory_bytes"].to_numpy() / ours["peak_memory_bytes"].to_numpy()).max()
    together = f"the {NUMBERS[len(ours)]} together, released freezing against ours"
    last = together, f"{flops} times", f"{time} times", *[""] * len(speeds), f"up to {rounded(most, 2)} times"
    return markdown([*rows, dict(zip(rows[0], last, strict=True))])


def networks() -> str:
    """Which networks of timm can be trained in pieces: a row a model file."""
    rows = []
    for file, group in sources.networks().groupby("file"):
        one = group.iloc[0]
        passes = one["result"] != "no"
        rows.append(
            {
                "timm's file": f"`{file}`",
                "tried": ", ".join(f"`{name}`" for name in (group if passes else group[:1])["network"]),
                "blocks": str(one["blocks"]),
                "starts": ", ".join(["random", *one["starts"].split()]) if passes else "",
                "result": one["result"] if passes else f"no: {one['why']}",
            }
        )
    return markdown(rows)


TABLES: dict[str, Callable[..., str]] = {
    f.__name__: f for f in (budget, costs, scores, changed, overview, chain, adaptive, updates, speed, fields, recipes, networks)
}
