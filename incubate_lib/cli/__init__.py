"""`incubate …`: thin commands, a file a group. Bad input ends in a line or two and exit status 2.

Only the group of the command that was given is imported, and what is large only inside its functions: most commands need no
torch, and `incubate --help` is to be there at once.
"""

import importlib
import sys

from incubate_lib.cli.parser import parser as parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status."""
    options = parser().parse_args(arguments)
    from incubate_lib.config import SettingsError

    if getattr(options, "devices", None) is not None:
        options.set.append(f"machine.devices={options.devices}")
    group, _, function = options.function.partition(".")
    try:
        return getattr(importlib.import_module(f"incubate_lib.cli.{group}"), function)(options) or 0
    except SettingsError as error:
        print(f"incubate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("incubate: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        sys.stderr.close()
        return 141
