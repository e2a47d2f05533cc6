"""How tests wait: for progress, never for a time in which a busy machine may not be done.

What must happen is waited for; its one limit tells a test that hangs from one that is slow. What must not have happened
yet when a test looks is held back until the test lets it go on: see `Hooks`.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from incubate_lib.training.files import write_json

HANG = 1200.0  # seconds: many times what anything here takes, even beside other work on the same cores


def wait_for(true: Callable[[], Any], what: object = "progress", said: Callable[[], str] = str) -> Any:
    """Wait until something is true and return it; AssertionError with what was waited for and what was said by then."""
    deadline = time.monotonic() + HANG
    while not (result := true()):
        assert time.monotonic() < deadline, f"waited {HANG:.0f} s for {what}\n{said()}"
        time.sleep(0.1)
    return result


def join(process: Any, what: object = "a process to end") -> int:
    """Wait until a process of multiprocessing has ended; return its exit code."""
    process.join(HANG)
    assert process.exitcode is not None, f"waited {HANG:.0f} s for {what}"
    return process.exitcode


class Hooks:
    """Holds phases that other processes train, or has them fail; `env` is what these processes need (hooks/sitecustomize.py).

    A phase is named by a part of its name in the run: "seed-1", "seed-0/meta", "incubate-0".
    """

    def __init__(self, folder: Path) -> None:
        self.file, self.rules = folder / "hooks.json", {"hold": {}, "fail": {}}
        write_json(self.file, self.rules)
        here = Path(__file__).parent
        self.env = {"TEST_HOOKS": str(self.file), "PYTHONPATH": os.pathsep.join(map(str, (here / "hooks", here.parent)))}

    def hold(self, phase: str, steps: int) -> None:
        """Have each process that trains the phase do so many steps, and wait then until it is let go or asked to stop."""
        self._set("hold", phase, steps)

    def let_go(self, phase: str) -> None:
        self._set("hold", phase, None)

    def fail(self, phase: str, step: int) -> None:
        """Have the phase raise an OSError at a step."""
        self._set("fail", phase, step)

    def _set(self, kind: str, phase: str, number: int | None) -> None:
        self.rules[kind][phase] = number
        write_json(self.file, self.rules)
