"""A Slurm job a phase, dependencies in Slurm itself, so that a run goes on without us."""

import os

from incubate_lib.backends.interface import Attempt

options = {
    "site": {"metavar": "FILE", "help": "Slurm: a YAML file with the options below and more; options override it"},
    "partition": {"metavar": "NAME", "help": "Slurm: where jobs run (default: the cluster's)"},
    "gpus_per_node": {"type": int, "metavar": "N", "help": "Slurm: GPUs of a node, which train a phase together (default: 1)"},
    "nodes": {"type": int, "metavar": "N", "help": "Slurm: nodes that train a phase together (default: 1)"},
    "time": {"metavar": "TIME", "help": "Slurm: limit of one attempt; a phase may take several"},
    "cpus_per_task": {"type": int, "metavar": "N", "help": "Slurm: cores of a node (default: its GPUs' share)"},
    "sbatch": {"action": "append", "metavar": "NAME=VALUE", "help": "Slurm: any further option of sbatch; may be repeated"},
}


class SlurmAttempt(Attempt):
    def on_each_node(self) -> list[str]:
        how = ["--overlap", "--export=ALL", "--cpu-bind=none", "--kill-on-bad-exit=1", "--ntasks-per-node=1"]
        cores = os.environ.get("SLURM_CPUS_PER_TASK", "1")
        return ["srun", *how, f"--nodes={self.nodes}", f"--ntasks={self.nodes}", f"--cpus-per-task={cores}"]

    def __str__(self) -> str:
        return f"a Slurm job of {self.nodes}"


def attempt() -> SlurmAttempt | None:
    """Read the environment of a job."""
    env, here = os.environ, Attempt()
    if "SLURM_JOB_ID" not in env:
        return None
    return SlurmAttempt(
        job=env["SLURM_JOB_ID"],
        restart=int(env.get("SLURM_RESTART_COUNT", 0)),
        nodes=int(env.get("SLURM_JOB_NUM_NODES", 1)),
        node_rank=int(env.get("SLURM_NODEID", 0)),
        place=env.get("SLURM_JOB_NODELIST", here.place),
        cores=int(env.get("SLURM_CPUS_PER_TASK", here.cores)),
    )
