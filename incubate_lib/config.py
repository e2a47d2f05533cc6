"""Settings: small frozen pydantic models, read from a preset or a user's own YAML file, overridden by `--set a.b=c`.

Nothing here imports torch, so that a misspelt name is told in a fraction of a second. Three layers make the training
settings of one phase: `training` (every phase) ← `phases.<phase>` ← `strategies.<name>.phases.<phase>`.
"""

import difflib
import hashlib
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

PhaseName = Literal["meta", "incubate", "assemble", "finetune", "end_to_end"]
FORMAT = 1  # of everything a phase's result depends on besides its settings; raise it when old results must not be reused

Positive = Annotated[int, Field(ge=1)]
StrategyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Share = Annotated[float, Field(ge=0, lt=1)]


class SettingsError(ValueError):
    """Bad input from the user: the message names the field, the value and what would be right. Exit status 2."""


class Frozen(BaseModel):
    """Base of all settings: immutable, no unknown names, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSettings(Frozen):
    """Which images, and which of them judge. The split is the same for every seed of a run."""

    source: Literal["digits", "synthetic"] = "digits"
    eval_split: Literal["val", "test"] = "test"  # "val" is cut from the training images, for choosing settings
    test_images: Positive | None = None  # of the source, class-balanced; a third if left out
    val_images: Positive | None = None  # cut from the training images, only when eval_split is "val"; a sixth if left out
    # generated images only:
    num_images: Positive = 384  # training and test together
    num_classes: Annotated[int, Field(ge=2)] = 4
    image_size: Positive = 8
    channels: Positive = 1

    @model_validator(mode="after")
    def _used(self) -> "DataSettings":
        generated = {"num_images", "num_classes", "image_size", "channels"} & self.model_fields_set
        if generated and self.source != "synthetic":
            raise ValueError(f"{', '.join(sorted(generated))} is only for source 'synthetic', not {self.source!r}")
        return self


class ModelSettings(Frozen):
    """Any timm Vision Transformer by name; a field left out keeps timm's value for that name."""

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
        return self

    def timm_arguments(self) -> dict[str, Any]:
        """Return the arguments that were set, for `timm.create_model`."""
        return {k: v for k, v in self.model_dump(exclude={"name", "options"}).items() if v is not None} | self.options


class PartitionSettings(Frozen):
    """How the network is cut: `num_modules` equal parts, or the blocks of every part."""

    num_modules: Positive | None = None
    target_depths: list[Positive] | None = None  # blocks of each target module
    meta_depths: list[Positive] | None = None  # blocks of each meta module; one each if left out

    @model_validator(mode="after")
    def _agrees(self) -> "PartitionSettings":
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

    epochs: Annotated[float, Field(gt=0)] = 10.0  # passes over the training images; fractions are fine
    batch_size: Positive = 32  # images of an update; the last incomplete batch of an epoch is left out
    lr: Annotated[float, Field(gt=0)] = 1e-3
    min_lr: Annotated[float, Field(ge=0)] = 1e-5  # where the cosine ends
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0  # linear, from zero
    weight_decay: Annotated[float, Field(ge=0)] = 0.05  # not on biases, norms, position embedding, class token
    betas: tuple[Share, Share] = Field((0.9, 0.999), strict=False)
    clip_grad: Annotated[float, Field(gt=0)] | None = None  # largest norm of the gradient; none: no clipping
    label_smoothing: Share = 0.1
    drop_path: Share = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0  # alpha of the beta distribution; 0: off
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    shift: Annotated[int, Field(ge=0)] = 0  # pixels; random translation of each image
    hflip: bool = False  # random mirroring of each image
    eval_every: Positive = 1  # epochs between evaluations; the last step is always evaluated

    @model_validator(mode="after")
    def _ordered(self) -> "TrainingSettings":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is larger than lr {self.lr}")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is more than epochs {self.epochs}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size {self.batch_size} is odd; mixup and cutmix pair the images of a batch")
        return self


# The same fields, all optional: what differs from `training`. Ranges are checked when the layers are merged.
TrainingChanges = create_model(
    "TrainingChanges",
    __base__=Frozen,
    **{name: (field.rebuild_annotation() | None, None) for name, field in TrainingSettings.model_fields.items()},
)


class PhaseChanges(Frozen):
    """Training settings that differ by phase."""

    meta: TrainingChanges = TrainingChanges()
    incubate: TrainingChanges = TrainingChanges()
    finetune: TrainingChanges = TrainingChanges()
    end_to_end: TrainingChanges = TrainingChanges()


class StrategySettings(Frozen):
    """A named way from nothing to a trained network."""

    kind: Literal["end_to_end", "deep_incubation"]
    start: Literal["random", "stack", "identity"] = "random"  # of each target module
    inherit_stem: bool = False  # module 1 starts with the meta model's embedding
    inherit_head: bool = False  # module K starts with the meta model's norm and head
    match: str | None = None  # end_to_end: as many steps as cost the training FLOPs of that strategy
    phases: PhaseChanges = PhaseChanges()

    @model_validator(mode="after")
    def _used(self) -> "StrategySettings":
        others = {"start", "inherit_stem", "inherit_head"} if self.kind == "end_to_end" else {"match"}
        idle = others & self.model_fields_set
        idle |= {
            f"phases.{p}"
            for p in PhaseChanges.model_fields
            if p not in PHASES_OF[self.kind] and p in self.phases.model_fields_set
        }
        if idle:
            raise ValueError(f"{', '.join(sorted(idle))} has no meaning for kind {self.kind!r}")
        return self


PHASES_OF = {"end_to_end": ["end_to_end"], "deep_incubation": ["meta", "incubate", "finetune"]}
STRATEGIES = {
    "end_to_end": {"kind": "end_to_end", "match": "deep_incubation"},
    "deep_incubation": {"kind": "deep_incubation", "start": "random"},  # the paper's
    "deep_incubation_stack": {
        "kind": "deep_incubation", "start": "stack", "inherit_stem": True, "inherit_head": True,
    },
    "deep_incubation_identity": {
        "kind": "deep_incubation", "start": "identity", "inherit_stem": True, "inherit_head": True,
    },
}  # fmt: skip


class Settings(Frozen):
    """Everything one experiment needs. Presets and users' files have exactly these fields."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    partition: PartitionSettings
    training: TrainingSettings = TrainingSettings()
    phases: PhaseChanges = PhaseChanges()
    strategies: dict[StrategyName, StrategySettings] = {}
    run: list[str] = Field(
        min_length=1, default=["end_to_end", "deep_incubation", "deep_incubation_stack"]
    )  # strategies run by default
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 20.0  # between checkpoints, never changes a result
    overrides: list[str] = []  # the `--set` values already applied, for the record

    @model_validator(mode="after")
    def _whole(self) -> "Settings":
        if self.model.depth:
            self.partition.depths(self.model.depth)
        if "meta" in self.strategies:
            raise ValueError("strategies.meta: that name is taken, for the folder of the shared meta model")
        for name, strategy in self.strategies.items():
            if strategy.match and self.strategies.get(strategy.match, strategy).kind == "end_to_end":
                raise ValueError(f"strategies.{name}.match is {strategy.match!r}; name a deep_incubation strategy")
            for phase in PHASES_OF[strategy.kind]:
                self.training_of(name, phase)
        return self

    def strategy(self, name: str) -> StrategySettings:
        """Return the strategy of that name; SettingsError with the nearest names if there is none."""
        if name not in self.strategies:
            raise SettingsError(f"unknown strategy {name!r}; {nearest(name, self.strategies)}")
        return self.strategies[name]

    def training_of(self, strategy: str, phase: str) -> TrainingSettings:
        """Return the merged training settings of a phase of a strategy."""
        merged = self.training.model_dump()
        for layer in (self.phases, self.strategy(strategy).phases):
            merged |= getattr(layer, phase).model_dump(exclude_unset=True)  # an explicit null counts
        try:
            return TrainingSettings.model_validate(merged)
        except ValidationError as error:
            raise SettingsError(f"settings of phase {phase} of strategy {strategy}: {_told(error)}") from None

    def is_matched(self, name: str) -> bool:
        """Whether the length of this end-to-end strategy follows from the cost of another one."""
        strategy = self.strategies[name]
        explicit = (self.phases.end_to_end.epochs, strategy.phases.end_to_end.epochs)
        return strategy.match is not None and explicit == (None, None)

    def digest(self) -> str:
        """Return the hash that names an experiment: of all settings that can change a result."""
        settings = self.model_dump(mode="json", include={"data", "model", "partition"})
        for name, strategy in self.strategies.items():
            used = {phase: self.training_of(name, phase).model_dump(mode="json") for phase in PHASES_OF[strategy.kind]}
            matched = self.is_matched(name) and strategy.match
            settings[name] = strategy.model_dump(mode="json", exclude={"phases", "match"}) | {"match": matched, "phases": used}
        return digest({"format": FORMAT, **settings})


class PhaseSettings(Frozen):
    """Everything that one phase's result depends on, resolved; `config.json` in its folder. Its hash is its identity."""

    phase: PhaseName
    seed: Annotated[int, Field(ge=0)]
    data: DataSettings
    model: ModelSettings
    target_depths: list[int]
    meta_depths: list[int]
    module_index: int | None = None  # 0-based; incubate only
    start: Literal["random", "stack", "identity"] | None = None  # incubate only
    inherit_stem: bool = False
    inherit_head: bool = False
    training: TrainingSettings | None = None  # none for assemble
    inputs: dict[str, str] = {}  # hashes of the phases it starts from
    format: int = FORMAT

    def digest(self) -> str:
        """Return the hash of all that decides the result and its record."""
        return digest(self.model_dump(mode="json"))


def digest(value: Any) -> str:
    """Return 12 hex digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def presets() -> dict[str, Path]:
    """Return the presets in the package: name → file."""
    folder = Path(str(resources.files("incubate_lib") / "presets"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_settings(preset: str = "digits", overrides: list[str] | tuple[str, ...] = ()) -> Settings:
    """Read a preset by name or a YAML file by path, and apply `a.b=value` overrides; SettingsError if anything is off."""
    path = presets().get(preset)
    if path is None:
        path = Path(preset)
        if path.is_dir():
            raise SettingsError(f"{preset} is a folder; give a preset ({', '.join(presets())}) or a .yaml file")
        if path.suffix not in (".yaml", ".yml") and not path.is_file():
            raise SettingsError(f"unknown preset {preset!r}; {nearest(preset, presets())}, or give a .yaml file")
    raw = _read_yaml(path)
    raw.setdefault("name", path.stem)
    raw.setdefault("strategies", {})
    if isinstance(raw["strategies"], dict) and all(v is None or isinstance(v, dict) for v in raw["strategies"].values()):
        raw["strategies"] = {
            name: STRATEGIES.get(name, {}) | (raw["strategies"].get(name) or {})
            for name in [*STRATEGIES, *(n for n in raw["strategies"] if n not in STRATEGIES)]
        }
    for override in overrides:
        _override(raw, override)
    raw["overrides"] = list(overrides)
    settings = _validate(raw, " ".join([path.name, *(f"--set {override}" for override in overrides)]))
    for name in settings.run:
        settings.strategy(name)
    for override in overrides:
        _refuse_idle(settings, override.partition("=")[0].strip())
    return settings


def _refuse_idle(settings: Settings, where: str) -> None:
    """Refuse to set a training field that every phase overrides: it would silently do nothing."""
    section, _, field = where.partition(".")
    if section != "training" or not field:
        return

    def overridden(name: str, phase: str) -> bool:
        layers = (settings.phases, settings.strategies[name].phases)
        computed = field == "epochs" and phase == "end_to_end" and settings.is_matched(name)
        return computed or any(field in getattr(layer, phase).model_fields_set for layer in layers)

    if all(overridden(name, phase) for name, s in settings.strategies.items() for phase in PHASES_OF[s.kind]):
        raise SettingsError(f"{where} has no effect: every phase sets its own {field}; use phases.<phase>.{field}")


class _Loader(yaml.SafeLoader):
    """YAML without python objects or doubled keys, and with 1e-3 read as a number (YAML 1.1 wants a dot)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if doubled := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{doubled[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read settings file {path}: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise SettingsError(f"{path} must be a mapping of settings, not a {type(raw).__name__}")
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    where, equals, text = override.partition("=")
    keys = where.strip().split(".")
    if not equals or not all(keys):
        raise SettingsError(f"--set {override!r}: write it as field=value, for example training.epochs=20")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        raise SettingsError(f"--set {override!r}: {text!r} is not a plain value") from None
    for key in keys[:-1]:
        if raw.get(key) is None:
            raw[key] = {}
        raw = raw[key]
        if not isinstance(raw, dict):
            raise SettingsError(f"--set {override!r}: {key} has no fields")
    raw[keys[-1]] = value


def _validate(raw: dict[str, Any], where: str) -> Settings:
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(f"{where}: {_told(error)}") from None


def _told(error: ValidationError) -> str:
    """Say in a line or two what is wrong: field, value, and what would be right."""
    lines = []
    for item in error.errors()[:3]:
        field = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown field {field!r}; {nearest(str(item['loc'][-1]), _fields_at(item['loc'][:-1]))}")
        elif item["type"] == "missing":
            lines.append(f"{field} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = "" if isinstance(item["input"], dict) else f" is {item['input']!r}:"
            lines.append(f"{field}{value} {message}".strip())
    return "; ".join(dict.fromkeys(lines))


def _fields_at(loc: tuple) -> list[str]:
    """Return the field names of the settings model at a place such as ("phases", "meta")."""
    model: Any = Settings
    for part in loc:
        if model is Settings and part == "strategies":
            continue
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field is not None else StrategySettings
    return list(getattr(model, "model_fields", {}))


def nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(known)}"


def data_folder() -> Path:
    """Return the folder of datasets, runs and results: $INCUBATE_DATA, or `data/` of the project."""
    return Path(os.environ.get("INCUBATE_DATA") or Path(__file__).resolve().parents[1] / "data").absolute()
