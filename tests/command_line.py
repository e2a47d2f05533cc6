"""The command line in a fork of the warm process that this process's notebooks are forks of, too.

It does what `incubate` does in a process of its own, but nothing is imported anew: that takes seconds of a core, and once
more for each warm process. What is said of a process from its first line on is tested with a real one.
"""

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path

from patience import join

from incubate_lib.pipeline import warm


class Begun:
    """An `incubate` at work, in a process group of its own; `output` has what it has printed so far."""

    def __init__(self, *arguments: str, env: Mapping[str, str], cwd: Path | None = None) -> None:
        self.arguments, self.place = arguments, tempfile.TemporaryDirectory(prefix="incubate-said-")
        self.files = [Path(self.place.name) / name for name in ("output", "errors")]
        warm.prepare()
        paths = [str(path) for path in self.files]
        self.process = warm.context.Process(target=_incubate, args=(arguments, dict(env), str(cwd or Path.cwd()), paths))
        self.process.start()
        self.pid = self.process.pid

    @property
    def output(self) -> str:
        return self.files[0].read_text() if self.files[0].exists() else ""

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self) -> subprocess.CompletedProcess:
        """Wait for its end; return its status and what it printed."""
        status = join(self.process, f"incubate {' '.join(self.arguments)}")
        return subprocess.CompletedProcess(self.arguments, status, *(path.read_text() for path in self.files))


def incubate(*arguments: str, env: Mapping[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Return status and output of a command line."""
    return Begun(*arguments, env=env, cwd=cwd).end()


def _incubate(arguments: list[str], env: dict[str, str], cwd: str, files: list[str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None  # the one that this is a fork of
    from incubate_lib.cli import main

    raise SystemExit(main(list(arguments)))
