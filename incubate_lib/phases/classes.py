"""The names of classes: those of the images, those that stand beside weights, and whether the two have one order."""

from collections import Counter
from pathlib import Path

from incubate_lib.config import DEFAULT_MACHINE, DataSettings, MachineSettings, SettingsError
from incubate_lib.training.runs import read_json


def class_names(settings: DataSettings, count: int, machine: MachineSettings = DEFAULT_MACHINE) -> list[str]:
    """Return the names of the `count` classes of some images, in the order of their labels; the number where there is none."""
    from incubate_lib.training.sources import open_source

    names = open_source(settings, machine)[0].classes
    return [*map(str, names), *(str(i) for i in range(len(names), count))]


def label_names(weights: str | Path) -> list[str]:
    """Return the names that timm's config.json beside a file of weights has for its classes; nothing if it has none."""
    from incubate_lib.phases.weights import weights_file

    config = read_json(weights_file(weights).with_name("config.json"))
    names = config.get("label_names") if isinstance(config, dict) else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def check_order(names: list[str], known: list[str], what: str) -> None:
    """Raise SettingsError where a class that images (`names`) and weights (`known`) both name has two different numbers.

    Names that only one side has say nothing: the same class may be called by a word here and by a number there. Nor do names
    of two classes, as ImageNet's crane, which is a bird and a machine.
    """
    number, again = {name: i for i, name in enumerate(names)}, Counter(names) | Counter(known)
    wrong = [(name, i, number[name]) for i, name in enumerate(known) if again[name] == 1 and number.get(name, i) != i]
    if wrong:
        name, there, here = wrong[0]
        raise SettingsError(
            f"{what}: by the config.json beside them class {name!r} is number {there}, in these images it is {here}; the classes "
            f"must have the same order ({len(wrong)} of {len(known)} differ)"
        )
