"""`incubate …`: thin commands, a file a group. Bad input ends in a line or two and exit status 2.

Only the group of the command that was given is imported, and what is large only inside its functions: most commands need no
torch, and `incubate --help` is to be there at once.
"""

import contextlib
import errno
import importlib
import os
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from incubate_lib.cli.parser import in_short
from incubate_lib.cli.parser import parser as parser

LONGEST_TEMPORARY = 60  # bytes; sockets may have 108, and processes add some folders of their own
FULL = (errno.ENOSPC, errno.EDQUOT)
OTHERS = (errno.ELOOP, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENXIO)
# errors of the system → what to do about them
OF_THE_MACHINE = dict.fromkeys(OTHERS, "see what is there, or give another place") | {
    errno.ENOSPC: "make room and call again: what is finished stays finished",
    errno.EDQUOT: "make room within your quota and call again: what is finished stays finished",
    errno.EROFS: "set INCUBATE_DATA to a folder that can be written",
    errno.EACCES: "set INCUBATE_DATA to a folder of yours, or ask for the right to use this one",
    errno.EPERM: "set INCUBATE_DATA to a folder of yours, or ask for the right to use this one",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status: 0 done, 1 something failed or is at fault, 2 refused, 70 our fault."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a terminal has no character for is no reason to end
            stream.reconfigure(errors="replace")
    options = parser().parse_args(arguments)
    from incubate_lib.config import SettingsError, data_folder

    _shorten_temporary_folder()
    if getattr(options, "devices", None) is not None:
        options.set.append(f"machine.devices={options.devices}")
    group, _, function = options.function.partition(".")
    try:
        with _busy(options.busy) as options.done:  # called before anything is printed that is no plain line
            return getattr(importlib.import_module(f"incubate_lib.cli.{group}"), function)(options) or 0
    except SettingsError as error:
        print(f"incubate: {in_short(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("incubate: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        sys.stderr.close()
        return 141
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            return _our_fault(error)
        where = in_short(str(error.filename or data_folder()))
        print(f"incubate: {error.strerror} ({where}); {OF_THE_MACHINE[error.errno]}", file=sys.stderr)
        return 1 if error.errno in FULL else 2
    except Exception as error:
        return _our_fault(error)


@contextlib.contextmanager
def _busy(words: str) -> Iterator[Callable[[], None]]:
    """Show on a terminal that something is under way, of what takes more than a moment; yield what ends that."""
    if not words or not (sys.stdout.isatty() and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console

    with Console().status(f"{words} …") as status:
        yield status.stop


def _our_fault(error: Exception) -> int:
    """Write down what went wrong where nothing should; return the exit status."""
    with tempfile.NamedTemporaryFile("w", prefix="incubate-", suffix=".txt", delete=False) as file:
        file.write(f"{sys.argv}\n{traceback.format_exc()}")
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    print(f"incubate: this is a fault of incubate itself; please report {file.name} ({what})", file=sys.stderr)
    return 70


def _shorten_temporary_folder() -> None:
    """Have processes find a long $TMPDIR, as sites set it for each job, by a short name: sockets lie there."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) <= LONGEST_TEMPORARY:
        return
    short = Path("/tmp", f"incubate-{os.getuid()}-{zlib.crc32(os.fsencode(folder)):08x}")
    with contextlib.suppress(FileExistsError):
        short.symlink_to(folder)
    if short.lstat().st_uid == os.getuid() and os.path.samefile(short, folder):
        os.environ["TMPDIR"] = tempfile.tempdir = str(short)
