"""The outputs that the tracked notebooks carry: pictures and tables of a real run, without what only this machine or day adds."""

import base64
import hashlib
import io
import tempfile
from pathlib import Path
from typing import Any

from incubate_lib.config import SettingsError, notebooks_folder, refuse
from incubate_lib.pipeline.notebook import execute, notebook_path
from incubate_lib.training.files import write_atomic

LARGEST = 300 * 1024  # bytes of a notebook with its outputs
COLORS = 64  # of a picture; ours have few, and so take a third of the room
SHOWN = ("image/png", "text/html", "text/markdown")  # of an output that comes in several forms, the first of these is kept
THUMBNAIL = "thumbnail"  # tags the cell whose first picture is shown small on the front page
SMALL = (480, 200)  # pixels of that, twice what a page has room for


def show(name: str) -> Path:
    """Execute a notebook of the series with its defaults, keep the outputs in it, and return its path.

    Headless, so that there are pictures in place of widgets. SettingsError if a cell fails, or if the outputs
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
    """Return the hash of a notebook's code, by which outputs are known to belong to it. The text around it may be mended."""
    return digest("\0".join(cell.source for cell in nb.cells if cell.cell_type == "code"))


def thumbnails() -> list[Path]:
    """Write what the front page shows of each tracked notebook, from the outputs that it carries; return the files."""
    return [_thumbnail(path) for path in sorted(notebooks_folder().glob("*.ipynb"))]


def picture(nb: Any) -> str:
    """Return the picture that the front page has of a notebook, PNG in base64: the first of the cell tagged `thumbnail`."""
    tagged = (cell for cell in nb.cells if THUMBNAIL in cell.metadata.get("tags", ()))
    found = [output.data["image/png"] for cell in tagged for output in cell.outputs if "image/png" in output.get("data", ())]
    refuse(not found, f"a notebook needs a cell with the tag {THUMBNAIL!r} and a picture among its outputs")
    return found[0]


def _thumbnail(path: Path) -> Path:
    """Write a notebook's picture on white ground, a tall one's upper part, with the hash of the large one; return the file."""
    import nbformat
    from PIL import Image, ImageOps, PngImagePlugin

    large = picture(nbformat.read(path, as_version=4))
    with Image.open(io.BytesIO(base64.b64decode(large))) as image:
        is_tall = image.width * SMALL[1] < image.height * SMALL[0]
        how = {"centering": (0.5, 0)} if is_tall else {"color": "white"}
        fitted = (ImageOps.fit if is_tall else ImageOps.pad)(image.convert("RGB"), SMALL, Image.Resampling.LANCZOS, **how)
    small = _with_few_colors(fitted)
    about, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    about.add_text("of", digest(large))
    small.save(buffer, format="png", optimize=True, pnginfo=about)
    file = notebooks_folder().parent / "figures" / "thumbnails" / f"{path.stem}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, buffer.getvalue())
    return file


def digest(text: str) -> str:
    """Return the hash by which a notebook knows its code, and a thumbnail its picture."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _shown(output: Any) -> Any:
    """Return an output as it is kept; None for a widget, which has a picture as its twin."""
    if output.output_type == "stream":
        return output
    kind = next((kind for kind in SHOWN if kind in output.data), "text/plain")
    if "application/vnd.jupyter.widget-view+json" in output.data or kind not in output.data:
        return None
    smaller = {"image/png": _small, "text/html": lambda text: "\n".join(line.strip() for line in text.splitlines())}
    output.data = {kind: smaller.get(kind, str)(output.data[kind])}
    output.metadata = {}
    if "execution_count" in output:
        output.execution_count = None
    return output


def _small(picture: str) -> str:
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        buffer = io.BytesIO()
        _with_few_colors(image.convert("RGB")).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _with_few_colors(image: Any) -> Any:
    """Return a picture with a palette that covers its colours evenly: the commonest ones would be greys, and lines alike."""
    from PIL import Image

    return image.quantize(COLORS, method=Image.Quantize.MAXCOVERAGE, kmeans=2)
