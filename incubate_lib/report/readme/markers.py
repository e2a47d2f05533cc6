"""Write the numbers of README.md, and all comparisons in data/results/README.md, from the tracked tables.

In README.md a number stands between comments that readers of the page do not see, as in
`<!--=gain digits-budget:1/4 growing-->…<!---->`, and a table between `<!--table budget digits-budget-->` and `<!--end-->`. The
words name one of VALUES or TABLES and what it is given. A *source* is a published run (`digits`), a study (`digits-strategies`)
or a cell of one (`digits-depth-data:8,10%`).

`python -m incubate_lib.report.readme` writes both files, and so does `incubate figures`. No line begins with such a comment:
Markdown would take all of the line for HTML.
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from incubate_lib.report.readme.comparisons import comparisons
from incubate_lib.report.readme.tables import TABLES
from incubate_lib.report.readme.text import with_minus
from incubate_lib.report.readme.values import VALUES
from incubate_lib.report.tables import records

ALIASES = {"paper": "deep_incubation", "recommended": "deep_incubation_identity", "stack": "deep_incubation_stack"}
COMPARISONS = "data/results/README.md"
_INLINE = re.compile(r"<!--=(?P<call>[^>\n]+)-->(?P<old>[^<\n]*)<!---->")
_BLOCK = re.compile(r"<!--table (?P<call>[^>\n]+)-->\n(?P<old>.*?)<!--end-->", re.DOTALL)


def render(text: str) -> str:
    """Return README's text with every number and table between markers as the tracked tables have it.

    ValueError for a marker that names nothing, or that begins a line.
    """
    if found := re.search(r"^[ >*-]*<!--=.*", text, re.MULTILINE):
        raise ValueError(f"a line begins with a marker, so Markdown would take it for HTML: {found[0]}")
    text = _BLOCK.sub(lambda m: f"<!--table {m['call']}-->\n{_call(TABLES, m['call'])}<!--end-->", text)
    return _INLINE.sub(lambda m: f"<!--={m['call']}-->{_call(VALUES, m['call'])}<!---->", text)


def write() -> list[Path]:
    """Write README.md and the list of all comparisons; return the files."""
    root = records.results_folder().parents[1]
    written = {root / "README.md": render((root / "README.md").read_text()), root / COMPARISONS: comparisons()}
    for path, text in written.items():
        path.write_text(text)
    return list(written)


def _call(known: dict[str, Callable[..., str]], call: str) -> str:
    name, *words = shlex.split(call)
    try:
        return with_minus(known[name](*(ALIASES.get(word, word) for word in words)))
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"README's marker {call!r}: {type(error).__name__}: {error}") from error
