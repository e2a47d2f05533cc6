"""Records as tidy tables: one row per strategy and seed, one per phase, one per evaluation.

Costs are taken from the graph: the *sum* over all phases a strategy needs (one machine), and the *critical path* (the
longest way through the graph: modules side by side). The meta model always counts. The same three tables are kept as
CSV files in data/results, so that a tracked figure can be drawn again from a tracked table.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from incubate_lib.config import SettingsError, checkout, data_folder, load_settings, nearest, presets, refuse
from incubate_lib.config.files import read_yaml
from incubate_lib.pipeline.graph import Node, Plan, closure, longest
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.tables.hardware import hardware_row, mixed_text
from incubate_lib.report.tables.verdict import against_baseline, meta_alone, not_from_nothing
from incubate_lib.report.words import TEMPLATES, label, metric_of
from incubate_lib.tasks import Metric
from incubate_lib.training.runs import METRIC_BEFORE, METRICS, MNTK, PhaseFolder, renamed

COLUMNS: dict[str, list[str]] = read_yaml(TEMPLATES / "columns.yaml")


def _table(part: str, rows: list[dict] | pd.DataFrame) -> pd.DataFrame:
    """Return rows as the table of an experiment that is called so, with all of its columns."""
    table = pd.DataFrame(rows, columns=COLUMNS[part])
    return table.astype({"module_index": "Int64"}) if "module_index" in table else table


@dataclass(frozen=True)
class Results:
    """What is finished of an experiment."""

    name: str
    strategies: pd.DataFrame  # columns.yaml says what each has
    phases: pd.DataFrame
    curves: pd.DataFrame
    mntk: pd.DataFrame = field(default_factory=lambda: _table("mntk", []))
    published: bool = False  # read from the project's tracked tables, not from runs of this machine

    @property
    def metric(self) -> Metric:
        """What the scores are of; SettingsError for several metrics."""
        return metric_of(self.strategies, self.phases, self.curves)

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
    rows: dict[str, list[dict]] = {part: [] for part in COLUMNS}
    for (name, seed), final in plan.finals.items():
        needed = [(node, node.summary()) for node in closure([final])]
        of = {"strategy": name, "seed": seed}
        for node, summary in needed:
            if summary is None:
                continue
            check_metrics(node.folder)
            rows["phases"] += [row | of for row in _phase_rows(node, summary)]
            shared = of | {key: summary[key] for key in ("phase", "module_index", "metric")}
            per_step = summary["train_flops"] / summary["steps"] if summary["steps"] else 0
            for point in node.folder.metrics():
                costs = {"flops": point.get("train_flops", point["step"] * per_step)}
                if "module_index" in point:  # of several that learn together: each has its share
                    costs |= {"train_seconds": point["train_seconds"]}
                    costs = {name: cost / len(summary["modules"]) for name, cost in costs.items()}
                rows["curves"].append(shared | point | costs)
            rows["mntk"] += [shared | unit for unit in _units_of(node, summary)]
        if all(summary for _, summary in needed):
            rows["strategies"].append(of | _strategy_row(name, final, {node.key: summary for node, summary in needed}))
    return Results(plan.experiment.path.name, **{part: _table(part, rows[part]) for part in COLUMNS})


def check_metrics(folder: PhaseFolder) -> None:
    """Raise SettingsError where lines of a phase's metrics are no evaluations, but for a last one that a kill cut short."""
    for path in (folder.path / METRICS, folder.path / MNTK):
        strange = os.path.lexists(path) and not path.is_file()
        refuse(strange, f"{path} is no file, where evaluations should be; move it away, and only its curve is lost")
        whole = path.read_bytes().count(b"\n") if path.is_file() else 0
        wrong = whole - len(folder.metrics(path.name))
        refuse(wrong > 0, f"{path} has {wrong} line(s) that are no evaluations; delete these, and the curve has a gap there")


def _phase_rows(node: Node, summary: dict) -> list[dict]:
    """Return the row of a phase, or one for each of the modules that learned in it together: they share its costs equally."""
    row, modules = _phase_row(node, summary), summary.get("modules", [])
    shares = {name: row[name] / len(modules) for name in ("flops", "flops_executed", "seconds", "eval_seconds") if modules}
    return [row | shares | module for module in modules] or [row]


def _phase_row(node: Node, summary: dict) -> dict:
    training, where, mat = node.settings.training, summary["provenance"], summary.get("mat") or {}
    return summary | {
        "flops": _number(summary["train_flops"]),
        "flops_executed": _number(summary.get("train_flops_executed", math.nan)),  # not in records from before it was counted
        "seconds": summary["train_seconds"],
        "lr": training.peak_lr if training else None,
        "probes": mat.get("evaluations", math.nan),
        "probe_seconds": mat.get("seconds", math.nan),
        "probe_flops": mat.get("flops", math.nan),
        "full_flops": mat.get("full_flops", math.nan),  # while all units train, and while all rest
        "least_flops": mat.get("least_flops", math.nan),
        "device": where["device"],
        "threads": where["threads"],
        "precision": node.settings.precision,
    }


def _units_of(node: Node, summary: dict) -> Iterator[dict]:
    """Yield a row for each unit at each evaluation of the modular NTK."""
    for probe in node.folder.metrics(MNTK):
        lists = {"unit": summary["mat"]["units"], "eigenvalue": probe["eigenvalues"], "active": probe["active"]}
        if probe["effective_ranks"]:
            lists["effective_rank"] = probe["effective_ranks"]
        at = {key: probe[key] for key in ("epoch", "step", "cut")}
        yield from (at | row for row in pd.DataFrame(lists).to_dict("records"))


def published(name: str) -> Results:
    """Read the tracked tables of an experiment; SettingsError if there are none of that name."""
    if name not in (known := published_runs()):
        raise SettingsError(f"no published run {name!r}; {nearest(name, known)}; `incubate report PRESET --publish` makes one")
    files = {part: table_file(name, part) for part in COLUMNS}
    tables = {part: _table(part, read_table(path) if path.exists() else []) for part, path in files.items()}
    return Results(name, **tables, published=True)


def table_file(name: str, part: str) -> Path:
    """Return the tracked file of one of an experiment's tables."""
    return results_folder() / f"{name}{'' if part == 'strategies' else f'_{part}'}.csv"


def speed_file(name: str) -> Path:
    """Return the table of what `incubate bench … --save NAME` measured; SettingsError if there is none."""
    tables = sorted(results_folder().glob("bench_*.csv"))
    known = {path.stem.removeprefix("bench_"): path for path in tables if "growth" not in path.stem}
    if name not in known:
        how = "`incubate bench PRESET --save NAME` measures one"
        raise SettingsError(f"no measured speed {name!r}; {nearest(name, known)}; {how}")
    return known[name]


def published_runs() -> list[str]:
    """Return the names of experiments that have tracked tables; studies and benches have other ones."""
    return [path.name.removesuffix("_curves.csv") for path in sorted(results_folder().glob("*_curves.csv"))]


def results_folder() -> Path:
    """The tracked tables belong to the project, whatever INCUBATE_DATA says; a plain install has its own alone."""
    project = checkout()
    return project / "data" / "results" if project else data_folder() / "results"


def read_table(path: Path, **options: Any) -> pd.DataFrame:
    """Read a table by today's names of its columns; `options` as for `pandas.read_csv`."""
    table = pd.read_csv(path, **options)
    table = table.set_axis(list(renamed(dict.fromkeys(table))), axis="columns")
    if "score" in table and "metric" not in table:  # from before there was more than one
        table.insert(table.columns.get_loc("score"), "metric", METRIC_BEFORE)
    return table


def as_csv(table: pd.DataFrame) -> str:
    """Return a table with six digits, as all tracked ones have."""
    return table.to_csv(index=False, float_format="%.6g")


def write_table(table: pd.DataFrame, path: Path) -> Path:
    """Write a table as `as_csv` has it; return the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_csv(table), encoding="utf-8")
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
    if overrides or preset not in presets() or preset not in published_runs():
        raise SettingsError(f"no strategy of {preset} is finished here; `incubate run {preset}` first")
    return published(preset)


def _strategy_row(strategy: str, final: Node, needed: dict[str, dict]) -> dict:
    """Return the row of a finished strategy from the summaries of all phases that it needs (node key → summary)."""
    settings, summary = final.experiment.settings, needed[final.key]
    where, row = summary["provenance"], {key: summary[key] for key in ("metric", "score")}
    for phase, column in {"meta": "meta_score", "assemble": "assembled_score"}.items():
        row[column] = next((s["score"] for s in needed.values() if s["phase"] == phase), None)
    # K workers that share each batch have a critical path of its K-th part
    shared = settings.strategies[strategy].get("match_on") == "critical_path" and settings.is_matched(strategy)
    for short, name in {"flops": "train_flops", "seconds": "train_seconds"}.items():
        costs = {key: s[name] for key, s in needed.items()}
        row[short] = _number(sum(costs.values()))
        path = _number(longest(closure([final]), costs)[final.key])
        row[f"critical_{short}"] = row[short] / len(final.facts.target_depths) if shared else path
    row |= {name: sum(s[name] for s in needed.values()) for name in ("images_seen", "steps")}
    row |= hardware_row([s for s in needed.values() if s["train_seconds"]] or [summary])
    commit = (where["commit"] or "")[:10] + ("+" if where["dirty"] else "")
    row |= {"split": final.settings.data.eval_split, "torch": where["versions"]["torch"]}
    return row | {"date": where["date"], "commit": commit}


def _number(count: float) -> float:
    """Return a count so that sums of it do not overflow: a table's integers end at 9.2e18, and ImageNet takes more FLOPs."""
    return count if count < 2**53 else float(count)
