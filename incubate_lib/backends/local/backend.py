"""This machine as a backend: what its options mean, and a run from its phases to its report."""

import argparse
import contextlib
import os
import time
from typing import Any

from incubate_lib.backends.interface import Backend
from incubate_lib.backends.local.pool import POLL_SECONDS, Pool, gpus
from incubate_lib.config import MADE, refuse
from incubate_lib.pipeline.execution import analyse, analysed, clear_log, fair_threads, is_running, only_run
from incubate_lib.pipeline.graph import Plan

MOST_JOBS = 1_000


class Local(Backend):
    """Its settings are how many phases are to go on side by side; none: as `places` says."""

    name = "local"
    title = "this machine"

    def settings(self, options: argparse.Namespace) -> int | None:
        jobs = options.jobs
        refuse(jobs is not None and jobs < 1, f"--jobs is {jobs}; it must be at least 1")
        refuse(jobs is not None and jobs > MOST_JOBS, f"--jobs is {jobs}; it must be at most {MOST_JOBS:,}")
        return jobs

    def prepare(self) -> None:
        from incubate_lib.pipeline import warm

        warm.prepare()

    def places(self, devices: int, settings: int | None = None) -> int:
        """By default each phase has its `devices` GPUs for itself; without GPUs there is one a core, at most four."""
        cores = min(4, len(os.sched_getaffinity(0)))
        return settings or max(1, (len(gpus()) or cores) // devices)

    def submit(self, plan: Plan, settings: Any, console: Any, *, analysis: dict[str, Any] | None = None) -> int:
        copied = (node for node in plan.nodes if node.settings.data.source not in MADE and not node.finished())
        for place in {node.machine.scratch for node in copied} - {None}:
            from incubate_lib.data.scratch import check_scratch  # only now: it takes torch

            check_scratch(place)
        jobs = self.places(max((node.machine.devices for node in plan.nodes), default=1), settings)
        pool = Pool(plan, jobs, console, notebooks=analysis is not None)
        with contextlib.nullcontext() if analysis is None else only_run(plan.experiment.path):
            if analysis is not None:
                plan.write()
            for _ in pool.rounds():
                time.sleep(POLL_SECONDS)
            if pool.status or analysis is None or analysed(plan):
                return pool.status
            clear_log(plan.experiment.path)
            return analyse(plan, analysis, console, fair_threads(1))

    def stop(self, experiment: Any) -> str | None:
        if not is_running(experiment.path):
            return None
        return f"asked {experiment.path.name} to stop; its phases save a checkpoint first"


BACKEND = Local()
