"""The devices that train one phase together, one process each, all with the same weights; and what a device is."""

import contextlib
import datetime
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import timm
import torch
from torch import Tensor, nn
from torch import distributed as dist

from incubate_lib.config import SettingsError, checkout


@dataclass(frozen=True)
class Team:
    """This process's place among `devices` that train together; alone by default, and then nothing is communicated."""

    rank: int = 0
    devices: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # of this process

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def sync_every(self) -> int:
        """Updates between two readings of losses and clock; together they must be the same ones for all."""
        return 1 if self.devices == 1 else 8

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.devices > 1:
            dist.all_reduce(values)
        return values

    def decide(self, decision: bool) -> bool:
        """Return what the first process decided: clocks and files may look different to each."""
        return bool(self.share(torch.tensor([decision], dtype=torch.int32)).item())

    def share(self, values: Tensor) -> Tensor:
        """Return the first process's values: those of others may differ in the last bits."""
        if self.devices == 1:
            return values
        there = values.to(self.device)
        dist.broadcast(there, 0)
        return there.to(values.device)

    def average(self, gradients: list[Tensor]) -> None:
        """Put in the place of each gradient its mean over all processes, as DistributedDataParallel does."""
        if self.devices > 1 and gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(self.devices)
            means = self.all_reduce(flat).split([gradient.numel() for gradient in gradients])
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view_as(gradient))

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every replica the first one's buffers, such as BatchNorm's running statistics: those are the ones saved.

        Gradients keep parameters equal, but each device has seen images of its own.
        """
        if self.devices > 1:
            for buffer in model.buffers():
                buffer.copy_(self.share(buffer))

    def gather(self, names: list[str]) -> set[str]:
        """Return all names that any process has."""
        parts = [names]
        if self.devices > 1:
            parts = [None] * self.devices
            dist.all_gather_object(parts, names)
        return {name for part in parts for name in part}

    def barrier(self) -> None:
        if self.devices > 1:
            dist.barrier()


ALONE = Team()


def pick_device() -> torch.device:
    """Return the GPU if there is one, else the CPU; says so if a GPU is there and torch cannot use it."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        print(
            "warning: this machine has a GPU that torch cannot use (is the driver too old for it?); on the CPU then", flush=True
        )
    return torch.device("cpu")


def repeat_exactly(device: torch.device, wanted: bool = True, strictly: bool = True) -> None:
    """Have a GPU give the same bits again for the same work; a CPU does so anyway.

    Strictly: where it should only warn, torch's attention takes the faster backward pass, which does not repeat itself. Networks
    of any kind are only warned: a VGG's pooling for small images has no backward pass that repeats itself.
    """
    if device.type == "cuda" and wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=not strictly)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would write every new tensor once more


def provenance(device: torch.device) -> dict[str, Any]:
    """Return what a number must carry: date, code, versions, hardware."""
    project = checkout()

    def git(*command: str) -> str:
        if project is None:  # a repository around the installed package would be another one
            return ""
        try:
            return subprocess.run(["git", "-C", str(project), *command], capture_output=True, text=True).stdout.strip()
        except OSError:  # no git here: the number is still good
            return ""

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain", "-uno")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),  # highest: no TF32
    }


def device_name(device: torch.device) -> str:
    """Return what a GPU or this machine's processor is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory that a GPU or this machine has."""
    is_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if is_gpu else psutil.virtual_memory().total


@contextlib.contextmanager
def explain_out_of_memory(message: str) -> Iterator[None]:
    """Say what would fit, as a SettingsError, where torch says that a device's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise SettingsError(message) from None


def explain_large_evaluation(device: torch.device) -> AbstractContextManager[None]:
    """Say so where a batch of evaluation is too large, whose size no setting has."""
    there = f"the {device_memory(device) / 2**30:.1f} GiB of {device_name(device)}"
    return explain_out_of_memory(f"a batch of evaluation needs more than {there}; smaller images or a smaller network may fit")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
