"""A pool of processes on this machine: a phase each, side by side where the graph allows."""

import contextlib
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import Process
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from incubate_lib.backends.interface import Run
from incubate_lib.pipeline.execution import clear_log, fair_threads, is_complete, kill, last_error, start
from incubate_lib.pipeline.experiment import STOP_FILE
from incubate_lib.pipeline.graph import Node, remaining, to_do
from incubate_lib.pipeline.view import Line, line_of, node_line, render
from incubate_lib.training.runs import GONE

POLL_SECONDS = 0.3
SUMMARY_SECONDS = 15.0  # between lines when the output is not a terminal


@dataclass(eq=False)
class Task:
    """A phase in the pool."""

    node: Node
    name: str  # its key, with its run where there are several
    source: dict[str, Any]  # preset and overrides, as the notebooks take them
    left: float  # FLOPs from its beginning to the end of what needs it
    state: str = "over"  # waiting, running, failed, skipped or over
    note: str = ""  # why it failed or was skipped
    process: Process | None = None
    gpus: list[str] = field(default_factory=list)  # that it may use
    line: Line | None = None  # once it is done, and stays so: there may be hundreds


class Pool:
    """A run's state: what waits, what runs, what failed and why. Without `notebooks` phases alone, for the many of a study."""

    def __init__(self, runs: list[Run], jobs: int, console: Console, *, notebooks: bool = True) -> None:
        self.runs, self.jobs, self.console, self.notebooks = runs, jobs, console, notebooks
        self.stopping = False
        self.running: list[Task] = []
        self.stop_files = list(dict.fromkeys(plan.experiment.path / STOP_FILE for plan, _ in runs))
        self.tasks: dict[Path, Task] = {}
        for plan, source in runs:
            left = remaining(plan.nodes, plan.flops)
            for node in plan.nodes:
                name = node.key if len(runs) == 1 else f"{plan.experiment.path.name}/{node.key}"
                self.tasks[node.folder.path] = Task(node, name, source, left[node.key])
        self.states: dict[str, str] = {}  # of phases, as they were printed last
        self.summary = time.monotonic()  # when those that run were printed last

    def having(self, state: str) -> list[Task]:
        return [task for task in self.tasks.values() if task.state == state]

    def is_done(self, node: Node) -> bool:
        return is_complete(node) if self.notebooks else node.finished() is not None

    def run(self) -> int:
        """Run everything that is missing and say what failed; return 0 if all is done, 1 if something failed, 130 if stopped."""
        for file in self.stop_files:
            file.unlink(missing_ok=True)
        missing = to_do([task.node for task in self.tasks.values()], self.is_done)
        names = list(dict.fromkeys(plan.experiment.path.name for plan, _ in self.runs))
        run = names[0] if len(names) == 1 else f"{len(names)} runs"
        self._print(f"{run}: {len(self.tasks) - len(missing)} of {len(self.tasks)} phases are done already")
        for node in missing:
            self.tasks[node.folder.path].state = "waiting"
            if node.summary() and not node.finished():
                what = "what starts from it, only if it ends in other weights than before"
                self._print(f"{node.title}: {GONE}; {what}")
        if missing:
            self._work()
        for task in self.having("failed"):
            self._print(f"FAILED {task.name}: {task.note}\n       log: {task.node.folder.path / 'log.txt'}")
        for task in self.having("skipped"):
            self._print(f"skipped {task.name}: {task.note}")
        if self.having("failed"):
            return 1
        if self.stopping:
            self._print("Stopped. The same command goes on from here.")
        return 130 if self.stopping else 0

    def _work(self) -> None:
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        try:
            with live or contextlib.nullcontext():
                while self.running or (self.having("waiting") and not self.stopping):
                    if self._is_asked_to_stop():
                        for file in self.stop_files:
                            file.touch()  # again and again, for phases that begin only now
                    for task in sorted(self.having("waiting"), key=lambda task: -task.left):
                        self.consider(task)
                    for task in list(self.running):
                        self._supervise(task)
                    self._show(live)
                    time.sleep(POLL_SECONDS)
        finally:
            for task in self.running:
                kill(task.process)
            for file in self.stop_files:
                file.unlink(missing_ok=True)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _is_asked_to_stop(self) -> bool:
        self.stopping = self.stopping or any(file.exists() for file in self.stop_files)
        return self.stopping

    def consider(self, task: Task) -> None:
        """Start a waiting phase if its inputs are there and a place is free; skip it if one of them failed."""
        inputs = task.node.inputs.values()
        before = [self.tasks[node.folder.path] for node in inputs if node.folder.path in self.tasks]
        if lost := [other for other in before if other.state in ("failed", "skipped")]:
            task.state, task.note = "skipped", f"needs {lost[0].node.key}"
        elif self.stopping or len(self.running) >= self.jobs:
            return
        elif any(other.state == "waiting" for other in before) or not all(map(self.is_done, inputs)):
            return  # what waits may look done, and be made anew once its own input is
        elif self.is_done(task.node):  # its input, trained again, has the same bits as before
            task.state = "over"
        # of another run's phase that is the same, what it has made will be copied
        elif all(other.node.digest != task.node.digest for other in self.running):
            self._start(task)

    def _start(self, task: Task) -> None:
        node, path = task.node, task.node.folder.path
        busy = Counter(gpu for other in self.running for gpu in other.gpus)
        least = sorted(gpus(), key=lambda gpu: busy[gpu])  # stable: the first of the least busy
        task.gpus = least[: node.experiment.settings.machine.devices]
        what, output = node.work if self.notebooks else (node.settings.phase, None)
        clear_log(path)
        parameters, threads = task.source | node.arguments, fair_threads(self.jobs)
        task.process = start(path, what, parameters, output, threads, task.gpus)
        task.state = "running"
        self.running.append(task)

    def _supervise(self, task: Task) -> None:
        """Notice when a running phase has ended, and how."""
        code = task.process.exitcode
        if code is None:
            return
        task.state = "over"
        self.running.remove(task)
        if self.is_done(task.node):
            return
        status = task.node.folder.status()
        if self._is_asked_to_stop() and (status["state"] == "stopped" or code < 0):
            return
        task.state = "failed"
        if code == 0:
            task.note = "its notebook trained other settings: was the settings file changed meanwhile?"
        else:
            error = last_error(task.node.folder.path / "log.txt") or status.get("error")
            task.note = error or f"ended with exit status {code}"

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stopping:  # the second time: at once
            for task in self.running:
                kill(task.process)
            return
        self.stopping = True
        self.console.print("\nStopping: phases save a checkpoint first (again: at once) …")

    def _line(self, task: Task) -> Line:
        if task.line:
            return task.line
        node = task.node
        waits = task.state == "waiting"  # whatever an earlier run left there
        line = line_of(node, "waiting") if waits else node_line(node)
        if task.state in ("failed", "skipped"):
            line.state, line.note = task.state, task.note
        elif task.state == "running" and line.state != "running":
            line.state = "starting" if line.state != "done" else "finishing"
        elif line.state == "done":
            task.line = line
        if len(self.runs) > 1:
            line.key, line.title = task.name, f"{node.experiment.path.name} {line.title}"
        return line

    def _show(self, live: Live | None) -> None:
        """Renew the table on a terminal; elsewhere print a line for what has changed, and now and then for what runs."""
        lines = [self._line(task) for task in self.tasks.values()]
        if live:
            live.update(render(lines, self.console.height), refresh=True)
            return
        is_time = time.monotonic() - self.summary > SUMMARY_SECONDS
        if is_time:
            self.summary = time.monotonic()
        for line in lines:
            has_changed = self.states.get(line.key, line.state) != line.state
            telling = has_changed or (is_time and line.state == "running")
            if telling and line.state in ("running", "done", "failed", "skipped"):
                self._print(line.plain())
            self.states[line.key] = line.state

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


def gpus() -> list[str]:
    """Return this machine's GPUs, as CUDA_VISIBLE_DEVICES names them, without starting CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
