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
from incubate_lib.phases.job import Job
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
    request: JobSettings
    slurm: SlurmSettings
    phase: Job | None = None  # none: the analysis

    @property
    def folder(self) -> Path:
        return self.phase.folder.path if self.phase else self.experiment.path

    @property
    def name(self) -> str:
        return f"{self.experiment.path.name}/{self.key}"

    def arguments(self, after: Iterable[str]) -> list[str]:
        """Return the options; `after` are the jobs that must have completed. (As lines of a script they would be weaker
        than variables such as SBATCH_PARTITION, and could hold no spaces.) SettingsError if one could be several lines."""
        log = f"{self.folder}/log.txt".replace("%", "%%")  # no pattern of Slurm's
        options = {"job-name": self.name, "output": log, "open-mode": "append"}
        options |= {"chdir": self.experiment.path, "kill-on-invalid-dep": "yes"}
        options |= {"requeue": True, "signal": f"B:USR2@{self.slurm.warn_seconds}"}
        options |= self.request.options() | ({"dependency": "afterok:" + ":".join(after)} if after else {})
        for option, value in options.items():
            try:
                one_line(str(value))
            except ValueError as error:  # some are names of the user's folders
                raise SettingsError(f"option {option} of a job would be {str(value)!r}: {error}") from None
        return [flag(name, value) for name, value in options.items()]

    def text(self, arguments: list[str]) -> str:
        """Return the script, with the options for people to read."""
        about = json.dumps(self.about | {"attempts": self.slurm.attempts})
        values = {"again": AGAIN, "data": str(data_folder()), "interpreter": sys.executable, "about": about}
        body = TEMPLATES.get_template("job.sh").render(
            values, folder=str(self.folder), job=self.request, slurm=self.slurm, is_phase=self.phase is not None
        )
        return f"#!/bin/bash\n# sbatch {shlex.join(arguments)}\n{body}"


def flag(name: str, value: Any) -> str:
    """Return an option as sbatch takes it; None and True stand for themselves."""
    return f"--{name}" if value is None or value is True else f"--{name}={value}"


def requests(nodes: list[Node], slurm: SlurmSettings) -> dict[str, JobSettings]:
    """Return what the jobs of some phases and of the analysis ask for: a request for each that can differ."""
    jobs = {_kind(node): slurm.job(node.settings.seeded_as, node.settings.training is not None) for node in nodes}
    return jobs | {ANALYSIS: slurm.job("analysis", False)}


def _kind(node: Node) -> str:
    return node.settings.seeded_as if node.settings.training else f"{node.settings.seeded_as} without training"


def on_its_team(node: Node, jobs: dict[str, JobSettings]) -> Job:
    """Return a phase with the devices that train it together; SettingsError if that is given twice, or cannot be."""
    request, devices = jobs[_kind(node)], node.machine.devices
    if request.gpus_per_node and devices > 1:
        how = "on GPUs --gpus-per-node says how many a phase has"
        raise SettingsError(f"--devices is for the CPU (--gpus-per-node 0); {how}")
    team = {"devices": request.gpus_per_node or devices, "nodes": request.nodes}
    machine = node.machine.model_copy(update=team)
    if training := node.settings.training:  # can batches be shared out among them?
        settings = node.experiment.settings.model_copy(update={"machine": machine})
        settings.check_fits(training, f"phase {node.settings.seeded_as} of strategy {node.strategy}")
    return node.job.model_copy(update={"machine": machine})


def scripts(
    plan: Plan, wanted: list[Node], analysis: dict[str, Any] | None, slurm: SlurmSettings, jobs: dict[str, JobSettings]
) -> Iterator[Script]:
    """Make the scripts of some phases and, where its parameters are given, of the analysis; `jobs` are the requests of these."""
    for node in wanted:
        phase = on_its_team(node, jobs)
        team = {"devices": phase.machine.devices, "nodes": phase.machine.nodes}
        about = {"phase": phase.path, "team": team, "notebook": analysis is not None}
        after = [before.key for before in node.inputs.values()]
        yield Script(plan.experiment, node.key, after, about, jobs[_kind(node)], slurm, phase)
    if analysis:
        after = [node.key for node in plan.finals.values()]
        yield Script(plan.experiment, ANALYSIS, after, {"parameters": analysis}, jobs[ANALYSIS], slurm)
