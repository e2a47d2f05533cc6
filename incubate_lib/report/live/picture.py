"""Boxes, words and lines, drawn once and written twice: as SVG for a live widget, as a matplotlib figure for its twin."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from matplotlib.patches import FancyBboxPatch

from incubate_lib.report.style import Figure

INK, FAINT = "#222222", "#BBBBBB"
LETTER = 0.6  # width of an average letter, of its size; that of the widest common font, so that words fit in any


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
    shown = {key: f"{value:.1f}" if isinstance(value, float) else value for key, value in attributes.items() if value}
    about = "".join(f' {key}="{escape(str(value))}"' for key, value in shown.items())
    return f"<{name}{about}>{inside}</{name}>"
