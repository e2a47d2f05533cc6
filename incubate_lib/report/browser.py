"""Finished runs: which there are, how they went, what differed. What cannot be read becomes a sentence or a note."""

import html
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import ipywidgets
import pandas as pd
from matplotlib.axes import Axes

from incubate_lib.config import SettingsError, data_folder
from incubate_lib.config.study import studies
from incubate_lib.pipeline.execution import is_running
from incubate_lib.pipeline.graph import Plan, closure
from incubate_lib.pipeline.recorded import DAMAGE, read_record, reason, recorded_plan
from incubate_lib.report.plots import Figure, style
from incubate_lib.report.tables import (
    Results,
    comparison,
    flop_unit,
    from_plan,
    hardware,
    label,
    mixed_text,
    published,
    published_runs,
    results_folder,
    settings_table,
)
from incubate_lib.report.widgets import with_twin
from incubate_lib.training.lease import holder
from incubate_lib.training.runs import read_json

COLUMNS = ["name", "state", "date", "settings", "strategies", "seeds", "best top-1 %", "device", "note"]
PUBLISHED = "published: "  # before the names of the project's tracked tables
AXES = {  # of the curves → column of the curves, of the phases, modules side by side, for people
    "flops": ("flops", "flops", False, "training cost spent ({unit}), modules one after another"),
    "critical_flops": ("flops", "flops", True, "training cost spent ({unit}), modules side by side (critical path)"),
    "seconds": ("train_seconds", "seconds", False, "training time (s), modules one after another"),
    "critical_seconds": ("train_seconds", "seconds", True, "training time (s), modules side by side (critical path)"),
    "steps": ("step", "steps", False, "updates, modules one after another"),
    "epoch": ("epoch", "epochs", False, "epochs, modules one after another"),
}
EMPTY = "it is empty"


# -- which runs there are -----------------------------------------------------------------------------------------------------


def runs_table(cells: bool = False) -> pd.DataFrame:
    """Return a row a run in the data folder, the newest first, and a row a published table of the project.

    The runs of a study are one row, unless `cells` are wanted. Only what is needed is read: of each run its experiment.json and
    the summaries that end a strategy. A folder that cannot be read has a note instead of numbers.
    Columns: name, state (done, running, unfinished, empty, damaged, study, published), date (last finished strategy), settings
    (what they are called), strategies (finished, with seeds), seeds, best top-1 % (mean over seeds), device, note.
    """
    known = {*studies(), *(entry.name for entry in _folders(data_folder() / "studies"))}
    rows, folded = [], {}
    for entry in _folders(data_folder() / "runs"):
        study = re.sub("-[0-9a-f]{6}$", "", entry.name)
        if study in known and not cells:
            folded.setdefault(study, []).append(Path(entry.path))
        else:
            rows.append(_run_row(Path(entry.path)))
    rows += [_study_row(name, runs) for name, runs in folded.items()]
    table = pd.DataFrame([*sorted(rows, key=lambda row: row["date"], reverse=True), *_published_rows()], columns=COLUMNS)
    return table.astype({"seeds": "Int64", "best top-1 %": float})


def _folders(path: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(path) as entries:
            return sorted((entry for entry in entries if entry.is_dir()), key=lambda entry: entry.name)
    except OSError:
        return []


def _run_row(folder: Path) -> dict[str, Any]:
    """Return a run's row, its numbers and its state; whatever is wrong with it is its note."""
    row = dict.fromkeys(COLUMNS, "") | {"name": folder.name, "seeds": 0, "best top-1 %": None}
    try:
        settings = read_record(folder)["settings"]
        row |= {"settings": str(settings["name"]), "note": ", ".join(_changes(settings))}
        ends, missing = _ends(folder)
        state = "done" if ends and not missing else _state(missing) if missing else "empty"
        return row | {"state": state} | _numbers(ends)
    except SettingsError as error:
        return row | {"state": "empty" if str(error).endswith(EMPTY) else "damaged", "note": str(error)}
    except DAMAGE as error:
        return row | {"state": "damaged", "note": reason(error)}


def _ends(folder: Path) -> tuple[list[tuple[str, str, dict[str, Any]]], list[Path]]:
    """Return (strategy, seed, summary) of what is finished in a run, and the folders of strategies that are not."""
    ends, missing = [], []
    for seed in (entry for entry in _folders(folder) if entry.name.startswith("seed-")):
        for part in (entry for entry in _folders(Path(seed.path)) if entry.name != "meta"):
            summary = read_json(Path(part.path, "finetune", "summary.json")) or read_json(Path(part.path, "summary.json"))
            if summary is None:
                missing.append(Path(part.path))
            else:
                ends.append((part.name, seed.name, summary))
    return ends, missing


def _numbers(ends: Sequence[tuple[str, str, dict[str, Any]]]) -> dict[str, Any]:
    accuracies: dict[str, list[float]] = {}
    for name, _, summary in ends:
        accuracies.setdefault(name, []).append(summary["accuracy"])
    where = [summary["provenance"] for _, _, summary in ends]
    return {
        "strategies": ", ".join(f"{name} ({len(values)})" for name, values in accuracies.items()),
        "seeds": len({seed for _, seed, _ in ends}),
        "best top-1 %": round(100 * max(map(fmean, accuracies.values())), 1) if accuracies else None,
        "date": max((place["date"] for place in where), default="")[:16].replace("T", " "),
        "device": ", ".join(sorted({place["device"] for place in where})),
    }


def _changes(settings: dict[str, Any]) -> list[str]:
    hidden = ("name=", "machine.", "run=", "description=")
    return [change for change in settings.get("overrides", []) if not change.startswith(hidden)]


def _state(parts: Sequence[Path]) -> str:
    """Return `running` if a living process holds a phase of these strategies."""
    for part in parts:
        for path in part.glob("**/status.json"):
            if (read_json(path) or {}).get("state") == "running" and holder(path.parent / "lease"):
                return "running"
    return "unfinished"


def _study_row(name: str, runs: Sequence[Path]) -> dict[str, Any]:
    """Return the row of a study: numbers of the runs that are judged on test images; those that choose rates only count."""
    row = dict.fromkeys(COLUMNS, "") | {"name": name, "state": "study", "settings": name, "seeds": 0, "best top-1 %": None}
    cells, damaged = [], 0
    for run in runs:
        try:
            if read_record(run)["settings"]["data"]["eval_split"] == "test":
                cells.append(_numbers(_ends(run)[0]))
        except (SettingsError, *DAMAGE):
            damaged += 1
    cells = [cell for cell in cells if cell["strategies"]]
    if cells:
        row |= {
            "date": max(cell["date"] for cell in cells), "seeds": max(cell["seeds"] for cell in cells),
            "best top-1 %": max(cell["best top-1 %"] for cell in cells), "device": _both(cells, "device"),
            "strategies": _both([{"s": re.sub(r" \(\d+\)", "", cell["strategies"])} for cell in cells], "s"),
        }  # fmt: skip
    state = "study, running" if is_running(data_folder() / "studies" / name) else "study"
    note = f"a study: {len(runs)} runs, {len(cells)} of them judged on test images" + (f", {damaged} damaged" if damaged else "")
    return row | {"state": state, "note": note}


def _both(cells: Sequence[dict[str, Any]], column: str) -> str:
    return ", ".join(dict.fromkeys(word for cell in cells for word in cell[column].split(", ")))


def _published_rows() -> list[dict[str, Any]]:
    rows = []
    for name in published_runs():
        row = dict.fromkeys(COLUMNS, "") | {"name": PUBLISHED + name, "state": "published", "settings": name, "seeds": None}
        try:
            table = pd.read_csv(results_folder() / f"{name}.csv")
            by_strategy = table.groupby("strategy", sort=False)["accuracy"]
            row |= {
                "date": str(table["date"].max())[:16].replace("T", " "), "seeds": table["seed"].nunique(),
                "strategies": ", ".join(f"{s} ({n})" for s, n in by_strategy.size().items()),
                "best top-1 %": round(100 * by_strategy.mean().max(), 1),
                "device": ", ".join(sorted(map(str, table["device"].unique()))), "note": "a table of the project",
            }  # fmt: skip
        except DAMAGE as error:
            row |= {"state": "damaged", "note": reason(error)}
        rows.append(row)
    return rows


# -- what they show -----------------------------------------------------------------------------------------------------------


def open_run(name: str) -> tuple[Results, Plan | None]:
    """Return the results of a run, or of a published table (`published: …`), and its plan, which a table has not.

    SettingsError in a sentence for anything that cannot be read, and where nothing is finished.
    """
    try:
        if name.startswith(PUBLISHED):
            return published(name.removeprefix(PUBLISHED)), None
        made = recorded_plan(data_folder() / "runs" / name)
        results = from_plan(made)
    except SettingsError:
        raise
    except DAMAGE as error:
        raise SettingsError(f"{name} cannot be read: {reason(error)}") from None
    if results.curves.empty:
        raise SettingsError(f"nothing of {name} is finished yet")
    return results, made


def curves_figure(
    results: Results, strategies: Sequence[str] | None = None, seeds: Sequence[int] | None = None, x: str = "flops"
) -> Figure:
    """Draw top-1 over what was spent, a colour a strategy: mean over seeds, of up to five strategies with ± one std as a band.

    Phases follow one another as they were trained; dashed are hybrids, one module each; a star is the assembled network. `x` is
    one of AXES. None: all strategies, all seeds. SettingsError for another x, or if nothing is left.
    """
    if x not in AXES:
        raise SettingsError(f"x is {x!r}; it must be one of {', '.join(AXES)}")
    curves, phases = (_chosen(table, strategies, seeds) for table in (results.curves, results.phases))
    if curves.empty:
        raise SettingsError("nothing is finished of these strategies and seeds")
    column, spent, _, xlabel = AXES[x]
    unit, factor = flop_unit(phases.groupby(["strategy", "seed"])[spent].sum().max()) if column == "flops" else ("", 1)
    figure = Figure(figsize=(10, 5), layout="constrained")
    axis = figure.subplots()
    names = curves["strategy"].unique()
    for name in names:
        lines = _lines(curves[curves["strategy"] == name], phases[phases["strategy"] == name], x)
        _draw(axis, lines, factor, style(name), banded=len(names) <= 5)
        count = curves.loc[curves["strategy"] == name, "seed"].nunique()
        axis.plot([], [], **style(name) | {"linestyle": "-"}, markersize=4, label=f"{label(name)} (n = {count})")
    axis.set(xlabel=xlabel.format(unit=unit), ylabel=_score_label(results), title=results.name)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _lines(curves: pd.DataFrame, phases: pd.DataFrame, x: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the phases of a strategy in order: their name, and x, mean and std of top-1 (%) over seeds at each evaluation."""
    column, spent, side_by_side, _ = AXES[x]
    offset = 0.0
    for phase in phases["phase"].unique():
        now, costs = phases[phases["phase"] == phase], [0.0]
        if phase == "assemble":
            yield phase, pd.DataFrame({"x": [offset], "mean": [100 * now["accuracy"].mean()], "std": [0.0]})
            continue
        for index, module in now.groupby(now["module_index"].fillna(-1)):
            rows = curves[(curves["phase"] == phase) & (curves["module_index"].fillna(-1) == index)].groupby("step")
            at = offset + (0 if side_by_side else sum(costs))
            accuracy = 100 * rows["accuracy"].mean(), 100 * rows["accuracy"].std().fillna(0)
            yield phase, pd.DataFrame({"x": at + rows[column].mean(), "mean": accuracy[0], "std": accuracy[1]})
            costs.append(module[spent].mean())
        offset += max(costs) if side_by_side else sum(costs)


def _draw(axis: Axes, lines: Iterable[tuple[str, pd.DataFrame]], factor: float, appearance: dict[str, str], banded: bool) -> None:
    for phase, line in lines:
        x, mean = line["x"] / factor, line["mean"]
        if phase == "assemble":
            axis.plot(x, mean, marker="*", markersize=14, color=appearance["color"], markeredgecolor="black", zorder=5)
            continue
        way = {"linestyle": "--", "linewidth": 1} if phase == "incubate" else {"linestyle": "-", "linewidth": 1.6}
        every = max(1, len(line) // 10)  # of long curves the markers would hide the lines
        axis.plot(x, mean, color=appearance["color"], marker=appearance["marker"], markersize=4, markevery=every, **way)
        if banded:
            axis.fill_between(x, mean - line["std"], mean + line["std"], color=appearance["color"], alpha=0.12, linewidth=0)


def _score_label(results: Results) -> str:
    splits = ", ".join(sorted(map(str, results.strategies["judged_on"].unique())))
    return f"top-1, {splits} split (%)" if splits else "top-1 (%)"


def _chosen(table: pd.DataFrame, strategies: Sequence[str] | None, seeds: Sequence[int] | None) -> pd.DataFrame:
    keep = pd.Series(True, index=table.index)
    for column, values in {"strategy": strategies, "seed": seeds}.items():
        if values is not None:
            keep &= table[column].isin(list(values))
    return table[keep]


def settings_difference(plan: Plan, strategies: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the resolved settings in which strategies differ: rows (phase, setting), a column a strategy.

    A phase that not all of them have is one row, `the whole phase`; all modules have the same settings and count once. Read from
    the first seed's phases, finished or not. None: all strategies. SettingsError for one that was not begun.
    """
    finals = {name: node for (name, _), node in reversed(plan.finals.items())}
    names = list(dict.fromkeys(name for name, _ in plan.finals)) if strategies is None else list(strategies)
    if unknown := [name for name in names if name not in finals]:
        raise SettingsError(f"strategy {unknown[0]} is not part of this run, which has: {', '.join(finals) or 'none'}")
    values: dict[tuple[str, str], dict[str, Any]] = {}
    have: dict[str, list[str]] = {}
    for name in names:
        phases = {node.settings.phase: node for node in reversed(closure([finals[name]]))}  # of modules the first
        for phase, node in reversed(phases.items()):
            have.setdefault(phase, []).append(name)
            for setting, value in settings_table(node)["value"].items():
                if setting not in ("phase", "seed", "module_index"):
                    values.setdefault((phase, setting), {})[name] = value
    rows = {(phase, "the whole phase"): {name: "yes" if name in those else "–" for name in names}
            for phase, those in have.items() if len(those) < len(names)}  # fmt: skip
    for (phase, setting), by_name in values.items():
        row = [str(by_name.get(name, "–")) for name in have[phase]]
        if len(set(row)) > 1:
            rows[phase, setting] = dict.fromkeys(names, "") | dict(zip(have[phase], row, strict=True))
    index = pd.MultiIndex.from_arrays([[key[i] for key in rows] for i in (0, 1)], names=["phase", "setting"])
    table = pd.DataFrame(list(rows.values()), index=index, columns=names)
    order = {phase: place for place, phase in enumerate(have)}
    return table.sort_index(level="phase", key=lambda level: level.map(order), sort_remaining=False, kind="stable")


# -- the widget ---------------------------------------------------------------------------------------------------------------


def browse_runs() -> Any:
    """Return menus of runs, strategies, seeds and axes over curves, comparison and differing settings; twin: `runs_table`."""
    return with_twin(_browser, runs_table)


def _browser() -> ipywidgets.Widget:
    cells = ipywidgets.Checkbox(description="runs of studies, too", indent=False)
    run = ipywidgets.Dropdown(description="run", layout={"width": "36rem"})
    strategies = ipywidgets.SelectMultiple(description="strategies", rows=6, layout={"width": "30rem"})
    seeds = ipywidgets.SelectMultiple(description="seeds", rows=6, layout={"width": "12rem"})
    axis = ipywidgets.Dropdown(options=[(text.format(unit="FLOP"), x) for x, (_, _, _, text) in AXES.items()],
                               description="x axis", layout={"width": "36rem"})  # fmt: skip
    runs, said, tables = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
    picture = ipywidgets.Image(format="png", layout={"max_width": "100%", "object_fit": "contain"})
    opened: dict[str, Any] = {}

    def say(text: str) -> None:
        said.value = f"<p>{html.escape(text)}</p>"

    def list_runs(_: object = None) -> None:
        table = runs_table(cells.value)
        runs.value = _html(table, "the runs")
        before = run.value
        run.options = list(table.loc[~table["state"].str.startswith("study"), "name"])
        run.value = before if before in run.options else next(iter(run.options), None)  # a menu that had none chooses none

    def choose(_: object = None) -> None:
        opened.clear()
        strategies.options, seeds.options = (), ()
        if run.value is None:
            picture.layout.display, tables.value = "none", ""
            say("There is no run yet; `incubate run smoke` makes one in a minute.")
            return
        try:
            results, made = open_run(run.value)
        except SettingsError as error:
            picture.layout.display, tables.value = "none", ""
            say(str(error))
            return
        names, numbers = (list(results.curves[column].unique()) for column in ("strategy", "seed"))
        strategies.options, seeds.options = [(label(name), name) for name in names], [int(number) for number in numbers]
        strategies.value, seeds.value = tuple(names), tuple(seeds.options)
        opened.update(results=results, plan=made)
        show()

    def show(_: object = None) -> None:
        if not opened:
            return
        results, made = opened["results"], opened["plan"]
        chosen, numbers = list(strategies.value), list(seeds.value)
        try:
            drawn = curves_figure(results, chosen, numbers, axis.value)._repr_png_()
            some = Results(
                results.name, *(_chosen(table, chosen, numbers) for table in (results.strategies, results.phases, results.curves))
            )
            parts = [_html(comparison(some), "Comparison") if len(some.strategies) else ""]
            if made is not None:
                ended = [name for name in chosen if any(name == final for final, _ in made.finals)]
                parts.append(_html(settings_difference(made, ended), "What differs in the settings"))
        except (SettingsError, *DAMAGE) as error:
            picture.layout.display, tables.value = "none", ""
            say(str(error) if isinstance(error, SettingsError) else f"{results.name} cannot be shown: {reason(error)}")
            return
        picture.value, picture.layout.display = drawn, None
        tables.value = "".join(parts)
        text = f"{hardware(some)}. {mixed_text(some.strategies)}" if len(some.strategies) else ""
        say(text.strip() or "no strategy is finished; these are the phases that are")

    list_runs()
    cells.observe(list_runs, names="value")
    run.observe(choose, names="value")
    for menu in (strategies, seeds, axis):
        menu.observe(show, names="value")
    choose()
    folded = ipywidgets.Accordion([runs], titles=("all runs",), selected_index=None)
    return ipywidgets.VBox(
        [ipywidgets.HBox([run, cells]), ipywidgets.HBox([strategies, seeds]), axis, said, picture, tables, folded]
    )


def _html(table: pd.DataFrame, title: str) -> str:
    if table.empty:
        return f"<h4>{html.escape(title)}</h4><p>none</p>"
    return f'<h4>{html.escape(title)}</h4><div style="overflow-x: auto">{table.to_html(border=0, na_rep="")}</div>'
