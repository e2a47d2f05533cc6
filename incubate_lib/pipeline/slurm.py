"""Hand a plan to Slurm: a job a phase, dependencies in Slurm itself, so that it goes on without us.

Plain sbatch, squeue, sinfo, scancel and, inside jobs, srun and scontrol are all that is needed; no accounting. What a
job does is in `job.py`. The truth about a phase is in its folder; Slurm is asked only what it alone knows: what
waits, why, and where it runs.
"""

import contextlib
import getpass
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from incubate_lib.config import SettingsError, data_folder, load_settings, nearest, presets
from incubate_lib.config.cluster import JobSettings, SlurmSettings
from incubate_lib.pipeline.graph import STOP_FILE, Experiment, Node, Plan
from incubate_lib.pipeline.job import AGAIN, has_ended
from incubate_lib.pipeline.local import ANALYSIS, analysed, is_complete, only_run
from incubate_lib.pipeline.view import Line
from incubate_lib.training.runs import read_json, write_json

PATIENCE = 30.0  # seconds; Slurm's commands hang while its controller is away
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

    def told(self) -> str:
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
    told = _call("squeue", "--noheader", "--states=all", f"--user={getpass.getuser()}", "--format=%i|%T|%r|%N|%j")
    found = (Job(*line.split("|", 4)) for line in told.splitlines())
    known = {(job.id, job.name): job for job in found}
    pairs = ((key, known.get((number, job_name(experiment, key)))) for key, number in ids.items())
    return {key: job for key, job in pairs if job}  # names too: a new cluster counts from one again


def active_jobs(experiment: Experiment) -> dict[str, Job]:
    """Return the jobs of this experiment that wait or run."""
    return {key: job for key, job in jobs_of(experiment).items() if job.is_active}


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
    for line in lines:
        job = jobs.get(line.key)
        if line.key not in ids or line.state == "done":
            continue
        if job:
            line.where = job.told()
        if job and job.is_active:
            ending = line.state in ("stopped", "failed") and has_ended(experiment.path / line.key, job.id)
            active = line.state if line.state == "running" else "ending" if ending else "starting"
            line.state = "queued" if job.state == "PENDING" else active
        elif line.state in ("waiting", "interrupted"):
            line.state = "skipped" if job and job.reason == "DependencyNeverSatisfied" else "lost"
            if job is None:
                line.note = f"job {ids[line.key]} is no longer in Slurm's queue; `incubate run` submits another"
            elif job.reason == "JobLaunchFailure":
                line.note = f"node {job.nodes} could not write {experiment.path / line.key}/log.txt: does it see that folder?"
    reasons = dict.fromkeys(job.reason.partition(",")[0].strip("()") for job in jobs.values() if job.state == "PENDING")
    return [f"{reason}: {REASONS[reason]}" for reason in reasons if reason in REASONS]


def job_name(experiment: Experiment, key: str) -> str:
    return f"{experiment.path.name}/{key}"


def _submitted(experiment: Experiment) -> dict[str, str]:
    return read_json(experiment.path / "slurm.json") or {}


def _call(*command: str, stdin: str | None = None, patience: float = PATIENCE) -> str:
    try:
        result = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=patience)
    except FileNotFoundError:
        raise SettingsError(f"no {command[0]} on the path: --backend slurm is for the login node of a Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise SettingsError(f"Slurm does not answer ({command[0]}, {patience:.0f} s)") from None
    if result.returncode:
        errors = [line.partition("error: ")[2] or line for line in result.stderr.strip().splitlines()]
        raise SettingsError(f"{command[0]}: {'; '.join(dict.fromkeys(errors)) or f'exit status {result.returncode}'}")
    return result.stdout


# -- submitting -----------------------------------------------------------------------------------------------------------


@dataclass
class _Script:
    """One job, ready to be submitted."""

    key: str
    options: dict[str, Any]
    body: str

    def text(self, after: Iterable[str]) -> str:
        """Return the script; `after` are the jobs that must have completed."""
        options = self.options | ({"dependency": "afterok:" + ":".join(after)} if after else {})
        lines = [f"#SBATCH --{name}" + _value(value) for name, value in options.items()]
        return "\n".join(["#!/bin/bash", *lines, self.body])


def _value(value: Any) -> str:
    return "" if value is None or value is True else f"={value}"


def submit(plan: Plan, source: dict[str, Any], slurm: SlurmSettings, console: Console, *, dry_run: bool = False) -> int:
    """Submit what is missing and not in the queue yet; return the number of jobs submitted.

    SettingsError before anything is submitted when the cluster cannot do it, as far as that can be known.
    """
    experiment = plan.experiment
    missing = [node for node in plan.nodes if not is_complete(node)]
    if dry_run:
        for script, after in _scripts(plan, missing, source, slurm, {}):
            print(script.text([f"<job of {key}>" for key in after]) + "\n")
        return 0
    limits = _limits()
    shares = {name: _check(job, limits) for name, job in _shapes(missing, slurm).items()}
    for team in {_team(node, slurm) for node in missing}:
        load_settings(source["preset"], [*source["overrides"], *team])  # batches can be shared out among them
    experiment.create()
    with only_run(experiment.path):
        active = _settled(experiment)
        (experiment.path / STOP_FILE).unlink(missing_ok=True)
        ids = _submitted(experiment)
        source = source | {"preset": _frozen(experiment, source["preset"])}
        if ANALYSIS in active and any(node.key not in active for node in missing):
            _call("scancel", active.pop(ANALYSIS).id)  # it waits for phases that have failed; a new one follows
        wanted = [node for node in missing if node.key not in active]
        count = 0
        for script, after in _scripts(plan, wanted, source, slurm, shares):
            if script.key == ANALYSIS and (ANALYSIS in active or (not missing and analysed(plan))):
                continue
            folder = experiment.path / script.key if script.key != ANALYSIS else experiment.path
            folder.mkdir(parents=True, exist_ok=True)
            known = {key: active[key].id for key in active} | {key: ids[key] for key in after if key in ids}
            text = script.text([known[key] for key in after if key in known])
            (folder / "slurm.sh").write_text(text)
            try:
                ids[script.key] = _call("sbatch", "--parsable", stdin=text).strip().partition(";")[0]
            except SettingsError as error:
                told = f"{error}. {count} jobs were submitted; `incubate run` again submits the rest"
                raise SettingsError(told if count else str(error)) from None
            write_json(experiment.path / "slurm.json", ids)
            count += 1
    done = len(plan.nodes) - len(missing)
    waiting = len(missing) - len(wanted)
    console.print(
        f"{experiment.path.name}: {done} of {len(plan.nodes)} phases are done already, {waiting} are in Slurm's queue, "
        f"{count} job(s) submitted", highlight=False,
    )  # fmt: skip
    return count


def stop(experiment: Experiment) -> int:
    """Cancel what waits and have what runs save and stop; the experiment's stop file must be there. Return the number of jobs."""
    jobs = active_jobs(experiment)
    if waiting := [job.id for job in jobs.values() if job.state == "PENDING"]:
        _call("scancel", "--state=PENDING", *waiting)
    if running := [job.id for job in jobs.values() if job.state != "PENDING"]:
        with contextlib.suppress(SettingsError):  # one has just ended; the stop file is seen without the signal, too
            _call("scancel", "--batch", "--signal=USR2", *running)
    return len(jobs)


def _settled(experiment: Experiment, seconds: float = 60.0) -> dict[str, Job]:
    """Return the active jobs, once those of a stopped run have ended."""
    deadline = time.monotonic() + seconds
    while True:
        active = active_jobs(experiment)
        if not active or not (experiment.path / STOP_FILE).exists():
            return active
        if time.monotonic() > deadline:
            raise SettingsError(f"{len(active)} job(s) of {experiment.path.name} are still stopping; see `incubate status`")
        time.sleep(1)


def _frozen(experiment: Experiment, preset: str) -> str:
    """Copy the settings file beside the run: jobs may start days later, when the original says something else."""
    original = presets().get(preset) or Path(preset)
    copy = experiment.path / "settings" / original.name
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(original, copy)
    return str(copy)


def _scripts(
    plan: Plan, wanted: list[Node], source: dict[str, Any], slurm: SlurmSettings, shares: dict[str, int | None]
) -> Iterable[tuple[_Script, list[str]]]:
    """Make the scripts of some phases and of the analysis, each with the keys of what it must wait for."""
    experiment = plan.experiment
    for node in wanted:
        s = node.settings
        job, overrides = slurm.job(s.phase, s.training is not None), [*source["overrides"], *_team(node, slurm)]
        about = source | {"overrides": overrides, "phase": s.phase, "strategy": node.strategy, "seed": s.seed}
        about |= {"module_index": s.module_index} if s.module_index is not None else {}
        yield _script(experiment, node.key, about, job, slurm, shares.get(_shape(node))), [n.key for n in node.inputs.values()]
    strategies, seeds = (list(dict.fromkeys(part)) for part in zip(*plan.finals, strict=True))
    about = source | {"strategies": strategies, "seeds": seeds}
    finals = [node.key for node in plan.finals.values()]
    yield _script(experiment, ANALYSIS, about, slurm.job("analysis", False), slurm, shares.get("analysis")), finals


def _team(node: Node, slurm: SlurmSettings) -> tuple[str, str]:
    """Return the overrides that say how many devices train a phase together."""
    job = slurm.job(node.settings.phase, node.settings.training is not None)
    devices = job.gpus_per_node or node.experiment.settings.machine.devices
    return f"machine.devices={devices}", f"machine.nodes={job.nodes}"


def _shape(node: Node) -> str:
    return node.settings.phase if node.settings.training else f"{node.settings.phase} without training"


def _shapes(nodes: list[Node], slurm: SlurmSettings) -> dict[str, JobSettings]:
    """Return the different requests of a plan."""
    shapes = {_shape(node): slurm.job(node.settings.phase, node.settings.training is not None) for node in nodes}
    return shapes | {"analysis": slurm.job("analysis", False)}


def _script(
    experiment: Experiment, key: str, about: dict[str, Any], job: JobSettings, slurm: SlurmSettings, share: int | None
) -> _Script:
    folder = experiment.path if key == ANALYSIS else experiment.path / key
    options = {
        "job-name": job_name(experiment, key), "output": folder / "log.txt", "open-mode": "append", "chdir": experiment.path,
        "partition": job.partition, "nodes": job.nodes, "ntasks-per-node": 1, "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_task or share, "time": job.time, "requeue": True, "kill-on-invalid-dep": "yes",
        "signal": f"B:USR2@{slurm.warn_seconds}",
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None} | job.sbatch
    prologue = slurm.prologue if isinstance(slurm.prologue, str) else "\n".join(slurm.prologue)
    about = about | {"key": key, "folder": str(folder), "attempts": slurm.attempts}
    values = {
        "prologue": prologue, "again": AGAIN, "data": shlex.quote(str(data_folder())), "folder": shlex.quote(str(folder)),
        "python": slurm.python or sys.executable, "about": shlex.quote(json.dumps(about)),
    }  # fmt: skip
    return _Script(key, options, BODY.format(**values))


BODY = """
{prologue}
export INCUBATE_DATA={data} TORCHELASTIC_SIGNALS_TO_HANDLE=SIGINT
export INCUBATE_STOP={folder}/STOP-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}
about={about}
job=({python} -m incubate_lib.pipeline.job)
trap 'touch "$INCUBATE_STOP"' TERM USR2   # the phase sees it after the next step, saves and ends
srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}" "${{job[@]}}" attempt "$about" &
step=$!
while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done   # a signal ends `wait`, not the step
wait "$step"; code=$?
[ "$code" -eq 0 ] && exit 0
"${{job[@]}}" verdict "$about" "$code"
verdict=$?
[ "$verdict" -eq {again} ] || exit "$verdict"
for try in $(seq 30); do   # the controller may be away
  timeout 60 scontrol requeue Incomplete "$SLURM_JOB_ID" && sleep 300   # not when somebody cancelled it
  sleep 10
done
exit 1
"""


# -- what the cluster has -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Nodes:
    """Some nodes of a partition that are alike."""

    partition: str
    is_default: bool
    count: int
    gpus: int
    cpus: int
    minutes: float  # longest time a job may take


def _limits() -> list[_Nodes]:
    told = _call("sinfo", "--noheader", "--format=%R|%P|%D|%G|%c|%l")
    found = []
    for line in told.splitlines():
        name, starred, count, gres, cpus, time_limit = line.split("|")
        gpus = sum(int(number) for number in re.findall(r"gpu(?::[^:(,]+)?:(\d+)", gres))
        found.append(_Nodes(name, starred.endswith("*"), int(count), gpus, int(cpus.rstrip("+")), _minutes(time_limit)))
    return found


def _minutes(text: str) -> float:
    """Read a time as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours:minutes:seconds."""
    days, dash, rest = text.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
    except ValueError:  # infinite
        return math.inf
    units = (60, 1, 1 / 60) if dash or len(parts) == 3 else (1, 1 / 60)
    return int(days or 0) * 1440 + sum(part * unit for part, unit in zip(parts, units))


def _check(job: JobSettings, limits: list[_Nodes]) -> int | None:
    """Raise SettingsError if no partition can do this job; return its share of a node's cores, if it names none itself."""
    names = list(dict.fromkeys(nodes.partition for nodes in limits))
    if job.partition and not set(job.partition.split(",")) <= set(names):
        raise SettingsError(f"--partition {job.partition!r}: the cluster has no such partition; {nearest(job.partition, names)}")
    asked = job.partition.split(",") if job.partition else [n.partition for n in limits if n.is_default]
    if not asked:
        raise SettingsError(f"the cluster has no default partition; give --partition, one of {', '.join(names)}")
    mine = [n for n in limits if n.partition in asked]
    where = f"partition {', '.join(asked)}"
    if job.gpus_per_node > max(n.gpus for n in mine):
        most = max(n.gpus for n in mine)
        raise SettingsError(f"--gpus-per-node is {job.gpus_per_node}, but a node of {where} has {most or 'none'}"
                            + ("" if most else "; --gpus-per-node 0 trains on the CPU"))  # fmt: skip
    able = [n for n in mine if n.gpus >= job.gpus_per_node]
    if job.nodes > sum(n.count for n in able):
        raise SettingsError(
            f"--nodes is {job.nodes}, but {where} has {sum(n.count for n in able)} with {job.gpus_per_node} GPU(s)"
        )
    if job.time and _minutes(job.time) > max(n.minutes for n in able):
        raise SettingsError(f"--time is {job.time}, but {where} allows {max(n.minutes for n in able):g} minutes")
    share = min(n.cpus * job.gpus_per_node // n.gpus for n in able if n.gpus) if job.gpus_per_node else None
    options = {"partition": job.partition, "nodes": job.nodes, "gpus-per-node": job.gpus_per_node or None, "time": job.time}
    options |= {"ntasks-per-node": 1, "cpus-per-task": job.cpus_per_task or share} | job.sbatch
    flags = [f"--{k}" + _value(v) for k, v in options.items() if v is not None or k in job.sbatch]
    try:
        _call("sbatch", "--test-only", *flags, stdin="#!/bin/bash\n")
    except SettingsError as error:
        raise SettingsError(f"Slurm refuses such a job ({' '.join(flags)}): {error}") from None
    return job.cpus_per_task or share
