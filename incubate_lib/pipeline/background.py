"""Start a run that needs neither this kernel nor the browser, and stop one, wherever it runs. One call each, from a notebook."""

import os
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

from incubate_lib import backends
from incubate_lib.config import SettingsError, load_settings, refuse
from incubate_lib.pipeline.execution import stop_phases, who_runs
from incubate_lib.pipeline.experiment import STOP_FILE, Experiment, source_of
from incubate_lib.pipeline.recorded import recorded_plan
from incubate_lib.pipeline.strategies import plan
from incubate_lib.training.lease import holder

LOG = "run.log"  # in the experiment's folder: what the command line would print
START_SECONDS = 120.0  # that a run may take to be at work; it is planned already, so a slow disk's imports are all there is
# variables that speak of this kernel
KERNELS_OWN = ("JPY_", "FORCE_COLOR", "CLICOLOR", "MPLBACKEND", "INCUBATE_HEADLESS")


@dataclass(frozen=True)
class Background:
    """A run that was started in the background."""

    experiment: Experiment
    process: Popen

    @property
    def log(self) -> Path:
        return self.experiment.path / LOG

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends; return its exit status: 0 all done, 1 something failed, 130 stopped."""
        return self.process.wait(timeout)

    def __repr__(self) -> str:
        name, code = self.experiment.path.name, self.process.poll()
        state = f"runs in the background, as process {self.process.pid}"
        if code is not None:
            state = f"has ended (exit status {code})"
        return f"{name} {state}. It needs neither this kernel nor the browser; what it prints is in {self.log}"


def start_run(
    preset: str = "digits",
    overrides: Sequence[str] = (),
    *,
    strategies: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    jobs: int | None = None,
) -> Background:
    """Start `incubate run` in the background and return when it is at work; finished phases are kept, half-finished go on.

    `jobs` phases are trained side by side. SettingsError, before anything is started, for what could not be trained, and
    while another run is at work there.
    """
    check_lists(overrides, strategies, seeds)
    settings = load_settings(preset, list(overrides))
    backends.get().settings(Namespace(jobs=jobs))
    backends.check_nodes([settings.machine])
    experiment = Experiment.of(settings)
    _check_free(experiment)
    plan(settings, strategies, seeds).write()  # with what planning has measured, so that the other process need not
    command = [sys.executable, "-m", "incubate_lib.cli", "run", source_of(preset, ())["preset"]]
    command += [f"--set={override}" for override in overrides] + ["--seeds", *map(str, seeds)]
    command += ["--strategies", *strategies] if strategies else []
    command += ["--jobs", str(jobs)] if jobs else []
    env = {name: value for name, value in os.environ.items() if not name.startswith(KERNELS_OWN)}
    log = experiment.path / LOG
    with open(log, "ab") as file:
        began = file.tell()
        # a session of its own: what ends the kernel or its terminal does not reach it
        process = Popen(command, stdin=DEVNULL, stdout=file, stderr=STDOUT, env=env, start_new_session=True)
    # or it would stay a zombie, and seem to be at work, when killed
    threading.Thread(target=process.wait, daemon=True).start()
    _await_start(experiment, process, log, began)
    return Background(experiment, process)


def _check_free(experiment: Experiment) -> None:
    if other := who_runs(experiment.path):
        raise SettingsError(f"a run ({other}) is at work in {experiment.path} already; watch it, or stop it first")
    backends.check_free(experiment, "stop them first")


def _await_start(experiment: Experiment, process: Popen, log: Path, began: int) -> None:
    """Wait until the process has the experiment, or has ended; SettingsError with its last words if it could not begin."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if (holder(experiment.path / "lease") or {}).get("pid") == process.pid:
            return
        if process.poll() is not None:
            if process.returncode in (0, 1, 130):  # those say how a run ended
                return
            said = log.read_bytes()[began:].decode(errors="replace").strip().splitlines()
            words = said[-1].removeprefix("incubate: ") if said else "it said nothing"
            raise SettingsError(f"the run could not be started: {words}")
        time.sleep(0.1)
    what = f"process {process.pid} has not begun after {START_SECONDS:.0f} s; it may still do so, or `incubate stop` ends it"
    raise SettingsError(f"{what}. What it prints is in {log}")


def check_lists(overrides: Sequence[str], strategies: Sequence[str] | None, seeds: Sequence[int]) -> None:
    """Raise SettingsError for what the command line could not give, for example a word where a list is meant."""
    for name, values in {"overrides": overrides, "strategies": strategies or (), "seeds": seeds}.items():
        kind, words = (int, "whole numbers") if name == "seeds" else (str, "words")
        if isinstance(values, (str, int)):  # a word would be a list of its letters
            raise SettingsError(f"{name} is {values!r}; write a list, [{values!r}]")
        for value in values:
            if type(value) is not kind:
                raise SettingsError(f"{name} has {value!r} in it; they must be {words}")
    if not seeds:
        raise SettingsError("seeds is empty; there must be at least one")


def stop_run(experiment: Experiment) -> str:
    """Have a run save checkpoints and stop, wherever it runs; return a sentence that says who was asked.

    SettingsError if there is no run.
    """
    experiment.check_sound()
    refuse(not experiment.is_known(), f"nothing to stop: there is no run in {experiment.path}")
    other = f"the run {experiment.path.name} has other settings by now; give those to stop it"
    refuse(not experiment.is_present(), other)
    (experiment.path / STOP_FILE).touch()
    trained = {node.digest: node.title for node in recorded_plan(experiment.path).nodes if node.folder.trainer()}
    needed = stop_phases(trained, but=experiment.path)
    kept = [f"; {trained[digest]} goes on, because run {other} needs it, too" for digest, other in needed.items()]
    failed = None
    for backend in (backends.of(experiment), backends.get()):
        try:
            if words := backend.stop(experiment):
                return words + "".join(kept)
        except SettingsError as error:  # no Slurm here, to which the run was once given
            failed = error
    if failed:
        raise failed
    nobody = f"no `incubate run` is at work in {experiment.path}; phases that notebooks train there are asked to stop"
    return nobody + "".join(kept)
