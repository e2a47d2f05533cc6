"""`incubate run`, `incubate study`: what trains, on this machine or on a cluster."""

import argparse
import time

from incubate_lib.cli.look import print_table
from incubate_lib.cli.parser import Commands, backend_arguments, list_arguments, preset_arguments, set_argument


def run(options: argparse.Namespace) -> int:
    """Run the chain of notebooks; finished phases are kept, half-finished ones go on."""
    began = time.monotonic()
    from rich.console import Console

    from incubate_lib import backends
    from incubate_lib.config import SettingsError, load_settings
    from incubate_lib.pipeline import execution
    from incubate_lib.pipeline.experiment import Experiment, source_of
    from incubate_lib.pipeline.strategies import plan

    backend = backends.get(options.backend)
    if options.dry_run and not backend.has_preview:
        raise SettingsError(f"--dry-run is for {backends.able('has_preview')}")
    asked = backends.settings(options)
    if options.devices is not None:
        options.set.append(f"machine.devices={options.devices}")
    settings = load_settings(options.preset, options.set)
    experiment = Experiment.of(settings)
    experiment.check_writable()
    backends.check_nodes([settings.machine])
    backends.check_free(experiment, "`incubate stop` ends them", but=backend)
    if not experiment.is_known():
        backend.prepare()  # planning something new takes torch too, on another core
        if not options.dry_run:
            print("Planning: reading the images, building the networks, counting FLOPs …", flush=True)
    is_new = not experiment.is_known()
    todo = plan(settings, options.strategies, [0] if options.seeds is None else options.seeds)
    if is_new and (unused := todo.experiment.facts.unused_classes):
        from incubate_lib.data.sets import unused_in_words

        print(unused_in_words(unused, todo.experiment.facts.num_classes), flush=True)
    runs = [(todo, source_of(options.preset, options.set))]
    if options.dry_run:
        backend.preview(runs, asked)
        return 0
    submitted = backend.submit(runs, asked, Console())
    if submitted.status == 0:
        print(f"Finished in {time.monotonic() - began:.0f} s.")
    if submitted.ids:
        print("`incubate status` shows how far it is, from any folder.")
    if submitted.status or (submitted.status is None and not execution.is_finished(todo)):
        return submitted.status or 0
    print_table(todo)
    return 0


def study(options: argparse.Namespace) -> int:
    """Run a grid of settings, strategies and seeds, rates chosen for each; or list the studies."""
    from incubate_lib.config.study import load_study, studies

    if options.study is None:
        for name in studies():
            print(f"{name}  {load_study(name).description}")
        return 0
    from incubate_lib import backends

    backend, asked = backends.get(options.backend), backends.settings(options)
    import pandas as pd
    from rich.console import Console

    from incubate_lib.pipeline import study
    from incubate_lib.report.tables import studies as report
    from incubate_lib.report.tables import study_plots

    about, console = load_study(options.study, options.set), Console()
    if options.stop:
        stopping = study.stop(about)
        print(f"{stopping} run(s) of {about.name} are asked to stop" if stopping else f"nothing of {about.name} is under way")
        return 0
    machines = [about.settings(cell).machine for cell in about.cells()]
    devices = max(machine.devices for machine in machines)
    jobs = backend.places(devices, asked) or backends.get().places(devices)
    backends.check_nodes(machines)
    if not options.dry_run:
        backend.prepare()
    print("Planning: reading the images, building the networks, counting FLOPs …", flush=True)
    print(report.costs_text(study.costs(about), study.measured_speed(about), jobs), flush=True)
    if options.dry_run:
        return 0
    steps, status = study.run(about, backend, asked, console)
    if status:
        return status
    table = report.collect(steps)
    written = report.save(table, publish=options.publish)
    if options.publish:
        written += study_plots.draw(report.published(table.name))
    for path in written:
        print(f"wrote {path}")
    with pd.option_context("display.width", 200):
        print(report.summary(table).to_string(index=False))
    print(*report.doubts(table), sep="\n")
    return 0


def add(commands: Commands) -> None:
    command = commands.add(
        run,
        "digits --seeds 0 1 2 --jobs 2",
        "digits --strategies end_to_end recommended --set training.epochs=20",
        "imagenet-vit-b --backend slurm --site site.yaml --seeds 0 1 2",
    )
    preset_arguments(command)
    list_arguments(command, "those the preset runs", "0")
    backend_arguments(command, "job of each phase")
    command.add_argument("--devices", type=int, metavar="N", help="devices that train each phase together (default: 1)")
    command.add_argument("--dry-run", action="store_true", help="print what a cluster would be given, submit nothing")

    command = commands.add(study, "digits-budget --dry-run", "digits-budget --jobs 2 --publish")
    command.add_argument("study", help="a study, or a YAML file of yours; without it: list them", nargs="?")
    command.add_argument("--dry-run", action="store_true", help="say what is left to do and what it costs, train nothing")
    set_argument(command, "of the machine: machine.compile=default")
    command.add_argument("--stop", action="store_true", help="have what is under way save a checkpoint and stop")
    command.add_argument("--publish", action="store_true", help="also write data/results/study_*.csv and figures")
    backend_arguments(command, "run of each cell")
