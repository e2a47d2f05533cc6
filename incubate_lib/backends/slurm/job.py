"""What a Slurm job does: one attempt at a phase's notebook, and what is to follow from how it ended.

    python -m incubate_lib.backends.slurm.job attempt ABOUT        as a job step; exit status 0: the phase is finished
    python -m incubate_lib.backends.slurm.job verdict ABOUT CODE   after an attempt that was not; 75: the job is to be requeued

A warning (time limit, preemption, cancellation) becomes a file, $INCUBATE_STOP: the training loop saves and ends.
Attempts are noted in `attempts.json`; a phase that fails again and again in the same way, without a step more, is given
up. Nothing of this is in anybody's memory: any attempt may end by a kill at any moment.
"""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from incubate_lib.backends.slurm import SlurmAttempt
from incubate_lib.config import SettingsError, load_settings
from incubate_lib.pipeline import execution
from incubate_lib.pipeline.experiment import STOP_FILE
from incubate_lib.pipeline.graph import Node
from incubate_lib.pipeline.strategies import open_phase, plan
from incubate_lib.training.runs import PhaseFolder, read_json, write_json

GIVEN_UP, AGAIN, STOPPED = 4, 75, 130  # exit statuses
FINAL = ("SettingsError", "FloatingPointError")  # would end the same way again
WARNED = "told to stop (time limit, preemption or cancellation)"
NO_WORD = "ended without a word (killed, out of memory, or its node went down)"


def attempt(about: dict[str, Any]) -> int:
    """Run the notebook, unless there is nothing to do; return an exit status."""
    here = SlurmAttempt.here()
    print(f"-- job {here.job}, start {here.restart + 1}, on {here.place}, {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
    if "phase" not in about:
        return _analysis(about)
    node = _node(about)
    stop = Path(os.environ["INCUBATE_STOP"])
    for number in (signal.SIGTERM, signal.SIGUSR2):  # preemption warns the steps of a job only, not its script
        signal.signal(number, lambda *_: stop.touch())
    if (node.experiment.path / STOP_FILE).exists():
        return STOPPED
    if execution.is_complete(node):
        return 0
    _close(node, NO_WORD)  # an earlier attempt that could not say so itself
    if stuck(_attempts(node), here.job, about["attempts"]):
        return _give_up(node, about["attempts"])
    _begin(node)
    how = {"notebook": node.notebook, "output": "notebook.ipynb", "threads": here.cores}
    process = execution.start(node.folder.path, _parameters(about), **how).process
    process.join()
    if execution.is_complete(node):
        _close(node, "done")
        stop.unlink(missing_ok=True)
        return 0
    return process.exitcode or 1


def verdict(about: dict[str, Any], code: int) -> int:
    """Note how the attempt ended; return AGAIN if another one makes sense, else the job's exit status."""
    if "phase" not in about or code == GIVEN_UP:
        return code
    here, node = SlurmAttempt.here(), _node(about)
    if execution.is_complete(node):
        return 0
    own = Path(os.environ["INCUBATE_STOP"])
    newest = (_attempts(node) or [{"job": "0", "restart": 0}])[-1]
    if (int(newest["job"]), newest["restart"]) > (int(here.job), here.restart):
        print("a later attempt took over: its node was taken for dead")
        return 1
    if newest["job"] != here.job or newest["restart"] != here.restart:
        _begin(node)  # it could not even begin
    if (node.experiment.path / STOP_FILE).exists():
        print("stopped; `incubate run` goes on from the last checkpoint")
        _close(node, "stopped")
        own.unlink(missing_ok=True)
        return STOPPED
    error = execution.last_error(node.folder.path / "log.txt", _attempts(node)[-1]["log_from"])
    _close(node, WARNED if own.exists() else error or (NO_WORD if code > 128 else f"ended with exit status {code}"))
    own.unlink(missing_ok=True)
    mine = _attempts(node)[-1]
    if stuck(_attempts(node), here.job, about["attempts"]):
        return _give_up(node, about["attempts"])
    if mine["ended"].startswith(FINAL):
        return _fail(node, mine["ended"])
    print(f"{mine['ended']}; saved at step {mine['saved_step']}, to be requeued")
    return AGAIN


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


def _give_up(node: Node, number: int) -> int:
    _fail(node, f"given up after {number} attempts or more without a step: {_attempts(node)[-1]['ended']}")
    return GIVEN_UP


def _fail(node: Node, reason: str) -> int:
    print(f"error: {reason}", flush=True)
    node.folder.set_status("failed", error=reason)
    return 1


def has_ended(folder: Path, job: str) -> bool:
    """Whether the last attempt at a phase is of this job, and is over."""
    last = (read_json(folder / "attempts.json") or [{}])[-1]
    return last.get("job") == job and "ended" in last


def _analysis(about: dict[str, Any]) -> int:
    from rich.console import Console

    source = {name: about[name] for name in ("preset", "overrides")}
    todo = plan(load_settings(**source), about["strategies"], about["seeds"])
    return 0 if execution.analysed(todo) else execution.analyse(todo, source, Console(width=150), SlurmAttempt.here().cores)


def _node(about: dict[str, Any]) -> Node:
    node = open_phase(about["phase"], **_parameters(about))
    if str(node.folder.path) != about["folder"]:
        raise SettingsError(f"these settings belong to {node.folder.path}, but the job was submitted for {about['folder']}")
    return node


def _parameters(about: dict[str, Any]) -> dict[str, Any]:
    return {name: about[name] for name in ("preset", "overrides", "strategy", "seed", "module_index") if name in about}


def _attempts(node: Node) -> list[dict[str, Any]]:
    return read_json(node.folder.path / "attempts.json") or []


def _begin(node: Node) -> None:
    _close(node, NO_WORD)  # an earlier attempt that could not say so itself
    log = node.folder.path / "log.txt"
    here = SlurmAttempt.here()
    mine = {"job": here.job, "restart": here.restart, "node": here.place, "began": time.time(), "from_step": _saved_step(node)}
    mine["log_from"] = log.stat().st_size if log.exists() else 0
    write_json(node.folder.path / "attempts.json", [*_attempts(node), mine])


def _close(node: Node, how: str) -> None:
    """Note how the last attempt ended, unless that is known."""
    attempts = _attempts(node)
    if attempts and "ended" not in attempts[-1]:
        attempts[-1] |= {"ended": how, "until": time.time(), "saved_step": _saved_step(node)}
        write_json(node.folder.path / "attempts.json", attempts)


def _saved_step(node: Node) -> int:
    return node.folder.status().get("saved_step", 0)


def main(arguments: list[str]) -> int:
    about = json.loads(arguments[1])
    try:
        return attempt(about) if arguments[0] == "attempt" else verdict(about, int(arguments[2]))
    except SettingsError as error:
        print(f"error: SettingsError: {error}", flush=True)
        folder = Path(about["folder"])
        if "phase" in about and folder.is_dir():
            PhaseFolder(folder).set_status("failed", error=str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
