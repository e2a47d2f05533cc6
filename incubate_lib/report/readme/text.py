"""How numbers and tables are set in Markdown."""

import re
from collections.abc import Sequence


def with_minus(text: str) -> str:
    """Set minus signs before numbers as such; dates, names and exponents keep their hyphens."""
    return re.sub(r"(?<!\w)-(?=[\d.])", "−", text)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"
