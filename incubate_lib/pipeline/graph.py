"""A run as a graph of phases: nodes that know their settings, their folder and the phases they start from."""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from incubate_lib.config import PhaseSettings, SettingsError
from incubate_lib.config.members import PHASES
from incubate_lib.phases.kinds import Phase
from incubate_lib.pipeline.experiment import STOP_FILE, Experiment
from incubate_lib.training.files import write_json
from incubate_lib.training.runs import METRICS, MNTK, PhaseFolder


@dataclass(frozen=True, eq=False, repr=False)
class Node:
    """One phase of one seed: resolved settings, folder, and the nodes it starts from."""

    key: str  # folder below the experiment, e.g. seed-0/deep_incubation/incubate-2
    strategy: str  # the first strategy that needs it
    settings: PhaseSettings
    experiment: Experiment
    inputs: dict[str, "Node"] = field(default_factory=dict)
    weights: str | None = None  # a file it starts from

    def __repr__(self) -> str:  # not those of all it starts from, again and again
        return f"Node({self.experiment.path.name}/{self.key})"

    @property
    def kind(self) -> Phase:
        return PHASES[self.settings.phase]

    @property
    def folder(self) -> PhaseFolder:
        return PhaseFolder(self.experiment.path / self.key)

    @property
    def work(self) -> tuple[str, str | None]:
        """What is executed: its notebook, and the name of the copy; of a kind without one the phase itself, and None."""
        return (self.kind.notebook, "notebook.ipynb") if self.kind.notebook else (self.settings.phase, None)

    @property
    def title(self) -> str:
        """Name for people, modules counted from one."""
        what = self.kind.title(self.settings)
        return f"seed {self.settings.seed} {what}" + ("" if what in ("meta", self.strategy) else f", {self.strategy}")

    @property
    def arguments(self) -> dict[str, Any]:
        """What tells `open_phase` and the notebook which of a run's phases this is."""
        which = {"strategy": self.strategy, "seed": self.settings.seed, "module_index": self.settings.module_index}
        return {name: value for name, value in which.items() if value is not None}

    @cached_property
    def digest(self) -> str:
        return self.settings.digest()

    def data(self) -> tuple[Any, Any]:
        """Return the images to train on and to judge by, as this phase's network takes them."""
        from incubate_lib.data.sets import load_data
        from incubate_lib.phases.networks import model_shape

        shape, machine = model_shape(self.settings.model), self.experiment.settings.machine
        return load_data(self.settings.data, shape=shape, machine=machine)

    def upstream(self, phase: str) -> list["Node"]:
        """Return the nodes of that phase, by the name that settings have for it, which this one starts from, directly or not."""
        return [node for node in closure([self])[:-1] if node.settings.seeded_as == phase]

    def summary(self) -> dict[str, Any] | None:
        """Return what is recorded of this phase, trained with these settings and from the inputs that are there, or None."""
        return self.folder.summary(self.digest, self._used())

    def finished(self) -> dict[str, Any] | None:
        """Return the summary if the weights are there, too: nothing is left to train."""
        return self.folder.finished(self.digest, self._used())

    def _used(self) -> dict[str, str]:
        """Return the SHA-256 of each input's weights; inputs that are not there (any more) cannot contradict."""
        done = {name: node.folder.summary(node.digest) for name, node in self.inputs.items()}
        return {name: summary["weights_sha256"] for name, summary in done.items() if summary}

    def run(self) -> dict[str, Any]:
        """Train what is missing, inputs first, in this process; return the summary of this phase."""
        from incubate_lib.phases.job import Job
        from incubate_lib.phases.run import run_phase

        if done := self.finished():
            self.folder.drop_checkpoints()
            return done
        for node in self.inputs.values():
            node.run()
        self.experiment.create()
        if copied := self.adopt():
            return copied
        inputs = {name: node.folder.path for name, node in self.inputs.items()}
        job = Job(
            settings=self.settings,
            folder=self.folder.path,
            title=self.title,
            about=self._about(),
            inputs=inputs | ({"weights": Path(self.weights)} if self.weights else {}),
            flops_per_image=self.experiment.facts.flops_of(self.settings),
            expected=(self.experiment.facts.num_images, self.experiment.facts.num_classes),
            machine=self.experiment.settings.machine,
        )
        return run_phase(job, stop_file=self.experiment.path / STOP_FILE)

    def _about(self) -> dict[str, Any]:
        """Return what the summary must say of strategy and inputs, which must be finished."""
        used = self._used() | ({"weights": self.settings.inputs["weights"]} if self.weights else {})
        inputs = {name: node.key for name, node in self.inputs.items()}
        return {"strategy": self.strategy, "inputs": inputs, "inputs_sha256": used}

    def adopt(self, finished: dict[str, list[PhaseFolder]] | None = None) -> dict[str, Any] | None:
        """Copy this phase from another run that finished it, if there is one, and return its summary; inputs must be finished.

        `finished` is what `finished_phases` returned, for those who ask often.
        """
        about = self._about()
        if finished is None:
            finished = finished_phases(self.experiment.path.parent, self.settings.seed)
        for folder in finished.get(self.digest, []):
            if folder.path != self.folder.path and folder.summary(self.digest, about["inputs_sha256"]):
                with contextlib.suppress(SettingsError):  # damaged: no use
                    folder.load_weights()
                    return self._adopt(folder, about)
        return None

    def _adopt(self, donor: PhaseFolder, about: dict[str, Any]) -> dict[str, Any]:
        with self.folder.claim(self.settings, about["inputs_sha256"]):
            # finished while this one waited
            if done := self.folder.finished(self.digest, about["inputs_sha256"]):
                return done
            for name in (METRICS, MNTK, *(file.name for file in donor.path.glob("*.safetensors"))):
                if (donor.path / name).exists():  # assembly has no metrics, and few phases have kernels
                    shutil.copy2(donor.path / name, self.folder.path / name)
            origin = str(donor.path.relative_to(self.experiment.path.parent))
            summary = donor.summary() | about | {"copied_from": origin}
            write_json(self.folder.path / "summary.json", summary)
        return summary


def finished_phases(runs: Path, seed: int | None = None) -> dict[str, list[PhaseFolder]]:
    """Return the finished phases of all runs in a folder, of one seed or of all, by the hash of their settings."""
    found: dict[str, list[PhaseFolder]] = {}
    for path in sorted(runs.glob(f"*/seed-{'*' if seed is None else seed}/**/summary.json")):
        folder = PhaseFolder(path.parent)
        if summary := folder.summary():
            found.setdefault(summary["hash"], []).append(folder)
    return found


@dataclass(frozen=True)
class Plan:
    """All nodes of a run in an order in which they can be done."""

    experiment: Experiment
    nodes: list[Node]
    finals: dict[tuple[str, int], Node]  # (strategy, seed) → the node that ends it
    flops: dict[str, int]  # node key → training FLOPs it will take
    images: str = ""  # of a plan that no run is made of: for how many images and classes it is, in words

    @property
    def arguments(self) -> dict[str, Any]:
        """What tells the analysis notebook which strategies and seeds these are."""
        strategies, seeds = (list(dict.fromkeys(part)) for part in zip(*self.finals, strict=True))
        return {"strategies": strategies, "seeds": seeds}

    def run(self) -> None:
        """Train everything that is missing, one phase after another, in this process."""
        for node in self.nodes:
            node.run()


def to_do(nodes: Iterable[Node], is_done: Callable[[Node], Any]) -> list[Node]:
    """Return the nodes that are not done and all that start from those, in the order given, which must have inputs first.

    What starts from a phase that is trained again may be done after all: if that one ends in the same bits.
    """
    found: dict[Path, Node] = {}
    for node in nodes:
        if any(before.folder.path in found for before in node.inputs.values()) or not is_done(node):
            found[node.folder.path] = node
    return list(found.values())


def closure(nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes and all they start from, each once, inputs first."""
    seen: dict[str, Node] = {}

    def visit(node: Node) -> None:
        for before in node.inputs.values():
            visit(before)
        seen.setdefault(node.key, node)

    for node in nodes:
        visit(node)
    return list(seen.values())


def longest(nodes: Iterable[Node], costs: Mapping[str, float]) -> dict[str, float]:
    """Return by key what the longest way to each node's end costs, its own cost included; `nodes` have inputs first."""
    ways: dict[str, float] = {}
    for node in nodes:
        before = [ways[other.key] for other in node.inputs.values()]
        ways[node.key] = costs[node.key] + max(before, default=0)
    return ways


def remaining(nodes: Sequence[Node], costs: Mapping[str, float]) -> dict[str, float]:
    """Return by key what the longest way from each node's beginning to an end costs; `nodes` have inputs first."""
    ways = {node.key: costs[node.key] for node in nodes}
    for node in reversed(nodes):
        for before in node.inputs.values():
            # else it is no part of what is asked about: it is finished, or another run's
            if before.key in ways:
                ways[before.key] = max(ways[before.key], costs[before.key] + ways[node.key])
    return ways
