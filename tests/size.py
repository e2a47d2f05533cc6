"""Count the package's lines of code: `python tests/size.py [FOLDER]`, a line for each room and one for the whole.

What is counted does not depend on how the lines are broken: a copy is formatted by ruff at 110 columns, without `fmt: skip` and
`fmt: off`, and blank lines, comments and docstrings do not count.
"""

import ast
import io
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from pathlib import Path

EMPTY = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Return how many lines of Python hold code: no blank ones, no comments, no docstrings."""
    documents = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            documents.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    held = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in EMPTY:
            held.update(range(token.start[0], token.end[0] + 1))
    return len(held - documents)


def formatted(package: Path, copy: Path) -> None:
    """Write a copy of a package's modules as ruff formats them at 110 columns."""
    for path in package.rglob("*.py"):
        target = copy / path.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(r"#\s*fmt:\s*(skip|off|on)", "#", path.read_text()))
    ruff = [sys.executable, "-m", "ruff", "format", "--quiet", "--isolated", "--line-length=110", str(copy)]
    subprocess.run(ruff, check=True)


def count(package: Path) -> Counter[str]:
    """Return lines of code by room: a folder of the package, or "" for what lies beside them."""
    lines: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        formatted(package, Path(folder))
        for path in Path(folder).rglob("*.py"):
            lines["/".join(path.relative_to(folder).parts[:-1])] += code_lines(path.read_text())
    return lines


if __name__ == "__main__":
    package = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "incubate_lib")
    lines = count(package)
    for room in sorted(lines):
        print(f"{lines[room]:7,}  {package.name}/{room}".rstrip("/"))
    print(f"{lines.total():7,}  in all")
