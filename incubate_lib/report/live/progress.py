"""How far a run is, read from its own files: the state of each phase, its curves, what is left to do, in words.

Nothing is written. Records may be half-written, of another version or damaged; what cannot be read is reported as that.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from incubate_lib import backends
from incubate_lib.backends import Backend
from incubate_lib.pipeline.execution import is_running
from incubate_lib.pipeline.graph import Node, Plan, longest
from incubate_lib.pipeline.recorded import DAMAGE
from incubate_lib.pipeline.view import Line, line_of, node_line
from incubate_lib.training.lease import holder
from incubate_lib.training.runs import METRICS

AT_WORK = ("running", "starting", "queued", "ending")


@dataclass
class Phase:
    """One phase, as its files have it."""

    node: Node
    line: Line
    rows: list[dict[str, Any]] = field(default_factory=list)  # its evaluations
    share: float = 0.0  # of its updates that are done
    seconds: float | None = None  # that it takes yet, by its own account
    pace: tuple[float, float] = (0.0, 0.0)  # seconds and FLOPs from which its speed follows


class Reader:
    """Reads the phases of a plan, again only those whose files have changed."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.seen = plan, {}
        self.backend = backends.of(plan.experiment)
        self.messages: list[str] = []  # by the backend, for people

    def phases(self) -> list[Phase]:
        """Return all phases; of a run that was handed to a cluster this asks the cluster."""
        phases = []
        for node in self.plan.nodes:
            stamp = _stamp(node)
            if self.seen.get(node.key, (None,))[0] != stamp:
                self.seen[node.key] = (stamp, _read(node, node.flops))
            phases.append(self.seen[node.key][1])
        self.backend = backends.of(self.plan.experiment)
        if self.backend.knows(self.plan.experiment):
            phases = [replace(phase, line=replace(phase.line)) for phase in phases]  # for it adds to lines
            self.messages = self.backend.states(self.plan, [phase.line for phase in phases])
        return phases


def _stamp(node: Node) -> list[Any]:
    """Return what changes when a phase's record does: its files, the results it must have started from, who trains it."""
    path = node.folder.path
    files = [path / name for name in ("status.json", "summary.json", METRICS, "model.safetensors")]
    files += [before.folder.path / "summary.json" for before in node.inputs.values()]
    status, summary, *others = map(_changed, files)
    held = False  # a killed process changes no file
    if status and not summary:
        with contextlib.suppress(*DAMAGE):
            held = holder(path / "lease") is not None
    return [status, summary, *others, held]


def _changed(file: Path) -> tuple[int, ...] | None:
    try:
        about = file.stat()
        return about.st_mtime_ns, about.st_size, about.st_ino
    except OSError:
        return None


def _read(node: Node, flops: int) -> Phase:
    try:
        phase = Phase(node, node_line(node))
        if phase.line.state != "waiting":  # else they are of other settings, or of other inputs
            phase.rows = [row for row in node.folder.metrics() if isinstance(row, dict)]
            _read_progress(phase, flops)
        return phase
    except (*DAMAGE, ArithmeticError) as error:  # half-written, or by hand
        note = f"its records cannot be read ({type(error).__name__}: {error})"
        return Phase(node, line_of(node, "unreadable", note=note))


def _read_progress(phase: Phase, flops: int) -> None:
    node = phase.node
    if phase.line.state == "done":
        summary, phase.share = node.summary(), 1.0
        phase.pace = summary["train_seconds"] + summary["eval_seconds"], summary["train_flops"]
        return
    progress = node.folder.status().get("progress") or {}
    epochs = node.settings.training.epochs if flops else 0
    shares = [progress["step"] / progress["steps"]] if progress else []
    if phase.rows and epochs:  # also before it reports on itself
        shares.append(phase.rows[-1]["epoch"] / epochs)
    phase.share = min(1.0, max(shares, default=0.0))
    if phase.line.state == "running" and progress.get("eta_seconds") is not None:
        phase.seconds = progress["eta_seconds"]
        phase.pace = phase.seconds, flops * (1 - phase.share)


def at_work(plan: Plan, phases: list[Phase]) -> bool:
    return is_running(plan.experiment.path) or any(phase.line.state in AT_WORK for phase in phases)


def seconds_left(plan: Plan, phases: list[Phase], places: int | None) -> float | None:
    """Return about how long the run takes yet: what the machine has to do, or its longest way, whichever is longer.

    `places`: phases that go on side by side; none: as many as there are. The speed is that of the phases so far, so there is
    no answer before there are any.
    """
    seconds, flops = (sum(part) for part in zip(*(phase.pace for phase in phases), strict=True))
    if not flops:
        return None
    left, states = {}, {phase.node.key: phase.line.state for phase in phases}
    for phase in phases:
        key = phase.node.key
        counted = phase.node.flops * (1 - phase.share) * seconds / flops
        left[key] = 0.0 if states[key] == "done" else phase.seconds or counted
    way = max(longest(plan.nodes, left).values())
    if places is None:
        return way
    unfinished = [phase.node for phase in phases if phase.line.state not in ("done", "running")]
    running = sum(state == "running" for state in states.values())
    if not any(all(states[before.key] == "done" for before in node.inputs.values()) for node in unfinished):
        running = max(running, places)  # else there are no more places than are taken
    return max(sum(left.values()) / max(1, running), way)


def duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def headline(plan: Plan, phases: list[Phase], backend: Backend) -> str:
    """Say in a sentence how far a run is."""
    count = Counter(phase.line.state for phase in phases)
    lines = [f"{plan.experiment.path.name}: {count['done']} of {len(phases)} phases done"]
    lines += [f"{number} {state}" for state, number in count.items() if state not in ("done", "waiting")]
    if at_work(plan, phases):
        left = seconds_left(plan, phases, backend.places(plan.experiment.settings.machine.devices))
        if count["done"] == len(phases):
            lines.append("the analysis is under way")
        elif not any(count[state] for state in AT_WORK):
            lines.append("the next are being started")
        elif left is not None:
            lines.append(f"about {duration(left)} left")
    elif count["done"] < len(phases):
        lines.append("nothing is at work; `start_run` or `incubate run` goes on from here")
    return ", ".join(lines)


def table_of(phases: list[Phase], place: str) -> pd.DataFrame:
    """Return a row for each phase: state, epoch, loss, score, ETA; and what a cluster says, and what went wrong, if anything.

    `place` heads the column that says where a phase is, or why it waits.
    """
    titles = Counter(phase.line.title for phase in phases)  # meta models of several strategies have the same
    rows = []
    for phase in phases:
        line = phase.line
        name = line.title + (f", {phase.node.strategy}" if titles[line.title] > 1 else "")
        where = {place: line.where, "note": line.note}
        rows.append({"phase": name, "state": line.state, **line.numbers(), **where})
    shown = pd.DataFrame(rows)
    return shown.drop(columns=[name for name in (place, "note") if (shown[name] == "").all()])
