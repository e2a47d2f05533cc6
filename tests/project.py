"""Where the project lies, and its pages: README.md files, each in the folder that it speaks of."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def pages() -> dict[str, str]:
    """Return the text of every page by its place: "README.md", "data/README.md" …"""
    own = (path for folder in ("figures", "data", "notebooks", "incubate_lib") for path in (ROOT / folder).rglob("README.md"))
    written = (path for path in own if not path.is_relative_to(ROOT / "data" / "results"))
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(written)]
    return {str(path.relative_to(ROOT)): path.read_text() for path in files}


def blocks(language: str, place: str | None = None) -> list[str]:
    """Return the code blocks of a language, of one page or of all."""
    texts = [pages()[place]] if place else pages().values()
    found = (re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.S | re.M) for text in texts)
    return [re.sub(rf"^{indent}", "", block, flags=re.M) for page in found for indent, block in page]


def block(language: str, part: str) -> str:
    """Return the one code block that has this in it."""
    (found,) = (text for text in blocks(language) if part in text)
    return found
