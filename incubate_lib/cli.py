"""`incubate …`: one screen of thin commands. Bad input ends in a line or two and exit status 2."""

import argparse
import sys

from incubate_lib import __version__, backends, commands


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
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (function, text) in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        if name == "import":
            command.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint, or one for each target module, in order")
            command.add_argument("folder", metavar="DIR", help="new folder for config.json and model.safetensors")
            command.add_argument("--model", metavar="NAME", help="timm architecture (default: inferred from shapes)")
            command.add_argument("--num-heads", type=int, metavar="N", help="attention heads, which shapes do not show")
        if name == "study":
            command.add_argument("study", help="a study, or a YAML file of yours; without it: list them", nargs="?")
            command.add_argument("--dry-run", action="store_true", help="say what is left to do and what it costs, train nothing")
            command.add_argument(
                "--set", action="append", default=[], metavar="FIELD=VALUE", help="of the machine: machine.compile=default"
            )
            command.add_argument("--stop", action="store_true", help="have what is under way save a checkpoint and stop")
            command.add_argument("--publish", action="store_true", help="also write data/results/study_*.csv and figures")
            _backend(command, "run of each cell")
        if name in ("presets", "import", "study", "figures"):
            continue
        what = "a preset, or a YAML file of yours" + (", or a timm model" if name == "plan" else "")
        command.add_argument(
            "preset", nargs=None if name in ("export", "logs") else "?", default="digits",
            help=what + (" (default: digits)" if name != "export" else ""),
        )  # fmt: skip
        command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="e.g. training.epochs=20")
        if name == "bench":
            command.add_argument("--growth", action="store_true", help="time against FLOPs over depth and image size, no preset")
            command.add_argument("--batch", type=int, metavar="N", help="images of a step (default: the preset's, where it fits)")
            command.add_argument("--rounds", type=int, metavar="N", help="default: 5; with --growth 3")
            command.add_argument("--classes", type=int, metavar="N", help="default: those of the preset's data, or 1000")
            command.add_argument("--save", metavar="NAME", help="also write data/results/bench_NAME.csv (and --growth's figure)")
            command.set_defaults(preset=None)  # not the digits: --growth must know whether one was given
            continue
        if name == "plan":
            command.add_argument("--strategies", nargs="+", metavar="NAME", help="default: those the preset runs")
            command.add_argument("--bench", metavar="NAME", help="the speed that `incubate bench … --save NAME` measured")
            command.add_argument("--device", metavar="NAME", help="else: whose peak (default: H100)")
            command.add_argument("--share", type=float, metavar="X", help="and what share of it is reached (default: 0.4)")
            command.add_argument(
                "--devices", type=int, metavar="N", help="of a machine, that train a phase together (default: 1)"
            )
            command.add_argument("--machines", type=int, default=4, metavar="N", help="side by side (default: 4)")
            command.add_argument("--images", type=int, metavar="N", help="to train on (default: the known number of the source)")
            command.add_argument("--classes", type=int, metavar="N", help="default: the known number of the source")
            command.add_argument("--figure", metavar="FILE", help="also draw the Gantt chart")
            command.add_argument("--against", metavar="RUN", help="set predicted times beside those of a published run")
            continue
        if name == "export":
            command.add_argument("folder", metavar="DIR", help="new folder for config.json, model.safetensors and README.md")
            command.add_argument("--strategy", metavar="NAME", help="default: the first finished one of Deep Incubation")
            command.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
        if name == "logs":
            command.add_argument("phase", help="a phase's folder, or a part of it: incubate-2; or analysis")
            command.add_argument("--follow", "-f", action="store_true", help="go on as it grows, until Ctrl-C")
        if name in ("stop", "check", "export", "logs"):
            continue
        fresh = name == "run"
        which, seeds = ("those the preset runs", "0") if fresh else ("those that were run", "those that were run")
        command.add_argument("--strategies", nargs="+", metavar="NAME", help=f"default: {which}")
        command.add_argument("--seeds", nargs="+", type=int, metavar="N", help=f"default: {seeds}")
        if name == "run":
            _backend(command, "job of each phase")
            command.add_argument("--devices", type=int, metavar="N", help="devices that train each phase together (default: 1)")
            command.add_argument("--dry-run", action="store_true", help="print what a cluster would be given, submit nothing")
        if name == "report":
            command.add_argument("--publish", action="store_true", help="also write data/results/*.csv and figures/*.png")
        if name == "mirror":
            command.add_argument("--to", choices=["tensorboard", "wandb"], default="tensorboard", help="default: tensorboard")
            command.add_argument("--follow", "-f", action="store_true", help="go on as it grows, until nothing trains any more")
    return parser


def _backend(command: argparse.ArgumentParser, what: str) -> None:
    """Add the options of the machine or cluster that trains."""
    command.add_argument("--backend", choices=backends.names(), default=backends.DEFAULT, help="default: local")
    for name in backends.names():
        backends.get(name).add_options(command, what)


COMMANDS = {
    "run": (commands.run, "run the chain of notebooks; finished phases are kept, half-finished ones go on"),
    "study": (
        commands.study,
        "run a grid of settings, strategies and seeds, rates chosen for each; or list the studies",
    ),
    "figures": (commands.figures, "draw all figures, and write README's numbers, again from the tracked tables in data/results"),
    "status": (commands.status, "show the state of every phase"),
    "stop": (commands.stop, "stop a run cleanly: its phases save a checkpoint first"),
    "logs": (commands.logs, "show the log of a phase"),
    "report": (commands.report, "write the HTML report of what is finished, and print its table"),
    "mirror": (commands.mirror, "show a run's records in TensorBoard or, offline, in Weights & Biases; they stay what counts"),
    "check": (commands.check, "open every image of a preset's data and name those that cannot be read"),
    "import": (commands.import_, "turn a released checkpoint, or K with one target module each, into a folder that timm loads"),
    "export": (commands.export, "write a finished network as a folder that timm loads, with a model card"),
    "plan": (commands.plan, "say what a preset, or any plain timm ViT, would cost on given devices; trains nothing"),
    "bench": (commands.bench, "time a training step: ours, a bare loop, the released freezing; FLOPs and memory too"),
    "presets": (commands.presets, "list the presets"),
}


if __name__ == "__main__":
    sys.exit(main())
