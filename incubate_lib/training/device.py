"""The device that trains: which one, how it repeats itself, and what is recorded of it."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch


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

    Strictly: told only to warn, torch's attention takes the faster backward pass, which does not repeat itself. Networks of
    any kind are only warned: a VGG's pooling for small images has no backward pass that repeats itself.
    """
    if device.type == "cuda" and wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=not strictly)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would write every new tensor once more


def provenance(device: torch.device) -> dict[str, Any]:
    """Return what a number must carry: date, code, versions, hardware."""
    root = Path(__file__).resolve().parents[2]

    def git(*command: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True).stdout.strip()
        except OSError:  # no git here: the number is still good
            return ""

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain", "-uno")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
