"""Records as tidy tables: one row per strategy and seed, one per phase, one per evaluation.

Costs are taken from the graph: the *sum* over all phases a strategy needs (one machine), and the *critical path* (the
longest way through the graph: modules side by side). The meta model always counts. The same three tables are kept as
CSV files in data/results, so that a tracked figure can be drawn again from a tracked table.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from incubate_lib.config import SettingsError, load_settings, nearest, presets
from incubate_lib.pipeline.graph import Node, Plan, closure, longest_ways
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.statistics import compare, family_text, paired, points_text, rounded, verdict_text
from incubate_lib.training.runs import MNTK

BASELINE = "end_to_end"
SEVERAL = " + "  # joins the devices of a sum over phases, and in the same order their threads
MIXED = "†"  # marks seconds of several devices
STRATEGY_COLUMNS = [
    "strategy", "seed", "accuracy", "meta_accuracy", "assembled_accuracy", "flops", "critical_flops", "seconds",
    "critical_seconds", "images_seen", "steps", "judged_on", "device", "threads", "torch", "date", "commit",
]  # fmt: skip
PHASE_COLUMNS = [
    "strategy", "seed", "phase", "module_index", "start_accuracy", "accuracy", "loss", "train_loss", "epochs", "steps",
    "images_seen", "distinct_images_per_epoch", "flops", "flops_executed", "seconds", "eval_seconds", "data_share", "devices",
    "lr", "parameters", "looks", "look_seconds", "look_flops", "device", "threads", "precision",
]  # fmt: skip
CURVE_COLUMNS = [
    "strategy",
    "seed",
    "phase",
    "module_index",
    "epoch",
    "step",
    "flops",
    "train_seconds",
    "train_loss",
    "loss",
    "accuracy",
]
MNTK_COLUMNS = [
    "strategy", "seed", "phase", "module_index", "epoch", "step", "unit", "eigenvalue", "effective_rank", "active", "cut",
]  # fmt: skip


@dataclass(frozen=True)
class Results:
    """What is finished of an experiment."""

    name: str
    strategies: pd.DataFrame  # STRATEGY_COLUMNS
    phases: pd.DataFrame  # PHASE_COLUMNS; a shared phase stands in every strategy that needs it
    curves: pd.DataFrame  # CURVE_COLUMNS
    mntk: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=MNTK_COLUMNS))  # a row a unit and evaluation
    published: bool = False  # read from the project's tracked tables, not from runs of this machine

    def verdict(self) -> str:
        """Say in words what the numbers say, whatever they are: each strategy against end-to-end, paired by seed."""
        text = _against_baseline(self.strategies)
        if text:
            text.append(_meta_alone(self.strategies, self.phases))
        text = [line for line in text if line] or ["Nothing to compare yet: it takes end_to_end and another strategy."]
        if names := not_from_nothing(self.phases):
            text.append(f"Weights read from a file, whose training is not counted here: {', '.join(map(label, names))}.")
        return "\n".join([*text, *filter(None, [mixed_text(self.strategies)])])


def from_plan(plan: Plan) -> Results:
    """Read the records of all finished strategies of a plan, and of their phases."""
    strategies, phases, curves, kernels = [], [], [], []
    for (name, seed), final in plan.finals.items():
        for node in closure([final]):
            summary = node.summary()
            if summary is None:
                continue
            row = summary | {"strategy": name}  # a shared phase is recorded under the first strategy that needed it
            row |= {"flops": _number(summary["train_flops"]), "seconds": summary["train_seconds"]}
            row |= {"precision": node.settings.precision} | {key: summary["provenance"][key] for key in ("device", "threads")}
            if (executed := summary.get("train_flops_executed")) is not None:  # not in records from before it was counted
                row["flops_executed"] = _number(executed)
            row["lr"] = node.settings.training.peak_lr if node.settings.training else None
            if mat := summary.get("mat"):
                row |= {"looks": mat["evaluations"], "look_seconds": mat["seconds"], "look_flops": mat["flops"]}
            phases.append(row)
            per_step = summary["train_flops"] / summary["steps"] if summary["steps"] else 0
            shared = {"strategy": name, "seed": seed, "phase": summary["phase"], "module_index": summary["module_index"]}
            curves += [
                shared | metric | {"flops": metric.get("train_flops", metric["step"] * per_step)}
                for metric in node.folder.metrics()
            ]
            kernels += [shared | unit for unit in _units_of(node, summary)]
        if all(node.summary() for node in closure([final])):
            summary = final.summary()
            strategies.append({"strategy": name, "seed": seed, **_strategy_row(name, final, summary)})
    return Results(
        plan.experiment.path.name,
        pd.DataFrame(strategies, columns=STRATEGY_COLUMNS),
        pd.DataFrame(phases, columns=PHASE_COLUMNS).astype({"module_index": "Int64"}),
        pd.DataFrame(curves, columns=CURVE_COLUMNS).astype({"module_index": "Int64"}),
        pd.DataFrame(kernels, columns=MNTK_COLUMNS).astype({"module_index": "Int64"}),
    )


def _units_of(node: Node, summary: dict) -> list[dict]:
    """Return a row for each unit at each evaluation of the modular NTK."""
    rows = []
    for probe in node.folder.metrics(MNTK):
        ranks = probe["effective_ranks"] or [None] * len(probe["eigenvalues"])
        for unit in zip(summary["mat"]["units"], probe["eigenvalues"], ranks, probe["active"], strict=True):
            rows.append(dict(zip(("unit", "eigenvalue", "effective_rank", "active"), unit, strict=True)) | {
                "epoch": probe["epoch"], "step": probe["step"], "cut": probe["cut"],
            })  # fmt: skip
    return rows


def published(name: str) -> Results:
    """Read the tracked tables of an experiment; SettingsError if there are none of that name."""
    if name not in (known := published_runs()):
        raise SettingsError(f"no published run {name!r}; {nearest(name, known)}; `incubate report PRESET --publish` makes one")
    read = [pd.read_csv(results_folder() / f"{name}{part}.csv") for part in ("", "_phases", "_curves")]
    phases, curves = (table.astype({"module_index": "Int64"}) for table in read[1:])
    path = results_folder() / f"{name}_mntk.csv"
    kernels = pd.read_csv(path).astype({"module_index": "Int64"}) if path.exists() else pd.DataFrame(columns=MNTK_COLUMNS)
    return Results(name, read[0], phases.reindex(columns=PHASE_COLUMNS), curves, kernels, published=True)


def published_runs() -> list[str]:
    """Return the names of experiments that have tracked tables; studies and benches have other ones."""
    return [path.name.removesuffix("_curves.csv") for path in sorted(results_folder().glob("*_curves.csv"))]


def results_folder() -> Path:
    """The tracked tables belong to the project, whatever INCUBATE_DATA says."""
    return Path(__file__).resolve().parents[2] / "data" / "results"


def comparison(results: Results) -> pd.DataFrame:
    """Return the table people look at: a column a strategy, mean ± std over seeds, costs relative to end-to-end."""
    table, rows = results.strategies, []
    costs = ["flops", "critical_flops", "seconds", "critical_seconds"]
    means = table.groupby("strategy", sort=False)[costs].mean()
    base = means.loc[BASELINE] if BASELINE in means.index else None
    unit, factor = flop_unit(table["flops"].max() if len(table) else 1)
    for name, group in table.groupby("strategy", sort=False):
        mean = means.loc[name]
        mixed = mixes(group, table[table["strategy"] == BASELINE])

        def ratio(cost: str, mean: pd.Series = mean) -> str:
            return "" if base is None else f" ({mean[cost] / base[cost]:.2f}×)"

        rows.append({
            "strategy": label(name),
            "seeds": len(group),
            "top-1 %": spread(100 * group["accuracy"]),
            "meta model %": spread(100 * group["meta_accuracy"].dropna()),
            "assembled %": spread(100 * group["assembled_accuracy"].dropna()),
            unit: f"{mean['flops'] / factor:.2f}" + ratio("flops"),
            f"critical path {unit}": f"{mean['critical_flops'] / factor:.2f}" + ratio("critical_flops"),
            "training s": seconds_text(mean["seconds"]) + ratio("seconds") + mixed,
            "critical path s": seconds_text(mean["critical_seconds"]) + ratio("critical_seconds") + mixed,
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("strategy").T.rename_axis(columns=None)


def hardware(results: Results) -> str:
    """Return where and when the numbers were measured, in one line."""
    return hardware_of(results.strategies)


def hardware_of(table: pd.DataFrame) -> str:
    """Return where and when the numbers of a table with a row a strategy and seed were measured, in one line."""
    if table.empty:
        return "nothing measured yet"

    def one(column: str) -> str:
        return ", ".join(sorted({str(v) for v in table[column]}))

    where = [f"{device}, {threads} thread(s) a phase" for device, threads in places(table)]
    text = where[0] if len(where) == 1 else f"{len(where)} devices ({'; '.join(where)})"
    days = sorted({str(date)[:10] for date in table["date"]})
    return (
        f"{text}, torch {one('torch')}, {' to '.join(dict.fromkeys((days[0], days[-1])))}, top-1 on the {one('judged_on')} split"
    )


def places(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the hardware on which a table's seconds were measured, as (device, threads), each once.

    Two machines whose processors have one name are told apart only by their threads.
    """
    known = table.reindex(columns=["device", "threads"]).dropna().drop_duplicates()
    found = [
        pair
        for device, threads in known.itertuples(index=False)
        for pair in zip(str(device).split(SEVERAL), str(threads).split(SEVERAL), strict=True)
    ]
    return list(dict.fromkeys(found))


def mixes(rows: pd.DataFrame, others: pd.DataFrame | None = None) -> str:
    """Return the mark of seconds that are of several devices, or that are compared with those of other devices; else nothing."""
    mine, theirs = set(places(rows)), set(places(rows if others is None else others))
    return MIXED if len(mine) > 1 or (theirs and theirs != mine) else ""


def mixed_text(table: pd.DataFrame) -> str:
    """Say which devices a table's seconds are of, if they are several; nothing if it is one."""
    where = [f"{device}, {threads} thread(s)" for device, threads in places(table)]
    if len(where) < 2:
        return ""
    return (
        f"Seconds of {len(where)} devices: {'; '.join(where)}. {MIXED} marks sums over several of them and ratios between "
        "different ones, which say nothing about any machine: compare FLOPs."
    )


def load_results(preset: str, overrides: list[str], strategies: list[str], seeds: list[int]) -> Results:
    """Return what this machine has finished of an experiment; if that is nothing, the preset's published tables.

    SettingsError if there is neither.
    """
    results = from_plan(plan(load_settings(preset, overrides), strategies, seeds))
    if not results.strategies.empty:
        return results
    if overrides or preset not in presets() or not (results_folder() / f"{preset}.csv").exists():
        raise SettingsError(f"no strategy of {preset} is finished here; `incubate run {preset}` first")
    return published(preset)


def settings_table(node: Node) -> pd.DataFrame:
    """Return the resolved settings of a phase, one row a field."""
    hidden = {"inputs": True, "format": True, "data": node.settings.data.unused_fields}
    flat = pd.json_normalize(node.settings.model_dump(mode="json", exclude=hidden))
    if node.settings.training and node.settings.training.lr_for_batch:
        flat["training.lr × batch_size / lr_for_batch"] = node.settings.training.peak_lr
    flat = flat.dropna(axis="columns").T.rename(columns={0: "value"})
    return flat[flat["value"].map(lambda value: value not in ({}, []))].rename_axis("setting")


def costs_table(node: Node) -> pd.DataFrame:
    """Return what a training image costs in each kind of phase that the node's strategy may have, counted, next to end to end."""
    other = "incubate" if node.settings.imitate else "imitate"  # a strategy does one or the other
    counted = node.experiment.facts.flops_per_image
    flops = pd.Series({key: value for key, value in counted.items() if not key.startswith(other)}) / 1e6
    table = pd.DataFrame({"MFLOP an image": flops.round(2), "of end to end": (flops / flops["target"]).round(3)})
    names = {"meta": "meta model", "target": "end to end, fine-tuning"}
    kinds = {"incubate": "hybrid, module {}", "imitate": "imitation, module {}", "target": "end to end, {} pixels"}

    def named(key: str) -> str:
        kind, _, number = key.partition("-")
        return names.get(key) or kinds[kind].format(int(number) + (kind != "target"))

    table.index = [named(key) for key in table.index]
    return table


def spent(summary: dict) -> str:
    """Say what a phase took, so that neither repeated augmentation nor left-out batches can hide anything."""
    text = f"Cost: {summary['train_flops'] / 1e9:.4g} GFLOP, {summary['train_seconds']:.3g} s "
    text += f"({summary['data_share']:.0%} of it waiting for images); {summary['steps']:,} updates, "
    text += f"{summary['images_seen']:,} images seen, "
    return text + f"{summary['distinct_images_per_epoch']:,} different ones an epoch."


def curves_of(node: Node) -> pd.DataFrame:
    """Return the evaluations of one phase."""
    return pd.DataFrame(node.folder.metrics())


def label(strategy: str) -> str:
    """Return a strategy's name for people."""
    known = {
        "end_to_end": "end to end",
        "deep_incubation": "Deep Incubation, random start (paper)",
        "deep_incubation_stack": "Deep Incubation, stack start",
        "deep_incubation_identity": "Deep Incubation, identity start",
        "recommended": "Deep Incubation, recommended",
        "deep_incubation_mat": "Deep Incubation with MAT",
        "stacking": "meta model, stacked, no incubation",
        "growing": "meta model, grown, no incubation",
        "random_modules": "random modules, no meta model",
        "imitation": "modules imitate the meta model",
        "end_to_end_longer": "end to end, K workers as long",
        "end_to_end_low_resolution": "end to end, small images first",
        "end_to_end_short": "end to end, shorter",
        "mat": "MAT",
        "mat_random": "random units, as many",
        "mat_gradient_norm": "largest gradients, as many",
        "mat_inverted": "smallest eigenvalues, as many",
        "mat_multirate": "Multirate",
        "mat_exact": "MAT, error everywhere",
    }
    return known.get(strategy, strategy.replace("_", " "))


ISOLATES = {  # what a strategy is there to show, next to Deep Incubation
    "stacking": "whether the meta model's weights, copied into the deep network, do without incubation",
    "growing": "the same with blocks that begin as nothing: the deep network starts out as the meta model",
    "random_modules": "whether the recipe of fine-tuning alone does it, without any weights of a meta model",
    "imitation": "whether modules must learn from labels, or only what the meta module computes",
    "end_to_end_longer": "whether K workers had better trained the whole network together, as long and without loss",
    "end_to_end_low_resolution": "whether another saving, small images first, does as well",
}


def flop_unit(flops: float) -> tuple[str, float]:
    """Return a unit in which the number reads well, and its size."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= size:
            return unit, size
    return "GFLOP", 1e9


def seconds_text(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"


def spread(values: pd.Series) -> str:
    """Return mean ± standard deviation over seeds; a single seed is marked as such."""
    if values.empty:
        return "–"
    mean = rounded(values.mean())
    return f"{mean} ± {rounded(values.std())}" if len(values) > 1 else f"{mean} (one seed)"


def differences(table: pd.DataFrame, pairs: list[tuple[str, str]]) -> pd.DataFrame:
    """Return how far the first strategy of each pair is ahead of the second, in points, paired by seed; all are one family.

    A row a pair that has a seed in common. Columns: strategy, other, `statistics.COLUMNS`, flops and critical_flops (the
    first's over the second's).
    """
    found = [(*pair, gain) for pair in pairs if len(gain := paired(table, *pair))]
    cost = table.groupby("strategy").mean(numeric_only=True).reindex(columns=["flops", "critical_flops"])
    names = pd.DataFrame({"strategy": [name for name, *_ in found], "other": [other for _, other, _ in found]})
    ratios = pd.DataFrame([cost.loc[name] / cost.loc[other] for name, other, _ in found], columns=cost.columns)
    return pd.concat([names, compare([gain for *_, gain in found]), ratios.reset_index(drop=True)], axis="columns")


def _against_baseline(table: pd.DataFrame) -> list[str]:
    """Say of each strategy how it does against end to end, and what was corrected for."""
    found = differences(table, [(name, BASELINE) for name in table["strategy"].unique() if name != BASELINE])
    text = []
    for row in found.to_dict("records"):
        text.append(
            f"{label(row['strategy'])}: {points_text(row['gain'])} than end to end ({verdict_text(row)}), for "
            f"{row['flops']:.2f} times its training FLOPs, {row['critical_flops']:.2f} times on the critical path."
        )
    return [*text, family_text(found["comparisons"].max())] if text else []


def not_from_nothing(phases: pd.DataFrame) -> list[str]:
    """Return the strategies that start from weights of a file: no meta model and no network was trained from random ones."""
    table = phases.reindex(columns=PHASE_COLUMNS).dropna(subset="strategy")
    begun = set(table.loc[table["phase"].isin(["meta", "end_to_end"]) & (table["steps"] > 0), "strategy"])
    phases = table.groupby("strategy")["phase"].agg(set)
    begun |= {name for name, those in phases.items() if "assemble" in those and "meta" not in those}  # of random modules
    return [name for name in table["strategy"].unique() if name not in begun]


def _meta_alone(table: pd.DataFrame, phases: pd.DataFrame) -> str:
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


def _strategy_row(strategy: str, final: Node, summary: dict) -> dict:
    nodes = closure([final])
    needed = {node.key: node.summary() for node in nodes}
    row = {"accuracy": summary["accuracy"]}
    for phase, column in {"meta": "meta_accuracy", "assemble": "assembled_accuracy"}.items():
        row[column] = next((s["accuracy"] for s in needed.values() if s["phase"] == phase), None)
    for short, name in {"flops": "train_flops", "seconds": "train_seconds"}.items():
        row[short] = _number(sum(s[name] for s in needed.values()))
        row[f"critical_{short}"] = _number(longest_ways(nodes, {key: s[name] for key, s in needed.items()})[final.key])
    settings = final.experiment.settings
    if settings.strategies[strategy].match_on == "critical_path" and settings.is_matched(strategy):  # K workers share each batch
        workers = len(final.experiment.facts.target_depths)
        row |= {f"critical_{short}": row[short] / workers for short in ("flops", "seconds")}
    row |= {name: sum(s[name] for s in needed.values()) for name in ("images_seen", "steps")}
    where = summary["provenance"]
    row |= _hardware([s for s in needed.values() if s["train_seconds"]] or [summary])
    row |= {"torch": where["versions"]["torch"], "date": where["date"]}
    return row | {
        "judged_on": final.settings.data.eval_split,
        "commit": (where["commit"] or "")[:10] + ("+" if where["dirty"] else ""),
    }


def _hardware(summaries: list[dict]) -> dict:
    """Return device and threads of what was trained; of phases from several machines all of them, in one order."""
    where = list(dict.fromkeys((s["provenance"]["device"], s["provenance"]["threads"]) for s in summaries))
    if len(where) == 1:
        return {"device": where[0][0], "threads": where[0][1]}
    return {"device": SEVERAL.join(d for d, _ in where), "threads": SEVERAL.join(str(t) for _, t in where)}


def _number(count: float) -> float:
    """Return a count so that sums of it do not overflow: a table's integers end at 9.2e18, and ImageNet takes more FLOPs."""
    return count if count < 2**53 else float(count)
