"""What each command of `incubate` does: a few lines over the library. Each returns the exit status.

Imports stand inside: most commands need no torch, and `incubate --help` is to be there at once.
"""

import argparse
import sys
import time
from pathlib import Path

SLURM_ONLY = ("site", "partition", "gpus_per_node", "nodes", "time", "cpus_per_task", "sbatch")


def run(options: argparse.Namespace) -> int:
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
        _print_table(todo)
    return code or 0


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


def study(options: argparse.Namespace) -> int:
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


def figures(options: argparse.Namespace) -> int:
    from incubate_lib.report import readme
    from incubate_lib.report.publish import redraw

    for path in [*redraw(), *readme.write()]:
        print(f"wrote {path}")
    return 0


def _started(options: argparse.Namespace):
    """Return the plan of what was run with these settings."""
    from incubate_lib.config import SettingsError, load_settings
    from incubate_lib.pipeline import slurm
    from incubate_lib.pipeline.experiment import Experiment
    from incubate_lib.pipeline.strategies import plan

    settings = load_settings(options.preset, options.set)
    experiment = Experiment.of(settings)
    strategies, seeds = experiment.started()
    if not seeds:
        raise SettingsError(f"there is no run of these settings in {experiment.path}; start one with `incubate run`")
    if not slurm.was_submitted(experiment):  # then every phase has its folder from the beginning
        strategies = list(dict.fromkeys([*settings.run, *strategies]))
    return plan(settings, options.strategies or strategies, seeds if options.seeds is None else options.seeds)


def status(options: argparse.Namespace) -> int:
    from rich.console import Console

    from incubate_lib.pipeline import slurm
    from incubate_lib.pipeline.view import node_line, render

    todo = _started(options)
    lines = [node_line(node) for node in todo.nodes]
    messages = slurm.annotate(lines, todo)
    Console().print(render(lines))
    for line in lines:
        if line.state in ("failed", "lost"):
            print(f"log of {line.key}: {todo.experiment.path / line.key / 'log.txt'}")
    print(*messages, sep="\n", end="\n" if messages else "")
    print(f"folder: {todo.experiment.path}")
    return 0


def logs(options: argparse.Namespace) -> int:
    from incubate_lib.config import SettingsError

    options.strategies = options.seeds = None
    todo = _started(options)
    log = todo.experiment.path / _one_phase(options.phase, [node.key for node in todo.nodes]) / "log.txt"
    if not log.exists():
        raise SettingsError(f"{log} is not there: the phase has not begun, or its node does not see this folder")
    with open(log, errors="replace") as file:
        while True:
            print(file.read(), end="", flush=True)
            if not options.follow:
                return 0
            time.sleep(0.5)


def _one_phase(wanted: str, keys: list[str]) -> str:
    """Return the folder of the phase that is meant; SettingsError unless it is exactly one."""
    from incubate_lib.config import SettingsError, nearest

    if wanted == "analysis":
        return ""
    found = [key for key in keys if key == wanted] or [key for key in keys if wanted in key]
    if len(found) != 1:
        message = f"is {len(found)} phases: {', '.join(found)}" if found else f"is no phase; {nearest(wanted, keys)}"
        raise SettingsError(f"{wanted!r} {message}")
    return found[0]


def stop(options: argparse.Namespace) -> int:
    from incubate_lib.config import load_settings
    from incubate_lib.pipeline.background import stop_run
    from incubate_lib.pipeline.experiment import Experiment

    print(stop_run(Experiment.of(load_settings(options.preset, options.set))))
    return 0


def report(options: argparse.Namespace) -> int:
    from incubate_lib.config import SettingsError
    from incubate_lib.report.html import write_report
    from incubate_lib.report.publish import publish
    from incubate_lib.report.tables.records import from_plan

    todo = _started(options)
    results = from_plan(todo)
    if results.strategies.empty:
        raise SettingsError(f"no strategy is finished yet in {todo.experiment.path}; `incubate status` shows how far it is")
    write_report(results, todo.experiment.path / "report.html", todo)
    if options.strategies or options.seeds is not None:
        (todo.experiment.path / "analysed.json").unlink(missing_ok=True)  # the next run writes a whole report again
    if options.publish:
        for path in publish(results):
            print(f"wrote {path}")
    _print_table(todo)
    return 0


def mirror(options: argparse.Namespace) -> int:
    from incubate_lib.report.mirror import is_at_work, mirror

    while True:
        todo = _started(options)
        more = options.follow and is_at_work(todo)  # asked first: what is written last is mirrored, too
        written, unchanged = mirror(todo, options.to)
        if written or not more:
            print(f"{len(written)} phase(s) mirrored, {unchanged} unchanged", flush=True)
        if not more:
            break
        time.sleep(5)
    place = todo.experiment.path / "mirror" / options.to
    print(f"tensorboard --logdir {place}" if options.to == "tensorboard" else f"W&B runs, a folder a phase: {place}")
    return 0


def plan(options: argparse.Namespace) -> int:
    from incubate_lib.config import SettingsError
    from incubate_lib.report.planner import forecast, planner
    from incubate_lib.report.tables.records import published

    if options.bench and (options.device or options.share):
        raise SettingsError("--bench is a measured speed, --device and --share an assumed one; give one of them")
    if options.devices is not None:
        options.set.append(f"machine.devices={options.devices}")
    named = {"images": options.images, "classes": options.classes}
    todo = forecast.open_plan(options.preset, options.set, strategies=options.strategies, **named)
    if options.bench:
        speed = forecast.measured_speed(options.bench)
    else:
        precision = todo.experiment.settings.precision
        share = forecast.SHARE if options.share is None else options.share
        speed = forecast.stated_speed(options.device or forecast.DEVICE, share, precision)
    measured = published(options.against) if options.against else None
    costs = forecast.forecast(todo, speed, machines=options.machines)
    import pandas as pd

    print(costs.images + "\n")
    with pd.option_context("display.width", 200, "display.max_columns", None):
        print(planner.strategies_table(costs), planner.phases_table(costs).to_string(index=False), sep="\n\n")
    print("\n" + planner.in_words(costs))
    if measured:
        table = forecast.against_measured(measured, speed)
        print(f"\n{planner.against_table(table).to_string(index=False)}\n\n{planner.against_in_words(table)}")
    if options.figure:
        planner.gantt(costs).savefig(options.figure, dpi=150)
        print(f"wrote {options.figure}")
    return 0


def check(options: argparse.Namespace) -> int:
    from incubate_lib.config import load_settings
    from incubate_lib.training.data import labels_of, load_data, unused_classes, unused_in_words
    from incubate_lib.training.phases import model_shape
    from incubate_lib.training.stream import Checked, StreamedSet

    settings = load_settings(options.preset, options.set)
    how = {"shape": model_shape(settings.model), "machine": settings.machine}
    parts = files = load_data(settings.data, **how)
    if settings.data.in_memory:  # the same images once more, one by one: pixels in memory have no tags
        files = load_data(settings.data.model_copy(update={"in_memory": False}), **how)
    bad = 0
    for what, part, file in zip(("train", settings.data.eval_split), parts, files, strict=True):
        opened, broken, turned = file.check() if isinstance(file, StreamedSet) else Checked(len(part), {}, 0)
        print(f"{what}: {len(part)} images in {part.num_classes} classes; {opened} opened, {len(broken)} cannot be read")
        if what == "train" and (unused := unused_classes(labels_of(part), part.num_classes)):
            print(f"  {unused_in_words(unused, part.num_classes)}")
        if turned:
            print(f"  {turned} have a camera's orientation tag (EXIF), which is not followed: they are used as they are stored")
        for name, reason in broken.items():
            print(f"  {name}: {reason}")
        bad += len(broken)
    return 1 if bad else 0


def presets(options: argparse.Namespace) -> int:
    from incubate_lib.config import load_settings, presets

    width = max(map(len, presets()))
    for name in presets():
        print(f"{name:<{width}}  {load_settings(name).description}")
    return 0


def import_(options: argparse.Namespace) -> int:
    from incubate_lib.training.released import import_released

    settings, depths = import_released(options.files, options.folder, name=options.model, num_heads=options.num_heads)
    model = settings.model_dump(exclude_unset=True, exclude={"depth"} | ({"options"} if not settings.options else set()))
    print(f"wrote {options.folder}: {settings.depth} blocks, {' + '.join(map(str, depths))} in {len(depths)} module(s)")
    print("To use it as a trained meta model, a settings file needs:")
    print(f"  model: {model}\n  strategies: {{deep_incubation: {{weights: {Path(options.folder).absolute()}}}}}")
    return 0


def export(options: argparse.Namespace) -> int:
    from incubate_lib.config import load_settings
    from incubate_lib.report.export import export

    settings = load_settings(options.preset, options.set)
    name = export(settings, options.folder, strategy=options.strategy, seed=options.seed, log=print)
    print(f"wrote strategy {name}, seed {options.seed}: timm.create_model('local-dir:{options.folder}', pretrained=True)")
    print(f"Before you publish it, read {options.folder}/README.md and fill in the licence.")
    return 0


def bench(options: argparse.Namespace) -> int:
    from rich.console import Console

    from incubate_lib.config import SettingsError, load_settings

    settings = load_settings(options.preset or "digits", options.set)
    unused = [o for o in options.set if not o.lstrip().startswith(("precision", "machine"))]
    if options.growth and (options.preset or options.classes or unused):
        raise SettingsError("--growth has a network of its own; besides it --set precision=…, --set machine.compile=…, "
                            "--batch, --rounds and --save have a meaning")  # fmt: skip
    import pandas as pd

    from incubate_lib.report.planner import bench as text
    from incubate_lib.report.publish import check_name, publish_bench
    from incubate_lib.training import bench

    if options.save:
        check_name(options.save)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    rounds = {"rounds": options.rounds} if options.rounds is not None else {}
    how = {"batch": options.batch, "tell": console.print, **rounds}
    if options.growth:
        table = pd.DataFrame(bench.growth(settings.precision, settings.machine, **how))
        shown, words = text.growth_table(table), text.growth_in_words(table)
    else:
        table = pd.DataFrame(bench.bench(settings, classes=options.classes, **how))
        shown, words = text.bench_table(table), text.ratios_in_words(table)
    console.print("", shown, "")
    console.print(*words, *text.doubts(table), text.machine_line(table), sep="\n", soft_wrap=True)
    for path in publish_bench(table, options.save) if options.save else []:
        console.print(f"wrote {path}")
    return 0


def _print_table(todo) -> None:
    from incubate_lib.report.tables.comparison import comparison
    from incubate_lib.report.tables.records import from_plan
    from incubate_lib.report.tables.verdict import lowered

    results = from_plan(todo)
    print(comparison(results).to_string())
    print(results.verdict())
    if message := lowered(todo.finals.values()):
        print(message)
    print(f"report: {todo.experiment.path / 'report.html'}")
