"""A phase's folder on disk, data/phases/<digest>: what is there, what state it is in, how it survives a kill at any moment.

Every file is written whole to a temporary name and renamed, so a reader never sees half of one; `summary.json` is
written last and is the sign of a finished phase. Nothing is ever unpickled: checkpoints are read with
`weights_only=True`, results are safetensors. This module does not import torch until a checkpoint is touched, so that
status displays stay quick.
"""

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from incubate_lib.config import SettingsError, data_folder, error_message, refuse
from incubate_lib.config.sections import Name
from incubate_lib.training.files import check_records, is_whole, read_json, replaced, write_atomic, write_json
from incubate_lib.training.lease import Lease, Lost, holder, in_words

METRICS, MNTK = "metrics.jsonl", "mntk.jsonl"  # one line an evaluation: of loss and score, of the modular NTK
CHECKPOINTS = "checkpoint.pt", "checkpoint.previous.pt"  # the newest first
STOP_FILE = "STOP"
GONE = "its weights are missing or damaged; it is trained again"
STATUS_SECONDS = 1.0  # between rewrites of status.json while a phase trains


class Stopped(Exception):
    """The phase was asked to stop; its checkpoint is saved and the next run goes on from it."""


class _Where(BaseModel):
    device: str
    threads: int
    date: str
    versions: dict[str, str]


class _Classes(BaseModel):
    samples: list[int]
    right: list[int]


class _Summary(BaseModel):
    """What is read of every summary."""

    hash: str
    weights_sha256: str
    phase: str
    seed: int
    steps: int
    epochs: float
    score: float
    loss: float
    train_flops: float
    train_seconds: float
    provenance: _Where
    inputs_sha256: dict[str, str] = {}
    results_sha256: dict[Name, str] = {}  # names of files
    classes: _Classes | None = None  # of a whole network whose task has classes


class PhaseFolder:
    """Files of one phase: what it is, status, metrics, checkpoints, result, summary."""

    def __init__(self, path: Path, lease: Lease | None = None, whose: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.lease = lease  # of the process that trains here; its writes end when another one takes over
        self.whose = whose  # what it trains, as `whose` says it; its checkpoints carry that

    @classmethod
    def of(cls, digest: str) -> "PhaseFolder":
        return cls(data_folder() / "phases" / digest)

    # -- what is there ------------------------------------------------------------------------------------------------

    def summary(self, digest: str | None = None, used: dict[str, str] | None = None) -> dict[str, Any] | None:
        """Return what is recorded of a phase that was trained to its end; None if it was not. SettingsError for a record that
        is none, or of another phase than this `digest`.

        `used` are the SHA-256 of the weights it must have started from; those that are not given may be any. The numbers
        are true even if somebody has deleted the weights since: `finished` says whether those are there.
        """
        summary = read_json(self.path / "summary.json")
        if summary is None:
            return None
        try:
            made_from = _Summary.model_validate(renamed(summary)).inputs_sha256
        except ValidationError as error:
            what = f"{self.path / 'summary.json'} is no record of a finished phase ({error_message(error)})"
            raise SettingsError(f"{what}; delete it, and the phase is trained again") from None
        summary = {"metric": METRIC_BEFORE} | renamed(summary)
        of_another = f"{self.path / 'summary.json'} is of another phase; delete it, and the phase is trained again"
        refuse(digest not in (None, summary["hash"]), of_another)
        return summary if all(made_from.get(name) == sha for name, sha in (used or {}).items()) else None

    def finished(self, digest: str | None = None, used: dict[str, str] | None = None) -> dict[str, Any] | None:
        """Return the summary if there are whole weights, too, for other phases to start from."""
        summary = self.summary(digest, used)
        names = ("model", *(summary or {}).get("results_sha256", ()))
        return summary if summary and all(is_whole(self.path / f"{name}.safetensors") for name in names) else None

    def status(self) -> dict[str, Any]:
        """Return state and progress; a phase whose process is gone counts as `interrupted`."""
        status = self._status()
        if self.finished():
            return status | {"state": "done"}
        if status["state"] == "done":  # it was; its result is gone
            return {"state": "waiting"}
        if status["state"] == "running" and not holder(self.path / "lease"):
            status["state"] = "interrupted"
        return status

    def _status(self) -> dict[str, Any]:
        """Return what status.json says; what is damaged is written again."""
        status = read_json(self.path / "status.json")
        is_sound = isinstance(status, dict) and isinstance(status.get("state"), str)
        return status if is_sound and isinstance(status.get("progress", {}), dict) else {"state": "waiting"}

    def metrics(self, file: str = METRICS) -> list[dict[str, Any]]:
        """Return one dict per evaluation; a line cut short by a kill, or that is no evaluation, is left out."""
        rows, path = [], self.path / file
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(renamed(json.loads(line)))
        return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]

    @property
    def stop_file(self) -> Path:
        """Whoever trains the phase saves and stops when this is touched."""
        return self.path / STOP_FILE

    def trainer(self) -> str | None:
        """Say who trains the phase at present; None if nobody does."""
        other = holder(self.path / "lease")
        if other is None:
            return None
        about = read_json(self.path / "phase.json")
        run = f" (run {about['run']})" if isinstance(about, dict) and "run" in about else ""
        return f"{in_words(other)}{run}"

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    # -- how it changes -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, whose: dict[str, Any]) -> Iterator[None]:
        """Hold the folder for training; whatever goes wrong inside is written into status.json.

        `whose` is what `whose` says of the phase and the weights it starts from: what was made from others is forgotten, or
        modules of two meta models could meet. Waits while another process holds it. Raises Lost when another process took over
        because this one seemed dead.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with _wait_for_lease(self).held() as self.lease:
            self._own()
            for half_written in self.path.glob("*.tmp"):  # by a process that was killed
                half_written.unlink(missing_ok=True)
            self.whose = whose
            before = self._make_room()
            now = {"attempt": before.get("attempt", 0) + 1, "pid": os.getpid(), "host": socket.gethostname()}
            self.set_status("running", **now, **whose, progress={}, error=None)
            try:
                yield
            except Lost:
                raise  # the status is another's
            except (Stopped, KeyboardInterrupt):
                self.set_status("stopped")
                raise
            except BaseException as error:
                self.set_status("failed", error=f"{type(error).__name__}: {error}")
                raise
            self.set_status("done")
        self.lease = None

    def _make_room(self) -> dict[str, Any]:
        """Keep what was made from these inputs; forget what was not, and a summary without its weights. Return the status."""
        status = self._status()
        known = status.get("inputs_sha256")
        is_ours = self._is_mine(status) if known is not None else any(map(self._is_own_checkpoint, CHECKPOINTS))
        outdated = () if is_ours else ("summary.json", METRICS, MNTK, *CHECKPOINTS)
        if is_ours and self.summary() and not self.finished():
            print(f"{self.path.name}: {GONE}", flush=True)
            outdated = ("summary.json",)
        for name in outdated:
            (self.path / name).unlink(missing_ok=True)
        if outdated:
            self.set_status("running", saved_step=0)
        return status

    def _is_own_checkpoint(self, name: str) -> bool:
        """Whether a checkpoint says that it is of this phase; its tensors are not read."""
        try:
            return self._is_mine(_read_checkpoint(self.path / name, mmap=True)["whose"])
        except (PermissionError, MemoryError):
            raise
        except Exception:  # not there, or damaged, in whatever way
            return False

    def _is_mine(self, about: dict[str, Any]) -> bool:
        """Whether a status or a checkpoint is of what is trained here; what it does not say, it need not."""
        return all(about.get(name, value) == value for name, value in self.whose.items())

    def _own(self) -> None:
        if self.lease:
            self.lease.check()

    def set_status(self, state: str | None = None, **fields: Any) -> None:
        """Rewrite status.json."""
        self._own()
        write_json(self.path / "status.json", self._status() | fields | ({"state": state} if state else {}))

    def start_metrics(self, step: int, file: str = METRICS) -> None:
        """Forget evaluations after `step`, which will be made again with the same numbers, and lines that are cut short:
        the next one would be glued to them."""
        self._own()
        if (self.path / file).exists():
            kept = "".join(json.dumps(row) + "\n" for row in self.metrics(file) if row["step"] <= step)
            write_atomic(self.path / file, kept.encode())

    def add_metrics(self, *rows: dict[str, Any], file: str = METRICS) -> None:
        """Append an evaluation, of which several modules have a row each; it is on the disk before any later checkpoint is."""
        self._own()
        with open(self.path / file, "a") as lines:
            lines.write("".join(json.dumps(row) + "\n" for row in rows))
            lines.flush()
            os.fsync(lines.fileno())

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write checkpoint.pt; the one before stays as checkpoint.previous.pt, in case this one is damaged later."""
        import torch

        path = self.path / "checkpoint.pt"
        with replaced(path) as file:
            torch.save(state | {"whose": self.whose}, file)
            self._own()
            if path.exists():
                os.replace(path, self.path / "checkpoint.previous.pt")
        self.set_status(saved_step=state["counts"]["step"])

    def load_checkpoint(
        self, check: Callable[[dict[str, Any]], None] = lambda state: None
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Return the newest sound checkpoint (None: start anew) and what was found wrong with others.

        One of other settings or inputs, or for which `check` raises, is not sound.
        """
        complaints = []
        for path in (self.path / name for name in CHECKPOINTS):
            try:
                state = _read_checkpoint(path)
                if self.whose and not self._is_mine(state["whose"]):
                    raise ValueError("it is of other settings or inputs")
                check(state)
                return state, complaints
            except FileNotFoundError:
                pass
            except (PermissionError, MemoryError):  # not damage: what is there must not be given up for it
                raise
            except Exception as error:  # any damage ends the same way: say so and fall back
                complaints.append(f"{path.name} is not sound ({type(error).__name__}: {error})")
        return None, complaints

    def finish(self, summary: dict[str, Any], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Write the results, then the summary that declares it finished; checkpoints are no longer needed.

        `results` are tensors by the name of their file, of which `model` is one.
        """
        from safetensors.torch import save

        hashes = {}
        for name, tensors in results.items():
            blob = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
            self._own()
            write_atomic(self.path / f"{name}.safetensors", blob)
            hashes[name] = hashlib.sha256(blob).hexdigest()
        summary = summary | {"weights_sha256": hashes.pop("model")} | ({"results_sha256": hashes} if hashes else {})
        write_json(self.path / "summary.json", summary)
        self.drop_checkpoints()
        return summary

    def drop_checkpoints(self) -> None:
        """Delete what a finished phase no longer needs; again after a kill between summary and this."""
        for name in CHECKPOINTS:
            (self.path / name).unlink(missing_ok=True)

    def load_weights(self, name: str = "model") -> dict[str, Any]:
        """Return a finished phase's result; SettingsError if the file is not the one the summary speaks of."""
        from safetensors.torch import load

        summary, file = self.summary(), self.path / f"{name}.safetensors"
        hashes = {"model": summary["weights_sha256"]} | summary.get("results_sha256", {}) if summary else {}
        blob = file.read_bytes() if summary and file.exists() else b""
        if hashlib.sha256(blob).hexdigest() != hashes.get(name):
            if summary and is_whole(file):  # only its content is wrong, which nobody sees without reading it all
                raise SettingsError(f"{file} is damaged; delete it and run again")
            raise SettingsError(f"{file} is missing or damaged; run again, and it is made again")
        return load(blob)


# columns of records and tables that were written before, and what they are called now
BEFORE = {f"{of}accuracy": f"{of}score" for of in ("", "start_", "meta_", "assembled_", "other_")}
BEFORE |= {"looks": "probes", "look_seconds": "probe_seconds", "look_flops": "probe_flops"}
BEFORE |= {"judge_images": "eval_images", "judged_on": "split"}
METRIC_BEFORE = "accuracy"  # what their scores are of


def renamed(record: Any) -> Any:
    """Return a record, or the columns of a table, by today's names; what is no mapping, in a damaged file, as it is."""
    return {BEFORE.get(name, name): value for name, value in record.items()} if isinstance(record, dict) else record


def whose(digest: str, used: dict[str, str], num_images: int) -> dict[str, Any]:
    """Return what says of a phase's files whose they are: its digest, the SHA-256 of the weights it starts from, and on how
    many images it is trained."""
    return {"hash": digest, "inputs_sha256": used, "num_images": num_images}


def _read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint whole, its checksums too, or with `mmap` only what is asked of it; nothing is unpickled."""
    if not path.exists():
        raise FileNotFoundError(path)
    import torch

    if not mmap:
        check_records(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _wait_for_lease(folder: PhaseFolder) -> Lease:
    """Take the folder; wait, and say so once, while another process trains the phase."""
    message = False
    while (lease := Lease.take(folder.path / "lease")) is None:
        if not message and (other := folder.trainer()):
            print(f"waiting for {other}, which trains this phase", flush=True)
            message = True
        time.sleep(0.3)
    return lease
