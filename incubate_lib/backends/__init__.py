"""Where phases run, behind one interface. Everybody asks here, and nobody else needs to know which backends there are."""

import argparse
import importlib
import pkgutil
from typing import Any

from incubate_lib.backends.interface import Attempt as Attempt
from incubate_lib.backends.interface import Backend as Backend
from incubate_lib.backends.interface import Run as Run
from incubate_lib.backends.interface import Submitted as Submitted

DEFAULT = "local"
_members: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add a backend that has no folder here."""
    _all()[backend.name] = backend


def unregister(name: str) -> None:
    """Take away a backend that was registered."""
    del _all()[name]


def names() -> list[str]:
    return list(_all())


def get(name: str = DEFAULT) -> Backend:
    return _all()[name]


def _all() -> dict[str, Backend]:
    if DEFAULT not in _members:
        for member in pkgutil.iter_modules(__path__):
            if member.ispkg:
                _members[member.name] = importlib.import_module(f"{__name__}.{member.name}").BACKEND
    return _members


def of(experiment: Any) -> Backend:
    """Return the backend that a run was handed to; where none knows it, the default."""
    return next((backend for backend in _all().values() if backend.knows(experiment)), get())


def attempt() -> Attempt:
    """Return what this process is: an attempt of a job, or a process of this machine."""
    return next(filter(None, (backend.attempt() for backend in _all().values())), Attempt())


def settings(options: argparse.Namespace) -> Any:
    """Return the chosen backend's settings; SettingsError if anything is off, also for an option of another backend."""
    from incubate_lib.config import SettingsError

    found = get(options.backend).settings(options)
    own = get(options.backend).options
    for other in _all().values():
        for name in other.options:
            if name not in own and getattr(options, name, None):
                raise SettingsError(f"--{name.replace('_', '-')} is for --backend {other.name}")
    return found


def check_preview(backend: Backend) -> None:
    """Raise SettingsError for a backend that has nothing to show before it begins."""
    from incubate_lib.config import SettingsError

    if not backend.has_preview:
        able = " or ".join(f"--backend {other.name}" for other in _all().values() if other.has_preview)
        raise SettingsError(f"--dry-run is for {able}")


def with_nodes() -> str:
    """Return the option, or options, that give a phase several nodes."""
    return " or ".join(f"--backend {backend.name}" for backend in _all().values() if backend.has_nodes)


def check_nodes(machines: list[Any]) -> None:
    """Raise SettingsError for what this machine alone cannot be, and --nodes sets where it can."""
    from incubate_lib.config import SettingsError

    if any(machine.nodes > 1 for machine in machines):
        raise SettingsError(f"machine.nodes: several nodes need {with_nodes()}, and its --nodes")


def check_free(experiment: Any, hint: str, but: Backend | None = None) -> None:
    """Raise SettingsError while jobs of a run wait or run, other than those of one backend."""
    from incubate_lib.config import SettingsError

    for backend in _all().values():
        if backend is not but and (active := backend.still_active(experiment)):
            raise SettingsError(f"{active} job(s) of {experiment.path.name} are in {backend.title}'s queue; {hint}")
