"""Widgets for JupyterLab, and what every widget needs: a static twin. They only look: a value is never an input of a run.

Executed copies have no widgets, and GitHub shows none: there the twin stands in its place, a picture with the same content.
"""

import base64
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import ipywidgets
import pandas as pd
from matplotlib.patches import FancyBboxPatch

from incubate_lib.config import SettingsError
from incubate_lib.report.plots import Figure, learning_curves
from incubate_lib.report.tables import Results, label

INK, FAINT, TOP1, LOSS = "#222222", "#BBBBBB", "#0072B2", "#D55E00"  # the colours are Okabe and Ito's
LETTER = 0.6  # width of an average letter, of its size; that of the widest common font, so that words fit in any
MARGIN, TOP1_HEIGHT, LOSS_HEIGHT = 46, 54, 42  # of the panels of curves, in pixels
PANEL_HEIGHT = 20 + TOP1_HEIGHT + 8 + LOSS_HEIGHT + 22
PHASES = {"meta": "meta model", "assemble": "assembly", "finetune": "fine-tuning", "end_to_end": "end to end"}


def phase_name(phase: str, module_index: Any, num_modules: int = 0) -> str:
    """Return a phase's name for people, modules counted from one."""
    if phase != "incubate":
        return PHASES[phase]
    return f"module {int(module_index) + 1}" + (f" of {num_modules}" if num_modules else "")


# -- twins ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sentence:
    """Words in the place of a picture that cannot be drawn."""

    words: str

    def __repr__(self) -> str:
        return self.words

    def _repr_html_(self) -> str:
        return f'<p role="alert">{escape(self.words)}</p>'


@dataclass(frozen=True)
class Twinned:
    """A widget, shown together with its static twin: whoever cannot show the one shows the other."""

    widget: ipywidgets.Widget
    twin: Callable[[], Any]

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle, twin = self.widget._repr_mimebundle_(**kwargs), self.twin()
        if png := getattr(twin, "_repr_png_", None):
            return bundle | {"image/png": base64.b64encode(png()).decode()}
        if page := getattr(twin, "_repr_html_", None):
            return bundle | {"text/html": page()}
        return bundle | {"text/plain": str(twin)}


def with_twin(make_widget: Callable[[], ipywidgets.Widget], twin: Callable[[], Any]) -> Any:
    """Return what a cell shows: a widget with its twin, a Figure or Sentence; in a headless run the twin alone.

    Headless (INCUBATE_HEADLESS is set) no widget is even made: nobody could touch it, and clients that execute notebooks
    would have to store it.
    """
    return twin() if os.environ.get("INCUBATE_HEADLESS") else Twinned(make_widget(), twin)


def attempt(make: Callable[[], Any]) -> Any:
    """Return what a function makes; where that is not possible, the reason as a Sentence, as often as it is asked for."""
    try:
        return make()
    except SettingsError as error:
        return Sentence(str(error))


# -- pictures -------------------------------------------------------------------------------------------------------------


@dataclass
class Picture:
    """Boxes, words and lines in pixels, y downwards, that become SVG for a live widget or a matplotlib figure for its twin.

    Writing SVG takes milliseconds, drawing with matplotlib several tenths of a second: too much for every two seconds.
    But GitHub removes SVG from a notebook's output, so the twin must be a PNG.
    """

    about: str  # in words, for screen readers
    width: float
    height: float = 0.0
    marks: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, *, fill: str = "white", edge: str = "none", radius: float = 5,
            dashed: bool = False, hint: str = "") -> None:  # fmt: skip
        """Draw a box; `hint` is shown under the pointer."""
        self._add("box", locals())

    def text(self, x: float, y: float, words: str, *, size: float = 12, color: str = INK, bold: bool = False,
             anchor: str = "start", room: float | None = None) -> None:  # fmt: skip
        """Write words on the base line y; `anchor` is start, middle or end; what has no room is cut off."""
        if room is not None and len(words) * size * LETTER > room:
            words = words[: max(1, int(room / size / LETTER) - 1)] + "…"
        self._add("text", locals())

    def line(self, points: Sequence[tuple[float, float]], *, color: str = INK, width: float = 1.5, dashed: bool = False) -> None:
        self._add("line", locals())

    def put_below(self, other: "Picture") -> None:
        """Add another picture beneath this one."""
        for kind, m in other.marks:
            place = {"points": [(x, y + self.height) for x, y in m["points"]]} if kind == "line" else {"y": m["y"] + self.height}
            self.marks.append((kind, m | place))
        self.height += other.height

    def _add(self, kind: str, what: dict[str, Any]) -> None:
        self.marks.append((kind, {key: value for key, value in what.items() if key != "self"}))

    def svg(self) -> str:
        """Return the picture as an SVG element."""
        inside = []
        for kind, m in self.marks:
            if kind == "box":
                about = {key: m[key] for key in ("x", "y", "width", "height", "fill")}
                about |= {"rx": m["radius"], "stroke": m["edge"], "stroke-width": 1.5, "stroke-dasharray": m["dashed"] and "4 3"}
                inside.append(_tag("rect", _tag("title", escape(m["hint"])) if m["hint"] else "", **about))
            elif kind == "text":
                about = {"x": m["x"], "y": m["y"], "font-size": m["size"], "fill": m["color"], "text-anchor": m["anchor"]}
                inside.append(_tag("text", escape(m["words"]), **about, **{"font-weight": m["bold"] and "bold"}))
            else:
                points = " ".join(f"{x:.1f},{y:.1f}" for x, y in m["points"])
                about = {"stroke": m["color"], "stroke-width": m["width"], "stroke-dasharray": m["dashed"] and "2 3"}
                inside.append(_tag("polyline", points=points, fill="none", **about))
        about = {
            "width": self.width,
            "viewBox": f"0 0 {self.width} {self.height}",  # with it, a narrower page shows all of it, smaller
            "role": "img",
            "aria-label": self.about,
            "style": "background: white; max-width: 100%; height: auto",
        }
        return _tag("svg", "".join(inside), **about, **{"font-family": "Helvetica, Arial, sans-serif"})

    def figure(self) -> Figure:
        """Return the same picture as a matplotlib figure."""
        points = 0.72  # a pixel, at 100 an inch
        figure = Figure(figsize=(self.width / 100, self.height / 100))
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set(xlim=(0, self.width), ylim=(self.height, 0))
        axis.axis("off")
        for order, (kind, m) in enumerate(self.marks):
            if kind == "box":
                radius = min(m["radius"], m["width"] / 2, m["height"] / 2)
                corner = f"round,pad=0,rounding_size={radius}" if radius > 0 else "square,pad=0"
                style = {"facecolor": m["fill"], "edgecolor": m["edge"], "linestyle": "--" if m["dashed"] else "-"}
                place = (m["x"], m["y"]), m["width"], m["height"]
                axis.add_patch(FancyBboxPatch(*place, boxstyle=corner, linewidth=1.1, zorder=order, **style))
            elif kind == "text":
                side = {"start": "left", "middle": "center", "end": "right"}[m["anchor"]]
                weight = "bold" if m["bold"] else "normal"
                style = {"fontsize": m["size"] * points * 0.92, "fontweight": weight, "color": m["color"], "ha": side}
                axis.text(m["x"], m["y"], m["words"], va="baseline", parse_math=False, zorder=order, **style)
            else:
                style = ":" if m["dashed"] else "-"
                axis.plot(
                    *zip(*m["points"], strict=True), color=m["color"], lw=m["width"] * points, linestyle=style, zorder=order
                )
        return figure


def _tag(name: str, inside: str = "", **attributes: Any) -> str:
    told = {key: f"{value:.1f}" if isinstance(value, float) else value for key, value in attributes.items() if value}
    about = "".join(f' {key}="{escape(str(value))}"' for key, value in told.items())
    return f"<{name}{about}>{inside}</{name}>"


def curve_panel(
    picture: Picture, x: float, y: float, width: float, title: str, curves: Sequence[Sequence[dict[str, Any]]],
    *, epochs: float, top_loss: float, first: bool = True,
) -> None:  # fmt: skip
    """Draw top-1 (0 to 100 %) over epochs and beneath it the loss (0 to `top_loss`), one line for each of the curves.

    In the corners stand the last values, the mean of several; `first` panels of a row have the scales beside them.
    """
    picture.text(x, y + 13, title, bold=True, room=width)
    top, low = y + 20, y + 20 + TOP1_HEIGHT + 8
    for place, height, low_word, high_word in ((top, TOP1_HEIGHT, "0", "100 %"), (low, LOSS_HEIGHT, "0", f"{top_loss:.3g}")):
        picture.box(x, place, width, height, fill="#F6F6F6", radius=0)
        picture.line([(x, place), (x, place + height), (x + width, place + height)], color=FAINT, width=1)
        if first:
            picture.text(x - 4, place + 10, high_word, color="#555555", anchor="end")
            picture.text(x - 4, place + height, low_word, color="#555555", anchor="end")
    picture.text(x, low + LOSS_HEIGHT + 15, "0", color="#555555")
    picture.text(x + width, low + LOSS_HEIGHT + 15, f"{epochs:.3g} epochs", color="#555555", anchor="end")
    for name, color, place, height, scale, dashed in (
        ("train_loss", LOSS, low, LOSS_HEIGHT, top_loss, True),
        ("loss", LOSS, low, LOSS_HEIGHT, top_loss, False),
        ("accuracy", TOP1, top, TOP1_HEIGHT, 1.0, False),
    ):
        last = []
        for rows in curves:
            values = list(_points(rows, name))
            spots = [
                (x + width * min(1.0, at / epochs if epochs else 0.0), place + height * (1 - min(1.0, value / scale)))
                for at, value in values
            ]
            if len(spots) > 1:
                picture.line(spots, color=color, dashed=dashed, width=1 if dashed else 1.8)
            if spots and not dashed:
                picture.box(spots[-1][0] - 2.5, spots[-1][1] - 2.5, 5, 5, fill=color, radius=2.5)
                last.append(values[-1][1])
        if last:  # where a curve that goes well does not run: under the one, over the other
            mean = sum(last) / len(last)
            words, at = (f"{100 * mean:.1f} %", top + TOP1_HEIGHT - 5) if name == "accuracy" else (f"{mean:.3f}", low + 13)
            picture.text(x + width - 4, at, words, color=color, bold=True, anchor="end")


def curve_legend(picture: Picture, x: float, numbers: str = "last values") -> None:
    """Say what the lines and the numbers of the panels beneath are."""
    picture.height += 26
    y = picture.height - 10
    for words, color, dashed in (("top-1", TOP1, False), ("loss, judged", LOSS, False), ("loss, training", LOSS, True)):
        picture.line([(x, y - 4), (x + 22, y - 4)], color=color, width=1.8, dashed=dashed)
        picture.text(x + 27, y, words)
        x += 45 + len(words) * 12 * LETTER
    picture.text(x, y, f"numbers: {numbers}")


def top_of(curves: Iterable[Sequence[dict[str, Any]]]) -> float:
    """Return the largest loss among some curves, the scale that they share."""
    return (
        max((value for rows in curves for name in ("loss", "train_loss") for _, value in _points(rows, name)), default=1.0) or 1.0
    )


def _points(rows: Iterable[dict[str, Any]], name: str) -> Iterable[tuple[float, float]]:
    """Return (epoch, value) of all evaluations that have one; records may be half-written, losses not finite."""
    for row in rows:
        at, value = row.get("epoch"), row.get(name)
        if all(isinstance(number, (int, float)) and math.isfinite(number) for number in (at, value)):
            yield at, max(0.0, value)


# -- finished runs --------------------------------------------------------------------------------------------------------


def browse(results: Results) -> Any:
    """Return a menu of all phases that shows the learning curves of the chosen one; its twin shows those of all."""
    return with_twin(lambda: _menu(results), lambda: all_curves(results))


def _menu(results: Results) -> ipywidgets.Widget:
    """The picture is an image, not an output area: for those, clients that execute notebooks write back to the kernel in
    the middle of a cell, and one run in some dozens hung on it.
    """
    groups = {}
    for (strategy, seed, phase, index), table in _phases(results, "seed"):
        module = "" if pd.isna(index) else f" module {int(index) + 1}"
        groups[f"{strategy}, seed {seed}: {phase}{module}"] = table
    menu = ipywidgets.Dropdown(options=list(groups), description="phase", layout={"width": "36rem"})
    shown = ipywidgets.Image(format="png")

    def show(_: object = None) -> None:
        if menu.value is not None:
            shown.value = learning_curves({menu.value: groups[menu.value]})._repr_png_()

    menu.observe(show, names="value")
    show()
    return ipywidgets.VBox([menu, shown])


def all_curves(results: Results) -> Figure | Sentence:
    """Draw the learning curves of all phases, a row a strategy, a panel a phase, a line a seed."""
    if results.curves.empty:
        return Sentence("No phase has a learning curve yet.")
    rows: dict[str, list] = {}
    for (strategy, phase, index), table in _phases(results):
        curves = [part.to_dict("records") for _, part in table.groupby("seed", sort=False)]
        rows.setdefault(strategy, []).append((phase_name(phase, index), curves, table["epoch"].max()))
    picture = Picture("learning curves of all phases", 980)
    seeds = results.curves["seed"].nunique()
    curve_legend(picture, MARGIN, "last values" + (f", mean of {seeds} seeds" if seeds > 1 else ""))
    for strategy, panels in rows.items():
        draw_row(picture, label(strategy), panels)
    return picture.figure()


def _phases(results: Results, *more: str) -> Iterable[tuple[tuple, pd.DataFrame]]:
    return results.curves.groupby(["strategy", *more, "phase", "module_index"], dropna=False, sort=False)


def draw_row(picture: Picture, title: str, panels: Sequence[tuple[str, Sequence, float]], most: int = 6) -> None:
    """Add panels (title, curves, epochs) beneath what is drawn, as many beside one another as have room, on one scale."""
    picture.text(10, picture.height + 16, title, size=13, bold=True, room=picture.width - 20)
    picture.height += 24
    top_loss = top_of(rows for _, curves, _ in panels for rows in curves)
    width = (picture.width - MARGIN - 10) / most
    for i, (name, curves, epochs) in enumerate(panels):
        if i and i % most == 0:
            picture.height += PANEL_HEIGHT + 6
        x = MARGIN + i % most * width
        curve_panel(picture, x, picture.height, width - 14, name, curves, epochs=epochs, top_loss=top_loss, first=i % most == 0)
    picture.height += PANEL_HEIGHT + 10
