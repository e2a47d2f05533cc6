"""Hand a plan to Slurm: a job a phase, dependencies in Slurm itself, so that it goes on without us.

Plain sbatch, squeue, sinfo, scancel and, inside jobs, srun and scontrol are all that is needed; no accounting. Scripts
are made in `sbatch.py`; what a job does is in `job.py`. The truth about a phase is in its folder; Slurm is asked only
what it alone knows: what waits, why, and where it runs.
"""

import argparse
import contextlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from incubate_lib.backends.interface import Backend
from incubate_lib.backends.slurm import options as OPTIONS
from incubate_lib.backends.slurm import queue
from incubate_lib.backends.slurm.attempts import has_ended
from incubate_lib.backends.slurm.limits import call, check
from incubate_lib.backends.slurm.queue import Job, active_jobs, cancel, job_of, jobs_of, known_jobs, note, note_phase, submitted
from incubate_lib.backends.slurm.sbatch import requests, scripts
from incubate_lib.backends.slurm.settings import SlurmSettings, load_slurm
from incubate_lib.config import SettingsError, presets
from incubate_lib.config.files import read_yaml
from incubate_lib.pipeline.execution import ANALYSIS, analysed, only_run, stop_phases
from incubate_lib.pipeline.experiment import STOP_FILE, Experiment
from incubate_lib.pipeline.graph import Node, Plan, to_do
from incubate_lib.pipeline.view import Line
from incubate_lib.training.files import write_atomic
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

    def submit(self, plan: Plan, settings: Any, console: Any, *, analysis: dict[str, Any] | None = None) -> None:
        _submit(plan, analysis, settings, console)

    def preview(self, plan: Plan, settings: SlurmSettings, *, analysis: dict[str, Any]) -> None:
        missing = _missing(plan, analysis)
        jobs = requests(missing, settings)
        jobs = check(jobs) if shutil.which("sinfo") else jobs
        for script in scripts(plan, missing, analysis, settings, jobs):
            print(script.text(script.arguments([f"<job of {key}>" for key in script.after])) + "\n")

    def knows(self, experiment: Experiment) -> bool:
        return bool(submitted(experiment))

    def still_active(self, experiment: Experiment) -> int:
        # no Slurm here, or no answer: two that meet in a phase wait for each other
        with contextlib.suppress(SettingsError):
            return len(active_jobs(experiment))
        return 0

    def states(self, plan: Plan, lines: list[Line]) -> list[str]:
        experiment, ids = plan.experiment, submitted(plan.experiment)
        if ANALYSIS in ids:
            finished = all(node.job.is_complete() for node in plan.finals.values()) and analysed(plan)
            lines.append(Line(ANALYSIS, "analysis", "done" if finished else "waiting"))
        try:
            jobs = jobs_of(experiment)
        except SettingsError as error:
            return [f"{error}; this is from the run's own files"]
        inputs = {node.key: {before.key for before in node.inputs.values()} for node in plan.nodes}
        folders = {node.key: node.folder for node in plan.nodes} | {ANALYSIS: PhaseFolder(experiment.path)}
        inputs[ANALYSIS] = {node.key for node in plan.finals.values()}
        broken: set[str] = set()  # phases that will not finish, as things are
        for line in lines:
            if line.key in ids and line.key in folders and line.state != "done":
                _annotate(line, ids[line.key].id, jobs.get(line.key), folders[line.key], bool(inputs[line.key] & broken))
                if line.state in ("failed", "lost", "skipped", "stopped"):
                    broken.add(line.key)
        waiting = [job.reason for job in jobs.values() if job.state == "PENDING"]
        reasons = dict.fromkeys(reason.partition(",")[0].strip("()") for reason in waiting)
        return [f"{reason}: {words}" for reason in reasons if (words := self.explain(reason))]

    def explain(self, reason: str) -> str | None:
        return read_yaml(Path(__file__).with_name("reasons.yaml")).get(reason)

    def stop(self, experiment: Experiment) -> str | None:
        jobs = active_jobs(experiment)
        phases = {key: job.digest for key, job in submitted(experiment).items() if key in jobs and job.digest}
        needed = stop_phases(phases.values(), but=experiment.path)
        kept = {key for key, digest in phases.items() if digest in needed}
        saves = {key for key, job in jobs.items() if job.is_running and key != ANALYSIS}
        cancel("--batch", "--signal=USR2", ids=[jobs[key].id for key in saves - kept])  # or the stop file is seen later
        cancel(ids=[job.id for key, job in jobs.items() if key not in saves | kept])
        if not jobs:
            return None
        how = "those that wait are cancelled, those that run save a checkpoint first"
        goes_on = f"; {len(kept)} go on, because another run needs them, too" if kept else ""
        return f"{len(jobs) - len(kept)} job(s) of {experiment.path.name}: {how}{goes_on}"


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


def _missing(plan: Plan, analysis: dict[str, Any] | None) -> list[Node]:
    """Return the phases that are to be trained; for an analysis their notebooks are wanted, too."""
    return to_do(plan.nodes, lambda node: node.job.is_complete(analysis is not None))


def _submit(plan: Plan, analysis: dict[str, Any] | None, slurm: SlurmSettings, console: Console) -> None:
    """Submit what is missing and not in the queue yet.

    SettingsError before anything is submitted when the cluster cannot do it, as far as that can be known.
    """
    experiment = plan.experiment
    missing = _missing(plan, analysis)  # a job that finds its phase complete after all ends at once
    jobs = check(requests(missing, slurm))
    for script in scripts(plan, missing, analysis, slurm, jobs):
        script.arguments([])  # what it cannot hold is refused before anything is written
    experiment.path.mkdir(parents=True, exist_ok=True)
    with only_run(experiment.path) if analysis else contextlib.nullcontext():  # a study holds its own folder
        active, ids = _settled(experiment), submitted(experiment)
        digests = {node.key: node.digest for node in plan.nodes}
        has_others = any(ids[key].digest != digests[key] for key in active if key in digests)
        if has_others or (active and analysis and not experiment.is_present()):
            raise SettingsError(f"{len(active)} job(s) of {experiment.path.name} with other settings are active; stop them first")
        if analysis:
            plan.write()
            analysis = analysis | _frozen(experiment, analysis)
        (experiment.path / STOP_FILE).unlink(missing_ok=True)
        known = known_jobs()
        others = {node.key: job_of(node.folder) for node in missing}
        for node in missing:  # another run has submitted it
            other = others[node.key]
            job = known.get((other.id, other.name)) if other else None
            if job and job.is_active and node.key not in active and not node.folder.stop_file.exists():
                ids[node.key], active[node.key] = other, job
        wanted = _not_in_queue(plan, missing, active)
        running = {key: job.id for key, job in active.items()}  # and what is submitted now: all that may be waited for
        new = 0
        for script in scripts(plan, wanted, analysis, slurm, jobs):
            if not script.phase and (ANALYSIS in active or (not missing and analysed(plan))):
                continue
            if script.phase:
                if (other := job_of(script.phase.folder)) != others[script.key]:  # another run has just submitted it
                    running[script.key], ids[script.key] = other.id, other
                    continue
                script.phase.write()
                script.phase.folder.stop_file.unlink(missing_ok=True)
            arguments = script.arguments([running[key] for key in script.after if key in running])
            text = script.text(arguments)
            (script.folder / "slurm.sh").write_text(text)
            try:
                output = call("sbatch", "--parsable", *arguments, stdin=text)
                number = re.search(r"^(\d+)(;.*)?$", output, re.M)[1]  # a site's wrapper may say more
            except SettingsError as error:
                message = f"{error}. {new} jobs were submitted; `incubate run` again submits the rest"
                raise SettingsError(message if new else str(error)) from None
            running[script.key] = number
            ids[script.key] = queue.Queued(number, script.name, script.phase and script.phase.digest)
            note(experiment, ids)
            if script.phase:
                note_phase(script.phase.folder, ids[script.key])
            new += 1
        note(experiment, ids)
    done, waiting = len(plan.nodes) - len(missing), len(missing) - len(wanted)
    message = f"{done} of {len(plan.nodes)} phases are done already, {waiting} are in Slurm's queue"
    console.print(f"{experiment.path.name}: {message}, {new} job(s) submitted", highlight=False)


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
    """Return the active jobs, once those that are about to end have ended: all that were asked to stop."""
    deadline = time.monotonic() + seconds
    while True:
        active, ids = active_jobs(experiment), submitted(experiment)
        digests = filter(None, (ids[key].digest for key in active))
        stopping = any(PhaseFolder.of(digest).stop_file.exists() for digest in digests)
        if not stopping and not any(job.state == "COMPLETING" for job in active.values()):
            return active
        if time.monotonic() > deadline:
            name = experiment.path.name
            raise SettingsError(f"{len(active)} job(s) of {name} are still stopping; see `incubate status`")
        time.sleep(1)


def _frozen(experiment: Experiment, analysis: dict[str, Any]) -> dict[str, Any]:
    """Copy the settings file beside the run, and return what names the copy: jobs may start days later, when the original says
    something else. A folder of images that lies beside the original is named in full.
    """
    preset, folder = analysis["preset"], experiment.settings.data.folder
    original = presets().get(preset) or Path(preset)
    copy = experiment.path / "settings" / original.name
    copy.parent.mkdir(exist_ok=True)
    if not copy.exists() or copy.read_bytes() != original.read_bytes():  # jobs may be reading it
        write_atomic(copy, original.read_bytes())
    beside = [f"data.folder={json.dumps(folder)}"] if folder and Path(folder).is_absolute() else []
    return {"preset": str(copy), "overrides": [*analysis["overrides"], *beside]}
