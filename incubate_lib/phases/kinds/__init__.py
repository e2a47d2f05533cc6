"""Kinds of phases: each a file with a `PHASE`. It builds what trains, says the losses of an update, what results, what it costs.

Files of kinds import torch where they compute only: labels, notebooks and options are asked for in a moment.
"""

import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from incubate_lib.config import Frozen, ModelSettings, PhaseSettings, TrainingSettings
from incubate_lib.tasks import of_the_output

__path__ = pkgutil.extend_path(__path__, __name__)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from incubate_lib.method.network import Partition
    from incubate_lib.training.costs import Counted
    from incubate_lib.training.memory import StepMemory

# what `unmeant` says of a rate that falls from layer to layer
IN_PIECES = "layer_decay (modules learn alone, and have no layers below; set layer_decay: null)"
Inputs = dict[str, Path]  # folders of the phases that a phase starts from; "weights": a folder or file of weights


class Options(Frozen):
    """The options of a kind that has none."""


class Phase:
    """One kind of training with a result."""

    name = ""
    label = ""  # for people
    counted_as = ""  # what trains, for people, in tables of costs, if not as the label
    look = ("#999999", "oo")  # colour and pattern in charts: of Okabe and Ito's, and for those who do not see them
    line = "-."  # of its curve, beside those of the other phases of a network that is cut into modules
    notebook = ""
    # What it is seeded, set (`phases.<group>`) and tabled as, if not as its own name: whatever learns in a hybrid is `incubate`.
    group = ""
    counted_apart = False  # whether only its own tables of costs have it
    is_set_by_name = True  # whether settings may have `phases.<name>`
    # the kind whose speed it has; one that has its own is measured by `incubate bench`
    pace = "end_to_end"
    # what an update does of the modules before the one that learns, of that, and of those behind
    work = ("forward, all gradients",) * 3
    options: ClassVar[type[Frozen]] = Options

    def __init__(self) -> None:
        self.group = self.group or self.name
        self.counted_as = self.counted_as or self.label

    @property
    def has_modules(self) -> bool:
        """Whether there is a phase of this kind for each module, which learns alone."""
        return "module_index" in self.options.model_fields

    def measured_as(self, module_index: int | None) -> str:
        """Return the name under which its speed is measured."""
        return self.pace if module_index is None else f"{self.pace}-{module_index}"

    def begins(self, steps: int, others: set[str]) -> bool:
        """Whether so many updates of this phase began with random weights, in a strategy that has these phases, too."""
        return steps > 0

    def unmeant(self, recipe: TrainingSettings) -> str:
        """Return which field of a recipe the phase cannot heed, and what to set in its place; nothing where it heeds all."""
        return ""

    def title(self, s: PhaseSettings) -> str:
        """Return a phase's name for people, modules counted from one."""
        return self.name

    def network(self, model: ModelSettings, partition: dict[str, list[Any]], takes_depth: bool) -> dict[str, Any]:
        """Return `model` and what of `partition` (target_depths, meta_depths, cuts) the phase depends on."""
        return {"model": model} | partition

    def cost(self, model: ModelSettings, options: dict[str, Any]) -> str:
        """Return under which of the names that `count` gives the FLOPs of a training image stand."""
        return "target"

    def count(self, networks: "Counted") -> dict[str, int]:
        """Return the FLOPs of a training image of all phases of this kind, by name; those that others name, too, once."""
        return {}

    def count_modules(self, networks: "Counted", module_index: int) -> list[int]:
        """Return the FLOPs of a training image in each module of the network that an update goes through."""
        return networks.counts.by_module(*self.trains(networks, module_index))

    def trains(self, networks: "Counted", module_index: int | None) -> tuple["nn.Module", "Partition | None"]:
        """Return the network that an update goes through, frozen where the phase freezes it, and how it is cut."""
        return networks.target.requires_grad_(True), networks.partition

    def memory(
        self, networks: "Counted", index: int | None, count: Callable[..., list["StepMemory"]], options: dict[str, Any]
    ) -> "StepMemory":
        """Return the memory of an update, by what `count` says of the modules of a network; of one that reads no images by their
        shape."""
        from incubate_lib.training.memory import StepMemory

        return sum(count(*self.trains(networks, index)), StepMemory())

    def about(self, model: "nn.Module", flops_per_image: dict[str, int], cost: str) -> dict[str, Any]:
        """Return what a summary says besides, of a trained model, of what is counted and of the name under which that stands."""
        return {}

    def alone(self, s: PhaseSettings) -> list[PhaseSettings]:
        """Return the phases of single modules to which one of several amounts: it alone, if it is one."""
        return [s]

    def build(self, s: PhaseSettings, inputs: Inputs, outputs: int) -> "nn.Module":
        """Return the model that the phase trains (ready: frozen parts are frozen).

        Without inputs, where only costs are counted, it starts from what was freshly initialised.
        """
        raise NotImplementedError

    def losses(self, run: Callable[..., Any], x: "Tensor", loss: Callable[[Any], "Tensor"]) -> Iterator["Tensor"]:
        """Yield the losses of an update, each of which is gone through backward before the next is computed.

        `run` is the model, compiled or not, in the phase's precision; `loss` is the task's, of an output.
        """
        return of_the_output(run, x, loss)

    def evaluated(self, model: "nn.Module", x: "Tensor") -> list[Any]:
        """Return the outputs that are evaluated: where several modules learn, that of each, in order."""
        return [model(x)]

    def groups(self, model: "nn.Module") -> list[list["nn.Parameter"]]:
        """Return the parameters that learn together: their gradients are clipped by one norm.

        Where there are several groups, not every loss need reach all of them.
        """
        return [[parameter for parameter in model.parameters() if parameter.requires_grad]]

    def finished(self, s: PhaseSettings, outputs: int) -> "nn.Module":
        """Return the network that takes the weights which the phase leaves behind."""
        return self.build(s, {}, outputs)

    def results(self, model: "nn.Module") -> dict[str, dict[str, "Tensor"]]:
        """Return what a phase leaves behind: tensors by the name of their file, of which `model` is one."""
        return {"model": model.state_dict()}
