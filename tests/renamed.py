"""What the project calls things, commit by commit: the one place to write down a name that has changed.

A name is a dotted path: `training.lr` in a settings file, `mat.flops` in a summary, `blocks.0.attn.qkv.weight` in a file of
weights. Old names are regular expressions that match all of a name; new ones may use their groups (`\\1`), and None says that it
is gone without a successor and is not compared.

`python tests/renamed.py FOLDER` gives the columns of the tables (*.csv) in a folder today's names, and their scores a metric.
"""

import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Names = dict[str, str | None]


@dataclass(frozen=True)
class Change:
    """The names that one commit changed, old → new."""

    settings: Names = field(default_factory=dict)  # fields of a settings file; a section moves with `old\.(.*)` → `new.\1`
    strategies: Names = field(default_factory=dict)
    phases: Names = field(default_factory=dict)  # incubate-0, finetune, …
    files: Names = field(default_factory=dict)  # of a phase, with lines of JSON: metrics.jsonl
    columns: Names = field(default_factory=dict)  # of these lines and of summaries
    tensors: Names = field(default_factory=dict)


# The oldest first. Cases are written in the names before all of them, and a commit knows the first so many.
CHANGES: tuple[Change, ...] = (
    Change(
        columns={
            r"((?:start|meta|assembled|other)_)?accuracy": r"\1score",
            "judge_images": "eval_images",
            "judged_on": "split",
            "looks": "probes",
            "look_(seconds|flops)": r"probe_\1",
        }
    ),
)
METRIC = "accuracy"  # what scores are of in tables that do not say


def renamed(name: str, kind: str, changes: Sequence[Change]) -> str | None:
    """Return what a name of that kind is called after some changes; None if it is gone."""
    for change in changes:
        for old, new in getattr(change, kind).items():
            if match := re.fullmatch(old, name):
                if new is None:
                    return None
                name = match.expand(new)
                break
    return name


def renamed_keys(values: dict[str, Any], kind: str, changes: Sequence[Change]) -> dict[str, Any]:
    """Return values by what their names are called after some changes, without those that are gone."""
    named = {renamed(name, kind, changes): value for name, value in values.items()}
    return {name: value for name, value in named.items() if name is not None}


def flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted names; lists and empty mappings are leaves."""
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{before}{key}.") if isinstance(value, dict) and value else {f"{before}{key}": value}
    return leaves


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Return the mappings that `flat` took apart."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *path, last = name.split(".")
        inner = tree
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return tree


def rename_table(path: Path) -> bool:
    """Give a table's columns today's names and its scores a metric; return whether anything changed. No value does."""
    with open(path, newline="") as file:
        before, *rows = csv.reader(file)
    head = [renamed(name, "columns", CHANGES) for name in before]
    place = head.index("score") if "score" in head and "metric" not in head else None
    after = [head, *rows]
    if place is not None:
        added = ["metric", *[METRIC] * len(rows)]
        after = [[*row[:place], value, *row[place:]] for row, value in zip(after, added, strict=True)]
    if after == [before, *rows]:
        return False
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(after)
    with open(path, newline="") as file:
        _, *written = csv.reader(file)
    if place is not None:
        written = [[*row[:place], *row[place + 1 :]] for row in written]
    assert written == rows, f"{path}: a value has changed"
    return True


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).glob("*.csv")):
        if rename_table(path):
            print(f"renamed columns of {path}")
