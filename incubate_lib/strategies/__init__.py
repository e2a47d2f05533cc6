"""Kinds of strategies: each a file with a `KIND`, its settings and how its phases follow from one another."""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from incubate_lib.config.strategies import StrategySettings

__path__ = pkgutil.extend_path(__path__, __name__)


@dataclass(frozen=True)
class Kind:
    """One way to make a graph of phases."""

    settings: type[StrategySettings]
    # given what builds one strategy of one seed (pipeline.strategies.Builder), adds its phases and returns the last
    build: Callable[[Any], Any]
    # name for people and look in figures of a strategy that is called as its kind; of others settings and looks.yaml have them
    label: str = ""
    look: Mapping[str, str] = field(default_factory=dict)
