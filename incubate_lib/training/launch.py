"""One phase on several devices: `python -m torch.distributed.run` as a subprocess over the phase's job file; on several
machines one on each, started by the job they are in, with the first machine as the meeting point.

The caller, a notebook's kernel as well as a command line, only waits: it starts no CUDA, survives whatever happens to
the ranks, and gets a failed rank's traceback. Ranks end when their caller does, because their standard input closes.
"""

import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from incubate_lib import backends
from incubate_lib.config import DataSettings, MachineSettings, SettingsError
from incubate_lib.training.runs import PhaseFolder, Stopped, read_json, write_json

NOISE = re.compile(r"^[WEI]\d{4} |torch/distributed|^\s*$|^\*+$")  # the launcher's own log, of which errors are told by us
KINDS = {error.__name__: error for error in (SettingsError, FloatingPointError, Stopped, MemoryError)}


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
RANK = ["-m", "incubate_lib.training.launch"]


class RankFailed(RuntimeError):
    """A rank of a data-parallel phase died; the message has its number and reason, `rank_traceback` where it happened."""

    rank_traceback = ""


def train_on_devices(job: dict[str, Any], folder: PhaseFolder, machine: MachineSettings, title: str) -> dict[str, Any]:
    """Train a phase on several devices and return its summary; its folder must be claimed.

    `job` holds the arguments of `phases.train_phase` as JSON values. Raises what the first failing rank raised, if
    that is bad input, a loss that is not finite or a stop, else RankFailed.
    """
    for old in folder.path.glob("rank-*.json"):
        old.unlink()
    file = folder.path / "job.json"
    write_json(file, job)
    if machine.nodes == 1:
        command = [*TORCHRUN, "--standalone", f"--nproc-per-node={machine.devices}", "--local-addr=127.0.0.1", *RANK, str(file)]
    else:
        command = [*_on_each_node(machine.nodes), sys.executable, *RANK, "--node", *_meeting_point(), str(file)]
    cores = int(os.environ.get("INCUBATE_THREADS") or len(os.sched_getaffinity(0)))
    threads = str(max(1, cores // machine.devices))
    in_job = {"PET_SIGNALS_TO_HANDLE": "SIGINT"} if "INCUBATE_STOP" in os.environ else {}  # not TERM: the ranks act on it
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": threads, "INCUBATE_HEADLESS": "1"} | in_job, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    output, quiet = [], False
    try:
        for line in process.stdout:
            output.append(line)
            quiet = quiet or line.startswith("Traceback")  # the launcher's own; a rank's is in its report
            if not quiet and not NOISE.search(line):
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
    raise _failure(folder, machine.team_size, title, "".join(output[-200:]))


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


def _node(host: str, port: str, file: str) -> None:
    """Be torch.distributed.run on one of several machines."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the job's warning: the ranks act on it
    machine = MachineSettings.model_validate_json(json.dumps(json.loads(Path(file).read_text())["machine"]))
    where = [f"--nnodes={machine.nodes}", f"--node-rank={backends.attempt().node_rank}", f"--master-addr={host}"]
    command = [*TORCHRUN, *where, f"--master-port={port}", f"--nproc-per-node={machine.devices}", *RANK, file]
    os.execv(command[0], command)


def _failure(folder: PhaseFolder, devices: int, title: str, output: str) -> Exception:
    """Make the exception of the rank that failed first."""
    reports = {path: read_json(path) for path in folder.path.glob("rank-*.json")}
    reports = sorted((r for r in reports.values() if r), key=lambda report: report["time"])
    if not reports:
        killed = re.search(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", output, re.S)
        if killed:
            return RankFailed(
                f"{title}: rank {killed[1]} of {devices} died (exit code {killed[2]}; -9: killed, often out of memory)"
            )
        return RankFailed(f"{title}: torch.distributed.run failed:\n{output.strip()[-2000:]}")
    first = reports[0]
    if first["kind"] in KINDS:
        return KINDS[first["kind"]](first["message"])
    print(f"rank {first['rank']} of {devices}:\n{first['traceback']}", flush=True)
    error = RankFailed(f"{title}: rank {first['rank']} of {devices}: {first['kind']}: {first['message']}")
    error.rank_traceback = first["traceback"]
    return error


def _rank(path: Path) -> int:
    """Be one rank of a job; whatever goes wrong is left in `rank-<n>.json` beside the job file."""
    threading.Thread(target=_end_with_caller, daemon=True).start()
    if stop := os.environ.get("INCUBATE_STOP"):  # a cluster warns every process of a job
        signal.signal(signal.SIGTERM, lambda *_: Path(stop).touch())
    rank = int(os.environ["RANK"])
    try:
        _train(json.loads(path.read_text()))
    except BaseException as error:
        report = {"rank": rank, "time": time.time(), "kind": type(error).__name__, "message": str(error)}
        write_json(path.with_name(f"rank-{rank}.json"), report | {"traceback": traceback.format_exc()})
        sys.stdout.flush()
        os._exit(1)  # at once: other threads may wait for ranks that are gone
    return 0


def _train(job: dict[str, Any]) -> None:
    import torch
    from torch import distributed as dist

    from incubate_lib.data.scratch import stage
    from incubate_lib.training.phases import train_phase
    from incubate_lib.training.team import Team

    machine = MachineSettings.model_validate_json(json.dumps(job["machine"]))
    staged = stage(DataSettings.model_validate_json(json.dumps(job["settings"]["data"])), machine)  # before others wait for it
    cuda = torch.cuda.is_available()
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:  # on one machine, whose name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend, patience = "nccl" if cuda else "gloo", datetime.timedelta(hours=1)  # one machine may copy images for longer
    dist.init_process_group(backend, device_id=device if cuda else None, timeout=patience)
    team = Team(dist.get_rank(), dist.get_world_size(), device)
    train_phase(**job | {"machine": staged.model_dump(mode="json")}, team=team)
    dist.destroy_process_group()


def _end_with_caller() -> None:
    while os.read(0, 1):  # nothing is ever written: this waits until the caller closes it or is gone
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(_node(*sys.argv[2:]) if sys.argv[1] == "--node" else _rank(Path(sys.argv[1])))
