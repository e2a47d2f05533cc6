"""How the state of phases is shown in a terminal. Reads status files only."""

import os
import shutil
from collections import Counter
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from incubate_lib import tasks
from incubate_lib.data.schedule import total_steps
from incubate_lib.pipeline.graph import Node, Plan, closure
from incubate_lib.training.files import read_json
from incubate_lib.training.runs import GONE, PhaseFolder

STYLE = {"done": "green", "running": "cyan", "failed": "red", "lost": "red", "interrupted": "yellow", "stopped": "yellow"}
FEW_UPDATES = 50  # of a phase; fewer say nothing about a strategy


@dataclass
class Line:
    """One phase as people see it."""

    key: str
    title: str
    state: str
    epoch: str = ""
    loss: str = ""
    metric: str = tasks.get().score.label  # what the score is called
    score: str = ""
    eta: str = ""
    note: str = ""
    where: str = ""  # job and node, or why it waits

    def numbers(self) -> dict[str, str]:
        """Return what is counted, by the headings of tables."""
        return {"epoch": self.epoch, "loss": self.loss, self.metric: self.score, "ETA": self.eta}

    def plain(self) -> str:
        parts_text = ", ".join(f"{name} {value}" for name, value in self.numbers().items() if value)
        return " ".join(part for part in (f"{self.title}: {self.state}", parts_text, self.note) if part)


def line_of(node: Node, state: str, **more: str) -> Line:
    """Return a phase's line, its score called as its task does."""
    return Line(node.key, node.title, state, metric=tasks.get(node.settings.task).score.label, **more)


def _damage(folder: PhaseFolder) -> str:
    """Say which record of a phase is there and cannot be read, and what becomes of it; SettingsError where it is no file."""
    for name, then in {"summary.json": "the phase is trained again", "status.json": "it is written again"}.items():
        if os.path.lexists(folder.path / name) and read_json(folder.path / name) is None:
            return f"{name} is damaged; {then}"
    return ""


def node_line(node: Node) -> Line:
    """Read what a phase's folder says."""
    score, damaged = tasks.get(node.settings.task).score, _damage(node.folder)
    if summary := node.summary():
        epochs = f"{summary['epochs']:.1f}" if summary["steps"] else ""
        done = {"epoch": epochs, "loss": f"{summary['loss']:.3f}", "score": score.written(summary["score"])}
        return line_of(node, "done", **done) if node.finished() else line_of(node, "waiting", note=GONE)
    status = node.folder.status()
    if status["state"] == "done":  # finished with other settings: not this plan's
        return line_of(node, "waiting")
    line = line_of(node, status["state"], note=status.get("error") or damaged)
    progress = status.get("progress") or {}
    if progress:
        total = node.settings.training.epochs if node.settings.training else 0
        line.epoch = f"{progress.get('epoch', 0):.1f}/{total:.1f}"
        line.loss = f"{progress.get('loss', float('nan')):.3f}"
        line.score = score.written(progress.get("score", float("nan")))
        if progress.get("eta_seconds") is not None and status["state"] == "running":
            line.eta = f"{progress['eta_seconds']:.0f} s"
    return line


def matched_lengths(plan: Plan) -> list[str]:
    """Say of each strategy that is matched to another one's cost which epochs its phases have instead of those that are set."""
    settings, lines = plan.experiment.settings, {}
    for (name, _), final in plan.finals.items():
        if name in lines or not settings.is_matched(name):
            continue
        way, trained = settings.strategies[name], [node.settings for node in closure([final]) if node.settings.training]
        both = {s.seeded_as: (s.training.epochs, settings.training_of(name, s.seeded_as).epochs) for s in trained}
        lasts = [
            f"{phase} {epochs:.4g} epochs instead of {given:g}" for phase, (epochs, given) in both.items() if epochs != given
        ]
        if not lasts:
            continue
        share = "" if way.get("budget") == 1 else f"{way.get('budget'):g} times "
        what = "what K workers do in the time" if way.get("match_on") == "critical_path" else "the cost"
        lines[name] = f"{name} is matched to {share}{what} of {way.get('match')}: {', '.join(lasts)}."
    return list(lines.values())


def few_updates(plan: Plan) -> list[str]:
    """Say which phases are so short that their results say nothing about a strategy: the shortest of each kind."""
    steps: dict[str, int] = {}
    for node in plan.nodes:
        if (training := node.settings.training) and training.epochs:  # without epochs it is asked to evaluate only
            own = total_steps(training.epochs, node.facts.num_images, training.batch_size)
            steps[node.settings.seeded_as] = min(own, steps.get(node.settings.seeded_as, own))
    few = [f"{phase} {number}" for phase, number in steps.items() if number < FEW_UPDATES]
    return [f"Few updates: {', '.join(few)}. More epochs or a smaller batch_size teach more."] if few else []


def render(lines: list[Line], height: int | None = None, place: str = "where") -> Table:
    """Return a table for the terminal, with the heading `place` over what says where a phase is.

    What is done or waits is only counted where `height` lines cannot show all. With a height it is drawn again and again, and
    columns keep their widths.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    again = height is not None
    table.add_column("phase", max_width=max(22, shutil.get_terminal_size().columns - 54) if again else None)
    table.add_column("state", no_wrap=True, min_width=11 * again)
    headings = lines[0].numbers() if lines else ()
    for name, width in zip(headings, (10, 6, 6, 6)):
        table.add_column(name, justify="right", no_wrap=True, min_width=width * again)
    if placed := any(line.where for line in lines):
        table.add_column(place, overflow="fold")
    folded = Counter(line.state for line in lines if line.state in ("done", "waiting"))
    fits = height is None or len(lines) + 2 <= height
    for line in lines:
        if fits or line.state not in folded:
            state = f"[{STYLE[line.state]}]{line.state}[/]" if line.state in STYLE else line.state
            table.add_row(line.title, state, *line.numbers().values(), *([line.where] if placed else []))
            if line.note:
                table.add_row(f"  [red]{escape(line.note)}[/]")
    if not fits:
        table.add_row(", ".join(f"{count} {state}" for state, count in folded.items()) + f", of {len(lines)} phases")
    return table
