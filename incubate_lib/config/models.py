"""Settings: the sections put together, strategies, and one phase's resolved settings, with the checks across them.

Three layers make the training settings of one phase: `training` (every phase) ← `phases.<phase>` ←
`strategies.<name>.phases.<phase>`. Where only the first of them says a learning rate or a warm-up, a strategy may have
something relative to it instead (`lr_scale`, `warmup_share`). What a result depends on is in its phase's hash; `machine`
says only how it is computed, and is not.
"""

import hashlib
import json
from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, ValidationError, create_model, model_validator

from incubate_lib.config.sections import (
    ARRAYS,
    DataSettings,
    Frozen,
    MachineSettings,
    MATSettings,
    ModelSettings,
    Name,
    PartitionSettings,
    Seed,
    SettingsError,
    TrainingSettings,
    check_name,
    nearest,
    shortened,
)

PhaseName = Literal["meta", "incubate", "assemble", "finetune", "end_to_end"]
FORMAT = 3  # of everything a phase's result depends on besides its settings; raise it when old results must not be reused

StrategyName = Annotated[str, AfterValidator(partial(check_name, dots=False))]  # `--set strategies.NAME.…` has the dots


# The same fields, all optional: what differs from `training`. Ranges are checked when the layers are merged.
TrainingChanges = create_model(
    "TrainingChanges",
    __base__=Frozen,
    **{name: (field.rebuild_annotation() | None, None) for name, field in TrainingSettings.model_fields.items()},
)


MATChanges = create_model(
    "MATChanges",
    __base__=Frozen,
    **{name: (field.rebuild_annotation() | None, None) for name, field in MATSettings.model_fields.items()},
)


class PhaseChanges(Frozen):
    """Training settings that differ by phase."""

    meta: TrainingChanges = TrainingChanges()
    incubate: TrainingChanges = TrainingChanges()
    finetune: TrainingChanges = TrainingChanges()
    end_to_end: TrainingChanges = TrainingChanges()


class LowResolution(Frozen):
    """Small images first: cheaper updates at the beginning (FixRes, arXiv 1906.06423, and progressive resizing)."""

    img_size: Annotated[int, Field(ge=1)] | None = None  # pixels; none: half of the network's, to a whole number of patches
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the training FLOPs; the rest is spent at the network's own size


PartPhase = Literal["meta", "incubate", "finetune"]  # of Deep Incubation


class StrategySettings(Frozen):
    """A named way from nothing to a trained network."""

    kind: Literal["end_to_end", "deep_incubation", "finetune"]
    start: Literal["random", "stack", "identity"] = "random"  # of each target module
    inherit_stem: bool = False  # module 1 starts with the meta model's embedding
    inherit_head: bool = False  # module K starts with the meta model's norm and head
    weights: str | None = None  # deep_incubation: a trained meta model, finetune: the network; relative to data/
    incubate: Literal["labels", "features", "none"] = (
        "labels"  # how modules learn: from labels through the hybrid (the paper), by
    )
    # imitating the meta module's features, or not at all: they keep their starting weights
    match: str | None = None  # as long as costs the training FLOPs of that one; end_to_end of an end_to_end: as many epochs
    match_on: Literal["flops", "critical_path"] = "flops"  # critical_path: what K workers can do together in that one's time
    budget: Annotated[float, Field(gt=0)] = 1.0  # share of what is matched that it may cost
    shares: dict[Literal["meta", "incubate"], Annotated[float, Field(gt=0, lt=1)]] | None = (
        None  # of that budget; fine-tuning has the rest
    )
    # deep_incubation: what its phases have instead of training.lr and training.warmup_epochs, where nothing is set for a
    # phase itself (phases.<phase>, here or for all strategies). Phases that it does not train are passed over.
    lr_scale: dict[PartPhase, Annotated[float, Field(gt=0)]] | None = None  # times training.lr
    warmup_share: dict[PartPhase, Annotated[float, Field(ge=0, le=1)]] | None = None  # of the phase's own epochs
    low_resolution: LowResolution | None = None  # end_to_end: begin with small images
    mat: MATChanges | None = None  # Modular Adaptive Training, and what differs from the section `mat`; {} is MAT as it is there
    mat_phases: list[Literal["meta", "incubate", "finetune", "end_to_end"]] | None = Field(
        None, min_length=1
    )  # none: all but meta
    phases: PhaseChanges = PhaseChanges()

    @property
    def needs_meta(self) -> bool:
        """Whether there is a meta model."""
        starts = self.start != "random" or self.inherit_stem or self.inherit_head
        return self.kind == "deep_incubation" and (self.incubate != "none" or starts)

    @property
    def trains(self) -> list[str]:
        """The phases that it trains, in order."""
        if self.kind == "end_to_end":
            return ["end_to_end", "finetune"] if self.low_resolution else ["end_to_end"]
        if self.kind == "finetune":
            return ["finetune"]
        meta = ["meta"] if self.needs_meta and not self.weights else []
        return meta + (["incubate"] if self.incubate != "none" else []) + ["finetune"]

    @model_validator(mode="after")
    def _used(self) -> "StrategySettings":
        cut = {"start", "inherit_stem", "inherit_head", "weights", "incubate", "match", "budget", "shares"}
        cut |= {"lr_scale", "warmup_share"}
        own = {"end_to_end": {"match", "match_on", "budget", "low_resolution"}, "finetune": {"weights"}}.get(self.kind, cut)
        unused = ((cut | {"match_on", "low_resolution"}) - own) & self.model_fields_set
        if self.mat is None and self.mat_phases is not None:
            raise ValueError("mat_phases has no meaning without mat: {}")
        if wrong := sorted(set(self.mat_phases or []) - set(self.trains)):
            raise ValueError(f"mat_phases names {', '.join(wrong)}, but kind {self.kind!r} trains {', '.join(self.trains)}")
        unused |= {f"phases.{p}" for p in PhaseChanges.model_fields if p not in self.trains and p in self.phases.model_fields_set}
        if unused:
            given = f"kind {self.kind!r}" + (" with weights" if self.weights and self.kind == "deep_incubation" else "")
            given += " that trains " + ", ".join(self.trains) if self.incubate == "none" else ""
            raise ValueError(f"{', '.join(sorted(unused))} has no meaning for {given}")
        if self.kind == "finetune" and not self.weights:
            raise ValueError("kind 'finetune' needs weights: the folder or .safetensors file of the network to start from")
        if ({"shares", "budget", "match_on"} & self.model_fields_set) and not self.match:
            raise ValueError("shares, budget and match_on have no meaning without match")
        if wrong := sorted(set(self.shares or {}) - set(self.trains)):
            raise ValueError(f"shares names {', '.join(wrong)}, but this strategy trains {', '.join(self.trains)}")
        if self.shares and self.phases.finetune.epochs is not None:
            raise ValueError("shares leave the rest to fine-tuning; do not set phases.finetune.epochs besides")
        if self.weights and self.kind == "deep_incubation" and not self.needs_meta:
            raise ValueError("weights are those of a meta model, which this strategy does without")
        if sum((self.shares or {}).values()) >= 1:
            raise ValueError(f"shares add up to {sum(self.shares.values()):g}, which leaves nothing for fine-tuning")
        if self.mat is not None and self.low_resolution:
            raise ValueError("mat and low_resolution do not go together")
        return self

    def is_as_named(self, name: str) -> bool:
        """Whether nothing of a known strategy was changed."""
        known = (table[name] for table in (STRATEGIES, UNCUT) if name in table)
        return any(_as_set(self) == _as_set(StrategySettings.model_validate(one)) for one in known)


STRATEGIES = {
    "end_to_end": {"kind": "end_to_end", "match": "deep_incubation"},
    "deep_incubation": {"kind": "deep_incubation", "start": "random"},  # the paper's
    "deep_incubation_stack": {
        "kind": "deep_incubation", "start": "stack", "inherit_stem": True, "inherit_head": True,
    },
    "deep_incubation_identity": {
        "kind": "deep_incubation", "start": "identity", "inherit_stem": True, "inherit_head": True,
    },
    "recommended": {  # what our studies found best, see the README
        "kind": "deep_incubation", "start": "identity", "inherit_stem": True, "inherit_head": True, "match": "end_to_end",
        "shares": {"meta": 0.5, "incubate": 0.3}, "lr_scale": {"incubate": 0.5, "finetune": 0.5},
        "warmup_share": {"meta": 0.1, "incubate": 0.2, "finetune": 0.0},
    },
    "stacking": {
        "kind": "deep_incubation", "start": "stack", "inherit_stem": True, "inherit_head": True, "incubate": "none",
        "match": "deep_incubation",
    },
    "growing": {
        "kind": "deep_incubation", "start": "identity", "inherit_stem": True, "inherit_head": True, "incubate": "none",
        "match": "deep_incubation",
    },
    "random_modules": {"kind": "deep_incubation", "start": "random", "incubate": "none", "match": "deep_incubation"},
    "imitation": {"kind": "deep_incubation", "start": "random", "incubate": "features", "match": "deep_incubation"},
    "end_to_end_longer": {"kind": "end_to_end", "match": "deep_incubation", "match_on": "critical_path"},
    "end_to_end_low_resolution": {"kind": "end_to_end", "match": "deep_incubation", "low_resolution": {}},
    "mat": {"kind": "end_to_end", "match": "end_to_end", "mat": {}},
    "mat_random": {"kind": "end_to_end", "match": "end_to_end", "mat": {"rank": "random"}},
    "mat_gradient_norm": {"kind": "end_to_end", "match": "end_to_end", "mat": {"rank": "gradient_norm"}},
    "mat_inverted": {"kind": "end_to_end", "match": "end_to_end", "mat": {"rank": "inverted"}},
    "mat_multirate": {"kind": "end_to_end", "match": "end_to_end", "mat": {"slow_every": 5}},
    "deep_incubation_mat": {"kind": "deep_incubation", "start": "random", "mat": {}},
}  # fmt: skip
UNCUT = {  # of networks that are not taken apart
    name: {field: value for field, value in strategy.items() if value != "deep_incubation"}
    for name, strategy in STRATEGIES.items()
    if strategy["kind"] == "end_to_end" and "match_on" not in strategy
}


DEFAULT_MACHINE = MachineSettings()


class Settings(Frozen):
    """Everything one experiment needs. Presets and users' files have exactly these fields."""

    name: Name
    description: str = ""
    data: DataSettings = DataSettings()
    model: ModelSettings = ModelSettings()
    partition: PartitionSettings | None = None  # none: the network is not cut, and any timm model will do
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast; weights and optimiser stay float32
    training: TrainingSettings = TrainingSettings()
    phases: PhaseChanges = PhaseChanges()
    mat: MATSettings = MATSettings()  # of the strategies that have Modular Adaptive Training
    strategies: dict[StrategyName, StrategySettings] = {}
    run: list[str] = Field(min_length=1, default=["end_to_end", "deep_incubation", "recommended"])  # strategies run by default
    machine: MachineSettings = DEFAULT_MACHINE
    overrides: list[str] = []  # the `--set` values already applied, for the record

    @model_validator(mode="after")
    def _whole(self) -> "Settings":
        if self.partition is None:
            cut = [name for name in self.run if STRATEGIES.get(name, {}).get("kind") == "deep_incubation"]
            cut += [name for name, strategy in self.strategies.items() if strategy.kind == "deep_incubation"]
            if cut:
                raise ValueError(f"partition is missing, which {cut[0]} needs: give num_modules or target_depths")
        elif self.model.depth:
            self.partition.depths(self.model.depth)
        if "meta" in self.strategies:
            raise ValueError("strategies.meta: that name is taken, for the folder of the shared meta model")
        alike: dict[str, str] = {"meta": "the folder of the shared meta model, meta,"}
        own = [name for name, strategy in self.strategies.items() if not strategy.is_as_named(name)]
        for name in (*self.run, *own):  # what is built in and not run has no folder
            if (other := alike.setdefault(name.lower(), name)) != name:
                raise ValueError(f"strategies.{name} and {other} differ in case only, which not every file system tells apart")
        if self.machine.download and self.data.source not in ARRAYS and not self.data.source.startswith(("torch/", "hfds/")):
            raise ValueError(
                f"machine.download is for torchvision's and Hugging Face's sets, not for data.source {self.data.source!r}"
            )
        for name, strategy in self.strategies.items():
            if strategy.match:
                self._check_match(name)
            if "budget" in strategy.model_fields_set and not self.is_matched(name):
                raise ValueError(f"strategies.{name}.budget has no meaning: phases say already how many epochs it lasts")
            for phase in strategy.trains:
                self._check_fits(self.training_of(name, phase), f"phase {phase} of strategy {name}")
                self.mat_of(name, phase)  # raises where changes do not fit
        return self

    def _check_match(self, name: str) -> None:
        match = self.strategies[name].match
        other = self.strategies.get(match)
        if other is None:
            raise ValueError(f"strategies.{name}.match is {match!r}; {nearest(match, self.strategies)}")
        if other.kind == "finetune" or other.mat is not None or match == name:
            raise ValueError(f"strategies.{name}.match is {match!r}; name a deep_incubation or end_to_end strategy without MAT")
        if self.strategies[name].match_on == "critical_path" and other.kind != "deep_incubation":
            raise ValueError(
                f"strategies.{name}.match is {match!r}; with match_on: critical_path name a deep_incubation strategy"
            )
        if other.kind == "end_to_end" and self.strategies[name].kind == "end_to_end":
            if other.low_resolution:
                raise ValueError(f"strategies.{name}.match is {match!r}, which has images of two sizes; name another one")
            if other.match and self.strategies.get(other.match, other).kind == "end_to_end":
                raise ValueError(
                    f"strategies.{name}.match is {match!r}, which is matched to {other.match!r} itself; name that one"
                )
        seen = [name]
        while self.is_matched(seen[-1]):
            seen.append(self.strategies[seen[-1]].match)
            if seen[-1] in seen[:-1]:
                circle = " → ".join(seen[seen.index(seen[-1]) :])
                raise ValueError(f"match goes round in a circle: {circle}; give one of them its epochs")

    def _check_fits(self, training: TrainingSettings, where: str) -> None:
        """Raise ValueError when a recipe asks for what these images or this many devices cannot give."""
        unused = ["shift"] if self.data.is_streamed else ["randaugment", "color_jitter", "erase"]
        for field in unused:
            if getattr(training, field):
                kind = "streamed" if self.data.is_streamed else "held in memory"
                raise ValueError(f"{field} in {where}: not for images that are {kind} (data.source {self.data.source!r})")
        devices, micro = self.machine.team_size, training.micro_batch
        if training.batch_size % ((micro or 1) * devices):
            of = f"{devices} ({self.machine.nodes} nodes)" if self.machine.nodes > 1 else f"{devices}"
            message = f"batch_size {training.batch_size} in {where} is not divisible by machine.devices {of}"
            raise ValueError(message + (f" times micro_batch {micro}" if micro else ""))
        if micro and training.batch_size > micro * devices and self.machine.compile in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"machine.compile {self.machine.compile!r} captures CUDA graphs, which overwrite gradients that micro-batches "
                f"add up (micro_batch {micro} in {where}); use compile: default, or a batch_size of {micro * devices}"
            )
        if (training.mixup or training.cutmix) and (micro or training.batch_size // devices) % 2:
            raise ValueError(
                f"batch_size {training.batch_size} in {where} gives each device an odd number, which mixup cannot pair"
            )

    def strategy(self, name: str) -> StrategySettings:
        """Return the strategy of that name; SettingsError with the nearest names if there is none."""
        if name not in self.strategies:
            raise SettingsError(f"unknown strategy {name!r}; {nearest(name, self.strategies)}")
        return self.strategies[name]

    def training_of(self, strategy: str, phase: str, epochs: float | None = None) -> TrainingSettings:
        """Return the training settings of a phase of a strategy: merged, and what is relative in plain numbers.

        `epochs` are given where the phase's length follows from the cost of another strategy. Raises SettingsError for
        values that do not go together.
        """
        way, own = self.strategy(strategy), {}  # own: what is set for this phase
        for layer in (self.phases, way.phases):
            own |= getattr(layer, phase).model_dump(exclude_unset=True)  # an explicit null counts
        merged = self.training.model_dump() | own | ({} if epochs is None else {"epochs": epochs})
        if phase in (way.warmup_share or {}) and "warmup_epochs" not in own:
            merged["warmup_epochs"] = round(way.warmup_share[phase] * merged["epochs"], 3)
        try:
            training = TrainingSettings.model_validate(merged)
        except ValidationError as error:
            raise SettingsError(f"settings of phase {phase} of strategy {strategy}: {error_message(error)}") from None
        if phase in (way.lr_scale or {}) and "lr" not in own:
            training = training.model_copy(update={"lr": way.lr_scale[phase] * training.lr})
            lowest = min(training.min_lr, training.peak_lr)  # the cosine must not end above its beginning
            training = training.model_copy(update={"min_lr": lowest})
        return training

    def mat_of(self, strategy: str, phase: str) -> MATSettings | None:
        """Return the settings of Modular Adaptive Training in a phase of a strategy; none where everything trains."""
        changes = self.strategy(strategy).mat
        in_phases = self.strategy(strategy).mat_phases or [p for p in self.strategy(strategy).trains if p != "meta"]
        if changes is None or phase not in in_phases:
            return None
        try:
            return MATSettings.model_validate(self.mat.model_dump() | changes.model_dump(exclude_unset=True))
        except ValidationError as error:
            raise SettingsError(f"mat of strategy {strategy}: {error_message(error)}") from None

    def is_matched(self, name: str) -> bool:
        """Whether the length of this strategy follows from the cost of another one."""
        strategy = self.strategies.get(name)
        if strategy is None or strategy.match is None:
            return False
        if strategy.kind == "deep_incubation":  # all of them share `phases`, so only its own epochs speak against it
            return strategy.phases.finetune.epochs is None
        if strategy.match_on == "critical_path":  # likewise: `phases` says how long plain end-to-end training is
            return strategy.phases.end_to_end.epochs is None
        return (self.phases.end_to_end.epochs, strategy.phases.end_to_end.epochs) == (None, None)

    @property
    def is_variant(self) -> bool:
        """Whether an override can have made other results than the file alone."""
        neutral = ("machine.", "run=", "description=")
        return any(not override.replace(" ", "").startswith(neutral) for override in self.overrides)

    def digest(self) -> str:
        """Return the hash that names an experiment: of all settings that can change a result.

        Of the known strategies only those that were changed count, so that a new one makes no other experiment of old runs.
        """
        sections = self.model_dump(mode="json", include={"data", "model", "partition", "precision", "training", "mat"})
        own = {name: _as_set(strategy) for name, strategy in self.strategies.items() if not strategy.is_as_named(name)}
        for name, values in own.items():  # runs from before a known strategy had these keep their folder
            for later in ("lr_scale", "warmup_share"):
                if values.get(later) == STRATEGIES.get(name, {}).get(later):
                    values.pop(later, None)
        return digest({"format": FORMAT, **sections, "phases": _as_set(self.phases), "strategies": own})


def _as_set(changes: Frozen) -> dict[str, Any]:
    """Return only what was set: in changes an explicit null is not the same as nothing."""
    return changes.model_dump(mode="json", exclude_unset=True)


class PhaseSettings(Frozen):
    """Everything that one phase's result depends on, resolved; `config.json` in its folder. Its hash is its identity."""

    phase: PhaseName
    seed: Seed
    data: DataSettings
    model: ModelSettings
    target_depths: list[int]
    meta_depths: list[int]
    module_index: int | None = None  # 0-based; incubate only
    start: Literal["random", "stack", "identity"] | None = None  # incubate; assemble, where nothing was incubated
    inherit_stem: bool = False
    inherit_head: bool = False
    small_images: bool = False  # end_to_end only: the first part of a training that goes on at the network's own size
    imitate: bool = False  # incubate only: the meta module's features instead of labels
    precision: Literal["float32", "bfloat16"] = "float32"
    training: TrainingSettings | None = None  # none for assemble, and for a meta model that is read from a file
    mat: MATSettings | None = None  # with the kind of units resolved
    inputs: dict[str, str] = {}  # hashes of the phases it starts from; "weights": of a file
    format: int = FORMAT

    def digest(self) -> str:
        """Return the hash of all that decides the result and its record."""
        values = self.model_dump(mode="json")
        later_fields = (
            (values, "mat"),
            (values, "imitate"),
            (values, "small_images"),
            (values["data"], "pad"),
            (values["data"], "resize"),
        )
        for section, later in later_fields:  # what was trained before there were these stays good
            if not section[later]:
                del section[later]
        return digest(values)


def digest(value: Any) -> str:
    """Return 12 hex digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def error_message(error: ValidationError, model: type[Frozen] = Settings) -> str:
    """Say in a line or two what is wrong with values of a model: field, value, and what would be right."""
    lines = []
    for item in error.errors()[:3]:
        field = ".".join(str(part) for part in item["loc"] if part != "[key]")
        field = shortened(field)
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown field {field!r}; {nearest(str(item['loc'][-1]), _fields_at(item['loc'][:-1], model))}")
        elif item["type"] == "missing":
            lines.append(f"{field} is missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = "" if isinstance(item["input"], dict) else f" is {shortened(repr(item['input']))}:"
            lines.append(f"{field}{value} {message}".strip())
    return "; ".join(dict.fromkeys(lines))


def _fields_at(loc: tuple, model: Any) -> list[str]:
    """Return the field names of a model at a place such as ("phases", "meta")."""
    for part in loc:
        if model is Settings and part == "strategies":
            continue
        field = getattr(model, "model_fields", {}).get(part)
        model = field.annotation if field is not None else StrategySettings
        model = next((kind for kind in get_args(model) if hasattr(kind, "model_fields")), model)  # of "that or none"
    return list(getattr(model, "model_fields", {}))
