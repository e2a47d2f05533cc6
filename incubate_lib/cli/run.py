"""`incubate run`, `incubate study`: what trains, on this machine or on a cluster."""

import argparse
import time

from rich.console import Console

from incubate_lib import backends
from incubate_lib.cli.look import print_table
from incubate_lib.cli.tables import fitted
from incubate_lib.config import load_settings, refuse
from incubate_lib.config.study import load_study, studies
from incubate_lib.pipeline import execution
from incubate_lib.pipeline import study as grid
from incubate_lib.pipeline.experiment import Experiment, source_of
from incubate_lib.pipeline.strategies import plan
from incubate_lib.pipeline.view import few_updates, matched_lengths

PLANNING = "Planning: reading the images, building the networks, counting FLOPs …"


def run(options: argparse.Namespace) -> int | None:
    began = time.monotonic()
    backend = backends.get(options.backend)
    refuse(options.dry_run and not backend.has_preview, f"--dry-run is for {backends.able('has_preview')}")
    refuse(options.anew and options.backend != backends.DEFAULT, f"--anew is for --backend {backends.DEFAULT}")
    asked = backends.settings(options)
    settings = load_settings(options.preset, options.set)
    experiment = Experiment.of(settings)
    experiment.check_writable()
    backends.check_nodes([settings.machine])
    backends.check_free(experiment, "`incubate stop` ends them", but=backend)
    is_new = not experiment.is_known()
    if is_new:
        backend.prepare()  # planning something new takes torch too, on another core
        if not options.dry_run:
            print(PLANNING, flush=True)
    todo = plan(settings, options.strategies, [0] if options.seeds is None else options.seeds)
    if is_new and (unused := todo.experiment.facts.unused_classes):
        from incubate_lib.data.sets import unused_in_words

        print(unused_in_words(unused, todo.experiment.facts.outputs), flush=True)
    if is_new:
        for line in matched_lengths(todo) + few_updates(todo):
            print(line, flush=True)
    if options.anew:
        from incubate_lib.pipeline import store

        store.set_aside(store.of_other_devices(todo))
    analysis = source_of(options.preset, options.set) | todo.arguments
    if options.dry_run:
        backend.preview(todo, asked, analysis=analysis)
        return None
    status = backend.submit(todo, asked, Console(), analysis=analysis)
    if status == 0:
        print(f"Finished in {time.monotonic() - began:.0f} s.")
    elif status is None and not execution.is_finished(todo):
        print("`incubate status` shows how far it is, from any folder.")
        return None
    elif status:
        return status
    print_table(todo)
    return None


def study(options: argparse.Namespace) -> int | None:
    if options.study is None:
        for name in studies():
            print(f"{name}  {load_study(name).description}")
        return None
    backend, asked = backends.get(options.backend), backends.settings(options)
    about = load_study(options.study, options.set)
    if options.stop:
        print(grid.stop(about))
        return None
    from incubate_lib.report.tables import studies as report
    from incubate_lib.report.tables import study_plots

    machines = [about.settings(cell).machine for cell in about.cells()]
    devices = max(machine.devices for machine in machines)
    jobs = backend.places(devices, asked) or backends.get().places(devices)
    backends.check_nodes(machines)
    if not options.dry_run:
        backend.prepare()
    print(PLANNING, flush=True)
    costs = grid.costs(about)
    pace = grid.measured_pace({digest for cost in costs for digest in cost.digests})
    print(report.costs_text(costs, pace, jobs), flush=True)
    if options.dry_run:
        return None
    steps, status = grid.run(about, backend, asked, Console())
    if status:
        return status
    table = report.collect(steps)
    written = report.save(table, publish=options.publish)
    if options.publish:
        written += study_plots.draw(report.published(table.name))
    for path in written:
        print(f"wrote {path}")
    console = Console(highlight=False)
    console.print(fitted(report.summary(table), console))
    print(*report.doubts(table), sep="\n")
    return None
