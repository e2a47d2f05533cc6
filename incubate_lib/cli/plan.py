"""`incubate plan`, `incubate bench`: what training costs, predicted and measured."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from incubate_lib.config import load_settings, refuse

FIGURES = (".png", ".svg", ".pdf")


def plan(options: argparse.Namespace) -> None:
    import pandas as pd

    from incubate_lib.report.planner import forecast, planner
    from incubate_lib.report.tables.records import published

    both = "--bench is a measured speed, --device and --share an assumed one; give one of them"
    refuse(options.bench is not None and (options.device, options.share) != (None, None), both)
    check_figure(options.figure)
    asked = {name: getattr(options, name) for name in ("strategies", "images", "classes")}
    todo = forecast.open_plan(options.preset, options.set, **asked)
    if options.bench is not None:
        speed = forecast.measured_speed(options.bench)
    else:
        precision = todo.experiment.settings.precision
        share = forecast.SHARE if options.share is None else options.share
        speed = forecast.stated_speed(forecast.DEVICE if options.device is None else options.device, share, precision)
    measured = published(options.against) if options.against is not None else None
    costs = forecast.forecast(todo, speed, machines=options.machines)
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


def check_figure(file: str | None) -> None:
    """Raise SettingsError unless a figure can be written there: known before it is drawn."""
    if file is not None:
        path = Path(file)
        kinds = f"--figure {file!r}: give a name that ends in {', '.join(FIGURES)}"
        refuse(path.suffix not in FIGURES or path.is_dir(), kinds)
        refuse(not path.absolute().parent.is_dir(), f"--figure {file!r}: there is no folder {path.absolute().parent}")


def bench(options: argparse.Namespace) -> None:
    settings = load_settings(options.preset or "digits", options.set)
    unused = [o for o in options.set if not o.lstrip().startswith(("precision", "machine"))]
    besides = "--set precision=…, --set machine.compile=…, --batch, --rounds and --save"
    words = f"--growth has a network of its own; besides it {besides} have a meaning"
    refuse(options.growth and (options.preset or options.classes or unused), words)
    import pandas as pd

    from incubate_lib.phases import bench
    from incubate_lib.report.planner import bench as text
    from incubate_lib.report.publish import check_name, publish_bench

    if options.save is not None:
        check_name(options.save)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    rounds = {"rounds": options.rounds} if options.rounds is not None else {}
    how = {"batch": options.batch, "log": console.print, **rounds}
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
