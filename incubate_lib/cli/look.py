"""`incubate status`, `logs`, `report`, `mirror`, `stop`: what looks into a run, or ends it."""

import argparse
import time

from incubate_lib.cli.parser import Commands, list_arguments, preset_arguments


def status(options: argparse.Namespace) -> int:
    """Show the state of every phase."""
    from rich.console import Console

    from incubate_lib import backends
    from incubate_lib.pipeline.view import node_line, render

    todo = _started(options)
    lines = [node_line(node) for node in todo.nodes]
    backend = backends.of(todo.experiment)
    messages = backend.states(todo, lines)
    Console().print(render(lines, place=backend.title))
    for line in lines:
        if line.state in ("failed", "lost"):
            print(f"log of {line.key}: {todo.experiment.path / line.key / 'log.txt'}")
    print(*messages, sep="\n", end="\n" if messages else "")
    print(f"folder: {todo.experiment.path}")
    return 0


def stop(options: argparse.Namespace) -> int:
    """Stop a run cleanly: its phases save a checkpoint first."""
    from incubate_lib.config import load_settings
    from incubate_lib.pipeline.background import stop_run
    from incubate_lib.pipeline.experiment import Experiment

    print(stop_run(Experiment.of(load_settings(options.preset, options.set))))
    return 0


def logs(options: argparse.Namespace) -> int:
    """Show the log of a phase."""
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


def report(options: argparse.Namespace) -> int:
    """Write the HTML report of what is finished, and print its table."""
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
    print_table(todo)
    return 0


def mirror(options: argparse.Namespace) -> int:
    """Show a run's records in TensorBoard or, offline, in Weights & Biases; they stay what counts."""
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


def _started(options: argparse.Namespace):
    """Return the plan of what was run with these settings."""
    from incubate_lib import backends
    from incubate_lib.config import SettingsError, load_settings
    from incubate_lib.pipeline.experiment import Experiment
    from incubate_lib.pipeline.strategies import plan

    settings = load_settings(options.preset, options.set)
    experiment = Experiment.of(settings)
    _, seeds = experiment.started()
    if not seeds:
        raise SettingsError(f"there is no run of these settings in {experiment.path}; start one with `incubate run`")
    strategies = backends.of(experiment).strategies(experiment)
    return plan(settings, options.strategies or strategies, seeds if options.seeds is None else options.seeds)


def print_table(todo) -> None:
    from incubate_lib.report.tables.comparison import comparison
    from incubate_lib.report.tables.records import from_plan
    from incubate_lib.report.tables.verdict import lowered

    results = from_plan(todo)
    print(comparison(results).to_string())
    print(results.verdict())
    if message := lowered(todo.finals.values()):
        print(message)
    print(f"report: {todo.experiment.path / 'report.html'}")


def add(commands: Commands) -> None:
    command = commands.add(status, "digits")
    preset_arguments(command)
    list_arguments(command)

    command = commands.add(stop, "digits")
    preset_arguments(command)

    command = commands.add(logs, "digits incubate-2", "digits analysis --follow")
    preset_arguments(command, nargs=None)
    command.add_argument("phase", help="a phase's folder, or a part of it: incubate-2; or analysis")
    command.add_argument("--follow", "-f", action="store_true", help="go on as it grows, until Ctrl-C")

    command = commands.add(report, "digits", "digits --publish")
    preset_arguments(command)
    list_arguments(command)
    command.add_argument("--publish", action="store_true", help="also write data/results/*.csv and figures/*.png")

    command = commands.add(mirror, "digits", "digits --to wandb --follow")
    preset_arguments(command)
    list_arguments(command)
    command.add_argument("--to", choices=["tensorboard", "wandb"], default="tensorboard", help="default: tensorboard")
    command.add_argument("--follow", "-f", action="store_true", help="go on as it grows, until nothing trains any more")
