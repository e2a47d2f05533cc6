"""The records of a run as TensorBoard event files or Weights & Biases runs, for people who follow theirs there.

A mirror and never a source: nothing here is needed to train, nothing is ever read back, and a run's own records stay as
they are. Every phase becomes one run, below `mirror/` in the experiment's folder. A phase whose records have not changed
since is left alone; any other is written anew and replaces what was there, so nothing can be in it twice.
"""

import contextlib
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from incubate_lib import backends
from incubate_lib.config import SettingsError
from incubate_lib.config.phase import identity
from incubate_lib.phases.job import FILE
from incubate_lib.pipeline import execution
from incubate_lib.pipeline.graph import Node, Plan
from incubate_lib.training.lease import Lease

MADE_FROM = "made_from"  # in each mirrored folder: the SHA-256 of the records it shows
NO_MEASUREMENTS = {"step", "seed", "module_index"}


def _records(node: Node) -> dict[str, Any] | None:
    """Return what a phase has recorded so far, in numbers and texts; None if it has not begun with these settings."""
    file = node.folder.path / "status.json"
    if not file.exists():
        return None
    return {
        "run": node.experiment.path.name,
        "began": (node.folder.path / FILE).stat().st_mtime,  # seconds since 1970
        "config": identity(node.settings) | {"hash": node.digest},
        "rows": node.folder.metrics(),  # one an evaluation
        "summary": node.summary() or {},  # empty until the phase is finished
    }


def mirror(plan: Plan, to: str) -> tuple[list[Path], int]:
    """Write what has changed, and return the folders that were written and how many phases were up to date.

    Raises SettingsError if the package is not installed, before anything is written.
    """
    _package(to)
    write, top = {"tensorboard": _tensorboard, "wandb": _wandb}[to], plan.experiment.path / "mirror"
    written, unchanged = [], 0
    with _alone(top) as fresh:
        for node in plan.nodes:
            records, place = _records(node), top / to / node.key
            if records is None:
                continue
            digest = hashlib.sha256(json.dumps([node.key, records]).encode()).hexdigest()
            if (place / MADE_FROM).exists() and (place / MADE_FROM).read_text() == digest:
                unchanged += 1
                continue
            new = fresh / node.key
            new.mkdir(parents=True)
            write(new, node.key, **records)
            (new / MADE_FROM).write_text(digest)
            shutil.rmtree(place, ignore_errors=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            new.rename(place)
            written.append(place)
    return written, unchanged


def is_at_work(plan: Plan) -> bool:
    """Whether anything trains this run, here or on a cluster, so that there may soon be more to mirror."""
    run = plan.experiment
    trains = execution.is_running(run.path) or any(n.folder.status()["state"] == "running" for n in plan.nodes)
    return trains or backends.of(run).still_active(run) > 0


@contextlib.contextmanager
def _alone(top: Path) -> Iterator[Path]:
    """Keep other mirrors out, and lend a folder that is outside of what TensorBoard watches, for what is not complete."""
    lease, fresh = Lease.take(top / "lease"), top / "fresh"
    if lease is None:
        raise SettingsError(f"another `incubate mirror` is at work in {top}")
    with lease.held():
        shutil.rmtree(fresh, ignore_errors=True)  # of one that was killed
        try:
            yield fresh
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SettingsError(f"--to {name} needs a package ({error}): pip install -e '.[{name}]'") from None


def _numbers(record: dict[str, Any], of: str = "") -> dict[str, float]:
    return {name + of: value for name, value in record.items() if type(value) in (int, float) and name not in NO_MEASUREMENTS}


def _module(row: dict[str, Any]) -> str:
    """Return what is added to the names of an evaluation's numbers, where several modules learn together."""
    return f"/module-{row['module_index']}" if "module_index" in row else ""


def _tensorboard(folder: Path, key: str, *, run: str, began: float, config: dict, rows: list[dict], summary: dict) -> None:
    """Write one event file; TensorBoard's numbers are float32."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=0) as writer:  # a TensorBoard that is open forgets what the last file said
        for row in rows:
            for name, value in _numbers(row, _module(row)).items():
                # its relative time is that of training, evaluation and pauses apart
                writer.add_scalar(name, value, row["step"], walltime=began + row["train_seconds"])
        for name, value in _numbers(summary).items():
            writer.add_scalar(f"final/{name}", value, summary["steps"], walltime=began + summary["train_seconds"])
        for name, text in {"settings": config, "summary": summary}.items():
            writer.add_text(name, f"```\n{json.dumps(text, indent=1)}\n```", 0, walltime=began)


def _wandb(folder: Path, key: str, *, run: str, began: float, config: dict, rows: list[dict], summary: dict) -> None:
    """Write one run, offline unless WANDB_MODE says otherwise: then, too, nobody is asked for a key."""
    mode = os.environ.setdefault("WANDB_MODE", "offline")  # init(mode=…) alone leaves W&B's own error reports online
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    wandb = _package("wandb")
    if mode not in ("offline", "online"):
        raise SettingsError(f"WANDB_MODE is {mode!r}, but only offline (the default) and online write runs")
    try:
        if mode == "online" and not wandb.login(prompt=False):
            raise SettingsError("WANDB_MODE is 'online', but W&B has no key; `wandb login`, or unset WANDB_MODE")
        # nothing about this process, which did not train: no console, no code, no machine
        quiet = {"silent": True, "console": "off", "symlink": False, "disable_git": True, "disable_code": True}
        quiet |= {"x_disable_meta": True, "x_disable_stats": True, "x_save_requirements": False}
        about = {"group": run, "job_type": config["phase"], "name": key, "config": config}
        about["id"] = hashlib.sha256(f"{run}/{key}".encode()).hexdigest()[:16]  # again the same, written anew
        project, settings = os.environ.get("WANDB_PROJECT", "incubate"), wandb.Settings(**quiet)
        with wandb.init(dir=folder, mode=mode, project=project, settings=settings, **about) as written:
            for row in rows:
                written.log(_numbers(row, _module(row)), step=row["step"])
            written.summary.update(summary)
    except wandb.Error as error:
        raise SettingsError(f"Weights & Biases: {error}") from None
