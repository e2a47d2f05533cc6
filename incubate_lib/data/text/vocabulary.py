"""As which tokens text is read: characters, bytes, or the pieces of words that a file of `tokenizers` knows."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from incubate_lib.config import DEFAULT_MACHINE, DataSettings, MachineSettings, SettingsError
from incubate_lib.data.folders import place_of

UNKNOWN, END, MASK = "<unk>", "<end>", "<mask>"
SPECIAL = (UNKNOWN, END, MASK)  # of characters and bytes, numbers 0 to 2
RARE = 1e-5  # characters that are less of the training text than this share are unknown
FILE_NAMES = {END: ("[SEP]", "<|endoftext|>", "</s>", END), MASK: ("[MASK]", "<mask>")}  # in files of tokenizers


@dataclass(frozen=True)
class Vocabulary:
    """What the tokens of a text are called, and which are no text."""

    names: list[str]  # of token i
    special: tuple[int, ...]  # that no network is asked for where it guesses what was masked
    end: int  # stands behind each document
    mask: int | None  # none: a tokenizer without one
    encoder: Any  # a text → its tokens [S] and for how many characters each stands [S]

    def encode(self, documents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of documents one behind the other, int32 [S], and of each the number of characters, uint8 [S].

        The end of a document counts as a character, and has those for which no token stands.
        """
        parts = [self.encoder(text) for text in documents]
        tokens = [np.append(part, self.end).astype(np.int32) for part, _ in parts]
        ends = [1 + len(text) - int(part.sum()) for text, (_, part) in zip(documents, parts, strict=True)]
        lengths = [np.append(part, end).clip(0, 255).astype(np.uint8) for end, (_, part) in zip(ends, parts, strict=True)]
        return np.concatenate(tokens), np.concatenate(lengths)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as people can read them."""
        return "".join(self.names[token] if token not in self.special else "□" for token in tokens)


def open_vocabulary(settings: DataSettings, train: Sequence[str], machine: MachineSettings = DEFAULT_MACHINE) -> Vocabulary:
    """Return the vocabulary that settings ask for; what it knows it knows from the documents to train on alone."""
    make = {"characters": _characters, "bytes": _bytes}.get(settings.vocabulary)
    return make(train) if make else _of_file(settings, machine)


def _characters(train: Sequence[str]) -> Vocabulary:
    counts = Counter()
    for text in train:
        counts.update(text)
    known = sorted(sign for sign, count in counts.items() if count >= RARE * counts.total())
    codes = np.array([*map(ord, known)], dtype=np.uint32)

    def encode(text: str) -> tuple[np.ndarray, np.ndarray]:
        given = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        place = np.searchsorted(codes, given).clip(max=len(codes) - 1)
        return np.where(codes[place] == given, place + len(SPECIAL), 0), np.ones(len(given))

    return Vocabulary([*SPECIAL, *known], (0, 1, 2), 1, 2, encode)


def _bytes(train: Sequence[str]) -> Vocabulary:
    def encode(text: str) -> tuple[np.ndarray, np.ndarray]:
        given = np.frombuffer(text.encode(), np.uint8)
        return given.astype(np.int32) + len(SPECIAL), (given & 0xC0) != 0x80  # those that go on a character begin with 10

    names = [chr(byte) if 32 <= byte < 127 or byte == 10 else f"\\x{byte:02x}" for byte in range(256)]
    return Vocabulary([*SPECIAL, *names], (0, 1, 2), 1, 2, encode)


def _of_file(settings: DataSettings, machine: MachineSettings) -> Vocabulary:
    """Return the vocabulary of a file of tokenizers, which lies in data.folder or anywhere."""
    path, what = place_of(settings, machine) / settings.vocabulary, f"data.vocabulary {settings.vocabulary!r}"
    if not path.is_file():
        raise SettingsError(f"{what}: give characters, bytes or a file of tokenizers; there is no file {path}")
    file = _loaded(path, what)
    names = [file.id_to_token(i) for i in range(file.get_vocab_size())]
    if None in names:
        raise SettingsError(f"{what}: token {names.index(None)} of {len(names)} has no name; numbers must have no gaps")
    special = tuple(i for i, token in file.get_added_tokens_decoder().items() if token.special)
    end, mask = ([names.index(name) for name in FILE_NAMES[kind] if name in names] for kind in (END, MASK))
    if not end:
        raise SettingsError(f"{what} has no token that ends a document; it needs one of {', '.join(FILE_NAMES[END])}")

    def encode(text: str) -> tuple[np.ndarray, np.ndarray]:
        found = file.encode(text, add_special_tokens=False)
        ends = np.array([after for _, after in found.offsets], dtype=np.int64)
        return np.array(found.ids, dtype=np.int32), np.diff(ends, prepend=0)  # what it passes over goes along

    return Vocabulary(names, special, end[0], mask[0] if mask else None, encode)


def _loaded(path: Path, what: str) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise SettingsError(f"{what} needs the package tokenizers: pip install tokenizers") from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # its own kind, which says what is wrong in Rust's words
        raise SettingsError(f"{what}: {path} is no file of tokenizers ({' '.join(str(error).split())[:200]})") from None
