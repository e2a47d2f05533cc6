"""Boxes, words and lines, drawn once and written twice: as SVG for a live widget, as a matplotlib figure for its twin."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from incubate_lib.report.pages import page
from incubate_lib.report.style import Figure

INK, FAINT = "#222222", "#BBBBBB"
BOX = {"fill": "white", "edge": "none", "radius": 5, "dashed": False, "hint": ""}
TEXT = {"size": 12, "color": INK, "bold": False, "anchor": "start"}
LINE = {"color": INK, "width": 1.5, "dashed": False}
POINTS = 0.72  # a pixel, at 100 an inch
# width of an average letter, of its size; that of the widest common font, so that words fit in any
LETTER = 0.6


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

    def box(self, x: float, y: float, width: float, height: float, **look: Any) -> None:
        """Draw a box; `look` as BOX, whose hint is shown under the pointer."""
        self.marks.append(("box", BOX | look | {"x": x, "y": y, "width": width, "height": height}))

    def text(self, x: float, y: float, words: str, room: float | None = None, **look: Any) -> None:
        """Write words on the base line y; `look` as TEXT, anchor start, middle or end; what has no room is cut off."""
        look = TEXT | look
        if room is not None and len(words) * look["size"] * LETTER > room:
            words = words[: max(1, int(room / look["size"] / LETTER) - 1)] + "…"
        self.marks.append(("text", look | {"x": x, "y": y, "words": words}))

    def line(self, points: Sequence[tuple[float, float]], **look: Any) -> None:
        """Draw a line through points; `look` as LINE."""
        self.marks.append(("line", LINE | look | {"points": points}))

    def svg(self) -> str:
        """Return the picture as an SVG element."""
        return page("picture.svg", **vars(self))

    def figure(self) -> Figure:
        """Return the same picture as a matplotlib figure."""
        return beneath_one_another(self)


def beneath_one_another(*pictures: Picture) -> Figure:
    """Return pictures of one width as a matplotlib figure; those with nothing in them are left out."""
    pictures = [picture for picture in pictures if picture.marks]
    height, bottom = sum(picture.height for picture in pictures), 1.0
    figure = Figure(figsize=(pictures[0].width / 100, height / 100))
    for picture in pictures:
        bottom -= picture.height / height
        axis = figure.add_axes((0, bottom, 1, picture.height / height))
        axis.set(xlim=(0, picture.width), ylim=(picture.height, 0))
        axis.axis("off")
        for order, (kind, mark) in enumerate(picture.marks):
            _DRAW[kind](axis, SimpleNamespace(**mark), order)
    return figure


def _draw_box(axis: Axes, m: SimpleNamespace, order: int) -> None:
    radius = min(m.radius, m.width / 2, m.height / 2)
    corner = f"round,pad=0,rounding_size={radius}" if radius > 0 else "square,pad=0"
    look = {"facecolor": m.fill, "edgecolor": m.edge, "linestyle": "--" if m.dashed else "-"}
    place = (m.x, m.y), m.width, m.height
    axis.add_patch(FancyBboxPatch(*place, boxstyle=corner, linewidth=1.1, zorder=order, **look))


def _draw_text(axis: Axes, m: SimpleNamespace, order: int) -> None:
    weight = "bold" if m.bold else "normal"
    look = {"fontsize": m.size * POINTS * 0.92, "color": m.color, "fontweight": weight}
    side = {"start": "left", "middle": "center", "end": "right"}[m.anchor]
    axis.text(m.x, m.y, m.words, ha=side, va="baseline", parse_math=False, zorder=order, **look)


def _draw_line(axis: Axes, m: SimpleNamespace, order: int) -> None:
    look = {"color": m.color, "linewidth": m.width * POINTS, "linestyle": ":" if m.dashed else "-"}
    axis.plot(*zip(*m.points, strict=True), zorder=order, **look)


_DRAW = {"box": _draw_box, "text": _draw_text, "line": _draw_line}
