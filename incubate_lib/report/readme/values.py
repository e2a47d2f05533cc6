"""The single numbers of README, each by a function of tracked tables that says in its docstring what it is."""

import functools
import itertools
import re

import pandas as pd

from incubate_lib import tasks
from incubate_lib.config import presets
from incubate_lib.report.planner.bench import OURS
from incubate_lib.report.planner.published import PUBLISHED_HOURS
from incubate_lib.report.readme import sources
from incubate_lib.report.readme.sources import comparison, own_comparisons, rows_of, run_of
from incubate_lib.report.tables import overview
from incubate_lib.report.tables.hardware import mixes, places
from incubate_lib.report.tables.statistics import interval_text, judged_text, paired, rounded, spread
from incubate_lib.report.tables.verdict import differences
from incubate_lib.report.words import BASELINE, metric_of

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def _score(rows: pd.DataFrame, score: float, sign: str = "") -> str:
    """Return a score, or a difference of scores, as people read it, without the unit."""
    metric = metric_of(rows)
    return rounded(metric.scale * score, metric.digits, sign)


def top(source: str, strategy: str, column: str = "score") -> str:
    """A score, mean ± standard deviation over seeds."""
    rows = rows_of(source, strategy)
    return spread(rows[column], metric_of(rows))


def mean(source: str, strategy: str, column: str = "score") -> str:
    """A mean score."""
    rows = rows_of(source, strategy)
    return _score(rows, rows[column].mean())


def least(source: str, *strategies: str) -> str:
    """The least of the strategies' means."""
    return min((mean(source, name) for name in strategies), key=float)


def most_of_others(source: str, *strategies: str) -> str:
    """The largest mean of all other strategies."""
    return max((mean(source, name) for name in rows_of(source)["strategy"].unique() if name not in strategies), key=float)


def gain(source: str, strategy: str, other: str = BASELINE) -> str:
    """A difference in points with its corrected interval and the verdict."""
    return judged_text(comparison(source, strategy, other))


def change(source: str, strategy: str) -> str:
    """What a recipe of a study changes against the first, in points with its corrected interval and the verdict."""
    row = sources.change(source, strategy)
    return judged_text(row) if row else "does not apply"


def points(source: str, strategy: str, other: str = BASELINE) -> str:
    """A difference in points, without its sign."""
    row = comparison(source, strategy, other)
    return rounded(abs(row["gain"]), tasks.metric(row["metric"]).digits)


def alone(source: str, strategy: str, other: str = BASELINE) -> str:
    """The 95 % interval that a difference would have if it were the only one."""
    row = comparison(source, strategy, other)
    digits = tasks.metric(row["metric"]).digits
    return interval_text(row["gain"] - row["half_alone"], row["gain"] + row["half_alone"], digits)


def count_clear(source: str, strategy: str, other: str = BASELINE) -> str:
    """How many of a strategy's comparisons are clear, better or worse: "3 of 4"."""
    found = own_comparisons(source, strategy, other)
    return f"{int(found['clear'].sum())} of {len(found)}"


def ahead(source: str, strategy: str, other: str = BASELINE) -> str:
    """In how many of a strategy's comparisons it is clearly better: "3 of 4"."""
    found = own_comparisons(source, strategy, other)
    return f"{int((found['clear'] & (found['gain'] > 0)).sum())} of {len(found)}"


def span(source: str, strategy: str, other: str = BASELINE) -> str:
    """The smallest and the largest difference over a study's cells."""
    found = own_comparisons(source, strategy, other)
    digits = metric_of(found).digits
    return " to ".join(rounded(value, digits, "+") for value in (found["gain"].min(), found["gain"].max()))


def clear_among(source: str, *strategies: str) -> str:
    """How many of the differences among some strategies are clear: "0 of 6"."""
    found = differences(rows_of(source), list(itertools.combinations(strategies, 2)))
    return f"{int(found['clear'].sum())} of {len(found)}"


def compared(source: str) -> str:
    """How many comparisons with end to end a study or a run shows."""
    return str(sources.compared_with(source, BASELINE)["comparisons"].iloc[0])


def cost(source: str, strategy: str, column: str = "flops", reference: str = "", other: str = BASELINE) -> str:
    """A mean cost over that of another strategy, end to end's in the same cell unless said otherwise."""
    mine, theirs = rows_of(source, strategy), rows_of(reference or source, other)
    mark = mixes(mine, theirs) if "seconds" in column else ""
    return rounded(mine[column].mean() / theirs[column].mean(), 2) + mark


def seeds(source: str) -> str:
    """The number of seeds, in a word."""
    return NUMBERS[rows_of(source)["seed"].nunique()]


def images(source: str) -> str:
    """The number of images to train on."""
    (count,) = rows_of(source)["train_images"].unique()
    return f"{count:,}"


def hardware(source: str) -> str:
    """Where and when it was measured."""
    rows = rows_of(source)
    where = "; ".join(f"{threads} thread(s) of an {device}" for device, threads in places(rows))
    days = dict.fromkeys((min(rows["date"])[:10], max(rows["date"])[:10]))
    return f"{' to '.join(days)}, {where} a phase, torch {', '.join(sorted(set(rows['torch'])))}"


def tuned(study: str, strategy: str, which: str) -> str:
    """What fine-tuning adds to the assembled network, in points: `mean`, `least` or `most` of the cells."""
    rows, axes = rows_of(study, strategy), sources.study_of(study).axes
    added = rows["score"] - rows["assembled_score"]
    cells = added.groupby([rows[axis] for axis in axes]).mean()
    return _score(rows, {"mean": added.mean(), "least": cells.min(), "most": cells.max()}[which], "+")


def over_meta(study: str, strategy: str) -> str:
    """How far the finished network is above its meta model, in points."""
    rows = rows_of(study, strategy)
    return _score(rows, (rows["score"] - rows["meta_score"]).mean(), "+")


def in_short() -> str:
    """What the studies that stand apart say in three sentences."""
    return overview.in_short(map(sources.study_of, overview.APART))


# -- Modular Adaptive Training --------------------------------------------------------------------------------------------


def without(source: str, seed: str, strategy: str, other: str = BASELINE) -> str:
    """A mean difference in points over all seeds but one; no verdict, as the seed was left out for its result."""
    rows = rows_of(source)
    return rounded(paired(rows[rows["seed"] != int(seed)], strategy, other).mean(), metric_of(rows).digits, "+")


def at_epoch(source: str, strategy: str, seed: str, epoch: str) -> str:
    """The score of one seed at one epoch."""
    curves = run_of(source).curves
    there = (curves["strategy"] == strategy) & (curves["seed"] == int(seed)) & ((curves["epoch"] - float(epoch)).abs() < 0.01)
    (value,) = curves.loc[there, "score"]
    return _score(curves, value)


def active(source: str, epoch: str, *seeds: str) -> str:
    """How many of the units that train from an epoch on are attention layers: the least and the most of these seeds."""
    probes = run_of(source).mntk.query(f"strategy == 'mat' and active == 1 and seed in {[int(s) for s in seeds]}")
    probes = probes[(probes["epoch"] - float(epoch)).abs() < 0.01]
    counts = probes["unit"].str.endswith("attn").groupby(probes["seed"]).sum()
    return f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"


def low_blocks(source: str, blocks: str) -> str:
    """The share of MAT's active units, after its first look, that lie in the lowest blocks."""
    probes = run_of(source).mntk.query("strategy == 'mat' and active == 1 and epoch > 0")
    return rounded(100 * (probes["unit"].str.extract(r"(\d+)")[0].astype(int) < int(blocks)).mean(), 0)


def two_largest(source: str) -> str:
    """How many times the eigenvalue of any third unit those of the two largest are, over seeds and looks of MAT."""
    probes = run_of(source).mntk.query("strategy == 'mat'").pivot(index=["seed", "epoch"], columns="unit", values="eigenvalue")
    ordered = probes.apply(lambda row: row.sort_values(ascending=False).reset_index(drop=True), axis="columns")
    names = {tuple(sorted(row.nlargest(2).index)) for _, row in probes.iterrows()}
    if len(names) > 1:
        raise KeyError(f"the two largest are not always the same: {names}")
    return f"{rounded((ordered[1] / ordered[2]).min(), 2)} to {rounded((ordered[0] / ordered[2]).max(), 2)}"


def probing(source: str, what: str) -> str:
    """What computing the kernels took of MAT's training: `seconds`, or `share` of the time in percent."""
    phases = run_of(source).phases.query("strategy == 'mat'")
    seconds, share = phases["probe_seconds"].mean(), phases["probe_seconds"].mean() / phases["seconds"].mean()
    return rounded(seconds) if what == "seconds" else rounded(100 * share)


# -- planned and timed ----------------------------------------------------------------------------------------------------


@functools.cache
def _planned(preset: str) -> dict[str, dict[str, float]]:
    """Return the table in a preset's head, which is tested against what is counted: row → strategy → FLOPs in its unit."""
    lines = [line.removeprefix("#") for line in presets()[preset].read_text().splitlines() if line.startswith("#   ")]
    start = next(i for i, line in enumerate(lines) if "FLOP of training" in line)
    unit, *names = re.split(r"\s{2,}", lines[start].strip())
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 :]]
    size = {"TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18}[unit.split()[0]]
    return {
        name: {key: size * float(value) for key, value in zip(names, values, strict=True)}
        for name, *values in rows
        if name in ("in all", "critical path")
    }


def planned(preset: str, strategy: str, row: str = "in all") -> str:
    """Planned FLOPs over those of the longest end-to-end training in the preset's table."""
    costs = _planned(preset)
    return rounded(costs[row][strategy] / list(costs["in all"].values())[-1], 2)


def peak_share(preset: str, strategy: str) -> str:
    """The share of an A100's bf16 peak, in percent, that the authors' hours and the planned FLOPs imply."""
    whole, pieces = PUBLISHED_HOURS[preset]
    hours = whole if strategy.startswith(BASELINE) else pieces
    return rounded(100 * _planned(preset)["in all"][strategy] / (hours * 3600 * 312e12))


def hours(preset: str) -> str:
    """The authors' A100-hours, end to end and in pieces."""
    return " → ".join(map(str, PUBLISHED_HOURS[preset]))


def predicted(run: str, bench: str) -> str:
    """How far off the predicted times of a run are, in a sentence."""
    from incubate_lib.report.planner.forecast import against_measured, measured_speed
    from incubate_lib.report.planner.planner import against_in_words

    return against_in_words(against_measured(run_of(run), measured_speed(bench))).rstrip(".")


def bench_rates(name: str, what: str) -> str:
    """What a bench says: `matmul` (GFLOP/s of a large product), `least` and `most` (shares of it that steps reach, in %)."""
    rows = sources.bench_of(name)
    ours = rows[rows.index.str.fullmatch(rf"end_to_end|meta|{OURS}")]["share_of_matmul"]
    values = {"matmul": rows["matmul_flops_per_second"].iloc[0] / 1e9, "least": 100 * ours.min(), "most": 100 * ours.max()}
    return rounded(values[what], 0)


def compiling(name: str, eager: str) -> str:
    """By how much compiling makes our steps faster, from the least to the most."""
    ours, plain = (sources.bench_of(which).filter(regex=rf"^(end_to_end|meta|{OURS})$", axis=0) for which in (name, eager))
    faster = plain["step_seconds"] / ours["step_seconds"]
    return f"{rounded(faster.min(), 2)} to {rounded(faster.max(), 2)}"


def timm_files(*results: str) -> str:
    """How many of timm's model files have a network that passes tests/battery.py with one of these results at best, or in all."""
    best = sources.networks().groupby("file")["result"].first()
    return str(int(best.isin(results).sum()) if results else len(best))


def timm_version() -> str:
    """The version of timm of which that is known."""
    return "/".join(sources.networks()["timm"].unique())


# every function of this file that has a public name
VALUES = {name: f for name, f in list(globals().items()) if getattr(f, "__module__", "") == __name__ and name[0] != "_"}
