"""Tables as a terminal shows them."""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # it takes a second, and what is misspelt is reported before
    import pandas as pd


def fitted(table: "pd.DataFrame", console: Console, title: str | None = None) -> Table:
    """Return a table for the terminal; where it is too narrow, headings go on in further lines, and if need be cells as well."""
    columns = [[heading, *map(str, table[heading])] for heading in table]
    widths = [max(map(len, cells)) for cells in columns]
    gap = 2
    if sum(widths) + gap * len(widths) > console.width:
        words = [[max(map(len, cell.split()), default=0) for cell in cells] for cells in columns]
        least = [max(heading, *map(len, cells[1:])) for (heading, *_), cells in zip(words, columns, strict=True)]
        if sum(least) + len(least) > console.width:
            least = [max(longest) for longest in words]
        gap = 2 if sum(least) + 2 * len(least) <= console.width else 1
        room = max(0, console.width - sum(least) - gap * len(least))
        for i, (whole, narrow) in enumerate(zip(widths, least, strict=True)):
            widths[i] = min(whole, narrow + room)
            room -= widths[i] - narrow
    about = {"title": title, "title_justify": "left", "title_style": "bold"}
    shown = Table(**about, box=SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), show_edge=False)
    for i, (heading, width) in enumerate(zip(table, widths, strict=True)):
        shown.add_column(heading, justify="right" if i else "left", vertical="bottom", width=width)
    for row in zip(*(cells[1:] for cells in columns), strict=True):
        shown.add_row(*row)
    return shown
