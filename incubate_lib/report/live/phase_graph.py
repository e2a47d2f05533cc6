"""The graph of a run's phases with their states, and their learning curves beneath it."""

from itertools import groupby

from incubate_lib.pipeline.graph import Node, Plan, closure, longest
from incubate_lib.report.live.curves import curve_legend, draw_row
from incubate_lib.report.live.picture import FAINT, Picture, beneath_one_another
from incubate_lib.report.live.progress import Phase, Reader, duration
from incubate_lib.report.style import Figure
from incubate_lib.report.words import label, phase_name

MANY = 4  # rows of phases; where there are more, those that are done or wait are told in one line each
COLORS = {  # of states: Okabe and Ito's, and pale for the ground; the word stands in the box as well
    state: colors
    for colors, states in {
        ("#009E73", "#E0F3EE"): ["done"],
        ("#0072B2", "#DDECF6"): ["running"],
        ("#56B4E9", "#EAF5FC"): ["starting", "queued"],
        ("#E69F00", "#FCF2DD"): ["stopped", "ending", "interrupted"],
        ("#D55E00", "#FAE7DC"): ["failed", "lost", "unreadable"],
        ("#CC79A7", "#F8ECF3"): ["skipped"],
        ("#999999", "#F4F4F4"): ["waiting"],
    }.items()
    for state in states
}
WIDTH, GAP, BOX_HEIGHT, BOX_STEP = 980, 34, 42, 48  # of the graph, in pixels


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
    columns = max([max(_depths(group).values()) for _, group in shown], default=4)
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
            curve_legend(picture)
        draw_row(picture, title, panels)


def _panel(phase: Phase, title: str) -> tuple[str, list, float]:
    return title, [phase.rows], phase.node.settings.training.epochs


def _name(node: Node) -> str:
    s = node.settings
    return phase_name(s.phase, s.module_index, len(s.target_depths)) + (", small images" if s.small_images else "")


def _depths(group: list[Phase]) -> dict[str, int]:
    """Return for each phase how many phases stand in the longest way to it, itself counted."""
    return longest([phase.node for phase in group], dict.fromkeys((phase.node.key for phase in group), 1))


def _draw_folded(picture: Picture, title: str, group: list[Phase]) -> None:
    line = group[-1].line
    color, pale = COLORS[line.state]
    picture.box(10, picture.height + 3, WIDTH - 20, 24, fill=pale, edge=color)
    text = f"{line.state}, top-1 {line.accuracy}" if line.accuracy else line.state
    picture.text(20, picture.height + 19, title, bold=True, room=WIDTH - 300)
    picture.text(WIDTH - 20, picture.height + 19, f"{len(group)} phase{'s' * (len(group) > 1)} {text}", anchor="end")
    picture.height += 32


def _draw_alone(picture: Picture, alone: list[tuple[str, Phase]], columns: int, width: float) -> None:
    """Draw phases that are a whole strategy each, beside one another."""
    picture.text(10, picture.height + 16, "in one piece", size=13, bold=True)
    for i, (title, phase) in enumerate(alone):
        row, column = divmod(i, columns)
        _draw_box(picture, 10 + column * (width + GAP), picture.height + 26 + row * BOX_STEP, width, phase, title)
    picture.height += 26 + -(-len(alone) // columns) * BOX_STEP + 8


def _draw_group(picture: Picture, title: str, group: list[Phase], width: float, drawn: set[str]) -> None:
    depths = _depths(group)
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
    line, (color, pale) = phase.line, COLORS.get(phase.line.state, COLORS["waiting"])
    hint = line.plain() + (f"; {line.where}" if line.where else "")
    picture.box(x, y, width, BOX_HEIGHT, fill=pale, edge=color, dashed=shared, hint=hint)
    state = line.state + (" (shared)" if shared else "")
    if phase.seconds is not None:
        state += f", {duration(phase.seconds)} left"
    picture.text(x + 8, y + 15, title, bold=True, room=width - (100 if line.accuracy else 16))
    picture.text(x + width - 8, y + 15, line.accuracy and f"top-1 {line.accuracy}", anchor="end")
    picture.text(x + 8, y + 30, state, room=width - 16)
    picture.box(x + 8, y + 34, width - 16, 4, fill="white", radius=2)
    if phase.share:
        picture.box(x + 8, y + 34, max(4.0, (width - 16) * phase.share), 4, fill=color, radius=2)


def snapshot(plan: Plan) -> Figure:
    """Draw how far a run is: the graph of its phases with their states, and beneath it their curves so far."""
    return beneath_one_another(*draw(plan, Reader(plan).phases()))
