"""Records as tidy tables: one row per strategy and seed, one per phase, one per evaluation.

Costs are taken from the graph: the *sum* over all phases a strategy needs (one machine), and the *critical path* (the
longest way through the graph: modules side by side). The meta model always counts. The same three tables are kept as
CSV files in data/results, so that a tracked figure can be drawn again from a tracked table.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from incubate_lib.config import SettingsError, load_settings, nearest, presets
from incubate_lib.pipeline.graph import Node, Plan, closure, longest
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.tables.hardware import hardware_row, mixed_text
from incubate_lib.report.tables.verdict import against_baseline, meta_alone, not_from_nothing
from incubate_lib.report.words import label
from incubate_lib.training.runs import MNTK

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
        text = against_baseline(self.strategies)
        if text:
            text.append(meta_alone(self.strategies, self.phases))
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
    return Path(__file__).resolve().parents[3] / "data" / "results"


def write_table(table: pd.DataFrame, path: Path) -> Path:
    """Write a table with six digits, as all tracked ones have; return the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False, float_format="%.6g")
    return path


def write_figure(figure: Any, name: str) -> Path:
    """Write a matplotlib figure that is drawn from tracked tables to the project's figures/; return the file."""
    path = results_folder().parents[1] / "figures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


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


def _strategy_row(strategy: str, final: Node, summary: dict) -> dict:
    needed = {node.key: node.summary() for node in closure([final])}
    row = {"accuracy": summary["accuracy"]}
    for phase, column in {"meta": "meta_accuracy", "assemble": "assembled_accuracy"}.items():
        row[column] = next((s["accuracy"] for s in needed.values() if s["phase"] == phase), None)
    for short, name in {"flops": "train_flops", "seconds": "train_seconds"}.items():
        row[short] = _number(sum(s[name] for s in needed.values()))
        row[f"critical_{short}"] = _number(longest(closure([final]), {key: s[name] for key, s in needed.items()})[final.key])
    settings = final.experiment.settings
    if settings.strategies[strategy].match_on == "critical_path" and settings.is_matched(strategy):  # K workers share each batch
        workers = len(final.experiment.facts.target_depths)
        row |= {f"critical_{short}": row[short] / workers for short in ("flops", "seconds")}
    row |= {name: sum(s[name] for s in needed.values()) for name in ("images_seen", "steps")}
    where = summary["provenance"]
    row |= hardware_row([s for s in needed.values() if s["train_seconds"]] or [summary])
    row |= {"torch": where["versions"]["torch"], "date": where["date"]}
    return row | {
        "judged_on": final.settings.data.eval_split,
        "commit": (where["commit"] or "")[:10] + ("+" if where["dirty"] else ""),
    }


def _number(count: float) -> float:
    """Return a count so that sums of it do not overflow: a table's integers end at 9.2e18, and ImageNet takes more FLOPs."""
    return count if count < 2**53 else float(count)
