"""What a plan costs, for people: tables, sentences, a Gantt chart, and sliders that count everything anew."""

import textwrap
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from incubate_lib.config import SettingsError, data_folder, refuse
from incubate_lib.config.members import PHASES
from incubate_lib.config.peaks import DEVICE, PEAKS, SHARE, peak_flops
from incubate_lib.data.counts import count_images
from incubate_lib.phases.networks import model_shape
from incubate_lib.pipeline.graph import Plan
from incubate_lib.report.planner.forecast import Forecast, forecast, open_settings, plan_of, stated_speed
from incubate_lib.report.style import Figure
from incubate_lib.report.tables.hardware import MIXED
from incubate_lib.report.widgets import image, or_sentence, with_twin
from incubate_lib.report.words import flop_unit, label, phase_name

NAME_BOX = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
NAME = {"ha": "center", "va": "center", "fontsize": 9, "bbox": NAME_BOX}
UNITS = {"hours": 1.0, "minutes": 1 / 60, "seconds": 1 / 3600, "milliseconds": 1 / 3.6e6, "microseconds": 1 / 3.6e9}
SHORT = {"hours": "h", "minutes": "min", "seconds": "s", "milliseconds": "ms", "microseconds": "µs"}  # in headings, which wrap


def strategies_table(costs: Forecast) -> pd.DataFrame:
    """Return a row a strategy: what it costs, and against the reference."""
    table = costs.strategies.set_index("strategy")
    unit, size = flop_unit(table["flops"].max())
    time, hours = time_unit(max(table["device_hours"].max(), 1e-12))
    memory, bytes_ = memory_unit(table["memory"].max())
    time = SHORT[time]

    count = costs.machines * costs.devices
    side_by_side = f"modules side by side on {costs.machines} × {costs.devices} ({time})"
    together = f"all {count} on one phase ({time})" if count > 1 else f"on one device ({time})"
    columns = {
        unit: ("flops", size),
        f"critical path {unit}": ("critical_flops", size),
        f"device time ({time})": ("device_hours", hours),
        side_by_side: ("hours", hours),
        together: ("device_hours", count * hours),
    }
    shown = pd.DataFrame(index=table.index)
    for title, (column, one) in columns.items():
        shown[title] = (table[column] / one).map("{:,.4g}".format)
        if costs.reference is not None:
            shown[title] += (table[column] / table.loc[costs.reference, column]).map(" ({:.2f}×)".format)
    shown[f"{memory} a device"] = (table["memory"] / bytes_).map("{:,.2f}".format)
    return shown.rename(index=label).rename_axis(index=None)


def phases_table(costs: Forecast) -> pd.DataFrame:
    """Return a row a phase, shared ones once in each strategy."""
    table = costs.phases
    unit, size = flop_unit(table["flops"].max())
    time, hours = time_unit(max(costs.strategies["device_hours"].max(), 1e-12))
    memory, bytes_ = memory_unit(table["memory"].max())
    time = SHORT[time]
    titles = {  # column → its title, unit and form; numbers as they are
        "epochs": ("epochs", 1, "{:,.4g}"),
        "steps": ("updates", 1, "{:,.0f}"),
        "flops": (unit, size, "{:,.4g}"),
        "device_hours": (f"device time ({time})", hours, "{:,.4g}"),
        "begin": (f"begins ({time})", hours, "{:,.3g}"),
        "end": (f"ends ({time})", hours, "{:,.3g}"),
        "machine": ("machine", 1, ""),
        "images": (f"{costs.samples} at once", 1, ""),
        "memory": (f"{memory} a device", bytes_, "{:,.2f}"),
    }
    names = [_phase_name(row) for row in table.itertuples()]
    shown = pd.DataFrame({"strategy": table["strategy"].map(label), "phase": names})
    for column, (title, one, form) in titles.items():
        shown[title] = (table[column] / one).map(form.format) if form else table[column]
    return shown[table["flops"] > 0]


def against_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return what `against_measured` found, for people."""
    seconds = table["measured"].map("{:,.1f}".format)
    spread = table["spread"].map(lambda value: "" if pd.isna(value) else f" ± {value:,.1f}")
    names = ["all phases" if row.phase == "all phases" else _phase_name(row) for row in table.itertuples()]
    shown = pd.DataFrame({"strategy": table["strategy"].map(label), "phase": names})
    shown["s, measured"] = seconds + spread + table["elsewhere"].map({True: MIXED, False: ""})
    shown["s, predicted"] = table["predicted"].map("{:,.1f}".format)
    shown["predicted / measured"] = table["ratio"].map("{:.2f}".format)
    return shown


def against_in_words(table: pd.DataFrame) -> str:
    """Say how far off the predicted times are."""
    off, whole = 100 * (table["ratio"] - 1).abs(), table["phase"] == "all phases"
    elsewhere = dict.fromkeys(table.loc[table["elsewhere"], "where"])
    where = " / ".join(elsewhere)
    text = f" {MIXED} marks seconds of other devices than the speed's: {where}." if elsewhere else ""
    return (
        f"Predicted training times are off by at most {off[whole].max():.1f} % for whole strategies and "
        f"{off[~whole].max():.1f} % for single phases.{text}"
    )


def _phase_name(row: Any) -> str:
    return phase_name(row.phase, None if pd.isna(row.module) else row.module - 1)


def time_unit(hours: float) -> tuple[str, float]:
    """Return a unit in which so many hours read well, and its length in hours."""
    return next((unit for unit in UNITS.items() if hours >= 2 * unit[1]), list(UNITS.items())[-1])


def memory_unit(size: int) -> tuple[str, int]:
    """Return a unit in which so many bytes read well, and its size."""
    return ("GiB", 2**30) if size >= 0.1 * 2**30 else ("MiB", 2**20)


def in_words(costs: Forecast) -> str:
    """Say what the tables say, and what is not in them."""
    folder = FileSystemLoader(Path(__file__).parents[1] / "templates")
    engine = Environment(loader=folder, undefined=StrictUndefined, trim_blocks=True)
    engine.filters["label"] = label
    table = costs.strategies.set_index("strategy")
    others = table.index.drop(costs.reference, errors="ignore") if costs.reference else ()
    ratios = {name: table.loc[name] / table.loc[costs.reference] for name in others}
    return engine.get_template("plan.txt").render(costs=costs, ratios=ratios)


def gantt(costs: Forecast) -> Figure:
    """Draw when each phase runs on which machine, a panel a strategy, on one axis of time."""
    names = list(costs.strategies["strategy"])
    time, hours = time_unit(max(costs.strategies["hours"].max(), 1e-12))
    used = {name: costs.phases.loc[costs.phases["strategy"] == name, "machine"].max() for name in names}
    heights = [0.5 + used[name] for name in names]
    figure = Figure(figsize=(10, 0.9 + sum(0.55 + 0.34 * count for count in used.values())), layout="constrained")
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    end = costs.strategies["hours"].max() / hours
    for axis, name in zip(axes, names, strict=True):
        for row in costs.phases[costs.phases["strategy"] == name].itertuples():
            width = (row.end - row.begin) / hours
            if not width:
                continue
            begin, (color, hatch) = row.begin / hours, PHASES[row.phase].look
            look = {"color": color, "hatch": hatch, "edgecolor": "white", "height": 0.82}
            axis.barh(row.machine, width, left=begin, **look)
            words = _phase_name(row)
            if width / end <= 0.012 * len(words) and not pd.isna(row.module):
                words = str(row.module)
            if width / end > 0.012 * len(words):
                axis.text(begin + width / 2, row.machine, words, **NAME)
        done = costs.strategies.set_index("strategy").loc[name, "hours"] / hours
        axis.axvline(done, color="#222222", linewidth=1)
        axis.set_title(f"{label(name)}: {done:,.3g} {time}", fontsize=10, loc="left")
        axis.set(yticks=range(1, used[name] + 1), xlim=(0, 1.02 * end), ylim=(used[name] + 0.5, 0.5))
        axis.grid(axis="x", alpha=0.3)
    text = textwrap.fill(costs.images.replace(str(data_folder()), "data"), 130)  # a picture may go to others
    axes[-1].set_xlabel(f"{time} after the start\n{text}")
    figure.supylabel("machine", fontsize=10)
    return figure


# -- with sliders -------------------------------------------------------------------------------------------------------


@or_sentence
def planner(
    preset: str = "imagenet-vit-b",
    overrides: Sequence[str] = (),
    *,
    strategies: Sequence[str] | None = None,
    machines: int = 4,
    images: int | None = None,
    classes: int | None = None,
) -> Any:
    """Return sliders for what a plan depends on, with its table and its Gantt chart; headless, the chart alone.

    What cannot be planned becomes a sentence in its place.
    """
    settings = open_settings(preset, overrides)
    shape = model_shape(settings.model)
    counted = count_images(settings.data, settings.machine, images=images, classes=classes, shape=shape)
    todo = plan_of(settings, counted, strategies)
    whole = f"{preset} has no partition: a network in one piece has nothing to slide; forecast() plans it"
    refuse(settings.partition is None, whole)
    costs = forecast(todo, stated_speed(precision=settings.precision), machines=machines)

    def again(more: list[str], device: str, share: float, machines: int) -> Forecast:
        todo = plan_of(open_settings(preset, [*overrides, *more]), counted, strategies)
        return forecast(todo, stated_speed(device, share, settings.precision), machines=machines)

    return with_twin(lambda: _sliders(todo, machines, again), lambda: gantt(costs))


def _sliders(todo: Plan, machines: int, costs_of: Callable[..., Forecast]) -> Any:
    """Return sliders that begin where a plan is, and what `costs_of` what they say."""
    import ipywidgets

    settings, facts = todo.experiment.settings, todo.experiment.facts
    pieces = next((name for name, _ in todo.finals if settings.strategies[name].is_cut), settings.run[-1])
    depth, now = sum(facts.target_depths), len(facts.target_depths)
    wide = {"style": {"description_width": "14rem"}, "layout": {"width": "27rem"}, "continuous_update": False}

    def slider(name: str, value: float, low: float, high: float, step: float = 1) -> Any:
        made = ipywidgets.IntSlider if step == 1 else ipywidgets.FloatSlider
        name = f"{name} ({low:g} to {high:g})"
        return made(value=min(max(value, low), high), min=low, max=high, step=step, description=name, **wide)

    def epochs(phase: str) -> Any:
        return slider(f"epochs: {PHASES[phase].label}", round(settings.training_of(pieces, phase).epochs), 1, 600)

    fixed = not facts.takes_depth  # then modules need not be of equal size
    counts = [k for k in range(2, min(depth, 12) + 1) if fixed or depth % k == 0 or k == now] or [now]
    modules = {"options": counts, "value": now if now in counts else counts[0], "description": "modules"}
    devices = {"options": [device for device in PEAKS if peak_flops(device, settings.precision)], "value": DEVICE}
    controls = {
        "modules": ipywidgets.SelectionSlider(**modules, **wide),
        "meta_depth": slider("blocks of a meta module", facts.meta_depths[0], 1, max(1, depth // 2)),
        **{phase: epochs(phase) for phase in settings.strategies[pieces].trains},
        "share": slider("share of the images", settings.data.train_share, 0.05, 1.0, 0.05),
        "device": ipywidgets.Dropdown(**devices, description="device", style=wide["style"]),
        "peak": slider("share of its peak", SHARE, 0.05, 1.0, 0.05),
        "devices": slider("devices of a machine", settings.machine.devices, 1, 16),
        "machines": slider("machines", machines, 1, 16),
    }
    table, picture = ipywidgets.HTML(), image()

    def show(_: object = None) -> None:
        chosen = {name: control.value for name, control in controls.items()}
        depths = [chosen["meta_depth"]] * chosen["modules"]
        more = [
            f"partition={{num_modules: {len(depths)}, meta_depths: {depths}}}",
            f"data.train_share={chosen['share']:g}",
            f"machine.devices={chosen['devices']}",
        ]
        for phase in settings.strategies[pieces].trains:  # short warm-ups, or a few epochs would be refused
            more += [f"phases.{phase}.epochs={chosen[phase]}", f"phases.{phase}.warmup_epochs=0"]
        try:
            costs = costs_of(more, chosen["device"], chosen["peak"], chosen["machines"])
        except SettingsError as error:  # a batch that so many devices cannot share, for example
            table.value = f'<p role="alert">{escape(str(error))}</p>'
            return
        text = "<br>".join(map(escape, in_words(costs).splitlines()))
        table.value = f"<p>{escape(costs.images)}</p>{strategies_table(costs).to_html(border=0)}<p>{text}</p>"
        picture.value = gantt(costs)._repr_png_()

    for control in controls.values():
        control.observe(show, names="value")
    show()
    beside = ipywidgets.HBox([ipywidgets.VBox([*controls.values()]), picture], layout={"flex_flow": "row wrap"})
    return ipywidgets.VBox([beside, table])
