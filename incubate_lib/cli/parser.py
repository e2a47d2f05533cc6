"""The parser of the command line, made from `commands.toml`: errors in a line, and `did you mean` for what is misspelt."""

import argparse
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from incubate_lib import __version__, backends

COMPLETED = "_incubate_preset"  # the shell's function that completes a preset, see cli/files.py
LONGEST_MESSAGE = 900  # characters
TYPES = {"int": int, "float": float}


class Parser(argparse.ArgumentParser):
    """argparse's, with errors like those of the commands: a line that begins with `incubate: `, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"incubate: {in_short(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        namespace, unknown = super().parse_known_args(args, namespace)
        if misspelt := [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]:
            self.error(f"unknown option {misspelt[0]}; {_nearest(misspelt[0], self._option_string_actions)}")
        return namespace, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"unknown choice {value!r}; {_nearest(value, action.choices)}")


def in_short(message: str) -> str:
    """Return a message that fits a screen: values of the user's may be of any length."""
    return message if len(message) <= LONGEST_MESSAGE else f"{message[: LONGEST_MESSAGE - 200]} … {message[-200:]}"


def _nearest(word: str, known: Iterable[str]) -> str:
    from incubate_lib.config import nearest  # only now: it takes pydantic, which `--help` does not need

    return nearest(word, known)


def parser() -> Parser:
    """Return what knows all commands and their options; a command's `function` is the one in this folder that it is."""
    commands = tomllib.loads(Path(__file__).with_name("commands.toml").read_text())
    shared = commands.pop("shared")
    rare = {name: about["help"] for name, about in commands.items() if "rare" in about}
    parser = Parser(
        prog="incubate",
        description="Train a network in pieces, and see what it costs.",
        epilog="\n".join(["less often:", *_listed(rare), "", "`incubate COMMAND --help` explains one and gives examples."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parsers = parser.add_subparsers(title="every day", required=True, metavar="COMMAND")
    for name, about in commands.items():
        examples = [f"incubate {name} {example}".rstrip() for example in about.get("examples", [""])]
        command = parsers.add_parser(
            name,
            **({} if name in rare else {"help": about["help"]}),
            description=about["help"],
            epilog="\n  ".join(["for example:", *examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(function=about["function"], busy=about.get("busy", ""))
        for argument, how in about.get("arguments", {}).items():
            if argument == "--backend":
                _add_backends(command, how["what"])
            else:
                _add_argument(command, argument, shared.get(argument, {}) | how)
    return parser


def _listed(commands: dict[str, str]) -> list[str]:
    """Return lines as argparse lists commands in."""
    width = max(60, shutil.get_terminal_size().columns - 2)
    indent = " " * 24
    return [
        line
        for name, about in commands.items()
        for line in textwrap.wrap(about, width, initial_indent=f"    {name:<20}", subsequent_indent=indent)
    ]


def _add_argument(command: Parser, name: str, how: dict[str, Any]) -> None:
    how = {key: value for key, value in how.items() if value != ""}
    if "type" in how:
        how["type"] = TYPES[how["type"]]
    names = [name, how.pop("short")] if "short" in how else [name]
    action = command.add_argument(*names, **how)
    if name == "preset":
        action.complete = {"bash": COMPLETED, "zsh": COMPLETED}


def _add_backends(command: Parser, what: str) -> None:
    """Add the options of the machine or cluster that trains."""
    command.add_argument("--backend", choices=backends.names(), default=backends.DEFAULT, help="default: local")
    backends.add_options(command, what)
