"""Run a plan on this machine: a pool of processes, one notebook each, side by side where the graph allows."""

import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from incubate_lib.config import Frozen, SettingsError
from incubate_lib.pipeline.execution import (
    Execution,
    analyse,
    analysed,
    clear_log,
    fair_threads,
    is_complete,
    kill,
    last_error,
    only_run,
    start,
)
from incubate_lib.pipeline.experiment import STOP_FILE
from incubate_lib.pipeline.graph import Node, Plan, remaining, to_do
from incubate_lib.pipeline.view import Line, node_line, render
from incubate_lib.training.runs import GONE

POLL_SECONDS = 0.3
SUMMARY_SECONDS = 15.0  # between lines when the output is not a terminal


class LocalSettings(Frozen):
    jobs: int | None = None  # phases side by side; none: as many as `check_jobs` finds


@dataclass(repr=False)  # of all phases: setting a signal's handler would make one each time, and take seconds
class Pool:
    """State of a run: what waits, what runs, what failed and why; each phase by its folder."""

    plans: list[tuple[Plan, dict[str, Any]]]  # each with its source: preset and overrides, as the notebooks take them
    jobs: int
    console: Console
    notebooks: bool = True  # false: phases alone, for the many of a study
    nodes: dict[Path, Node] = field(default_factory=dict)
    sources: dict[Path, dict[str, Any]] = field(default_factory=dict)
    waiting: dict[Path, Node] = field(default_factory=dict)
    running: dict[Path, Execution] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)
    skipped: dict[Path, str] = field(default_factory=dict)
    done: dict[Path, Line] = field(default_factory=dict)
    stopping: bool = False

    def __post_init__(self) -> None:
        for plan, source in self.plans:
            for node in plan.nodes:
                self.nodes[node.folder.path] = node
                self.sources[node.folder.path] = source

    @property
    def stop_files(self) -> list[Path]:
        return list(dict.fromkeys(plan.experiment.path / STOP_FILE for plan, _ in self.plans))

    def is_done(self, node: Node) -> bool:
        return is_complete(node) if self.notebooks else node.finished() is not None

    def run(self) -> None:
        """Run everything that is missing; fills `failed` and `skipped`."""
        self.waiting = {node.folder.path: node for node in to_do(self.nodes.values(), self.is_done)}
        names = list(dict.fromkeys(plan.experiment.path.name for plan, _ in self.plans))
        message = names[0] if len(names) == 1 else f"{len(names)} runs"
        message += f": {len(self.nodes) - len(self.waiting)} of {len(self.nodes)} phases are done already"
        self.console.print(message, highlight=False, markup=False)
        if not self.waiting:
            return
        for node in self.waiting.values():
            if node.summary() and not node.finished():
                message = f"{node.title}: {GONE}; what starts from it, only if it ends in other weights than before"
                self.console.print(message, soft_wrap=True, highlight=False, markup=False)
        ways = [(plan, remaining(plan.nodes, plan.flops)) for plan, _ in self.plans]
        order = {node.folder.path: way[node.key] for plan, way in ways for node in plan.nodes}
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with _View(self) as show:
                while self.running or (self.waiting and not self.stopping):
                    if self.stopping or any(file.exists() for file in self.stop_files):
                        self.stopping = True
                        for file in self.stop_files:
                            file.touch()  # again and again, for phases that begin only now
                    for path in sorted(self.waiting, key=order.get, reverse=True):
                        self._consider(path)
                    for path in list(self.running):
                        self._supervise(path)
                    show()
                    time.sleep(POLL_SECONDS)
        finally:
            for job in self.running.values():
                kill(job)
            for file in self.stop_files:
                file.unlink(missing_ok=True)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _consider(self, path: Path) -> None:
        """Start a waiting phase if its inputs are there and a place is free; skip it if one of them failed."""
        node = self.nodes[path]
        before = {n.folder.path: n for n in node.inputs.values()}
        if lost := [n.key for at, n in before.items() if at in self.failed or at in self.skipped]:
            self.skipped[path] = f"needs {lost[0]}"
            del self.waiting[path]
        elif self.stopping or len(self.running) >= self.jobs or before.keys() & self.waiting.keys():
            return  # what waits may look done, and be made anew once its own input is
        elif all(self.is_done(n) for n in before.values()):
            if self.is_done(node):  # its input, trained again, has the same bits as before
                del self.waiting[path]
                return
            if any(self.nodes[other].digest == node.digest for other in self.running):
                return  # the same phase of another run: it will be copied
            parameters = self.sources[path] | {"strategy": node.strategy, "seed": node.settings.seed}
            if node.settings.module_index is not None:
                parameters["module_index"] = node.settings.module_index
            devices = node.experiment.settings.machine.devices
            busy = Counter(gpu for job in self.running.values() for gpu in job.gpus)
            free = sorted(gpus(), key=lambda gpu: busy[gpu])[:devices]  # stable: the first of the least busy
            clear_log(path)
            whole = {"notebook": node.notebook, "output": "notebook.ipynb"}
            task = whole if self.notebooks else {"phase": node.settings.phase}
            self.running[path] = start(path, parameters, **task, threads=fair_threads(self.jobs), own=free)
            del self.waiting[path]

    def _supervise(self, path: Path) -> None:
        """Notice when a running phase has ended, and how."""
        job, node = self.running[path], self.nodes[path]
        code = job.process.exitcode
        if code is None:
            return
        del self.running[path]
        if self.is_done(node):
            return
        status = node.folder.status()
        self.stopping = self.stopping or any(file.exists() for file in self.stop_files)
        if self.stopping and (status["state"] == "stopped" or code < 0):
            return
        if code == 0:
            self.failed[path] = "its notebook trained other settings: was the settings file changed meanwhile?"
        else:
            self.failed[path] = last_error(job.log) or status.get("error") or f"ended with exit status {code}"

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stopping:  # the second time: at once
            for job in self.running.values():
                kill(job)
            return
        self.stopping = True
        self.console.print("\nStopping: phases save a checkpoint first (again: at once) …")

    def lines(self) -> list[Line]:
        return [self._line(path) for path in self.nodes]

    def _line(self, path: Path) -> Line:
        if path in self.done:  # and stays so: there may be hundreds
            return self.done[path]
        node = self.nodes[path]
        waits = path in self.waiting  # whatever an earlier run left there
        line = Line(node.key, node.title, "waiting") if waits else node_line(node)
        if path in self.failed:
            line.state, line.note = "failed", self.failed[path]
        elif path in self.skipped:
            line.state, line.note = "skipped", self.skipped[path]
        elif path in self.running and line.state != "running":
            line.state = "starting" if line.state != "done" else "finishing"
        elif line.state == "done":
            self.done[path] = line
        if len(self.plans) > 1:
            run = node.experiment.path.name
            line.key, line.title = f"{run}/{line.key}", f"{run} {line.title}"
        return line


class _View:
    """Shows a pool: a live table on a terminal, a plain line now and then elsewhere."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.states, self.last = pool, {}, time.monotonic()
        self.live = Live(console=pool.console, auto_refresh=False) if pool.console.is_terminal else None

    def __enter__(self) -> Any:
        if self.live:
            self.live.__enter__()
        return self.show

    def __exit__(self, *error: Any) -> None:
        if self.live:
            self.show()
            self.live.__exit__(*error)

    def show(self) -> None:
        lines = self.pool.lines()
        if self.live:
            self.live.update(render(lines, self.pool.console.height), refresh=True)
            return
        for line in lines:
            if self.states.get(line.key, line.state) != line.state and line.state in ("running", "done", "failed", "skipped"):
                self._print(line)
            self.states[line.key] = line.state
        if time.monotonic() - self.last > SUMMARY_SECONDS:
            self.last = time.monotonic()
            for line in lines:
                if line.state == "running":
                    self._print(line)

    def _print(self, line: Line) -> None:
        self.pool.console.print(line.plain(), soft_wrap=True, highlight=False, markup=False)


def run(plan: Plan, source: dict[str, Any], jobs: int, console: Console, began: float | None = None) -> int:
    """Run a plan and its analysis; return the exit status: 0 all done, 1 something failed, 130 stopped.

    `began` is the time.monotonic() from which the seconds told at the end are counted.
    """
    experiment = plan.experiment
    experiment.create()
    with only_run(experiment.path):
        return _run(plan, source, jobs, console, time.monotonic() if began is None else began)


def _run(plan: Plan, source: dict[str, Any], jobs: int, console: Console, began: float) -> int:
    pool = Pool([(plan, source)], jobs, console)
    if status := finish(pool):
        return status
    if not analysed(plan):
        clear_log(plan.experiment.path)
        status = analyse(plan, source, console, fair_threads(1))
    console.print(f"Finished in {time.monotonic() - began:.0f} s.", highlight=False)
    return status


def finish(pool: Pool) -> int:
    """Run a pool and say what failed; return the exit status: 0 all done, 1 something failed, 130 stopped."""
    for file in pool.stop_files:
        file.unlink(missing_ok=True)
    pool.run()
    for path, reason in pool.failed.items():
        message = f"FAILED {_name(pool, path)}: {reason}\n       log: {path / 'log.txt'}"
        pool.console.print(message, soft_wrap=True, highlight=False, markup=False)
    for path, reason in pool.skipped.items():
        pool.console.print(f"skipped {_name(pool, path)}: {reason}", soft_wrap=True, highlight=False)
    if pool.failed:
        return 1
    if pool.stopping:
        pool.console.print("Stopped. The same command goes on from here.")
        return 130
    return 0


def _name(pool: Pool, path: Path) -> str:
    node = pool.nodes[path]
    return node.key if len(pool.plans) == 1 else f"{node.experiment.path.name}/{node.key}"


def gpus() -> list[str]:
    """Return this machine's GPUs, as CUDA_VISIBLE_DEVICES names them, without starting CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))


def check_jobs(jobs: int | None, devices: int = 1) -> int:
    """Return the number of notebooks to run side by side.

    By default so many that each phase has its `devices` GPUs for itself; without GPUs one per core, at most four.
    """
    if jobs is None:
        return max(1, (len(gpus()) or min(4, len(os.sched_getaffinity(0)))) // devices)
    if jobs < 1:
        raise SettingsError(f"--jobs is {jobs}; it must be at least 1")
    return jobs
