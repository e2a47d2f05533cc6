"""Run a study: stage by stage, each the runs of all cells side by side, so that no core waits for a cell to end.

First learning rates are chosen, phase after phase, on images cut from the training images; then every cell is trained with
the chosen rates, and evaluated on the test images. The state of a study is nothing but its phases: called again it walks the same
way, and trains what is missing. A phase that several cells share is trained once.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from incubate_lib import backends, tasks
from incubate_lib.backends import Backend
from incubate_lib.config import SettingsError, data_folder
from incubate_lib.config.phase import digest as hashed
from incubate_lib.config.study import Cell, Study
from incubate_lib.phases.facts import Facts
from incubate_lib.phases.job import checked
from incubate_lib.pipeline.execution import is_at_work, only_run
from incubate_lib.pipeline.experiment import STOP_FILE, VERSION, Experiment
from incubate_lib.pipeline.graph import Node, Plan, closure, to_do
from incubate_lib.pipeline.strategies import plan
from incubate_lib.training.files import read_json, write_json
from incubate_lib.training.runs import PhaseFolder

UNDER_WAY = 3  # exit status
RunRates = dict[str, float]  # phase → learning rate
Stage = tuple[str, list["Trial"]]
OF_STRATEGIES = {"kind", "weights", "low_resolution"}
FACTS_FROM = {"task": ..., "data": ..., "model": ..., "partition": ..., "strategies": {"__all__": OF_STRATEGIES}}


@dataclass(frozen=True)
class Trial:
    """Some strategies of a cell, with some rates."""

    cell: Cell
    plan: Plan  # of this stage's phases alone
    strategy: str | None = None  # whose rate is tried; none: all strategies, with the chosen rates
    phase: str | None = None  # of which a rate is tried
    rate: float | None = None

    @property
    def label(self) -> str:
        """Name for people, unlike that of any other trial of the study."""
        return self.cell.label + (f", {self.strategy} {self.phase} lr={self.rate!r}" if self.phase else "")

    @property
    def nodes(self) -> list[Node]:
        """The phases whose rate is tried."""
        return [node for node in self.plan.nodes if node.settings.seeded_as == self.phase]

    @property
    def metric(self) -> tasks.Metric:
        return tasks.get(self.plan.experiment.settings.task).score

    @property
    def has_diverged(self) -> bool:
        """Whether the loss of any of these phases, each of which is over, was not finite: nothing can be built on it."""
        return any(node.summary() is None for node in self.nodes)

    def scores(self) -> dict[int, float]:
        """Return the score of this phase by seed, of incubation the mean over modules; the worst of all of what diverged."""
        by_seed: dict[int, list[float]] = {}
        for node in self.nodes:
            summary = node.summary()
            by_seed.setdefault(node.settings.seed, []).append(summary["score"] if summary else self.metric.worst)
        return {seed: fmean(values) for seed, values in by_seed.items()}


@dataclass
class Walk:
    """The stages of a study, in order; each is given out once what it depends on is known."""

    study: Study
    tried: list[dict[str, Any]] = field(default_factory=list)  # a row a rate and seed
    chosen: dict[tuple[str, str], RunRates] = field(default_factory=dict)  # (cell, strategy) → rates
    facts: dict[str, Facts] = field(init=False)  # of cells' images and networks, by the settings they depend on
    # (cell, strategy) with rates that are not all tried; the grid's first stands in for the best, to count costs
    stand_ins: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        known = read_json(self.file)
        self.facts = {key: checked(Facts, facts, str(self.file)) for key, facts in (known or {}).items()}

    @property
    def file(self) -> Path:
        """Where the facts are kept: measuring them takes seconds."""
        return Experiment.of_study(self.study.name).path / "facts.json"

    def keep_facts(self) -> None:
        """Write what planning measured; not before all could be planned, as a study that is refused leaves nothing behind."""
        facts = {key: facts.model_dump(mode="json") for key, facts in self.facts.items()}
        if facts != read_json(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, facts)

    def stages(self) -> Iterator[Stage]:
        """Yield title and runs of each stage; after one that the caller left unfinished, only the costs of the rest are right."""
        if self.study.rates:
            yield from self._choosing()
        yield "every strategy, evaluated on test images", self.last()

    def last(self) -> list[Trial]:
        """Return the runs that are evaluated on test images, with the rates that are chosen by now."""
        trials = []
        for cell in self.study.cells():
            rates = {name: self.rates_of(cell, name) for name in self.study.strategies}
            trials.append(Trial(cell, self._plan(cell, rates, self.study.seeds)))
        return trials

    def _choosing(self) -> Iterator[Stage]:
        rates = self.study.rates
        cells = [cell for cell in self.study.cells() if cell.place | rates.at == cell.place]
        for depth in itertools.count(1):
            trials = []
            for cell, name in itertools.product(cells, self.study.strategies):
                phases = self.study.settings(cell).strategies[name].trains[:depth]
                if len(phases) == depth:
                    trials += [self._trial(cell, name, phases, rate) for rate in rates.values]
            if not trials:
                return
            yield f"rates, {' and '.join(dict.fromkeys(t.phase for t in trials))}", trials
            self._choose(trials)

    def _choose(self, trials: list[Trial]) -> None:
        """Note the best rate of each strategy's phase in each cell; the first one while some are not trained."""
        groups: dict[tuple[str, str], list[Trial]] = {}
        for trial in trials:
            groups.setdefault((trial.cell.label, trial.strategy), []).append(trial)
        for (cell, name), group in groups.items():
            phase, best = group[0].phase, group[0].rate
            if not all(is_over(node) for trial in group for node in trial.nodes):
                self.stand_ins.add((cell, name))
            if (cell, name) not in self.stand_ins:
                results, metric = {trial.rate: trial.scores() for trial in group}, group[0].metric
                finite = [trial.rate for trial in group if not trial.has_diverged]
                if not finite:
                    where = f"study {self.study.name}, {cell}: in phase {phase} of {name}"
                    rates = f"({', '.join(f'{rate:g}' for rate in results)}); add lower ones to rates.values"
                    raise SettingsError(f"{where} no rate keeps the loss finite in every training {rates}")
                best = max(finite, key=lambda rate: metric.sign * fmean(results[rate].values()))  # of equal ones the first
                place = group[0].cell.place | {"strategy": name, "phase": phase}
                for rate, by_seed in results.items():
                    row = place | {"metric": metric.name, "lr": rate, "chosen": rate == best}
                    self.tried += [row | {"seed": seed, "score": value} for seed, value in by_seed.items()]
            self.chosen.setdefault((cell, name), {})[phase] = best

    def rates_of(self, cell: Cell, strategy: str) -> RunRates:
        """Return the learning rates of a strategy in a cell: chosen there, or where the study says."""
        at = self.study.rates.at if self.study.rates else {}
        return self.chosen.get((cell.model_copy(update={"place": cell.place | at}).label, strategy), {})

    def _trial(self, cell: Cell, name: str, phases: list[str], rate: float) -> Trial:
        """Return the run that tries a rate in the last of these phases."""
        rates = {name: self.rates_of(cell, name) | {phases[-1]: rate}}
        whole = self._plan(cell, rates, self.study.rates.seeds, "data.eval_split=val")
        nodes = closure(node for node in whole.nodes if node.settings.seeded_as == phases[-1])
        return Trial(cell, dataclasses.replace(whole, nodes=nodes), name, phases[-1], rate)

    def _plan(self, cell: Cell, rates: dict[str, RunRates], seeds: list[int], *more: str) -> Plan:
        """Return the plan of some strategies of a cell with these rates."""
        changes = [f"strategies.{n}.phases.{p}.lr={lr!r}" for n, own in rates.items() for p, lr in own.items()]
        settings = self.study.settings(cell, [*changes, *more])
        key = hashed([VERSION, settings.model_dump(mode="json", include=FACTS_FROM)])
        try:
            whole = plan(settings, list(rates), seeds, facts=self.facts.get(key))
        except SettingsError as error:
            raise SettingsError(f"study {self.study.name}, {cell.label}: {error}") from None
        self.facts.setdefault(key, whole.experiment.facts)
        return whole


def is_over(node: Node) -> bool:
    """Whether a phase is finished, or has diverged, which it would again: a rate that is too high is an answer, too."""
    if node.finished():
        return True
    status = node.folder.status()
    return status["state"] == "failed" and str(status.get("error")).startswith("FloatingPointError")


@dataclass
class Cost:
    """What is left to do of a stage."""

    title: str
    runs: int
    phases: int  # different ones
    missing: int
    flops: float  # of those that are missing
    digests: frozenset[str]  # of all phases


def costs(study: Study) -> list[Cost]:
    """Return what each stage of a study will cost, without training anything; each phase counts once.

    Costs do not depend on learning rates, so they are known before these are chosen.
    """
    seen, costs, steps = set(), [], Walk(study)
    for title, trials in steps.stages():
        flops = {node.digest: node.flops for node in _each_once(trials)}
        done = {node.digest for trial in trials for node in trial.plan.nodes if is_over(node)}
        missing = flops.keys() - seen - done
        total = float(sum(flops[each] for each in missing))
        costs.append(Cost(title, len(trials), len(flops.keys() - seen), len(missing), total, frozenset(flops)))
        seen |= flops.keys()
    steps.keep_facts()
    return costs


@dataclass(frozen=True)
class Pace:
    """What one process took for finished phases."""

    flops_per_second: float  # of updates
    eval_seconds: float  # of each phase that trained; those that only evaluate are taken to need as much

    def seconds(self, costs: list[Cost]) -> float:
        """Return the seconds of one process for what is missing."""
        return sum(cost.flops / self.flops_per_second + cost.missing * self.eval_seconds for cost in costs)


def measured_pace(of: Collection[str] = ()) -> Pace | None:
    """Return the pace of finished phases with these digests, else of any here; None if there are none.

    Of phases from several devices those of the device that trained last count.
    """
    folders = data_folder() / "phases"
    for paths in ([folders / digest for digest in of], folders.glob("*")):
        trained: dict[tuple, list[dict[str, Any]]] = {}  # device, threads → summaries
        for path in paths:
            summary = PhaseFolder(path).summary() or {}
            if summary.get("train_seconds"):
                where = summary["provenance"]
                trained.setdefault((where["device"], where["threads"]), []).append(summary)
        if trained:
            last = max(trained.values(), key=lambda group: max(one["provenance"]["date"] for one in group))
            flops, seconds = (sum(one[name] for one in last) for name in ("train_flops", "train_seconds"))
            return Pace(flops / seconds, fmean(one.get("eval_seconds") or 0.0 for one in last))
    return None


def run(study: Study, backend: Backend, settings: Any, console: Console) -> tuple[Walk, int]:
    """Go through a study, each stage on a backend with these settings of it; return the walk and an exit status.

    0: all is done; 1: something failed; 130: stopped; 3: jobs are under way, call again when they have ended.
    """
    steps = Walk(study)
    home = Experiment.of_study(study.name)
    home.path.mkdir(parents=True, exist_ok=True)
    with only_run(home.path):
        for title, trials in steps.stages():
            steps.keep_facts()
            # only while rates are chosen a diverged phase is an answer
            over = is_over if trials[0].phase else Node.finished
            nodes = _each_once(trials)
            home.write({node.key: {"digest": node.digest} for node in nodes}, {})  # so that nobody takes them for unused
            missing = to_do(nodes, over)
            if not missing:
                continue
            console.print(f"{title}: {len(missing)} phases are not finished", highlight=False)
            backends.check_free(home, "--stop ends them", but=backend)
            status = backend.submit(Plan(home, missing, {}), settings, console)
            if status is None:
                console.print("The next stage begins when these have ended: the same command again goes on.")
                return steps, UNDER_WAY
            if status == 1 and all(over(node) for trial in trials for node in trial.plan.nodes):
                console.print("A rate that is too high is an answer, too; the study goes on.")
            elif status:
                return steps, status
    return steps, 0


def _each_once(trials: list[Trial]) -> list[Node]:
    """Return the phases of some trials, each once, with names that no two have: those in runs are not of one run."""
    nodes: dict[str, Node] = {}
    for trial in trials:
        for node in trial.plan.nodes:  # inputs first
            if node.digest not in nodes:
                inputs = {name: nodes.get(before.digest, before) for name, before in node.inputs.items()}
                nodes[node.digest] = dataclasses.replace(node, key=f"{trial.label}/{node.key}", inputs=inputs)
    return list(nodes.values())


def stop(study: Study) -> str:
    """Ask what is under way to save and stop, and cancel what waits in a queue; return who was asked, in words."""
    home = Experiment.of_study(study.name)
    if not is_at_work(home.path):
        return f"nothing of {study.name} is under way"
    (home.path / STOP_FILE).touch()
    asked = filter(None, (backend.stop(home) for backend in (backends.of(home), backends.get())))
    return next(asked, f"{study.name} is asked to stop")
