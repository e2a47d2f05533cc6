"""Write the numbers of README.md, and all comparisons in data/results/README.md, from the tracked tables.

In README.md a number stands between comments that readers of the page do not see, as in
`<!--=gain digits-budget:1/4 growing-->…<!---->`, and a table between `<!--table budget digits-budget-->` and `<!--end-->`. The
words name one of VALUES or TABLES and what it is given. A *source* is a published run (`digits`), a study (`digits-strategies`)
or a cell of one (`digits-depth-data:8,10%`).

`python -m incubate_lib.report.readme` writes both files, and so does `incubate figures`. No line begins with such a comment:
Markdown would take all of the line for HTML.
"""

import functools
import itertools
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from incubate_lib.config import presets
from incubate_lib.report import studies, tables
from incubate_lib.report.bench import OURS, TWIN
from incubate_lib.report.mat import against_others
from incubate_lib.report.statistics import interval_text, paired, rounded
from incubate_lib.report.studies import StudyTable
from incubate_lib.report.tables import BASELINE, Results, differences, label, mixes, seconds_text, spread

ALIASES = {"paper": "deep_incubation", "recommended": "deep_incubation_identity", "stack": "deep_incubation_stack"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
COMPARISONS = "data/results/README.md"
_INLINE = re.compile(r"<!--=(?P<call>[^>\n]+)-->(?P<old>[^<\n]*)<!---->")
_BLOCK = re.compile(r"<!--table (?P<call>[^>\n]+)-->\n(?P<old>.*?)<!--end-->", re.DOTALL)


def render(text: str) -> str:
    """Return README's text with every number and table between markers as the tracked tables have it.

    ValueError for a marker that names nothing, or that begins a line.
    """
    if found := re.search(r"^[ >*-]*<!--=.*", text, re.MULTILINE):
        raise ValueError(f"a line begins with a marker, so Markdown would take it for HTML: {found[0]}")
    text = _BLOCK.sub(lambda m: f"<!--table {m['call']}-->\n{_call(TABLES, m['call'])}<!--end-->", text)
    return _INLINE.sub(lambda m: f"<!--={m['call']}-->{_call(VALUES, m['call'])}<!---->", text)


def write() -> list[Path]:
    """Write README.md and the list of all comparisons; return the files."""
    root = tables.results_folder().parents[1]
    written = {root / "README.md": render((root / "README.md").read_text()), root / COMPARISONS: comparisons()}
    for path, text in written.items():
        path.write_text(text)
    return list(written)


def _call(known: dict[str, Callable[..., str]], call: str) -> str:
    name, *words = shlex.split(call)
    try:
        return _minus(known[name](*(ALIASES.get(word, word) for word in words)))
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"README's marker {call!r}: {type(error).__name__}: {error}") from error


def _minus(text: str) -> str:
    """Set minus signs before numbers as such; dates, names and exponents keep their hyphens."""
    return re.sub(r"(?<!\w)-(?=[\d.])", "−", text)


# -- where numbers come from ----------------------------------------------------------------------------------------------


@functools.cache
def _run(name: str) -> Results:
    return tables.published(name)


@functools.cache
def _study(name: str) -> StudyTable:
    return studies.published(name)


def _is_study(source: str) -> bool:
    return source.partition(":")[0] in studies.published_studies()


@functools.cache
def _rows(source: str, strategy: str | None = None) -> pd.DataFrame:
    """Return the rows of a run, a study or one of its cells, and of one strategy."""
    name, _, cell = source.partition(":")
    rows = _study(name).results if _is_study(source) else _run(name).strategies
    for axis, value in zip(_study(name).axes, cell.split(","), strict=True) if cell else ():
        rows = rows[rows[axis] == value]
    rows = rows if strategy is None else rows[rows["strategy"] == strategy]
    if rows.empty:
        raise KeyError(f"{source} {strategy or ''} is in no tracked table")
    return rows


def _own(source: str, strategy: str, other: str) -> pd.DataFrame:
    """Return a strategy's comparisons with `other`, judged in their family: with end to end everything, with others one
    strategy."""
    found = _compared(source.partition(":")[0], other, None if other == BASELINE else strategy)
    return found[found["strategy"] == strategy]


@functools.cache
def _compared(name: str, other: str, only: str | None) -> pd.DataFrame:
    if _is_study(name):
        return studies.gains(_study(name), other, only and [only])
    if only == "mat":
        return against_others(_run(name)).query("other == @other")
    rows = _rows(name)
    return differences(rows, [(each, other) for each in rows["strategy"].unique() if each != other and only in (None, each)])


def _gain(source: str, strategy: str, other: str) -> pd.Series:
    """Return the row of one comparison."""
    name, _, cell = source.partition(":")
    found = _own(source, strategy, other)
    for axis, value in zip(_study(name).axes, cell.split(","), strict=True) if cell else ():
        found = found[found[axis] == value]
    (_, row), *more = found.iterrows()
    if more:
        raise KeyError(f"{source} is {len(found)} cells")
    return row


def _verdict(row: pd.Series) -> str:
    return "clear" if row["clear"] else "inside the noise"


# -- single numbers -------------------------------------------------------------------------------------------------------


def top(source: str, strategy: str, column: str = "accuracy") -> str:
    """Top-1 in percent, mean ± standard deviation over seeds."""
    return spread(100 * _rows(source, strategy)[column])


def mean(source: str, strategy: str, column: str = "accuracy") -> str:
    """Mean top-1 in percent."""
    return rounded(100 * _rows(source, strategy)[column].mean())


def least(source: str, *strategies: str) -> str:
    """The least of the strategies' means."""
    return min((mean(source, name) for name in strategies), key=float)


def most_of_others(source: str, *strategies: str) -> str:
    """The largest mean of all other strategies."""
    return max((mean(source, name) for name in _rows(source)["strategy"].unique() if name not in strategies), key=float)


def gain(source: str, strategy: str, other: str = BASELINE) -> str:
    """A difference in points with its corrected interval and the verdict."""
    row = _gain(source, strategy, other)
    return f"{rounded(row['gain'], 1, '+')} {interval_text(row['low'], row['high'])}, {_verdict(row)}"


def points(source: str, strategy: str, other: str = BASELINE) -> str:
    """A difference in points, without its sign."""
    return rounded(abs(_gain(source, strategy, other)["gain"]))


def alone(source: str, strategy: str, other: str = BASELINE) -> str:
    """The 95 % interval that a difference would have if it were the only one."""
    row = _gain(source, strategy, other)
    return interval_text(row["gain"] - row["half_alone"], row["gain"] + row["half_alone"])


def count_clear(source: str, strategy: str, other: str = BASELINE) -> str:
    """How many of a strategy's comparisons are clear, better or worse: "3 of 4"."""
    found = _own(source, strategy, other)
    return f"{int(found['clear'].sum())} of {len(found)}"


def ahead(source: str, strategy: str, other: str = BASELINE) -> str:
    """In how many of a strategy's comparisons it is clearly better: "3 of 4"."""
    found = _own(source, strategy, other)
    return f"{int((found['clear'] & (found['gain'] > 0)).sum())} of {len(found)}"


def span(source: str, strategy: str, other: str = BASELINE) -> str:
    """The smallest and the largest difference over a study's cells."""
    values = _own(source, strategy, other)["gain"]
    return f"{rounded(values.min(), 1, '+')} to {rounded(values.max(), 1, '+')}"


def clear_among(source: str, *strategies: str) -> str:
    """How many of the differences among some strategies are clear: "0 of 6"."""
    found = differences(_rows(source), list(itertools.combinations(strategies, 2)))
    return f"{int(found['clear'].sum())} of {len(found)}"


def compared(source: str) -> str:
    """How many comparisons with end to end a study or a run shows."""
    return str(_compared(source, BASELINE, None)["comparisons"].iloc[0])


def cost(source: str, strategy: str, column: str = "flops", reference: str = "", other: str = BASELINE) -> str:
    """A mean cost over that of another strategy, end to end's in the same cell unless said otherwise."""
    mine, theirs = _rows(source, strategy), _rows(reference or source, other)
    mark = mixes(mine, theirs) if "seconds" in column else ""
    return rounded(mine[column].mean() / theirs[column].mean(), 2) + mark


def seeds(source: str) -> str:
    """The number of seeds, in a word."""
    return NUMBERS[_rows(source)["seed"].nunique()]


def images(source: str) -> str:
    """The number of images to train on."""
    (count,) = _rows(source)["train_images"].unique()
    return f"{count:,}"


def hardware(source: str) -> str:
    """Where and when it was measured."""
    rows = _rows(source)
    where = "; ".join(f"{threads} thread(s) of an {device}" for device, threads in tables.places(rows))
    days = dict.fromkeys((min(rows["date"])[:10], max(rows["date"])[:10]))
    return f"{' to '.join(days)}, {where} a phase, torch {', '.join(sorted(set(rows['torch'])))}"


def tuned(study: str, strategy: str, which: str) -> str:
    """What fine-tuning adds to the assembled network, in points: `mean`, `least` or `most` of the cells."""
    table = _study(study)
    rows = table.results[table.results["strategy"] == strategy]
    added = 100 * (rows["accuracy"] - rows["assembled_accuracy"])
    cells = added.groupby([rows[axis] for axis in table.axes]).mean()
    return rounded({"mean": added.mean(), "least": cells.min(), "most": cells.max()}[which], 1, "+")


def over_meta(study: str, strategy: str) -> str:
    """How far the finished network is above its meta model, in points."""
    rows = _rows(study, strategy)
    return rounded(100 * (rows["accuracy"] - rows["meta_accuracy"]).mean(), 1, "+")


# -- Modular Adaptive Training --------------------------------------------------------------------------------------------


def without(source: str, seed: str, strategy: str, other: str = BASELINE) -> str:
    """A mean difference in points over all seeds but one; no verdict, as the seed was left out for its result."""
    rows = _rows(source)
    return rounded(paired(rows[rows["seed"] != int(seed)], strategy, other).mean(), 1, "+")


def at_epoch(source: str, strategy: str, seed: str, epoch: str) -> str:
    """Top-1 in percent of one seed at one epoch."""
    curves = _run(source).curves
    there = (curves["strategy"] == strategy) & (curves["seed"] == int(seed)) & ((curves["epoch"] - float(epoch)).abs() < 0.01)
    (value,) = curves.loc[there, "accuracy"]
    return rounded(100 * value)


def active(source: str, epoch: str, *seeds: str) -> str:
    """How many of the units that train after the look at an epoch are attention layers: the least and the most of these seeds."""
    looks = _run(source).mntk.query(f"strategy == 'mat' and active == 1 and seed in {[int(s) for s in seeds]}")
    looks = looks[(looks["epoch"] - float(epoch)).abs() < 0.01]
    counts = looks["unit"].str.endswith("attn").groupby(looks["seed"]).sum()
    return f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"


def low_blocks(source: str, blocks: str) -> str:
    """The share of MAT's active units, after its first look, that lie in the lowest blocks."""
    looks = _run(source).mntk.query("strategy == 'mat' and active == 1 and epoch > 0")
    return rounded(100 * (looks["unit"].str.extract(r"(\d+)")[0].astype(int) < int(blocks)).mean(), 0)


def two_largest(source: str) -> str:
    """How many times the eigenvalue of any third unit those of the two largest are, over seeds and looks of MAT."""
    looks = _run(source).mntk.query("strategy == 'mat'").pivot(index=["seed", "epoch"], columns="unit", values="eigenvalue")
    ordered = looks.apply(lambda row: row.sort_values(ascending=False).reset_index(drop=True), axis="columns")
    names = {tuple(sorted(row.nlargest(2).index)) for _, row in looks.iterrows()}
    if len(names) > 1:
        raise KeyError(f"the two largest are not always the same: {names}")
    return f"{rounded((ordered[1] / ordered[2]).min(), 2)} to {rounded((ordered[0] / ordered[2]).max(), 2)}"


def looking(source: str, what: str) -> str:
    """What looking at the kernels took of MAT's training: `seconds`, or `share` of the time in percent."""
    phases = _run(source).phases.query("strategy == 'mat'")
    seconds, share = phases["look_seconds"].mean(), phases["look_seconds"].mean() / phases["seconds"].mean()
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
    from incubate_lib.report.forecast import PUBLISHED_HOURS

    whole, pieces = PUBLISHED_HOURS[preset]
    hours = whole if strategy.startswith(BASELINE) else pieces
    return rounded(100 * _planned(preset)["in all"][strategy] / (hours * 3600 * 312e12))


def hours(preset: str) -> str:
    """The authors' A100-hours, end to end and in pieces."""
    from incubate_lib.report.forecast import PUBLISHED_HOURS

    return " → ".join(map(str, PUBLISHED_HOURS[preset]))


def predicted(run: str, bench: str) -> str:
    """How far off the predicted times of a run are, in a sentence."""
    from incubate_lib.report.forecast import against_measured, measured_speed
    from incubate_lib.report.planner import against_in_words

    return against_in_words(against_measured(_run(run), measured_speed(bench))).rstrip(".")


def bench_rates(name: str, what: str) -> str:
    """What a bench says: `matmul` (GFLOP/s of a large product), `least` and `most` (shares of it that steps reach, in %)."""
    rows = _bench(name)
    ours = rows[rows.index.str.fullmatch(rf"end_to_end|meta|{OURS}")]["share_of_matmul"]
    values = {"matmul": rows["matmul_flops_per_second"].iloc[0] / 1e9, "least": 100 * ours.min(), "most": 100 * ours.max()}
    return rounded(values[what], 0)


def _bench(name: str) -> pd.DataFrame:
    return pd.read_csv(tables.results_folder() / f"bench_{name}.csv").set_index("variant")


# -- tables ---------------------------------------------------------------------------------------------------------------


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def budget(study: str) -> str:
    """A study over budgets: a row a budget, top-1 and the critical path; the best mean of a row is bold."""
    table = _study(study)
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
            told = spread(100 * mine["accuracy"])
            told = f"**{told}**" if rounded(100 * means[name]) == rounded(100 * max(means.values())) else told
            cells.append(f"{told} ({rounded(mine['critical_flops'].mean() / largest, 2)})")
        flops = whole["flops"].mean()[place]
        rows.append([f"{place} ({rounded(flops / 1e12)} TFLOP)" if flops == whole["flops"].mean().max() else place, *cells])
    return _markdown(["budget", *heads.values()], rows)


def chain(run: str) -> str:
    """A run at equal cost: a column a strategy."""
    results, rows = _run(run), []
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

    judged = {name: _gain(run, name, BASELINE) for name in names if name != BASELINE}
    rows = [
        ["top-1, test, %", *(spread(100 * group["accuracy"]) for group in groups.values())],
        ["points over end to end, paired by seed", "",
         *(f"{gain(run, name)} ({row['better']} of {row['seeds']} seeds better)" for name, row in judged.items())],
        ["assembled, before any fine-tuning, %", *(spread(100 * group["assembled_accuracy"].dropna())
                                                   for group in groups.values())],
        ["training TFLOP, all phases", *costs("flops", lambda value: rounded(value / 1e12, 2))],
        ["training TFLOP, critical path (four machines)", *costs("critical_flops", lambda value: rounded(value / 1e12, 2))],
        ["training seconds, all phases", *costs("seconds", seconds_text)],
        ["training seconds, critical path", *costs("critical_seconds", seconds_text)],
    ]  # fmt: skip
    return _markdown(["", *map(label, names)], rows)


def adaptive(run: str) -> str:
    """A run with MAT and its controls: a row a strategy, costs relative to end to end's."""
    results = _run(run)
    base = _rows(run, BASELINE)
    rows = []
    for name, group in results.strategies.groupby("strategy", sort=False):
        rates = results.phases.loc[results.phases["strategy"] == name, "lr"].dropna().unique()
        rate = f" (lr {rates[0]:g})" if len(rates) == 1 else ""
        by_seed = " ".join(rounded(100 * value) for value in group.sort_values("seed")["accuracy"])
        flops, seconds = (group[column].mean() / base[column].mean() for column in ("flops", "seconds"))
        told = [f"{rounded(flops, 2)}×", f"{rounded(seconds, 2)}×"]
        if name == BASELINE:
            told = [f"{rounded(base['flops'].mean() / 1e12, 2)} TFLOP", f"{seconds_text(base['seconds'].mean())} s"]
        over = "" if name == BASELINE else gain(run, name)
        rows.append([label(name) + rate, spread(100 * group["accuracy"]), over, by_seed, told[0], told[1] + mixes(group, base)])
    numbers = sorted(results.strategies["seed"].unique())
    head = [
        "",
        "top-1, test, %",
        "points over end to end",
        f"by seed, {numbers[0]} to {numbers[-1]}",
        "training FLOPs",
        "training time",
    ]
    return _markdown(head, rows)


def speed(name: str) -> str:
    """A bench of one network: a row a kind of step."""
    rows = _bench(name)
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
    return _markdown(["", "GFLOP an image", "seconds a step", "peak memory of a step"], [
        row("end to end", rows.loc[["end_to_end"]]),
        row("the same in a bare loop over stock timm", rows.loc[["end_to_end-bare"]],
            f" (ours takes {rounded(whole['ratio'], 3)} times as long within rounds)"),
        row("meta model", rows.loc[["meta"]]),
        row(f"hybrids, modules 1 to {len(ours)}", ours),
        [f"the {NUMBERS[len(ours)]} together, released freezing against ours", f"{flops} times", f"{time} times",
         f"up to {rounded(most, 2)} times"],
    ])  # fmt: skip


# -- every comparison -----------------------------------------------------------------------------------------------------


def comparisons() -> str:
    """Return the file that shows every comparison that README speaks of, a section a table, a table a family."""
    parts = [
        "# Every comparison\n\nWritten by `incubate figures` from the tables in this folder. Differences are points of top-1, "
        "paired by seed. A table is a family: **clear** is what Student's paired t-test, corrected for all comparisons of its "
        "table by Holm's procedure, tells from zero at 5 %. The corrected interval has the level at which that procedure tests "
        "the difference, and excludes zero exactly where it is clear; beside it the 95 % interval that the difference would "
        "have if it were the only one.\n"
    ]
    for name in studies.published_studies():
        table = _study(name)
        parts.append(f"## {name}\n")
        parts.append(_judged(studies.gains(table).assign(other=BASELINE), table.axes))
        there = set(table.results["strategy"])
        for strategy, control in studies.WITHOUT.items():
            if {strategy, control} <= there:
                parts.append(_judged(studies.gains(table, control, [strategy]).assign(other=control), table.axes))
        if not table.axes:
            best = ["growing", "deep_incubation_identity", "stacking", "deep_incubation_stack"]
            parts.append(_judged(differences(table.results, list(itertools.combinations(best, 2))), []))
            pairs = [("deep_incubation_identity", "end_to_end_longer")]
            pairs += [("random_start_inherited_stem_and_head", "random_start_half_for_meta")]
            parts += [_judged(differences(table.results, [pair]), []) for pair in pairs]
    for name in tables.published_runs():
        rows = _run(name).strategies
        parts.append(f"## {name}\n")
        parts.append(_judged(_compared(name, BASELINE, None), []))
        if "mat" in set(rows["strategy"]):
            parts.append(_judged(against_others(_run(name)), []))
            inside = [("deep_incubation_mat", "deep_incubation")]
            parts += [_judged(differences(rows, inside), [])] if len(paired(rows, *inside[0])) else []
    return "\n".join(parts)


def _judged(found: pd.DataFrame, axes: list[str]) -> str:
    rows = []
    for row in found.to_dict("records"):
        gain, half = row["gain"], row["half_alone"]
        intervals = (gain - half, gain + half), (row["low"], row["high"])
        rows.append([
            *(row[axis] for axis in axes), label(row["strategy"]), label(row["other"]), str(row["seeds"]), rounded(gain, 2, "+"),
            *(interval_text(low, high, 2) for low, high in intervals), f"{row['p_holm']:.2g}",
            "**clear**" if row["clear"] else "inside the noise",
        ])  # fmt: skip
    head = [*axes, "strategy", "against", "seeds", "points", "95 % alone", "corrected", "p, corrected", ""]
    return _minus(_markdown(head, rows))


VALUES: dict[str, Callable[..., str]] = {
    f.__name__: f
    for f in (
        top, mean, least, most_of_others, gain, points, alone, count_clear, ahead, span, clear_among, compared, cost, seeds,
        images, hardware, tuned, over_meta, without, at_epoch, active, low_blocks, two_largest, looking, planned, peak_share,
        hours, predicted, bench_rates,
    )
}  # fmt: skip
TABLES: dict[str, Callable[..., str]] = {f.__name__: f for f in (budget, chain, adaptive, speed)}


if __name__ == "__main__":
    for path in write():
        print(f"wrote {path}")
