"""Execute one notebook of a plan in a process of its own, here or inside a job; know what is complete, and what is not."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import Process
from pathlib import Path
from typing import Any

from rich.console import Console

from incubate_lib.config import SettingsError
from incubate_lib.pipeline.graph import Node, Plan
from incubate_lib.training.lease import Lease, holder
from incubate_lib.training.runs import read_json, write_json

ANALYSIS = "06_analysis"


@dataclass
class Execution:
    """One notebook that is being executed."""

    process: Process
    log: Path
    gpus: list[str] = field(default_factory=list)  # that it may use


def start(
    folder: Path,
    parameters: dict[str, Any],
    *,
    threads: int,
    notebook: str | None = None,
    output: str | None = None,
    phase: str | None = None,
    own: list[str] | None = None,
) -> Execution:
    """Start a notebook, to be kept as `output`, or a phase alone, in a process of its own, with its cores and GPUs.

    What it prints is appended to log.txt.
    """
    from incubate_lib.pipeline import warm

    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    env = os.environ | {"INCUBATE_THREADS": str(threads), "INCUBATE_HEADLESS": "1"}
    if own:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    if notebook:
        return Execution(warm.start(notebook, str(folder / output), parameters, log=str(log), env=env), log, own or [])
    return Execution(warm.start_phase(phase, parameters, log=str(log), env=env), log, own or [])


def clear_log(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_bytes(b"")


def fair_threads(jobs: int) -> int:
    """Return the threads of each of some notebooks side by side, so that they do not crowd the cores."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def kill(job: Execution) -> None:
    """End a notebook at once; its kernel ends with it, and what it had not saved is lost."""
    job.process.kill()
    job.process.join()


def last_error(log: Path, start: int = 0) -> str | None:
    """Return the last error a log tells of, from byte `start` on."""
    try:
        text = log.read_bytes()[start:].decode(errors="replace")
    except OSError:
        return None
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else None


def is_complete(node: Node) -> bool:
    """Whether a phase is finished and its executed notebook is there."""
    return node.finished() is not None and (node.folder.path / "notebook.ipynb").exists()


def is_finished(plan: Plan) -> bool:
    """Whether all phases and the analysis are done."""
    return all(is_complete(node) for node in plan.nodes) and analysed(plan)


def _seen(plan: Plan) -> dict[str, str | None]:
    """Return the SHA-256 of each final network that a report would show; None of one that is not finished."""
    finals = {f"{name} {seed}": node.summary() for (name, seed), node in plan.finals.items()}
    return {name: summary and summary["weights_sha256"] for name, summary in finals.items()}


def analysed(plan: Plan) -> bool:
    """Whether the analysis notebook and the report show exactly the results of this plan."""
    path = plan.experiment.path
    there = (path / f"{ANALYSIS}.ipynb").exists() and (path / "report.html").exists()
    return there and read_json(path / "analysed.json") == _seen(plan)


def analyse(plan: Plan, source: dict[str, Any], console: Console, threads: int) -> int:
    """Run the analysis notebook and return an exit status."""
    path = plan.experiment.path
    strategies, seeds = (list(dict.fromkeys(part)) for part in zip(*plan.finals, strict=True))
    console.print("Analysis …")
    seen, parameters = _seen(plan), source | {"strategies": strategies, "seeds": seeds}
    job = start(path, parameters, notebook=ANALYSIS, output=f"{ANALYSIS}.ipynb", threads=threads)
    try:
        job.process.join()
    except KeyboardInterrupt:
        kill(job)
        raise
    if job.process.exitcode:
        console.print(f"FAILED analysis: {last_error(job.log)}\n       log: {job.log}", soft_wrap=True, markup=False)
        return 1
    write_json(path / "analysed.json", seen)
    return 0


@contextlib.contextmanager
def only_run(path: Path) -> Iterator[None]:
    """Hold an experiment for one `incubate run`; SettingsError while another one is at work in it."""
    lease = Lease.take(path / "lease")
    if lease is None:
        other = holder(path / "lease") or {}
        message = f"process {other.get('pid')} on {other.get('host')}"
        raise SettingsError(f"another `incubate run` ({message}) is at work in {path}")
    with lease.held():
        yield


def is_running(path: Path) -> bool:
    """Whether an `incubate run` is at work in this experiment."""
    return holder(path / "lease") is not None
