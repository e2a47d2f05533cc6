"""The scripts of a plan's jobs: what each asks for, and how it starts, warns and requeues its phase."""

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from incubate_lib.backends.slurm.job import AGAIN
from incubate_lib.backends.slurm.limits import flag
from incubate_lib.backends.slurm.settings import JobSettings, SlurmSettings, one_line
from incubate_lib.config import SettingsError, data_folder
from incubate_lib.pipeline.execution import ANALYSIS
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.pipeline.graph import Node, Plan


@dataclass
class Script:
    """One job, ready to be submitted."""

    key: str
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


def job_name(experiment: Experiment, key: str) -> str:
    return f"{experiment.path.name}/{key}"


def scripts(
    plan: Plan, wanted: list[Node], source: dict[str, Any], slurm: SlurmSettings, shares: dict[str, int | None]
) -> Iterable[tuple[Script, list[str]]]:
    """Make the scripts of some phases and of the analysis, each with the keys of what it must wait for."""
    experiment = plan.experiment
    for node in wanted:
        s = node.settings
        job, overrides = slurm.job(s.phase, s.training is not None), [*source["overrides"], *team(node, slurm)]
        about = source | {"overrides": overrides, "phase": s.phase, "strategy": node.strategy, "seed": s.seed}
        about |= {"module_index": s.module_index} if s.module_index is not None else {}
        yield _make(experiment, node.key, about, job, slurm, shares.get(shape(node))), [n.key for n in node.inputs.values()]
    if not plan.finals:
        return
    strategies, seeds = (list(dict.fromkeys(part)) for part in zip(*plan.finals, strict=True))
    about = source | {"strategies": strategies, "seeds": seeds}
    finals = [node.key for node in plan.finals.values()]
    yield _make(experiment, ANALYSIS, about, slurm.job("analysis", False), slurm, shares.get("analysis")), finals


def team(node: Node, slurm: SlurmSettings) -> tuple[str, str]:
    """Return the overrides that say how many devices train a phase together."""
    job = slurm.job(node.settings.phase, node.settings.training is not None)
    devices = job.gpus_per_node or node.experiment.settings.machine.devices
    return f"machine.devices={devices}", f"machine.nodes={job.nodes}"


def shape(node: Node) -> str:
    return node.settings.phase if node.settings.training else f"{node.settings.phase} without training"


def shapes(nodes: list[Node], slurm: SlurmSettings) -> dict[str, JobSettings]:
    """Return the different requests of a plan."""
    shapes = {shape(node): slurm.job(node.settings.phase, node.settings.training is not None) for node in nodes}
    return shapes | {"analysis": slurm.job("analysis", False)}


def _make(
    experiment: Experiment, key: str, about: dict[str, Any], job: JobSettings, slurm: SlurmSettings, share: int | None
) -> Script:
    folder = experiment.path if key == ANALYSIS else experiment.path / key
    options = {
        "job-name": job_name(experiment, key), "output": str(folder / "log.txt").replace("%", "%%"),  # no pattern of Slurm's
        "open-mode": "append", "chdir": experiment.path,
        "partition": job.partition, "nodes": job.nodes, "ntasks-per-node": 1, "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_task or share, "time": job.time, "requeue": True, "kill-on-invalid-dep": "yes",
        "signal": f"B:USR2@{slurm.warn_seconds}",
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None} | job.sbatch
    for option, value in options.items():
        _check_line(option, value)
    about = about | {"folder": str(folder), "attempts": slurm.attempts}
    values = {
        "prologue": "\n".join(slurm.prologue), "again": AGAIN, "data": shlex.quote(str(data_folder())),
        "folder": shlex.quote(str(folder)),
        "python": slurm.python or shlex.quote(sys.executable), "about": shlex.quote(json.dumps(about)),
        "srun": SRUN if job.nodes == 1 else "", "patience": max(1, slurm.warn_seconds // 2),
    }  # fmt: skip
    return Script(key, options, BODY.format(**values))


def _check_line(option: str, value: Any) -> None:
    """Raise SettingsError where an option would be several lines of the script; some are names of the user's folders."""
    try:
        one_line(str(value))
    except ValueError as error:
        raise SettingsError(f"option {option} of a job would be {str(value)!r}: {error}") from None


BODY = """
export INCUBATE_DATA={data} INCUBATE_STOP={folder}/STOP-$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}
again() {{   # not what somebody cancelled
  timeout 60 scontrol requeue Incomplete "$SLURM_JOB_ID"
  out_of_time
}}
out_of_time() {{   # Slurm ends such a job for good, unless it is requeued before it is gone
  if [ "$(timeout 60 squeue -h -j "$SLURM_JOB_ID" -o %r)" = TimeLimit ]; then timeout 60 scontrol requeue "$SLURM_JOB_ID"; fi
}}
# a warning: the phase sees the file after the next step, saves and ends; if it is not at its steps yet, time may run out
trap 'touch "$INCUBATE_STOP"; (sleep {patience}; again) &' USR2
trap 'touch "$INCUBATE_STOP"; out_of_time' TERM
{prologue}
about={about}
job=({python} -m incubate_lib.backends.slurm.job)
{srun}"${{job[@]}}" attempt "$about" &
step=$!
while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done   # a signal ends `wait`, not the step
wait "$step"; code=$?
[ "$code" -eq 0 ] && exit 0
"${{job[@]}}" verdict "$about" "$code"
verdict=$?
[ "$verdict" -eq {again} ] || exit "$verdict"
for try in $(seq 240); do again; sleep 30; done   # the controller may be away
exit 1
"""
# a step of its own, because preemption warns steps only; of a phase over several nodes the ranks are one
SRUN = 'srun --overlap --export=ALL --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" '
