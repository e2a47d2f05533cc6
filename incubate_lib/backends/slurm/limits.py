"""What a Slurm cluster has, so that what it cannot do is refused before anything is submitted; how its commands are called."""

import os
import re
import subprocess
from dataclasses import dataclass

from incubate_lib.backends.slurm.sbatch import flag
from incubate_lib.backends.slurm.settings import JobSettings, minutes
from incubate_lib.config import SettingsError, nearest

PATIENCE = 30.0  # seconds; Slurm's commands hang while its controller is away


def call(*command: str, stdin: str | None = None, patience: float = PATIENCE) -> str:
    """Return what a command of Slurm prints; SettingsError with its own words if it fails, is missing or does not answer."""
    try:
        how = {"capture_output": True, "text": True, "timeout": patience, "env": _outside()}
        result = subprocess.run(command, input=stdin, **how)
    except FileNotFoundError:
        where = "--backend slurm is for the login node of a Slurm cluster"
        raise SettingsError(f"no {command[0]} on the path: {where}") from None
    except subprocess.TimeoutExpired:
        raise SettingsError(f"Slurm does not answer ({command[0]}, {patience:.0f} s)") from None
    if result.returncode:
        errors = [line.partition("error: ")[2] or line for line in result.stderr.strip().splitlines()]
        words = "; ".join(dict.fromkeys(errors)) or f"exit status {result.returncode}"
        raise SettingsError(f"{command[0]}: {words}")
    return result.stdout


@dataclass(frozen=True)
class _Nodes:
    """Some nodes of a partition that are alike."""

    partition: str
    is_default: bool
    count: int
    gpus: int
    cpus: int
    minutes: float  # longest time a job may take


def _outside() -> dict[str, str]:
    """Return the environment without that of a job one may be in: sbatch would hand it on."""
    own = {name for name in os.environ if name.startswith("SLURM_")} - {"SLURM_CONF"}
    return {name: value for name, value in os.environ.items() if name not in own}


def check(jobs: dict[str, JobSettings]) -> dict[str, JobSettings]:
    """Return the jobs with their cores: their GPUs' share of a node's, unless they name them.

    SettingsError if no partition can do one of them.
    """
    found = _limits()
    return {name: _check(job, found) for name, job in jobs.items()}


def _limits() -> list[_Nodes]:
    output = call("sinfo", "--all", "--noheader", "--format=%R|%P|%D|%G|%c|%l")
    found = []
    for line in output.splitlines():
        if line.count("|") != 5:  # a banner
            continue
        name, starred, count, gres, cpus, time_limit = line.split("|")
        gpus = sum(int(number) for number in re.findall(r"gpu(?::[^:(,]+)?:(\d+)", gres))
        is_default, cores = starred.endswith("*"), int(cpus.rstrip("+"))
        found.append(_Nodes(name, is_default, int(count), gpus, cores, minutes(time_limit)))
    return found


def _check(job: JobSettings, limits: list[_Nodes]) -> JobSettings:
    names = list(dict.fromkeys(nodes.partition for nodes in limits))
    asked = job.partition.split(",") if job.partition else [n.partition for n in limits if n.is_default]
    if not set(asked) <= set(names):
        hint = nearest(job.partition, names)
        raise SettingsError(f"--partition {job.partition!r}: the cluster has no such partition; {hint}")
    if not asked:
        known = ", ".join(names)
        raise SettingsError(f"the cluster has no default partition; give --partition, one of {known}")
    mine, where = [n for n in limits if n.partition in asked], f"partition {', '.join(asked)}"
    most = max(n.gpus for n in mine)
    if job.gpus_per_node > most:
        has = most or "none; --gpus-per-node 0 trains on the CPU"
        raise SettingsError(f"--gpus-per-node is {job.gpus_per_node}, but a node of {where} has {has}")
    able = [n for n in mine if n.gpus >= job.gpus_per_node]
    count, longest = sum(n.count for n in able), max(n.minutes for n in able)
    if job.nodes > count:
        raise SettingsError(f"--nodes is {job.nodes}, but {where} has {count} with {job.gpus_per_node} GPU(s)")
    if job.time and minutes(job.time) > longest:
        raise SettingsError(f"--time is {job.time}, but {where} allows {longest:g} minutes")
    if job.gpus_per_node and not job.cpus_per_task:
        share = min(n.cpus * job.gpus_per_node // n.gpus for n in able)
        job = job.model_copy(update={"cpus_per_task": share or None})
    flags = [flag(name, value) for name, value in job.options().items()]
    try:
        call("sbatch", "--test-only", *flags, stdin="#!/bin/bash\n")
    except SettingsError as error:
        raise SettingsError(f"Slurm refuses such a job ({' '.join(flags)}): {error}") from None
    return job
