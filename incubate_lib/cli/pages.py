"""Every command and its options as a page has them."""

import argparse
from collections.abc import Iterable

from incubate_lib.cli.parser import parser


def commands() -> str:
    """Return all commands, each with its help, its examples and a table of its options, in Markdown."""
    known = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return "".join(_command(name, command) for name, command in known.choices.items())


def _command(name: str, command: argparse.ArgumentParser) -> str:
    examples = command.epilog.removeprefix("for example:").replace("\n  ", "\n").strip()
    options = [action for action in command._actions if action.dest != "help"]
    table = ["| option | meaning |", "|---|---|", *map(_option, options)] if options else []
    return "\n".join([f"### incubate {name}", "", command.description, "", "```sh", examples, "```", "", *_lines(table)])


def _option(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings or [action.dest])
    choices = f"one of {', '.join(f'`{choice}`' for choice in action.choices)}" if action.choices else ""
    return f"| {names} | {'; '.join(filter(None, [action.help, choices]))} |"


def _lines(table: Iterable[str]) -> list[str]:
    lines = list(table)
    return [*lines, "", ""] if lines else [""]
