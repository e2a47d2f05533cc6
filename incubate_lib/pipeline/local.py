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

from incubate_lib.config import SettingsError
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
from incubate_lib.pipeline.graph import Node, Plan
from incubate_lib.pipeline.view import Line, node_line, render

POLL_SECONDS = 0.3
SUMMARY_SECONDS = 15.0  # between lines when the output is not a terminal


@dataclass
class Pool:
    """State of a run: what waits, what runs, what failed and why."""

    plan: Plan
    source: dict[str, Any]  # preset and overrides, as the notebooks take them
    jobs: int
    console: Console
    waiting: dict[str, Node] = field(default_factory=dict)
    running: dict[str, Execution] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    stopping: bool = False

    @property
    def stop_file(self) -> Path:
        return self.plan.experiment.path / STOP_FILE

    def run(self) -> None:
        """Run everything that is missing; fills `failed` and `skipped`."""
        nodes = {node.key: node for node in self.plan.nodes}
        self.waiting = {key: node for key, node in nodes.items() if not is_complete(node)}
        done = len(nodes) - len(self.waiting)
        told = f"{self.plan.experiment.path.name}: {done} of {len(nodes)} phases are done already"
        self.console.print(told, highlight=False, markup=False)
        if not self.waiting:
            return
        order = _remaining_path(self.plan)
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with _View(self) as show:
                while self.running or (self.waiting and not self.stopping):
                    if self.stopping or self.stop_file.exists():
                        self.stopping = True
                        self.stop_file.touch()  # again and again, for phases that begin only now
                    for key in sorted(self.waiting, key=order.get, reverse=True):
                        self._consider(nodes[key])
                    for key in list(self.running):
                        self._look_after(nodes[key])
                    show()
                    time.sleep(POLL_SECONDS)
        finally:
            for job in self.running.values():
                kill(job)
            self.stop_file.unlink(missing_ok=True)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _consider(self, node: Node) -> None:
        """Start a waiting node if its inputs are there and a place is free; skip it if one of them failed."""
        lost = [n.key for n in node.inputs.values() if n.key in self.failed or n.key in self.skipped]
        if lost:
            self.skipped[node.key] = f"needs {lost[0]}"
            del self.waiting[node.key]
        elif not self.stopping and len(self.running) < self.jobs and all(is_complete(n) for n in node.inputs.values()):
            parameters = self.source | {"strategy": node.strategy, "seed": node.settings.seed}
            if node.settings.module_index is not None:
                parameters["module_index"] = node.settings.module_index
            devices = self.plan.experiment.settings.machine.devices
            busy = Counter(gpu for job in self.running.values() for gpu in job.gpus)
            free = sorted(gpus(), key=lambda gpu: busy[gpu])[:devices]  # stable: the first of the least busy
            clear_log(node.folder.path)
            self.running[node.key] = start(
                node.notebook, node.folder.path, "notebook.ipynb", parameters, threads=fair_threads(self.jobs), own=free
            )
            del self.waiting[node.key]

    def _look_after(self, node: Node) -> None:
        """Notice when a running node has ended, and how."""
        job = self.running[node.key]
        code = job.process.exitcode
        if code is None:
            return
        del self.running[node.key]
        if is_complete(node):
            return
        status = node.folder.status()
        self.stopping = self.stopping or self.stop_file.exists()
        if self.stopping and (status["state"] == "stopped" or code < 0):
            return
        if code == 0:
            self.failed[node.key] = "its notebook trained other settings: was the settings file changed meanwhile?"
        else:
            self.failed[node.key] = last_error(job.log) or status.get("error") or f"ended with exit status {code}"

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stopping:  # the second time: at once
            for job in self.running.values():
                kill(job)
            return
        self.stopping = True
        self.console.print("\nStopping: phases save a checkpoint first (again: at once) …")

    def lines(self) -> list[Line]:
        lines = []
        for node in self.plan.nodes:
            line = node_line(node)
            if node.key in self.failed:
                line.state, line.note = "failed", self.failed[node.key]
            elif node.key in self.skipped:
                line.state, line.note = "skipped", self.skipped[node.key]
            elif node.key in self.running and line.state != "running":
                line.state = "starting" if line.state != "done" else "finishing"
            elif node.key in self.waiting and line.state in ("failed", "interrupted", "stopped"):
                line.state = "waiting"
            lines.append(line)
        return lines


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
    experiment = plan.experiment
    pool = Pool(plan, source, jobs, console)
    pool.stop_file.unlink(missing_ok=True)
    pool.run()
    for key, reason in pool.failed.items():
        log = experiment.path / key / "log.txt"
        console.print(f"FAILED {key}: {reason}\n       log: {log}", soft_wrap=True, highlight=False, markup=False)
    for key, reason in pool.skipped.items():
        console.print(f"skipped {key}: {reason}", soft_wrap=True, highlight=False)
    if pool.failed:
        return 1
    if pool.stopping:
        console.print("Stopped. The same command goes on from here.")
        return 130
    status = 0
    if not analysed(plan):
        clear_log(experiment.path)
        status = analyse(plan, source, console, fair_threads(1))
    console.print(f"Finished in {time.monotonic() - began:.0f} s.", highlight=False)
    return status


def _remaining_path(plan: Plan) -> dict[str, int]:
    """Return for each node the FLOPs of the longest way from it to an end: those are started first."""
    longest = dict(plan.flops)
    for node in reversed(plan.nodes):
        for before in node.inputs.values():
            longest[before.key] = max(longest[before.key], plan.flops[before.key] + longest[node.key])
    return longest


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
