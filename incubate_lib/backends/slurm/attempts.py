"""The attempts at a phase, as its folder records them, and whether another one makes sense.

A row each in `attempts.json`: whose it was, the step it began from, how it ended and at which step it had saved. Nothing of
this is in anybody's memory: any attempt may end by a kill at any moment.
"""

import itertools
import time
from typing import Any

from incubate_lib.backends.interface import Attempt
from incubate_lib.training.files import read_json, write_json
from incubate_lib.training.runs import PhaseFolder

AGAIN = 75  # exit status of a verdict: the job is to be requeued
WARNED = "asked to stop (time limit, preemption or cancellation)"
NO_WORD = "ended without a word (killed, out of memory, or its node went down)"


def attempts(folder: PhaseFolder) -> list[dict[str, Any]]:
    return read_json(folder.path / "attempts.json") or []


def begin(folder: PhaseFolder, here: Attempt) -> None:
    """Note that this attempt begins."""
    close(folder, NO_WORD)  # an earlier attempt that could not say so itself
    log = folder.path / "log.txt"
    mine = {"job": here.job, "restart": here.restart, "node": here.place, "began": time.time()}
    mine |= {"from_step": _saved_step(folder), "log_from": log.stat().st_size if log.exists() else 0}
    write_json(folder.path / "attempts.json", [*attempts(folder), mine])


def close(folder: PhaseFolder, how: str) -> None:
    """Note how the last attempt ended, unless that is known."""
    rows = attempts(folder)
    if rows and "ended" not in rows[-1]:
        rows[-1] |= {"ended": how, "until": time.time(), "saved_step": _saved_step(folder)}
        write_json(folder.path / "attempts.json", rows)


def _saved_step(folder: PhaseFolder) -> int:
    return folder.status().get("saved_step", 0)


def has_ended(folder: PhaseFolder, job: str) -> bool:
    """Whether the last attempt at a phase is of this job, and is over."""
    return any(row["job"] == job and "ended" in row for row in attempts(folder)[-1:])


def stuck(attempts: list[dict[str, Any]], job: str, limit: int) -> bool:
    """Whether the last `limit` attempts of this job failed in the same way and at the same step.

    Three times as many where they failed in different ways, or where Slurm ended them: that is bad luck, up to a point.
    One that nobody could close, because its node was lost, is bad luck, too.
    """
    mine = [a for a in attempts if a["job"] == job]
    reached = mine[-1].get("saved_step", mine[-1]["from_step"]) if mine else 0
    fruitless = list(itertools.takewhile(lambda a: a["from_step"] == reached, reversed(mine)))
    kinds = {a.get("ended", NO_WORD).partition(":")[0] for a in fruitless[:limit]}
    failed = len(kinds) == 1 and not kinds & {WARNED, NO_WORD}
    return len(fruitless) >= (limit if failed else 3 * limit)
