"""How numbers and tables are set in Markdown."""

import re
from collections.abc import Sequence


def with_minus(text: str) -> str:
    """Set minus signs before numbers as such; dates, names and exponents keep their hyphens."""
    return re.sub(r"(?<!\w)-(?=[\d.])", "−", text)


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Return a table of rows that all have the same columns."""
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row.values())} |" for row in rows)]
    return "\n".join(lines) + "\n"
