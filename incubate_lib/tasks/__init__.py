"""What is learned, behind one interface. Members are files beside this one, each with an object `TASK`, found by name.

Files of tasks import torch where they compute only: the names of metrics are asked for in a moment.
"""

import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from incubate_lib.config import TASK
from incubate_lib.config.members import TASKS

__path__ = pkgutil.extend_path(__path__, __name__)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """A number that evaluation yields, and how people write it."""

    name: str  # in records
    label: str  # in tables and figures
    unit: str = ""
    scale: float = 1.0  # people read the number times this
    digits: int = 3
    higher_is_better: bool = True
    is_share: bool = False  # of samples, between 0 and 1: its error is a binomial's
    is_log: bool = False  # its curves are drawn on a logarithmic axis

    @property
    def heading(self) -> str:
        """What stands above a column, e.g. `top-1 %`."""
        return self.headed(self.label)

    def headed(self, words: str, between: str = " ") -> str:
        """Return these words with the unit behind them, e.g. `meta model %`."""
        return f"{words}{between}{self.unit}" if self.unit else words

    def axis(self, more: str = "") -> str:
        """Return what stands beside an axis, e.g. `top-1 (%)`; `more` comes before the unit."""
        return f"{self.label}{more} ({self.unit})" if self.unit else f"{self.label}{more}"

    @property
    def words(self) -> str:
        """The name in a sentence."""
        return self.name.replace("_", " ")

    @property
    def most(self) -> float | None:
        """The largest possible value, of a share; None of anything else."""
        return 1.0 if self.is_share else None

    def best(self, values: Any) -> float:
        """Return the best of some values, a pandas series."""
        return values.max() if self.higher_is_better else values.min()

    @property
    def points(self) -> str:
        """What differences are counted in."""
        return "points" if self.unit == "%" else self.unit or self.label

    def apart(self, amount: str, side: str) -> str:
        """Return a difference in words, e.g. `2.5 points better`; of what has no unit `mean error 0.30 better`."""
        return f"{self.label} {amount} {side}" if self.points == self.label else f"{amount} {self.points} {side}"

    @property
    def differences(self) -> str:
        """What stands beside a scale of differences, e.g. `points of top-1`."""
        return self.label if self.points == self.label else f"{self.points} of {self.label}"

    @property
    def worst(self) -> float:
        """What training counts that ended without a number."""
        if self.is_share:
            return 0.0 if self.higher_is_better else 1.0
        return float("-inf" if self.higher_is_better else "inf")

    @property
    def sign(self) -> int:
        """Times this, more is better."""
        return 1 if self.higher_is_better else -1

    def written(self, value: float, before_percent: str = "", more_digits: int = 0) -> str:
        """Return a value as people write it, e.g. 0.934 as 93.4%."""
        space = before_percent if self.unit == "%" else " "
        return f"{self.scale * value:.{self.digits + more_digits}f}{space}{self.unit}".strip()

    def ahead(self, value: Any, other: Any) -> Any:
        """Return how far a value, or each of a table's, is ahead of another, in `points`: above zero it is better."""
        return self.sign * self.scale * (value - other)


# given what runs the model, what goes into it, and the loss of an output
Losses = Callable[[Callable[["Tensor"], Any], "Tensor", Callable[[Any], "Tensor"]], Iterator["Tensor"]]


def of_the_output(run: Callable[["Tensor"], Any], x: "Tensor", loss: Callable[[Any], "Tensor"]) -> Iterator["Tensor"]:
    """Yield the losses of an update, each of which is gone through backward before the next is computed: here one."""
    yield loss(run(x))


@dataclass(frozen=True)
class Loss:
    """The task's loss of an output for one batch, and what else a phase may learn from a batch."""

    task: "Task"
    batch: Any
    recipe: Any
    data: Any

    def __call__(self, output: Any) -> "Tensor":
        return self.task.loss(output, self.batch, self.recipe)

    def contrast(self, features: "Tensor") -> "Tensor":
        """Return the loss of features [B, D] that are to be alike where samples are."""
        return self.task.contrast(features, self.batch)

    def pixels(self) -> "Tensor":
        """Return the batch's images as they were before they were normalised, augmented, in 0 … 1."""
        return (self.task.inputs(self.batch) * self.data.std + self.data.mean).clamp(0, 1)


class Task:
    """What a batch is, how it is made ready, the loss of an output, and the sums that evaluation makes.

    The loop sees batches that it cannot open, a loss, and sums. A batch is what the data yields: of images a pair of images
    and labels. An output is what the network returns, a row of outputs for each sample unless `check_output` says otherwise.
    Methods draw from the global generators only, which the trainer seeds for every micro-batch.
    """

    name = ""
    metrics: tuple[Metric, ...] = ()  # the first is the score, by which rates, modules and strategies are compared
    num_sums = 0  # S, see `sums`
    has_classes = False  # whether each sample belongs to one class, so that finished networks are tabled class by class
    is_on_top = False  # whether more stands on a network's features than its own head, see `over`
    network = "A network"  # what learns it, for a model card
    tags: tuple[str, ...] = ()  # of model cards
    sample = "image"  # what one of a batch is called

    @property
    def score(self) -> Metric:
        return self.metrics[0]

    @property
    def samples(self) -> str:
        return f"{self.sample}s"

    @property
    def a_sample(self) -> str:
        return f"{'an' if self.sample[0] in 'aeiou' else 'a'} {self.sample}"

    def outputs(self, data: Any) -> int:
        """Return how many outputs the head needs for some data, of images by their `num_classes`; ValueError if it cannot learn
        them. Asked of a set to train on, or of no more than its counts."""
        raise NotImplementedError

    def over(self, backbone: Any, shape: Any, outputs: int) -> Any:
        """Return what learns this on top of a timm network without its classifier, for images of a shape (C, H, W). Asked only
        where the task `is_on_top`; ValueError for a network that nothing can stand on."""
        raise NotImplementedError

    def check_output(self, output: Any, samples: int, outputs: int) -> None:
        """Raise ValueError unless a network with so many outputs gives for some samples what this task learns from.

        That is a row of outputs for each; a task may want any other tensor, or several, in a dict or a list.
        """
        found, wanted = tuple(getattr(output, "shape", ())) or f"a {type(output).__name__}", (samples, outputs)
        if found != wanted:
            raise ValueError(f"gives {found} for {samples} samples, where the task needs {wanted}: one row for each")

    def check_network(self, model: Any) -> None:
        """Raise ValueError where a network, on the meta device, cannot learn this task for another reason."""

    def output_names(self, classes: Sequence[str]) -> list[str]:
        """Return what the outputs are called, for data with these classes; nothing where they have no names."""
        return []

    def unlearned(self, data: Any) -> list[int]:
        """Return which outputs have nothing to learn from in a set to train on."""
        return []

    def invented(self, inputs: "Tensor", outputs: int) -> "Tensor":
        """Return what could belong to invented images [N, C, H, W], to measure how long an update takes: by default classes [N].
        Invented text is asked for as any text is."""
        import torch

        return torch.randint(outputs, (len(inputs),), device=inputs.device)

    def chance(self, outputs: int) -> float | None:
        """Return the score of guessing; None where nobody knows."""
        return None

    def start(self, data: Any, recipe: Any) -> Any:
        """Return what `ready` needs besides a batch, made once a phase."""

    def ready(self, batch: Any, data: Any, recipe: Any, extra: Any) -> Any:
        """Return a training batch on the device, augmented; `extra` is what `start` returned."""
        raise NotImplementedError

    def inputs(self, batch: Any) -> "Tensor":
        """Return what goes into the network: [B, …]."""
        return batch[0]

    def side_by_side(self, batch: Any) -> "Tensor":
        """Return the order [B] in which to show the samples of an evaluated batch: those that are alike side by side."""
        import torch

        return torch.arange(len(self.inputs(batch)))

    def loss(self, output: Any, batch: Any, recipe: Any = None) -> "Tensor":
        """Return the mean loss of a batch, in float32; of an evaluated one where there is no recipe."""
        raise NotImplementedError

    def contrast(self, features: "Tensor", batch: Any) -> "Tensor":
        """Return the mean loss of features [B, D] that are to be alike where samples of a batch are; few tasks know it."""
        raise NotImplementedError

    def sums(self, output: Any, batch: Any) -> "Tensor":
        """Return sums over the samples of an evaluated batch, float64 [S]: first their number, then their losses, then what
        `divided` needs. They are summed over batches and devices."""
        raise NotImplementedError

    def divided(self, sums: list[float]) -> Mapping[str, float]:
        """Return all metrics by name, and the mean loss, named loss, of the sums [S] over all samples."""
        raise NotImplementedError

    def classes(self, output: Any, batch: Any) -> tuple["Tensor", "Tensor"]:
        """Return of each sample of an evaluated batch its class, int64 [B], and whether the network is right, bool [B]. Asked
        only where the task `has_classes`."""
        raise NotImplementedError

    def mistakes(self, output: Any, batch: Any, names: Sequence[str] = ()) -> list[str | None]:
        """Return for each sample of an evaluated batch what to write under it where the network is wrong; None where not.

        `names` are those of classes, where they are known.
        """
        return [None] * len(self.inputs(batch))

    def noted(self, output: Any, batch: Any) -> list[str]:
        """Return a line for each sample of an evaluated batch, no two alike, where no sums give a metric."""
        return []

    def evaluated(self, sums: list[float], noted: Collection[str] = ()) -> dict[str, float]:
        """Return the mean loss, the score under that name, and the other metrics under theirs, of all sums [S] and lines."""
        found = dict(self.divided(sums))
        return {"loss": found.pop("loss"), "score": found.pop(self.score.name)} | found


def get(name: str = TASK) -> Task:
    """Return a task; SettingsError with the nearest names if there is none."""
    return TASKS[name]


@cache
def metric(name: str) -> Metric:
    """Return a metric of any task by its name; KeyError if there is none."""
    return {metric.name: metric for task in (TASKS[name] for name in TASKS) for metric in task.metrics}[name]
