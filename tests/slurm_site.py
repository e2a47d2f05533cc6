"""Somebody who is logged in on a test cluster, and the same phases trained without it."""

import contextlib
import hashlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from patience import HANG, Hooks
from slurm_cluster import Cluster

from incubate_lib.cli import parser
from incubate_lib.config import load_settings
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.live.watch import Live
from incubate_lib.training.files import read_json
from incubate_lib.training.runs import PhaseFolder

INCUBATE = str(Path(sys.executable).parent / "incubate")


class Site:
    """A cluster, a data folder that its nodes see, and the command line of somebody who is logged in there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.hooks = folder, folder / "data", Hooks(folder)
        self.data.mkdir()
        self.cluster = Cluster(folder / "cluster", hidden=self.data)
        self.site = folder / "site.yaml"
        self.site.write_text(yaml.safe_dump({"cpus_per_task": 1, "warn_seconds": 240, "prologue": [
            *(f"export {name}={value}" for name, value in self.hooks.env.items()), "export GLOO_SOCKET_IFNAME=lo",
        ]}))  # fmt: skip
        self.env = self.cluster.env | {"INCUBATE_DATA": str(self.data), "COLUMNS": "160"}

    def incubate(self, *arguments: str, **env: str):
        return subprocess.run(
            [INCUBATE, *arguments], capture_output=True, text=True, env=self.env | env, timeout=HANG, cwd=self.folder
        )

    def planned(self, *arguments: str) -> str:
        """Plan a run of `smoke` here, where torch is imported already; return its name."""
        asked = parser().parse_args(["run", "smoke", *arguments])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("INCUBATE_DATA", str(self.data))
            todo = plan(load_settings("smoke", asked.set), asked.strategies, asked.seeds or [0])
            todo.write()
        return todo.experiment.path.name

    def submit(self, *arguments: str):
        """Submit a run of `smoke`."""
        self.planned(*arguments)
        result = self.incubate("run", "smoke", *arguments, "--backend", "slurm", "--site", str(self.site))
        assert result.returncode == 0, result.stderr
        return result.stdout.replace("\n", " ")

    @contextlib.contextmanager
    def watch(self, *arguments: Any) -> Iterator[Live]:
        """The widget that shows a run, in a notebook on this site's login node."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.env.items():
                patch.setenv(name, value)
            live = Live(*arguments, every=1.0)
            yield live
            live.close()
            live.thread.join()

    def phases(self, run: str) -> dict[str, PhaseFolder]:
        return {key: PhaseFolder(self.data / "phases" / job["digest"]) for key, job in self.known(run).items() if job["digest"]}

    def jobs(self, run: str) -> dict[str, str]:
        return {key: job["id"] for key, job in self.known(run).items()}

    def known(self, run: str) -> dict[str, dict]:
        """What a run has noted of its jobs."""
        return read_json(self.data / "runs" / run / "slurm.json")

    def states(self) -> dict[str, str]:
        lines = self.cluster.call("squeue", "-h", "--states=all", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def all_ended(self, run: str) -> bool:
        states = self.states()
        busy = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
        return bool(states) and not busy & {states.get(job) for job in self.jobs(run).values()}

    def wait_until_ended(self, run: str) -> None:
        self.cluster.wait_for(lambda: self.all_ended(run), f"the jobs of {run} to end")

    def wait_for_attempt(self, number: int, run: str, *keys: str) -> None:
        """Wait until these phases train in their attempt of that number, counted from one."""

        def trains(key: str) -> bool:
            status, attempts = self.phases(run)[key].status(), self.attempts(run, key)
            begun = len(attempts) >= number and status["state"] == "running"
            return begun and status.get("progress", {}).get("step", 0) > attempts[number - 1]["from_step"]

        self.cluster.wait_for(lambda: all(map(trains, keys)), f"attempt {number} of {', '.join(keys)} to train")

    def skip_analysis(self, run: str) -> None:
        """It has been seen to work, and takes its time."""
        self.cluster.call("scancel", self.jobs(run)["06_analysis"])

    def attempts(self, run: str, key: str) -> list[dict]:
        return read_json(self.phases(run)[key].path / "attempts.json") or []


def weights(run: Path) -> dict[str, str]:
    """Return the hash of each trained phase of a run."""
    phases = {key: run.parents[1] / "phases" / about["digest"] for key, about in read_json(run / "run.json")["phases"].items()}
    files = {key: folder / "model.safetensors" for key, folder in phases.items()}
    return {key: hashlib.sha256(file.read_bytes()).hexdigest() for key, file in files.items() if file.exists()}


def train_here(data: str, overrides: list[str], strategies: list[str], seeds: list[int]) -> None:
    import torch

    os.environ["INCUBATE_DATA"] = data
    torch.set_num_threads(1)
    plan(load_settings("smoke", overrides), strategies, seeds).run()


class TrainedHere:
    """Phases trained on this machine, uninterrupted and with one thread, each set in a process that begins at once."""

    def __init__(self, wanted: dict[str, tuple[Path, list[str], list[str], list[int]]]) -> None:
        self.begun, context = {}, multiprocessing.get_context("forkserver")
        for what, (folder, *how) in wanted.items():
            process = context.Process(target=train_here, args=(str(folder), *how))
            process.start()
            self.begun[what] = folder, process

    def weights(self, what: str) -> dict[str, str]:
        """Wait until a set is trained; return the hash of each phase's weights."""
        folder, process = self.begun[what]
        process.join()
        assert process.exitcode == 0
        return weights(next((folder / "runs").iterdir()))
