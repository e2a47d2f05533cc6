"""Phases in processes of this machine, side by side where the graph allows; they end with the process that runs them."""

import argparse
from typing import Any

from incubate_lib.backends.interface import Backend, Run, Submitted


class Local(Backend):
    name = "local"
    title = "this machine"
    options = ("jobs",)

    def add_options(self, command: argparse.ArgumentParser, what: str) -> None:
        command.add_argument("--jobs", type=int, metavar="N", help="phases side by side (default: one a core, at most 4)")

    def settings(self, options: argparse.Namespace) -> Any:
        from incubate_lib.backends.local.pool import LocalSettings

        return LocalSettings(jobs=options.jobs)

    def check(self, machines: list[Any], settings: Any) -> None:
        self.places(1, settings)

    def prepare(self) -> None:
        from incubate_lib.pipeline import warm

        warm.prepare()

    def places(self, devices: int, settings: Any = None) -> int:
        from incubate_lib.backends.local.pool import check_jobs

        return check_jobs(settings and settings.jobs, devices)

    def submit(
        self, runs: list[Run], settings: Any, console: Any, *, notebooks: bool = True, began: float | None = None
    ) -> Submitted:
        from incubate_lib.backends.local import pool

        jobs = self.places(max(plan.experiment.settings.machine.devices for plan, _ in runs), settings)
        if not notebooks:
            return Submitted(status=pool.finish(pool.Pool(runs, jobs, console, notebooks=False)))
        status = 0
        for plan, source in runs:
            status = status or pool.run(plan, source, jobs, console, began)
        return Submitted(status=status)

    def stop(self, experiment: Any) -> str | None:
        from incubate_lib.pipeline.execution import is_running

        name = experiment.path.name
        return f"asked {name} to stop; its phases save a checkpoint first" if is_running(experiment.path) else None


BACKEND = Local()
