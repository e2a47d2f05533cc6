"""Settings: the sections put together, with the checks across them, and what they mean for one phase.

Three layers make the training settings of one phase: `training` (every phase) ← `phases.<phase>` ←
`strategies.<name>.phases.<phase>`. Where only the first of them says a learning rate or a warm-up, a strategy may have
something relative to it instead (`lr_scale`, `warmup_share`). What a result depends on is in its phase's hash; `machine`
says only how it is computed, and is not.
"""

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from incubate_lib.config.errors import SettingsError, nearest, refuse, validated
from incubate_lib.config.members import STRATEGIES
from incubate_lib.config.phase import FORMAT, TASK, as_ever, digest
from incubate_lib.config.recipes import TrainingSettings, expanded
from incubate_lib.config.sections import (
    ARRAYS,
    DataSettings,
    Frozen,
    MachineSettings,
    MATSettings,
    ModelSettings,
    Name,
    PartitionSettings,
)
from incubate_lib.config.strategies import KNOWN, PhaseChanges, StrategyName, StrategySettings, as_set, is_cut

DEFAULT_MACHINE = MachineSettings()


class Settings(Frozen):
    """Everything one experiment needs. Presets and users' files have exactly these fields."""

    name: Name  # of the run; of a file its own name, if left out
    description: str = ""  # a line for people
    task: str = TASK  # what is learned
    data: DataSettings = DataSettings()  # which images, see below
    model: ModelSettings = ModelSettings()  # the network, see below
    partition: PartitionSettings | None = None  # none: the network is not cut, and any timm model will do
    # bfloat16: autocast; weights and optimiser stay float32
    precision: Literal["float32", "bfloat16"] = "float32"
    training: TrainingSettings = TrainingSettings()  # the recipe of every phase, see below
    phases: PhaseChanges = {}  # what differs in a phase: meta, incubate, finetune, end_to_end
    mat: MATSettings = MATSettings()  # of the strategies that have Modular Adaptive Training
    strategies: dict[StrategyName, SerializeAsAny[StrategySettings]] = {}  # by name: what differs, or all of a new one
    # strategies run by default
    run: list[str] = Field(min_length=1, default=["end_to_end", "deep_incubation", "recommended"])
    machine: MachineSettings = DEFAULT_MACHINE  # how phases are computed, see below
    overrides: list[str] = []  # written by the workbook, for the record: the values of --set

    @model_validator(mode="before")
    @classmethod
    def _without_names_of_recipes(cls, values: Any) -> Any:
        return expanded(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _whole(self) -> "Settings":
        if self.partition is None:
            cut = [name for name in self.run if is_cut(name)]
            cut += [name for name, strategy in self.strategies.items() if strategy.is_cut]
            needs = f"which {cut[0]} needs: give num_modules or target_depths" if cut else ""
            refuse(cut, f"partition is missing, {needs}")
        elif self.model.depth and not self.partition.cuts:
            self.partition.depths(self.model.depth)
        taken = "that name is taken, for the folder of the shared meta model"
        refuse("meta" in self.strategies, f"strategies.meta: {taken}")
        alike: dict[str, str] = {"meta": "the folder of the shared meta model, meta,"}
        own = [name for name, strategy in self.strategies.items() if not strategy.is_as_named(name)]
        for name in (*self.run, *own):  # what is built in and not run has no folder
            other = alike.setdefault(name.lower(), name)
            case = "differ in case only, which not every file system tells apart"
            refuse(other != name, f"strategies.{name} and {other} {case}")
        source = self.data.source
        fetched = source in ARRAYS or source.startswith(("torch/", "hfds/"))
        sets = "machine.download is for torchvision's and Hugging Face's sets"
        refuse(self.machine.download and not fetched, f"{sets}, not for data.source {source!r}")
        for name, strategy in self.strategies.items():
            if strategy.get("match"):
                self._check_match(name)
            budget = "budget" in strategy.model_fields_set and not self.is_matched(name)
            said = f"strategies.{name}.budget has no meaning: phases say already how many epochs it lasts"
            refuse(budget, said)
            for phase in strategy.trains:
                self.check_fits(self.training_of(name, phase), f"phase {phase} of strategy {name}")
                adaptive = self.mat_of(name, phase)  # raises where changes do not fit
                last = adaptive and adaptive.outputs == "last" and not self.data.is_text
                refuse(last, f"mat.outputs 'last' in strategy {name}: data.source {source!r} has no last token; use sum or all")
        return self

    def _check_match(self, name: str) -> None:
        strategy, match = self.strategies[name], self.strategies[name].get("match")
        other, said = self.strategies.get(match), f"strategies.{name}.match is {match!r}"
        refuse(other is None, f"{said}; {nearest(match, self.strategies)}")
        strange = not other.can_be_matched or other.mat is not None or match == name
        kinds = " or ".join(kind for kind in STRATEGIES if STRATEGIES[kind].settings.can_be_matched)
        refuse(strange, f"{said}; name a {kinds} strategy without MAT")
        strategy.check_match(said, other, self.strategies)
        seen = [name]
        while self.is_matched(seen[-1]):
            seen.append(self.strategies[seen[-1]].get("match"))
            circle = f"match goes round in a circle: {' → '.join(seen[seen.index(seen[-1]) :])}"
            refuse(seen[-1] in seen[:-1], f"{circle}; give one of them its epochs")

    def check_fits(self, training: TrainingSettings, where: str) -> None:
        """Raise SettingsError when a recipe asks for what these images or this many devices cannot give."""
        streamed, machine = self.data.is_streamed, self.machine
        source, is_text = f"(data.source {self.data.source!r})", self.data.is_text
        images = f"{'text' if is_text else 'images that are ' + ('streamed' if streamed else 'held in memory')} {source}"
        of_images = ["hflip", "mixup", "cutmix", "shift"] if is_text else []
        for field in ["shift"] if streamed else [*of_images, "randaugment", "color_jitter", "erase"]:
            refuse(getattr(training, field), f"{field} in {where}: not for {images}")
        batch, devices, micro = training.batch_size, machine.team_size, training.micro_batch
        batch_of, whole = f"batch_size {batch} in {where}", (micro or 1) * devices
        many = f"{devices} ({machine.nodes} nodes)" if machine.nodes > 1 else f"{devices}"
        many += f" times micro_batch {micro}" if micro else ""
        refuse(batch % whole, f"{batch_of} is not divisible by machine.devices {many}")
        captured = micro and batch > whole and machine.compile in ("reduce-overhead", "max-autotune")
        refuse(
            captured,
            f"machine.compile {machine.compile!r} captures CUDA graphs, which overwrite the gradients that micro-batches "
            f"accumulate (micro_batch {micro} in {where}); use compile: default, or a batch_size of {whole}",
        )
        mixed, taken = training.mixup or training.cutmix, micro or batch // devices
        refuse(mixed and taken % 2, f"{batch_of} gives each device an odd number, which mixup cannot pair")
        drawn = batch // (training.mixup_draws or batch // taken)  # images of one draw
        apart = f"{batch_of} has {drawn} images a draw of mixup (mixup_draws {training.mixup_draws}), and {taken} a micro-batch"
        refuse(drawn % taken and taken % drawn, f"{apart}; one must divide the other")

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
            if phase in layer:
                own |= layer[phase].model_dump(exclude_unset=True)  # an explicit null counts
        merged = self.training.model_dump() | own | ({} if epochs is None else {"epochs": epochs})
        shares, scales = way.get("warmup_share") or {}, way.get("lr_scale") or {}
        if phase in shares and "warmup_epochs" not in own:
            merged["warmup_epochs"] = round(shares[phase] * merged["epochs"], 3)
        training = validated(TrainingSettings, merged, f"settings of phase {phase} of strategy {strategy}")
        if phase in scales and "lr" not in own:
            training = training.model_copy(update={"lr": scales[phase] * training.lr})
            lowest = min(training.min_lr, training.peak_lr)  # the cosine must not end above its beginning
            training = training.model_copy(update={"min_lr": lowest})
        return training

    def mat_of(self, strategy: str, phase: str) -> MATSettings | None:
        """Return the settings of Modular Adaptive Training in a phase of a strategy; none where everything trains."""
        way = self.strategy(strategy)
        if way.mat is None or phase not in way.adapts:
            return None
        merged = self.mat.model_dump() | way.mat.model_dump(exclude_unset=True)
        return validated(MATSettings, merged, f"mat of strategy {strategy}")

    def is_matched(self, name: str) -> bool:
        """Whether the length of this strategy follows from the cost of another one."""
        strategy = self.strategies.get(name)
        return bool(strategy and strategy.get("match")) and not strategy.has_epochs(self.phases)

    def digest(self) -> str:
        """Return the hash that names an experiment: of all settings that can change a result.

        Of the known strategies only those that were changed count, so that a new one makes no other experiment of old runs.
        """
        sections = {name: as_ever(getattr(self, name), name) for name in ("data", "model", "training", "mat")}
        sections["data"] |= self.data.model_dump(mode="json", include={"pad", "resize"})  # which experiments always had
        sections |= {"precision": self.precision, "partition": self.partition and as_ever(self.partition, "partition")}
        own = {name: as_set(strategy) for name, strategy in self.strategies.items() if not strategy.is_as_named(name)}
        for name, values in own.items():  # runs from before a known strategy had these keep their folder
            for later in ("lr_scale", "warmup_share"):
                if values.get(later) == KNOWN.get(name, {}).get(later):
                    values.pop(later, None)
        phases = {name: as_set(changes) for name, changes in self.phases.items()}
        if self.task != TASK:
            sections["task"] = self.task
        return digest({"format": FORMAT, **sections, "phases": phases, "strategies": own})
