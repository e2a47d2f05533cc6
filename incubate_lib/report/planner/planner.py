"""What a plan costs, for people: tables, sentences, a Gantt chart, and sliders that count everything anew."""

import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

import pandas as pd

from incubate_lib.config import SettingsError
from incubate_lib.pipeline.graph import Plan
from incubate_lib.report.planner.forecast import DEVICE, SHARE, Forecast, forecast, open_plan, open_settings, stated_speed
from incubate_lib.report.style import Figure
from incubate_lib.report.tables.hardware import MIXED
from incubate_lib.report.widgets import or_sentence, with_twin
from incubate_lib.report.words import flop_unit, label, phase_name
from incubate_lib.training.counts import Images, count_images
from incubate_lib.training.stopwatch import PEAKS, peak_flops

PHASE_LOOKS = {  # Okabe and Ito's colours, and a pattern for those who do not see them
    "meta": ("#E69F00", ".."), "incubate": ("#56B4E9", ""), "finetune": ("#009E73", "//"), "end_to_end": ("#777777", "xx"),
    "assemble": ("#CC79A7", ""),
}  # fmt: skip


def strategies_table(costs: Forecast) -> pd.DataFrame:
    """Return a row a strategy: what it costs, and against the reference."""
    table = costs.strategies.set_index("strategy")
    unit, size = flop_unit(table["flops"].max())
    time, hours = time_unit(max(table["device_hours"].max(), 1e-12))

    def with_ratio(column: str, values: pd.Series) -> pd.Series:
        if costs.reference is None:
            return values.map("{:,.4g}".format)
        ratios = table[column] / table.loc[costs.reference, column]
        return pd.Series([f"{value:,.4g} ({ratio:.2f}×)" for value, ratio in zip(values, ratios, strict=True)], index=table.index)

    count = costs.machines * costs.devices
    side_by_side = f"{time}, modules side by side on {costs.machines} × {costs.devices}"
    together = f"{time}, all {count} on one phase" if count > 1 else f"{time} on one device"
    shown = pd.DataFrame({
        unit: with_ratio("flops", table["flops"] / size),
        f"critical path {unit}": with_ratio("critical_flops", table["critical_flops"] / size),
        f"device-{time}": with_ratio("device_hours", table["device_hours"] / hours),
        side_by_side: with_ratio("hours", table["hours"] / hours),
        together: with_ratio("device_hours", table["device_hours"] / count / hours),
        "GiB a device": (table["memory"] / 2**30).map("{:,.2f}".format),
    })  # fmt: skip
    return shown.rename(index=label).rename_axis(index=None)


def phases_table(costs: Forecast) -> pd.DataFrame:
    """Return a row a phase, shared ones once in each strategy."""
    table = costs.phases
    unit, size = flop_unit(table["flops"].max())
    time, hours = time_unit(max(costs.strategies["device_hours"].max(), 1e-12))
    names = [_phase_name(row) for row in table.itertuples()]
    return pd.DataFrame({
        "strategy": table["strategy"].map(label), "phase": names, "epochs": table["epochs"].map("{:,.4g}".format),
        "updates": table["steps"].map("{:,}".format), unit: (table["flops"] / size).map("{:,.4g}".format),
        f"device-{time}": (table["device_hours"] / hours).map("{:,.4g}".format),
        f"begins ({time})": (table["begin"] / hours).map("{:,.3g}".format),
        f"ends ({time})": (table["end"] / hours).map("{:,.3g}".format), "machine": table["machine"],
        "images at once": table["images"], "GiB a device": (table["memory"] / 2**30).map("{:,.2f}".format),
    })[lambda shown: table["steps"] > 0]  # fmt: skip


def against_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return what `against_measured` found, for people."""
    seconds = table["measured"].map("{:,.1f}".format)
    spread = table["spread"].map(lambda value: "" if pd.isna(value) else f" ± {value:,.1f}")
    names = ["all phases" if row.phase == "all phases" else _phase_name(row) for row in table.itertuples()]
    mark = table["elsewhere"].map({True: MIXED, False: ""})
    return pd.DataFrame({
        "strategy": table["strategy"].map(label), "phase": names, "s, measured": seconds + spread + mark,
        "s, predicted": table["predicted"].map("{:,.1f}".format), "predicted / measured": table["ratio"].map("{:.2f}".format),
    })  # fmt: skip


def against_in_words(table: pd.DataFrame) -> str:
    """Say how far off the predicted times are."""
    off, whole = 100 * (table["ratio"] - 1).abs(), table["phase"] == "all phases"
    elsewhere = dict.fromkeys(table.loc[table["elsewhere"], "where"])
    text = f" {MIXED} marks seconds of other devices than the speed's: {' / '.join(elsewhere)}." if elsewhere else ""
    return (
        f"Predicted training times are off by at most {off[whole].max():.1f} % for whole strategies and "
        f"{off[~whole].max():.1f} % for single phases.{text}"
    )


def _phase_name(row: Any) -> str:
    return phase_name(row.phase, row.module - 1 if row.phase == "incubate" else None)


def time_unit(hours: float) -> tuple[str, float]:
    """Return a unit in which so many hours read well, and its length in hours."""
    units = {"hours": 1.0, "minutes": 1 / 60, "seconds": 1 / 3600, "milliseconds": 1 / 3.6e6}
    return next(((unit, size) for unit, size in units.items() if hours >= 2 * size), ("microseconds", 1 / 3.6e9))


def in_words(costs: Forecast) -> str:
    """Say what the tables say, and what is not in them."""
    lines, table = [], costs.strategies.set_index("strategy")
    for name in table.index.drop(costs.reference, errors="ignore") if costs.reference else ():
        ratio = table.loc[name] / table.loc[costs.reference]
        lines.append(
            f"{label(name)}: {ratio['flops']:.2f} times the FLOPs of {label(costs.reference)} ({costs.reference}), "
            f"{ratio['critical_flops']:.2f} times on the critical path."
        )
    if costs.adaptive:
        lines.append(
            f"Planned as if nothing ever rested, because only training shows what does: {', '.join(map(label, costs.adaptive))}."
        )
    if costs.machines > 1:
        lines.append(
            f"Side by side, end to end has one of the {costs.machines} machines and pieces have all of them. Where all devices "
            "can train one network together without loss, compare the last column of times: there pieces gain what they save in "
            "FLOPs."
        )
    lines.append(f"Speed of a device: {costs.speed.source}.")
    if costs.speed.network and costs.speed.network != costs.network:
        lines.append(f"It was measured on another network ({costs.speed.network}), so for this one it is only a guess.")
    lines.append(
        "Not in it: judging, reading images, saving, and what devices that train one phase together lose by talking to each "
        "other. Memory is counted without workspace and fragments of the allocator: a device should have a tenth more."
    )
    return "\n".join(lines)


def gantt(costs: Forecast) -> Figure:
    """Draw when each phase runs on which machine, a panel a strategy, on one axis of time."""
    names = list(costs.strategies["strategy"])
    time, hours = time_unit(max(costs.strategies["hours"].max(), 1e-12))
    used = {name: costs.phases.loc[costs.phases["strategy"] == name, "machine"].max() for name in names}
    figure = Figure(figsize=(10, 0.9 + sum(0.55 + 0.34 * count for count in used.values())), layout="constrained")
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=[0.5 + used[name] for name in names])[:, 0]
    end = costs.strategies["hours"].max() / hours
    for axis, name in zip(axes, names, strict=True):
        for row in costs.phases[costs.phases["strategy"] == name].itertuples():
            width = (row.end - row.begin) / hours
            if not width:
                continue
            color, hatch = PHASE_LOOKS[row.phase]
            axis.barh(row.machine, width, left=row.begin / hours, color=color, hatch=hatch, edgecolor="white", height=0.82)
            words = _phase_name(row)
            if width / end <= 0.012 * len(words) and row.phase == "incubate":
                words = str(row.module)
            if width / end > 0.012 * len(words):
                box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
                axis.text(row.begin / hours + width / 2, row.machine, words, ha="center", va="center", fontsize=9, bbox=box)
        done = costs.strategies.set_index("strategy").loc[name, "hours"] / hours
        axis.axvline(done, color="#222222", linewidth=1)
        axis.set_title(f"{label(name)} ({name}): {done:,.3g} {time}", fontsize=10, loc="left")
        axis.set(yticks=range(1, used[name] + 1), xlim=(0, 1.02 * end), ylim=(used[name] + 0.5, 0.5))
        axis.grid(axis="x", alpha=0.3)
    text = textwrap.fill(costs.images, 130)
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
    counted = count_images(settings.data, settings.machine, images=images, classes=classes)
    todo = open_plan(preset, overrides, strategies=strategies, counted=counted)
    if todo.experiment.settings.partition is None:
        raise SettingsError(f"{preset} has no partition: a network in one piece has nothing to slide; forecast() plans it")
    costs = forecast(todo, stated_speed(precision=settings.precision), machines=machines)
    return with_twin(lambda: _sliders(preset, list(overrides), strategies, todo, machines, counted), lambda: gantt(costs))


def _sliders(
    preset: str, overrides: list[str], strategies: Sequence[str] | None, todo: Plan, machines: int, counted: Images
) -> Any:
    import ipywidgets

    settings, facts = todo.experiment.settings, todo.experiment.facts
    depth, pieces = sum(facts.target_depths), next((n for n, _ in todo.finals if n != "end_to_end"), settings.run[-1])
    wide = {"style": {"description_width": "11rem"}, "layout": {"width": "32rem"}, "continuous_update": False}

    def epochs(phase: str) -> float:
        training = settings.training_of(pieces, phase)
        return training.epochs if training else 0.0

    def slider(name: str, value: float, low: float, high: float, step: float = 1) -> Any:
        made = ipywidgets.IntSlider if step == 1 else ipywidgets.FloatSlider
        return made(value=min(max(value, low), high), min=low, max=high, step=step, description=name, **wide)

    modules = [k for k in range(2, min(depth, 12) + 1) if depth % k == 0]
    controls = {
        "modules": ipywidgets.SelectionSlider(
            options=modules, value=len(facts.target_depths) if len(facts.target_depths) in modules else modules[0],
            description="modules", **wide,
        ),
        "meta_depth": slider("blocks of a meta module", facts.meta_depths[0], 1, max(1, depth // 2)),
        "meta": slider("epochs: meta model", round(epochs("meta")), 1, 600),
        "incubate": slider("epochs: each module", round(epochs("incubate")), 1, 300),
        "finetune": slider("epochs: fine-tuning", round(epochs("finetune")), 1, 300),
        "share": slider("share of the images", settings.data.train_share, 0.05, 1.0, 0.05),
        "device": ipywidgets.Dropdown(options=[d for d in PEAKS if peak_flops(d, settings.precision)], value=DEVICE,
                                      description="device", style=wide["style"]),
        "peak": slider("share of its peak", SHARE, 0.05, 1.0, 0.05),
        "devices": slider("devices of a machine", settings.machine.devices, 1, 16),
        "machines": slider("machines", machines, 1, 16),
    }  # fmt: skip
    table, picture = ipywidgets.HTML(), ipywidgets.Image(format="png")

    def show(_: object = None) -> None:
        chosen = {name: control.value for name, control in controls.items()}
        partition = f"{{num_modules: {chosen['modules']}, meta_depths: {[chosen['meta_depth']] * chosen['modules']}}}"
        more = [f"partition={partition}", f"data.train_share={chosen['share']:g}", f"machine.devices={chosen['devices']}"]
        for phase in ("meta", "incubate", "finetune"):  # short warm-ups, or a few epochs would be refused
            more += [f"phases.{phase}.epochs={chosen[phase]}", f"phases.{phase}.warmup_epochs=0"]
        try:
            speed = stated_speed(chosen["device"], chosen["peak"], settings.precision)
            todo = open_plan(preset, [*overrides, *more], strategies=strategies, counted=counted)
            costs = forecast(todo, speed, machines=chosen["machines"])
        except SettingsError as error:  # a batch that so many devices cannot share, for example
            table.value = f'<p role="alert">{escape(str(error))}</p>'
            return
        text = "<br>".join(map(escape, in_words(costs).splitlines()))
        table.value = f"<p>{escape(costs.images)}</p>{strategies_table(costs).to_html(border=0)}<p>{text}</p>"
        picture.value = gantt(costs)._repr_png_()

    for control in controls.values():
        control.observe(show, names="value")
    show()
    return ipywidgets.VBox([*controls.values(), table, picture])
