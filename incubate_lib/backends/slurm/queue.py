"""What Slurm knows of a run's jobs.

The run's slurm.json lists them, and so does the folder of each phase its own: a phase has one job, whichever runs need it.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from incubate_lib.backends.slurm.limits import call
from incubate_lib.config import SettingsError
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.training.files import read_json, write_json
from incubate_lib.training.runs import PhaseFolder

FILE = "slurm.json"
ENDED = re.compile("COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY|BOOT_FAIL|DEADLINE|PREEMPTED|REVOKED")


@dataclass(frozen=True)
class Job:
    """A job as Slurm sees it."""

    id: str
    state: str
    reason: str
    nodes: str
    name: str

    @property
    def is_active(self) -> bool:
        return not ENDED.fullmatch(self.state)

    @property
    def is_running(self) -> bool:
        return self.state in ("RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING")

    def describe(self) -> str:
        """Say in a few words where it is, or in Slurm's word why it waits."""
        if self.state == "PENDING":
            return f"{self.id} {self.reason}"
        return f"{self.id} {self.state.lower()}" + (f" on {self.nodes}" if self.nodes else "")


@dataclass(frozen=True)
class Queued:
    """A job that was submitted, by this run or by another that has the same phase."""

    id: str
    name: str
    digest: str | None = None  # of its phase; none: the analysis


def submitted(experiment: Experiment) -> dict[str, Queued]:
    """Return the jobs that were submitted for this experiment, by phase key."""
    file = experiment.path / FILE
    return _read(file, lambda about: {key: Queued(**job) for key, job in about.items()}) or {}


def note(experiment: Experiment, jobs: dict[str, Queued]) -> None:
    """Write down the jobs of an experiment."""
    write_json(experiment.path / FILE, {key: dataclasses.asdict(job) for key, job in jobs.items()})


def job_of(folder: PhaseFolder) -> Queued | None:
    """Return the job that was last submitted for a phase, by whatever run."""
    return _read(folder.path / FILE, lambda about: Queued(**about))


def _read(file: Path, made: Callable[[Any], Any]) -> Any:
    """Return what a record of jobs says; None where there is none, SettingsError for one of another shape."""
    if not file.exists():
        return None
    about = read_json(file)
    try:
        return made(about)
    except (AttributeError, TypeError):
        hint = "if that stays so, delete it once none of these jobs is in Slurm's queue"
        raise SettingsError(f"{file} cannot be read now, or is no record of jobs; {hint}") from None


def note_phase(folder: PhaseFolder, job: Queued) -> None:
    write_json(folder.path / FILE, dataclasses.asdict(job))


def known_jobs() -> dict[tuple[str, str], Job]:
    """Return all of this user's jobs that Slurm still knows, by id and name: a new cluster counts from one again."""
    output = call("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%r|%N|%j")
    found = (Job(*line.split("|", 4)) for line in output.splitlines() if line.count("|") >= 4)
    return {(job.id, job.name): job for job in found}


def jobs_of(experiment: Experiment) -> dict[str, Job]:
    """Return the jobs that Slurm still knows of this experiment: phase key → job; SettingsError if Slurm does not answer."""
    mine = submitted(experiment)
    known = known_jobs() if mine else {}
    return {key: known[job.id, job.name] for key, job in mine.items() if (job.id, job.name) in known}


def active_jobs(experiment: Experiment) -> dict[str, Job]:
    """Return the jobs of this experiment that wait or run."""
    return {key: job for key, job in jobs_of(experiment).items() if job.is_active}


def cancel(*how: str, ids: Sequence[str]) -> None:
    """Cancel some jobs, or signal them."""
    if ids:
        with contextlib.suppress(SettingsError):  # some have just ended
            call("scancel", *how, *ids)
