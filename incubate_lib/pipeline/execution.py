"""Execute one notebook of a plan in a process of its own, here or inside a job; know what is complete, and what is not."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import Process
from pathlib import Path
from typing import Any

from rich.console import Console

from incubate_lib import backends
from incubate_lib.config import SettingsError, data_folder
from incubate_lib.phases.job import Job
from incubate_lib.pipeline.experiment import INDEX, STOP_FILE, Experiment, is_record
from incubate_lib.pipeline.graph import Plan
from incubate_lib.training.files import read_json, write_json
from incubate_lib.training.lease import Lease, holder, in_words
from incubate_lib.training.runs import PhaseFolder

ANALYSIS = "06_analysis"
Parameters = dict[str, Any]  # of a notebook


def start(job: Job, threads: int, gpus: Sequence[str] = (), *, notebook: bool = True) -> Process:
    """Start a phase in a process of its own with its cores and GPUs: its notebook, if it has one and that is wanted."""
    from incubate_lib.pipeline import warm

    what, output = job.work if notebook else (job.settings.phase, None)
    return warm.start(what, {"phase": job.path}, job.folder.path, output, threads, gpus)


def clear_log(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_bytes(b"")


def fair_threads(jobs: int) -> int:
    """Return the threads of each of some notebooks side by side, so that they do not crowd the cores."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def kill(process: Process) -> None:
    """End a notebook at once; its kernel ends with it, and what it had not saved is lost."""
    process.kill()
    process.join()


def last_error(log: Path, start: int = 0) -> str | None:
    """Return the last error in a log, from byte `start` on."""
    try:
        text = log.read_bytes()[start:].decode(errors="replace")
    except OSError:
        return None
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else None


def is_finished(plan: Plan) -> bool:
    """Whether all phases and the analysis are done."""
    return all(node.job.is_complete() for node in plan.nodes) and analysed(plan)


def _seen(plan: Plan) -> dict[str, str | None]:
    """Return the SHA-256 of each final network that a report would show; None of one that is not finished."""
    finals = {f"{name} {seed}": node.summary() for (name, seed), node in plan.finals.items()}
    return {name: summary and summary["weights_sha256"] for name, summary in finals.items()}


def analysed(plan: Plan) -> bool:
    """Whether the analysis notebook and the report show exactly the results of this plan."""
    path = plan.experiment.path
    there = (path / f"{ANALYSIS}.ipynb").exists() and (path / "report.html").exists()
    return there and read_json(path / "analysed.json") == _seen(plan)


def analyse(plan: Plan, parameters: Parameters, console: Console, threads: int) -> int:
    """Run the analysis notebook and return an exit status."""
    from incubate_lib.pipeline import warm

    path, seen = plan.experiment.path, _seen(plan)
    console.print("Analysis …")
    process = warm.start(ANALYSIS, parameters, path, f"{ANALYSIS}.ipynb", threads)
    try:
        process.join()
    except KeyboardInterrupt:
        kill(process)
        raise
    if process.exitcode:
        log = path / "log.txt"
        console.print(f"FAILED analysis: {last_error(log)}\n       log: {log}", soft_wrap=True, markup=False)
        return 1
    write_json(path / "analysed.json", seen)
    return 0


def stop_phases(digests: Iterable[str], but: Path) -> dict[str, str]:
    """Have whoever trains these phases save and stop; return those that go on, and the name of the run that needs each.

    That is any run or study at work, here or elsewhere, other than the one in the folder `but`.
    """
    digests, needed = set(digests), {}
    for file in (*data_folder().glob(f"runs/*/{INDEX}"), *data_folder().glob(f"studies/*/{INDEX}")):
        path, record = file.parent, read_json(file)
        named = {phase["digest"] for phase in record["phases"].values()} if is_record(record) else set()
        shared = digests & named
        if shared and path != but and not (path / STOP_FILE).exists() and is_at_work(path):
            needed |= dict.fromkeys(shared, path.name)
    for digest in digests - needed.keys():
        PhaseFolder.of(digest).stop_file.touch()
    return needed


def is_at_work(path: Path) -> bool:
    """Whether a run is at work: its process, or jobs that were handed over."""
    run = Experiment(None, path)
    return is_running(path) or backends.of(run).still_active(run) > 0


@contextlib.contextmanager
def only_run(path: Path) -> Iterator[None]:
    """Hold an experiment for one `incubate run`; SettingsError while another one is at work in it.

    From now on it can be asked to stop; what an earlier one was asked is forgotten before.
    """
    if not is_running(path):
        (path / STOP_FILE).unlink(missing_ok=True)
    lease = Lease.take(path / "lease")
    if lease is None:
        raise SettingsError(f"another `incubate run` ({who_runs(path)}) is at work in {path}")
    with lease.held():
        yield


def who_runs(path: Path) -> str | None:
    """Say which process of which host is at work in this experiment, and since when; None if no `incubate run` is."""
    other = holder(path / "lease")
    return other and in_words(other)


def is_running(path: Path) -> bool:
    """Whether an `incubate run` is at work in this experiment."""
    return who_runs(path) is not None
