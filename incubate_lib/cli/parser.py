"""The parser of the command line: errors in a line, `did you mean` for what is misspelt, and arguments that commands share."""

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from incubate_lib import backends

COMPLETED = "_incubate_preset"  # the shell's function that completes a preset, see cli/files.py


class Parser(argparse.ArgumentParser):
    """argparse's, with errors like those of the commands: a line that begins with `incubate: `, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"incubate: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        namespace, unknown = super().parse_known_args(args, namespace)
        if misspelt := [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]:
            self.error(f"unknown option {misspelt[0]}; {_nearest(misspelt[0], self._option_string_actions)}")
        return namespace, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"unknown choice {value!r}; {_nearest(value, action.choices)}")


def _nearest(word: str, known: Iterable[str]) -> str:
    from incubate_lib.config import nearest  # only now: it takes pydantic, which `--help` does not need

    return nearest(word, known)


class Commands:
    """The commands of a parser."""

    def __init__(self, parser: Parser) -> None:
        self._parsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(self, function: Callable[[argparse.Namespace], int], *examples: str) -> Parser:
        """Add the command that a function is: its docstring says what it does, it returns the exit status."""
        name = function.__name__.rstrip("_")
        parser = self._parsers.add_parser(
            name,
            help=function.__doc__,
            description=function.__doc__,
            epilog="\n  ".join(["for example:", *(f"incubate {name} {example}" for example in examples or [""])]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(command=function)
        return parser


def preset_arguments(command: Parser, what: str = "", **how: Any) -> None:
    """Add the preset, which is digits if left out, and `--set`."""
    how = {"nargs": "?", "default": "digits", "help": f"a preset, or a YAML file of yours{what} (default: digits)"} | how
    command.add_argument("preset", **how).complete = {"bash": COMPLETED, "zsh": COMPLETED}
    set_argument(command, "e.g. training.epochs=20")


def set_argument(command: Parser, text: str) -> None:
    command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=text)


def list_arguments(command: Parser, strategies: str = "those that were run", seeds: str = "those that were run") -> None:
    """Add the lists of strategies and seeds; the words say what they are by default."""
    command.add_argument("--strategies", nargs="+", metavar="NAME", help=f"default: {strategies}")
    command.add_argument("--seeds", nargs="+", type=int, metavar="N", help=f"default: {seeds}")


def backend_arguments(command: Parser, what: str) -> None:
    """Add the options of the machine or cluster that trains."""
    command.add_argument("--backend", choices=backends.names(), default=backends.DEFAULT, help="default: local")
    backends.add_options(command, what)
