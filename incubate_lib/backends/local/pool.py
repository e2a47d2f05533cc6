"""A pool of processes on this machine: a phase each, side by side where the graph allows."""

import contextlib
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Process
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from incubate_lib.config import data_folder
from incubate_lib.pipeline.execution import clear_log, fair_threads, kill, last_error, start, stop_phases
from incubate_lib.pipeline.experiment import STOP_FILE
from incubate_lib.pipeline.graph import Node, Plan, remaining, to_do
from incubate_lib.pipeline.view import Line, line_of, node_line, render
from incubate_lib.training.runs import GONE

POLL_SECONDS = 0.3
FULL = 1 << 20  # bytes; a process that finds less can often not even say why it ended
SUMMARY_SECONDS = 15.0  # between lines when the output is not a terminal


@dataclass(eq=False)
class Task:
    """A phase in the pool."""

    node: Node
    left: float  # FLOPs from its beginning to the end of what needs it
    state: str = "over"  # waiting, running, failed, skipped or over
    note: str = ""  # why it failed or was skipped
    other: str | None = None  # who else trains it, and is waited for
    process: Process | None = None
    gpus: list[str] = field(default_factory=list)  # that it may use
    line: Line | None = None  # once it is done, and stays so: there may be hundreds


class Pool:
    """A run's state: what waits, what runs, what failed and why. Without `notebooks` phases alone, for the many of a study."""

    def __init__(self, plan: Plan, jobs: int, console: Console, *, notebooks: bool = True) -> None:
        self.plan, self.jobs, self.console, self.notebooks = plan, jobs, console, notebooks
        self.stopping = False
        self.running: list[Task] = []
        self.stop_file = plan.experiment.path / STOP_FILE
        left = remaining(plan.nodes, plan.flops)
        self.tasks = {node.digest: Task(node, left[node.key]) for node in plan.nodes}
        self.states: dict[str, str] = {}  # of phases, as they were printed last
        self.summary = time.monotonic()  # when those that run were printed last
        self.status = 0  # exit status: 0 all is done, 1 something failed, 130 stopped
        self.kept: set[str] = set()  # phases that go on when this run stops, because another one needs them

    def having(self, state: str) -> list[Task]:
        return [task for task in self.tasks.values() if task.state == state]

    def is_done(self, node: Node) -> bool:
        return node.job.is_complete(self.notebooks)

    def rounds(self) -> Iterator[None]:
        """Run everything that is missing and say what failed; yield between two checks of it, and have `status` in the end."""
        missing = to_do([task.node for task in self.tasks.values()], self.is_done)
        done = len(self.tasks) - len(missing)
        self._print(f"{self.plan.experiment.path.name}: {done} of {len(self.tasks)} phases are done already")
        for node in missing:
            self.tasks[node.digest].state = "waiting"
            if node.summary() and not node.finished():
                what = "what starts from it, only if it ends in other weights than before"
                self._print(f"{node.title}: {GONE}; {what}")
        live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        with self._at_work(), live or contextlib.nullcontext():
            while self.running or (self.having("waiting") and not self.stopping):
                if self._is_asked_to_stop():
                    self._stop_phases()
                for task in sorted(self.having("waiting"), key=lambda task: -task.left):
                    self.consider(task)
                for task in list(self.running):
                    self._supervise(task)
                self._show(live)
                yield
        for task in self.having("failed"):
            self._print(f"FAILED {task.node.key}: {task.note}\n       log: {task.node.folder.path / 'log.txt'}")
        for task in self.having("skipped"):
            self._print(f"skipped {task.node.key}: {task.note}")
        self.status = 1 if self.having("failed") else 130 if self.stopping else 0
        if self.status == 130:
            self._print("Stopped. The same command goes on from here.")

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Take signals; leave no process and no stop file behind."""
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for task in self.running:
                kill(task.process)
            for file in [self.stop_file, *(task.node.folder.stop_file for task in self.tasks.values() if task.process)]:
                file.unlink(missing_ok=True)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _is_asked_to_stop(self) -> bool:
        self.stopping = self.stopping or self.stop_file.exists()
        return self.stopping

    def _stop_phases(self) -> None:
        """Have phases save and stop: again and again, for those that begin only now. What another run needs goes on."""
        running = {task.node.digest: task.node.title for task in self.running if task.node.digest not in self.kept}
        for digest, other in stop_phases(running, but=self.plan.experiment.path).items():
            self.kept.add(digest)
            self._print(f"{running[digest]} goes on: run {other} needs it, too")

    def consider(self, task: Task) -> None:
        """Start a waiting phase if its inputs are there and a place is free; skip it if one of them failed."""
        inputs = task.node.inputs.values()
        before = [self.tasks[node.digest] for node in inputs if node.digest in self.tasks]
        if lost := [other for other in before if other.state in ("failed", "skipped")]:
            task.state, task.note = "skipped", f"needs {lost[0].node.key}"
        elif self.stopping or len(self.running) >= self.jobs:
            return
        elif any(other.state == "waiting" for other in before) or not all(map(self.is_done, inputs)):
            return  # what waits may look done, and be made anew once its own input is
        elif self.is_done(task.node):  # its input, trained again, has the same bits as before
            task.state = "over"
        elif (other := task.node.folder.trainer()) is None:
            self._start(task)
        elif other != task.other:
            task.other = other
            self._print(f"{task.node.title}: waits for {other}, which trains it")

    def _start(self, task: Task) -> None:
        node = task.node
        busy = Counter(gpu for other in self.running for gpu in other.gpus)
        least = sorted(gpus(), key=lambda gpu: busy[gpu])  # stable: the first of the least busy
        task.gpus, task.other = least[: node.machine.devices], None
        node.job.write()
        clear_log(node.folder.path)
        task.process = start(node.job, fair_threads(self.jobs), task.gpus, notebook=self.notebooks)
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
        error = last_error(task.node.folder.path / "log.txt") or status.get("error")
        full = shutil.disk_usage(task.node.folder.path).free < FULL
        task.note = error or (f"no space is left in {data_folder()}" if full else f"ended with exit status {code}")

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
        waits = task.state == "waiting" and not task.other  # whatever an earlier run left there
        line = line_of(node, "waiting") if waits else node_line(node)
        if task.state in ("failed", "skipped"):
            line.state, line.note = task.state, task.note
        elif task.state == "waiting" and task.other:
            line.note = f"by {task.other}"
        elif task.state == "running" and line.state != "running":
            line.state = "starting" if line.state != "done" else "finishing"
        elif line.state == "done":
            task.line = line
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
    return [str(number) for number in range(sum(map(_opens, Path("/dev").glob("nvidia[0-9]*"))))]  # as CUDA counts them


def _opens(device: Path) -> bool:
    """Whether this process may use a device; a container may show those of others."""
    try:
        os.close(os.open(device, os.O_RDWR))
    except OSError:
        return False
    return True
