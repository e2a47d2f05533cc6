"""Strategies as small graphs of phases: what runs, in what order, in which folder, from which settings.

    end_to_end            end_to_end; with low_resolution: end_to_end (small images) ─→ finetune
    deep_incubation*      meta ─→ incubate-0 … incubate-K-1 ─→ assemble ─→ finetune
    stacking, growing     meta ─→ assemble ─→ finetune; random_modules: without meta
    finetune              finetune, from a file of weights

Planning checks everything that can be checked before anything is trained or written. Phases with the same settings
(the meta model of several strategies) are one node.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from incubate_lib.config import (
    LARGEST_SEED,
    MATSettings,
    PhaseSettings,
    Settings,
    SettingsError,
    TrainingSettings,
    error_message,
    load_settings,
)
from incubate_lib.data.schedule import steps_per_epoch, total_steps
from incubate_lib.phases.facts import Facts
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.pipeline.graph import Node, Plan, closure, longest


def plan(
    settings: Settings, strategies: Sequence[str] | None = None, seeds: Sequence[int] = (0,), facts: Facts | None = None
) -> Plan:
    """Resolve settings to a graph of phases; SettingsError for anything that could not be trained.

    `facts` are those of these images and networks, if they are known already; else they are measured.
    """
    strategies = list(strategies or settings.run)
    for name, values in {"seed": list(seeds), "strategy": strategies}.items():
        doubled = sorted({str(v) for v in values if values.count(v) > 1})
        if doubled:
            raise SettingsError(f"{name} {', '.join(doubled)} is given twice")
    if any(seed < 0 for seed in seeds):
        raise SettingsError(f"seed {min(seeds)} is negative; seeds are 0 or larger")
    if any(seed > LARGEST_SEED for seed in seeds):
        raise SettingsError(f"a seed is larger than {LARGEST_SEED}, the largest there is")
    for name in strategies:
        settings.strategy(name)
    experiment = Experiment.of(settings, facts)
    experiment.check_writable()
    built = _Strategies(settings, experiment)
    finals = {(name, seed): built.strategy(name, seed) for seed in seeds for name in strategies}
    wanted = {node.key for node in closure(finals.values())}
    nodes = [node for key, node in built.nodes.items() if key in wanted]
    return Plan(experiment, nodes, finals, {node.key: built.flops(node) for node in nodes})


def open_phase(
    phase: str,
    preset: str = "digits",
    overrides: Sequence[str] = (),
    *,
    strategy: str | None = None,
    seed: int = 0,
    module_index: int | None = None,
) -> Node:
    """Return one phase of one strategy, for a notebook: `open_phase("incubate", module_index=2).run()`."""
    settings = load_settings(preset, overrides)
    if strategy is None:
        kind = "end_to_end" if phase == "end_to_end" else "deep_incubation"
        strategy = next((n for n in settings.run if settings.strategies[n].kind == kind), kind)
    nodes = plan(settings, [strategy], [seed]).nodes
    found = [n for n in nodes if n.settings.phase == phase and n.settings.module_index == module_index]
    if not found:
        modules = [n.settings.module_index for n in nodes if n.settings.phase == phase]
        if phase == "incubate" and modules:
            raise SettingsError(f"module_index is {module_index}; it must be one of {modules}")
        raise SettingsError(f"strategy {strategy!r} has no phase {phase!r}")
    return found[0]


class _Strategies:
    """Builds the nodes of strategies, each once."""

    def __init__(self, settings: Settings, experiment: Experiment) -> None:
        self.settings, self.experiment, self.facts = settings, experiment, experiment.facts
        self.nodes: dict[str, Node] = {}

    def strategy(self, name: str, seed: int) -> Node:
        """Add the nodes of a strategy and return the last of them."""
        return getattr(_Strategy(self, name, seed), self.settings.strategy(name).kind)()

    def flops(self, node: Node) -> int:
        """Return the training FLOPs of a whole phase."""
        training = node.settings.training
        return 0 if training is None else self.cost(training, self.facts.flops_of(node.settings))

    def cost(self, training: TrainingSettings, flops_per_image: int) -> int:
        steps = total_steps(training.epochs, self.facts.num_images, training.batch_size)
        return flops_per_image * training.batch_size * steps


class _Strategy:
    """One strategy with one seed: its kinds are the methods without an underscore, each returns its last node."""

    def __init__(self, built: _Strategies, name: str, seed: int) -> None:
        self.built, self.name, self.seed = built, name, seed
        self.settings, self.facts, self.own = built.settings, built.facts, built.settings.strategy(name)
        self.is_matched = self.settings.is_matched(name)

    def end_to_end(self) -> Node:
        """The whole network at once; with `low_resolution` on small images first."""
        training = self._training("end_to_end")
        other = self.settings.strategy(self.own.match).kind if self.is_matched else None
        if other == "end_to_end" and not self.own.low_resolution:
            epochs = self.built.strategy(self.own.match, self.seed).settings.training.epochs
            training = training.model_copy(update={"epochs": self.own.budget * epochs})
        elif self.is_matched:
            training = self._lasting("end_to_end", self._budget(), self.facts.flops_per_image["target"])
        if self.own.low_resolution:
            return self._low_resolution(training)
        return self._node("end_to_end", training, key=self.name)

    def _low_resolution(self, training: TrainingSettings) -> Node:
        """Spend a share of what `training` costs on small images, the rest at the network's own size."""
        size, per_image = self.facts.low_resolution.get(self.name), self.facts.flops_per_image
        if size is None:
            too_small = "this network's images are too small to begin with smaller ones"
            why = self.facts.unsupported.get(self.name, too_small)
            raise SettingsError(f"strategies.{self.name} is not possible: {why}")
        self._check_batch("end_to_end", training)
        budget = self.built.cost(training, per_image["target"])
        model, data = self.settings.model.model_copy(update={"img_size": size}), self.settings.data
        if not data.is_streamed:  # those are brought to any size anyway
            data = data.model_copy(update={"resize": size})
        share = self.own.low_resolution.share
        training = self._lasting("end_to_end", share * budget, per_image[f"target-{size}"])
        small = self._node("end_to_end", training, model=model, data=data, small_images=True)
        training = self._lasting("finetune", budget - self.built.flops(small), per_image["target"])
        return self._node("finetune", training, {"small_images": small})

    def deep_incubation(self) -> Node:
        """A meta model, target modules that learn in its place or not at all, and all of them together."""
        own, facts = self.own, self.facts
        if reason := facts.unsupported.get(own.start):
            raise SettingsError(f"strategies.{self.name}.start {own.start!r} is not possible: {reason}")
        start = {field: getattr(own, field) for field in ("start", "inherit_stem", "inherit_head")}
        budget = self._budget() if self.is_matched else None
        inputs = {}
        if "meta" in own.trains or own.weights:
            training = None if own.weights else self._share("meta", budget, facts.flops_per_image["meta"])
            changes = own.phases.meta.model_fields_set or self.settings.mat_of(self.name, "meta")
            relative = (own.shares if budget else None, own.lr_scale, own.warmup_share)
            is_own = own.weights or changes or any("meta" in (part or {}) for part in relative)
            key = f"{self.name}/meta" if is_own else "meta"
            inputs["meta"] = self._node("meta", training, key=key, weights=own.weights)
        if own.incubate != "none":
            kind = "imitate" if own.incubate == "features" else "incubate"
            per_image = sum(flops for key, flops in facts.flops_per_image.items() if key.startswith(kind))
            training, how = self._share("incubate", budget, per_image), start | {"imitate": kind == "imitate"}
            modules = {}
            for i in range(len(facts.target_depths)):
                how |= {"key": f"{self.name}/incubate-{i}", "module_index": i}
                modules[f"module-{i}"] = self._node("incubate", training, inputs, **how)
            inputs, start = modules, {}
        assembled = self._node("assemble", None, inputs, **start)
        training = self._training("finetune")
        if budget:
            rest = budget - sum(map(self.built.flops, closure([assembled])))
            training = self._lasting("finetune", rest, facts.flops_per_image["target"])
        return self._node("finetune", training, {"assemble": assembled})

    def finetune(self) -> Node:
        """A trained network from a file, trained on."""
        return self._node("finetune", self._training("finetune"), key=self.name, weights=self.own.weights)

    # -- how long a phase lasts

    def _training(self, phase: str, epochs: float | None = None) -> TrainingSettings:
        return self.settings.training_of(self.name, phase, epochs)

    def _share(self, phase: str, budget: float | None, flops_per_image: int) -> TrainingSettings:
        """Return the settings of a phase that has a share of the budget, if it has one."""
        if budget and phase in (self.own.shares or {}):
            return self._lasting(phase, self.own.shares[phase] * budget, flops_per_image)
        return self._training(phase)

    def _budget(self) -> float:
        """Return the training FLOPs that the strategy has: its share of those of the one it is matched to, or of what K
        workers do in that one's time."""
        final = self.built.strategy(self.own.match, self.seed)
        nodes = closure([final])
        flops = {node.key: self.built.flops(node) for node in nodes}
        if self.own.match_on == "critical_path":
            return self.own.budget * len(self.facts.target_depths) * longest(nodes, flops)[final.key]
        return self.own.budget * sum(flops.values())

    def _lasting(self, phase: str, flops: float, per_image: int) -> TrainingSettings:
        """Return the settings of a phase that lasts as long as costs so many FLOPs."""
        training = self._training(phase)
        self._check_batch(phase, training)
        steps = flops / (per_image * training.batch_size)
        epochs = steps / steps_per_epoch(self.facts.num_images, training.batch_size)
        what = f"strategies.{self.name} is as long as {self.own.match} costs"
        if epochs <= 0:
            raise SettingsError(f"{what}, but its other phases cost more than that already")
        try:
            return self._training(phase, round(epochs, 3))
        except SettingsError:  # nothing else depends on the length
            warmup = f"its warmup_epochs is {training.warmup_epochs:g}; set phases.{phase}.warmup_epochs"
            raise SettingsError(f"{what}, which leaves its phase {phase} {epochs:.3g} epochs, but {warmup}") from None

    # -- one phase

    def _node(
        self,
        phase: str,
        training: TrainingSettings | None,
        inputs: dict[str, Node] | None = None,
        *,
        key: str | None = None,
        weights: str | None = None,
        **more: Any,
    ) -> Node:
        """Add a phase; `key` is its folder below that of the seed, by default one of the strategy's."""
        inputs, model = inputs or {}, self.settings.model
        target, meta = self.facts.target_depths, self.facts.meta_depths
        if phase == "meta":  # what a phase does not depend on is no part of its identity
            model, target = model.model_copy(update={"depth": None}), []
        elif phase == "end_to_end":
            target, meta = [sum(target)] if target else [], []
        about = {"model": model, "data": self.settings.data} | more
        if training:
            self._check_batch(phase, training)
            if mat := self.settings.mat_of(self.name, phase):
                about["mat"] = self._with_units(mat, phase, training)
        about["inputs"] = {key: node.digest for key, node in inputs.items()}
        if weights:
            about["inputs"]["weights"] = self.facts.weights[weights]
        about |= {"phase": phase, "seed": self.seed, "task": self.settings.task, "training": training}
        about |= {"precision": self.settings.precision, "target_depths": target, "meta_depths": meta}
        settings = PhaseSettings(**about)
        key = f"seed-{self.seed}/" + (key or f"{self.name}/{phase}")
        node = Node(key, self.name, settings, self.built.experiment, inputs, weights)
        return self.built.nodes.setdefault(key, node)

    def _with_units(self, mat: MATSettings, phase: str, training: TrainingSettings) -> MATSettings:
        """Return the settings with the kind of units resolved; SettingsError if the network has none of that kind."""
        found, machine = self.facts.units, self.settings.machine
        units = mat.units or ("sublayers" if "sublayers" in found else "conv_layers")
        kinds = ", ".join(f"{kind} ({count})" for kind, count in found.items())
        has, reason = kinds or "no units that are known here", self.facts.unsupported_units.get(units)
        strategy, images = f"strategy {self.name}", self.facts.num_images
        kind = f"mat.units is {units!r} in {strategy}"
        lasts = f"phase {phase} of {strategy} lasts {training.epochs:g} epochs: nothing would ever rest"
        is_short = mat.warmup_epochs >= training.epochs
        control = f"mat.slow_every of {strategy} is a control for one device without compilation"
        compiled = f"machine.nodes is {machine.team_size} and machine.compile {machine.compile!r}"
        in_module_1 = phase == "incubate" and units in ("conv_layers", "filters")
        wrapped = machine.team_size > 1 or machine.compile != "off"  # and compiled at every update
        problems = {
            f"{kind}, but model.name {self.settings.model.name!r} has none; it has: {has}": units not in found,
            f"mat.units {units!r} of {strategy} is not possible with this network: {reason}": reason,
            f"{kind}, but only module 1 has a convolution; use sublayers": in_module_1,
            f"mat.warmup_epochs is {mat.warmup_epochs:g}, but {lasts}": is_short,
            f"{control}, but machine.devices × {compiled}": mat.slow_every and wrapped,
            f"mat.probe is {mat.probe}, but there are only {images} training images": mat.probe > images,
        }
        for problem, is_there in problems.items():
            if is_there:
                raise SettingsError(problem)
        try:
            return MATSettings.model_validate(mat.model_dump() | {"units": units})
        except ValidationError as error:
            raise SettingsError(f"mat of {strategy}: {error_message(error)}") from None

    def _check_batch(self, phase: str, training: TrainingSettings) -> None:
        size, images = training.batch_size, self.facts.num_images
        if size > images:
            what = f"training.batch_size is {size} in phase {phase}"
            raise SettingsError(f"{what}, but there are only {images} training images")
