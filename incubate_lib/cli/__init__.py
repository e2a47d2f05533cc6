"""`incubate …`: thin commands, a file a group. Bad input ends in a line or two and exit status 2.

In these files imports stand inside functions: most commands need no torch, and `incubate --help` is to be there at once.
"""

import sys

from incubate_lib import __version__
from incubate_lib.cli import files, look, plan, run
from incubate_lib.cli.parser import Commands, Parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
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


def parser() -> Parser:
    """Return what knows all commands and their options."""
    parser = Parser(prog="incubate", description="Train a network in pieces, and see what it costs.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = Commands(parser)
    for group in (run, look, plan, files):
        group.add(commands)
    return parser
