"""A private Slurm cluster of several nodes on this machine, from Debian's slurm-wlm: no services, no root daemon's files.

    python tests/slurm_cluster.py DIR      # start one to try things on; ends with Ctrl-C

Each node is a slurmd of its own with two cores and two pretended GPUs. `gpu` is the default partition; jobs in `low` are
preempted by those in `gpu`, and warned before. Slurm's own patience is set for a busy machine; what ends by itself is not
waited for.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from patience import wait_for

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scancel", "scontrol")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=10
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
PlugStackConfig=/dev/null
SelectType=select/cons_tres
SelectTypeParameters=CR_Core,CR_LLN
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=5,bf_interval=5
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MinJobAge=36000
MessageTimeout=100
BatchStartTimeout=300
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-{nodes}] NodeHostName={host} NodeAddr=127.0.0.1 Port={first}-{last} CPUs=2 RealMemory=2000 Gres=gpu:2 State=UNKNOWN
NodeName=blind NodeHostName={host} NodeAddr=127.0.0.1 Port={blind} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=gpu Nodes=n[1-{nodes}] Default=YES PriorityTier=10 MaxTime=INFINITE State=UP
PartitionName=low Nodes=n[1-{nodes}] PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 MaxTime=INFINITE State=UP
PartitionName=brief Nodes=n[1-{nodes}] PriorityTier=1 MaxTime=10 State=UP
PartitionName=blind Nodes=blind PriorityTier=1 MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Return the programs that are not on this machine."""
    return [name for name in NEEDED if not shutil.which(name)]


class Cluster:
    """Starts with the object, ends with `close`, which ends only what it started.

    One node more, `blind`, has no GPUs and sees an empty folder where others see `hidden` (root only: it needs a mount).
    """

    def __init__(self, folder: Path, nodes: int = 9, hidden: Path | None = None) -> None:
        self.folder, self.nodes = folder, nodes
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        (folder / "state").mkdir(parents=True)
        port, host = _free_ports(nodes + 2), socket.gethostname().split(".")[0]
        values = {"host": host, "user": getpass.getuser(), "port": port, "folder": folder, "nodes": nodes}
        (folder / "slurm.conf").write_text(CONF.format(**values, first=port + 1, last=port + nodes, blind=port + nodes + 1))
        gpus = "".join(f"NodeName=n[1-{nodes}] Name=gpu File=/dev/tty{gpu}\n" for gpu in range(2))
        (folder / "gres.conf").write_text("AutoDetect=off\n" + gpus)
        self.start("slurmctld")
        for node in range(1, nodes + 1):
            self.start("slurmd", "-N", f"n{node}")
        if hidden and os.geteuid() == 0:
            self.start("unshare", "-m", "sh", "-c", f"mount -t tmpfs none '{hidden}' && exec slurmd -N blind")
        try:
            self.wait_for(
                lambda: self.call("sinfo", "-h", "-p", "gpu", "-t", "idle", "-o", "%D").strip() == str(nodes), "the nodes"
            )
        except BaseException:
            self.close()
            raise

    def start(self, *command: str) -> None:
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, env=self.env, check=True, **quiet)

    def call(self, *command: str) -> str:
        """Return what a client command prints; they hang while slurmctld is away."""
        result = subprocess.run(["timeout", "60", *command], env=self.env, capture_output=True, text=True)
        return result.stdout

    def wait_for(self, condition, what: str) -> None:
        wait_for(condition, what, lambda: self.call("squeue", "--states=all"))

    def kill(self, daemon: str) -> None:
        """End a daemon at once: `slurmctld`, or a node's slurmd by the node's name; its jobs' processes go on."""
        os.kill(int((self.folder / f"{daemon}.pid").read_text()), signal.SIGKILL)

    def restart_controller(self) -> None:
        pid = int((self.folder / "slurmctld.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not _is_alive(pid), "slurmctld to end")
        self.start("slurmctld")

    def close(self) -> None:
        self.call("scancel", f"--user={getpass.getuser()}")
        pids = [int(path.read_text()) for path in self.folder.glob("*.pid")]
        for pid in pids:
            _kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10  # for leaving in peace; then they are killed
        while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in pids:
            _kill(pid, signal.SIGKILL)
        wait_for(self._no_job_is_left, "the jobs' processes to end")

    def _no_job_is_left(self) -> bool:
        """Kill what is left of the jobs; a process may begin another one meanwhile, and takes a moment to end."""
        left = self.processes()
        for pid in left:
            _kill(pid, signal.SIGKILL)
        return not left

    def processes(self, node: str | None = None) -> list[int]:
        """Return the processes of this cluster's jobs, or of those on one node."""
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                variables = (place / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            in_job = mark in variables and any(v.startswith(b"SLURM_JOB_ID=") for v in variables)
            if in_job and (node is None or f"SLURMD_NODENAME={node}".encode() in variables):
                found.append(int(place.name))
        return found


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _free_ports(count: int) -> int:
    """Return the first of so many ports in a row that nobody uses."""
    for port in range(20000 + os.getpid() % 500 * count, 32000, count):  # another process's are elsewhere, taken or not yet
        try:
            for p in range(port, port + count):
                with socket.socket() as server:
                    server.bind(("127.0.0.1", p))
            return port
        except OSError:
            continue
    raise RuntimeError("no free ports")


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[1]).absolute())
    print(f"export SLURM_CONF={cluster.folder}/slurm.conf", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        cluster.close()
