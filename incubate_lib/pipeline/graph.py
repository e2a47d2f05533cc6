"""A run as a graph of phases: nodes that know their phase, their name in the run and the phases they start from."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from incubate_lib.config import MachineSettings, PhaseSettings, TrainingSettings
from incubate_lib.config.members import PHASES
from incubate_lib.data.schedule import renewal, total_steps
from incubate_lib.phases.facts import Facts
from incubate_lib.phases.job import Job
from incubate_lib.phases.kinds import Phase
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.training.runs import PhaseFolder

PAGE = (  # in a notebook, whose page forgets a cell that has not ended
    "{title} trains in this kernel, also while the page is reloaded or closed; `incubate status {run}` and notebook 10 show "
    "how far it is, and this cell shows the result when it is run again."
)


@dataclass(frozen=True, eq=False, repr=False)
class Node:
    """One phase of a run, and the nodes it starts from."""

    key: str  # its name in the run, e.g. seed-0/deep_incubation/incubate-2
    job: Job
    experiment: Experiment
    inputs: dict[str, "Node"] = field(default_factory=dict)
    whole: "Plan | None" = None  # the run that is recorded when this phase is run; none: no more than it needs

    def __repr__(self) -> str:  # not those of all it starts from, again and again
        return f"Node({self.experiment.path.name}/{self.key})"

    @property
    def settings(self) -> PhaseSettings:
        return self.job.settings

    @property
    def strategy(self) -> str:
        return self.job.strategy

    @property
    def facts(self) -> Facts:
        return self.job.facts

    @property
    def machine(self) -> MachineSettings:
        return self.job.machine

    @property
    def title(self) -> str:
        return self.job.title

    @property
    def digest(self) -> str:
        return self.job.digest

    @cached_property
    def folder(self) -> PhaseFolder:
        return self.job.folder

    @property
    def kind(self) -> Phase:
        return PHASES[self.settings.phase]

    @cached_property
    def flops(self) -> int:
        """The training FLOPs of the whole phase."""
        images = self.facts.num_images
        return cost(self.settings.training or renewal(images), self.job.flops_per_image, images)

    def record(self) -> dict[str, Any]:
        """Return what run.json holds of it: all that is not the run's."""
        own = self.job.model_dump(mode="json", exclude_unset=True, include={"settings", "strategy", "weights"})
        return own | {"digest": self.digest, "inputs": {name: node.key for name, node in self.inputs.items()}}

    def data(self) -> tuple[Any, Any]:
        """Return the images to train on and to evaluate on, as this phase's network takes them."""
        from incubate_lib.data.sets import load_data
        from incubate_lib.phases.networks import model_shape

        return load_data(self.settings.data, shape=model_shape(self.settings.model), machine=self.machine)

    def upstream(self, phase: str) -> list["Node"]:
        """Return the nodes of that phase, by the name that settings have for it, which this one starts from, directly or not."""
        return [node for node in closure([self])[:-1] if node.settings.seeded_as == phase]

    def summary(self) -> dict[str, Any] | None:
        """Return what is recorded of this phase, trained from the inputs that are there, or None."""
        return self.job.summary()

    def finished(self) -> dict[str, Any] | None:
        """Return the summary if the weights are there, too: nothing is left to train."""
        return self.job.finished()

    def run(self) -> dict[str, Any]:
        """Train what is missing, inputs first, in this process; return the summary of this phase."""
        from incubate_lib.phases.run import run_phase

        nodes = closure([self])
        if not self.finished() and "ipykernel" in sys.modules and not os.environ.get("INCUBATE_HEADLESS"):
            print(PAGE.format(title=self.title, run=self.experiment.path.name), flush=True)
        if self.experiment.settings:  # else it is opened by its file alone, and its run has it recorded or is gone
            (self.whole or Plan(self.experiment, nodes, {})).write()
        for node in nodes if not self.finished() else [self]:
            if node.folder.trainer() is None:  # else whoever trains it has written it
                node.job.write()
            summary = run_phase(node.job)
        return summary


@dataclass(frozen=True)
class Plan:
    """All nodes of a run in an order in which they can be done."""

    experiment: Experiment
    nodes: list[Node]
    finals: dict[tuple[str, int], Node]  # (strategy, seed) → the node that ends it
    images: str = ""  # of a plan that no run is made of: for how many images and classes it is, in words

    @property
    def flops(self) -> dict[str, int]:
        """Node key → the training FLOPs that it takes."""
        return {node.key: node.flops for node in self.nodes}

    @property
    def arguments(self) -> dict[str, Any]:
        """What the analysis notebook is given: which strategies and seeds these are."""
        strategies, seeds = (list(dict.fromkeys(part)) for part in zip(*self.finals, strict=True))
        return {"strategies": strategies, "seeds": seeds}

    def write(self) -> None:
        """Record the run, and write its phases where they are to be trained."""
        finals = {end: node.key for end, node in self.finals.items()}
        self.experiment.write({node.key: node.record() for node in self.nodes}, finals)

    def run(self) -> None:
        """Train everything that is missing, one phase after another, in this process."""
        self.write()
        for node in self.nodes:
            node.run()


def cost(training: TrainingSettings, flops_per_image: int, num_images: int) -> int:
    """Return the training FLOPs of a phase with these settings."""
    return flops_per_image * training.batch_size * total_steps(training.epochs, num_images, training.batch_size)


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
