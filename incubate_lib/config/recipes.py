"""The recipe of a phase: the section `training`, and what the names of recipes stand for, which settings have in their place."""

from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, model_validator

from incubate_lib.config.errors import refuse
from incubate_lib.config.members import PHASES
from incubate_lib.config.packaged import packaged
from incubate_lib.config.sections import Amount, Epochs, Frozen, Number, Positive, Share

RELEASED = packaged("recipes.yaml")  # phase, or every → field → value


def _whole(number: float) -> int | float:
    """Write whole numbers without a point, as identities of phases always had them."""
    return int(number) if number.is_integer() else number


class TrainingSettings(Frozen):
    """The recipe of one phase: AdamW or SGD, cosine with linear warm-up, timm's mixup and cutmix."""

    # ours or released, for the authors' code: what it says by which fields is in recipes.yaml; a field that is set wins
    recipe: Literal["ours", "released"] | None = None
    epochs: Epochs = 10.0  # passes over the training images; fractions are fine; 0: only evaluate
    batch_size: Positive = 32  # images of an update, on all devices together; an epoch's incomplete last one is left out
    micro_batch: Positive | None = None  # images that one device takes at once, with gradients accumulated; none: its whole share
    lr: Annotated[float, Field(gt=0, le=3e38)] = 1e-3  # learning rate after warm-up; a float32 holds no more than 3e38
    lr_for_batch: Positive | None = None  # lr is meant for this batch size and scaled linearly to batch_size
    min_lr: Annotated[float, Field(ge=0)] = 1e-5  # where the cosine ends; never scaled
    warmup_epochs: Epochs = 1.0  # in which the rate rises linearly
    warmup_lr: Amount | None = None  # at which it begins to rise; none: at lr, divided by the updates of the warm-up
    warmup: Literal["before", "inside"] = "before"  # or inside the cosine, which then runs over all epochs
    lr_by: Literal["update", "epoch"] = "update"  # how often the rate changes; by epoch, it lags one
    # by which the rate falls from each layer of a backbone to the one before, with what stands on top at lr; none: one rate
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    weight_decay: Number = 0.05  # not on biases, norms, position embedding, class token
    decay_tokens: bool = False  # weight_decay on position embedding and class token, too
    token_std: Number | None = None  # standard deviation of the class token at the start; none: timm's, 1e-6
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd with Nesterov momentum, and with decay within the gradient
    betas: tuple[Share, Share] = Field((0.9, 0.999), strict=False)  # of AdamW; the first is the momentum of sgd
    clip_grad: Annotated[float, Field(gt=0)] | None = None  # largest norm of the gradient; none: no clipping
    clip_when: Literal["always", "mixed_precision"] = "always"  # whether clip_grad acts in float32, too
    # decay of the moving average of weights, which is evaluated and kept; none: the last weights
    ema: Share | None = None
    label_smoothing: Share = 0.1  # share of the target that all classes have together
    drop_path: Share = 0.0  # rate of stochastic depth at the last block; it rises linearly from 0 at the first
    drop_path_over: Literal["target", "hybrid"] = "target"  # over whose blocks it rises while a module learns
    frozen: Literal["eval", "train"] = "eval"  # mode of a hybrid's frozen parts; train: with drop-path
    mixup: Number = 0.0  # alpha of its beta distribution; 0: off
    cutmix: Number = 0.0  # alpha of its beta distribution; 0: off
    mixup_draws: Positive | None = None  # of mixup or cutmix, for an update; none: one for each micro-batch
    hflip: bool = False  # random mirroring of each image
    # factors between which an image is scaled at random before it is cropped; only for coco and ade20k
    scale: tuple[Annotated[float, Field(gt=0, le=10)], Annotated[float, Field(gt=0, le=10)]] | None = Field(None, strict=False)
    shift: Annotated[int, Field(ge=0, le=20_000)] = 0  # pixels; random translation; images held in memory only
    # timm's notation, e.g. rand-m9-mstd0.5-inc1; streamed images only, as the next two
    randaugment: str | None = None
    # only without randaugment, which has its own, as in timm
    color_jitter: Annotated[float, Field(ge=0)] = 0.0
    erase: Share = 0.0  # probability of a rectangle of noise
    # augmentations of an image within a batch; an epoch then shows 1/repeats of the images
    repeats: Annotated[int, Field(ge=1, le=1_000)] = 1
    stride_repeats: bool = False  # an image's repeats fall into different draws of mixup, or micro-batches
    # epochs between evaluations, fractions are fine; the last step is always evaluated
    eval_every: Annotated[float, Field(gt=0, le=1e6), PlainSerializer(_whole)] = 1.0

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up, scaled to the batch."""
        return self.lr * self.batch_size / (self.lr_for_batch or self.batch_size)

    @model_validator(mode="after")
    def _check_together(self) -> "TrainingSettings":
        scaled = f" (lr {self.lr:g} × batch_size {self.batch_size} / lr_for_batch {self.lr_for_batch})"
        lowest = f"min_lr {self.min_lr} is larger than lr {self.peak_lr:g}" + scaled * bool(self.lr_for_batch)
        epochs, warmup, batch, draws = self.epochs, self.warmup_epochs, self.batch_size, self.mixup_draws or 1
        field = "micro_batch" if self.micro_batch else "batch_size"
        micro = getattr(self, field)
        refuse(self.min_lr > self.peak_lr, lowest)
        refuse(warmup > epochs, f"warmup_epochs {warmup} is more than epochs {epochs}")
        refuse(batch % micro, f"batch_size {batch} is not divisible by micro_batch {micro}")
        mixed, paired = self.mixup or self.cutmix, "is odd; mixup and cutmix pair the images of a batch"
        refuse(mixed and micro % 2, f"{field} {micro} {paired}")
        refuse(self.scale and self.scale[0] > self.scale[1], f"scale {self.scale} must be the smaller factor, then the larger")
        refuse((self.warmup_lr or 0) > self.peak_lr, f"warmup_lr {self.warmup_lr} is larger than lr {self.peak_lr:g}")
        refuse(batch % draws, f"batch_size {batch} is not divisible by mixup_draws {draws}")
        refuse(mixed and batch // draws % 2, f"batch_size {batch} divided by mixup_draws {draws} {paired}")
        return self


def fields_of(recipe: str, phase: str) -> dict[str, Any]:
    """Return the fields that a recipe, ours or released, has in a phase."""
    ours = {name: TrainingSettings.model_fields[name].default for fields in RELEASED.values() for name in fields}
    return ours | (RELEASED["every"] | RELEASED.get(phase, {}) if recipe == "released" else {})


def expanded(settings: dict[str, Any]) -> dict[str, Any]:
    """Return raw settings with the fields of each `recipe` in its place; what is set besides, for all phases or one, stays.

    So results and records know fields only, and a recipe by its name is the same as its fields one by one.
    """
    with suppress(TypeError):  # of settings of another shape, which validation tells
        training, phases, strategies = (_copied(settings.get(name)) for name in ("training", "phases", "strategies"))
        given = set(training)
        if training.get("recipe") == "released":
            named = [phase for phase in PHASES if PHASES[phase].is_set_by_name]
            phases |= {phase: {"recipe": "released"} | _copied(phases.get(phase)) for phase in named}
        if training.get("recipe") in ("ours", "released"):
            del training["recipe"]
        for name, strategy in strategies.items():
            if own := _copied(_copied(strategy).get("phases")):
                filled = {phase: _filled(own[phase], phase, given | set(_copied(phases.get(phase)))) for phase in own}
                strategies[name] = strategy | {"phases": filled}
        phases = {phase: _filled(changes, phase, given) for phase, changes in phases.items()}
        return settings | {"training": training, "phases": phases, "strategies": strategies}
    return settings


def _copied(value: Any) -> dict[str, Any]:
    """Return a copy of a mapping; TypeError for anything but that and nothing."""
    if not isinstance(value, dict | None):
        raise TypeError
    return dict(value or {})


def _filled(changes: Any, phase: str, given: set[str]) -> Any:
    """Return a phase's changes with the fields of their recipe, but for those that are given."""
    if not isinstance(changes, dict) or changes.get("recipe") not in ("ours", "released"):
        return changes
    fields = {name: value for name, value in fields_of(changes["recipe"], phase).items() if not (name in given or value is None)}
    return fields | {name: value for name, value in changes.items() if name != "recipe"}
