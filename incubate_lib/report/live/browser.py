"""Finished runs: how they went, what differed, and a widget to choose among them. What cannot be read becomes a sentence."""

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import ipywidgets
import pandas as pd
from matplotlib.axes import Axes

from incubate_lib.config import SettingsError, data_folder
from incubate_lib.pipeline.graph import Plan
from incubate_lib.pipeline.recorded import DAMAGE, reason, recorded_plan
from incubate_lib.report.live.runs import PUBLISHED, runs_table
from incubate_lib.report.style import Figure, style
from incubate_lib.report.tables.comparison import comparison, hardware
from incubate_lib.report.tables.hardware import mixed_text
from incubate_lib.report.tables.phases import settings_difference
from incubate_lib.report.tables.records import Results, from_plan, published
from incubate_lib.report.widgets import image, with_twin
from incubate_lib.report.words import flop_unit, label

AXES = {  # of the curves → column of the curves, of the phases, modules side by side, for people
    "flops": ("flops", "flops", False, "training cost spent ({unit}), modules one after another"),
    "critical_flops": ("flops", "flops", True, "training cost spent ({unit}), modules side by side (critical path)"),
    "seconds": ("train_seconds", "seconds", False, "training time (s), modules one after another"),
    "critical_seconds": ("train_seconds", "seconds", True, "training time (s), modules side by side (critical path)"),
    "steps": ("step", "steps", False, "updates, modules one after another"),
    "epoch": ("epoch", "epochs", False, "epochs, modules one after another"),
}


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
    chosen = _chosen(results, strategies, seeds)
    curves, phases = chosen.curves, chosen.phases
    if curves.empty:
        raise SettingsError("nothing is finished of these strategies and seeds")
    column, spent, _, xlabel = AXES[x]
    unit, factor = flop_unit(phases.groupby(["strategy", "seed"])[spent].sum().max()) if column == "flops" else ("", 1)
    figure = Figure(figsize=(10, 5), layout="constrained")
    axis = figure.subplots()
    names = curves["strategy"].unique()
    for name in names:
        lines = curve_lines(curves[curves["strategy"] == name], phases[phases["strategy"] == name], x)
        _draw(axis, lines, factor, style(name), banded=len(names) <= 5)
        count = curves.loc[curves["strategy"] == name, "seed"].nunique()
        axis.plot([], [], **style(name) | {"linestyle": "-"}, markersize=4, label=f"{label(name)} (n = {count})")
    axis.set(xlabel=xlabel.format(unit=unit), ylabel=_score_label(results), title=results.name)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2, frameon=False)
    return figure


def curve_lines(curves: pd.DataFrame, phases: pd.DataFrame, x: str) -> Iterator[tuple[str, pd.DataFrame]]:
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


def _chosen(results: Results, strategies: Sequence[str] | None, seeds: Sequence[int] | None) -> Results:
    """Return what there is of some strategies and seeds; None: of all."""

    def kept(table: pd.DataFrame) -> pd.DataFrame:
        for column, values in (("strategy", strategies), ("seed", seeds)):
            if values is not None:
                table = table[table[column].isin(list(values))]
        return table

    return replace(results, **{name: kept(getattr(results, name)) for name in ("strategies", "phases", "curves")})


# -- the widget ---------------------------------------------------------------------------------------------------------------


def browse_runs() -> Any:
    """Return menus of runs, strategies, seeds and axes over curves, comparison and differing settings; twin: `runs_table`."""
    return with_twin(_browser, runs_table)


def _browser() -> ipywidgets.Widget:
    cells = ipywidgets.Checkbox(description="runs of studies, too", indent=False)
    run = ipywidgets.Dropdown(description="run", layout={"width": "36rem"})
    strategies = ipywidgets.SelectMultiple(description="strategies", rows=6, layout={"width": "30rem"})
    seeds = ipywidgets.SelectMultiple(description="seeds", rows=6, layout={"width": "12rem"})
    axes = [(words.format(unit="FLOP"), x) for x, (_, _, _, words) in AXES.items()]
    axis = ipywidgets.Dropdown(options=axes, description="x axis", layout={"width": "36rem"})
    said, tables, runs, picture = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML(), image()
    opened: list[tuple[Results, Plan | None]] = []

    def tell(words: str, drawn: bytes = b"", below: str = "") -> None:
        said.value, tables.value = f"<p>{html.escape(words)}</p>", below
        picture.value, picture.layout.display = drawn, None if drawn else "none"

    def list_runs() -> None:
        table, before = runs_table(cells.value), run.value
        runs.value = _html(table, "the runs")
        run.options = list(table.loc[~table["state"].str.startswith("study"), "name"])
        run.value = before if before in run.options else next(iter(run.options), None)  # a menu that had none chooses none

    def choose() -> None:
        opened.clear()
        strategies.options, seeds.options = (), ()
        if run.value is None:
            raise SettingsError("There is no run yet; `incubate run smoke` makes one in a minute.")
        results, made = open_run(run.value)
        strategies.options = [(label(name), name) for name in results.curves["strategy"].unique()]
        seeds.options = [int(number) for number in results.curves["seed"].unique()]
        strategies.value, seeds.value = (tuple(results.curves[name].unique()) for name in ("strategy", "seed"))
        opened.append((results, made))
        show()

    def show() -> None:
        for results, made in opened:
            tell(*_looked_at(results, made, strategies.value, seeds.value, axis.value))

    def follow(step: Callable[[], None], *menus: ipywidgets.Widget) -> None:
        def stepped(_: object = None) -> None:
            try:
                step()
            except SettingsError as error:
                tell(str(error))
            except DAMAGE as error:
                tell(f"{run.value} cannot be shown: {reason(error)}")

        stepped()
        for menu in menus:
            menu.observe(stepped, names="value")

    follow(list_runs, cells)
    follow(choose, run)
    follow(show, strategies, seeds, axis)
    folded = ipywidgets.Accordion([runs], titles=("all runs",), selected_index=None)
    menus = ipywidgets.HBox([run, cells]), ipywidgets.HBox([strategies, seeds]), axis
    return ipywidgets.VBox([*menus, said, picture, tables, folded])


def _looked_at(
    results: Results, made: Plan | None, strategies: Sequence[str], seeds: Sequence[int], x: str
) -> tuple[str, bytes, str]:
    """Return what is said of some strategies and seeds, their curves as PNG, and the tables beneath."""
    some = _chosen(results, strategies, seeds)
    drawn, words, below = curves_figure(some, x=x).png(), "", ""
    if len(some.strategies):
        words = f"{hardware(some)}. {mixed_text(some.strategies)}".strip()
        below = _html(comparison(some), "Comparison")
    if made is not None:
        ended = [name for name in strategies if any(name == final for final, _ in made.finals)]
        below += _html(settings_difference(made, ended), "What differs in the settings")
    return words or "no strategy is finished; these are the phases that are", drawn, below


def _html(table: pd.DataFrame, title: str) -> str:
    if table.empty:
        return f"<h4>{html.escape(title)}</h4><p>none</p>"
    return f'<h4>{html.escape(title)}</h4><div style="overflow-x: auto">{table.to_html(border=0, na_rep="")}</div>'
