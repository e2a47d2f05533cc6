"""The outputs that the tracked notebooks carry: pictures and tables of a real run, without what only this machine or day adds."""

import base64
import hashlib
import io
import tempfile
from pathlib import Path
from typing import Any

from incubate_lib.config import SettingsError, refuse
from incubate_lib.pipeline.notebook import execute, notebook_path
from incubate_lib.training.files import write_atomic

LARGEST = 300 * 1024  # bytes of a notebook with its outputs
COLORS = 32  # of a picture; ours have few, and so take a third of the room
SHOWN = ("image/png", "text/html", "text/markdown")  # the first of these that there is stands for the rest


def show(name: str) -> Path:
    """Execute a notebook of the series with its defaults, keep the outputs in it, and return its path.

    Headless, so that pictures stand where widgets would. SettingsError if a cell fails, or if the outputs
    are too large.
    """
    import nbformat
    from papermill.exceptions import PapermillExecutionError

    path = notebook_path(name)
    with tempfile.TemporaryDirectory(prefix="incubate-") as private:
        copy = Path(private) / path.name
        try:
            execute(name, copy, {}, cwd=str(path.parent))  # so that links lead from the notebook
        except PapermillExecutionError as error:
            raise SettingsError(f"{path}, cell {error.exec_count}: {error.ename}: {error.evalue}") from None
        executed = nbformat.read(copy, as_version=4)
    nb = nbformat.read(path, as_version=4)
    for cell, done in zip(nb.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs = [shown for output in done.outputs if (shown := _shown(output))]
            cell.execution_count = None
    nb.metadata["shown"] = {"sources": sources(nb)}
    text = nbformat.writes(nb)
    refuse(len(text) > LARGEST, f"{path} would have {len(text):,} bytes; at most {LARGEST:,} are kept in the repository")
    write_atomic(path, f"{text.rstrip()}\n".encode())
    return path


def sources(nb: Any) -> str:
    """Return what tells whether outputs belong to a notebook's sources: a hash of these."""
    return hashlib.sha256("\0".join(cell.source for cell in nb.cells).encode()).hexdigest()[:12]


def _shown(output: Any) -> Any:
    """Return an output as it is kept; None for a widget, which has a picture as its twin."""
    if output.output_type == "stream":
        return output
    kind = next((kind for kind in SHOWN if kind in output.data), "text/plain")
    if "application/vnd.jupyter.widget-view+json" in output.data or kind not in output.data:
        return None
    output.data = {kind: _small(output.data[kind]) if kind == "image/png" else output.data[kind]}
    output.metadata = {}
    if "execution_count" in output:
        output.execution_count = None
    return output


def _small(picture: str) -> str:
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        buffer = io.BytesIO()
        image.convert("RGB").quantize(COLORS).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
