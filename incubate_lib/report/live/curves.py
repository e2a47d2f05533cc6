"""Learning curves of phases as small panels: top-1 above, loss beneath, those of a strategy in a row on one scale."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import ipywidgets
import pandas as pd

from incubate_lib.report.live.picture import FAINT, LETTER, Picture
from incubate_lib.report.style import Figure
from incubate_lib.report.tables.plots import learning_curves
from incubate_lib.report.tables.records import Results
from incubate_lib.report.widgets import Sentence, with_picture, with_twin
from incubate_lib.report.words import label, phase_name

TOP1, LOSS = "#0072B2", "#D55E00"  # Okabe and Ito's
MARGIN, TOP1_HEIGHT, LOSS_HEIGHT = 46, 54, 42  # of the panels, in pixels
PANEL_HEIGHT = 20 + TOP1_HEIGHT + 8 + LOSS_HEIGHT + 22


def all_curves(results: Results) -> Figure:
    """Draw the learning curves of all phases (there is one at least), a row a strategy, a panel a phase, a line a seed."""
    rows: dict[str, list] = {}
    for (strategy, phase, index), table in by_phase(results):
        curves = [part.to_dict("records") for _, part in table.groupby("seed", sort=False)]
        rows.setdefault(strategy, []).append((phase_name(phase, index), curves, table["epoch"].max()))
    picture = Picture("learning curves of all phases", 980)
    seeds = results.curves["seed"].nunique()
    curve_legend(picture, MARGIN, "last values" + (f", mean of {seeds} seeds" if seeds > 1 else ""))
    for strategy, panels in rows.items():
        draw_row(picture, label(strategy), panels)
    return picture.figure()


def by_phase(results: Results, *more: str) -> Iterable[tuple[tuple, pd.DataFrame]]:
    """Return the curves of each phase, with strategy, whatever else it is to be told apart by, phase and module."""
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
    picture.text(
        x + width,
        low + LOSS_HEIGHT + 15,
        f"{epochs:,.0f} epochs" if epochs >= 100 else f"{epochs:.3g} epochs",
        color="#555555",
        anchor="end",
    )
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


def browse(results: Results) -> Any:
    """Return a menu of all phases that shows the learning curves of the chosen one; its twin shows those of all."""
    if results.curves.empty:
        return Sentence("No phase has a learning curve yet.")
    return with_twin(lambda: _menu(results), lambda: all_curves(results))


def _menu(results: Results) -> ipywidgets.Widget:
    groups = {}
    for (strategy, seed, phase, index), table in by_phase(results, "seed"):
        groups[f"{label(strategy)} ({strategy}), seed {seed}: {phase_name(phase, index)}"] = table
    menu = ipywidgets.Dropdown(options=list(groups), description="phase", layout={"width": "36rem"})
    return with_picture(menu, lambda chosen: learning_curves({chosen.rpartition(": ")[2]: groups[chosen]}))
