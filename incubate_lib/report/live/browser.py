"""Finished runs: how they went, what differed, and a widget to choose among them. What cannot be read becomes a sentence."""

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import ipywidgets
import pandas as pd
from matplotlib.axes import Axes

from incubate_lib.config import SettingsError, data_folder
from incubate_lib.config.members import PHASES
from incubate_lib.pipeline.graph import Plan
from incubate_lib.pipeline.recorded import recorded_plan, told_damage
from incubate_lib.report.live.runs import PUBLISHED, runs_table
from incubate_lib.report.style import Figure, style
from incubate_lib.report.tables.comparison import comparison, hardware
from incubate_lib.report.tables.hardware import mixed_text
from incubate_lib.report.tables.phases import settings_difference
from incubate_lib.report.tables.plots import draw_curve, mean_curve
from incubate_lib.report.tables.records import Results, from_plan, published
from incubate_lib.report.widgets import image, with_twin
from incubate_lib.report.words import flop_unit, label
from incubate_lib.tasks import Metric

IN_TURN, SIDE_BY_SIDE = "modules one after another", "modules side by side (critical path)"
AXES = {  # of the curves → column of the curves, of the phases, how modules follow one another, for people
    "flops": ("flops", "flops", IN_TURN, "training cost spent ({unit})"),
    "critical_flops": ("flops", "flops", SIDE_BY_SIDE, "training cost spent ({unit})"),
    "seconds": ("train_seconds", "seconds", IN_TURN, "training time (s)"),
    "critical_seconds": ("train_seconds", "seconds", SIDE_BY_SIDE, "training time (s)"),
    "steps": ("step", "steps", IN_TURN, "updates"),
    "epoch": ("epoch", "epochs", IN_TURN, "epochs"),
}


# -- what they show -----------------------------------------------------------------------------------------------------------


def open_run(name: str) -> tuple[Results, Plan | None]:
    """Return the results of a run, or of a published table (`published: …`), and its plan, which a table has not.

    SettingsError in a sentence for anything that cannot be read, and where nothing is finished.
    """
    with told_damage(f"{name} cannot be read"):
        if name.startswith(PUBLISHED):
            return published(name.removeprefix(PUBLISHED)), None
        made = recorded_plan(data_folder() / "runs" / name)
        results = from_plan(made)
    if results.curves.empty:
        raise SettingsError(f"nothing of {name} is finished yet")
    return results, made


def curves_figure(results: Results, x: str = "flops") -> Figure:
    """Draw the score over what was spent, a colour a strategy: mean over seeds, of up to five with ± one std as a band.

    Phases follow one another as they were trained; dashed are hybrids, one module each; a star is the assembled network. `x` is
    one of AXES. SettingsError for another x, or if nothing is there.
    """
    if x not in AXES:
        raise SettingsError(f"x is {x!r}; it must be one of {', '.join(AXES)}")
    if results.curves.empty:
        raise SettingsError("none of these strategies and seeds is finished")
    column, spent, _, _ = AXES[x]
    unit, factor = "", 1
    if column == "flops":
        unit, factor = flop_unit(results.phases.groupby(["strategy", "seed"])[spent].sum().max())
    figure = Figure(figsize=(10, 5), layout="constrained")
    axis = figure.subplots()
    names = results.curves["strategy"].unique()
    for name in names:
        for phase, line in curve_lines(results, name, x):
            if len(names) > 5:
                line = line.assign(std=0.0)
            _draw(axis, phase, line["cost"] / factor, line, results.metric, style(name))
        count = results.curves.loc[results.curves["strategy"] == name, "seed"].nunique()
        look = style(name) | {"linestyle": "-", "markersize": 4}
        axis.plot([], [], label=f"{label(name)} (n = {count})", **look)
    splits = ", ".join(sorted(map(str, results.strategies["split"].unique())))
    axis.set_ylabel(results.metric.axis(f", {splits} split" if splits else ""))
    axis.set(xlabel=_axis_label(x, unit), title=results.name)
    axis.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2, frameon=False)
    return figure


def curve_lines(results: Results, strategy: str, x: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the phases of a strategy in order: their name, and a `mean_curve` whose cost is what was spent till then."""
    column, spent, order, _ = AXES[x]
    where = ["phase", "module_index"]
    chosen = [table[table["strategy"] == strategy] for table in (results.curves, results.phases)]
    curves, phases = (table.fillna({"module_index": -1}).groupby(where, sort=False) for table in chosen)
    lines, before, begin, end = dict(iter(curves)), "", 0.0, 0.0
    for (phase, index), rows in phases:
        if phase != before or order == IN_TURN:
            begin = end
        if phase == "assemble":
            yield phase, pd.DataFrame({"cost": [begin], "score": [rows["score"].mean()]})
        elif (phase, index) in lines:
            line = mean_curve(lines[phase, index], column)
            yield phase, line.assign(cost=begin + line["cost"])
        before, end = phase, max(end, begin + rows[spent].mean())


def _draw(axis: Axes, phase: str, x: pd.Series, line: pd.DataFrame, metric: Metric, look: dict[str, str]) -> None:
    if phase == "assemble":
        star = {"marker": "*", "markersize": 14, "markeredgecolor": "black", "zorder": 5}
        axis.plot(x, metric.scale * line["score"], color=look["color"], **star)
        return
    way = {"linestyle": "--", "linewidth": 1} if PHASES[phase].has_modules else {"linestyle": "-", "linewidth": 1.6}
    every = max(1, len(line) // 10)  # of long curves the markers would hide the lines
    draw_curve(axis, x, line, metric, look | way | {"markersize": 4, "markevery": every}, alpha=0.12)


def _axis_label(x: str, unit: str) -> str:
    _, _, order, words = AXES[x]
    return f"{words.format(unit=unit)}, {order}"


def some_of(results: Results, strategies: Sequence[str], seeds: Sequence[int]) -> Results:
    """Return what there is of some strategies and seeds."""
    tables = {name: getattr(results, name) for name in ("strategies", "phases", "curves")}
    wanted = {"strategy": list(strategies), "seed": list(seeds)}
    kept = {name: table[table[list(wanted)].isin(wanted).all(axis=1)] for name, table in tables.items()}
    return replace(results, **kept)


# -- the widget ---------------------------------------------------------------------------------------------------------------


def browse_runs(name: str = "") -> Any:
    """Return menus of runs, strategies, seeds and axes over curves, comparison and differing settings; twin: `runs_table`.

    The run of this name is open at first, if there is one.
    """
    return with_twin(lambda: _browser(name), runs_table)


def _browser(name: str) -> ipywidgets.Widget:
    run = ipywidgets.Dropdown(description="run", layout={"width": "36rem"})
    strategies = ipywidgets.SelectMultiple(description="strategies", rows=6, layout={"width": "30rem"})
    seeds = ipywidgets.SelectMultiple(description="seeds", rows=6, layout={"width": "12rem"})
    axes = [(_axis_label(x, "FLOP"), x) for x in AXES]
    axis = ipywidgets.Dropdown(options=axes, description="x axis", layout={"width": "36rem"})
    said, tables, runs, picture = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML(), image()
    opened: list[tuple[Results, Plan | None]] = []

    def say(words: str, drawn: bytes = b"", below: str = "") -> None:
        said.value, tables.value = f"<p>{html.escape(words)}</p>", below
        picture.value, picture.layout.display = drawn, None if drawn else "none"

    def list_runs() -> None:
        table, before = runs_table(), run.value or name
        runs.value = _html(table, "the runs")
        run.options = list(table["name"])
        # a menu that had none chooses none
        run.value = before if before in run.options else next(iter(run.options), None)

    def choose() -> None:
        opened.clear()
        strategies.options, seeds.options = (), ()
        if run.value is None:
            raise SettingsError("There is no run yet; `incubate run smoke` makes one in a minute.")
        results, made = open_run(run.value)
        strategies.options = [(label(name), name) for name in results.curves["strategy"].unique()]
        seeds.options = [int(number) for number in results.curves["seed"].unique()]
        strategies.value = tuple(results.curves["strategy"].unique())
        seeds.value = seeds.options
        opened.append((results, made))

    def show() -> None:
        for results, made in opened:
            say(*_looked_at(results, made, strategies.value, seeds.value, axis.value))

    def follow(step: Callable[[], None], *menus: ipywidgets.Widget) -> None:
        def stepped(_: object = None) -> None:
            try:
                with told_damage(f"{run.value} cannot be shown"):
                    step()
            except SettingsError as error:
                say(str(error))

        stepped()
        for menu in menus:
            menu.observe(stepped, names="value")

    follow(list_runs)
    follow(choose, run)
    follow(show, run, strategies, seeds, axis)
    folded = ipywidgets.Accordion([runs], titles=("all runs",), selected_index=None)
    menus = run, ipywidgets.HBox([strategies, seeds]), axis
    return ipywidgets.VBox([*menus, said, picture, tables, folded])


def _looked_at(
    results: Results, made: Plan | None, strategies: Sequence[str], seeds: Sequence[int], x: str
) -> tuple[str, bytes, str]:
    """Return what is said of some strategies and seeds, their curves as PNG, and the tables beneath."""
    some = some_of(results, strategies, seeds)
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
