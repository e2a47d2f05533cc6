"""What is learned, behind one interface. Members are files beside this one, each with an object `TASK`, found by name."""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

DEFAULT = "classification"
_registered: dict[str, "Task"] = {}


@dataclass(frozen=True)
class Metric:
    """A number that evaluation yields, and how people write it."""

    name: str  # in records
    label: str  # in tables and figures
    unit: str = ""
    scale: float = 1.0  # people read the number times this
    digits: int = 3
    higher_is_better: bool = True

    def written(self, value: float) -> str:
        """Return a value as people write it, e.g. 0.934 as 93.4 %."""
        return f"{self.scale * value:.{self.digits}f}" + (f" {self.unit}" if self.unit else "")


class Task:
    """What a batch is, how it is made ready, the loss of an output, and how evaluation adds up.

    The loop sees batches that it cannot open, a loss, and sums. A batch is what the data yields: here a tuple whose first
    member goes into the network. Methods draw from the global generators only, which the trainer seeds for every micro-batch.
    """

    name = ""
    metrics: tuple[Metric, ...] = ()  # the first is the score: what rates, strategies and modules are compared by

    @property
    def score(self) -> Metric:
        return self.metrics[0]

    def outputs(self, data: Any) -> int:
        """Return how many outputs the network's head needs for this data."""
        raise NotImplementedError

    def start(self, data: Any, settings: Any) -> Any:
        """Return what `ready` needs besides a batch, made once a phase."""

    def ready(self, batch: Any, data: Any, settings: Any, extra: Any) -> Any:
        """Return a training batch on the device, augmented; `extra` is what `start` returned."""
        raise NotImplementedError

    def inputs(self, batch: Any) -> Tensor:
        """Return what goes into the network: [B, …]."""
        return batch[0]

    def loss(self, output: Tensor, batch: Any, settings: Any) -> Tensor:
        """Return the mean loss of a training batch, in float32."""
        raise NotImplementedError

    def sums(self, output: Tensor, batch: Any) -> Tensor:
        """Return sums over the samples of an evaluated batch, float64 [S]: first their number, then their losses, then what
        `divided` needs. Over batches and devices they are added up."""
        raise NotImplementedError

    def divided(self, sums: list[float]) -> Mapping[str, float]:
        """Return mean loss, named loss, and all metrics, of all sums [S]."""
        raise NotImplementedError


def register(task: Task) -> None:
    """Add a task that has no file here."""
    _registered[task.name] = task


def names() -> list[str]:
    return sorted({*_registered, *(member.name for member in pkgutil.iter_modules(__path__))})


def get(name: str = DEFAULT) -> Task:
    """Return a task by its name; KeyError if there is none."""
    if name not in _registered:
        if name not in names():
            raise KeyError(name)
        register(importlib.import_module(f"{__name__}.{name}").TASK)
    return _registered[name]
