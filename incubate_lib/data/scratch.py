"""Copy a data set to a disk of this machine once, so that training does not read a network disk again and again."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from incubate_lib.config import MADE, DataSettings, MachineSettings, refuse
from incubate_lib.data.folders import folder_of

COPIERS = 16  # files at once: what bounds many small files on a network disk is latency


def stage(data: DataSettings, machine: MachineSettings) -> MachineSettings:
    """Return machine settings that read the images from a copy below `machine.scratch`, made now unless it is there.

    A user's processes on one machine share a copy: the first makes it, the others wait. A copy is taken again when folders
    in the first two levels of the original have changed. Raises SettingsError without a place, OSError without enough room
    or where somebody else may have put something there.
    """
    if machine.scratch is None or data.source in MADE:
        return machine
    place, original = _place_of(machine.scratch), folder_of(data, machine)
    try:
        place.mkdir(parents=True, exist_ok=True)
        copy = own_folder(place, "machine.scratch") / f"{original.name}-{_stamp(original)}"
        with open(f"{copy}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # among the processes of this machine; the disk is local
            if not copy.exists():
                _copy(original, copy)
    except OSError as error:  # no bad input: another machine, or another time, may do
        raise OSError(f"machine.scratch {place} on {socket.gethostname()}: {error.strerror or error}") from None
    return machine.model_copy(update={"data_folder": str(copy), "scratch": None})


def check_scratch(scratch: str) -> None:
    """Raise SettingsError unless there can be such a folder on this machine; nothing is made."""
    place = _place_of(scratch)
    above = next(part for part in (place, *place.parents) if os.path.lexists(part))
    able = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    refuse(not able, f"machine.scratch is {scratch!r}, but {above} is no folder that can be written; name one on a local disk")


def _place_of(scratch: str) -> Path:
    place = Path(os.path.expanduser(os.path.expandvars(scratch))).absolute()
    refuse("$" in str(place), f"machine.scratch is {scratch!r}, and that variable is not set on {socket.gethostname()}")
    return place


def own_folder(place: Path, setting: str) -> Path:
    """Return this user's own folder below a place that others may write to as well, made with mode 700 unless it is there.

    Names of what is kept in it can be guessed, so nothing may lie there that somebody else has put there: PermissionError
    if the folder is another user's, a link, or open to others, with the name of the setting that chooses another place.
    """
    folder = place / f"incubate-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise PermissionError(
            f"{folder} is not a folder that only you can write to (mode 700); remove it, or choose another place with {setting}, "
            "the only way where the file system has no such modes (exFAT, CIFS, a disk of Windows under WSL)"
        )
    return folder


def _copy(original: Path, copy: Path) -> None:
    began = time.monotonic()
    folders = os.walk(original, followlinks=True)
    files = [Path(folder) / name for folder, _, names in folders for name in names]
    size, free = sum(file.stat().st_size for file in files), shutil.disk_usage(copy.parent).free
    if size > free:
        raise OSError(f"{free / 1e9:.1f} GB are free, but {original} has {size / 1e9:.1f} GB")
    print(f"copying {len(files)} files ({size / 1e9:.2f} GB) to {copy.parent} …", flush=True)
    half = Path(f"{copy}.{socket.gethostname()}.half")  # of a process that was killed, or of this one
    shutil.rmtree(half, ignore_errors=True)
    for folder in {file.parent.relative_to(original) for file in files}:
        (half / folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(COPIERS) as pool:
        list(pool.map(lambda file: shutil.copyfile(file, half / file.relative_to(original)), files))
    try:
        half.rename(copy)
    except OSError:
        if not copy.exists():  # else another machine was faster: the disk is not that local
            raise
        shutil.rmtree(half)
    print(f"copied in {time.monotonic() - began:.0f} s", flush=True)


def _stamp(original: Path) -> str:
    """Return what changes with the place of the original, or when files come or go in its first two levels of folders."""
    below = sorted(path for path in [*original.glob("*"), *original.glob("*/*")] if path.is_dir())
    seen = [(str(path), path.stat().st_mtime_ns) for path in [original, *below]]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:8]
