"""Strategies as small graphs of phases: what runs, in what order, in which folder, from which settings.

    end_to_end            end_to_end
    deep_incubation*      meta ─→ incubate-0 … incubate-K-1 ─→ assemble ─→ finetune

Planning checks everything that can be checked before anything is trained or written. Phases with the same settings
(the meta model of several strategies) are one node.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from incubate_lib.config import PhaseSettings, Settings, SettingsError, data_folder, load_settings
from incubate_lib.training.runs import PhaseFolder, read_json, write_json

NOTEBOOKS = {
    "meta": "01_meta_model",
    "incubate": "02_incubate_module",
    "assemble": "03_assemble",
    "finetune": "04_finetune",
    "end_to_end": "05_end_to_end",
}
STOP_FILE = "STOP"  # in the experiment's folder: phases save and stop when they see it


@dataclass(frozen=True, eq=False)
class Node:
    """One phase of one seed: resolved settings, folder, and the nodes it starts from."""

    key: str  # folder below the experiment, e.g. seed-0/deep_incubation/incubate-2
    strategy: str  # the first strategy that needs it
    settings: PhaseSettings
    experiment: "Experiment"
    inputs: dict[str, "Node"] = field(default_factory=dict)

    @property
    def folder(self) -> PhaseFolder:
        return PhaseFolder(self.experiment.path / self.key)

    @property
    def notebook(self) -> str:
        return NOTEBOOKS[self.settings.phase]

    @property
    def title(self) -> str:
        """Name for people, modules counted from one."""
        s = self.settings
        what = f"module {s.module_index + 1} of {len(s.target_depths)}" if s.phase == "incubate" else s.phase
        strategy = "" if what in ("meta", self.strategy) else f" [{self.strategy}]"
        return f"seed {s.seed} {what}{strategy}"

    @cached_property
    def digest(self) -> str:
        return self.settings.digest()

    def summary(self) -> dict[str, Any] | None:
        """Return the summary if this phase is finished with these settings."""
        return self.folder.summary(self.digest)

    def run(self) -> dict[str, Any]:
        """Train what is missing, inputs first, in this process; return the summary of this phase."""
        from incubate_lib.training.phases import run_phase

        if done := self.summary():
            return done
        for node in self.inputs.values():
            node.run()
        self.experiment.create()
        about = {"strategy": self.strategy, "inputs": {name: node.key for name, node in self.inputs.items()}}
        if donor := self._donor():
            return self._adopt(donor, about)
        return run_phase(
            self.settings,
            self.folder,
            {name: node.folder for name, node in self.inputs.items()},
            title=self.title,
            about=about,
            checkpoint_seconds=self.experiment.settings.checkpoint_seconds,
            should_stop=(self.experiment.path / STOP_FILE).exists,
        )

    def _donor(self) -> PhaseFolder | None:
        """Find the same phase, settings and inputs, finished in another experiment: it need not be trained again."""
        for path in sorted(self.experiment.path.parent.glob(f"*/seed-{self.settings.seed}/**/summary.json")):
            folder = PhaseFolder(path.parent)
            if path.parent != self.folder.path and folder.summary(self.digest) and folder.weights.exists():
                return folder
        return None

    def _adopt(self, donor: PhaseFolder, about: dict[str, Any]) -> dict[str, Any]:
        with self.folder.claim(self.settings):
            for name in ("metrics.jsonl", "model.safetensors"):
                shutil.copy2(donor.path / name, self.folder.path / name)
            summary = donor.summary() | about | {"copied_from": str(donor.path.relative_to(self.experiment.path.parent))}
            write_json(self.folder.path / "summary.json", summary)
        return summary


@dataclass(frozen=True)
class Experiment:
    """The folder of one set of settings, below data/runs."""

    settings: Settings
    path: Path

    @classmethod
    def of(cls, settings: Settings) -> "Experiment":
        """Find the folder for these settings: `<name>`, or `<name>-<hash>` where that one belongs to other settings."""
        runs = data_folder() / "runs"
        plain = runs / settings.name
        owner = read_json(plain / "experiment.json")
        mine = owner["hash"] == settings.digest() if owner else not plain.exists()
        return cls(settings, plain if mine else runs / f"{settings.name}-{settings.digest()[:6]}")

    def create(self) -> None:
        """Make the folder and say in it whose it is."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "experiment.json").exists():
            record = {"hash": self.settings.digest(), "settings": self.settings.model_dump(mode="json")}
            write_json(self.path / "experiment.json", record)

    def check_writable(self) -> None:
        """Raise SettingsError unless the data folder can be read and written; leaves nothing behind."""
        place = self.path
        while not place.exists() and place.parent != place:
            place = place.parent
        try:
            os.listdir(place)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise SettingsError(
                f"data folder {data_folder()}: cannot read and write {place} ({error.strerror}); "
                "set INCUBATE_DATA to a folder of yours"
            ) from None


@dataclass(frozen=True)
class Plan:
    """All nodes of a run in an order in which they can be done."""

    experiment: Experiment
    nodes: list[Node]
    finals: dict[tuple[str, int], Node]  # (strategy, seed) → the node that ends it
    flops: dict[str, int]  # node key → training FLOPs it will take


def plan(settings: Settings, strategies: Sequence[str] | None = None, seeds: Sequence[int] = (0,)) -> Plan:
    """Resolve settings to a graph of phases; SettingsError for anything that could not be trained."""
    strategies = list(strategies or settings.run)
    for name, values in {"seed": list(seeds), "strategy": strategies}.items():
        doubled = sorted({str(v) for v in values if values.count(v) > 1})
        if doubled:
            raise SettingsError(f"{name} {', '.join(doubled)} is given twice")
    if any(seed < 0 for seed in seeds):
        raise SettingsError(f"seed {min(seeds)} is negative; seeds are 0 or larger")
    for name in strategies:
        settings.strategy(name)
    experiment = Experiment.of(settings)
    experiment.check_writable()
    planner = _Planner(settings, experiment)
    finals = {(name, seed): planner.strategy(name, seed) for seed in seeds for name in strategies}
    wanted = {node.key for node in _closure(finals.values())}
    nodes = [node for key, node in planner.nodes.items() if key in wanted]
    return Plan(experiment, nodes, finals, {node.key: planner.flops(node.settings) for node in nodes})


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


class _Planner:
    """Builds nodes, each once, and counts FLOPs, each kind of phase once."""

    def __init__(self, settings: Settings, experiment: Experiment) -> None:
        from incubate_lib.training.data import load_data
        from incubate_lib.training.phases import build_model

        self.settings, self.experiment = settings, experiment
        self.nodes: dict[str, Node] = {}
        self._flops: dict[str, int] = {}
        train, _ = load_data(settings.data)
        self.num_images, self.num_classes = len(train), train.num_classes
        self.image_shape = tuple(train.images.shape[1:])
        import torch

        with torch.device("meta"):
            model = build_model(settings.model, settings.model.depth, self.num_classes)
        shape = (model.in_chans, *model.patch_embed.img_size)
        if shape != self.image_shape:
            raise SettingsError(
                f"model takes images of {shape} (channels, height, width; model.in_chans, model.img_size), "
                f"but data.source {settings.data.source!r} has {self.image_shape}"
            )
        self.target_depths, self.meta_depths = settings.partition.depths(len(model.blocks))

    def strategy(self, name: str, seed: int) -> Node:
        """Add the nodes of a strategy and return the last of them."""
        return getattr(self, f"_{self.settings.strategy(name).kind}")(name, seed)

    def _end_to_end(self, name: str, seed: int) -> Node:
        training = self.settings.training_of(name, "end_to_end")
        if self.settings.is_matched(name):
            budget = self._budget(self.settings.strategies[name].match, seed)
            per_image = self.flops_per_image(self._phase("end_to_end", name, seed, training=training))
            per_epoch = self.num_images // training.batch_size * training.batch_size * per_image
            training = training.model_copy(update={"epochs": round(budget / per_epoch, 3)})
        return self._node(f"seed-{seed}/{name}", name, self._phase("end_to_end", name, seed, training=training))

    def _deep_incubation(self, name: str, seed: int) -> Node:
        strategy = self.settings.strategy(name)
        start = {k: getattr(strategy, k) for k in ("start", "inherit_stem", "inherit_head")}
        own_meta = strategy.phases.meta.model_dump(exclude_none=True)
        meta_key = f"seed-{seed}/{name}/meta" if own_meta else f"seed-{seed}/meta"
        meta = self._node(meta_key, name, self._phase("meta", name, seed))
        modules = {}
        for i in range(len(self.target_depths)):
            phase = self._phase("incubate", name, seed, inputs={"meta": meta}, module_index=i, **start)
            modules[f"module-{i}"] = self._node(f"seed-{seed}/{name}/incubate-{i}", name, phase, {"meta": meta})
        joined = self._node(f"seed-{seed}/{name}/assemble", name, self._phase("assemble", name, seed, inputs=modules), modules)
        tuned = self._phase("finetune", name, seed, inputs={"assemble": joined})
        return self._node(f"seed-{seed}/{name}/finetune", name, tuned, {"assemble": joined})

    def _phase(self, phase: str, name: str, seed: int, *, inputs: dict[str, Node] | None = None, **more: Any) -> PhaseSettings:
        if phase != "assemble":
            more.setdefault("training", self.settings.training_of(name, phase))
            if more["training"].batch_size > self.num_images:
                raise SettingsError(
                    f"batch_size of phase {phase} is {more['training'].batch_size}, "
                    f"but there are only {self.num_images} training images"
                )
        hashes = {key: node.digest for key, node in (inputs or {}).items()}
        return PhaseSettings(
            phase=phase, seed=seed, data=self.settings.data, model=self.settings.model,
            target_depths=self.target_depths, meta_depths=self.meta_depths, inputs=hashes, **more,
        )  # fmt: skip

    def _node(self, key: str, name: str, phase: PhaseSettings, inputs: dict[str, Node] | None = None) -> Node:
        return self.nodes.setdefault(key, Node(key, name, phase, self.experiment, inputs or {}))

    def _budget(self, name: str, seed: int) -> int:
        """Return the training FLOPs of a whole strategy, the meta model included."""
        return sum(self.flops(node.settings) for node in _closure([self.strategy(name, seed)]))

    def flops(self, phase: PhaseSettings) -> int:
        from incubate_lib.training.loop import total_steps

        if phase.training is None:
            return 0
        t = phase.training
        return self.flops_per_image(phase) * t.batch_size * total_steps(t.epochs, self.num_images, t.batch_size)

    def flops_per_image(self, phase: PhaseSettings) -> int:
        from incubate_lib.training.phases import phase_flops_per_image

        kind = f"{phase.phase}-{phase.module_index}-{phase.start}"  # nothing else in a phase changes the count
        if kind not in self._flops:
            try:
                self._flops[kind] = phase_flops_per_image(phase, self.num_classes, self.image_shape)
            except ValueError as error:  # a start that does not fit these blocks
                raise SettingsError(str(error)) from None
        return self._flops[kind]


def _closure(nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes and all they start from, each once, inputs first."""
    seen: dict[str, Node] = {}

    def visit(node: Node) -> None:
        for before in node.inputs.values():
            visit(before)
        seen.setdefault(node.key, node)

    for node in nodes:
        visit(node)
    return list(seen.values())


def walk(node: Node, visit: Callable[[Node], None]) -> None:
    for each in _closure([node]):
        visit(each)
