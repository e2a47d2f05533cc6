"""Settings files: presets and users' own, read, overridden by `--set a.b=c`, checked; and where data lies."""

import copy
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from incubate_lib.config.models import STRATEGIES, UNCUT, Settings, error_message
from incubate_lib.config.sections import SettingsError, nearest, shortened

LONGEST_FOLDER = 3000  # bytes; Linux opens paths of 4,095, and runs' names, strategies' and files' stand below the data folder


def presets() -> dict[str, Path]:
    """Return the presets in the package: name → file."""
    folder = Path(str(resources.files("incubate_lib") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_settings(preset: str = "digits", overrides: list[str] | tuple[str, ...] = ()) -> Settings:
    """Read a preset by name or a YAML file by path, and apply `a.b=value` overrides; SettingsError if anything is off."""
    path = presets().get(preset)
    if path is None:
        path = Path(preset)
        if os.path.isdir(path):
            raise SettingsError(f"{preset} is a folder; give a preset ({', '.join(presets())}) or a .yaml file")
        if path.suffix not in (".yaml", ".yml") and not os.path.isfile(path):
            raise SettingsError(f"unknown preset {preset!r}; {nearest(preset, presets())}, or give a .yaml file")
    raw = read_yaml(path)
    raw.setdefault("name", path.stem)
    raw.setdefault("strategies", {})
    if isinstance(raw["strategies"], dict) and all(v is None or isinstance(v, dict) for v in raw["strategies"].values()):
        cut = {"partition": copy.deepcopy(raw.get("partition"))}
        for override in overrides:
            if override.startswith("partition"):
                _override(cut, override)
        known = UNCUT if cut["partition"] is None else STRATEGIES
        raw["strategies"] = {
            name: copy.deepcopy(known.get(name, {})) | (raw["strategies"].get(name) or {})
            for name in [*known, *(n for n in raw["strategies"] if n not in known)]
        }
    for override in overrides:
        _override(raw, override)
    raw["overrides"] = list(overrides)
    settings = _validate(raw, " ".join([path.name, *(f"--set {shortened(override)}" for override in overrides)]))
    for name in settings.run:
        settings.strategy(name)
    for override in overrides:
        _refuse_unused(settings, override.partition("=")[0].strip())
    return settings


def _refuse_unused(settings: Settings, where: str) -> None:
    """Refuse to set a training field that every phase overrides: it would silently do nothing."""
    section, _, field = where.partition(".")
    if section != "training" or not field:
        return

    def overridden(name: str, phase: str) -> bool:
        layers = (settings.phases, settings.strategies[name].phases)
        last = phase == settings.strategies[name].trains[-1] or phase == "end_to_end"
        computed = field == "epochs" and last and settings.is_matched(name)
        return computed or any(field in getattr(layer, phase).model_fields_set for layer in layers)

    if all(overridden(name, phase) for name, s in settings.strategies.items() for phase in s.trains):
        raise SettingsError(f"{where} has no effect: every phase sets its own {field}; use phases.<phase>.{field}")


class _Loader(yaml.SafeLoader):
    """YAML without python objects or doubled keys, with 1e-3 read as a number (YAML 1.1 wants a dot) and `off` as a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if doubled := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{doubled[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "yYnNtTfFoO":
    _Loader.yaml_implicit_resolvers[_first] = [r for r in _Loader.yaml_implicit_resolvers[_first] if not r[0].endswith(":bool")]
for _first in "-+0123456789":  # without base 60: 1:30:00 is a time, not 5400
    _Loader.yaml_implicit_resolvers[_first] = [r for r in _Loader.yaml_implicit_resolvers[_first] if not r[0].endswith(":int")]
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.I), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; SettingsError if it cannot be read or is something else."""
    try:
        raw = yaml.load(path.read_text(), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read settings file {path}: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise SettingsError(f"{path} must be a mapping of settings, not a {type(raw).__name__}")
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    where, equals, text = override.partition("=")
    keys = where.strip().split(".")
    if not equals or not all(keys):
        raise SettingsError(f"--set {override!r}: write it as field=value, for example training.epochs=20")
    value = yaml_value(override, text)
    for key in keys[:-1]:
        if raw.get(key) is None:
            raw[key] = {}
        raw = raw[key]
        if not isinstance(raw, dict):
            raise SettingsError(f"--set {override!r}: {key} has no fields")
    raw[keys[-1]] = value


def yaml_value(override: str, text: str) -> Any:
    """Return the value of an override; SettingsError unless it is plain YAML."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        raise SettingsError(f"--set {override!r}: {text!r} is not a plain value") from None


def _validate(raw: dict[str, Any], where: str) -> Settings:
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(f"{where}: {error_message(error)}") from None


def data_folder() -> Path:
    """Return the folder of datasets, runs and results: $INCUBATE_DATA, or `data/` of the project.

    Raises SettingsError where no path below it could be opened, because it or a part of it is too long already.
    """
    folder = Path(os.environ.get("INCUBATE_DATA") or Path(__file__).resolve().parents[2] / "data").absolute()
    if len(os.fsencode(folder)) > LONGEST_FOLDER or any(len(os.fsencode(part)) > 255 for part in folder.parts):
        raise SettingsError(
            f"INCUBATE_DATA {str(folder)[:60]}… is too long: {LONGEST_FOLDER} bytes are possible, and 255 for each folder's name"
        )
    return folder
