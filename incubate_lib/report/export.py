"""A finished network as a folder for timm and the Hugging Face hub: config.json, model.safetensors, README.md.

`timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same logits, bit for bit, and knows how images are to
be normalised. The model card says what the records say: accuracy, classes, recipe, data, cost, limits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from incubate_lib.config import Settings, SettingsError
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.pipeline.graph import Node, Plan
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.tables.hardware import mixed_text, mixes
from incubate_lib.report.tables.records import from_plan
from incubate_lib.report.words import flop_unit, label, seconds_text


@dataclass(frozen=True)
class Finished:
    """A finished network of a run."""

    strategy: str
    seed: int
    accuracy: float  # top-1 on the images that judge, 0 … 1
    node: Node

    @property
    def top1(self) -> str:
        return f"{100 * self.accuracy:.2f} %"

    def __str__(self) -> str:
        return f"{self.strategy}, seed {self.seed}: {self.top1}"


def export(
    settings: Settings,
    folder: str | Path,
    *,
    strategy: str | None = None,
    seed: int = 0,
    log: Callable[[str], Any] = lambda line: None,
) -> str:
    """Write a finished network as a folder, and return the strategy's name.

    `tell` is given a line for each finished strategy and seed with its top-1, and one that says which is taken and why:
    `strategy`, or else the first finished one of Deep Incubation in the order of `run`, or the only finished one. Raises
    SettingsError when nothing fits that description, with what is finished, and when the folder is not free.
    """
    from incubate_lib.training.classes import class_names
    from incubate_lib.training.data import load_data
    from incubate_lib.training.phases import load_trained, model_shape, timm_arguments
    from incubate_lib.training.weights import check_free, save_timm

    folder = check_free(folder)
    ready = finished(settings, seed)
    taken, why = choose(settings, ready, strategy, seed)
    log(f"finished, with top-1 on the {settings.data.eval_split} split:")
    for one in ready:
        log(f"  {one}")
    log(f"taken: {taken}, {why}")
    facts, data = taken.node.experiment.facts, settings.data
    network = load_trained(taken.node.settings, taken.node.folder, facts.num_classes)
    train, _ = load_data(data, shape=model_shape(settings.model), machine=settings.machine)
    mean, std = (values.flatten().tolist() for values in (train.mean, train.std))
    names = class_names(data, facts.num_classes, settings.machine)
    depth = {"depth": len(network.blocks)} if facts.target_depths else {}
    save_timm(
        network, folder, timm_arguments(settings.model) | depth | {"num_classes": facts.num_classes},
        train.shape, mean, std, data.crop_pct if data.is_streamed else 1.0,
        _card(settings, plan(settings, [taken.strategy], [seed]), mean, std, names, ready), names,
    )  # fmt: skip
    return taken.strategy


def finished(settings: Settings, seed: int) -> list[Finished]:
    """Return the finished networks of a run: strategies in the order of `run`, then the others, each with all its seeds.

    SettingsError if there is no such run, or none of this seed.
    """
    experiment = Experiment.of(settings)
    names, seeds = experiment.started() if experiment.is_known() else ([], [])
    if not seeds:
        raise SettingsError(f"there is no run of these settings in {experiment.path}; start one with `incubate run`")
    if seed not in seeds:
        raise SettingsError(f"seed {seed} was not run in {experiment.path}; there are: {', '.join(map(str, seeds))}")
    names = [name for name in dict.fromkeys([*settings.run, *names]) if name in names]
    finals = plan(settings, names, seeds).finals if names else {}
    ready = {key: final.finished() for key, final in finals.items()}
    keys = [(name, seed) for name in names for seed in seeds]
    return [Finished(*key, ready[key]["accuracy"], finals[key]) for key in keys if ready[key]]


def choose(settings: Settings, ready: list[Finished], strategy: str | None, seed: int) -> tuple[Finished, str]:
    """Return which of the finished networks is meant, and why it is that one; SettingsError if there is none or no telling."""
    if strategy is not None:
        settings.strategy(strategy)
    here = [one for one in ready if one.seed == seed]
    incubated = [one for one in here if settings.strategies[one.strategy].kind == "deep_incubation"]
    named = [one for one in here if one.strategy == strategy]
    if not (named if strategy else here):
        there = "finished: " + ", ".join(one.strategy for one in here) if here else "`incubate status` shows how far it is"
        raise SettingsError(f"{strategy or 'no strategy'} is {'not ' * bool(strategy)}finished for seed {seed}; {there}")
    if strategy is None and not incubated and len(here) > 1:
        them = ", ".join(f"{one.strategy} ({one.top1})" for one in here)
        raise SettingsError(f"several strategies are finished for seed {seed}; name one with --strategy: {them}")
    taken = (named or incubated or here)[0]
    why = "as --strategy says" if strategy else "the only finished one of this seed"
    if not strategy and len(here) > 1:
        why = "the first one of Deep Incubation in the order of `run`"
    best = max(here, key=lambda one: one.accuracy)
    if best.accuracy > taken.accuracy:
        ahead = 100 * (best.accuracy - taken.accuracy)
        why += f"; {best.strategy} is {ahead:.2f} points better on these images (--strategy {best.strategy} takes it)"
    return taken, why


def _card(settings: Settings, done: Plan, mean: list[float], std: list[float], classes: list[str], ready: list[Finished]) -> str:
    """Return the model card: YAML front matter and Markdown; no paths of this machine."""
    results = from_plan(done)
    row, phases = results.strategies.iloc[0], []
    ((name, seed), final), *_ = done.finals.items()
    summary, model, data, facts = final.summary(), settings.model, settings.data, final.experiment.facts
    blocks = f"{sum(facts.target_depths)} blocks and " if facts.target_depths else ""
    unit, size = flop_unit(row["flops"])
    for node in done.nodes:
        s, phase = node.settings, node.summary()
        what = f"incubate, module {s.module_index + 1} of {len(s.target_depths)}" if s.phase == "incubate" else s.phase
        phases.append(f"| {what} | {phase['epochs']:g} | {phase['images_seen']:,} | {phase['train_flops'] / size:.3g} "
                      f"| {seconds_text(phase['train_seconds'])} | {100 * phase['accuracy']:.1f} % |")  # fmt: skip
    files = [node.settings.inputs["weights"][:12] for node in done.nodes if "weights" in node.settings.inputs]
    uncounted = "".join(
        f"\nIt starts from weights of a file (SHA-256 {f}…), **whose training is not counted here**." for f in files
    )
    splits = {"val": "validation images, cut from the training images, perhaps to choose settings by", "test": "test images"}
    trained = {n.settings.phase: n.settings.training.model_dump(mode="json", exclude_none=True)
               for n in done.nodes if n.settings.training}  # fmt: skip
    recipe = settings.model_dump(mode="json", include={"model", "partition"}, exclude_unset=True)
    recipe["data"] = data.model_dump(mode="json", exclude={"folder"}, exclude_unset=True) | {"source": data.source}
    recipe |= {
        "precision": settings.precision,
        "strategy": settings.strategies[name].model_dump(mode="json", exclude={"weights", "phases"}, exclude_none=True),
    }
    versions = ", ".join(f"{package} {version}" for package, version in summary["provenance"]["versions"].items())
    lines, mark = "\n".join(phases), mixes(results.strategies)
    this = {(name, seed): " (this one)"}
    others = "\n".join(f"| {one.strategy}{this.get((one.strategy, one.seed), '')} | {one.seed} | {one.top1} |" for one in ready)
    return f"""---
tags:
- image-classification
- timm
library_name: timm
# license: fill it in before you publish this; what the images and any weights it started from allow counts too
---
# {model.name}, {label(name)}

An image classifier: timm's `{model.name}` with {blocks}{summary["parameters"]:,} parameters,
trained by the strategy `{name}` of the Deep Incubation workbook ([the method](https://arxiv.org/abs/2212.04129)).

| | |
|---|---|
| top-1 | {100 * row["accuracy"]:.2f} % on {summary["judge_images"]:,} {splits[data.eval_split]} ({data.eval_split} split) |
| seed | {seed} |
| trained on | {data.source}: {summary["train_images"]:,} images in {facts.num_classes} classes (`split_seed` {data.split_seed}) |
| training FLOPs, all phases | {row["flops"] / size:.4g} {unit}; critical path {row["critical_flops"] / size:.4g} {unit} |
| training time, all phases | {seconds_text(row["seconds"])} s; critical path {seconds_text(row["critical_seconds"])} s{mark} |
| measured on | {row["device"]}, {row["threads"]} thread(s); {versions} |
| code | commit {row["commit"].replace("+", " with uncommitted changes") or "unknown"}; {row["date"]} |

FLOPs are counted exactly (a multiply-add is two); seconds are of update steps only, on one machine or, for the critical
path, with modules side by side. {mixed_text(results.strategies)}{uncounted}

## Use

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # timm >= 1.0.26; on the hub: "hf-hub:USER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```

Pixels in 0 … 1 are normalised by mean {_numbers(mean)} and standard deviation {_numbers(std)}.

It gives a logit for each of {len(classes)} classes, in this order (`label_names` in config.json):

```yaml
{_yaml({"classes": classes})}```

## Training

| phase | epochs | images seen | {unit} | s | top-1 at its end |
|---|---|---|---|---|---|
{lines}

```yaml
{_yaml(recipe | {"training": trained})}```

All networks of this run that are finished, on the same images:

| strategy | seed | top-1 |
|---|---|---|
{others}

## Limits

- One seed: another one gives another accuracy, and nothing here says by how much.
- It was trained on the {data.source} images named above{" and on what its starting weights had seen" * bool(files)}, and
  gives one of their {facts.num_classes} classes for any image. How it does on other images, cameras or groups of people
  was not evaluated: do so before any other use.
- It was made for a comparison of training methods, not for the best accuracy.
"""


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
