"""Start notebooks and their kernels as forks of one warm process.

Importing papermill, torch, timm and matplotlib takes 20 to 30 seconds of processor time on a slow machine, in every
notebook again; the chain of `digits` has 15. The standard library's forkserver imports them once and forks from there.
It only imports: no thread runs, no operation of torch, no CUDA, so a fork of it is sound. Each notebook still has
processes of its own.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

PRELOAD = [
    "incubate_lib.pipeline.notebook",
    "papermill",
    "ipykernel.kernelapp",
    "torch._dynamo",  # the first optimiser would import it
    "timm",
    "matplotlib.backends.backend_agg",
    "incubate_lib.phases.run",
    "incubate_lib.report.html",
    "incubate_lib.report.widgets",
]
ATTEMPTS = 10  # to fork a process
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)


def prepare() -> None:
    """Begin to warm up, in the background; the first `start` does it otherwise."""
    # it inherits that: what is sent to all of the terminal's group is for the pool alone
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(what: str, parameters: dict[str, Any], folder: Path, output: str | None, threads: int, gpus: Sequence[str] = ()) -> Any:
    """Execute a notebook, to be kept in `folder` as `output`, or without one train a phase, with these cores and GPUs.

    It runs in a process forked from the warm one, and ends with this one. What it prints is appended to the folder's log.txt.
    The parameter of a phase is the path of its file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"INCUBATE_THREADS": str(threads), "INCUBATE_HEADLESS": "1"}
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    for attempt in range(ATTEMPTS):
        prepare()
        process = context.Process(target=_work, args=(what, parameters, folder, output, env))
        try:
            process.start()
            break
        except (EOFError, ConnectionError):  # the warm process was killed just now; `prepare` starts another
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(0.1)  # it may not be gone for the system yet
    return process


def _work(what: str, parameters: dict[str, Any], folder: Path, output: str | None, env: dict[str, str]) -> None:
    from incubate_lib.phases.job import read_job
    from incubate_lib.phases.run import run_phase
    from incubate_lib.pipeline.notebook import execute, reported

    _settle(folder / "log.txt", env)
    if output is None:
        _end_with_parent()
        with reported():
            run_phase(read_job(parameters["phase"]))
        return
    kernel = _Kernel()  # now: no thread runs yet
    kernel.start()
    _end_with_parent()
    manager = type("Manager", (_Manager,), {"forked": kernel})
    try:
        with reported():
            execute(what, folder / output, parameters, kernel_manager_class=manager)
    finally:
        kernel.kill()  # it may never have been asked for, and waits


def _settle(log: Path, env: dict[str, str]) -> None:
    """Be a process of its own group, environment and log."""
    os.setsid()  # out of the terminal's group
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # a cluster signals every process of a job; there this file says what to do
    if not env.get("INCUBATE_STOP"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(env)


def _end_with_parent() -> None:
    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Kernel(multiprocessing.get_context("fork").Process):
    """A kernel process that waits for its connection file; it has what LocalProvisioner uses of a Popen."""

    stdin = stdout = stderr = None

    def __init__(self) -> None:
        super().__init__()
        self.ours, self.pipe = multiprocessing.Pipe(duplex=False)

    def run(self) -> None:
        from ipykernel.kernelapp import IPKernelApp

        os.setsid()
        _end_with_parent()
        IPKernelApp.launch_instance(argv=["-f", self.ours.recv()])

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int | None:
        self.join()
        return self.exitcode

    def send_signal(self, number: int) -> None:
        if self.is_alive():
            os.kill(self.pid, number)


class _Manager(AsyncKernelManager):
    """Has a provisioner from the beginning, and so does not look for one."""

    forked: _Kernel

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.provisioner = _Provisioner(kernel_spec=self.kernel_spec, parent=self)


class _Provisioner(LocalProvisioner):
    """Hands the connection file to a kernel that is there already."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        self.process = self.parent.forked
        self.process.pipe.send(self.parent.connection_file)
        self.pid = self.process.pid
        return self.connection_info
