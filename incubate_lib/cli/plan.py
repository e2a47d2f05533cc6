"""`incubate plan`, `incubate bench`: what training costs, predicted and measured."""

import argparse
import difflib
import os
import sys
from pathlib import Path

from rich.console import Console

from incubate_lib.cli.tables import fitted
from incubate_lib.config import check_numbers, load_settings, presets, refuse
from incubate_lib.config.peaks import DEVICE, SHARE, check_stated
from incubate_lib.pipeline.view import few_updates, matched_lengths

FIGURES = (".png", ".svg", ".pdf")
ALIKE = 0.8  # of a preset's name; no network of timm has one so like it


def plan(options: argparse.Namespace) -> None:
    both = "--bench is a measured speed, --device and --share an assumed one; give one of them"
    refuse(options.bench is not None and (options.device, options.share) != (None, None), both)
    check_figure(options.figure)
    check_numbers({"machines": options.machines, "images": options.images, "classes": options.classes})
    _check_early(options.preset, options.set)
    device = DEVICE if options.device is None else options.device
    share = SHARE if options.share is None else options.share
    if options.bench is None:
        check_stated(device, share)
    from incubate_lib.report.tables import records

    if options.bench is not None:
        records.speed_file(options.bench)
    measured = records.published(options.against) if options.against is not None else None
    from incubate_lib.report.planner import anatomy, forecast, planner

    asked = {name: getattr(options, name) for name in ("strategies", "images", "classes")}
    todo = forecast.open_plan(options.preset, options.set, **asked)
    if options.bench is not None:
        speed = forecast.measured_speed(options.bench)
    else:
        speed = forecast.stated_speed(device, share, todo.experiment.settings.precision)
    costs = forecast.forecast(todo, speed, machines=options.machines)
    joined = [node for node in todo.nodes if node.settings.phase == "assemble"][:1]
    cut = [anatomy.anatomy(node) for node in joined]
    options.done()
    print(costs.images + "\n")
    console = Console(highlight=False)
    for found in cut:
        console.print(fitted(found.table().reset_index(names="module"), console, found.network), "")
    console.print(fitted(planner.strategies_table(costs).reset_index(names="strategy"), console), "")
    for name, phases in planner.phases_table(costs).groupby("strategy", sort=False):
        console.print(fitted(phases.drop(columns="strategy"), console, name), "")
    print(*matched_lengths(todo), *few_updates(todo), planner.in_words(costs), sep="\n")
    if measured:
        table = forecast.against_measured(measured, speed)
        console.print("", fitted(planner.against_table(table), console), "")
        print(planner.against_in_words(table))
    if options.figure:
        planner.gantt(costs).savefig(options.figure, dpi=150)
        print(f"wrote {options.figure}")


def _check_early(preset: str, overrides: list[str]) -> None:
    """Raise SettingsError for settings that are wrong, and for a preset's name that is misspelt, before torch is imported."""
    if preset in presets() or os.path.exists(preset) or Path(preset).suffix in (".yaml", ".yml"):
        load_settings(preset, overrides)
        return
    close = difflib.get_close_matches(preset[:200], presets(), cutoff=ALIKE)
    refuse(close, f"{preset!r} is no preset, no .yaml file and no timm model; did you mean {' or '.join(close)}?")


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
    check_numbers({"--batch": options.batch, "--rounds": options.rounds, "--classes": options.classes})
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
