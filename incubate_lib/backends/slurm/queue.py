"""What Slurm knows of a run's jobs."""

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from incubate_lib.backends.slurm.limits import call
from incubate_lib.backends.slurm.sbatch import job_name
from incubate_lib.config import SettingsError
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.training.files import read_json

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


def submitted(experiment: Experiment) -> dict[str, str]:
    """Return the jobs that were submitted for this experiment: phase key → id."""
    return read_json(experiment.path / "slurm.json") or {}


def jobs_of(experiment: Experiment) -> dict[str, Job]:
    """Return the jobs that Slurm still knows of this experiment: phase key → job; SettingsError if Slurm does not answer."""
    ids = submitted(experiment)
    if not ids:
        return {}
    output = call("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%r|%N|%j")
    found = (Job(*line.split("|", 4)) for line in output.splitlines() if line.count("|") >= 4)
    known = {(job.id, job.name): job for job in found}
    pairs = ((key, known.get((number, job_name(experiment, key)))) for key, number in ids.items())
    return {key: job for key, job in pairs if job}  # names too: a new cluster counts from one again


def active_jobs(experiment: Experiment) -> dict[str, Job]:
    """Return the jobs of this experiment that wait or run."""
    return {key: job for key, job in jobs_of(experiment).items() if job.is_active}


def cancel(*how: str, ids: Sequence[str]) -> None:
    """Cancel some jobs, or signal them."""
    if ids:
        with contextlib.suppress(SettingsError):  # some have just ended
            call("scancel", *how, *ids)
