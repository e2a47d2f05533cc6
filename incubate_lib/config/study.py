"""A study: one settings file for a grid of settings × strategies × seeds, with learning rates chosen on validation images."""

import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from incubate_lib.config.errors import SettingsError, nearest, refuse, validated
from incubate_lib.config.files import find_file, in_the_package, load_settings, presets, read_yaml, yaml_value
from incubate_lib.config.models import Settings
from incubate_lib.config.packaged import packaged
from incubate_lib.config.sections import Frozen, Label, Name, Seed, Word

BASELINE = "end_to_end"
MOST_CELLS = 1_000
COLUMNS, DERIVED = (packaged("columns.yaml")[of] for of in ("study", "derived"))
RATE = "lr_"  # begins the name of a column for the rate of a kind of phase
Value = TypeVar("Value")


def is_column(name: str) -> bool:
    """Whether a column of studies' tables, which is no axis, is called so."""
    return name in (*COLUMNS, *DERIVED) or name.startswith(RATE)


def _once(values: list[Any]) -> list[Any]:
    refuse(len(set(values)) < len(values), "one is given twice")
    return values


Once = Annotated[list[Value], Field(min_length=1), AfterValidator(_once)]


class Rates(Frozen):
    """How learning rates are chosen: every phase of every strategy from one grid, phase after phase, each by its own score.

    Phases of Deep Incubation together cost what end-to-end training costs, so each strategy's choice costs as much as another's.
    """

    values: Once[Annotated[float, Field(gt=0, le=3e38)]]
    seeds: Once[Seed]  # evaluated on images cut from the training images
    # axis → its value at which rates are chosen for all others; axes left out: chosen at each value
    at: dict[Word, Word] = {}


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
    strategies: Once[str]
    seeds: Once[Seed]
    rates: Rates | None = None  # none: the preset's

    @field_validator("axes", mode="before")
    @classmethod
    def _no_two_alike(cls, axes: Any) -> Any:
        for axis, values in axes.items() if isinstance(axes, dict) else ():
            names = [str(value) for value in values] if isinstance(values, dict) else []
            double = next((name for name in names if names.count(name) > 1), None)
            refuse(double is not None, f"axis {axis} has the value {double} twice, as a number and as a word")
        return axes

    @model_validator(mode="after")
    def _check_together(self) -> "Study":
        taken = f"name {self.name!r}: a name that ends in _rates is that of another study's table of rates"
        refuse(self.name.endswith("_rates"), taken)
        for axis, values in self.axes.items():
            column = f"axes.{axis}: that is a column of the tables already; give the axis another name"
            refuse(not values, f"axes.{axis} has no values")
            refuse(is_column(axis), column)
        for axis, value in (self.rates.at if self.rates else {}).items():
            others = nearest(axis, self.axes) if self.axes else "there are no axes"
            refuse(axis not in self.axes, f"rates.at names {axis!r}; {others}")
            others = nearest(value, self.axes[axis])
            refuse(value not in self.axes[axis], f"rates.at.{axis} is {value!r}; {others}")
        cells = math.prod(map(len, self.axes.values()))
        refuse(cells > MOST_CELLS, f"axes have {cells:,} combinations; {MOST_CELLS:,} are the most")
        by_axis = [set().union(*values.values()) for values in self.axes.values()]
        for field in ("name", "overrides"):
            refuse(field in self.set or any(field in axis for axis in by_axis), f"{field} is what the study itself sets")
        for (axis, fields), (other, theirs) in itertools.combinations(zip(self.axes, by_axis, strict=True), 2):
            for mine, its in itertools.product(sorted(fields), sorted(theirs)):
                is_part = f"{mine}.".startswith(f"{its}.") or f"{its}.".startswith(f"{mine}.")
                refuse(is_part, f"axes {axis} and {other} both set {max(mine, its, key=len)}; each field has one axis")
        both = sorted(set(self.rates.seeds if self.rates else ()) & set(self.seeds))
        refuse(both, f"seeds {both} are in rates.seeds, too: what a rate was chosen with must not evaluate it")
        return self

    def cells(self) -> list[Cell]:
        """Return all combinations of the axes' values."""
        cells = []
        for values in itertools.product(*self.axes.values()):
            place = dict(zip(self.axes, values, strict=True))
            fields = {"name": self.name} | self.set
            for axis, value in place.items():
                fields |= self.axes[axis][value]
            overrides = [f"{field}={_plain(field, value)}" for field, value in fields.items()]
            cells.append(Cell(place=place, overrides=overrides))
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


def studies() -> dict[str, Path]:
    """Return the studies in the package: name → file."""
    return in_the_package("presets/studies")


def load_study(study: str, machine: list[str] | tuple[str, ...] = ()) -> Study:
    """Read a study by name or a YAML file by path, with every cell checked; SettingsError if anything is off.

    `machine` are overrides of the section `machine`, which no result depends on.
    """
    path = find_file("study", study, studies())
    raw = read_yaml(path)
    raw.setdefault("name", path.stem)
    if isinstance(raw.get("preset"), str) and raw["preset"] not in presets():  # relative to the study's file
        raw["preset"] = str(path.parent / raw["preset"])
    found = validated(Study, raw, path.name)
    for override in machine:
        field, _, value = override.partition("=")
        what = "results depend on the study's file alone; here only machine.* can be set"
        refuse(not field.strip().startswith("machine."), f"--set {override!r}: {what}")
        found = found.model_copy(update={"set": found.set | {field.strip(): yaml_value(override, value)}})
    for cell in found.cells():
        settings = found.settings(cell)
        for name in found.strategies:
            settings.strategy(name)
        split = "data.eval_split is what a study sets itself: val to choose rates, test to evaluate"
        refuse(settings.data.eval_split != "test", f"{path.name}: {split}")
    for name in found.strategies if found.rates and found.rates.at else []:
        ways = {tuple(found.settings(cell).strategies[name].trains) for cell in found.cells()}
        them = " or ".join(", ".join(way) for way in sorted(ways))
        many = f"strategy {name} trains other phases in other cells ({them}), so rates chosen in one do not do for all"
        refuse(len(ways) > 1, f"{path.name}: {many}; leave out rates.at")
    return found
