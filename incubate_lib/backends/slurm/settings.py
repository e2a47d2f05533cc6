"""What jobs ask Slurm for: the options of `incubate run --backend slurm`, or a YAML file with what a site needs."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, field_validator

from incubate_lib.config.errors import SettingsError, error_message, nearest
from incubate_lib.config.files import read_yaml
from incubate_lib.config.members import PHASES
from incubate_lib.config.sections import Frozen, Positive

TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", re.ASCII)
# line ends of every kind, and what nobody needs
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
OURS = re.compile(  # options that the workbook itself must set
    "job-name|output|error|open-mode|dependency|kill-on-invalid-dep|requeue|no-requeue|signal|array|wrap|parsable|chdir|"
    "clusters|ntasks|ntasks-per-node|hold|wait|test-only|export|export-file"
)


def one_line(value: str) -> str:
    """Return a value that goes into a job's script; ValueError if it could become several lines there."""
    if found := CONTROL.search(value):
        raise ValueError(f"write it on one line; there is {found[0]!r} in it")
    return value


def _check_work(name: str) -> str:
    known = [*dict.fromkeys(PHASES[kind].group for kind in PHASES), "analysis"]
    if name not in known:
        raise ValueError(f"unknown phase; {nearest(name, known)}")
    return name


Work = Annotated[str, AfterValidator(_check_work)]  # a phase, or the analysis behind all of them


def minutes(time: str) -> float:
    """Read a time as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours:minutes:seconds."""
    days, dash, rest = time.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
    except ValueError:  # infinite
        return math.inf
    units = (60, 1, 1 / 60) if dash or len(parts) == 3 else (1, 1 / 60)
    return int(days or 0) * 1440 + sum(part * unit for part, unit in zip(parts, units))


Line = Annotated[str, AfterValidator(one_line)]


class JobSettings(Frozen):
    """What the job of one phase asks for."""

    partition: Annotated[Line, Field(min_length=1)] | None = None  # none: the cluster's default
    gpus_per_node: Annotated[int, Field(ge=0)] = 1  # that train the phase together; 0: on the CPU
    nodes: Positive = 1  # that train the phase together
    # limit of one attempt, as Slurm writes it; a number is minutes. A phase may take several
    time: str | int | None = None
    cpus_per_task: Positive | None = None  # cores on each node; none: the share of its GPUs in the node
    sbatch: dict[str, str | int | float | bool | None] = {}  # any further option by its long name; false: not

    @field_validator("time")
    @classmethod
    def _is_time(cls, value: str | int | None) -> str | None:
        if value is None:
            return None
        if not TIME.fullmatch(str(value)):
            raise ValueError("write it as minutes, hours:minutes:seconds or days-hours:minutes:seconds")
        return str(value)

    @field_validator("sbatch")
    @classmethod
    def _is_free(cls, options: dict[str, Any]) -> dict[str, Any]:
        for name in options:
            field = name.replace("-", "_")
            if field in JobSettings.model_fields:
                raise ValueError(f"{name} is a field of its own: set {field}")
            if OURS.fullmatch(name) or not re.fullmatch(r"[a-z][a-z-]+", name):
                raise ValueError(f"{name!r} is set by the workbook, or is no long option of sbatch")
            try:
                one_line(str(options[name]))
            except ValueError as error:
                raise ValueError(f"{name} is {options[name]!r}: {error}") from None
        return options

    def options(self) -> dict[str, Any]:
        """Return all this as options of sbatch, by their long names."""
        asked = {name.replace("_", "-"): value for name, value in self if name != "sbatch"}
        asked |= {"ntasks-per-node": 1, "gpus-per-node": self.gpus_per_node or None}
        return {name: value for name, value in asked.items() if value is not None} | self.sbatch


class SlurmSettings(JobSettings):
    """Options of every job, and what the site needs; `phases` changes them for some phases."""

    prologue: list[Line] = []  # lines of bash before python starts: module load …, conda activate …
    # the interpreter of jobs; none: the one that submits. `python`: what the prologue activates
    python: Line | None = None
    # before the time limit a phase is asked to save; Slurm may do so a minute earlier
    warn_seconds: Positive = 120
    # a phase that fails so many times in the same way, without a step more, is given up
    attempts: Positive = 3
    phases: dict[Work, JobSettings] = {}  # of which only what is given counts

    @field_validator("prologue", mode="before")
    @classmethod
    def _lines(cls, value: Any) -> Any:
        return value.split("\n") if isinstance(value, str) else value

    def job(self, phase: str, trains: bool) -> JobSettings:
        """Return what the job of a phase asks for; one that trains nothing makes do with one node and one GPU."""
        general = self.model_dump(include=set(JobSettings.model_fields))
        if not trains:
            general |= {"nodes": 1, "gpus_per_node": min(1, self.gpus_per_node), "cpus_per_task": None}
        changes = self.phases.get(phase, JobSettings()).model_dump(exclude_unset=True)
        sbatch = general["sbatch"] | changes.get("sbatch", {})
        sbatch = {name: value for name, value in sbatch.items() if value is not False}
        job = JobSettings.model_validate(general | changes | {"sbatch": sbatch})
        if job.time and minutes(job.time) * 60 < self.warn_seconds + 120:
            least = f"give it at least {math.ceil(self.warn_seconds / 60) + 2} minutes, or lower warn_seconds"
            early = f"a phase is asked to save {self.warn_seconds} s before it, or up to a minute earlier"
            raise SettingsError(f"time is {job.time}, but {early}; {least}")
        return job


def load_slurm(site: str | None, options: dict[str, Any], sbatch: Sequence[str] = ()) -> SlurmSettings:
    """Read a site's YAML file, if there is one, and put the options that were given on top; SettingsError if anything is off."""
    raw = {} if site is None else read_yaml(Path(site))
    raw |= {name: value for name, value in options.items() if value is not None}
    pairs = [option.lstrip("-").partition("=") for option in sbatch]
    further = raw.get("sbatch") or {}
    if isinstance(further, dict):
        raw["sbatch"] = further | {name: value if equals else None for name, equals, value in pairs}
    try:
        return SlurmSettings.model_validate(raw)
    except ValidationError as error:
        unknown = [str(item["loc"][-1]) for item in error.errors() if item["type"] == "extra_forbidden"]
        hint = f". Other options of sbatch go under sbatch: {{{unknown[0]}: …}}" if unknown else ""
        where = site or "options of --backend slurm"
        raise SettingsError(f"{where}: {error_message(error, SlurmSettings)}{hint}") from None
