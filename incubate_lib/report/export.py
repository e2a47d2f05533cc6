"""A finished network as a folder for timm and the Hugging Face hub: config.json, model.safetensors, README.md.

`timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same logits, bit for bit, and knows how images are to
be normalised. The model card says what the records say: score, classes, recipe, data, cost, limits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from incubate_lib import tasks
from incubate_lib.config import Settings, SettingsError, refuse
from incubate_lib.pipeline.graph import Node
from incubate_lib.pipeline.recorded import run_of
from incubate_lib.report.tables.hardware import mixed_text, mixes
from incubate_lib.report.tables.records import from_plan
from incubate_lib.report.words import TEMPLATES, flop_unit, in_yaml, label, seconds_text
from incubate_lib.tasks import Metric
from incubate_lib.training.files import check_free


@dataclass(frozen=True)
class Finished:
    """A finished network of a run."""

    strategy: str
    seed: int
    score: float  # on the evaluated images
    metric: Metric
    node: Node

    @property
    def written(self) -> str:
        return self.metric.written(self.score, " ", more_digits=1)

    def __str__(self) -> str:
        return f"{self.strategy}, seed {self.seed}: {self.written}"


def export(
    settings: Settings,
    folder: str | Path,
    *,
    strategy: str | None = None,
    seed: int = 0,
    log: Callable[[str], Any] = lambda line: None,
) -> str:
    """Write a finished network as a folder, and return the strategy's name.

    `log` is given a line for each finished strategy and seed with its score, and one that says which is taken and why:
    `strategy`, or else the first finished one of Deep Incubation in the order of `run`, or the only finished one. Raises
    SettingsError when nothing fits that description, with what is finished, and when the folder is not free.
    """
    from incubate_lib.data.sets import load_data
    from incubate_lib.data.sources import open_source
    from incubate_lib.phases.networks import model_shape, takes_depth, timm_arguments
    from incubate_lib.phases.recipes import load_trained
    from incubate_lib.phases.weights import save_timm

    folder = check_free(folder)
    if strategy:
        check_weights(settings, strategy, seed)
    ready = finished(settings, seed)
    taken, why = choose(settings, ready, strategy, seed)
    log(f"finished, with {taken.metric.label} on the {settings.data.eval_split} split:")
    for one in ready:
        log(f"  {one}")
    log(f"taken: {taken}, {why}")
    facts, data = taken.node.facts, settings.data
    whole = load_trained(taken.node.settings, taken.node.folder, facts.outputs)
    if data.is_text:
        own = f"model.name {settings.model.name!r} is a network of this package; its weights lie in {taken.node.folder.path}"
        refuse(not hasattr(whole, "save_pretrained"), own)
        whole.save_pretrained(folder)
        return taken.strategy
    network = getattr(whole, "backbone", whole)  # what stands on a timm network is no network of timm's
    train, _ = load_data(data, shape=model_shape(settings.model), machine=settings.machine)
    mean, std = (values.flatten().tolist() for values in (train.mean, train.std))
    task = tasks.get(settings.task)
    names = task.output_names(open_source(data, settings.machine)[0].classes) if network is whole else []
    arguments = timm_arguments(settings.model) | {"num_classes": facts.outputs if network is whole else 0}
    if facts.target_depths and takes_depth(settings.model):
        arguments["depth"] = sum(facts.target_depths)
    crop_pct = data.crop_pct if data.is_streamed else 1.0
    shape, mode = train.shape, "L" if train.shape[0] == 1 else "RGB"
    shown = {"mean": mean, "std": std, "classes": names, "task": task, "shape": shape, "mode": mode}
    shown["timm_lacks_it"] = not type(network).__module__.startswith("timm.")
    card = _card(settings, taken, ready=ready, **shown)
    save_timm(network, folder, arguments, train.shape, mean, std, crop_pct, card, names)
    return taken.strategy


def check_weights(settings: Settings, strategy: str, seed: int) -> None:
    """Raise SettingsError where the network that is meant was trained to its end, and its weights are lost since."""
    final = run_of(settings, seeds=[seed]).finals.get((strategy, seed))
    if final and final.summary() and not final.finished():
        raise SettingsError(f"{final.folder.weights} is missing or damaged; the same `incubate run` makes it again")


def finished(settings: Settings, seed: int) -> list[Finished]:
    """Return the finished networks of a run: strategies in the order of `run`, then the others, each with all its seeds.

    SettingsError if there is no such run, or none of this seed.
    """
    run_of(settings, seeds=[seed])  # says so if there is none
    finals, order = run_of(settings).finals, [*settings.run, *settings.strategies]
    ready = {key: final.finished() for key, final in finals.items()}
    keys = sorted(finals, key=lambda key: (order.index(key[0]), key[1]))
    return [Finished(*key, ready[key]["score"], tasks.metric(ready[key]["metric"]), finals[key]) for key in keys if ready[key]]


def choose(settings: Settings, ready: list[Finished], strategy: str | None, seed: int) -> tuple[Finished, str]:
    """Return which of the finished networks is meant, and why it is that one; SettingsError if none, or no single one, is."""
    if strategy is not None:
        settings.strategy(strategy)
    here = [one for one in ready if one.seed == seed]
    incubated = [one for one in here if settings.strategies[one.strategy].is_cut]
    named = [one for one in here if one.strategy == strategy]
    if not (named if strategy else here):
        there = "finished: " + ", ".join(one.strategy for one in here) if here else "`incubate status` shows how far it is"
        raise SettingsError(f"{strategy or 'no strategy'} is {'not ' * bool(strategy)}finished for seed {seed}; {there}")
    if strategy is None and not incubated and len(here) > 1:
        them = ", ".join(f"{one.strategy} ({one.written})" for one in here)
        raise SettingsError(f"several strategies are finished for seed {seed}; name one with --strategy: {them}")
    taken = (named or incubated or here)[0]
    why = "as --strategy says" if strategy else "the only finished one of this seed"
    if not strategy and len(here) > 1:
        why = "the first one of Deep Incubation in the order of `run`"
    metric = taken.metric
    best = max(here, key=lambda one: metric.sign * one.score)
    ahead = metric.ahead(best.score, taken.score)
    if ahead > 0:
        why += f"; {best.strategy} is {ahead:.{metric.digits + 1}f} {metric.points} better on this data "
        why += f"(--strategy {best.strategy} takes it)"
    return taken, why


def _card(settings: Settings, taken: Finished, **shown: Any) -> str:
    """Return the model card: YAML front matter and Markdown; no paths of this machine. `shown` goes to its template as it is."""
    from huggingface_hub import ModelCard, ModelCardData

    done, data = run_of(settings, [taken.strategy], [taken.seed]), settings.data
    results = from_plan(done)
    unit, size = flop_unit(results.strategies["flops"].iloc[0])
    training = {n.settings.seeded_as: n.settings.training for n in done.nodes if n.settings.training}
    strategy = settings.strategies[taken.strategy].model_dump(mode="json", exclude={"weights", "phases"}, exclude_none=True)
    recipe = settings.model_dump(mode="json", include={"model", "partition"}, exclude_unset=True) | {
        "data": data.model_dump(mode="json", exclude={"folder"}, exclude_unset=True) | {"source": data.source},
        "precision": settings.precision,
        "strategy": strategy,
        "training": {phase: of.model_dump(mode="json", exclude_none=True) for phase, of in training.items()},
    }
    functions = {"label": label, "mixes": mixes, "mixed_text": mixed_text, "seconds": seconds_text, "yaml": in_yaml}
    card = ModelCard.from_template(
        ModelCardData(library_name="timm", tags=[*tasks.get(settings.task).tags, "timm"]),
        template_path=str(TEMPLATES / "card.md"),
        settings=settings,
        taken=taken,
        results=results,
        files=[node.settings.inputs["weights"][:12] for node in done.nodes if "weights" in node.settings.inputs],
        unit=unit,
        size=size,
        recipe=recipe,
        **functions,
        **shown,
    )
    return f"{card}\n"
