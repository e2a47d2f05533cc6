"""Hand a plan to Slurm: a job a phase, dependencies in Slurm itself, so that it goes on without us.

Plain sbatch, squeue, sinfo, scancel and, inside jobs, srun and scontrol are all that is needed; no accounting. Scripts
are made in `sbatch.py`; what a job does is in `job.py`. The truth about a phase is in its folder; Slurm is asked only
what it alone knows: what waits, why, and where it runs.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from incubate_lib.backends.slurm.job import has_ended
from incubate_lib.backends.slurm.limits import call, check
from incubate_lib.backends.slurm.sbatch import job_name, scripts, shapes, team
from incubate_lib.backends.slurm.settings import SlurmSettings
from incubate_lib.config import SettingsError, load_settings, presets
from incubate_lib.pipeline.execution import ANALYSIS, analysed, is_complete, only_run
from incubate_lib.pipeline.experiment import STOP_FILE, Experiment
from incubate_lib.pipeline.graph import Node, Plan, to_do
from incubate_lib.pipeline.view import Line
from incubate_lib.training.runs import read_json, write_atomic, write_json

ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "REVOKED",
}
RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING"}
REASONS = {  # why a job waits, where Slurm's own word does not say what to do
    "Dependency": "waits for the phases it starts from",
    "Resources": "waits for free nodes",
    "Priority": "others are before it",
    "BeginTime": "was requeued; starts again in a moment",
    "DependencyNeverSatisfied": "a phase it starts from failed; run again",
    "PartitionNodeLimit": "asks for more nodes than the partition allows, and will never start: stop it, and give it less",
    "PartitionTimeLimit": "asks for more time than the partition allows, and will never start: stop it, and lower --time",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "BadConstraints": "no node has what it asks for: stop it, and ask for something else",
    "ReqNodeNotAvail": "the nodes it may use are down or reserved",
    "JobHoldMaxRequeue": "held, because it was requeued too often; `scontrol release` lets it go",
    "launch failed requeued held": "held, because a node could not start it; `scontrol release` lets it go",
    "JobHeldUser": "held; `scontrol release` lets it go",
    "JobHeldAdmin": "held by an administrator",
    "JobLaunchFailure": "the node could not start it: does it see the run's folder?",
}


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
        return self.state not in ENDED

    def describe(self) -> str:
        """Say in a few words where it is, or in Slurm's word why it waits."""
        if self.state == "PENDING":
            return f"{self.id} {self.reason}"
        return f"{self.id} {self.state.lower()}" + (f" on {self.nodes}" if self.nodes else "")


# -- asking ---------------------------------------------------------------------------------------------------------------


def jobs_of(experiment: Experiment) -> dict[str, Job]:
    """Return the jobs that Slurm still knows of this experiment: phase key → job; SettingsError if Slurm does not answer."""
    ids = _submitted(experiment)
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


def still_active(experiment: Experiment) -> int:
    """Return how many jobs of this experiment wait or run, as far as that can be known here."""
    with contextlib.suppress(SettingsError):  # no Slurm here, or no answer: two that meet in a phase wait for each other
        return len(active_jobs(experiment))
    return 0


def was_submitted(experiment: Experiment) -> bool:
    return bool(_submitted(experiment))


def annotate(lines: list[Line], plan: Plan) -> list[str]:
    """Add to the lines of a status what Slurm says, and the analysis; return sentences for people to stand below."""
    experiment = plan.experiment
    ids = _submitted(experiment)
    if not ids:
        return []
    if ANALYSIS in ids:
        finished = all(is_complete(node) for node in plan.finals.values()) and analysed(plan)
        lines.append(Line(ANALYSIS, "analysis", "done" if finished else "waiting"))
    try:
        jobs = jobs_of(experiment)
    except SettingsError as error:
        return [f"{error}; this is from the run's own files"]
    inputs = {node.key: {before.key for before in node.inputs.values()} for node in plan.nodes}
    inputs[ANALYSIS] = {node.key for node in plan.finals.values()}
    broken: set[str] = set()  # phases that will not finish, as things are
    for line in lines:
        job = jobs.get(line.key)
        if line.key not in ids or line.state == "done":
            continue
        if job:
            line.where = job.describe()
        if job and job.is_active:
            ending = line.state in ("stopped", "failed") and has_ended(experiment.path / line.key, job.id)
            active = line.state if line.state == "running" else "ending" if ending else "starting"
            line.state = "queued" if job.state == "PENDING" else active
        elif line.state in ("waiting", "interrupted"):
            line.state = "skipped" if inputs[line.key] & broken else "lost"
            if line.state == "skipped":
                line.where = ""
            elif job is None:
                line.note = f"job {ids[line.key]} is no longer in Slurm's queue; `incubate run` submits another"
            elif job.reason == "JobLaunchFailure":
                line.note = f"node {job.nodes} could not write {experiment.path / line.key}/log.txt: does it see that folder?"
        if line.state in ("failed", "lost", "skipped", "stopped"):
            broken.add(line.key)
    reasons = dict.fromkeys(job.reason.partition(",")[0].strip("()") for job in jobs.values() if job.state == "PENDING")
    return [f"{reason}: {REASONS[reason]}" for reason in reasons if reason in REASONS]


def _submitted(experiment: Experiment) -> dict[str, str]:
    return read_json(experiment.path / "slurm.json") or {}


# -- submitting -----------------------------------------------------------------------------------------------------------


def submit(plan: Plan, source: dict[str, Any], slurm: SlurmSettings, console: Console, *, dry_run: bool = False) -> list[str]:
    """Submit what is missing and not in the queue yet; return the ids of the jobs submitted.

    SettingsError before anything is submitted when the cluster cannot do it, as far as that can be known.
    """
    experiment = plan.experiment
    missing = to_do(plan.nodes, is_complete)  # a job that finds its phase complete after all ends at once
    shares = check(shapes(missing, slurm)) if shutil.which("sinfo") or not dry_run else {}
    if dry_run:
        for script, after in scripts(plan, missing, source, slurm, shares):
            print(script.text(script.arguments([f"<job of {key}>" for key in after])) + "\n")
        return []
    list(scripts(plan, missing, source, slurm, shares))  # what cannot be written into one is told before anything is written
    for devices in {team(node, slurm) for node in missing}:
        load_settings(source["preset"], [*source["overrides"], *devices])  # batches can be shared out among them
    experiment.create()
    with only_run(experiment.path):
        active = _settled(experiment)
        (experiment.path / STOP_FILE).unlink(missing_ok=True)
        ids = _submitted(experiment)
        source = source | {"preset": _frozen(experiment, source["preset"])}
        wanted = _not_in_queue(plan, missing, active)
        running = {key: job.id for key, job in active.items()}  # and what is submitted now: all that may be waited for
        new: list[str] = []
        for script, after in scripts(plan, wanted, source, slurm, shares):
            if script.key == ANALYSIS and (ANALYSIS in active or (not missing and analysed(plan))):
                continue
            folder = experiment.path / script.key if script.key != ANALYSIS else experiment.path
            folder.mkdir(parents=True, exist_ok=True)
            arguments = script.arguments([running[key] for key in after if key in running])
            text = script.text(arguments)
            (folder / "slurm.sh").write_text(text)
            try:
                output = call("sbatch", "--parsable", *arguments, stdin=text)
                number = re.search(r"^(\d+)(;.*)?$", output, re.M)[1]  # a site's wrapper may say more
            except SettingsError as error:
                message = f"{error}. {len(new)} jobs were submitted; `incubate run` again submits the rest"
                raise SettingsError(message if new else str(error)) from None
            ids[script.key] = running[script.key] = number
            write_json(experiment.path / "slurm.json", ids)
            new.append(number)
    done = len(plan.nodes) - len(missing)
    waiting = len(missing) - len(wanted)
    console.print(
        f"{experiment.path.name}: {done} of {len(plan.nodes)} phases are done already, {waiting} are in Slurm's queue, "
        f"{len(new)} job(s) submitted", highlight=False,
    )  # fmt: skip
    return new


def each_once(runs: list[tuple[Plan, dict[str, Any]]]) -> list[tuple[Plan, dict[str, Any]]]:
    """Return runs without their analyses, each phase once: runs that share it copy it when they are submitted next."""
    seen: set[str] = set()
    parts = []
    for whole, source in runs:
        nodes: list[Node] = []
        for node in whole.nodes:
            others = [before for before in node.inputs.values() if before not in nodes]
            elsewhere = [before for before in others if before in whole.nodes or before.finished() is None]
            if node.digest not in seen and not elsewhere:
                nodes.append(node)
                seen.add(node.digest)
        if nodes:
            parts.append((dataclasses.replace(whole, nodes=nodes, finals={}), source))
    return parts


def _not_in_queue(plan: Plan, missing: list[Node], active: dict[str, Job]) -> list[Node]:
    """Return the phases to submit; cancel jobs that wait for the earlier, failed job of one of them."""
    wanted, in_vain = [], []
    for node in missing:
        if job := active.get(node.key):
            if job.state != "PENDING" or not any(before in wanted for before in node.inputs.values()):
                continue
            in_vain.append(active.pop(node.key).id)
        wanted.append(node)
    if ANALYSIS in active and any(final in wanted for final in plan.finals.values()):
        in_vain.append(active.pop(ANALYSIS).id)
    if in_vain:
        _cancel(*in_vain)
    return wanted


def stop(experiment: Experiment) -> int:
    """Cancel what waits and have what runs save and stop; the experiment's stop file must be there. Return the number of jobs."""
    jobs = active_jobs(experiment)
    if running := [job.id for job in jobs.values() if job.state in RUNNING]:
        _cancel("--batch", "--signal=USR2", *running)  # the stop file is seen without it, too, but later
    if waiting := [job.id for job in jobs.values() if job.state not in RUNNING]:
        _cancel(*waiting)
    return len(jobs)


def _cancel(*arguments: str) -> None:
    with contextlib.suppress(SettingsError):  # some have just ended
        call("scancel", *arguments)


def _settled(experiment: Experiment, seconds: float = 60.0) -> dict[str, Job]:
    """Return the active jobs, once those that are about to end have ended: all of a stopped run."""
    deadline = time.monotonic() + seconds
    while True:
        active = active_jobs(experiment)
        stopping = active and (experiment.path / STOP_FILE).exists()
        if not stopping and not any(job.state == "COMPLETING" for job in active.values()):
            return active
        if time.monotonic() > deadline:
            raise SettingsError(f"{len(active)} job(s) of {experiment.path.name} are still stopping; see `incubate status`")
        time.sleep(1)


def _frozen(experiment: Experiment, preset: str) -> str:
    """Copy the settings file beside the run: jobs may start days later, when the original says something else."""
    original = presets().get(preset) or Path(preset)
    copy = experiment.path / "settings" / original.name
    copy.parent.mkdir(exist_ok=True)
    if not copy.exists() or copy.read_bytes() != original.read_bytes():  # jobs may be reading it
        write_atomic(copy, original.read_bytes())
    return str(copy)
