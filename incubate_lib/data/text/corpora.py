"""Where text comes from: documents to train on and documents to evaluate on, never parts of one document to both.

What is wrong with a corpus is reported when it is opened: no folder, no files, no documents in a split, bytes that are no UTF-8.
"""

import hashlib
import lzma
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from incubate_lib.config import DEFAULT_MACHINE, DataSettings, MachineSettings, SettingsError, refuse
from incubate_lib.data.folders import folder_of, is_left_behind

AUSTEN = Path(__file__).with_name("austen.txt.xz")  # made by tests/make_austen.py
BETWEEN = "\f"  # its documents
ONE_IN = 10  # documents is set apart to test on, another one to choose settings by
NOT_READ = {"test", "tests", "idlelib", "encodings", "site-packages", "__pycache__"}  # of the standard library
ARTICLE = re.compile(r"(?m)^(?= = [^=\n]+ = $)")  # where one begins in WikiText
WIKITEXT = {"train": "train", "val": "valid", "test": "test"}  # our name of a split → that in its files'
Splits = dict[str, list[str]]


def open_corpus(
    settings: DataSettings, machine: MachineSettings = DEFAULT_MACHINE
) -> tuple[list[str], list[str], dict[str, str]]:
    """Return the documents to train on, those to evaluate on, and what a record says of where they are from.

    Of a corpus in one piece every tenth document is for testing, the one before it for validation. SettingsError for a split
    without documents.
    """
    found = _READ[settings.source](settings, machine)
    if isinstance(found, list):
        every = min(len(found), ONE_IN)
        few = f"data.source {settings.source!r} has {len(found)} document(s); to train, validate and test takes 3 at least"
        refuse(every < 3, few)
        kinds = ["train"] * (every - 2) + ["val", "test"]
        found = {kind: [text for i, text in enumerate(found) if kinds[i % every] == kind] for kind in WIKITEXT}
    for split in ("train", settings.eval_split):
        refuse(not any(map(str.strip, found[split])), f"data.source {settings.source!r}: the {split} split holds no text")
    whole = hashlib.sha256(BETWEEN.join(found["train"] + found[settings.eval_split]).encode(errors="replace")).hexdigest()
    about = {"text_sha256": whole} | ({"python": platform.python_version()} if settings.source == "stdlib" else {})
    return found["train"], found[settings.eval_split], about


def _austen(settings: DataSettings, machine: MachineSettings) -> list[str]:
    """The six novels of Jane Austen, a chapter a document."""
    return lzma.decompress(AUSTEN.read_bytes()).decode().split(BETWEEN)


def _stdlib(settings: DataSettings, machine: MachineSettings) -> list[str]:
    """The source files of this Python's standard library, without its tests."""
    library = Path(os.__file__).parent
    paths = (path for path in sorted(library.rglob("*.py")) if not NOT_READ.intersection(path.relative_to(library).parts))
    return [_decoded(path, settings) for path in paths]


def _folder(settings: DataSettings, machine: MachineSettings) -> list[str] | Splits:
    """A folder of .txt files, a file a document; with subfolders train, val and test these are the splits."""
    folder = folder_of(settings, machine)
    if not (folder / "train").is_dir():
        return [_decoded(path, settings) for path in _files(folder)]
    splits = {}
    for split in ("train", settings.eval_split):
        refuse(not (folder / split).is_dir(), f"data.folder {folder} has a subfolder train, but none {split} (data.eval_split)")
        splits[split] = [_decoded(path, settings) for path in _files(folder / split)]
    return splits


def _files(folder: Path) -> Iterator[Path]:
    names = [path for path in sorted(folder.rglob("*.txt")) if not is_left_behind(path.name) and path.is_file()]
    refuse(not names, f"data.folder {folder} holds no .txt files")
    yield from names


def _wikitext(settings: DataSettings, machine: MachineSettings) -> Splits:
    """WikiText's three files, raw or tokenised, an article a document."""
    folder, splits = folder_of(settings, machine), {}
    for split in ("train", settings.eval_split):
        named = [folder / f"wiki.{WIKITEXT[split]}.{kind}" for kind in ("tokens", "raw")]
        there = [path for path in named if path.is_file()]
        refuse(not there, f"data.folder {folder} has neither {named[0].name} nor {named[1].name}, the files of WikiText")
        splits[split] = [text for text in ARTICLE.split(_decoded(there[0], settings)) if text.strip()]
    return splits


def _decoded(path: Path, settings: DataSettings) -> str:
    """Return a file's text; SettingsError for bytes that are no UTF-8, unless they are to be replaced."""
    try:
        return path.read_bytes().decode(errors="strict" if settings.undecodable == "refuse" else "replace")
    except UnicodeDecodeError as error:
        hint = "data.undecodable=replace takes a sign for each"
        raise SettingsError(f"{path}: byte {error.start} (0x{error.object[error.start]:02x}) is no UTF-8; {hint}") from None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None


_READ = {"austen": _austen, "stdlib": _stdlib, "text": _folder, "wikitext": _wikitext}
