"""`incubate …`: one screen of thin commands. Bad input ends in a line or two and exit status 2."""

import argparse
import sys
import time
from pathlib import Path

from incubate_lib import __version__


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from incubate_lib.config import SettingsError

    try:
        return options.command(options)
    except SettingsError as error:
        print(f"incubate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("incubate: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        sys.stderr.close()
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="incubate", description="Train a network in pieces, and see what it costs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (function, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        if name == "presets":
            continue
        command.add_argument("preset", nargs="?", default="digits", help="a preset, or a YAML file of yours (default: digits)")
        command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="e.g. training.epochs=20")
        if name == "stop":
            continue
        fresh = name == "run"
        which, seeds = ("those the preset runs", "0") if fresh else ("those that were run", "those that were run")
        command.add_argument("--strategies", nargs="+", metavar="NAME", help=f"default: {which}")
        command.add_argument("--seeds", nargs="+", type=int, metavar="N", help=f"default: {seeds}")
        if name == "run":
            command.add_argument("--jobs", type=int, metavar="N", help="notebooks side by side (default: one a core, at most 4)")
        if name == "report":
            command.add_argument("--publish", action="store_true", help="also write data/results/*.csv and figures/*.png")
    return parser


def _run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    from rich.console import Console

    from incubate_lib.config import load_settings, presets
    from incubate_lib.pipeline import local, warm
    from incubate_lib.pipeline.graph import Experiment, plan

    jobs = local.check_jobs(options.jobs)
    settings = load_settings(options.preset, options.set)
    experiment = Experiment.of(settings)
    experiment.check_writable()
    if not experiment.is_known():
        warm.prepare()  # planning something new takes torch too, on another core
        print("Planning: reading the images, building the networks, counting FLOPs …", flush=True)
    todo = plan(settings, options.strategies, [0] if options.seeds is None else options.seeds)
    preset = options.preset if options.preset in presets() else str(Path(options.preset).absolute())
    code = local.run(todo, {"preset": preset, "overrides": options.set}, jobs, Console(), began)
    if code == 0:
        _print_table(todo)
    return code


def _started(options: argparse.Namespace):
    """Return the plan of what was run with these settings."""
    from incubate_lib.config import SettingsError, load_settings
    from incubate_lib.pipeline.graph import Experiment, plan

    settings = load_settings(options.preset, options.set)
    experiment = Experiment.of(settings)
    strategies, seeds = experiment.started()
    if not seeds:
        raise SettingsError(f"there is no run of these settings in {experiment.path}; start one with `incubate run`")
    strategies = list(dict.fromkeys([*settings.run, *strategies]))
    return plan(settings, options.strategies or strategies, seeds if options.seeds is None else options.seeds)


def _status(options: argparse.Namespace) -> int:
    from rich.console import Console

    from incubate_lib.pipeline.view import node_line, render

    todo = _started(options)
    Console().print(render([node_line(node) for node in todo.nodes]))
    for node in todo.nodes:
        if node.folder.status()["state"] == "failed":
            print(f"log of {node.key}: {node.folder.path / 'log.txt'}")
    print(f"folder: {todo.experiment.path}")
    return 0


def _stop(options: argparse.Namespace) -> int:
    from incubate_lib.config import SettingsError, load_settings
    from incubate_lib.pipeline import local
    from incubate_lib.pipeline.graph import STOP_FILE, Experiment

    experiment = Experiment.of(load_settings(options.preset, options.set))
    if not experiment.is_known():
        raise SettingsError(f"nothing to stop: there is no run in {experiment.path}")
    (experiment.path / STOP_FILE).touch()
    if local.is_running(experiment.path):
        print(f"asked {experiment.path.name} to stop; its phases save a checkpoint first")
    else:
        print(f"no `incubate run` is at work in {experiment.path}; phases that notebooks train there are asked to stop")
    return 0


def _report(options: argparse.Namespace) -> int:
    from incubate_lib.config import SettingsError
    from incubate_lib.report.html import write_report
    from incubate_lib.report.publish import publish
    from incubate_lib.report.tables import from_plan

    todo = _started(options)
    results = from_plan(todo)
    if results.strategies.empty:
        raise SettingsError(f"no strategy is finished yet in {todo.experiment.path}; `incubate status` shows how far it is")
    write_report(results, todo.experiment.path / "report.html")
    if options.strategies or options.seeds is not None:
        (todo.experiment.path / "analysed.json").unlink(missing_ok=True)  # the next run writes a whole report again
    if options.publish:
        for path in publish(results):
            print(f"wrote {path}")
    _print_table(todo)
    return 0


def _presets(options: argparse.Namespace) -> int:
    from incubate_lib.config import load_settings, presets

    for name in presets():
        print(f"{name:<12} {load_settings(name).description}")
    return 0


def _print_table(todo) -> None:
    from incubate_lib.report.tables import comparison, from_plan

    results = from_plan(todo)
    print(comparison(results).to_string())
    print(results.verdict())
    print(f"report: {todo.experiment.path / 'report.html'}")


COMMANDS = {
    "run": (_run, "run the chain of notebooks; finished phases are kept, half-finished ones go on"),
    "status": (_status, "show the state of every phase"),
    "stop": (_stop, "stop a run cleanly: its phases save a checkpoint first"),
    "report": (_report, "write the HTML report of what is finished, and print its table"),
    "presets": (_presets, "list the presets"),
}


if __name__ == "__main__":
    sys.exit(main())
