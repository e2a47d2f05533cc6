"""`incubate …`: one screen of thin commands. Bad input ends in a line or two and exit status 2."""

import argparse
import sys

from incubate_lib import __version__


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    from incubate_lib.config import SettingsError

    try:
        return options.command(options)
    except SettingsError as error:
        print(f"incubate: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="incubate", description="Train a network in pieces, and see what it costs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, function, text: str, seeds_and_strategies: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        command.add_argument("preset", nargs="?", default="digits", help="a preset, or a YAML file of your own (default: digits)")
        command.add_argument(
            "--set", action="append", default=[], metavar="FIELD=VALUE", help="override a setting, e.g. training.epochs=20"
        )
        if seeds_and_strategies:
            command.add_argument("--strategies", nargs="+", metavar="NAME", help="default: those the preset names under `run`")
            command.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
        return command

    run = add("run", _run, "run the chain of notebooks; finished phases are kept, half-finished ones go on")
    run.add_argument("--jobs", type=int, metavar="N", help="notebooks side by side (default: one per core, at most 4)")
    add("status", _status, "show the state of every phase")
    add("stop", _stop, "stop a run cleanly: its phases save a checkpoint first", False)
    report = add("report", _report, "write the HTML report of what is finished, and print its table")
    report.add_argument(
        "--publish", action="store_true", help="also write the tracked tables and figures (data/results, figures)"
    )
    presets = commands.add_parser("presets", help="list the presets", description="list the presets")
    presets.set_defaults(command=_presets)
    return parser


def _plan(options: argparse.Namespace):
    from incubate_lib.config import load_settings
    from incubate_lib.pipeline.graph import plan

    return plan(load_settings(options.preset, options.set), options.strategies, options.seeds)


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from incubate_lib.config import load_settings, presets
    from incubate_lib.pipeline import local, warm
    from incubate_lib.pipeline.graph import Experiment

    jobs = local.check_jobs(options.jobs)
    if not Experiment.of(load_settings(options.preset, options.set)).is_known():
        warm.prepare()  # planning something new takes torch too, on another core
    plan = _plan(options)
    preset = options.preset
    if preset not in presets():
        from pathlib import Path

        preset = str(Path(preset).absolute())
    console = Console()
    code = local.run(plan, {"preset": preset, "overrides": options.set}, jobs, console)
    if code == 0:
        _print_table(plan)
    return code


def _status(options: argparse.Namespace) -> int:
    from rich.console import Console

    from incubate_lib.pipeline.view import node_line, render

    plan = _plan(options)
    Console().print(render([node_line(node) for node in plan.nodes]))
    print(f"folder: {plan.experiment.path}")
    return 0


def _stop(options: argparse.Namespace) -> int:
    from incubate_lib.config import SettingsError, load_settings
    from incubate_lib.pipeline.graph import STOP_FILE, Experiment

    experiment = Experiment.of(load_settings(options.preset, options.set))
    if not experiment.path.exists():
        raise SettingsError(f"nothing to stop: there is no run in {experiment.path}")
    (experiment.path / STOP_FILE).touch()
    print(f"asked {experiment.path.name} to stop; its phases save a checkpoint first")
    return 0


def _report(options: argparse.Namespace) -> int:
    from incubate_lib.config import SettingsError
    from incubate_lib.report.html import write_report
    from incubate_lib.report.tables import from_plan, publish

    plan = _plan(options)
    results = from_plan(plan)
    if results.strategies.empty:
        raise SettingsError(f"nothing is finished yet in {plan.experiment.path}; `incubate run {options.preset}` first")
    write_report(results, plan.experiment.path / "report.html")
    if options.publish:
        for path in publish(results):
            print(f"wrote {path}")
    _print_table(plan)
    return 0


def _presets(options: argparse.Namespace) -> int:
    from incubate_lib.config import load_settings, presets

    for name in presets():
        print(f"{name:<12} {load_settings(name).description}")
    return 0


def _print_table(plan) -> None:
    from incubate_lib.report.tables import comparison, from_plan

    results = from_plan(plan)
    print(comparison(results).to_string(index=False))
    print(results.verdict())
    print(f"report: {plan.experiment.path / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
