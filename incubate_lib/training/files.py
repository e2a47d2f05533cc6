"""Files that a kill or a full disk leaves whole, and whether those that are there are whole."""

import contextlib
import errno
import json
import os
import socket
import stat
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from incubate_lib.config import SettingsError


def check_free(folder: str | Path) -> Path:
    """Return the path of a folder to be written; SettingsError if something is there already."""
    folder = Path(os.path.expanduser(folder)).absolute()
    if len(os.fsencode(unfinished(folder).name)) > 255:
        raise SettingsError(f"cannot write {folder}: its name is too long")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise SettingsError(f"{folder} is there already, and not an empty folder; it is left as it is: give another name")
    except OSError as error:
        raise SettingsError(f"cannot write {folder}: {error.strerror}") from None
    return folder


def unfinished(folder: Path) -> Path:
    """Return where a folder is written before it is whole."""
    return folder.with_name(f".{folder.name}.{os.getpid()}.tmp")


def is_whole(weights: Path) -> bool:
    """Whether a .safetensors file is there and as long as its header says; SettingsError if it may not be read.

    What was truncated, emptied or never written by a full disk is not; a file is read once, unless it changes.
    """
    try:
        about = weights.stat()
        return _opens(weights, about.st_size, about.st_mtime_ns)
    except PermissionError:
        raise SettingsError(f"cannot read {weights}: permission denied") from None
    except OSError:
        return False


@cache
def _opens(weights: Path, size: int, changed: int) -> bool:
    """Whether the header of a .safetensors file describes it to its end; opening checks no more."""
    try:
        with open(weights, "rb"), safe_open(weights, "numpy"):  # the latter does not say that a file may not be read
            return True
    except SafetensorError:
        return False


def check_records(path: Path) -> None:
    """Raise ValueError unless all in a zipped torch file is what its checksums say, which torch.load does not check."""
    with zipfile.ZipFile(path) as archive:
        if packed := [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"{packed[0]} is compressed, as torch's own never are")  # and may be of any size
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is not what its checksum says")


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode())


def write_atomic(path: Path, blob: bytes) -> None:
    """Write a file so that a kill or a full disk leaves the old one or the new one, never half."""
    with replaced(path) as file:
        file.write(blob)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file that takes this name once it is whole and on the disk."""
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if it is not there or not whole, SettingsError if it may not be read."""
    try:
        if stat.S_ISREG(os.stat(path).st_mode):  # asked once: a file may appear in between
            return json.loads(path.read_text())
    except PermissionError:
        raise SettingsError(f"cannot read {path}: permission denied") from None
    except (OSError, ValueError, RecursionError) as error:
        if getattr(error, "errno", None) != errno.ELOOP:  # what passes, on a network disk, is no damage
            return None
        raise SettingsError(f"{path} is a link to itself, where a file of records should be") from None
    raise SettingsError(f"{path} is a folder, pipe, socket or device, where a file of records should be")
