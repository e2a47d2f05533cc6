"""A Slurm job a phase, dependencies in Slurm itself, so that a run goes on without us."""

import argparse
import os
from typing import Any

from incubate_lib.backends.interface import Attempt, Backend, Run, Submitted

NAMED = ("partition", "gpus_per_node", "nodes", "time", "cpus_per_task")  # options that are fields of the settings, too


class SlurmAttempt(Attempt):
    @classmethod
    def here(cls) -> "SlurmAttempt":
        """Read the environment of a job; outside of one, of a job without a number on this machine."""
        env, here = os.environ, Attempt()
        return cls(
            job=env.get("SLURM_JOB_ID", ""),
            restart=int(env.get("SLURM_RESTART_COUNT", 0)),
            nodes=int(env.get("SLURM_JOB_NUM_NODES", 1)),
            node_rank=int(env.get("SLURM_NODEID", 0)),
            place=env.get("SLURM_JOB_NODELIST", here.place),
            cores=int(env.get("SLURM_CPUS_PER_TASK", here.cores)),
        )

    def on_each_node(self) -> list[str]:
        cores = os.environ.get("SLURM_CPUS_PER_TASK", "1")
        return ["srun", "--overlap", "--export=ALL", "--cpu-bind=none", "--kill-on-bad-exit=1", f"--nodes={self.nodes}",
                f"--ntasks={self.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cores}"]  # fmt: skip

    def __str__(self) -> str:
        return f"a Slurm job of {self.nodes}"


class Slurm(Backend):
    name = "slurm"
    title = "Slurm"
    options = ("site", *NAMED, "sbatch")
    has_nodes = True
    has_preview = True
    pause = 15.0

    def add_options(self, command: argparse.ArgumentParser, what: str) -> None:
        slurm = command.add_argument_group(f"with --backend slurm, for the {what}")
        slurm.add_argument("--site", metavar="FILE", help="YAML file with these and more, which the options override")
        slurm.add_argument("--partition", metavar="NAME", help="default: the cluster's")
        slurm.add_argument("--gpus-per-node", type=int, metavar="N", help="that train the phase together (default: 1)")
        slurm.add_argument("--nodes", type=int, metavar="N", help="that train the phase together (default: 1)")
        slurm.add_argument("--time", metavar="TIME", help="limit of one attempt; a phase may take several")
        slurm.add_argument("--cpus-per-task", type=int, metavar="N", help="cores a node (default: its GPUs' share)")
        slurm.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="any further option of sbatch")

    def settings(self, options: argparse.Namespace) -> Any:
        from incubate_lib.backends.slurm.settings import load_slurm
        from incubate_lib.config import SettingsError

        if options.jobs is not None:
            raise SettingsError("--jobs is for --backend local; Slurm decides what runs side by side")
        return load_slurm(options.site, {name: getattr(options, name) for name in NAMED}, options.sbatch)

    def check(self, machines: list[Any], settings: Any) -> None:
        from incubate_lib.config import SettingsError

        if settings.gpus_per_node and any(machine.devices > 1 for machine in machines):
            raise SettingsError("--devices is for the CPU (--gpus-per-node 0); on GPUs --gpus-per-node says how many a phase has")

    def submit(
        self, runs: list[Run], settings: Any, console: Any, *, notebooks: bool = True, began: float | None = None
    ) -> Submitted:
        from incubate_lib.backends.slurm import queue

        parts = runs if notebooks else queue.each_once(runs)
        return Submitted([job for plan, source in parts for job in queue.submit(plan, source, settings, console)])

    def preview(self, runs: list[Run], settings: Any, console: Any) -> None:
        from incubate_lib.backends.slurm import queue

        for plan, source in runs:
            queue.submit(plan, source, settings, console, dry_run=True)

    def knows(self, experiment: Any) -> bool:
        from incubate_lib.backends.slurm import queue

        return queue.was_submitted(experiment)

    def strategies(self, experiment: Any) -> list[str]:
        return experiment.started()[0]  # every phase has its folder from the beginning

    def still_active(self, experiment: Any) -> int:
        from incubate_lib.backends.slurm import queue

        return queue.still_active(experiment)

    def states(self, plan: Any, lines: list[Any]) -> list[str]:
        from incubate_lib.backends.slurm import queue

        return queue.annotate(lines, plan)

    def explain(self, reason: str) -> str | None:
        from incubate_lib.backends.slurm import queue

        return queue.REASONS.get(reason)

    def stop(self, experiment: Any) -> str | None:
        from incubate_lib.backends.slurm import queue

        count = queue.stop(experiment)
        name = experiment.path.name
        return count and f"{count} job(s) of {name}: those that wait are cancelled, those that run save a checkpoint first"

    def attempt(self) -> Attempt | None:
        return SlurmAttempt.here() if "SLURM_JOB_ID" in os.environ else None


BACKEND = Slurm()
