"""Run a study: stage by stage, each the runs of all cells side by side, so that no core waits for a cell to end.

First learning rates are chosen, phase after phase, on images cut from the training images; then every cell is trained with
the chosen rates, all its strategies in one run, and judged on the test images. The state of a study is nothing but the
records of its runs: called again it walks the same way, and trains what is missing. A phase that several runs share is trained
once and copied.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from incubate_lib import backends
from incubate_lib.backends import Backend
from incubate_lib.config import SettingsError, data_folder, presets
from incubate_lib.config.study import Cell, Study
from incubate_lib.phases.facts import Facts
from incubate_lib.pipeline.execution import is_running, only_run
from incubate_lib.pipeline.experiment import STOP_FILE
from incubate_lib.pipeline.graph import Node, Plan, finished_phases, to_do
from incubate_lib.pipeline.strategies import plan
from incubate_lib.training.lease import holder
from incubate_lib.training.runs import read_json

UNDER_WAY = 3  # exit status
RunRates = dict[str, float]  # phase → learning rate
Stage = tuple[str, list["Trial"]]


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    cell: Cell
    overrides: list[str]
    plan: Plan  # of this stage's phases alone
    strategy: str | None = None  # whose rate is tried; none: all strategies, with the chosen rates
    phase: str | None = None  # of which a rate is tried
    rate: float | None = None

    @property
    def nodes(self) -> list[Node]:
        """The phases whose rate is tried."""
        return [node for node in self.plan.nodes if node.settings.phase == self.phase]

    def accuracies(self) -> dict[int, float]:
        """Return the judged accuracy of this phase by seed, of incubation the mean over modules; 0 of what diverged."""
        by_seed: dict[int, list[float]] = {}
        for node in self.nodes:
            summary = node.summary()
            by_seed.setdefault(node.settings.seed, []).append(summary["accuracy"] if summary else 0.0)
        return {seed: fmean(values) for seed, values in by_seed.items()}


@dataclass
class Walk:
    """The stages of a study, in order; each is given out once what it depends on is known."""

    study: Study
    preset: str
    tried: list[dict[str, Any]] = field(default_factory=list)  # a row a rate and seed
    chosen: dict[tuple[str, str], RunRates] = field(default_factory=dict)  # (cell, strategy) → rates
    facts: dict[str, Facts] = field(default_factory=dict)
    is_known: bool = True  # false from the first stage on that is not finished: its choices are stand-ins, to count costs

    def stages(self) -> Iterator[Stage]:
        """Yield title and runs of each stage; after one that the caller left unfinished, only the costs of the rest are right."""
        if self.study.rates:
            yield from self._choosing()
        yield "every strategy, judged on test images", self.last()

    def last(self) -> list[Trial]:
        """Return the runs that are judged on test images, with the rates that are chosen by now."""
        return [self._trial(cell) for cell in self.study.cells()]

    def _choosing(self) -> Iterator[Stage]:
        rates = self.study.rates
        cells = [c for c in self.study.cells() if all(c.place[axis] == value for axis, value in rates.at.items())]
        for depth in range(3):  # no strategy trains more phases
            trials = []
            for cell in cells:
                for name in self.study.strategies:
                    phases = self.study.settings(cell).strategies[name].trains
                    if depth < len(phases):
                        trials += [self._trial(cell, name, phases[: depth + 1], rate) for rate in rates.values]
            if trials:
                yield f"rates, {' and '.join(dict.fromkeys(t.phase for t in trials))}", trials
                self._choose(trials)

    def _choose(self, trials: list[Trial]) -> None:
        done = self.is_known = self.is_known and all(is_over(node) for trial in trials for node in trial.nodes)
        groups: dict[tuple[str, str], list[Trial]] = {}
        for trial in trials:
            groups.setdefault((trial.cell.label, trial.strategy), []).append(trial)
        for (cell, name), group in groups.items():
            results = {trial.rate: trial.accuracies() for trial in group} if done else {group[0].rate: {0: 0.0}}
            best = max(results, key=lambda rate: fmean(results[rate].values()))  # of equal ones the first
            if done and not any(results[best].values()):
                rates = ", ".join(f"{rate:g}" for rate in results)
                raise SettingsError(
                    f"study {self.study.name}, {cell}: in phase {group[0].phase} of {name} the loss is not finite at any rate "
                    f"({rates}); add lower ones to rates.values"
                )
            self.chosen.setdefault((cell, name), {})[group[0].phase] = best
            self.tried += [
                group[0].cell.place
                | {"strategy": name, "phase": group[0].phase, "lr": rate, "seed": seed, "accuracy": value, "chosen": rate == best}
                for rate, by_seed in results.items() if done
                for seed, value in by_seed.items()
            ]  # fmt: skip

    def rates_of(self, cell: Cell, strategy: str) -> RunRates:
        """Return the learning rates of a strategy in a cell: chosen there, or where the study says."""
        at = self.study.rates.at if self.study.rates else {}
        place = cell.place | at
        label = cell.model_copy(update={"place": place}).label
        return self.chosen.get((label, strategy), {})

    def _trial(
        self, cell: Cell, strategy: str | None = None, phases: list[str] | None = None, rate: float | None = None
    ) -> Trial:
        names = [strategy] if strategy else self.study.strategies
        overrides = list(cell.overrides)
        for name in names:
            rates = self.rates_of(cell, name) | ({phases[-1]: rate} if phases else {})
            overrides += [f"strategies.{name}.phases.{phase}.lr={value!r}" for phase, value in rates.items()]
        if strategy:
            overrides.append("data.eval_split=val")
        seeds = self.study.rates.seeds if strategy else self.study.seeds
        settings = self.study.settings(cell, overrides[len(cell.overrides) :])
        key = _facts_key(settings)
        try:
            whole = plan(settings, names, seeds, facts=self.facts.get(key))
        except SettingsError as error:
            raise SettingsError(f"study {self.study.name}, {cell.label}: {error}") from None
        self.facts[key] = whole.experiment.facts
        if strategy is None:
            return Trial(cell, overrides, whole)
        wanted = {*phases} | ({"assemble"} if phases[-1] == "finetune" else set())
        part = dataclasses.replace(whole, nodes=[node for node in whole.nodes if node.settings.phase in wanted])
        return Trial(cell, overrides, part, strategy, phases[-1], rate)

    def source(self, trial: Trial) -> dict[str, Any]:
        """Return preset and overrides of a run, as notebooks and `incubate run` take them."""
        return {"preset": self.preset, "overrides": trial.overrides}


def _facts_key(settings: Any) -> str:
    """Return what the facts of an experiment depend on; learning rates do not matter."""
    about = settings.model_dump(mode="json", include={"data", "model", "partition"})
    about["strategies"] = {
        name: [strategy.kind, strategy.weights, strategy.low_resolution and strategy.low_resolution.model_dump()]
        for name, strategy in settings.strategies.items()
    }
    return json.dumps(about, sort_keys=True)


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


def walk(study: Study) -> Walk:
    """Return the walk through a study, ready to begin."""
    preset = study.preset if study.preset in presets() else str(Path(study.preset).absolute())
    return Walk(study, preset)


def costs(study: Study) -> list[Cost]:
    """Return what each stage of a study will cost, without training anything; each phase counts once.

    Costs do not depend on learning rates, so they are known before these are chosen.
    """
    steps, seen, costs = walk(study), set(), []
    for title, trials in steps.stages():
        flops, done = {}, set()
        for trial in trials:
            for node in trial.plan.nodes:
                flops[node.digest] = trial.plan.flops[node.key]
                if is_over(node):
                    done.add(node.digest)
        new = set(flops) - seen
        seen |= new
        costs.append(Cost(title, len(trials), len(new), len(new - done), float(sum(flops[digest] for digest in new - done))))
    return costs


def measured_speed(study: Study) -> float | None:
    """Return the FLOP/s of one process in finished phases of this study, else of any run here; None if there is none.

    Of phases from several devices those of the device that trained last count.
    """
    folder = data_folder() / "runs"
    for pattern in (f"{study.name}-*", "*"):
        trained: dict[tuple, list[tuple]] = {}  # device, threads → date, FLOPs, seconds
        for path in folder.glob(f"{pattern}/seed-*/**/summary.json"):
            summary = read_json(path) or {}
            if summary.get("train_seconds") and "copied_from" not in summary:
                where = summary["provenance"]
                spent = (where["date"], summary["train_flops"], summary["train_seconds"])
                trained.setdefault((where["device"], where["threads"]), []).append(spent)
        if trained:
            _, flops, seconds = zip(*max(trained.values(), key=max), strict=True)
            return sum(flops) / sum(seconds)
    return None


def run(study: Study, backend: Backend, settings: Any, console: Console) -> tuple[Walk, int]:
    """Go through a study, each stage on a backend with these settings of it; return the walk and an exit status.

    0: all is done; 1: something failed; 130: stopped; 3: jobs are under way, call again when they have ended.
    """
    steps = walk(study)
    home = data_folder() / "studies" / study.name
    home.mkdir(parents=True, exist_ok=True)
    with only_run(home):
        for title, trials in steps.stages():
            over = is_over if trials[0].phase else Node.finished  # only while rates are chosen a diverged phase is an answer
            missing = [trial for trial in trials if not all(over(node) for node in trial.plan.nodes)]
            if not missing:
                continue
            console.print(f"{title}: {len(missing)} of {len(trials)} runs are not finished", highlight=False)
            for trial in missing:
                trial.plan.experiment.create()
                backends.check_free(trial.plan.experiment, "--stop ends them", but=backend)
            _copy_finished(missing)
            parts = [dataclasses.replace(trial.plan, nodes=to_do(trial.plan.nodes, over)) for trial in missing]
            runs = [(part, steps.source(trial)) for part, trial in zip(parts, missing, strict=True)]
            status = backend.submit(runs, settings, console, notebooks=False).status
            if status is None:
                console.print("The next stage begins when these have ended: the same command again goes on.")
                return steps, UNDER_WAY
            if status == 1 and all(over(node) for trial in trials for node in trial.plan.nodes):
                console.print("A rate that is too high is an answer, too; the study goes on.")
            elif status:
                return steps, status
    return steps, 0


def stop(study: Study) -> int:
    """Ask all that is under way to save and stop; cancel what waits in a queue. Return the number of runs asked."""
    here = is_running(data_folder() / "studies" / study.name)
    steps, asked = walk(study), set()
    for _, trials in steps.stages():
        for experiment in (trial.plan.experiment for trial in trials if not all(is_over(n) for n in trial.plan.nodes)):
            backend = backends.of(experiment)
            if experiment.is_known() and experiment.path not in asked and (here or backend.still_active(experiment)):
                asked.add(experiment.path)
                (experiment.path / STOP_FILE).touch()
                backend.stop(experiment)
    return len(asked)


def _copy_finished(trials: list[Trial]) -> None:
    """Take over what is finished in another run, here and at once: that needs no process of its own."""
    finished = finished_phases(data_folder() / "runs")
    for trial in trials:
        for node in trial.plan.nodes:
            ready = node.digest in finished and all(before.finished() for before in node.inputs.values())
            if ready and node.finished() is None and not holder(node.folder.path / "lease"):  # else somebody trains it just now
                node.adopt(finished)
