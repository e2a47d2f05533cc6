"""This machine as a backend: what its options mean, and a run from its phases to its report."""

import argparse
import os
from typing import Any

from rich.console import Console

from incubate_lib.backends.interface import Backend, Run, Submitted
from incubate_lib.backends.local.pool import Pool, gpus
from incubate_lib.config import SettingsError
from incubate_lib.pipeline.execution import analyse, analysed, clear_log, fair_threads, is_running, only_run
from incubate_lib.pipeline.graph import Plan


class Local(Backend):
    """Its settings are how many phases are to go on side by side; none: as `places` says."""

    name = "local"
    title = "this machine"

    def settings(self, options: argparse.Namespace) -> int | None:
        if options.jobs is not None and options.jobs < 1:
            raise SettingsError(f"--jobs is {options.jobs}; it must be at least 1")
        return options.jobs

    def prepare(self) -> None:
        from incubate_lib.pipeline import warm

        warm.prepare()

    def places(self, devices: int, settings: int | None = None) -> int:
        """By default each phase has its `devices` GPUs for itself; without GPUs there is one a core, at most four."""
        cores = min(4, len(os.sched_getaffinity(0)))
        return settings or max(1, (len(gpus()) or cores) // devices)

    def submit(self, runs: list[Run], settings: Any, console: Any, *, notebooks: bool = True) -> Submitted:
        jobs = self.places(max(plan.experiment.settings.machine.devices for plan, _ in runs), settings)
        if not notebooks:
            return Submitted(status=Pool(runs, jobs, console, notebooks=False).run())
        status = 0
        for plan, source in runs:
            status = status or self._run(plan, source, jobs, console)
        return Submitted(status=status)

    def _run(self, plan: Plan, source: dict[str, Any], jobs: int, console: Console) -> int:
        """Run a plan and its analysis; return the exit status: 0 all done, 1 something failed, 130 stopped."""
        plan.experiment.create()
        with only_run(plan.experiment.path):
            status = Pool([(plan, source)], jobs, console).run()
            if status or analysed(plan):
                return status
            clear_log(plan.experiment.path)
            return analyse(plan, source, console, fair_threads(1))

    def stop(self, experiment: Any) -> str | None:
        if not is_running(experiment.path):
            return None
        return f"asked {experiment.path.name} to stop; its phases save a checkpoint first"


BACKEND = Local()
