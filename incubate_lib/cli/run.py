"""`incubate run`, `incubate study`: what trains, on this machine or on a cluster."""

import argparse
import time
from pathlib import Path

from incubate_lib.cli.look import print_table
from incubate_lib.cli.parser import Commands, backend_arguments, list_arguments, preset_arguments, set_argument

SLURM_ONLY = ("site", "partition", "gpus_per_node", "nodes", "time", "cpus_per_task", "sbatch")


def run(options: argparse.Namespace) -> int:
    """Run the chain of notebooks; finished phases are kept, half-finished ones go on."""
    began = time.monotonic()
    from rich.console import Console

    from incubate_lib.config import SettingsError, load_settings, presets
    from incubate_lib.pipeline import execution, local, slurm, warm
    from incubate_lib.pipeline.experiment import Experiment
    from incubate_lib.pipeline.strategies import plan

    on_slurm = options.backend == "slurm"
    if options.dry_run and not on_slurm:
        raise SettingsError("--dry-run is for --backend slurm")
    cluster = _cluster(options)
    if options.devices is not None:
        options.set.append(f"machine.devices={options.devices}")
    settings = load_settings(options.preset, options.set)
    jobs = local.check_jobs(options.jobs, settings.machine.devices)
    experiment = Experiment.of(settings)
    experiment.check_writable()
    local.check_machine([settings.machine])
    if on_slurm and settings.machine.devices > 1 and cluster.gpus_per_node:
        raise SettingsError("--devices is for the CPU (--gpus-per-node 0); on GPUs --gpus-per-node says how many a phase has")
    if not on_slurm and (active := slurm.still_active(experiment)):
        raise SettingsError(f"{active} job(s) of {experiment.path.name} are in Slurm's queue; `incubate stop` ends them")
    if not experiment.is_known():
        if not on_slurm:
            warm.prepare()  # planning something new takes torch too, on another core
        if not options.dry_run:
            print("Planning: reading the images, building the networks, counting FLOPs …", flush=True)
    is_new = not experiment.is_known()
    todo = plan(settings, options.strategies, [0] if options.seeds is None else options.seeds)
    if is_new and (unused := todo.experiment.facts.unused_classes):
        from incubate_lib.training.data import unused_in_words

        print(unused_in_words(unused, todo.experiment.facts.num_classes), flush=True)
    preset = options.preset if options.preset in presets() else str(Path(options.preset).absolute())
    source = {"preset": preset, "overrides": options.set}
    if on_slurm:
        count = slurm.submit(todo, source, cluster, Console(), dry_run=options.dry_run)
        print("`incubate status` shows how far it is, from any folder." if count else "", end="\n" if count else "")
        code = 0 if count or options.dry_run or not execution.is_finished(todo) else None
    else:
        code = local.run(todo, source, jobs, Console(), began) or None
    if code is None:
        print_table(todo)
    return code or 0


def study(options: argparse.Namespace) -> int:
    """Run a grid of settings, strategies and seeds, rates chosen for each; or list the studies."""
    from incubate_lib.config.study import load_study, studies

    if options.study is None:
        for name in studies():
            print(f"{name}  {load_study(name).description}")
        return 0
    cluster = _cluster(options)
    import pandas as pd
    from rich.console import Console

    from incubate_lib.pipeline import local, study, warm
    from incubate_lib.report.tables import studies as report
    from incubate_lib.report.tables import study_plots

    about, console = load_study(options.study, options.set), Console()
    if options.stop:
        asked = study.stop(about)
        print(f"{asked} run(s) of {about.name} are asked to stop" if asked else f"nothing of {about.name} is under way")
        return 0
    machines = [about.settings(cell).machine for cell in about.cells()]
    jobs = local.check_jobs(options.jobs, max(machine.devices for machine in machines))
    local.check_machine(machines)
    if cluster is None and not options.dry_run:
        warm.prepare()
    print("Planning: reading the images, building the networks, counting FLOPs …", flush=True)
    print(report.costs_text(study.costs(about), study.measured_speed(about), jobs), flush=True)
    if options.dry_run:
        return 0
    steps, status = study.run(about, jobs=jobs, console=console, cluster=cluster)
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


def _cluster(options: argparse.Namespace):
    """Return what jobs ask for; none without a cluster."""
    from incubate_lib.config import SettingsError
    from incubate_lib.config.cluster import load_slurm

    if options.backend != "slurm":
        if misplaced := [name for name in SLURM_ONLY if getattr(options, name)]:
            raise SettingsError(f"--{misplaced[0].replace('_', '-')} is for --backend slurm")
        return None
    if options.jobs is not None:
        raise SettingsError("--jobs is for --backend local; Slurm decides what runs side by side")
    given = {name: getattr(options, name) for name in ("partition", "gpus_per_node", "nodes", "time", "cpus_per_task")}
    return load_slurm(options.site, given, options.sbatch)


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
    command.add_argument("--dry-run", action="store_true", help="with --backend slurm: print the scripts, submit nothing")

    command = commands.add(study, "digits-budget --dry-run", "digits-budget --jobs 2 --publish")
    command.add_argument("study", help="a study, or a YAML file of yours; without it: list them", nargs="?")
    command.add_argument("--dry-run", action="store_true", help="say what is left to do and what it costs, train nothing")
    set_argument(command, "of the machine: machine.compile=default")
    command.add_argument("--stop", action="store_true", help="have what is under way save a checkpoint and stop")
    command.add_argument("--publish", action="store_true", help="also write data/results/study_*.csv and figures")
    backend_arguments(command, "run of each cell")
