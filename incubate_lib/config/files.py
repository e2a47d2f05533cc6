"""Settings files: presets and users' own, read, overridden by `--set a.b=c`, checked; and where data lies."""

import contextlib
import copy
import itertools
import os
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from incubate_lib.config.errors import SettingsError, nearest, refuse, shortened, validated
from incubate_lib.config.models import Settings
from incubate_lib.config.strategies import KNOWN, uncut

# bytes; Linux opens paths of 4,095, and runs' names, strategies' and files' stand below the data folder
LONGEST_FOLDER = 3000
PARTS = ("runs", "studies", "phases")  # of the data folder, which a command makes or reads
LONGEST_TEXT, MOST_VALUES, DEEPEST = 100_000, 10_000, 30  # characters, values and levels of a settings file
MOST_DIGITS = 1_000


def presets() -> dict[str, Path]:
    """Return the presets in the package: name → file."""
    return in_the_package("presets")


def in_the_package(folder: str) -> dict[str, Path]:
    """Return the settings files in a folder of the package: name → file."""
    place = Path(str(resources.files("incubate_lib") / folder))
    return {path.stem: path for path in sorted(place.glob("*.yaml"))}


def find_file(what: str, name: str, known: dict[str, Path]) -> Path:
    """Return the file that is known by a name, or the YAML file at a path; SettingsError if it is neither."""
    path = known.get(name) or Path(name)
    folder = f"{name} is a folder; give a {what} ({', '.join(known)}) or a .yaml file"
    unknown = f"unknown {what} {shortened(repr(name))}; {nearest(name, known)} (or give a .yaml file)"
    is_file = path.suffix in (".yaml", ".yml") or os.path.isfile(path)
    refuse(os.path.isdir(path), folder)
    refuse(os.path.exists(path) and not os.path.isfile(path), f"{name} is a pipe, socket or device; give a .yaml file")
    refuse(not is_file, unknown)
    return path


def load_settings(preset: str = "digits", overrides: list[str] | tuple[str, ...] = ()) -> Settings:
    """Read a preset by name or a YAML file by path, and apply `a.b=value` overrides; SettingsError if anything is off."""
    path = find_file("preset", preset, presets())
    raw = read_yaml(path)
    raw.setdefault("name", path.stem)
    raw.setdefault("strategies", {})
    given = raw["strategies"]
    if isinstance(given, dict) and all(own is None or isinstance(own, dict) for own in given.values()):
        cut = {"partition": copy.deepcopy(raw.get("partition"))}
        for override in overrides:
            if override.startswith("partition"):
                _override(cut, override)
        known = uncut() if cut["partition"] is None else KNOWN
        raw["strategies"] = {name: copy.deepcopy(known.get(name, {})) | (given.get(name) or {}) for name in known | given}
    for override in overrides:
        _override(raw, override)
    machine = raw.get("machine")
    if path not in presets().values() and not (isinstance(machine, dict) and machine.get("data_folder")):
        _look_beside(path, raw.get("data"))
    raw["overrides"] = list(overrides)
    where = [path.name, *(f"--set {shortened(override)}" for override in overrides)]
    settings = validated(Settings, raw, " ".join(where))
    for name in settings.run:
        settings.strategy(name)
    for override in overrides:
        _refuse_unused(settings, override.partition("=")[0].strip())
    return settings


def _look_beside(file: Path, data: Any) -> None:
    """Give the whole path of a folder of images that lies beside the user's settings file, and not where they usually lie."""
    folder = data.get("folder") if isinstance(data, dict) else None
    if isinstance(folder, str) and folder:
        with contextlib.suppress(OSError, ValueError):  # of a name that none can have, which is reported where it is opened
            if not (data_folder() / "datasets" / folder).exists() and (beside := file.absolute().parent / folder).is_dir():
                data["folder"] = str(beside)


def _refuse_unused(settings: Settings, where: str) -> None:
    """Refuse to set a training field that every phase overrides: it would silently do nothing."""
    section, _, field = where.partition(".")
    if section != "training" or not field:
        return

    def overridden(name: str, phase: str) -> bool:
        way = settings.strategies[name]
        computed = field == "epochs" and phase in way.matched and settings.is_matched(name)
        given = [of.phases[phase] for of in (settings, way) if phase in of.phases]
        return computed or any(field in changes.model_fields_set for changes in given)

    every = all(overridden(name, phase) for name, way in settings.strategies.items() for phase in way.trains)
    refuse(every, f"{where} has no effect: every phase sets its own {field}; use phases.<phase>.{field}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; SettingsError if it cannot be read or is something else."""
    try:
        raw = _parsed(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise SettingsError(f"cannot read settings file {path}: {why}") from None
    except (YAMLError, ValueError) as error:
        raise SettingsError(f"{path} is not plain YAML: {_what_is_wrong(error)}") from None
    refuse(not isinstance(raw, dict), f"{path} must be a mapping of settings, not a {type(raw).__name__}")
    return raw


def _parsed(text: str) -> Any:
    """Return what YAML 1.2 says, without python objects or doubled keys; YAMLError or ValueError if it is wrong or too much."""
    return copy.deepcopy(_parsed_once(text))


@cache
def _parsed_once(text: str) -> Any:
    """A study reads one preset for each of its cells."""
    refuse(len(text) > LONGEST_TEXT, f"it has more than {LONGEST_TEXT} characters")
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = DEEPEST
    yaml.composer.warn_double_anchors = False  # they are allowed
    try:
        node = yaml.compose(text)
        _count(node, itertools.count(1))
        return None if node is None else yaml.constructor.construct_document(node)
    except LookupError:  # `!!bool x`, `!!int ""`
        raise ValueError("a value is not what its tag says") from None
    except RecursionError:
        raise ValueError("an alias refers to what contains it") from None


def _count(node: Node | None, counter: Iterator[int]) -> None:
    """Count values where they are used, as an alias can stand for very many; ValueError if they are too many."""
    refuse(next(counter) > MOST_VALUES, f"it has more than {MOST_VALUES} values")
    is_long = node is not None and node.tag.endswith((":int", ":float")) and len(node.value) > MOST_DIGITS
    refuse(is_long, f"a number has more than {MOST_DIGITS} digits")  # which Python would not write into a message
    values = node.value if isinstance(node, SequenceNode) else ()
    if isinstance(node, MappingNode):
        values = itertools.chain.from_iterable(node.value)
    for inner in values:
        _count(inner, counter)


def _what_is_wrong(error: YAMLError | ValueError) -> str:
    """Return the line and what is wrong there, in one line."""
    problem = getattr(error, "problem", None) or str(error)
    problem = re.sub(r'found duplicate key "(.*?)" with .*', r"'\1' is there twice", problem, flags=re.DOTALL)
    problem = problem.partition(", if necessary")[0]  # advice for programmers
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return where + shortened(" ".join(problem.split()))


def _override(raw: dict[str, Any], override: str) -> None:
    where, equals, text = override.partition("=")
    keys = where.strip().split(".")
    form = "write it as field=value, for example training.epochs=20"
    refuse(not equals or not all(keys), f"--set {override!r}: {form}")
    value = yaml_value(override, text)
    for key in keys[:-1]:
        if raw.get(key) is None:
            raw[key] = {}
        raw = raw[key]
        refuse(not isinstance(raw, dict), f"--set {override!r}: {key} has no fields")
    raw[keys[-1]] = value


def yaml_value(override: str, text: str) -> Any:
    """Return the value of an override; SettingsError unless it is plain YAML."""
    try:
        return _parsed(text)
    except (YAMLError, ValueError):
        raise SettingsError(f"--set {override!r}: {text!r} is not a plain value") from None


def checkout() -> Path | None:
    """Return the project's folder; None where the package was installed without it (`pip install .`, not -e)."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").is_file() else None


def notebooks_folder() -> Path:
    """Return the folder of the numbered notebooks: the project's, or those that a plain install brought along."""
    return (checkout() or Path(__file__).resolve().parents[1]) / "notebooks"


def data_folder() -> Path:
    """Return the folder of datasets, runs and results: $INCUBATE_DATA, or `data/` of the project.

    Of a plain install ~/incubate-data: nothing is written where packages lie.
    Raises SettingsError where no path below it could be opened: it or a part of it is too long already, or no folder.
    """
    project = checkout()
    own = project / "data" if project else Path.home() / "incubate-data"
    folder = Path(os.environ.get("INCUBATE_DATA") or own).absolute()
    most = f"{LONGEST_FOLDER} bytes are possible, and 255 for each folder's name"
    too_long = len(os.fsencode(folder)) > LONGEST_FOLDER or any(len(os.fsencode(part)) > 255 for part in folder.parts)
    refuse(too_long, f"INCUBATE_DATA {str(folder)[:60]}… is too long: {most}")
    for place in (folder, *(folder / part for part in PARTS)):
        above = next(part for part in (place, *place.parents) if os.path.lexists(part))
        what = "a link to nothing, or to itself" if above.is_symlink() else "no folder"
        hint = "move it away, or set INCUBATE_DATA to a folder of yours"
        refuse(not above.is_dir(), f"data folder {folder}: {above} is {what}; {hint}")
    return folder
