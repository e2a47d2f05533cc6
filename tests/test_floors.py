"""The lowest versions that pyproject.toml allows: every package that is asked for has one, and `make test-lowest` tests them."""

import importlib
import os
import pkgutil
import re
import tomllib
from importlib.metadata import version

import pytest
from project import ROOT

import incubate_lib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINES = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
FLOORS = dict(re.match(r"([\w.-]+)(?:>=([\d.]+))?", line).groups() for line in LINES)


@pytest.mark.parametrize("name", FLOORS)
def test_every_package_has_a_lowest_version_and_it_is_the_one_that_is_tested(name):
    floor = FLOORS[name]
    assert floor, f"{name}: a line in pyproject.toml without >="
    if not os.environ.get("INCUBATE_LOWEST"):
        return
    if name in ("transformers", "tokenizers"):
        pytest.skip("transformers takes no huggingface_hub as old as the lowest that everything else takes")
    found = version(name).split("+")[0]
    assert (found + ".0.0").startswith(floor) and set(found.removeprefix(floor)) <= {".", "0"}, f"{name} {found}, not {floor}"


def test_what_the_extras_share_has_one_floor():
    lines = [line for extra in EXTRAS.values() for line in extra]
    names = [re.match(r"[\w.-]+", line)[0] for line in lines]
    assert all(lines[names.index(name)] == line for name, line in zip(names, lines, strict=True))


def test_every_module_can_be_imported():
    names = [module.name for module in pkgutil.walk_packages(incubate_lib.__path__, "incubate_lib.")]
    assert len(names) > 50
    for name in names:
        importlib.import_module(name)
