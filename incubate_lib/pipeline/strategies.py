"""Strategies as small graphs of phases: what runs, in what order, in which folder, from which settings.

Planning checks everything that can be checked before anything is trained or written. Phases with the same settings
(the meta model of several strategies) are one node.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from incubate_lib.config import (
    DataSettings,
    MATSettings,
    ModelSettings,
    PhaseSettings,
    Settings,
    SettingsError,
    TrainingSettings,
    data_folder,
    error_message,
    load_settings,
    refuse,
)
from incubate_lib.config.members import PHASES, STRATEGIES, TASKS
from incubate_lib.config.strategies import KNOWN, StrategySettings
from incubate_lib.data.schedule import steps_per_epoch
from incubate_lib.phases.facts import SEED, Facts, usual_units, weights_of
from incubate_lib.phases.job import FILE, Job, read_job
from incubate_lib.phases.kinds import Phase
from incubate_lib.pipeline.experiment import Experiment, check_asked
from incubate_lib.pipeline.graph import Node, Plan, closure, cost, longest
from incubate_lib.pipeline.recorded import recorded, recorded_plans
from incubate_lib.training.runs import PhaseFolder


def plan(
    settings: Settings, strategies: Sequence[str] | None = None, seeds: Sequence[int] = (0,), facts: Facts | None = None
) -> Plan:
    """Resolve settings to a graph of phases; SettingsError for anything that could not be trained.

    `facts` are those of these images and networks, if they are known already; else they are measured.
    """
    strategies = list(strategies or settings.run)
    check_asked(settings, strategies, seeds)
    experiment = Experiment.of(settings, facts)
    experiment.check_writable()
    wanted = [(name, seed) for seed in seeds for name in strategies]
    if facts is None and (known := recorded(experiment, wanted)):
        return known
    nodes: dict[str, Node] = {}
    finals = {(name, seed): Builder(experiment, nodes, name, seed).build() for name, seed in wanted}
    used = {node.key for node in closure(finals.values())}
    return Plan(experiment, [node for key, node in nodes.items() if key in used], finals)


def open_phase(
    phase: str,
    preset: str = "digits",
    overrides: Sequence[str] = (),
    *,
    strategy: str | None = None,
    seed: int = 0,
    module_index: int | None = None,
    path: str = "",
) -> Node:
    """Return one phase of one strategy, for a notebook: `open_phase("incubate", module_index=2).run()`.

    Or a resolved one by the `path` of its file, relative to the data folder; nothing else may be given with it.
    """
    if path:
        ways = {name: StrategySettings.model_validate(known) for name, known in KNOWN.items()}
        own = next((name for name, way in ways.items() if phase in way.all_phases), None)  # a notebook's default
        others = preset != "digits" or overrides or seed or module_index or strategy not in (None, own)
        refuse(others, f"phase is {path!r}, which says all; leave preset, overrides, seed, strategy and module_index as they are")
        return _resolved(phase, path)
    settings = load_settings(preset, overrides)
    if strategy is None:
        names = (name for name in (*settings.run, *settings.strategies) if phase in settings.strategies[name].all_phases)
        strategy = next(names, settings.run[0])
    whole = plan(settings, [strategy], [seed])
    nodes = [n for n in whole.nodes if phase in (n.settings.phase, n.settings.seeded_as)]
    found = [n for n in nodes if n.settings.module_index == module_index]
    if not found:
        modules = [n.settings.module_index for n in nodes]
        if any(index is not None for index in modules):
            raise SettingsError(f"module_index is {module_index}; it must be one of {modules}")
        raise SettingsError(f"strategy {strategy!r} has no phase {phase!r}")
    return replace(found[0], whole=whole)


def _resolved(phase: str, path: str) -> Node:
    """Return a phase from its file, in the run that has it trained if that is recorded; SettingsError for another kind's."""
    job = read_job(path)
    kinds = job.settings.phase, job.settings.seeded_as
    refuse(phase not in kinds, f"{path} is a phase {kinds[0]!r}, and this is for phases {phase!r}")
    for whole in recorded_plans(data_folder() / "runs" / job.run):
        for node in whole.nodes:
            if node.digest == job.digest:
                return replace(node, job=job)
    return _alone(job)


def _alone(job: Job) -> Node:
    """Return a phase as its file and those of the phases before it say it: of a study, which has many settings."""
    inputs = {name: _alone(read_job(PhaseFolder.of(digest).path / FILE)) for name, digest in job.settings.inputs.items()
              if name != "weights"}  # fmt: skip
    return Node(job.title, job, Experiment.of_study(job.run), inputs)


def with_matched(node: Node) -> Plan:
    """Return the plan of a phase's strategy, and of the one that its length follows from, as far as that is known."""
    end = (node.strategy, node.settings.seed)
    settings = node.experiment.settings
    if settings is None:
        return Plan(node.experiment, closure([node]), {end: node})
    wanted = [(name, end[1]) for name in (settings.strategies[node.strategy].match, node.strategy) if name]
    names = [name for name, _ in wanted]
    return recorded(node.experiment, wanted) or plan(settings, names, [end[1]], facts=node.facts)


class Builder:
    """What a kind of strategy makes its phases with: one strategy with one seed. `nodes` are those of all strategies by key,
    each once."""

    def __init__(self, experiment: Experiment, nodes: dict[str, Node], name: str, seed: int) -> None:
        self.experiment, self.nodes, self.name, self.seed = experiment, nodes, name, seed
        self.settings, self.facts = experiment.settings, experiment.facts
        self.own, self.is_matched = self.settings.strategy(name), self.settings.is_matched(name)

    def build(self) -> Node:
        """Add the nodes of the strategy and return the last of them."""
        return STRATEGIES[self.own.kind].build(self)

    # -- how long a phase lasts

    def matched(self) -> Node:
        """Return the last node of the strategy that this one is matched to."""
        return Builder(self.experiment, self.nodes, self.own.match, self.seed).build()

    @property
    def other(self) -> StrategySettings:
        """The strategy that this one is matched to."""
        return self.settings.strategy(self.own.match)

    def training(self, phase: str, epochs: float | None = None) -> TrainingSettings:
        """Return the settings of a phase, by the name that settings have for it."""
        return self.settings.training_of(self.name, phase, epochs)

    def as_many_epochs(self, phase: str) -> TrainingSettings:
        """Return the settings of a phase that lasts its share of the epochs of the last phase of the one it is matched to."""
        return self._of_length(phase, self.own.budget * self.matched().settings.training.epochs)

    def budget(self) -> float:
        """Return the training FLOPs that the strategy has: its share of those of the one it is matched to, or of what K
        workers do in that one's time."""
        final = self.matched()
        if self.own.get("match_on") == "critical_path":
            nodes = closure([final])
            flops = {node.key: node.flops for node in nodes}
            return self.own.budget * len(self.facts.target_depths) * longest(nodes, flops)[final.key]
        return self.own.budget * self.spent(final)

    def spent(self, node: Node) -> int:
        """Return the training FLOPs of a phase and of all that it starts from."""
        return sum(before.flops for before in closure([node]))

    def cost(self, training: TrainingSettings, flops_per_image: int) -> int:
        """Return the training FLOPs of a phase with these settings."""
        return cost(training, flops_per_image, self.facts.num_images)

    def lasting(self, phase: str, flops: float, per_image: int) -> TrainingSettings:
        """Return the settings of a phase that lasts as long as costs so many FLOPs."""
        training = self.training(phase)
        self.check_batch(phase, training)
        steps = flops / (per_image * training.batch_size)
        epochs = steps / steps_per_epoch(self.facts.num_images, training.batch_size)
        if epochs <= 0:
            raise SettingsError(f"{self._as_long}, but its other phases cost more than that already")
        return self._of_length(phase, round(epochs, 3))

    @property
    def _as_long(self) -> str:
        return f"strategies.{self.name} is as long as {self.own.match} costs"

    def _of_length(self, phase: str, epochs: float) -> TrainingSettings:
        try:
            return self.training(phase, epochs)
        except SettingsError:  # nothing else depends on the length
            warmup = f"its warmup_epochs is {self.training(phase).warmup_epochs:g}; set phases.{phase}.warmup_epochs"
            raise SettingsError(f"{self._as_long}, which leaves its phase {phase} {epochs:.3g} epochs, but {warmup}") from None

    # -- on what it trains

    def small_images(self) -> dict[str, Any]:
        """Return model and data for the small images that the strategy begins with; none are given where it does not.

        SettingsError where the network cannot have them.
        """
        if not self.own.get("low_resolution"):
            return {}
        size = self.facts.low_resolution.get(self.name)
        if size is None:
            too_small = "this network's images are too small to begin with smaller ones"
            why = self.facts.unsupported.get(self.name, too_small)
            raise SettingsError(f"strategies.{self.name} is not possible: {why}")
        model, data = self.settings.model.model_copy(update={"img_size": size}), self.settings.data
        if not data.is_streamed:  # those are brought to any size anyway
            data = data.model_copy(update={"resize": size})
        return {"model": model, "data": data}

    # -- one phase

    def node(
        self,
        kind: str,
        training: TrainingSettings | None,
        inputs: dict[str, Node] | None = None,
        *,
        key: str | None = None,
        weights: str | None = None,
        model: ModelSettings | None = None,
        data: DataSettings | None = None,
        **options: Any,
    ) -> Node:
        """Add a phase of a kind, with the options of that kind.

        `key` is its folder below that of the seed, by default one of the strategy's; `model` and `data` are given where they
        are not those of the settings. What a phase does not depend on is no part of its identity.
        """
        phase, inputs, facts = PHASES[kind], inputs or {}, self.facts
        given = {}
        if weights:
            weights = weights.replace(SEED, str(self.seed))
            depths = facts.target_depths, facts.meta_depths
            found = facts.weights.get(weights) or weights_of(self.settings, self.name, weights, facts.outputs, *depths)
            given = {"weights": found}
        cuts = self.settings.partition.cuts if self.settings.partition else None
        partition = {"target_depths": facts.target_depths, "meta_depths": facts.meta_depths, "cuts": cuts or []}
        mat = None
        if training:
            self.check_batch(phase.group, training)
            if unmeant := phase.unmeant(training):
                raise SettingsError(f"strategies.{self.name}: phases.{phase.group} has no use for {unmeant}")
            mat = self.settings.mat_of(self.name, phase.group)
        settings = PhaseSettings(
            phase=kind,
            group="" if phase.group == kind else phase.group,
            seed=self.seed,
            task=self.settings.task,
            data=data or self.settings.data,
            **phase.network(model or self.settings.model, partition, facts.takes_depth),
            options=phase.options.model_validate(options).model_dump(mode="json"),
            precision=self.settings.precision,
            training=training,
            mat=mat and self._with_units(mat, phase, training),
            inputs={name: node.digest for name, node in inputs.items()} | given,
        )
        key = f"seed-{self.seed}/" + (key or f"{self.name}/{kind}")
        run = {"machine": self.settings.machine, "strategy": self.name, "run": self.experiment.path.name}
        file = {"weights": weights} if weights else {}
        node = Node(key, Job(settings=settings, facts=facts, **run, **file), self.experiment, inputs)
        return self.nodes.setdefault(key, node)

    def _with_units(self, mat: MATSettings, phase: Phase, training: TrainingSettings) -> MATSettings:
        """Return the settings with the kind of units resolved; SettingsError if the network has none of that kind."""
        found, machine = self.facts.units, self.settings.machine
        units = mat.units or usual_units(found)
        kinds = ", ".join(f"{kind} ({count})" for kind, count in found.items())
        has, reason = kinds or "no units that are known here", self.facts.unsupported_units.get(units)
        strategy, few = f"strategy {self.name}", self._only()
        kind = f"mat.units is {units!r} in {strategy}"
        lasts = f"phase {phase.group} of {strategy} lasts {training.epochs:g} epochs: nothing would ever rest"
        is_short = mat.warmup_epochs >= training.epochs
        control = f"mat.slow_every of {strategy} is a control for one device without compilation"
        compiled = f"machine.nodes is {machine.team_size} and machine.compile {machine.compile!r}"
        # where there are sublayers of attention, convolutions are of the stem
        in_module_1 = phase.has_modules and units in ("conv_layers", "filters") and usual_units(found) != "conv_layers"
        is_sgd = training.optimizer == "sgd"
        wrapped = machine.team_size > 1 or machine.compile != "off"  # and compiled at every update
        problems = {
            f"{kind}, but model.name {self.settings.model.name!r} has none; it has: {has}": units not in found,
            f"mat.units {units!r} of {strategy} is not possible with this network: {reason}": reason,
            f"{kind}, but only module 1 has a convolution; use {usual_units(found)}": in_module_1,
            f"mat.warmup_epochs is {mat.warmup_epochs:g}, but {lasts}": is_short,
            f"{control}, but machine.devices × {compiled}": mat.slow_every and wrapped,
            f"mat.slow_every of {strategy} is made for AdamW's moments, but its optimizer is sgd": mat.slow_every and is_sgd,
            f"mat.probe is {mat.probe}, {few}": mat.probe > self.facts.num_images,
            # norms before a layer of which all rows rest get no gradient, which DistributedDataParallel waits for
            f"mat.stop_error of {strategy} with units {units!r} is for one device, but machine.devices × machine.nodes is "
            f"{machine.team_size}": mat.stop_error and units in ("heads", "filters") and machine.team_size > 1,
        }
        for problem, is_there in problems.items():
            if is_there:
                raise SettingsError(problem)
        try:
            return MATSettings.model_validate(mat.model_dump() | {"units": units})
        except ValidationError as error:
            raise SettingsError(f"mat of {strategy}: {error_message(error)}") from None

    def check_batch(self, phase: str, training: TrainingSettings) -> None:
        what = f"training.batch_size is {training.batch_size} in phase {phase}"
        refuse(training.batch_size > self.facts.num_images, f"{what}, {self._only()}")

    def _only(self) -> str:
        return f"but there are only {self.facts.num_images} training {TASKS[self.settings.task].samples}"
