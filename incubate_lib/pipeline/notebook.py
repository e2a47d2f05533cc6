"""Execute one notebook with parameters, through papermill, in a process of its own.

What papermill lacks is added here: parameters are checked before a kernel starts (papermill only warns),
kernels talk over private sockets (TCP ports race when several start at once), and the executed copy is free of machine
paths and half-saved widget state. The copy appears under its final name only when the notebook ran to its end.
"""

import ast
import contextlib
import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from incubate_lib.config import SettingsError, data_folder, nearest, notebooks_folder, refuse
from incubate_lib.config.errors import shortened
from incubate_lib.config.members import PHASES
from incubate_lib.pipeline.injected import check_value
from incubate_lib.pipeline.strategies import open_phase
from incubate_lib.training.files import write_atomic

# jsonschema would build a grammar for 2 s, for addresses no notebook has
sys.modules.setdefault("rfc3987_syntax", None)
# seconds a cell; it only reads, so a longer one hangs. Training takes what it takes
TIMEOUTS = {"06_analysis": 900}
KEPT = [  # of a notebook's JSON: what is no text, in which a path as short as /tmp stands by chance now and then
    # outputs and attachments in base64
    r'"(?:image/(?!svg\b)|audio/|video/|application/(?:pdf|octet-stream)\b)[^"]*": "[^"]*"',
    # a picture inside a text. Base64 may go on in the next line, in JavaScript after a backslash; other data has no blanks,
    # quotes or brackets in it
    r"data:[\w.+-]*/[\w.+-]+(?:;[\w=.+-]*)*,"
    r"(?:[A-Za-z0-9+/=_-]+(?:(?:\\\\)?(?:\\r)?\\n[A-Za-z0-9+/]+={0,2})+|[^\s\"'<>()\\]+)",
    # base64 and nothing else, as numbers stand in JSON
    r'"[A-Za-z0-9+/]{64,}={0,2}"',
]


def notebook_path(name: str) -> Path:
    """Return the file of a notebook of the series; SettingsError if it is not there."""
    folder = notebooks_folder()
    known = sorted(path.stem for path in folder.glob("*.ipynb"))
    hint = nearest(name, known) if known else "install the project anew: `pip install -e .` in its folder"
    refuse(name not in known, f"no notebook {shortened(repr(name))} in {folder}; {hint}")
    return folder / f"{name}.ipynb"


def check_parameters(name: str, parameters: dict[str, Any]) -> None:
    """Raise SettingsError for a parameter the notebook does not have, of a wrong type, or out of range."""
    import papermill

    known = papermill.inspect_notebook(str(notebook_path(name)))
    types = {key: about["inferred_type_name"] for key, about in known.items()}
    for key, value in parameters.items():
        check_value(f"notebook {name}", key, value, types)
    phase = next((PHASES[kind].group for kind in PHASES if PHASES[kind].notebook == name), None)
    if phase:
        defaults = {key: ast.literal_eval(known[key]["default"]) for key in known}
        given = defaults | parameters
        open_phase(phase, path=given.pop("phase"), **given)  # settings, strategy, seed and module_index fit together


def execute(name: str, output: Path, parameters: dict[str, Any], **client: Any) -> None:
    """Run a notebook of the series and save the executed copy; papermill's error if a cell fails.

    A failed copy is kept as `<output>.failed.ipynb`, to be opened and read. `client` goes to nbclient.
    """
    import nbformat
    import papermill
    from traitlets.config import Config

    check_parameters(name, parameters)
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = output.with_suffix(".failed.ipynb")
    with tempfile.TemporaryDirectory(prefix="incubate-") as private:
        working = Path(private) / "notebook.ipynb"
        config = Config({"KernelManager": {"transport": "ipc", "connection_file": f"{private}/kernel.json"}})
        place = output
        try:
            papermill.execute_notebook(
                str(notebook_path(name)), str(working), parameters, kernel_name="python3", progress_bar=False,
                log_output=True, coalesce_streams=True, config=config, execution_timeout=TIMEOUTS.get(name), **client,
            )  # fmt: skip
        except BaseException:
            place = failed
            raise
        finally:
            if working.exists():
                nb = scrub(nbformat.read(working, as_version=4))
                write_atomic(place, nbformat.writes(nb).encode())
    failed.unlink(missing_ok=True)


def scrub(nb: Any) -> Any:
    """Return the executed notebook without this machine's paths, and without widget state, which is saved half."""
    import nbformat

    nb.metadata.pop("widgets", None)
    for key in ("input_path", "output_path"):
        nb.metadata.get("papermill", {}).pop(key, None)
    return nbformat.from_dict(json.loads(without_paths(json.dumps(nb, ensure_ascii=False))))


def without_paths(text: str) -> str:
    """Replace this machine's paths in a notebook's JSON; pictures and other base64 stay as they are."""
    places = {data_folder(): "data", notebooks_folder().parent: ".", sys.prefix: "venv", Path.home(): "~"}
    places[tempfile.gettempdir()] = "tmp"
    places = {json.dumps(str(path), ensure_ascii=False)[1:-1]: word for path, word in places.items()}
    paths = sorted(places.keys() - {"/"}, key=len, reverse=True)  # the longest first: some lie inside others
    found = re.compile("|".join([*KEPT, *map(re.escape, paths)]))
    return found.sub(lambda match: places.get(match[0], match[0]), text)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """End the process where the work within goes wrong; the reason is the last line printed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        yield
    except SettingsError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(2) from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if hasattr(error, "ename"):  # papermill's, of a cell
            reason = f"{error.ename}: {error.evalue}"
        print(f"error: {reason.strip().splitlines()[0]}", flush=True)
        raise SystemExit(1) from None
