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
from multiprocessing import forkserver
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
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)


def prepare() -> None:
    """Begin to warm up, in the background; the first `start` does it otherwise."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    try:
        forkserver.ensure_running()  # it inherits these: what is sent to all of the terminal's group is for the pool alone
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(name: str, output: str, parameters: dict[str, Any], *, log: str, env: dict[str, str]) -> multiprocessing.Process:
    """Execute a notebook in a fork of the warm process, its output appended to `log`; it ends with this process."""
    prepare()
    process = context.Process(target=_notebook, args=(name, output, parameters, log, env))
    process.start()
    return process


def start_phase(phase: str, parameters: dict[str, Any], *, log: str, env: dict[str, str]) -> multiprocessing.Process:
    """Train one phase without its notebook, in a fork of the warm process; `parameters` are those of `open_phase`."""
    prepare()
    process = context.Process(target=_phase, args=(phase, parameters, log, env))
    process.start()
    return process


def _notebook(name: str, output: str, parameters: dict[str, Any], log: str, env: dict[str, str]) -> None:
    from incubate_lib.pipeline.notebook import run

    _settle(log, env)
    kernel = _ForkedKernel()  # now: no thread runs yet
    _end_with_parent()
    manager = type("WarmKernelManager", (_WarmKernelManager,), {"forked": kernel})
    try:
        code = run(name, output, parameters, kernel_manager_class=manager)
    finally:
        kernel.kill()  # it may never have been asked for, and waits
    raise SystemExit(code)


def _phase(phase: str, parameters: dict[str, Any], log: str, env: dict[str, str]) -> None:
    from incubate_lib.pipeline.notebook import report_errors
    from incubate_lib.pipeline.strategies import open_phase

    _settle(log, env)
    _end_with_parent()
    raise SystemExit(report_errors(lambda: open_phase(phase, **parameters).run()))


def _settle(log: str, env: dict[str, str]) -> None:
    """Be a process of its own group, environment and log."""
    os.setsid()  # out of the terminal's group
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not env.get("INCUBATE_STOP"):  # a cluster signals every process of a job; there this file tells what to do
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


class _ForkedKernel:
    """A kernel process that waits for its connection file; it looks like the Popen that LocalProvisioner expects."""

    stdin = stdout = stderr = None

    def __init__(self) -> None:
        ours, self.pipe = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.get_context("fork").Process(target=self._serve, args=(ours,))
        self.process.start()
        self.pid = self.process.pid

    @staticmethod
    def _serve(pipe: Any) -> None:
        from ipykernel.kernelapp import IPKernelApp

        os.setsid()
        _end_with_parent()
        IPKernelApp.launch_instance(argv=["-f", pipe.recv()])

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


class _WarmKernelManager(AsyncKernelManager):
    """Hands the connection file to a kernel that is there already."""

    forked: _ForkedKernel

    async def _async_pre_start_kernel(self, **kw: Any) -> tuple[list[str], dict[str, Any]]:
        self.kernel_id = self.kernel_id or os.urandom(8).hex()
        self.provisioner = _Provisioner(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
        return await super()._async_pre_start_kernel(**kw)


class _Provisioner(LocalProvisioner):
    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        self.process = self.parent.forked
        self.process.pipe.send(self.parent.connection_file)
        self.pid = self.process.pid
        return self.connection_info
