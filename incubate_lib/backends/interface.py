"""Where phases run: what a backend can do, and what a process inside one of its jobs knows.

A member is a folder beside this file. Its `__init__` is read whenever `incubate` starts or a folder is held, and so imports
nothing that takes time: `options` are those of the command line that are for this backend alone, each with what argparse's
add_argument takes; `attempt()` says what this process is, if it is in a job of this backend, else None. `BACKEND` in its
`backend.py` does the rest.
"""

import argparse
import os
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Attempt:
    """What a process inside a job is: which start of which job, where, and how it reaches the job's other nodes.

    It is warned by a file: a backend that may end a job early names it in $INCUBATE_STOP, and makes it some time before.
    Signals that reach the job's processes then mean nothing else.
    """

    job: str | None = None  # none: no job, a process of this machine
    restart: int = 0  # of this job, counted from 0
    nodes: int = 1
    node_rank: int = 0
    place: str = field(default_factory=lambda: os.uname().nodename)
    cores: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))  # that each node may use

    def on_each_node(self) -> list[str]:
        """Return the beginning of a command that starts one process on each node, this one first."""
        return []

    def __str__(self) -> str:
        return "no job of a cluster"


class Backend:
    """A place where phases run. The truth about a phase is in its folder; a backend adds what it alone knows."""

    name = ""  # after --backend
    title = ""  # for people, who read "Slurm's queue"
    options: dict[str, dict[str, Any]] = {}  # of a backend without a folder here, as its `attempt` is
    has_nodes = False  # whether several nodes can train one phase
    has_preview = False  # whether what it would be given can be shown
    pause = 0.0  # seconds between two questions to it, at least

    def settings(self, options: argparse.Namespace) -> Any:
        """Return this backend's own settings, from its options; SettingsError if anything is off."""

    def prepare(self) -> None:
        """Begin what takes time, in the background, while runs are planned."""

    def places(self, devices: int, settings: Any = None) -> int | None:
        """Return how many phases of so many devices go on side by side; none: as many as there are."""

    # -- a run: a plan (pipeline.graph.Plan)

    def submit(self, plan: Any, settings: Any, console: Any, *, analysis: dict[str, Any] | None = None) -> int | None:
        """Hand over what is missing of a run: its phases, each as the path of its file.

        Return an exit status where all has ended: 0 done, 1 something failed, 130 stopped; none where jobs go on.

        `analysis` are the parameters of the notebook that is to follow; without it phases alone will do, without their
        notebooks. SettingsError before anything begins if it cannot be done.
        """
        raise NotImplementedError

    def preview(self, plan: Any, settings: Any, *, analysis: dict[str, Any]) -> None:
        """Print what `submit` would hand over."""
        raise NotImplementedError

    def knows(self, experiment: Any) -> bool:
        """Whether a run (pipeline.experiment.Experiment) was handed to this backend."""
        return False

    def still_active(self, experiment: Any) -> int:
        """Return how many jobs of a run wait or run without the process that handed them over, as far as is known here."""
        return 0

    def states(self, plan: Any, lines: list[Any]) -> list[str]:
        """Add what this backend knows to the lines (pipeline.view.Line) of a status; return sentences for the lines below."""
        return []

    def explain(self, reason: str) -> str | None:
        """Say in plain words why a job waits, where its backend's own word does not say what to do."""

    def stop(self, experiment: Any) -> str | None:
        """Have a run save and stop, whose stop file is there already; say in words who was asked, none if nobody was."""

    def attempt(self) -> Attempt | None:
        """Return what this process is, if it is in a job of this backend."""
