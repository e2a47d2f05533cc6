"""A study: one settings file for a grid of settings × strategies × seeds, with learning rates chosen on validation images."""

import itertools
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from incubate_lib.config.files import load_settings, presets, read_yaml, yaml_value
from incubate_lib.config.models import Settings, error_message
from incubate_lib.config.sections import Frozen, Label, Name, Seed, SettingsError, nearest

BASELINE = "end_to_end"


class Rates(Frozen):
    """How learning rates are chosen: every phase of every strategy from one grid, phase after phase, each by its own accuracy.

    Phases of Deep Incubation together cost what end-to-end training costs, so each strategy's choice costs as much as another's.
    """

    values: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    seeds: list[Seed] = Field(min_length=1)  # judged on images cut from the training images
    at: dict[str, str] = {}  # axis → its value at which rates are chosen for all others; axes left out: chosen at each value

    @model_validator(mode="after")
    def _once(self) -> "Rates":
        for field in ("values", "seeds"):
            given = getattr(self, field)
            if len(set(given)) < len(given):
                raise ValueError(f"rates.{field} {given}: one is given twice")
        return self


class Cell(Frozen):
    """One point of the grid."""

    place: dict[str, str]  # axis → value
    overrides: list[str]

    @property
    def label(self) -> str:
        return ", ".join(f"{axis} {value}" for axis, value in self.place.items()) or "the preset's settings"


class Study(Frozen):
    """The fields of a study's file."""

    name: Name
    description: str = ""
    question: str = ""  # that it answers, for the notebook
    preset: str
    set: dict[str, Any] = {}  # field → value, in every cell
    axes: dict[Label, dict[Label, dict[str, Any]]] = {}  # axis → value, for people → field → value
    strategies: list[str] = Field(min_length=1)
    seeds: list[Seed] = Field(min_length=1)
    rates: Rates | None = None  # none: the preset's

    @model_validator(mode="after")
    def _check_together(self) -> "Study":
        if self.name.endswith("_rates"):
            raise ValueError(f"name {self.name!r}: a name that ends in _rates is that of another study's table of rates")
        for field in ("strategies", "seeds"):
            given = getattr(self, field)
            if len(set(given)) < len(given):
                raise ValueError(f"{field} {given}: one is given twice")
        for axis, values in self.axes.items():
            if not values:
                raise ValueError(f"axes.{axis} has no values")
            if axis in (*COLUMNS, *DERIVED):
                raise ValueError(f"axes.{axis}: that is a column of the tables already; name the axis otherwise")
        for axis, value in (self.rates.at if self.rates else {}).items():
            if axis not in self.axes:
                raise ValueError(f"rates.at names {axis!r}; {nearest(axis, self.axes) if self.axes else 'there are no axes'}")
            if value not in self.axes[axis]:
                raise ValueError(f"rates.at.{axis} is {value!r}; {nearest(value, self.axes[axis])}")
        if self.rates and (both := sorted({*self.rates.seeds} & {*self.seeds})):
            raise ValueError(f"seeds {both} are in rates.seeds, too: what a rate was chosen with must not judge it")
        return self

    def cells(self) -> list[Cell]:
        """Return all combinations of the axes' values."""
        cells = []
        for values in itertools.product(*self.axes.values()):
            place = dict(zip(self.axes, values, strict=True))
            fields = dict(self.set)
            for axis, value in place.items():
                fields |= self.axes[axis][value]
            fields = {"name": self.name} | fields
            cells.append(Cell(place=place, overrides=[f"{field}={_plain(field, value)}" for field, value in fields.items()]))
        return cells

    def settings(self, cell: Cell, more: list[str] | tuple[str, ...] = ()) -> Settings:
        """Return the settings of a cell; SettingsError that names the cell."""
        try:
            return load_settings(self.preset, [*cell.overrides, *more])
        except SettingsError as error:
            raise SettingsError(f"study {self.name}, {cell.label}: {error}") from None


def _plain(field: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        raise SettingsError(f"{field} is {value!r}; a study's values are numbers, words, lists and mappings") from None


DERIVED = (  # columns of tables made from it
    "phase", "lr", "chosen", "best", "seeds", "better", "gain", "low", "high", "half_alone", "p_holm", "clear", "comparisons",
)  # fmt: skip
COLUMNS = (  # of a study's table, besides its axes
    "strategy", "seed", "accuracy", "meta_accuracy", "assembled_accuracy", "flops", "critical_flops", "seconds",
    "critical_seconds", "lr_meta", "lr_incubate", "lr_finetune", "lr_end_to_end", "train_images", "judged_on", "device",
    "threads", "torch", "date", "commit",
)  # fmt: skip


def studies() -> dict[str, Path]:
    """Return the studies in the package: name → file."""
    folder = Path(str(resources.files("incubate_lib") / "presets" / "studies"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_study(study: str, machine: list[str] | tuple[str, ...] = ()) -> Study:
    """Read a study by name or a YAML file by path, with every cell checked; SettingsError if anything is off.

    `machine` are overrides of the section `machine`, which no result depends on.
    """
    path = studies().get(study)
    if path is None:
        path = Path(study)
        if path.suffix not in (".yaml", ".yml"):
            raise SettingsError(f"unknown study {study!r}; {nearest(study, studies())}, or give a .yaml file")
    raw = read_yaml(path)
    raw.setdefault("name", path.stem)
    if isinstance(raw.get("axes"), dict):  # depth: {12: …} has a number as its key
        raw["axes"] = {axis: _named(values) for axis, values in raw["axes"].items()}
    if isinstance(raw.get("rates"), dict) and isinstance(raw["rates"].get("at"), dict):
        raw["rates"]["at"] = {axis: str(value) for axis, value in raw["rates"]["at"].items()}
    if isinstance(raw.get("preset"), str) and raw["preset"] not in presets():  # relative to the study's file
        raw["preset"] = str(path.parent / raw["preset"])
    try:
        found = Study.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(f"{path.name}: {error_message(error, Study)}") from None
    for override in machine:
        field, _, value = override.partition("=")
        if not field.strip().startswith("machine."):
            raise SettingsError(
                f"--set {override!r}: what results depend on stands in the study's file; here only machine.* is set"
            )
        found = found.model_copy(update={"set": found.set | {field.strip(): yaml_value(override, value)}})
    for cell in found.cells():
        settings = found.settings(cell)
        for name in found.strategies:
            settings.strategy(name)
        if settings.data.eval_split != "test":
            raise SettingsError(f"{path.name}: data.eval_split is what a study sets itself: val to choose rates, test to judge")
    for name in found.strategies if found.rates and found.rates.at else []:
        ways = {tuple(found.settings(cell).strategies[name].trains) for cell in found.cells()}
        if len(ways) > 1:
            them = " or ".join(", ".join(way) for way in sorted(ways))
            raise SettingsError(
                f"{path.name}: strategy {name} trains other phases in other cells ({them}), so rates chosen in one do not do for "
                "all; leave out rates.at"
            )
    return found


def _named(values: Any) -> Any:
    return {str(name): fields for name, fields in values.items()} if isinstance(values, dict) else values
