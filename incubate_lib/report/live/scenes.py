"""What networks find in scenes, drawn beside what is there: boxes and masks, or the class of each pixel."""

import json
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from incubate_lib import tasks
from incubate_lib.data.scenes.masks import decode
from incubate_lib.data.scenes.views import Seen
from incubate_lib.phases.recipes import load_trained
from incubate_lib.pipeline.graph import Node
from incubate_lib.report.style import Figure

SURE = 0.5  # the score from which on an object that was found is drawn
COLOURS = colormaps["tab10"].colors
DARK = 26  # of 255; darker grey is drawn black: the noise of generated scenes would fill files


@torch.no_grad()
def scene_figure(nodes: dict[str, Node], num: int = 5) -> Figure:
    """Draw images that are evaluated on, what they show, and what each finished network finds in them; a row each."""
    first = next(iter(nodes.values()))
    data, task = first.data()[1], tasks.get(first.settings.task)
    images, seen = batch = data.some(torch.linspace(0, len(data) - 1, num).long())
    names = data.source.classes
    rows: dict[str, list[Any]] = {"image": [[]] * num, "what it shows": [one.truth for one in seen]}
    for name, node in nodes.items():
        output = load_trained(node.settings, node.folder, node.facts.outputs).eval()(images)
        found = [json.loads(line)["found"] for line in task.noted(output, batch)]
        found = [[one for one in objects if one["score"] >= SURE] for objects in found]
        rows[name] = found or list(output.argmax(1).numpy())
    figure = Figure(figsize=(1.5 * num, 1.65 * len(rows) + 0.5), layout="constrained")
    pixels = (255 * (images * data.std + data.mean)).round().byte().permute(0, 2, 3, 1).numpy()
    for line, (title, shown) in zip(figure.subplots(len(rows), num, squeeze=False), rows.items(), strict=True):
        for axis, *what in zip(line, pixels, seen, shown, strict=True):
            _draw(axis, *what, names)
        line[0].set_title(title, loc="left", fontsize=10).set_in_layout(False)
    handles = [Patch(color=_colour(i), label=name) for i, name in enumerate(names[: len(COLOURS)])]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    return figure


def _draw(axis: Axes, pixels: np.ndarray, seen: Seen, shown: Any, names: list[str]) -> None:
    """Draw a square of an image, and over it the class of each of its pixels, or objects in the image's own pixels."""
    truth, size = seen.truth, len(pixels)
    height, width = truth.shape if isinstance(truth, np.ndarray) else (truth["height"], truth["width"])
    square = (0, size * width / seen.size[1], size * height / seen.size[0], 0)  # in the image's own pixels
    axis.imshow(pixels, cmap="gray", vmin=DARK, vmax=255, extent=square)
    if isinstance(shown, np.ndarray):
        _cover(axis, shown, (0, width, height, 0) if shown is truth else square, names)
    for one in shown["objects"] if isinstance(shown, dict) else shown if isinstance(shown, list) else ():
        x, y, *sides = one["bbox"]
        axis.add_patch(Rectangle((x, y), *sides, fill=False, color=_colour(one["label"] - 1)))
        axis.text(x, y, names[one["label"] - 1], color="white", fontsize=7, backgroundcolor=_colour(one["label"] - 1))
        mask = decode(one["segmentation"], height, width)
        _cover(axis, np.where(mask, one["label"] - 1, len(names)), (0, width, height, 0), names)
    axis.set(xticks=[], yticks=[], xlim=(0, min(width, square[1])), ylim=(min(height, square[2]), 0))


def _cover(axis: Axes, classes: np.ndarray, extent: tuple[float, ...], names: list[str]) -> None:
    """Lay colours over the pixels that have a class, but for the background."""
    colours = np.array([(*_colour(i), 0.0 if name == "background" else 0.6) for i, name in enumerate(names)] + [(0.0,) * 4])
    axis.imshow(colours[np.minimum(classes, len(names))], extent=extent, interpolation="nearest")


def _colour(i: int) -> tuple[float, float, float]:
    return COLOURS[i % len(COLOURS)]
