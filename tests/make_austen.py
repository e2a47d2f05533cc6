"""Make the corpus that comes along, Jane Austen's six novels, from Debian's r-cran-janeaustenr, without R.

    dpkg -x r-cran-janeaustenr_1.0.0-1_all.deb package; python tests/make_austen.py package

R keeps objects as records of four bytes of length and a zlib stream; a novel is a vector of strings in XDR, a string a line.
"""

import lzma
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from incubate_lib.data.text.corpora import AUSTEN, BETWEEN

TABLE = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
STRINGS = 16  # R's type of a vector of strings
PLAIN = {"_": "", "“": '"', "”": '"', "’": "'", "‘": "'", "--": " - "}


def records(packed: bytes) -> Iterator[bytes]:
    """Yield the objects of a table."""
    place = 0
    while place < len(packed):
        stream = zlib.decompressobj()
        yield stream.decompress(packed[place + 4 :])
        place = len(packed) - len(stream.unused_data)


def strings(record: bytes) -> list[str]:
    """Return the strings of an object, nothing if it is something else."""
    version, place = struct.unpack_from(">i", record, 2)[0], 14
    if version == 3:  # which names its encoding
        place += 4 + struct.unpack_from(">i", record, place)[0]
    kind, count = struct.unpack_from(">ii", record, place)
    lines, place = [], place + 8
    for _ in range(count if kind & 255 == STRINGS else 0):
        size = max(0, struct.unpack_from(">ii", record, place)[1])
        lines.append(record[place + 8 : place + 8 + size].decode())
        place += 8 + size
    return lines


def chapters(lines: list[str]) -> list[str]:
    """Return a novel's title and its chapters, each paragraph a line."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    text = "\n".join(" ".join(line.strip() for line in part.split("\n") if line.strip()) for part in paragraphs if part.strip())
    for sign, plain in PLAIN.items():
        text = text.replace(sign, plain)
    return re.split(r"\n(?=(?:CHAPTER|Chapter) )", text)


if __name__ == "__main__":
    novels = [lines for record in records(Path(sys.argv[1], TABLE).read_bytes()) if len(lines := strings(record)) > 1000]
    documents = [chapter for novel in novels for chapter in chapters(novel)]
    AUSTEN.write_bytes(lzma.compress(BETWEEN.join(documents).encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{len(novels)} novels, {len(documents)} documents, {sum(map(len, documents)):,} characters")
