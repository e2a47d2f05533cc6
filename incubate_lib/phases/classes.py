"""The names of classes in the file beside weights, and whether they have the order of those of the images."""

from collections import Counter
from pathlib import Path

from incubate_lib.config import SettingsError
from incubate_lib.training.files import read_json


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
    again = Counter(names) | Counter(known)
    here, there = ({name: i for i, name in enumerate(some)} for some in (names, known))
    wrong = [name for name, i in there.items() if again[name] == 1 and here.get(name, i) != i]
    if wrong:
        raise SettingsError(
            f"{what}: by the config.json beside them class {wrong[0]!r} is number {there[wrong[0]]}, in these "
            f"images it is {here[wrong[0]]}; the classes must have the same order ({len(wrong)} of {len(known)} differ)"
        )
