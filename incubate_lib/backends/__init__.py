"""Where phases run, behind one interface. Everybody asks here, and nobody else needs to know which backends there are."""

import argparse
import importlib
import pkgutil
from typing import Any

from incubate_lib.backends.interface import Attempt as Attempt
from incubate_lib.backends.interface import Backend as Backend

DEFAULT = "local"
_members: dict[str, Any] = {}  # packages here, and backends that were registered: both have `options` and `attempt`


def register(backend: Backend) -> None:
    """Add a backend that has no folder here."""
    _all()[backend.name] = backend


def unregister(name: str) -> None:
    """Take away a backend that was registered."""
    del _all()[name]


def names() -> list[str]:
    return list(_all())


def get(name: str = DEFAULT) -> Backend:
    member = _all()[name]
    if isinstance(member, Backend):
        return member
    return importlib.import_module(f"{member.__name__}.backend").BACKEND


def _all() -> dict[str, Any]:
    if DEFAULT not in _members:
        for member in pkgutil.iter_modules(__path__):
            if member.ispkg:
                _members[member.name] = importlib.import_module(f"{__name__}.{member.name}")
    return _members


def of(experiment: Any) -> Backend:
    """Return the backend that a run was handed to; where none knows it, the default."""
    return next((member for member in map(get, names()) if member.knows(experiment)), get())


def attempt() -> Attempt:
    """Return what this process is: an attempt of a job, or a process of this machine."""
    return next(filter(None, (member.attempt() for member in _all().values())), Attempt())


def add_options(command: argparse.ArgumentParser, what: str) -> None:
    """Add every backend's options to a command; `what` says which jobs they are for."""
    for name, member in _all().items():
        group = command.add_argument_group(f"with --backend {name}, for the {what}")
        for option, how in member.options.items():
            group.add_argument(f"--{option.replace('_', '-')}", **how)


def settings(options: argparse.Namespace) -> Any:
    """Return the chosen backend's settings; SettingsError if anything is off, also for an option of another backend."""
    from incubate_lib.config import SettingsError

    own = _all()[options.backend].options
    for name, member in _all().items():
        for option in member.options:
            if option not in own and getattr(options, option, None):
                raise SettingsError(f"--{option.replace('_', '-')} is for --backend {name}")
    return get(options.backend).settings(options)


def able(ability: str) -> str:
    """Return the option, or options, of backends that can do something: has_nodes, has_preview."""
    return " or ".join(f"--backend {name}" for name in names() if getattr(get(name), ability))


def check_nodes(machines: list[Any]) -> None:
    """Raise SettingsError for what this machine alone cannot be, and --nodes sets where it can."""
    from incubate_lib.config import SettingsError

    if any(machine.nodes > 1 for machine in machines):
        raise SettingsError(f"machine.nodes: several nodes need {able('has_nodes')}, and its --nodes")


def check_free(experiment: Any, hint: str, but: Backend | None = None) -> None:
    """Raise SettingsError while jobs of a run wait or run, other than those of one backend."""
    from incubate_lib.config import SettingsError

    for backend in map(get, names()):
        if backend is not but and (active := backend.still_active(experiment)):
            where = f"in {backend.title}'s queue"
            raise SettingsError(f"{active} job(s) of {experiment.path.name} are {where}; {hint}")
