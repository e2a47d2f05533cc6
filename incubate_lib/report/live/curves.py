"""Learning curves of phases as small panels: the score above, loss beneath, those of a strategy in a row on one scale."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import ipywidgets
import pandas as pd

from incubate_lib.report.live.picture import FAINT, LETTER, Picture
from incubate_lib.report.style import Figure
from incubate_lib.report.tables.plots import learning_curves
from incubate_lib.report.tables.records import Results
from incubate_lib.report.widgets import Sentence, with_picture, with_twin
from incubate_lib.report.words import LOOKS, label, phase_name
from incubate_lib.tasks import Metric

FADED = "#555555"
LINES = LOOKS["lines"]  # of evaluations
MARGIN, SCORE_HEIGHT, LOSS_HEIGHT = 46, 54, 42  # of the panels, in pixels
PANEL_HEIGHT = 20 + SCORE_HEIGHT + 8 + LOSS_HEIGHT + 22
Rows = Sequence[dict[str, Any]]  # the evaluations of a phase
Panel = tuple[str, Sequence[Rows], float]  # title, curves, epochs


def all_curves(results: Results) -> Figure:
    """Draw the learning curves of all phases (there is one at least), a row a strategy, a panel a phase, a line a seed."""
    rows: dict[str, list] = {}
    for (strategy, phase, index), table in by_phase(results):
        curves = [part.to_dict("records") for _, part in table.groupby("seed", sort=False)]
        rows.setdefault(strategy, []).append((phase_name(phase, index), curves, table["epoch"].max()))
    picture = Picture("learning curves of all phases", 980)
    seeds = results.curves["seed"].nunique()
    curve_legend(picture, results.metric, "last values" + (f", mean of {seeds} seeds" if seeds > 1 else ""))
    for strategy, panels in rows.items():
        draw_row(picture, label(strategy), panels, results.metric)
    return picture.figure()


def by_phase(results: Results, *more: str) -> Iterable[tuple[tuple, pd.DataFrame]]:
    """Return the curves of each phase, with strategy, whatever else it is to be told apart by, phase and module."""
    return results.curves.groupby(["strategy", *more, "phase", "module_index"], dropna=False, sort=False)


def draw_row(picture: Picture, title: str, panels: Sequence[Panel], metric: Metric, most: int = 6) -> None:
    """Add panels beneath what is drawn, as many beside one another as have room, on one scale."""
    picture.text(10, picture.height + 16, title, size=13, bold=True, room=picture.width - 20)
    picture.height += 24
    drawn = [rows for _, curves, _ in panels for rows in curves]

    def largest(*names: str) -> float:
        return max((value for rows in drawn for name in names for _, value in _points(rows, name)), default=0.0) or 1.0

    scales = {"score": metric.most or largest("score"), "loss": largest("loss", "train_loss")}
    width = (picture.width - MARGIN - 10) / most
    for i, panel in enumerate(panels):
        if i and i % most == 0:
            picture.height += PANEL_HEIGHT + 6
        x = MARGIN + i % most * width
        _draw_panel(picture, x, width - 14, panel, metric, scales, first=i % most == 0)
    picture.height += PANEL_HEIGHT + 10


def _draw_panel(
    picture: Picture, x: float, width: float, panel: Panel, metric: Metric, scales: dict[str, float], first: bool
) -> None:
    """Draw the score over epochs and beneath it the loss, each from 0 to what `scales` say, one line for each of the curves.

    The corners have the last values, the mean of several; `first` panels of a row have the scales beside them.
    """
    title, curves, epochs = panel
    faded = partial(picture.text, color=FADED)
    picture.text(x, picture.height + 13, title, bold=True, room=width)
    top = picture.height + 20
    low = top + SCORE_HEIGHT + 8
    upper, lower = (top, SCORE_HEIGHT, scales["score"]), (low, LOSS_HEIGHT, scales["loss"])
    highest_score = metric.headed(f"{metric.scale * scales['score']:.3g}")
    for (place, height, _), highest in ((upper, highest_score), (lower, f"{scales['loss']:.3g}")):
        picture.box(x, place, width, height, fill="#F6F6F6", radius=0)
        picture.line([(x, place), (x, place + height), (x + width, place + height)], color=FAINT, width=1)
        if first:
            faded(x - 4, place + 10, highest, anchor="end")
            faded(x - 4, place + height, "0", anchor="end")
    faded(x, low + LOSS_HEIGHT + 15, "0")
    end = f"{epochs:,.0f} epochs" if epochs >= 100 else f"{epochs:.3g} epochs"
    faded(x + width, low + LOSS_HEIGHT + 15, end, anchor="end")
    for name, (_, look) in reversed(LINES.items()):
        place, height, scale = upper if name == "score" else lower
        last = []
        for points in ([*_points(rows, name)] for rows in curves):
            across = [x + width * min(1.0, at / (epochs or math.inf)) for at, _ in points]
            down = [place + height * (1 - min(1.0, value / scale)) for _, value in points]
            spots = list(zip(across, down, strict=True))
            if len(spots) > 1:
                picture.line(spots, width=1 if look["dashed"] else 1.8, **look)
            if spots and not look["dashed"]:
                picture.box(spots[-1][0] - 2.5, spots[-1][1] - 2.5, 5, 5, fill=look["color"], radius=2.5)
                last.append(points[-1][1])
        if last:  # in the half in which the curve does not end
            words = metric.written(fmean(last), " ") if name == "score" else f"{fmean(last):.3f}"
            at = place + (height - 5 if fmean(last) > scale / 2 else 13)
            picture.text(x + width - 4, at, words, color=look["color"], bold=True, anchor="end")


def curve_legend(picture: Picture, metric: Metric, numbers: str = "last values") -> None:
    """Say what the lines and the numbers of the panels beneath are."""
    picture.height += 26
    x, y = MARGIN, picture.height - 10
    for words, look in ((words or metric.label, look) for words, look in LINES.values()):
        picture.line([(x, y - 4), (x + 22, y - 4)], width=1.8, **look)
        picture.text(x + 27, y, words)
        x += 45 + len(words) * 12 * LETTER
    picture.text(x, y, f"numbers: {numbers}")


def _points(rows: Rows, name: str) -> Iterable[tuple[float, float]]:
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
    options = {}
    for (strategy, seed, phase, index), table in by_phase(results, "seed"):
        name = phase_name(phase, index)
        options[f"{label(strategy)} ({strategy}), seed {seed}: {name}"] = {name: table}
    menu = ipywidgets.Dropdown(options=list(options), description="phase", layout={"width": "36rem"})
    return with_picture(menu, lambda chosen: learning_curves(options[chosen]))
