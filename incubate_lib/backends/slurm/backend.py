"""Hand a plan to Slurm: a job a phase, dependencies in Slurm itself, so that it goes on without us.

Plain sbatch, squeue, sinfo, scancel and, inside jobs, srun and scontrol are all that is needed; no accounting. Scripts
are made in `sbatch.py`; what a job does is in `job.py`. The truth about a phase is in its folder; Slurm is asked only
what it alone knows: what waits, why, and where it runs.
"""

import argparse
import contextlib
import dataclasses
import re
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from incubate_lib.backends.interface import Backend, Run, Submitted
from incubate_lib.backends.slurm import options as OPTIONS
from incubate_lib.backends.slurm.attempts import has_ended
from incubate_lib.backends.slurm.limits import call, check
from incubate_lib.backends.slurm.queue import Job, active_jobs, cancel, jobs_of, submitted
from incubate_lib.backends.slurm.sbatch import requests, scripts, team
from incubate_lib.backends.slurm.settings import SlurmSettings, load_slurm
from incubate_lib.config import SettingsError, load_settings, presets
from incubate_lib.config.files import read_yaml
from incubate_lib.pipeline.execution import ANALYSIS, analysed, is_complete, only_run
from incubate_lib.pipeline.experiment import STOP_FILE, Experiment
from incubate_lib.pipeline.graph import Node, Plan, to_do
from incubate_lib.pipeline.view import Line
from incubate_lib.training.files import write_atomic, write_json
from incubate_lib.training.runs import PhaseFolder


class Slurm(Backend):
    name = "slurm"
    title = "Slurm"
    has_nodes = True
    has_preview = True
    pause = 15.0

    def settings(self, options: argparse.Namespace) -> SlurmSettings:
        asked = {name: getattr(options, name) for name in OPTIONS.keys() - {"site", "sbatch"}}
        return load_slurm(options.site, asked, options.sbatch or ())

    def submit(self, runs: list[Run], settings: Any, console: Any, *, notebooks: bool = True) -> Submitted:
        parts = runs if notebooks else _each_once(runs)
        return Submitted([job for plan, source in parts for job in _submit(plan, source, settings, console)])

    def preview(self, runs: list[Run], settings: SlurmSettings) -> None:
        for plan, source in runs:
            missing = to_do(plan.nodes, is_complete)
            jobs = requests(missing, settings)
            jobs = check(jobs) if shutil.which("sinfo") else jobs
            for script in scripts(plan, missing, source, settings, jobs):
                print(script.text(script.arguments([f"<job of {key}>" for key in script.after])) + "\n")

    def knows(self, experiment: Experiment) -> bool:
        return bool(submitted(experiment))

    def strategies(self, experiment: Experiment) -> list[str]:
        return experiment.started()[0]  # every phase has its folder from the beginning

    def still_active(self, experiment: Experiment) -> int:
        # no Slurm here, or no answer: two that meet in a phase wait for each other
        with contextlib.suppress(SettingsError):
            return len(active_jobs(experiment))
        return 0

    def states(self, plan: Plan, lines: list[Line]) -> list[str]:
        experiment, ids = plan.experiment, submitted(plan.experiment)
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
            if line.key in ids and line.state != "done":
                folder = PhaseFolder(experiment.path / line.key)
                _annotate(line, ids[line.key], jobs.get(line.key), folder, bool(inputs[line.key] & broken))
                if line.state in ("failed", "lost", "skipped", "stopped"):
                    broken.add(line.key)
        waiting = [job.reason for job in jobs.values() if job.state == "PENDING"]
        reasons = dict.fromkeys(reason.partition(",")[0].strip("()") for reason in waiting)
        return [f"{reason}: {words}" for reason in reasons if (words := self.explain(reason))]

    def explain(self, reason: str) -> str | None:
        return read_yaml(Path(__file__).with_name("reasons.yaml")).get(reason)

    def stop(self, experiment: Experiment) -> str | None:
        jobs = active_jobs(experiment)
        running = [job.id for job in jobs.values() if job.is_running]
        cancel("--batch", "--signal=USR2", ids=running)  # the stop file is seen without it, too, but later
        cancel(ids=[job.id for job in jobs.values() if not job.is_running])
        if not jobs:
            return None
        how = "those that wait are cancelled, those that run save a checkpoint first"
        return f"{len(jobs)} job(s) of {experiment.path.name}: {how}"


BACKEND = Slurm()


def _annotate(line: Line, number: str, job: Job | None, folder: PhaseFolder, is_blocked: bool) -> None:
    """Add to a line what Slurm says of its job; blocked is what starts from a phase that will not finish."""
    if job:
        line.where = job.describe()
    if job and job.is_active:
        if job.state == "PENDING":
            line.state = "queued"
        elif line.state in ("stopped", "failed") and has_ended(folder, job.id):
            line.state = "ending"
        elif line.state != "running":
            line.state = "starting"
    elif line.state in ("waiting", "interrupted") and is_blocked:
        line.state, line.where = "skipped", ""
    elif line.state in ("waiting", "interrupted"):
        line.state = "lost"
        if job is None:
            line.note = f"job {number} is no longer in Slurm's queue; `incubate run` submits another"
        elif job.reason == "JobLaunchFailure":
            line.note = f"node {job.nodes} could not write {folder.path}/log.txt: does it see that folder?"


# -- submitting -----------------------------------------------------------------------------------------------------------


def _submit(plan: Plan, source: dict[str, Any], slurm: SlurmSettings, console: Console) -> list[str]:
    """Submit what is missing and not in the queue yet; return the ids of the jobs submitted.

    SettingsError before anything is submitted when the cluster cannot do it, as far as that can be known.
    """
    experiment = plan.experiment
    missing = to_do(plan.nodes, is_complete)  # a job that finds its phase complete after all ends at once
    jobs = check(requests(missing, slurm))
    for devices in {team(node, jobs) for node in missing}:  # can batches be shared out among them?
        load_settings(source["preset"], [*source["overrides"], *devices])
    for script in scripts(plan, missing, source, slurm, jobs):
        script.arguments([])  # what it cannot hold is told before anything is written
    experiment.create()
    with only_run(experiment.path):
        active = _settled(experiment)
        (experiment.path / STOP_FILE).unlink(missing_ok=True)
        ids = submitted(experiment)
        source = source | {"preset": _frozen(experiment, source["preset"])}
        wanted = _not_in_queue(plan, missing, active)
        running = {key: job.id for key, job in active.items()}  # and what is submitted now: all that may be waited for
        new: list[str] = []
        for script in scripts(plan, wanted, source, slurm, jobs):
            if script.key == ANALYSIS and (ANALYSIS in active or (not missing and analysed(plan))):
                continue
            script.folder.mkdir(parents=True, exist_ok=True)
            arguments = script.arguments([running[key] for key in script.after if key in running])
            text = script.text(arguments)
            (script.folder / "slurm.sh").write_text(text)
            try:
                output = call("sbatch", "--parsable", *arguments, stdin=text)
                number = re.search(r"^(\d+)(;.*)?$", output, re.M)[1]  # a site's wrapper may say more
            except SettingsError as error:
                message = f"{error}. {len(new)} jobs were submitted; `incubate run` again submits the rest"
                raise SettingsError(message if new else str(error)) from None
            ids[script.key] = running[script.key] = number
            write_json(experiment.path / "slurm.json", ids)
            new.append(number)
    done, waiting = len(plan.nodes) - len(missing), len(missing) - len(wanted)
    message = f"{done} of {len(plan.nodes)} phases are done already, {waiting} are in Slurm's queue"
    console.print(f"{experiment.path.name}: {message}, {len(new)} job(s) submitted", highlight=False)
    return new


def _each_once(runs: list[Run]) -> list[Run]:
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
    cancel(ids=in_vain)
    return wanted


def _settled(experiment: Experiment, seconds: float = 60.0) -> dict[str, Job]:
    """Return the active jobs, once those that are about to end have ended: all of a stopped run."""
    deadline = time.monotonic() + seconds
    while True:
        active = active_jobs(experiment)
        stopping = active and (experiment.path / STOP_FILE).exists()
        if not stopping and not any(job.state == "COMPLETING" for job in active.values()):
            return active
        if time.monotonic() > deadline:
            name = experiment.path.name
            raise SettingsError(f"{len(active)} job(s) of {name} are still stopping; see `incubate status`")
        time.sleep(1)


def _frozen(experiment: Experiment, preset: str) -> str:
    """Copy the settings file beside the run: jobs may start days later, when the original says something else."""
    original = presets().get(preset) or Path(preset)
    copy = experiment.path / "settings" / original.name
    copy.parent.mkdir(exist_ok=True)
    if not copy.exists() or copy.read_bytes() != original.read_bytes():  # jobs may be reading it
        write_atomic(copy, original.read_bytes())
    return str(copy)
