"""Write the numbers of the project's pages, and all comparisons in data/results/README.md, from the tracked tables.

The pages are README.md files, each in the folder that it speaks of. In a page a number stands between comments that its readers
do not see, as in `<!--=gain digits-budget:1/4 growing-->…<!---->`, and a table between `<!--table budget digits-budget-->` and
`<!--end-->`. The words name one of VALUES or TABLES and what it is given. A *source* is a published run (`digits`), a study
(`digits-strategies`) or a cell of one (`digits-depth-data:8,10%`).

`incubate figures` writes them. No line begins with such a comment: Markdown would take all of the line for HTML.
"""

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from incubate_lib.report.readme.comparisons import comparisons
from incubate_lib.report.readme.tables import TABLES
from incubate_lib.report.readme.text import with_minus
from incubate_lib.report.readme.values import VALUES
from incubate_lib.report.tables import records

ALIASES = {
    "paper": "deep_incubation",
    "identity": "deep_incubation_identity",
    "stack": "deep_incubation_stack",
}
COMPARISONS = "data/results/README.md"
FOLDERS = ("", "figures", "data", "notebooks")  # beside those of the package
Makers = Mapping[str, Callable[..., str]]
_INLINE = re.compile(r"<!--=(?P<call>[^>\n]+)-->(?P<old>[^<\n]*)<!---->")
_BLOCK = re.compile(r"<!--table (?P<call>[^>\n]+)-->\n(?P<old>.*?)<!--end-->", re.DOTALL)


def pages() -> list[Path]:
    """Return the files of the project's pages."""
    root = records.results_folder().parents[1]
    return [*(root / folder / "README.md" for folder in FOLDERS), *sorted((root / "incubate_lib").rglob("README.md"))]


def render(text: str, more: Makers = MappingProxyType({})) -> str:
    """Return a page's text with every number and table between markers as the tracked tables have it.

    `more` makes tables that are known elsewhere. ValueError for a marker that names nothing, or that begins a line.
    """
    if found := re.search(r"^[ >*-]*<!--=.*", text, re.MULTILINE):
        raise ValueError(f"a line begins with a marker, so Markdown would take it for HTML: {found[0]}")
    tables = TABLES | dict(more)
    text = _BLOCK.sub(lambda m: f"<!--table {m['call']}-->\n{_call(tables, m['call'])}<!--end-->", text)
    return _INLINE.sub(lambda m: f"<!--={m['call']}-->{_call(VALUES, m['call'])}<!---->", text)


def write(more: Makers = MappingProxyType({})) -> list[Path]:
    """Write all pages and the list of all comparisons; return the files."""
    written = {page: render(page.read_text(), more) for page in pages()}
    written[records.results_folder().parents[1] / COMPARISONS] = comparisons()
    for path, text in written.items():
        path.write_text(text)
    return list(written)


def _call(known: Makers, call: str) -> str:
    name, *words = shlex.split(call)
    try:
        return with_minus(known[name](*(ALIASES.get(word, word) for word in words)))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"marker {call!r}: {type(error).__name__}: {error}") from error
