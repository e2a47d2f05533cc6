"""Members of the seams: tasks, kinds of phases and of strategies. Each is a file in its package and is found by its name.

Nobody keeps a list. A package on the path may have a folder of the same name, `incubate_lib/tasks/` say, whose files are
members, too.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import Any

from incubate_lib.config.errors import SettingsError, nearest


class Members:
    """The files of a package, each by what it holds under one name."""

    def __init__(self, package: str, held: str, what: str) -> None:
        self.package, self.held, self.what = package, held, what

    def __iter__(self) -> Iterator[str]:
        """Yield the names, in order; nothing is imported but the package."""
        return iter(_names(tuple(importlib.import_module(self.package).__path__)))

    def __getitem__(self, name: str) -> Any:
        """Return a member; SettingsError with the nearest names if there is none."""
        return _load(self, name)


@cache
def _names(folders: tuple[str, ...]) -> list[str]:
    return sorted(member.name for member in pkgutil.iter_modules(folders))


@cache
def _load(members: Members, name: str) -> Any:
    if name not in members:
        raise SettingsError(f"unknown {members.what} {name!r}; {nearest(name, members)}")
    return getattr(importlib.import_module(f"{members.package}.{name}"), members.held)


TASKS = Members("incubate_lib.tasks", "TASK", "task")
PHASES = Members("incubate_lib.phases.kinds", "PHASE", "kind of phase")
STRATEGIES = Members("incubate_lib.strategies", "KIND", "kind of strategy")
