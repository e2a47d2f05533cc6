"""Bad options and site files of Slurm. Each is asked for a preview: nothing is submitted, whatever becomes of it."""

import os
from pathlib import Path

from bad.case import Bad, both, file

PREVIEW = ("run", "smoke", "--backend", "slurm", "--dry-run")
SITES = {  # what is wrong → the site's file, and what its message must name
    "empty": ("", "site.yaml"),
    "a list": ("- partition: a", "site.yaml"),
    "a word": ("gpu", "site.yaml"),
    "not YAML": ("time: [", "site.yaml"),
    "binary": ("a: !!binary AAAA\nb: !!python/name:os", "site.yaml"),
    "an unknown field": ("partitions: gpu", "partition"),
    "an option of sbatch beside it": ("account: me", "sbatch"),
    "a field of phases that is unknown": ("phases: {meta: {tme: 60}}", "time"),
    "partition is a number": ("partition: 5", "partition"),
    "partition is a list": ("partition: [a, b]", "partition"),
    "partition of two lines": ('partition: "a\\n#SBATCH --uid=0"', "partition"),
    "no GPUs": ("gpus_per_node: -1", "gpus_per_node"),
    "GPUs of words": ("gpus_per_node: two", "gpus_per_node"),
    "half a GPU": ("gpus_per_node: 0.5", "gpus_per_node"),
    "10^9 GPUs": ("gpus_per_node: 1000000000", "gpus"),
    "no nodes": ("nodes: 0", "nodes"),
    "10^9 nodes": ("nodes: 1000000000", "nodes"),
    "nodes of a range": ("nodes: 1-4", "nodes"),
    "GPUs that do not divide the batch": ("gpus_per_node: 5", "gpus"),
    "nodes that do not divide the batch": ("nodes: 3", "batch_size"),
    "no cores": ("cpus_per_task: 0", "cpus_per_task"),
    "10^12 cores": ("cpus_per_task: 1000000000000", "cpus"),
    "cores of true": ("cpus_per_task: true", "cpus_per_task"),
    "time is a word": ("time: an hour", "time"),
    "time below 0": ("time: -60", "time"),
    "no time": ("time: 0", "time"),
    "time is too short": ("time: 3", "time"),
    "time of four parts": ('time: "1:2:3:4"', "time"),
    "time of a fraction": ("time: 1.5", "time"),
    "time of other digits": ("time: '１２０'", "time"),
    "10^30 minutes": (f"time: 1{'0' * 30}", "time"),
    "time is a list": ("time: [1, 2]", "time"),
    "time ends in a line": ('time: "60\\n"', "time"),
    "time is a date": ("time: 2024-01-01", "time"),
    "sbatch is a list": ("sbatch: [account=me]", "sbatch"),
    "sbatch is a word": ("sbatch: account", "sbatch"),
    "sbatch of a list": ("sbatch: {account: [a, b]}", "sbatch"),
    "our option": ("sbatch: {job-name: a}", "job-name"),
    "our option of requeue": ("sbatch: {requeue: true}", "requeue"),
    "a field as an option": ("sbatch: {time: 60}", "time"),
    "a field with a dash as an option": ("sbatch: {gpus-per-node: 1}", "gpus_per_node"),
    "a short option": ("sbatch: {A: me}", "A"),
    "an option with dashes before it": ("sbatch: {--account: me}", "--account"),
    "an option of capitals": ("sbatch: {ACCOUNT: me}", "ACCOUNT"),
    "an option of two lines": ('sbatch: {account: "a\\nb"}', "account"),
    "an option with a bell": ('sbatch: {account: "a\\ab"}', "account"),
    "an option whose name is two lines": ('sbatch: {"account\\nb": a}', "account"),
    "an option without a name": ("sbatch: {'': a}", "sbatch"),
    "an option of NaN": ("sbatch: {nice: .nan}", "nice"),
    "a prologue that is a number": ("prologue: 5", "prologue"),
    "a prologue of mappings": ("prologue: [{a: b}]", "prologue"),
    "a prologue with a return": ('prologue: ["a\\rb"]', "prologue"),
    "a prologue with a NUL": ('prologue: "a\\0b"', "prologue"),
    "python of two lines": ('python: "a\\nb"', "python"),
    "python is a list": ("python: [a]", "python"),
    "no warning": ("warn_seconds: 0", "warn_seconds"),
    "a warning of 10^15 seconds": ("warn_seconds: 1000000000000000\ntime: 60", "warn_seconds"),
    "a warning longer than the job": ("warn_seconds: 7200\ntime: 60", "warn_seconds"),
    "no attempts": ("attempts: 0", "attempts"),
    "attempts of words": ("attempts: often", "attempts"),
    "an unknown phase": ("phases: {train: {time: 60}}", "train"),
    "phases of a list": ("phases: [meta]", "phases"),
    "a phase of a number": ("phases: {meta: 5}", "meta"),
    "a phase with a site's field": ("phases: {meta: {prologue: [a]}}", "prologue"),
    "a phase with too short a time": ("phases: {meta: {time: 1}}", "time"),
    "a phase on 3 nodes": ("phases: {meta: {nodes: 3}}", "nodes"),
    "a phase with our option": ("phases: {meta: {sbatch: {output: a}}}", "output"),
}
OPTIONS = {  # what is wrong → options, and what its message must name
    "a site that is not there": (("--site", "no.yaml"), "no.yaml"),
    "a site that is a folder": (("--site", "."), ""),
    "a site without a name": (("--site", ""), ""),
    "GPUs of a word": (("--gpus-per-node", "x"), "gpus-per-node"),
    "GPUs below 0": (("--gpus-per-node=-1",), "gpus"),
    "no node": (("--nodes", "0"), "nodes"),
    "nodes of a word": (("--nodes", "x"), "nodes"),
    "a time of words": (("--time", "soon"), "time"),
    "an empty time": (("--time", ""), "time"),
    "no core": (("--cpus-per-task", "0"), "cpus_per_task"),
    "an empty partition": (("--partition", ""), "partition"),
    "a partition of two lines": (("--partition", "a\nb"), "partition"),
    "an empty option": (("--sbatch", ""), "sbatch"),
    "an option without a name": (("--sbatch", "=5"), "sbatch"),
    "our option": (("--sbatch", "output=a"), "output"),
    "an option of capitals": (("--sbatch", "Account=me"), "Account"),
    "several devices by the other option": (("--devices", "2"), "gpus"),
    "jobs side by side": (("--jobs", "2"), "jobs"),
    "nodes in the settings, too": (("--set", "machine.nodes=4", "--nodes", "2"), "nodes"),
}


SINFO = """#!/bin/sh
echo 'gpu|gpu*|8|gpu:4|32|2-00:00:00'
"""
SBATCH = """#!/bin/sh
for word in "$@"; do
  case "$word" in --cpus-per-task=*)
    [ "${word#*=}" -le 32 ] || { echo "CPU count per node can not be satisfied" >&2; exit 1; };;
  esac
done
"""


def cluster(here: Path) -> None:
    """Make the commands of a cluster: a partition of 8 nodes, each with 4 GPUs and 32 cores, for two days."""
    for name, text in {"sinfo": SINFO, "sbatch": SBATCH}.items():
        file(f"bin/{name}", text)(here)
        (here / "bin" / name).chmod(0o755)


PATH = {"PATH": f"{{here}}/bin:{os.environ['PATH']}"}


def catalogue() -> list[Bad]:
    found = []
    for name, (text, says) in SITES.items():
        found.append(
            Bad("Slurm", f"site: {name}", (*PREVIEW, "--site", "site.yaml"), both(cluster, file("site.yaml", text)), says, PATH)
        )
    for name, (options, says) in OPTIONS.items():
        found.append(Bad("Slurm", f"option: {name}", (*PREVIEW, *options), cluster, says, PATH))
    return found
