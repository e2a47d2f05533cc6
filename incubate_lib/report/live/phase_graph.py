"""The graph of a run's phases with their states, and their learning curves beneath it."""

from collections import Counter
from dataclasses import dataclass

from incubate_lib import tasks
from incubate_lib.pipeline.graph import Node, Plan, closure, longest
from incubate_lib.report.live.curves import Panel, curve_legend, draw_row
from incubate_lib.report.live.picture import FAINT, Picture, beneath_one_another
from incubate_lib.report.live.progress import Phase, Reader, duration
from incubate_lib.report.style import Figure
from incubate_lib.report.words import LOOKS, label, phase_name

MANY = 4  # rows of phases; where there are more, those that are done or wait have one line each
COLORS = LOOKS["states"]  # of the edge, of the ground
WIDTH, GAP, BOX_HEIGHT, BOX_STEP = 980, 34, 42, 48  # of the graph, in pixels


@dataclass(frozen=True)
class Box:
    """A phase in the graph."""

    phase: Phase
    title: str
    column: int
    row: float

    @property
    def key(self) -> str:
        return self.phase.node.key

    @property
    def panels(self) -> list[Panel]:
        """Its learning curves: of several modules that learn together one each."""
        node, by_module = self.phase.node, {}
        for row in self.phase.rows:
            by_module.setdefault(row.get("module_index"), []).append(row)
        return [
            (self.title if index is None else phase_name("incubate", index), [rows], node.settings.training.epochs)
            for index, rows in (by_module or {None: []}).items()
        ]


def draw(plan: Plan, phases: list[Phase]) -> tuple[Picture, Picture]:
    """Draw the graph of phases, and their learning curves: a row for each strategy and seed."""
    found = {phase.node.key: phase for phase in phases}
    graph = Picture("the graph of phases, each with its state", WIDTH, 4)
    curves = Picture("learning curves of the phases", WIDTH)
    metric = tasks.get(plan.experiment.settings.task).score
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
            shown.append((title, _placed(group)))
    columns = max((box.column + 1 for _, boxes in shown for box in boxes), default=4)
    if alone:
        beside = [Box(phase, title, i % columns, i // columns) for i, (title, phase) in enumerate(alone)]
        shown.insert(0, ("in one piece", beside))
    width, drawn = min(250.0, (WIDTH - 20 - GAP * (columns - 1)) / columns), set()
    for title, boxes in shown:
        _draw_boxes(graph, title, boxes, width, drawn)
        new = [box for box in boxes if box.phase.node.settings.training and box.key not in drawn]
        if any(box.phase.rows for box in new):
            if not curves.marks:
                curve_legend(curves, metric)
            draw_row(curves, title, [panel for box in new for panel in box.panels], metric)
        drawn |= {box.key for box in boxes}
    return graph, curves


def _name(node: Node) -> str:
    s = node.settings
    size = ", small images" if s.options.get("small_images") else ""
    return phase_name(s.phase, s.module_index, len(s.target_depths)) + size


def _placed(group: list[Phase]) -> list[Box]:
    """Place phases from left to right, each behind all that it starts from."""
    depths = longest([phase.node for phase in group], dict.fromkeys((phase.node.key for phase in group), 1))
    tall, boxes = Counter(depths.values()), []
    for phase in group:
        depth = depths[phase.node.key]
        row = sum(box.column == depth - 1 for box in boxes) + (max(tall.values()) - tall[depth]) / 2
        boxes.append(Box(phase, _name(phase.node), depth - 1, row))
    return boxes


def _draw_folded(picture: Picture, title: str, group: list[Phase]) -> None:
    line = group[-1].line
    color, pale = COLORS[line.state]
    picture.box(10, picture.height + 3, WIDTH - 20, 24, fill=pale, edge=color)
    text = f"{len(group)} phase{'s' * (len(group) > 1)} {line.state}"
    text += f", {line.metric} {line.score}" if line.score else ""
    picture.text(20, picture.height + 19, title, bold=True, room=WIDTH - 300)
    picture.text(WIDTH - 20, picture.height + 19, text, anchor="end")
    picture.height += 32


def _draw_boxes(picture: Picture, title: str, boxes: list[Box], width: float, drawn: set[str]) -> None:
    picture.text(10, picture.height + 16, title, size=13, bold=True, room=WIDTH - 20)
    top = picture.height + 26
    places = {box.key: (10 + box.column * (width + GAP), top + box.row * BOX_STEP) for box in boxes}
    for box in boxes:
        x, y = places[box.key]
        for before in box.phase.node.inputs.values():
            x0, y0 = places[before.key]
            start, end, bend = (x0 + width, y0 + BOX_HEIGHT / 2), (x, y + BOX_HEIGHT / 2), x - GAP / 2
            picture.line([start, (bend, start[1]), (bend, end[1]), end], color=FAINT)
    for box in boxes:
        _draw_box(picture, *places[box.key], width, box, shared=box.key in drawn)
    picture.height += 26 + (max(box.row for box in boxes) + 1) * BOX_STEP + 8


def _draw_box(picture: Picture, x: float, y: float, width: float, box: Box, shared: bool) -> None:
    phase, line = box.phase, box.phase.line
    color, pale = COLORS.get(line.state, COLORS["waiting"])
    hint = line.plain() + (f"; {line.where}" if line.where else "")
    picture.box(x, y, width, BOX_HEIGHT, fill=pale, edge=color, dashed=shared, hint=hint)
    state = line.state + (" (shared)" if shared else "")
    if phase.seconds is not None:
        state += f", {duration(phase.seconds)} left"
    picture.text(x + 8, y + 15, box.title, bold=True, room=width - (100 if line.score else 16))
    picture.text(x + width - 8, y + 15, line.score and f"{line.metric} {line.score}", anchor="end")
    picture.text(x + 8, y + 30, state, room=width - 16)
    picture.box(x + 8, y + 34, width - 16, 4, fill="white", radius=2)
    if phase.share:
        picture.box(x + 8, y + 34, max(4.0, (width - 16) * phase.share), 4, fill=color, radius=2)


def snapshot(plan: Plan) -> Figure:
    """Draw how far a run is: the graph of its phases with their states, and beneath it their curves so far."""
    return beneath_one_another(*draw(plan, Reader(plan).phases()))
