"""The sections of a settings file: images, network, partition, recipe, machine; each checks what is within it."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator as After
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from incubate_lib.config.errors import nearest, refuse

# Bounds that no sound settings reach: what is larger is a slip, and would take the machine's memory, or for ever.
Positive = Annotated[int, Field(ge=1, le=10**9)]
Pixels = Annotated[int, Field(ge=1, le=20_000)]
Blocks = Annotated[int, Field(ge=1, le=10_000)]
Epochs = Annotated[float, Field(ge=0, le=1e6)]
Number = Annotated[float, Field(ge=0, le=1e6)]
UnitKind = Literal["heads", "experts", "sublayers", "blocks", "conv_layers", "filters"]  # method/units.py
Share = Annotated[float, Field(ge=0, lt=1)]
Part = Annotated[float, Field(gt=0, le=1)]
More = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]
LONGEST_NAME = 100  # of the 255 bytes that a file's name can have; tables and figures add to it
LARGEST_SEED = 2**63 - 1
LARGEST_SET = 2**30  # bytes of generated images


def check_name(name: str, *, dots: bool = True) -> str:
    """Return a name that becomes a part of paths; ValueError unless it can be one everywhere, with nothing to escape."""
    sign = "[A-Za-z0-9._-]" if dots else "[A-Za-z0-9_-]"
    fits = len(name) <= LONGEST_NAME and re.fullmatch(f"[A-Za-z0-9]{sign}*", name)
    signs = f"letters (a to z), digits, {'dots, ' * dots}dashes and underscores, and begins with a letter or digit"
    refuse(not fits, f"a name has at most {LONGEST_NAME} {signs}")
    return name


def check_label(text: str) -> str:
    """Return words that head a column or stand in one; ValueError unless they are one line of readable length."""
    fits = text.strip() and text.isprintable() and len(text) <= LONGEST_NAME
    refuse(not fits, f"it must be 1 to {LONGEST_NAME} printable characters in one line")
    return text


Name = Annotated[str, After(check_name)]
Word = Annotated[str, BeforeValidator(str)]  # a number, too: `depth: {12: …}` has one as its key
Label = Annotated[Word, After(check_label)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


class Frozen(BaseModel):
    """Base of all settings: immutable, no unknown names, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


ARRAYS = ("cifar10", "cifar100", "fashion_mnist")  # whole sets of small images, held on the device
MADE = ("digits", "synthetic", "austen", "stdlib")  # need no folder
TEXTS = ("austen", "stdlib", "text", "wikitext")
WHOLE = (*MADE, *ARRAYS, "text", "wikitext")  # read once
COMPOSED = ("digit_boxes", "digit_maps")  # scenes generated of digits, with COCO's objects or ADE20K's maps
SCENES = ("coco", "ade20k", *COMPOSED)  # show several things at once
TIMM = ("torch/", "hfds/", "wds/")  # prefixes of timm's create_dataset
SPECIAL = {  # fields that only some sources know
    ("channels",): lambda source: source == "synthetic",
    ("num_images", "image_size"): lambda source: source in ("synthetic", *COMPOSED),
    ("num_classes",): lambda source: source in ("synthetic", "ade20k", *COMPOSED),
    ("folder",): lambda source: source not in (*MADE, *COMPOSED),
    ("image_column", "label_column"): lambda source: source.startswith("hfds/"),
    ("train_split", "test_split", "skip_broken"): lambda source: source not in (*WHOLE, *COMPOSED),
    ("in_memory", "crop_pct"): lambda source: source not in (*WHOLE, *SCENES),
    ("pad", "resize", "test_images", "val_images", "split_seed"): lambda source: source not in TEXTS,
    ("vocabulary", "mask_share", "undecodable"): lambda source: source in TEXTS,
}


class DataSettings(Frozen):
    """Which images or texts there are, and which of them networks are evaluated on. The splits are the same for every seed."""

    # digits, synthetic, cifar10, cifar100, fashion_mnist, folder, or timm's torch/…, hfds/…, wds/…; of text austen, stdlib
    # (Python's own source files), text (a folder of .txt files), wikitext (its three files); of tasks that look for several
    # things in an image coco, ade20k, digit_boxes, digit_maps
    source: str = "digits"
    pad: Annotated[int, Field(ge=0, le=20_000)] = 0  # black pixels added on each side of images that are held in memory
    # pixels; images that are held in memory are shrunk to squares of this size
    resize: Pixels | None = None
    # where the images are, relative to data/datasets or to the settings file; the source's name if left out
    folder: str | None = None
    # what networks are evaluated on; "val" is cut from the training images, for choosing settings
    eval_split: Literal["val", "test"] = "test"
    # class-balanced; of a source without a test split a third if left out, else all
    test_images: Positive | None = None
    # cut from the training images, only when eval_split is "val"; a sixth if left out
    val_images: Positive | None = None
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the training images, class-balanced
    split_seed: Annotated[int, Field(ge=0)] = 0  # which images fall into a split or a share
    # folder and timm's sources:
    train_split: str = "train"  # name of the split; of the subfolder or, with wildcards, of the shards
    test_split: str = "val"  # the same, of the images to test on
    in_memory: bool = False  # hold all images on the device as uint8; they must have the model's size
    # share of a test image's shorter side that the centre crop keeps
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875
    skip_broken: bool = False  # take the next image in place of one that cannot be read, and count it
    image_column: str = "image"  # of Hugging Face's tables; some sets have img, for example
    label_column: str = "label"  # likewise; some have fine_label
    # generated images, and num_classes of ade20k:
    num_images: Positive = 384  # generated, to train and to test on together
    num_classes: Annotated[int, Field(ge=2, le=1_000_000)] = 4  # of generated images
    image_size: Pixels = 8  # pixels of a side, of generated images
    channels: Annotated[int, Field(ge=1, le=1_000)] = 1  # of generated images
    # text:
    # what its tokens are: characters, bytes, or a file of the package tokenizers, in `folder` or anywhere
    vocabulary: Annotated[str, Field(min_length=1)] = "characters"
    # share of the tokens that masked_language asks for; BERT has 0.15
    mask_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    undecodable: Literal["refuse", "replace"] = "refuse"  # bytes that are no UTF-8

    @model_validator(mode="after")
    def _known(self) -> "DataSettings":
        if self.source not in (*WHOLE, "folder", *SCENES) and not self.source.startswith(TIMM):
            known = f"{nearest(self.source, [*WHOLE, 'folder', *SCENES, *TIMM])} ({', '.join(TIMM)} are followed by timm's name)"
            raise ValueError(f"unknown source {self.source!r}; {known}")
        unused = ", ".join(sorted(self.unused_fields & self.model_fields_set))
        resized = self.is_streamed and ("pad" if self.pad else self.resize and "resize")
        size = "has no meaning for streamed images: they are brought to the model's size"
        cropped = self.in_memory and "crop_pct" in self.model_fields_set
        volume = self.num_images * self.channels * self.image_size**2
        many = f"num_images {self.num_images} × channels {self.channels} × image_size {self.image_size}² are {volume:,} bytes"
        refuse(unused, f"{unused} has no meaning for source {self.source!r}")
        refuse(volume > LARGEST_SET, f"{many}; {LARGEST_SET:,} are the most that are generated")
        refuse(resized, f"{resized} {size}")
        refuse(cropped, "crop_pct has no meaning with in_memory: the images are used as they are")
        return self

    @property
    def unused_fields(self) -> set[str]:
        """Fields that have no meaning for this source: not to be set, and not shown."""
        return {field for fields, belong in SPECIAL.items() if not belong(self.source) for field in fields}

    @property
    def is_text(self) -> bool:
        """Whether samples are contexts of tokens instead of images."""
        return self.source in TEXTS

    @property
    def is_streamed(self) -> bool:
        """Whether worker processes read the images as they are needed, instead of once."""
        return self.source not in WHOLE and not self.in_memory


WEIGHTS = "trained ones are read with strategies.<name>.weights"
# timm's arguments that begin so say which weights to load, and whence
LOADING = ("pretrained", "checkpoint", "cache_dir")
ELSEWHERE = {  # timm's arguments that follow from other settings → what to do instead
    "num_classes": "it follows from the images",
    "drop_path_rate": "set training.drop_path",
    "drop_path": "set training.drop_path",
    "device": "phases train on the machine's GPUs where it has some; how many is set by machine.devices",
    "dtype": "set precision",
}


class ModelSettings(Frozen):
    """Any network of timm by name; a field left out keeps timm's value for that name.

    Weights are always random: what would have timm load some is refused here, before timm sees it.
    """

    name: str = "vit_tiny_patch16_224"  # timm's, without a tag
    img_size: Pixels | None = None  # pixels of a side, to which images are brought
    patch_size: Pixels | None = None  # pixels of a side
    embed_dim: Positive | None = None  # width of a transformer
    depth: Blocks | None = None  # blocks of a transformer
    context: Pixels | None = None  # tokens of a text that a network reads at once
    num_heads: int | list[int] | None = None  # attention heads of a block, or of the blocks of each stage
    in_chans: Positive | None = None  # channels of an image: 1 for grey
    options: dict[str, Any] = {}  # any further argument of the timm model, e.g. {qkv_bias: false}

    @model_validator(mode="after")
    def _fits(self) -> "ModelSettings":
        for whole, part in (("img_size", "patch_size"), ("embed_dim", "num_heads")):
            a, b = getattr(self, whole), getattr(self, part)
            refuse(a and type(b) is int and a % b, f"{whole} {a} is not divisible by {part} {b}")
        for name in sorted(self.options):
            refuse(name in type(self).model_fields, f"options.{name} is a field of its own: set model.{name}")
            refuse(name in ELSEWHERE, f"options.{name} is not set here: {ELSEWHERE.get(name)}")
        for where, value in _leaves(self.options, "options"):
            name = where.rpartition(".")[2]
            load = f"{where} has timm load weights, but every network here begins with random ones; {WEIGHTS}"
            skip = f"{where} 'skip' leaves weights as the memory happens to be; leave it out, or name a scheme of timm"
            refuse(name.startswith(LOADING), load)
            refuse(name == "weight_init" and value == "skip", skip)
        return self

    @field_validator("num_heads", mode="plain")
    @classmethod
    def _one_or_many(cls, given: Any) -> Any:
        heads = given if isinstance(given, list) else [given]
        numbers = heads and all(type(number) is int and 1 <= number <= 10**9 for number in heads)
        refuse(given is not None and not numbers, "it must be a whole number of at least 1, or a list with one for each stage")
        return given

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        plain, dot, _ = name.partition(".")
        place = not name.isprintable() or set(":/\\") & set(name)
        tag = "the part after the dot names weights, and every network begins with random ones"
        refuse(place, f"a plain name of timm is needed, not a place to load from; {WEIGHTS}")
        refuse(dot, f"{tag}: write {plain}; {WEIGHTS}")
        return name

    def timm_arguments(self) -> dict[str, Any]:
        """Return the arguments that were set, for `timm.create_model`."""
        return self.model_dump(exclude={"name", "options"}, exclude_none=True) | self.options

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.timm_arguments().items())])


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield every value within mappings and lists, and these themselves, with its place: ("options.a.b", 3)."""
    yield where, value
    items = enumerate(value) if isinstance(value, list) else getattr(value, "items", tuple)()
    for key, inner in items:
        yield from _leaves(inner, f"{where}.{key}")


class PartitionSettings(Frozen):
    """How the network is cut: `num_modules` equal parts, the blocks of every part, or the layers behind which it is cut."""

    num_modules: Blocks | None = None  # of equal size; where the depth is fixed the first ones may have a block more
    target_depths: list[Blocks] | None = Field(None, min_length=1)  # blocks of each module of the target network
    meta_depths: list[Blocks] | None = Field(None, min_length=1)  # blocks of each module of the meta model; one each if left out
    # what num_modules makes equal: the blocks of each module, or about what each keeps in memory while it learns
    balance: Literal["blocks", "memory"] = "blocks"
    cuts: list[str] | None = Field(None, min_length=1)  # layers behind which the network is cut, by name, in its order

    @model_validator(mode="after")
    def _check_together(self) -> "PartitionSettings":
        depths = {"len(target_depths)": self.target_depths, "len(meta_depths)": self.meta_depths}
        counts = {"num_modules": self.num_modules} | {name: len(given or ()) for name, given in depths.items()}
        counts["len(cuts) + 1"] = len(self.cuts) + 1 if self.cuts else None
        counts = {name: count for name, count in counts.items() if count}
        unlike = ", ".join(f"{name} is {count}" for name, count in counts.items())
        refuse(not (self.num_modules or self.target_depths or self.cuts), "give num_modules, target_depths or cuts")
        balanced = self.balance == "memory" and not (self.num_modules and not self.cuts and not self.target_depths)
        refuse(balanced, "balance: memory finds the cuts of num_modules; leave out target_depths and cuts")
        refuse(self.cuts and self.target_depths, "cuts say already which blocks each module has; leave out target_depths")
        refuse(len(set(counts.values())) > 1, f"{unlike}; they must be equal")
        return self

    def depths(self, depth: int, fixed: bool = False) -> tuple[list[int], list[int]]:
        """Return the blocks of each target and each meta module of a network of `depth` blocks; SettingsError if they differ.

        Where nobody chose the depth (`fixed`) it need not be divisible by `num_modules`.
        """
        target, k = self.target_depths or [], self.num_modules or len(self.target_depths)
        total = f"partition.target_depths {target} add up to {sum(target)}, but the network has {depth} blocks"
        refuse(target and sum(target) != depth, total)
        many = f"partition.num_modules is {k}, but the network has only {depth} blocks"
        both = f"partition.num_modules is {k}, by which the network's {depth} blocks cannot be divided"
        refuse(k > depth, many)
        unequal = not target and depth % k and not fixed and self.balance == "blocks"
        refuse(unequal, f"{both}; change one of them or give partition.target_depths")
        equal = [depth // k + (i < depth % k) for i in range(k)]
        return list(target or equal), list(self.meta_depths or [1] * k)


class MATSettings(Frozen):
    """Modular Adaptive Training: which units rest, and when that is decided. The paper leaves most of it open; own choices."""

    # what rests or trains as one; none: sublayers of a ViT, heads of other transformers, conv_layers of others
    units: UnitKind | None = None
    # training images on which the kernels are computed, the same ones throughout
    probe: Annotated[int, Field(ge=2)] = 32
    # of the network: the sum of a sample's logits, of a text those of all its tokens; of its last token's; or each logit
    outputs: Literal["sum", "last", "all"] = "sum"
    normalised: bool = False  # kernels of gradients scaled to length one
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0  # in which everything trains
    # between two evaluations of the kernels; the first is at the start
    every_epochs: Annotated[float, Field(gt=0)] = 1.0
    # units rest whose largest eigenvalue is below a cut-off; alpha (see below) sets that as a share: ratio, of the way from the
    # smallest eigenvalue to the largest; quantile, of the units; mass, of the sum of all eigenvalues
    threshold: Literal["ratio", "quantile", "mass"] = "ratio"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1  # sets the cut-off; 0: all units train; 1: only the strongest
    # units whose eigenvalue changes by less than this share rest, too; the paper has 1e-3; 0: never
    beta: Annotated[float, Field(ge=0)] = 0.0
    # by what units are ranked; all but mntk are controls, in which as many units train
    rank: Literal["mntk", "random", "gradient_norm", "inverted"] = "mntk"
    # control Multirate: a resting unit trains once in so many updates
    slow_every: Annotated[int, Field(ge=2)] | None = None
    # what is used before the lowest active unit rests as well, so that the backward pass ends there
    cut: bool = True
    stop_error: bool = False  # resting units pass no error on: CHANGES THE GRADIENTS of what lies below

    @model_validator(mode="after")
    def _possible(self) -> "MATSettings":
        around = "stop_error needs a way around resting units: sublayers, blocks, heads or filters, not conv_layers"
        refuse(self.stop_error and self.units == "conv_layers", around)
        return self


class MachineSettings(Frozen):
    """How phases are computed: none of this belongs to a phase's identity."""

    devices: Positive = 1  # of a machine, that train one phase together, data-parallel; --devices sets it
    nodes: Positive = 1  # machines that train one phase together, inside a job of so many; --nodes sets it
    deterministic: bool = True  # a GPU gives the same bits again; false: a little faster, and no promise
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"  # mode of torch.compile
    # processes a device that read streamed images; none: its cores
    workers: Annotated[int, Field(ge=0)] | None = None
    # of these processes; fork is unsafe beside CUDA
    start_method: Literal["forkserver", "spawn", "fork"] = "forkserver"
    download: bool = False  # fetch torchvision's and Hugging Face's sets where they are missing
    data_folder: str | None = None  # a copy of data.folder on this machine, e.g. on a local disk
    # a folder on a local disk, e.g. $TMPDIR, to which data.folder is copied before training
    scratch: str | None = None
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 20.0  # between checkpoints

    @property
    def team_size(self) -> int:
        """Devices that train one phase together, on all machines."""
        return self.devices * self.nodes
