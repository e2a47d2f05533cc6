"""The sections of a settings file: images, network, partition, recipe, machine; each checks what is within it."""

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
UnitKind = Literal["heads", "sublayers", "blocks", "conv_layers", "filters"]  # method/units.py
Share = Annotated[float, Field(ge=0, lt=1)]
LONGEST_NAME = 100  # of the 255 bytes that a file's name can have; tables, figures and variants add to it
LARGEST_SEED = 2**63 - 1


def check_name(name: str, *, dots: bool = True) -> str:
    """Return a name that becomes a part of paths; ValueError unless it can be one everywhere, with nothing to escape."""
    sign = "[A-Za-z0-9._-]" if dots else "[A-Za-z0-9_-]"
    if len(name) > LONGEST_NAME or not re.fullmatch(f"[A-Za-z0-9]{sign}*", name):
        raise ValueError(
            f"a name has at most {LONGEST_NAME} letters (a to z), digits, {'dots, ' * dots}dashes and underscores, and begins "
            "with a letter or digit"
        )
    return name


def check_label(text: str) -> str:
    """Return words that head a column or stand in one; ValueError unless they are one line of readable length."""
    if not text.strip() or not text.isprintable() or len(text) > LONGEST_NAME:
        raise ValueError(f"it must be 1 to {LONGEST_NAME} printable characters in one line")
    return text


Name = Annotated[str, AfterValidator(check_name)]
Label = Annotated[str, AfterValidator(check_label)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


class SettingsError(ValueError):
    """Bad input from the user: the message names the field, the value and what would be right. Exit status 2."""


class Frozen(BaseModel):
    """Base of all settings: immutable, no unknown names, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


ARRAYS = ("cifar10", "cifar100", "fashion_mnist")  # whole sets of small images, held on the device
MADE = ("digits", "synthetic")  # need no folder
TIMM = ("torch/", "hfds/", "wds/")  # prefixes of timm's create_dataset
SPECIAL = {  # fields that only some sources know
    ("num_images", "num_classes", "image_size", "channels"): lambda source: source == "synthetic",
    ("folder",): lambda source: source not in MADE,
    ("train_split", "test_split", "in_memory", "crop_pct", "skip_broken"): lambda source: source not in (*MADE, *ARRAYS),
}


class DataSettings(Frozen):
    """Which images, and which of them judge. The splits are the same for every seed of a run."""

    source: str = "digits"  # digits, synthetic, cifar10, cifar100, fashion_mnist, folder, or timm's torch/…, hfds/…, wds/…
    pad: Annotated[int, Field(ge=0)] = 0  # black pixels added on each side of images that are held in memory
    resize: Positive | None = None  # pixels; images that are held in memory are shrunk to squares of this size
    folder: str | None = None  # where the images are, relative to data/datasets; the source's name if left out
    eval_split: Literal["val", "test"] = "test"  # "val" is cut from the training images, for choosing settings
    test_images: Positive | None = None  # class-balanced; of a source without a test split a third if left out, else all
    val_images: Positive | None = None  # cut from the training images, only when eval_split is "val"; a sixth if left out
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the training images, class-balanced
    split_seed: Annotated[int, Field(ge=0)] = 0  # which images fall into a split or a share
    # folder and timm's sources:
    train_split: str = "train"  # name of the split; of the subfolder or, with wildcards, of the shards
    test_split: str = "val"
    in_memory: bool = False  # hold all images on the device as uint8; they must have the model's size
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875  # of a judged image's shorter side that the centre crop keeps
    skip_broken: bool = False  # take the next image in place of one that cannot be read, and count it
    # generated images:
    num_images: Positive = 384  # training and test together
    num_classes: Annotated[int, Field(ge=2)] = 4
    image_size: Positive = 8
    channels: Positive = 1

    @model_validator(mode="after")
    def _known(self) -> "DataSettings":
        known = (*MADE, *ARRAYS, "folder")
        if self.source not in known and not self.source.startswith(TIMM):
            message = nearest(self.source, [*known, *TIMM])
            raise ValueError(f"unknown source {self.source!r}; {message} ({', '.join(TIMM)} are followed by timm's name)")
        if unused := self.unused_fields & self.model_fields_set:
            raise ValueError(f"{', '.join(sorted(unused))} has no meaning for source {self.source!r}")
        if (self.pad or self.resize) and self.is_streamed:
            raise ValueError(
                f"{'pad' if self.pad else 'resize'} has no meaning for streamed images: they are brought to the model's size"
            )
        if self.in_memory and "crop_pct" in self.model_fields_set:
            raise ValueError("crop_pct has no meaning with in_memory: the images are used as they are")
        return self

    @property
    def unused_fields(self) -> set[str]:
        """Fields that have no meaning for this source: not to be set, and not shown."""
        return {field for fields, belong in SPECIAL.items() if not belong(self.source) for field in fields}

    @property
    def is_streamed(self) -> bool:
        """Whether worker processes read the images as they are needed, instead of once."""
        return self.source not in (*MADE, *ARRAYS) and not self.in_memory


WEIGHTS = "trained ones are read with strategies.<name>.weights"
LOADING = ("pretrained", "checkpoint", "cache_dir")  # timm's arguments that begin so say which weights to load, and whence
ELSEWHERE = {  # timm's arguments that follow from other settings → what to do instead
    "num_classes": "it follows from the images",
    "drop_path_rate": "set training.drop_path",
    "drop_path": "set training.drop_path",
    "device": "phases train on the machine's GPUs where it has some; how many is set by machine.devices",
    "dtype": "set precision",
}


class ModelSettings(Frozen):
    """Any timm Vision Transformer by name; a field left out keeps timm's value for that name.

    Weights are always random: what would have timm load some is refused here, before timm sees it.
    """

    name: str = "vit_tiny_patch16_224"
    img_size: Positive | None = None  # pixels
    patch_size: Positive | None = None  # pixels
    embed_dim: Positive | None = None
    depth: Positive | None = None  # blocks
    num_heads: Positive | None = None
    in_chans: Positive | None = None
    options: dict[str, Any] = {}  # any further argument of the timm model, e.g. {qkv_bias: false}

    @model_validator(mode="after")
    def _fits(self) -> "ModelSettings":
        if self.img_size and self.patch_size and self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is not divisible by patch_size {self.patch_size}")
        if self.embed_dim and self.num_heads and self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}")
        if doubled := sorted(set(self.options) & set(type(self).model_fields)):
            raise ValueError(f"options.{doubled[0]} is a field of its own: set model.{doubled[0]}")
        if elsewhere := sorted(set(self.options) & set(ELSEWHERE)):
            raise ValueError(f"options.{elsewhere[0]} is not set here: {ELSEWHERE[elsewhere[0]]}")
        for where, value in _leaves(self.options, "options"):
            name = where.rpartition(".")[2]
            if name.startswith(LOADING):
                raise ValueError(f"{where} has timm load weights, but every network here begins with random ones; {WEIGHTS}")
            if name == "weight_init" and value == "skip":
                raise ValueError(
                    f"{where} 'skip' leaves weights as the memory happens to be; leave it out, or name a scheme of timm"
                )
        return self

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not name.isprintable() or any(sign in name for sign in ":/\\"):
            raise ValueError(f"a plain name of timm is needed, not a place to load from; {WEIGHTS}")
        if "." in name:
            plain = name.partition(".")[0]
            raise ValueError(
                f"the part after the dot names weights, and every network begins with random ones: write {plain}; {WEIGHTS}"
            )
        return name

    def timm_arguments(self) -> dict[str, Any]:
        """Return the arguments that were set, for `timm.create_model`."""
        return {k: v for k, v in self.model_dump(exclude={"name", "options"}).items() if v is not None} | self.options

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.timm_arguments().items())])


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield every value within mappings and lists, and these themselves, with its place: ("options.a.b", 3)."""
    yield where, value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _leaves(inner, f"{where}.{key}")


class PartitionSettings(Frozen):
    """How the network is cut: `num_modules` equal parts, or the blocks of every part."""

    num_modules: Positive | None = None
    target_depths: list[Positive] | None = None  # blocks of each target module
    meta_depths: list[Positive] | None = None  # blocks of each meta module; one each if left out

    @model_validator(mode="after")
    def _check_together(self) -> "PartitionSettings":
        given = {
            "num_modules": self.num_modules,
            "len(target_depths)": self.target_depths and len(self.target_depths),
            "len(meta_depths)": self.meta_depths and len(self.meta_depths),
        }
        given = {name: count for name, count in given.items() if count}
        if self.num_modules is None and self.target_depths is None:
            raise ValueError("give num_modules or target_depths")
        if len(set(given.values())) > 1:
            raise ValueError(", ".join(f"{name} is {count}" for name, count in given.items()) + "; they must be equal")
        return self

    def depths(self, depth: int) -> tuple[list[int], list[int]]:
        """Return the blocks of each target and each meta module of a network of `depth` blocks."""
        if self.target_depths:
            if sum(self.target_depths) != depth:
                raise SettingsError(
                    f"partition.target_depths {self.target_depths} add up to {sum(self.target_depths)}, "
                    f"but model.depth is {depth}"
                )
            target = list(self.target_depths)
        else:
            k = self.num_modules
            if k > depth:
                raise SettingsError(f"partition.num_modules is {k}, but the network has only {depth} blocks (model.depth)")
            if depth % k:
                raise SettingsError(
                    f"model.depth {depth} is not divisible by partition.num_modules {k}; "
                    "change one of them or give partition.target_depths"
                )
            target = [depth // k] * k
        return target, list(self.meta_depths or [1] * len(target))


class TrainingSettings(Frozen):
    """The recipe of one phase: AdamW, cosine with linear warm-up per step, timm's mixup and cutmix."""

    epochs: Annotated[float, Field(ge=0)] = 10.0  # passes over the training images; fractions are fine; 0: judge only
    batch_size: Positive = 32  # images of an update, on all devices together; an epoch's incomplete last one is left out
    micro_batch: Positive | None = None  # images that one device takes at once, gradients add up; none: its whole share
    lr: Annotated[float, Field(gt=0)] = 1e-3
    lr_for_batch: Positive | None = None  # lr is meant for this batch size and scaled linearly to batch_size
    min_lr: Annotated[float, Field(ge=0)] = 1e-5  # where the cosine ends; never scaled
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0  # linear, from zero
    weight_decay: Annotated[float, Field(ge=0)] = 0.05  # not on biases, norms, position embedding, class token
    betas: tuple[Share, Share] = Field((0.9, 0.999), strict=False)
    clip_grad: Annotated[float, Field(gt=0)] | None = None  # largest norm of the gradient; none: no clipping
    ema: Share | None = None  # decay of the moving average of weights, which is judged and kept; none: the last weights
    label_smoothing: Share = 0.1
    drop_path: Share = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0  # alpha of the beta distribution; 0: off
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    hflip: bool = False  # random mirroring of each image
    shift: Annotated[int, Field(ge=0)] = 0  # pixels; random translation; images held in memory only
    randaugment: str | None = None  # timm's notation, e.g. rand-m9-mstd0.5-inc1; streamed images only, as the next two
    color_jitter: Annotated[float, Field(ge=0)] = 0.0  # only without randaugment, which has its own, as in timm
    erase: Share = 0.0  # probability of a rectangle of noise
    repeats: Positive = 1  # augmentations of an image within a batch; an epoch then shows 1/repeats of the images
    eval_every: Positive = 1  # epochs between evaluations; the last step is always evaluated

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up, scaled to the batch."""
        return self.lr * self.batch_size / (self.lr_for_batch or self.batch_size)

    @model_validator(mode="after")
    def _check_together(self) -> "TrainingSettings":
        if self.min_lr > self.peak_lr:
            scaled = f" (lr {self.lr:g} × batch_size {self.batch_size} / lr_for_batch {self.lr_for_batch})"
            raise ValueError(f"min_lr {self.min_lr} is larger than lr {self.peak_lr:g}" + (scaled if self.lr_for_batch else ""))
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is more than epochs {self.epochs}")
        micro = self.micro_batch or self.batch_size
        if self.batch_size % micro:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by micro_batch {micro}")
        if (self.mixup or self.cutmix) and micro % 2:
            field = "micro_batch" if self.micro_batch else "batch_size"
            raise ValueError(f"{field} {micro} is odd; mixup and cutmix pair the images of a batch")
        return self


class MATSettings(Frozen):
    """Modular Adaptive Training: which units rest, and when that is decided. The paper leaves all of it open; own choices."""

    units: UnitKind | None = None  # what rests or trains as one; none: sublayers of a transformer, conv_layers of others
    probe: Annotated[int, Field(ge=2)] = 32  # training images on which the kernels are computed, the same ones throughout
    outputs: Literal["sum", "all"] = "sum"  # of the network: the sum of an image's logits, or each logit
    normalised: bool = False  # kernels of gradients scaled to length one
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0  # in which everything trains
    every_epochs: Annotated[float, Field(gt=0)] = 1.0  # between two evaluations of the kernels; the first is at the start
    threshold: Literal["ratio", "quantile", "mass"] = "ratio"  # what alpha means, see method/mat.py
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1  # 0: all units train; 1: only the strongest
    beta: Annotated[float, Field(ge=0)] = 0.0  # units whose eigenvalue moves less than this rest, too; the paper has 1e-3
    rank: Literal["mntk", "random", "gradient_norm", "inverted"] = "mntk"  # others: controls, for the same number of units
    slow_every: Annotated[int, Field(ge=2)] | None = None  # control Multirate: resting units train at every so manyth update
    cut: bool = True  # what is used before the lowest active unit rests as well, so that the backward pass ends there
    stop_error: bool = False  # resting units pass no error on: CHANGES THE GRADIENTS of what lies below

    @model_validator(mode="after")
    def _possible(self) -> "MATSettings":
        if self.stop_error and self.units == "conv_layers":
            raise ValueError("stop_error needs a way around resting units: sublayers, blocks, heads or filters, not conv_layers")
        return self


class MachineSettings(Frozen):
    """How phases are computed: none of this belongs to a phase's identity."""

    devices: Positive = 1  # of a machine, that train one phase together, data-parallel; --devices sets it
    nodes: Positive = 1  # machines that train one phase together, inside a job of so many; --nodes sets it
    deterministic: bool = True  # a GPU gives the same bits again; false: a little faster, and no promise
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"  # mode of torch.compile
    workers: Annotated[int, Field(ge=0)] | None = None  # processes a device that read streamed images; none: its cores
    start_method: Literal["forkserver", "spawn", "fork"] = "forkserver"  # of these processes; fork is unsafe beside CUDA
    download: bool = False  # fetch torchvision's and Hugging Face's sets where they are missing
    data_folder: str | None = None  # a copy of data.folder on this machine, e.g. on a local disk
    scratch: str | None = None  # a folder on a local disk, e.g. $TMPDIR, to which data.folder is copied before training
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 20.0  # between checkpoints

    @property
    def team_size(self) -> int:
        """Devices that train one phase together, on all machines."""
        return self.devices * self.nodes


def nearest(name: str, known: Any) -> str:
    """Return the most similar names, or all of them, as the end of an error message."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(known)}"


def in_a_line(error: Exception) -> str:
    """Return the first line of what an error says, or its kind if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def shortened(value: Any) -> str:
    """Return a value as it would be written, on one line, and only the beginning of a very long one."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
