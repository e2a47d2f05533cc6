"""The scripts of a plan's jobs: what each asks for, and how it starts, warns and requeues its phase."""

import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from incubate_lib.backends.slurm.attempts import AGAIN
from incubate_lib.backends.slurm.settings import JobSettings, SlurmSettings, one_line
from incubate_lib.config import SettingsError, data_folder
from incubate_lib.pipeline.execution import ANALYSIS
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.pipeline.graph import Node, Plan

HERE = FileSystemLoader(Path(__file__).parent)
TEMPLATES = Environment(loader=HERE, undefined=StrictUndefined, keep_trailing_newline=True)
TEMPLATES.filters["quote"] = shlex.quote


@dataclass
class Script:
    """One job, ready to be submitted."""

    key: str
    after: list[str]  # the keys of what it must wait for
    options: dict[str, Any]
    body: str

    def arguments(self, after: Iterable[str]) -> list[str]:
        """Return the options; `after` are the jobs that must have completed. (As lines of a script they would be weaker
        than variables such as SBATCH_PARTITION, and could hold no spaces.)"""
        options = self.options | ({"dependency": "afterok:" + ":".join(after)} if after else {})
        return [flag(name, value) for name, value in options.items()]

    def text(self, arguments: list[str]) -> str:
        """Return the script, with the options for people to read."""
        return f"#!/bin/bash\n# sbatch {shlex.join(arguments)}\n{self.body}"


def flag(name: str, value: Any) -> str:
    """Return an option as sbatch takes it; None and True stand for themselves."""
    return f"--{name}" if value is None or value is True else f"--{name}={value}"


def job_name(experiment: Experiment, key: str) -> str:
    return f"{experiment.path.name}/{key}"


def requests(nodes: list[Node], slurm: SlurmSettings) -> dict[str, JobSettings]:
    """Return what the jobs of some phases and of the analysis ask for: a request for each that can differ."""
    jobs = {_kind(node): slurm.job(node.settings.phase, node.settings.training is not None) for node in nodes}
    return jobs | {ANALYSIS: slurm.job("analysis", False)}


def _kind(node: Node) -> str:
    return node.settings.phase if node.settings.training else f"{node.settings.phase} without training"


def team(node: Node, jobs: dict[str, JobSettings]) -> tuple[str, str]:
    """Return the overrides that say how many devices train a phase together; SettingsError if that is told twice."""
    job, devices = jobs[_kind(node)], node.experiment.settings.machine.devices
    if job.gpus_per_node and devices > 1:
        how = "on GPUs --gpus-per-node says how many a phase has"
        raise SettingsError(f"--devices is for the CPU (--gpus-per-node 0); {how}")
    return f"machine.devices={job.gpus_per_node or devices}", f"machine.nodes={job.nodes}"


def scripts(
    plan: Plan, wanted: list[Node], source: dict[str, Any], slurm: SlurmSettings, jobs: dict[str, JobSettings]
) -> Iterator[Script]:
    """Make the scripts of some phases and of the analysis; `jobs` are the requests of these."""
    for node in wanted:
        parameters = source | node.arguments | {"overrides": [*source["overrides"], *team(node, jobs)]}
        about = {"phase": node.settings.phase, "parameters": parameters}
        after = [before.key for before in node.inputs.values()]
        yield _make(plan.experiment, node.key, after, about, slurm, jobs[_kind(node)])
    if plan.finals:
        after, about = [node.key for node in plan.finals.values()], {"parameters": source | plan.arguments}
        yield _make(plan.experiment, ANALYSIS, after, about, slurm, jobs[ANALYSIS])


def _make(
    experiment: Experiment, key: str, after: list[str], about: dict[str, Any], slurm: SlurmSettings, job: JobSettings
) -> Script:
    folder = str(experiment.path if key == ANALYSIS else experiment.path / key)
    log = f"{folder}/log.txt".replace("%", "%%")  # no pattern of Slurm's
    options = {"job-name": job_name(experiment, key), "output": log, "open-mode": "append", "chdir": experiment.path}
    options |= {"requeue": True, "kill-on-invalid-dep": "yes", "signal": f"B:USR2@{slurm.warn_seconds}"} | job.options()
    for option, value in options.items():
        try:
            one_line(str(value))
        except ValueError as error:  # some are names of the user's folders
            raise SettingsError(f"option {option} of a job would be {str(value)!r}: {error}") from None
    about = json.dumps(about | {"folder": folder, "attempts": slurm.attempts})
    values = {"again": AGAIN, "data": str(data_folder()), "interpreter": sys.executable}
    body = TEMPLATES.get_template("job.sh").render(values, about=about, folder=folder, job=job, slurm=slurm)
    return Script(key, after, options, body)
