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
from incubate_lib.phases.facts import Facts
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.pipeline.graph import Node, Plan, closure, longest
from incubate_lib.training.schedule import steps_per_epoch, total_steps


def plan(
    settings: Settings, strategies: Sequence[str] | None = None, seeds: Sequence[int] = (0,), *, facts: Facts | None = None
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
    return Plan(experiment, nodes, finals, {node.key: built.flops(node.settings) for node in nodes})


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
        return getattr(self, f"_{self.settings.strategy(name).kind}")(name, seed)

    def _end_to_end(self, name: str, seed: int) -> Node:
        strategy, training = self.settings.strategy(name), self.settings.training_of(name, "end_to_end")
        matched = self.settings.is_matched(name)
        if matched and self.settings.strategy(strategy.match).kind == "end_to_end" and not strategy.low_resolution:
            epochs = self._end_to_end(strategy.match, seed).settings.training.epochs
            training = training.model_copy(update={"epochs": strategy.budget * epochs})
        elif matched:
            training = self._lasting(name, "end_to_end", self._budget(name, seed), self.facts.flops_per_image["target"])
        if strategy.low_resolution:
            return self._low_resolution(name, seed, training)
        return self._node(f"seed-{seed}/{name}", name, self._phase("end_to_end", name, seed, training=training))

    def _low_resolution(self, name: str, seed: int, training: TrainingSettings) -> Node:
        """Spend a share of what `training` costs on small images, the rest at the network's own size."""
        size, share = self.facts.low_resolution.get(name), self.settings.strategy(name).low_resolution.share
        if size is None:
            why = self.facts.unsupported.get(name, "this network's images are too small to begin with smaller ones")
            raise SettingsError(f"strategies.{name} is not possible: {why}")
        budget = self.flops(self._phase("end_to_end", name, seed, training=training))
        model, data = self.settings.model.model_copy(update={"img_size": size}), self.settings.data
        if not data.is_streamed:  # those are brought to any size anyway
            data = data.model_copy(update={"resize": size})
        per_image = self.facts.flops_per_image[f"target-{size}"]
        training = self._lasting(name, "end_to_end", share * budget, per_image)
        phase = self._phase("end_to_end", name, seed, training=training, small_images=True)
        first = self._node(f"seed-{seed}/{name}/end_to_end", name, phase.model_copy(update={"model": model, "data": data}))
        per_image = self.facts.flops_per_image["target"]
        training = self._lasting(name, "finetune", budget - self.flops(first.settings), per_image)
        phase = self._phase("finetune", name, seed, training=training, inputs={"small_images": first})
        return self._node(f"seed-{seed}/{name}/finetune", name, phase, {"small_images": first})

    def _budget(self, name: str, seed: int) -> float:
        """Return the training FLOPs that a strategy has: its share of those of the one it is matched to, or of what K workers
        do in that one's time."""
        strategy = self.settings.strategy(name)
        final = self.strategy(strategy.match, seed)
        nodes = closure([final])
        flops = {node.key: self.flops(node.settings) for node in nodes}
        if strategy.match_on == "critical_path":
            return strategy.budget * len(self.facts.target_depths) * longest(nodes, flops)[final.key]
        return strategy.budget * sum(flops.values())

    def _lasting(self, name: str, phase: str, flops: float, per_image: int) -> TrainingSettings:
        """Return the settings of a phase that lasts as long as costs so many FLOPs."""
        training = self.settings.training_of(name, phase)
        self._check_batch(phase, training)
        match = self.settings.strategy(name).match
        epochs = flops / (per_image * training.batch_size) / steps_per_epoch(self.facts.num_images, training.batch_size)
        if epochs <= 0:
            raise SettingsError(
                f"strategies.{name} is as long as {match} costs, but its other phases cost more than that already"
            )
        try:
            return self.settings.training_of(name, phase, round(epochs, 3))
        except SettingsError:  # nothing else depends on the length
            raise SettingsError(
                f"strategies.{name} is as long as {match} costs, which leaves its phase {phase} {epochs:.3g} epochs, but "
                f"its warmup_epochs is {training.warmup_epochs:g}; set phases.{phase}.warmup_epochs"
            ) from None

    def _deep_incubation(self, name: str, seed: int) -> Node:
        strategy = self.settings.strategy(name)
        if reason := self.facts.unsupported.get(strategy.start):
            raise SettingsError(f"strategies.{name}.start {strategy.start!r} is not possible: {reason}")
        start = {field: getattr(strategy, field) for field in ("start", "inherit_stem", "inherit_head")}
        budget = self._budget(name, seed) if self.settings.is_matched(name) else None
        shares = (strategy.shares or {}) if budget else {}
        inputs = {}
        if "meta" in strategy.trains or strategy.weights:
            training = None if strategy.weights else self.settings.training_of(name, "meta")
            if "meta" in shares:
                per_image = self.facts.flops_per_image["meta"]
                training = self._lasting(name, "meta", shares["meta"] * budget, per_image)
            phase = self._phase("meta", name, seed, training=training, weights=strategy.weights)
            relative = ({} if part is None else part for part in (shares, strategy.lr_scale, strategy.warmup_share))
            own = strategy.phases.meta.model_fields_set or strategy.weights or phase.mat or any("meta" in r for r in relative)
            key = f"seed-{seed}/{name}/meta" if own else f"seed-{seed}/meta"
            inputs["meta"] = self._node(key, name, phase, weights=strategy.weights)
        if strategy.incubate != "none":
            more = start | {"imitate": strategy.incubate == "features"}
            training = self.settings.training_of(name, "incubate")
            if "incubate" in shares:
                kind = "imitate" if more["imitate"] else "incubate"
                per_image = sum(flops for key, flops in self.facts.flops_per_image.items() if key.startswith(kind))
                training = self._lasting(name, "incubate", shares["incubate"] * budget, per_image)
            meta, modules = inputs, {}
            for i in range(len(self.facts.target_depths)):
                phase = self._phase("incubate", name, seed, inputs=meta, module_index=i, training=training, **more)
                modules[f"module-{i}"] = self._node(f"seed-{seed}/{name}/incubate-{i}", name, phase, meta)
            inputs, start = modules, {}
        joined = self._phase("assemble", name, seed, inputs=inputs, **start)
        joined = self._node(f"seed-{seed}/{name}/assemble", name, joined, inputs)
        training = self.settings.training_of(name, "finetune")
        if budget:
            rest = budget - sum(self.flops(node.settings) for node in closure([joined]))
            training = self._lasting(name, "finetune", rest, self.facts.flops_per_image["target"])
        tuned = self._phase("finetune", name, seed, inputs={"assemble": joined}, training=training)
        return self._node(f"seed-{seed}/{name}/finetune", name, tuned, {"assemble": joined})

    def _finetune(self, name: str, seed: int) -> Node:
        weights = self.settings.strategy(name).weights
        phase = self._phase("finetune", name, seed, weights=weights)
        return self._node(f"seed-{seed}/{name}", name, phase, weights=weights)

    def _phase(
        self, phase: str, name: str, seed: int, *, inputs: dict[str, Node] | None = None, weights: str | None = None, **more: Any
    ) -> PhaseSettings:
        if phase != "assemble":
            training = more.setdefault("training", self.settings.training_of(name, phase))
            if training:
                self._check_batch(phase, training)
        hashes = {key: node.digest for key, node in (inputs or {}).items()}
        hashes |= {"weights": self.facts.weights[weights]} if weights else {}
        model, target, meta = self.settings.model, self.facts.target_depths, self.facts.meta_depths
        if mat := phase != "assemble" and more.get("training") and self.settings.mat_of(name, phase):
            more["mat"] = self._with_units(mat, name, phase, more["training"])
        if phase == "meta":  # what a phase does not depend on is no part of its identity
            model, target = model.model_copy(update={"depth": None}), []
        elif phase == "end_to_end":
            target, meta = [sum(target)] if target else [], []
        return PhaseSettings(
            phase=phase, seed=seed, data=self.settings.data, model=model, inputs=hashes, precision=self.settings.precision,
            target_depths=target, meta_depths=meta, **more,
        )  # fmt: skip

    def _with_units(self, mat: MATSettings, name: str, phase: str, training: TrainingSettings) -> MATSettings:
        """Return the settings with the kind of units resolved; SettingsError if the network has none of that kind."""
        found = self.facts.units
        units = mat.units or ("sublayers" if "sublayers" in found else "conv_layers")
        if units not in found:
            has = ", ".join(f"{kind} ({count})" for kind, count in found.items()) or "no units that are known here"
            raise SettingsError(
                f"mat.units is {units!r} in strategy {name}, but model.name {self.settings.model.name!r} has none; it has: {has}"
            )
        if reason := self.facts.unsupported_units.get(units):
            raise SettingsError(f"mat.units {units!r} of strategy {name} is not possible with this network: {reason}")
        if phase == "incubate" and units in ("conv_layers", "filters"):
            raise SettingsError(f"mat.units is {units!r} in strategy {name}, but only module 1 has a convolution; use sublayers")
        if mat.warmup_epochs >= training.epochs:
            raise SettingsError(
                f"mat.warmup_epochs is {mat.warmup_epochs:g}, but phase {phase} of strategy {name} lasts {training.epochs:g} "
                "epochs: nothing would ever rest"
            )
        machine = self.settings.machine
        if mat.slow_every and (machine.team_size > 1 or machine.compile != "off"):  # wrapped and compiled at every update
            raise SettingsError(
                f"mat.slow_every of strategy {name} is a control for one device without compilation, but machine.devices × "
                f"machine.nodes is {machine.team_size} and machine.compile {machine.compile!r}"
            )
        if mat.probe > self.facts.num_images:
            raise SettingsError(f"mat.probe is {mat.probe}, but there are only {self.facts.num_images} training images")
        try:
            return MATSettings.model_validate(mat.model_dump() | {"units": units})
        except ValidationError as error:
            raise SettingsError(f"mat of strategy {name}: {error_message(error)}") from None

    def _check_batch(self, phase: str, training: TrainingSettings) -> None:
        if training.batch_size > self.facts.num_images:
            raise SettingsError(
                f"training.batch_size is {training.batch_size} in phase {phase}, "
                f"but there are only {self.facts.num_images} training images"
            )

    def _node(
        self, key: str, name: str, phase: PhaseSettings, inputs: dict[str, Node] | None = None, weights: str | None = None
    ) -> Node:
        return self.nodes.setdefault(key, Node(key, name, phase, self.experiment, inputs or {}, weights))

    def flops(self, phase: PhaseSettings) -> int:
        """Return the training FLOPs of a whole phase."""
        if phase.training is None:
            return 0
        t = phase.training
        return self.facts.flops_of(phase) * t.batch_size * total_steps(t.epochs, self.facts.num_images, t.batch_size)
