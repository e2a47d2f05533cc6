"""What a Slurm job does: one attempt at a phase's notebook, and what is to follow from how it ended.

    python -m incubate_lib.backends.slurm.job attempt ABOUT        as a job step; exit status 0: the phase is finished
    python -m incubate_lib.backends.slurm.job verdict ABOUT CODE   after an attempt that was not; 75: the job is to be requeued

A warning (time limit, preemption, cancellation) becomes a file, $INCUBATE_STOP: the training loop saves and ends. A phase
that fails again and again in the same way, without a step more, is given up.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from incubate_lib.backends import slurm
from incubate_lib.backends.slurm.attempts import AGAIN, NO_WORD, WARNED, attempts, begin, close, stuck
from incubate_lib.config import SettingsError, data_folder, load_settings
from incubate_lib.phases.job import read_job
from incubate_lib.pipeline import execution
from incubate_lib.pipeline.strategies import plan
from incubate_lib.training.runs import PhaseFolder

BAD_INPUT, GIVEN_UP, STOPPED = 2, 4, 130  # exit statuses
FINAL = ("SettingsError", "FloatingPointError")  # would end the same way again


def attempt(about: dict[str, Any]) -> int:
    """Run the notebook, unless there is nothing to do; return an exit status."""
    here = slurm.attempt()
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"-- job {here.job}, start {here.restart + 1}, on {here.place}, {now}", flush=True)
    if "phase" not in about:
        return _analysis(about["parameters"], here.cores)
    job = read_job(about["phase"])
    stop = Path(os.environ["INCUBATE_STOP"])
    # preemption warns the steps of a job only, not its script
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: stop.touch())
    if job.folder.stop_file.exists():
        return STOPPED
    if job.is_complete(about["notebook"]):
        return 0
    close(job.folder, NO_WORD)  # an earlier attempt that could not say so itself
    if stuck(attempts(job.folder), here.job, about["attempts"]):
        return _give_up(job.folder, about["attempts"])
    begin(job.folder, here)
    if job.folder.trainer() is None:  # another run may have written it with other devices, while this one waited
        job.model_copy(update={"machine": job.machine.model_copy(update=about["team"])}).write()
    process = execution.start(job, here.cores, notebook=about["notebook"])
    process.join()
    if job.is_complete(about["notebook"]):
        close(job.folder, "done")
        stop.unlink(missing_ok=True)
        return 0
    return process.exitcode or 1


def verdict(about: dict[str, Any], code: int) -> int:
    """Note how the attempt ended; return AGAIN if another one makes sense, else the job's exit status."""
    if "phase" not in about or code == GIVEN_UP:
        return code
    here, job, own = slurm.attempt(), read_job(about["phase"]), Path(os.environ["INCUBATE_STOP"])
    folder = job.folder
    if job.is_complete(about["notebook"]):
        return 0
    number, restart = next(((int(row["job"]), row["restart"]) for row in attempts(folder)[-1:]), (0, 0))
    if number == int(here.job) and restart > here.restart:
        print("a later attempt took over: its node was taken for dead")
        return 1
    is_stopped = folder.stop_file.exists()
    if number > int(here.job):  # of another run, which keeps the record
        print(f"job {number} trains this phase, too; what it has finished by then is taken")
        own.unlink(missing_ok=True)
        return STOPPED if is_stopped else AGAIN
    if (number, restart) != (int(here.job), here.restart):
        begin(folder, here)  # it could not even begin
    how = "stopped" if is_stopped else WARNED if own.exists() else _failure(folder, code)
    close(folder, how)
    own.unlink(missing_ok=True)
    if is_stopped:
        print("stopped; `incubate run` goes on from the last checkpoint")
        return STOPPED
    mine = attempts(folder)[-1]
    if stuck(attempts(folder), here.job, about["attempts"]):
        return _give_up(folder, about["attempts"])
    if mine["ended"].startswith(FINAL) or (code == BAD_INPUT and how != WARNED):
        return _fail(folder, mine["ended"])
    print(f"{mine['ended']}; saved at step {mine['saved_step']}, to be requeued")
    return AGAIN


def _failure(folder: PhaseFolder, code: int) -> str:
    error = execution.last_error(folder.path / "log.txt", attempts(folder)[-1]["log_from"])
    return error or (NO_WORD if code > 128 else f"ended with exit status {code}")


def _give_up(folder: PhaseFolder, number: int) -> int:
    how = attempts(folder)[-1]["ended"]
    _fail(folder, f"given up after {number} attempts or more without a step: {how}")
    return GIVEN_UP


def _fail(folder: PhaseFolder, reason: str) -> int:
    print(f"error: {reason}", flush=True)
    folder.set_status("failed", error=reason)
    return 1


def _analysis(parameters: dict[str, Any], cores: int) -> int:
    settings = load_settings(parameters["preset"], parameters["overrides"])
    todo = plan(settings, parameters["strategies"], parameters["seeds"])
    return 0 if execution.analysed(todo) else execution.analyse(todo, parameters, Console(width=150), cores)


def main(arguments: list[str]) -> int:
    about = json.loads(arguments[1])
    try:
        return attempt(about) if arguments[0] == "attempt" else verdict(about, int(arguments[2]))
    except SettingsError as error:
        print(f"error: SettingsError: {error}", flush=True)
        if "phase" in about and (folder := (data_folder() / about["phase"]).parent).is_dir():
            PhaseFolder(folder).set_status("failed", error=str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
