"""`incubate plan`, `incubate bench`: what training costs, predicted and measured."""

import argparse
import sys

from incubate_lib.cli.parser import Commands, preset_arguments


def plan(options: argparse.Namespace) -> int:
    """Say what a preset, or any plain timm ViT, would cost on given devices; trains nothing."""
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


def bench(options: argparse.Namespace) -> int:
    """Time a training step: ours, a bare loop, the released freezing; FLOPs and memory too."""
    from rich.console import Console

    from incubate_lib.config import SettingsError, load_settings

    settings = load_settings(options.preset or "digits", options.set)
    unused = [o for o in options.set if not o.lstrip().startswith(("precision", "machine"))]
    if options.growth and (options.preset or options.classes or unused):
        raise SettingsError("--growth has a network of its own; besides it --set precision=…, --set machine.compile=…, "
                            "--batch, --rounds and --save have a meaning")  # fmt: skip
    import pandas as pd

    from incubate_lib.phases import bench
    from incubate_lib.report.planner import bench as text
    from incubate_lib.report.publish import check_name, publish_bench

    if options.save:
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
    return 0


def add(commands: Commands) -> None:
    command = commands.add(
        plan,
        "imagenet-vit-b --machines 4 --devices 8",
        "vit_small_patch16_224 --images 50000 --classes 100 --device A100",
    )
    preset_arguments(command, ", or a timm model")
    command.add_argument("--strategies", nargs="+", metavar="NAME", help="default: those the preset runs")
    command.add_argument("--bench", metavar="NAME", help="the speed that `incubate bench … --save NAME` measured")
    command.add_argument("--device", metavar="NAME", help="else: whose peak (default: H100)")
    command.add_argument("--share", type=float, metavar="X", help="and what share of it is reached (default: 0.4)")
    command.add_argument("--devices", type=int, metavar="N", help="of a machine, that train a phase together (default: 1)")
    command.add_argument("--machines", type=int, default=4, metavar="N", help="side by side (default: 4)")
    command.add_argument("--images", type=int, metavar="N", help="to train on (default: the known number of the source)")
    command.add_argument("--classes", type=int, metavar="N", help="default: the known number of the source")
    command.add_argument("--figure", metavar="FILE", help="also draw the Gantt chart")
    command.add_argument("--against", metavar="RUN", help="set predicted times beside those of a published run")

    command = commands.add(bench, "imagenet-vit-b --save h100", "--growth")
    preset_arguments(command, default=None)  # not the digits: --growth must know whether one was given
    command.add_argument("--growth", action="store_true", help="time against FLOPs over depth and image size, no preset")
    command.add_argument("--batch", type=int, metavar="N", help="images of a step (default: the preset's, where it fits)")
    command.add_argument("--rounds", type=int, metavar="N", help="default: 5; with --growth 3")
    command.add_argument("--classes", type=int, metavar="N", help="default: those of the preset's data, or 1000")
    command.add_argument("--save", metavar="NAME", help="also write data/results/bench_NAME.csv (and --growth's figure)")
