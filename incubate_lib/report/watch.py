"""Watch a run, wherever it goes on: in this kernel, in the background, on a cluster.

All of it is read from the run's own files, and nothing is written but the stop file when the button is pressed: closing
the browser loses nothing, and running the cell again shows the same.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd

from incubate_lib.config import Settings, SettingsError, data_folder, load_settings
from incubate_lib.pipeline import slurm
from incubate_lib.pipeline.background import check_lists, stop_run
from incubate_lib.pipeline.execution import is_running
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.pipeline.graph import Node, Plan, closure
from incubate_lib.pipeline.local import check_jobs
from incubate_lib.pipeline.strategies import plan
from incubate_lib.pipeline.view import Line, node_line
from incubate_lib.report.plots import Figure
from incubate_lib.report.tables import label
from incubate_lib.report.widgets import FAINT, MARGIN, Picture, Sentence, curve_legend, draw_row, phase_name, with_twin
from incubate_lib.training.lease import holder
from incubate_lib.training.runs import METRICS

LINGER_SECONDS = 60.0  # that a widget goes on looking while nothing is at work: between phases, or before somebody goes on
SLURM_SECONDS = 15.0  # between two questions to Slurm, at least
MANY = 4  # rows of phases; where there are more, those that are done or wait are told in one line each
COLORS = {  # Okabe and Ito's; the word stands in the box as well
    "done": "#009E73", "running": "#0072B2", "starting": "#56B4E9", "queued": "#56B4E9", "stopped": "#E69F00",
    "ending": "#E69F00", "interrupted": "#E69F00", "failed": "#D55E00", "lost": "#D55E00", "unreadable": "#D55E00",
    "skipped": "#CC79A7", "waiting": "#999999",
}  # fmt: skip
PALE = {"#009E73": "#E0F3EE", "#0072B2": "#DDECF6", "#56B4E9": "#EAF5FC", "#E69F00": "#FCF2DD", "#D55E00": "#FAE7DC",
        "#CC79A7": "#F8ECF3", "#999999": "#F4F4F4"}  # fmt: skip
AT_WORK = ("running", "starting", "queued", "ending")
WIDTH, GAP, BOX_HEIGHT, BOX_STEP = 980, 34, 42, 48  # of the graph, in pixels


# -- reading --------------------------------------------------------------------------------------------------------------


@dataclass
class Phase:
    """One phase, as its files tell it."""

    node: Node
    line: Line
    rows: list[dict[str, Any]] = field(default_factory=list)  # its evaluations
    share: float = 0.0  # of its updates that are done
    seconds: float | None = None  # that it takes yet, by its own account
    pace: tuple[float, float] = (0.0, 0.0)  # seconds and FLOPs from which its speed can be told


class Reader:
    """Reads the phases of a plan, again only those whose files have changed."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.seen = plan, {}
        self.on_slurm = False
        self.told: list[str] = []  # by Slurm, for people

    def look(self) -> list[Phase]:
        """Return all phases; with jobs in Slurm's queue this asks Slurm."""
        phases = []
        for node in self.plan.nodes:
            stamp = _stamp(node)
            if self.seen.get(node.key, (None,))[0] != stamp:
                self.seen[node.key] = (stamp, _read(node, self.plan.flops[node.key]))
            phases.append(self.seen[node.key][1])
        self.on_slurm = slurm.was_submitted(self.plan.experiment)
        if self.on_slurm:
            phases = [Phase(**vars(p) | {"line": Line(**vars(p.line))}) for p in phases]  # for Slurm adds to lines
            self.told = slurm.annotate([p.line for p in phases], self.plan)
        return phases


def _stamp(node: Node) -> list[Any]:
    """Return what changes when a phase's record does: its files, the results it must have started from, who trains it."""
    path = node.folder.path
    files = [path / name for name in ("status.json", "summary.json", METRICS)]
    files += [before.folder.path / "summary.json" for before in node.inputs.values()]
    stamp: list[Any] = []
    for file in files:
        try:
            about = file.stat()
            stamp.append((about.st_mtime_ns, about.st_size, about.st_ino))
        except OSError:
            stamp.append(None)
    done = stamp[1] is not None
    return [*stamp, not done and stamp[0] is not None and _is_held(path)]  # a killed process changes no file


def _is_held(path: Path) -> bool:
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OSError):
        return holder(path / "lease") is not None
    return False


def _read(node: Node, flops: int) -> Phase:
    try:
        phase = Phase(node, node_line(node), [row for row in node.folder.metrics() if isinstance(row, dict)])
        if phase.line.state == "done":
            summary, phase.share = node.summary(), 1.0
            phase.pace = summary["train_seconds"] + summary["eval_seconds"], summary["train_flops"]
        elif phase.line.state != "waiting":
            progress, epochs = node.folder.status().get("progress") or {}, node.settings.training.epochs if flops else 0
            shares = [progress["step"] / progress["steps"]] if progress else []
            shares += [phase.rows[-1]["epoch"] / epochs] if phase.rows and epochs else []  # also before it tells of itself
            phase.share = min(1.0, max(shares, default=0.0))
            if phase.line.state == "running" and progress.get("eta_seconds") is not None:
                phase.seconds = progress["eta_seconds"]
                phase.pace = phase.seconds, flops * (1 - phase.share)
        else:
            phase.rows = []  # of other settings, or of other inputs
        return phase
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:  # half-written, or by hand
        told = f"its records cannot be read ({type(error).__name__}: {error})"
        return Phase(node, Line(node.key, node.title, "unreadable", note=told))


def _at_work(plan: Plan, phases: list[Phase]) -> bool:
    return is_running(plan.experiment.path) or any(phase.line.state in AT_WORK for phase in phases)


def _seconds_left(plan: Plan, phases: list[Phase], on_slurm: bool) -> float | None:
    """Return about how long the run takes yet: what the machine has to do, or its longest way, whichever is longer.

    The speed is that of the phases so far, so nothing is told before there are any.
    """
    seconds, flops = (sum(part) for part in zip(*(phase.pace for phase in phases), strict=True))
    if not flops:
        return None
    left = {
        p.node.key: 0.0 if p.line.state == "done" else p.seconds or plan.flops[p.node.key] * (1 - p.share) * seconds / flops
        for p in phases
    }
    longest: dict[str, float] = {}
    for node in plan.nodes:  # inputs first
        longest[node.key] = left[node.key] + max((longest[before.key] for before in node.inputs.values()), default=0.0)
    if on_slurm:
        return max(longest.values())
    states = {phase.node.key: phase.line.state for phase in phases}
    running = sum(state == "running" for state in states.values())
    waits = any(p.line.state != "done" and p.line.state != "running" and
                all(states[before.key] == "done" for before in p.node.inputs.values()) for p in phases)  # fmt: skip
    if not waits:  # else there are no more places than are taken
        running = max(running, check_jobs(None, plan.experiment.settings.machine.devices))
    return max(sum(left.values()) / max(1, running), *longest.values())


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _headline(plan: Plan, phases: list[Phase], on_slurm: bool) -> str:
    """Say in a sentence how far a run is."""
    count = {state: sum(phase.line.state == state for phase in phases) for state in COLORS}
    told = [f"{plan.experiment.path.name}: {count['done']} of {len(phases)} phases done"]
    told += [f"{count[state]} {state}" for state in COLORS if count[state] and state not in ("done", "waiting")]
    if _at_work(plan, phases):
        left = _seconds_left(plan, phases, on_slurm)
        if count["done"] == len(phases):
            told.append("the analysis is under way")
        elif not any(count[state] for state in AT_WORK):
            told.append("the next are being started")
        elif left is not None:
            told.append(f"about {_duration(left)} left")
    elif count["done"] < len(phases):
        told.append("nothing is at work; `start_run` or `incubate run` goes on from here")
    return ", ".join(told)


# -- drawing --------------------------------------------------------------------------------------------------------------


def draw(plan: Plan, phases: list[Phase]) -> tuple[Picture, Picture]:
    """Draw the graph of phases, and their learning curves: a row for each strategy and seed."""
    found = {phase.node.key: phase for phase in phases}
    graph = Picture("the graph of phases, each with its state", WIDTH, 4)
    curves = Picture("learning curves of the phases", WIDTH)
    seeds, shown, alone = len({seed for _, seed in plan.finals}), [], []
    for (strategy, seed), final in plan.finals.items():
        group = [found[node.key] for node in closure([final])]
        title = label(strategy) + (f", seed {seed}" if seeds > 1 else "")
        states = {phase.line.state for phase in group}
        if len(plan.finals) > MANY and len(states) == 1 and states <= {"done", "waiting"}:
            _draw_folded(graph, title, group)
        elif len(group) == 1:
            alone.append((title, group[0]))
        else:
            shown.append((title, group))
    columns = max([1 + max(_depths(group[-1].node).values()) for _, group in shown], default=4)
    width, drawn = min(250.0, (WIDTH - 20 - GAP * (columns - 1)) / columns), set()
    if alone:
        _draw_alone(graph, alone, columns, width)
        _draw_curves(curves, "in one piece", [_panel(phase, title) for title, phase in alone])
    for title, group in shown:
        _draw_group(graph, title, group, width, drawn)
        new = [phase for phase in group if phase.node.settings.training and phase.node.key not in drawn]
        _draw_curves(curves, title, [_panel(phase, _name(phase.node)) for phase in new])
        drawn |= {phase.node.key for phase in group}
    return graph, curves


def _draw_curves(picture: Picture, title: str, panels: list[tuple[str, list, float]]) -> None:
    if any(rows for _, (rows,), _ in panels):
        if not picture.marks:
            curve_legend(picture, MARGIN)
        draw_row(picture, title, panels)


def _panel(phase: Phase, title: str) -> tuple[str, list, float]:
    return title, [phase.rows], phase.node.settings.training.epochs


def _name(node: Node) -> str:
    s = node.settings
    return phase_name(s.phase, s.module_index, len(s.target_depths)) + (", small images" if s.small_images else "")


def _depths(final: Node) -> dict[str, int]:
    """Return for each phase that a result needs how many stand before it, at most."""
    depths: dict[str, int] = {}
    for node in closure([final]):
        depths[node.key] = 1 + max((depths[before.key] for before in node.inputs.values()), default=-1)
    return depths


def _draw_folded(picture: Picture, title: str, group: list[Phase]) -> None:
    line = group[-1].line
    color = COLORS[line.state]
    picture.box(10, picture.height + 3, WIDTH - 20, 24, fill=PALE[color], edge=color)
    told = f"{line.state}, top-1 {line.accuracy}" if line.accuracy else line.state
    picture.text(20, picture.height + 19, title, bold=True, room=WIDTH - 300)
    picture.text(WIDTH - 20, picture.height + 19, f"{len(group)} phase{'s' * (len(group) > 1)} {told}", anchor="end")
    picture.height += 32


def _draw_alone(picture: Picture, alone: list[tuple[str, Phase]], columns: int, width: float) -> None:
    """Draw phases that are a whole strategy each, beside one another."""
    picture.text(10, picture.height + 16, "in one piece", size=13, bold=True)
    for i, (title, phase) in enumerate(alone):
        row, column = divmod(i, columns)
        _draw_box(picture, 10 + column * (width + GAP), picture.height + 26 + row * BOX_STEP, width, phase, title)
    picture.height += 26 + -(-len(alone) // columns) * BOX_STEP + 8


def _draw_group(picture: Picture, title: str, group: list[Phase], width: float, drawn: set[str]) -> None:
    depths = _depths(group[-1].node)
    by_depth = [list(part) for _, part in groupby(sorted(group, key=lambda p: depths[p.node.key]), lambda p: depths[p.node.key])]
    tallest = max(map(len, by_depth))
    picture.text(10, picture.height + 16, title, size=13, bold=True, room=WIDTH - 20)
    places = {}
    for column, part in enumerate(by_depth):
        top = picture.height + 26 + (tallest - len(part)) * BOX_STEP / 2
        for row, phase in enumerate(part):
            places[phase.node.key] = 10 + column * (width + GAP), top + row * BOX_STEP
    for phase in group:
        x, y = places[phase.node.key]
        for before in phase.node.inputs.values():
            x0, y0 = places[before.key]
            start, end, bend = (x0 + width, y0 + BOX_HEIGHT / 2), (x, y + BOX_HEIGHT / 2), x - GAP / 2
            picture.line([start, (bend, start[1]), (bend, end[1]), end], color=FAINT)
    for phase in group:
        _draw_box(picture, *places[phase.node.key], width, phase, _name(phase.node), shared=phase.node.key in drawn)
    picture.height += 26 + tallest * BOX_STEP + 8


def _draw_box(picture: Picture, x: float, y: float, width: float, phase: Phase, title: str, shared: bool = False) -> None:
    line, color = phase.line, COLORS.get(phase.line.state, "#999999")
    hint = line.plain() + (f"; {line.where}" if line.where else "")
    picture.box(x, y, width, BOX_HEIGHT, fill=PALE[color], edge=color, dashed=shared, hint=hint)
    state = line.state + (" (shared)" if shared else "")
    if phase.seconds is not None:
        state += f", {_duration(phase.seconds)} left"
    picture.text(x + 8, y + 15, title, bold=True, room=width - (100 if line.accuracy else 16))
    picture.text(x + width - 8, y + 15, line.accuracy and f"top-1 {line.accuracy}", anchor="end")
    picture.text(x + 8, y + 30, state, room=width - 16)
    picture.box(x + 8, y + 34, width - 16, 4, fill="white", radius=2)
    if phase.share:
        picture.box(x + 8, y + 34, max(4.0, (width - 16) * phase.share), 4, fill=color, radius=2)


def snapshot(plan: Plan) -> Figure:
    """Draw how far a run is: the graph of its phases with their states, and beneath it their curves so far."""
    graph, curves = draw(plan, Reader(plan).look())
    graph.put_below(curves)
    return graph.figure()


def table(plan: Plan) -> pd.DataFrame:
    """Return a row for each phase: state, epoch, loss, top-1, ETA; and what Slurm says, and what went wrong, if anything."""
    return _table(Reader(plan).look())


def _table(phases: list[Phase]) -> pd.DataFrame:
    lines = [phase.line for phase in phases]
    titles = Counter(line.title for line in lines)  # meta models of several strategies have the same
    names = [p.line.title + (f", {p.node.strategy}" if titles[p.line.title] > 1 else "") for p in phases]
    columns = {"state": "state", "epoch": "epoch", "loss": "loss", "top-1": "accuracy", "ETA": "eta"}
    columns |= {
        name: key for name, key in {"Slurm": "where", "note": "note"}.items() if any(getattr(line, key) for line in lines)
    }
    return pd.DataFrame({"phase": names} | {name: [getattr(line, key) for line in lines] for name, key in columns.items()})


# -- live -----------------------------------------------------------------------------------------------------------------


def find(preset: str, overrides: Sequence[str], strategies: Sequence[str] | None, seeds: Sequence[int]) -> Plan:
    """Return the plan of a run that was started; SettingsError in plain words for whatever is not as it should be.

    Without `strategies` those that the preset runs, and any other that was started.
    """
    settings = load_settings(preset, list(overrides))
    place = data_folder() / "runs" / settings.name
    try:
        experiment = Experiment.of(settings)
        if not experiment.is_known():
            raise SettingsError(_not_there(settings, experiment, preset))
        if not strategies:
            started = experiment.started()[0]
            strategies = started if slurm.was_submitted(experiment) else list(dict.fromkeys([*settings.run, *started]))
        return plan(settings, strategies, seeds)
    except SettingsError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # fields that are missing, or of another kind
        raise SettingsError(
            f"the records in {place} are of another version of this package, or damaged ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); move that folder away and run again"
        ) from None


def _not_there(settings: Settings, experiment: Experiment, preset: str) -> str:
    told = f"there is no run of these settings in {experiment.path} yet; start_run or `incubate run {preset}` starts one"
    if experiment.path.name != settings.name and not settings.is_variant:
        told += f" ({settings.name} beside it is of other settings, or of an older version whose results are not used any more)"
    return told


class Live(ipywidgets.VBox):
    """A run as it goes on: a headline, a button to stop it, the graph of phases, curves, a table.

    A daemon thread of this kernel looks every few seconds, also while the kernel trains; it ends with the run, when the
    widget is closed or replaced, and with the kernel.
    """

    def __init__(self, preset: str, overrides: Sequence[str], strategies: Any, seeds: Sequence[int], every: float) -> None:
        self.wanted, self.every = (preset, overrides, strategies, seeds), every
        self.reader: Reader | None = None
        self.shown: tuple[list[Phase], list[str]] = [], []
        self.over = threading.Event()
        self.headline, self.said, self.graph, self.curves, self.table = (ipywidgets.HTML() for _ in range(5))
        self.stop = ipywidgets.Button(description="Stop: save and pause", disabled=True, layout={"width": "auto"})
        self.stop.tooltip = "Phases that train save a checkpoint first; the run can go on from there"
        self.stop.on_click(self._stop)
        super().__init__([self.headline, ipywidgets.HBox([self.stop, self.said]), self.graph, self.curves, self.table])
        busy = self.look()
        replaced = _shown.pop((preset, *overrides), None)
        if replaced:
            replaced.end("A newer widget shows this run.")
        _shown[(preset, *overrides)] = self
        self.thread = threading.Thread(target=self._go_on, args=(busy,), name="watch", daemon=True)
        self.thread.start()

    def look(self) -> bool | None:
        """Read the run and show what has changed; return whether anything is at work, None if all is done for good."""
        try:
            if self.reader is None:
                self.reader = Reader(find(*self.wanted))
            return self._look(self.reader)
        except Exception as error:  # whatever is in those files: a thread's traceback would stand under some other cell
            told = str(error) if isinstance(error, SettingsError) else f"the run cannot be shown: {type(error).__name__}: {error}"
            self.headline.value = f'<p role="alert" style="{FONT}">{escape(told)}</p>'
            self.stop.disabled = True
            return False

    def _look(self, reader: Reader) -> bool | None:
        plan, phases = reader.plan, reader.look()
        busy = _at_work(plan, phases)
        self.headline.value = f'<p style="{FONT}; font-weight: bold">{escape(_headline(plan, phases, reader.on_slurm))}</p>'
        self.stop.disabled = not busy
        if (phases, reader.told) != self.shown:
            graph, curves = draw(plan, phases)
            self.graph.value, self.curves.value = (f'<div style="overflow-x: auto">{p.svg()}</div>' for p in (graph, curves))
            self.table.value = _table_html(phases, reader.told)
            self.shown = phases, reader.told
        return None if not busy and all(phase.line.state == "done" for phase in phases) else busy

    def _go_on(self, busy: bool | None) -> None:
        last = time.monotonic()  # that something was at work
        while busy is not None and time.monotonic() - last < LINGER_SECONDS:
            if self.over.wait(max(self.every, SLURM_SECONDS) if self.reader and self.reader.on_slurm else self.every):
                return
            busy = self.look()
            if busy:
                last = time.monotonic()
        if busy is False:
            self.end("Nothing has been at work for a while, so this picture stands still. Run the cell again to look again.")
        self.over.set()

    def _stop(self, _: Any) -> None:
        try:
            self._say(f"{stop_run(self.reader.plan.experiment)}.")
        except (SettingsError, OSError) as error:
            self._say(str(error))

    def _say(self, words: str) -> None:
        self.said.value = f'<span role="status" style="{FONT}">{escape(words)}</span>'

    def end(self, words: str) -> None:
        """Look no more, and say why."""
        self.over.set()
        self.stop.disabled = True
        self._say(words)

    def close(self) -> None:
        self.over.set()
        super().close()


_shown: dict[tuple[str, ...], Live] = {}  # the widget that shows a run, in this kernel
FONT = "font-size: 14px; line-height: 1.4; margin: 4px 0"


def _table_html(phases: list[Phase], told: list[str]) -> str:
    shown = _table(phases)
    cell = "padding: 2px 10px; text-align: {}; white-space: {}; border-bottom: 1px solid " + FAINT
    words = {"phase", "state", "Slurm", "note"}
    styles = [cell.format("left" if name in words else "right", "normal" if name == "note" else "nowrap") for name in shown]
    head = "".join(f'<th style="{style}">{escape(name)}</th>' for name, style in zip(shown, styles, strict=True))
    rows = "".join(
        "<tr>" + "".join(f'<td style="{style}">{escape(word)}</td>' for word, style in zip(row, styles, strict=True))
        for row in shown.itertuples(index=False)
    )
    inside = f'<table style="border-collapse: collapse"><tr>{head}{rows}</table>' + "".join(f"<p>{escape(w)}</p>" for w in told)
    return f'<div style="{FONT}; overflow-x: auto">{inside}</div>'


def watch(
    preset: str = "digits",
    overrides: Sequence[str] = (),
    *,
    strategies: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    every: float = 2.0,
) -> Any:
    """Show a run as it goes on, wherever it runs, looking every `every` seconds; a sentence where there is nothing to show.

    Its twin, which is all that a headless run shows, is a picture of the state at that moment.
    """
    try:
        check_lists(overrides, strategies, seeds)
        if not every >= 0.1:
            raise SettingsError(f"every is {every!r}; it must be at least 0.1 seconds")
        load_settings(preset, list(overrides))
    except (SettingsError, TypeError) as error:
        return Sentence(str(error))

    def twin() -> Figure | Sentence:
        try:
            return snapshot(find(preset, overrides, strategies, seeds))
        except SettingsError as error:
            return Sentence(str(error))

    return with_twin(lambda: Live(preset, overrides, strategies, seeds, every), twin)
