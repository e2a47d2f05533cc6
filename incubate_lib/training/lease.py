"""Hold a folder among processes of many hosts, without file locks.

Network file systems lack file locks or break them, and the clocks of hosts differ. So every holder makes the next
numbered record, exclusively, which is atomic everywhere; keeps touching it, so that its age can be read on the file
server's own clock; and may be succeeded once its process is known to be dead, or gives no sign of life. Whoever was
taken for dead by mistake (a host cut off for a while) finds a newer record than its own before it next writes, and
gives up: `check`.
"""

import contextlib
import datetime
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from incubate_lib import backends

BEAT_SECONDS = 10.0  # between signs of life
LOST_SECONDS = 120.0  # a holder on another host that gave no sign of life for so long is taken for dead
WRITING_SECONDS = 5.0  # that a record may be there without its content; one that stays so is nobody's
UNWRITTEN = {"host": "(unknown)", "pid": "(unknown)"}
WRITTEN = {"host", "pid", "born", "ended"}  # in every record
KEPT = 3  # records that are kept, for people


class Lost(Exception):
    """Another process took the folder over: this one must not write into it any more."""


@dataclass(frozen=True)
class Lease:
    """This process's hold on a folder: the newest record in it."""

    folder: Path  # of the records
    number: int

    @classmethod
    def take(cls, folder: Path) -> "Lease | None":
        """Take the folder if nobody alive holds it; None if somebody does. It is let go by `end`, or by dying."""
        folder.mkdir(parents=True, exist_ok=True)
        numbers = _numbers(folder)
        newest = numbers[-1] if numbers else 0
        if holder(folder):
            return None
        lease = cls(folder, newest + 1)
        here = backends.attempt()
        about = {
            "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()), "ended": False,
            "job": here.job, "restart": str(here.restart), "since": datetime.datetime.now().isoformat(" ", "minutes"),
        }  # fmt: skip
        try:
            handle = os.open(lease.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:  # somebody was faster
            return None
        try:
            with open(handle, "w") as file:
                file.write(json.dumps(about))
        except OSError:  # the disk is full
            lease.path.unlink(missing_ok=True)
            raise
        for old in numbers[:-KEPT]:
            (folder / _name(old)).unlink(missing_ok=True)
        return lease

    @property
    def path(self) -> Path:
        return self.folder / _name(self.number)

    def check(self) -> None:
        """Raise Lost if the folder was taken over."""
        if _numbers(self.folder)[-1:] != [self.number]:
            raise Lost(f"another process took over {self.folder.parent}, because this one seemed dead; it goes on there")

    @contextlib.contextmanager
    def held(self) -> Iterator["Lease"]:
        """Give signs of life in the background, whatever the process is busy with, and let go in the end."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_SECONDS):
                with contextlib.suppress(OSError):  # the file server is away: it may come back in time
                    os.utime(self.path)  # to the file server's time

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield self
        finally:
            over.set()
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(self.path.read_text())
                self.path.write_text(json.dumps(record | {"ended": True}))


def holder(folder: Path) -> dict[str, Any] | None:
    """Return host, pid and job of the process that holds a folder; None if nobody alive does.

    `lost_in` are the seconds after which it will be taken for dead without a sign of life; none where its process is seen.
    """
    numbers = _numbers(folder)
    if not numbers:
        return None
    path = folder / _name(numbers[-1])
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    is_whole = isinstance(record, dict) and record.keys() >= WRITTEN and type(record["pid"]) is int
    if not is_whole:  # about to be written, or of a full disk, or foreign
        left = _left(path, WRITING_SECONDS)
        return UNWRITTEN | {"lost_in": left} if left else None
    if record["ended"] or _is_over(record):
        return None
    if record["host"] == socket.gethostname() and _place(record["born"]) == _place(_born(os.getpid())):
        born = _born(record["pid"])
        if born == record["born"] or born != "alive":
            return record if born == record["born"] else None
        # else somebody else's process, of which /proc says nothing: only its signs of life count
    left = _left(path, LOST_SECONDS)
    return record | {"lost_in": left} if left else None


def in_words(record: dict[str, Any]) -> str:
    """Say who holds a folder, since when, and when that ends by itself."""
    since = f", since {record['since']}" if "since" in record else ""
    left = record.get("lost_in")
    without = f"; without a sign of life from it, it is taken over in {left:.0f} s" if left else ""
    return f"process {record['pid']} on {record['host']}{since}{without}"


def _is_over(record: dict[str, Any]) -> bool:
    """Whether it is of an earlier attempt of this very job, which was ended before it started this one."""
    here = backends.attempt()
    return bool(record.get("job")) and record["job"] == here.job and record.get("restart") != str(here.restart)


def _left(path: Path, patience: float) -> float:
    """Return the seconds until a record that is not touched is too old, or 0.

    One from the future is of a clock that was set back since; who is alive touches it again soon.
    """
    try:
        age = _now(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    return max(0.0, patience - abs(age))


def _born(pid: int) -> str | None:
    """Return what distinguishes a process from a later one with the same number, and from those of before a reboot."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {ticks}"
    except OSError:  # no /proc here: the number must do
        return "alive" if psutil.pid_exists(pid) else None


def _place(born: str | None) -> str:
    """Return what counts processes where one was born: this boot, or a container, of which several may have one host name."""
    return (born or "").rpartition(" ")[0]


def _now(folder: Path) -> float:
    """Return the time on the clock that stamps the files of this folder; this host's where it may not be written."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_mtime
    except OSError:
        return time.time()


def _name(number: int) -> str:
    return f"{number:06}.json"


def _numbers(folder: Path) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(int(name[:-5]) for name in os.listdir(folder) if re.fullmatch(r"\d+\.json", name))
    return []
