"""What a bad input is: a kind, what is wrong with it, how it is made in an empty folder, and the command that is given it."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

# What the command line checks, and then the cells up to the one that checks itself, as plain papermill runs them.
NOTEBOOK = """
import json, sys
from incubate_lib.pipeline.notebook import check_parameters, notebook_path, reported
name, given = sys.argv[1], json.loads(sys.argv[2])
with reported():
    check_parameters(name, given)
    cells = json.loads(notebook_path(name).read_text())["cells"]
    cells = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    first = next(i for i, cell in enumerate(cells) if cell.startswith("check_injected(In)"))
    injected = "\\n".join(["# Parameters", *(f"{key} = {value!r}" for key, value in given.items())])
    space = {"In": [*cells[:first], injected, cells[first]]}
    for cell in space["In"]:
        exec(cell, space)
"""


def nothing(here: Path) -> None:
    """Make no files."""


@dataclass(frozen=True)
class Bad:
    """A bad input. Commands run in the folder `here`, and `here/data` is the data folder."""

    kind: str
    name: str  # what is wrong with it
    command: tuple[str, ...]
    make: Callable[[Path], object] = nothing
    says: str = ""  # what the message must name
    env: dict[str, str] = field(default_factory=dict)  # with {here}
    needs_run: bool = False  # a finished run of the preset smoke is in the data folder
    # of a damaged record: it may be answered with status 0, if `says` stands in the answer
    may_be_told: bool = False

    @property
    def is_notebook(self) -> bool:
        return self.kind == "notebook parameters"

    def __str__(self) -> str:
        words = " ".join(word if len(word) < 120 else f"{word[:100]}… ({len(word)} characters)" for word in self.command)
        return f"{self.name}: {'check_parameters' if self.is_notebook else 'incubate'} {words}"


def file(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Return what makes a file, and the folders above it."""

    def make(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def both(*makes: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return what makes one after the other."""
    return lambda here: [make(here) for make in makes]


def png(size: tuple[int, int] = (16, 16), mode: str = "RGB", shade: int = 0) -> bytes:
    """Return a small picture."""
    buffer = io.BytesIO()
    Image.new(mode, size, shade).save(buffer, "PNG")
    return buffer.getvalue()


def parameters(notebook: str, **given: object) -> tuple[str, str]:
    """Return a notebook and its parameters as NOTEBOOK takes them."""
    return notebook, json.dumps(given)
