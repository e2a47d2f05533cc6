"""local_learning: all modules of the network at once, each from a loss of its own, in one phase: InfoPro and DGL."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from incubate_lib.config import SettingsError, TrainingSettings, refuse
from incubate_lib.config.members import TASKS
from incubate_lib.config.strategies import StrategySettings
from incubate_lib.data.schedule import micro_batches
from incubate_lib.phases.kinds.local_learning import cost_of
from incubate_lib.strategies import Kind
from incubate_lib.tasks import Task

Weight = Annotated[float, Field(ge=0)]
Pair = Annotated[list[Weight], Field(min_length=2, max_length=2)]


class LocalLearning(StrategySettings):
    """Baselines of the paper that train all modules side by side in one process, with heads that are thrown away."""

    is_cut: ClassVar[bool] = True

    kind: Literal["local_learning"]  # needed where the strategy's name is a new one
    # infopro: reconstruct the image and tell what it shows; dgl: only tell, through a larger head
    method: Literal["infopro", "dgl"]
    contrast: bool = False  # infopro: by supervised contrast within a batch instead of cross-entropy
    # infopro: weight of reconstruction at the first module and at the last but one, linear between; none: published
    reconstruction: Pair | None = None
    supervision: Pair | None = None  # infopro: the same, of what the image shows
    match: str | None = None  # as long as costs the training FLOPs of that one
    budget: Annotated[float, Field(gt=0)] = 1.0  # share of what is matched that it may cost

    @property
    def trains(self) -> list[str]:
        return ["local_learning"]

    def check(self) -> None:
        alien = ", ".join(name for name in ("contrast", "reconstruction", "supervision") if getattr(self, name))
        refuse(self.method == "dgl" and alien, f"{alien} has no meaning for method 'dgl', which has cross-entropy alone")
        unmatched = not self.match and "budget" in self.model_fields_set
        refuse(unmatched, "budget has no meaning without match")
        refuse(self.mat is not None, "mat is not possible here: modules that learn locally have a backward pass each")
        pairs = zip(self.reconstruction or (), self.supervision or (), strict=False)
        nothing = any(a == b == 0 for a, b in pairs)
        refuse(nothing, "reconstruction and supervision are both 0 at one end: a module there would learn nothing")


def build(made: Any) -> Any:
    own, facts = made.own, made.facts
    name, modules = cost_of(own.method, own.contrast), len(facts.target_depths)
    if modules < 2:
        raise SettingsError(f"strategies.{made.name} needs at least 2 modules, but partition has {modules}")
    if name not in facts.flops_per_image:
        what = (
            "a text is no image"
            if made.settings.data.is_text
            else "what its modules hand on is neither a map nor tokens of a square"
        )
        raise SettingsError(f"strategies.{made.name} is not possible with model.name {made.settings.model.name!r}: {what}")
    _check_task(made)
    training = made.training("local_learning")
    if made.is_matched:
        training = made.lasting("local_learning", made.budget(), facts.flops_per_image[name])
    if own.contrast:
        _check_pairs(made, training)
    given = {field: getattr(own, field) for field in ("method", "contrast", "reconstruction", "supervision")}
    return made.node("local_learning", training, key=made.name, **given)


def _check_task(made: Any) -> None:
    """Raise SettingsError unless the task learns from a row of outputs, as heads give it."""
    import torch

    task, outputs = made.settings.task, made.facts.outputs
    row = (2, 1, outputs) if made.settings.data.is_text else (2, outputs)
    try:
        TASKS[task].check_output(torch.empty(row), 2, outputs)
    except ValueError as error:
        raise SettingsError(f"strategies.{made.name} has heads, but task {task!r} cannot learn from one, which {error}") from None


def _check_pairs(made: Any, training: TrainingSettings) -> None:
    """Raise SettingsError where images are mixed, or where most of a batch's have no other one of their class beside them."""
    said, task = f"strategies.{made.name}.contrast is true", made.settings.task
    unknown = type(TASKS[task]).contrast is Task.contrast
    refuse(unknown, f"{said}, but task {task!r} does not know which of its samples are alike")
    mixed = ", ".join(name for name in ("mixup", "cutmix") if getattr(training, name))
    refuse(mixed, f"{said}, but {mixed} is on: a mixed image has no class that another could share; set it to 0")
    classes = made.facts.outputs
    images = micro_batches(training.batch_size, training.micro_batch, made.settings.machine.team_size)[1]
    few = f"{said}, but a device sees {images} images at once of {classes} classes: too few for pairs"
    refuse(images <= classes, f"{few}; it takes a batch_size (micro_batch) of {classes + 1} a device")


KIND = Kind(LocalLearning, build)
