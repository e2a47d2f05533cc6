"""One phase on several devices: an agent, torch.distributed.run, as a subprocess over the phase's job file; on several
machines one on each, started by the job they are in, with the first machine as the meeting point.

The caller, a notebook's kernel as well as a command line, only waits: it starts no CUDA, survives whatever happens to
the ranks, and gets a failed rank's traceback. A rank that fails leaves `rank-<n>.json` beside the job file; for one that is
killed its agent does so. (torch's own error files know only whole seconds, too coarse to say who failed first.) Ranks end
when their caller does, because their standard input closes.
"""

import datetime
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from typing import Any

from incubate_lib import backends
from incubate_lib.config import SettingsError, data_folder
from incubate_lib.phases.job import Job
from incubate_lib.training.files import read_json, write_atomic, write_json
from incubate_lib.training.runs import PhaseFolder, Stopped

NOISE = re.compile(r"^[WEI]\d{4} |torch/distributed|^\s*$")  # torch's own log
KINDS = {error.__name__: error for error in (SettingsError, FloatingPointError, Stopped, MemoryError)}
THIS = ["-m", "incubate_lib.phases.launch"]


class RankFailed(RuntimeError):
    """A rank of a data-parallel phase died; the message has its number and reason, `rank_traceback` where it happened."""

    rank_traceback = ""


def train_on_devices(job: Job, folder: PhaseFolder) -> dict[str, Any]:
    """Train a phase on several devices and return its summary; its folder must be claimed.

    Raises what the first failing rank raised, if that is bad input, a loss that is not finite or a stop, else RankFailed.
    """
    for old in folder.path.glob("rank-*.json"):
        old.unlink()
    file, machine = str(Path(job.path).with_name("job.json")), job.machine
    write_atomic(data_folder() / file, job.model_dump_json(exclude_unset=True).encode())
    command = [sys.executable, *THIS, "--agent", file]
    if machine.nodes > 1:
        command = [*_on_each_node(machine.nodes), *command, *_meeting_point()]
    cores = int(os.environ.get("INCUBATE_THREADS") or len(os.sched_getaffinity(0)))
    environment = {"OMP_NUM_THREADS": str(max(1, cores // machine.devices)), "INCUBATE_HEADLESS": "1"}
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    last = deque(maxlen=200)
    try:
        for line in process.stdout:
            last.append(line)
            if not NOISE.search(line):
                print(line, end="", flush=True)
        process.wait()
    finally:
        process.stdin.close()
        if process.poll() is None:
            process.kill()  # the ranks see their input close
            process.wait()
        process.stdout.close()
    if process.returncode == 0 and (summary := folder.finished()):
        return summary
    raise failure_of(folder, machine.team_size, job.title, "".join(last))


def _on_each_node(nodes: int) -> list[str]:
    """Return how to start one process on each node of this job, beside the one that asks."""
    here = backends.attempt()
    if here.nodes != nodes:
        way = f"use `incubate run … {backends.able('has_nodes')} --nodes {nodes}`"
        raise SettingsError(f"machine.nodes is {nodes}, but this is {here}; {way}")
    return here.on_each_node()


def _meeting_point() -> tuple[str, str]:
    """Return name and free port of this machine, which is the first of its job."""
    with socket.create_server(("", 0)) as server:
        return socket.gethostname(), str(server.getsockname()[1])


def failure_of(folder: PhaseFolder, devices: int, title: str, output: str) -> Exception:
    """Make the exception of the rank that failed first."""
    reports = [report for path in folder.path.glob("rank-*.json") if (report := read_json(path))]
    if not reports:
        return RankFailed(f"{title}: torch.distributed.run failed:\n{output.strip()[-2000:]}")
    first = min(reports, key=lambda report: report["time"])
    rank = f"rank {first['rank']} of {devices}"
    if first["kind"] == "died":
        return RankFailed(f"{title}: {rank} died (exit code {first['message']}; -9: killed, often out of memory)")
    if first["kind"] in KINDS:
        return KINDS[first["kind"]](first["message"])
    print(f"{rank}:\n{first['traceback']}", flush=True)
    error = RankFailed(f"{title}: {rank}: {first['kind']}: {first['message']}")
    error.rank_traceback = first["traceback"]
    return error


def _agent(path: Path, host: str = "", port: str = "") -> None:
    """Be torch.distributed.run on this machine, which may be one of several, and say which rank was killed."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "INCUBATE_STOP" in os.environ:  # TERM is the job's warning: the ranks act on it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT"
    machine = _read(path).machine
    where = ["--standalone", "--local-addr=127.0.0.1"]
    if host:
        where = [f"--nnodes={machine.nodes}", f"--node-rank={backends.attempt().node_rank}"]
        where += [f"--master-addr={host}", f"--master-port={port}"]
    logging.disable()  # a rank that fails has its report
    try:
        run.main([*where, f"--nproc-per-node={machine.devices}", *THIS, str(path)])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            _report(path, rank, failure.timestamp, "died", failure.exitcode)
        sys.exit(1)


def _read(path: Path) -> Job:
    return Job.model_validate_json((data_folder() / path).read_text())


def _report(job: Path, rank: int, when: float, kind: str, message: Any, where: str = "") -> None:
    report = {"rank": rank, "time": when, "kind": kind, "message": message, "traceback": where}
    write_json(data_folder() / job.with_name(f"rank-{rank}.json"), report)


def _rank(path: Path) -> None:
    """Be one rank of a job; whatever goes wrong is left in `rank-<n>.json` beside the job file."""
    threading.Thread(target=_end_with_caller, daemon=True).start()
    if stop := os.environ.get("INCUBATE_STOP"):  # a cluster warns every process of a job
        signal.signal(signal.SIGTERM, lambda *_: Path(stop).touch())
    try:
        _train(_read(path))
    except BaseException as error:
        _report(path, int(os.environ["RANK"]), time.time(), type(error).__name__, str(error), traceback.format_exc())
        sys.stdout.flush()
        os._exit(1)  # at once: other threads may wait for ranks that are gone


def _train(job: Job) -> None:
    import torch
    from torch import distributed as dist

    from incubate_lib.data.scratch import stage
    from incubate_lib.phases.train import train_phase
    from incubate_lib.training.team import Team

    job = job.model_copy(update={"machine": stage(job.settings.data, job.machine)})  # before others wait for it
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:  # on one machine, whose name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend, patience = "nccl" if cuda else "gloo", datetime.timedelta(hours=1)  # one machine may copy images for longer
    dist.init_process_group(backend, device_id=device if cuda else None, timeout=patience)
    train_phase(job, Team(dist.get_rank(), dist.get_world_size(), device))
    dist.destroy_process_group()


def _end_with_caller() -> None:
    while os.read(0, 1):  # nothing is ever written: this waits until the caller closes it or is gone
        pass
    os._exit(1)


if __name__ == "__main__":
    if sys.argv[1] == "--agent":
        _agent(Path(sys.argv[2]), *sys.argv[3:])
    else:
        _rank(Path(sys.argv[1]))
