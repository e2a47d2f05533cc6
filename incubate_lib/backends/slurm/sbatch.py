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


@dataclass(frozen=True)
class Script:
    """One job, ready to be submitted."""

    experiment: Experiment
    key: str
    after: list[str]  # the keys of what it must wait for
    about: dict[str, Any]  # what it is to do, see `job.py`
    job: JobSettings
    slurm: SlurmSettings

    @property
    def folder(self) -> Path:
        return self.experiment.path if self.key == ANALYSIS else self.experiment.path / self.key

    def arguments(self, after: Iterable[str]) -> list[str]:
        """Return the options; `after` are the jobs that must have completed. (As lines of a script they would be weaker
        than variables such as SBATCH_PARTITION, and could hold no spaces.) SettingsError if one could be several lines."""
        log = f"{self.folder}/log.txt".replace("%", "%%")  # no pattern of Slurm's
        options = {"job-name": job_name(self.experiment, self.key), "output": log, "open-mode": "append"}
        options |= {"chdir": self.experiment.path, "kill-on-invalid-dep": "yes"}
        options |= {"requeue": True, "signal": f"B:USR2@{self.slurm.warn_seconds}"}
        options |= self.job.options() | ({"dependency": "afterok:" + ":".join(after)} if after else {})
        for option, value in options.items():
            try:
                one_line(str(value))
            except ValueError as error:  # some are names of the user's folders
                raise SettingsError(f"option {option} of a job would be {str(value)!r}: {error}") from None
        return [flag(name, value) for name, value in options.items()]

    def text(self, arguments: list[str]) -> str:
        """Return the script, with the options for people to read."""
        about = json.dumps(self.about | {"folder": str(self.folder), "attempts": self.slurm.attempts})
        values = {"again": AGAIN, "data": str(data_folder()), "interpreter": sys.executable, "about": about}
        body = TEMPLATES.get_template("job.sh").render(values, folder=str(self.folder), job=self.job, slurm=self.slurm)
        return f"#!/bin/bash\n# sbatch {shlex.join(arguments)}\n{body}"


def flag(name: str, value: Any) -> str:
    """Return an option as sbatch takes it; None and True stand for themselves."""
    return f"--{name}" if value is None or value is True else f"--{name}={value}"


def job_name(experiment: Experiment, key: str) -> str:
    return f"{experiment.path.name}/{key}"


def requests(nodes: list[Node], slurm: SlurmSettings) -> dict[str, JobSettings]:
    """Return what the jobs of some phases and of the analysis ask for: a request for each that can differ."""
    jobs = {_kind(node): slurm.job(node.settings.seeded_as, node.settings.training is not None) for node in nodes}
    return jobs | {ANALYSIS: slurm.job("analysis", False)}


def _kind(node: Node) -> str:
    return node.settings.seeded_as if node.settings.training else f"{node.settings.seeded_as} without training"


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
        about = {"phase": node.settings.seeded_as, "parameters": parameters}
        after = [before.key for before in node.inputs.values()]
        yield Script(plan.experiment, node.key, after, about, jobs[_kind(node)], slurm)
    if plan.finals:
        after, about = [node.key for node in plan.finals.values()], {"parameters": source | plan.arguments}
        yield Script(plan.experiment, ANALYSIS, after, about, jobs[ANALYSIS], slurm)
