"""A finished network as a folder for timm and the Hugging Face hub: config.json, model.safetensors, README.md.

`timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same logits, bit for bit, and knows how images are to
be normalised. The model card says what the records say: accuracy, recipe, data, cost, limits.
"""

from pathlib import Path

import yaml

from incubate_lib.config import Settings, SettingsError
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.pipeline.graph import Plan
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.tables import flop_unit, from_plan, label, seconds_text


def export(settings: Settings, folder: str | Path, *, strategy: str | None = None, seed: int = 0) -> str:
    """Write the finished network of a strategy as a folder, and return the strategy's name.

    Without a name it is the first finished strategy of Deep Incubation, or the only finished one. Raises SettingsError
    when nothing fits that description, with what is finished, and when the folder is not free.
    """
    from incubate_lib.training.data import load_data
    from incubate_lib.training.phases import load_trained, model_shape, timm_arguments
    from incubate_lib.training.weights import check_free, save_timm

    folder = check_free(folder)
    done = _finished(settings, strategy, seed)
    ((name, _), node), *_ = done.finals.items()
    facts, data = node.experiment.facts, settings.data
    network = load_trained(node.settings, node.folder, facts.num_classes)
    train, _ = load_data(data, shape=model_shape(settings.model), machine=settings.machine)
    mean, std = (values.flatten().tolist() for values in (train.mean, train.std))
    depth = {"depth": len(network.blocks)} if facts.target_depths else {}
    save_timm(
        network, folder, timm_arguments(settings.model) | depth | {"num_classes": facts.num_classes},
        train.shape, mean, std, data.crop_pct if data.is_streamed else 1.0, _card(settings, done, mean, std),
    )  # fmt: skip
    return name


def _finished(settings: Settings, strategy: str | None, seed: int) -> Plan:
    """Return the plan of the one strategy and seed that is meant."""
    experiment = Experiment.of(settings)
    if strategy is not None:
        settings.strategy(strategy)
    names, seeds = experiment.started() if experiment.is_known() else ([], [])
    if not seeds:
        raise SettingsError(f"there is no run of these settings in {experiment.path}; start one with `incubate run`")
    if seed not in seeds:
        raise SettingsError(f"seed {seed} was not run in {experiment.path}; there are: {', '.join(map(str, seeds))}")
    finals = plan(settings, names, [seed]).finals if names else {}
    ready = [name for (name, _), final in finals.items() if final.summary()]
    incubated = [name for name in ready if settings.strategies[name].kind == "deep_incubation"]
    chosen = strategy or next(iter(incubated or ready), None)
    if chosen not in ready:
        there = f"finished: {', '.join(ready)}" if ready else "`incubate status` shows how far it is"
        raise SettingsError(f"{strategy or 'no strategy'} is {'not ' * bool(strategy)}finished for seed {seed}; {there}")
    if strategy is None and not incubated and len(ready) > 1:
        raise SettingsError(f"several strategies are finished for seed {seed}; name one with --strategy: {', '.join(ready)}")
    return plan(settings, [chosen], [seed])


def _card(settings: Settings, done: Plan, mean: list[float], std: list[float]) -> str:
    """Return the model card: YAML front matter and Markdown; no paths of this machine."""
    results = from_plan(done)
    row, phases = results.strategies.iloc[0], []
    ((name, seed), final), *_ = done.finals.items()
    summary, model, data, facts = final.summary(), settings.model, settings.data, final.experiment.facts
    blocks = f"{sum(facts.target_depths)} blocks and " if facts.target_depths else ""
    unit, size = flop_unit(row["flops"])
    for node in done.nodes:
        s, told = node.settings, node.summary()
        what = f"incubate, module {s.module_index + 1} of {len(s.target_depths)}" if s.phase == "incubate" else s.phase
        phases.append(f"| {what} | {told['epochs']:g} | {told['images_seen']:,} | {told['train_flops'] / size:.3g} "
                      f"| {seconds_text(told['train_seconds'])} | {100 * told['accuracy']:.1f} % |")  # fmt: skip
    files = [node.settings.inputs["weights"][:12] for node in done.nodes if "weights" in node.settings.inputs]
    uncounted = "".join(
        f"\nIt starts from weights of a file (SHA-256 {f}…), **whose training is not counted here**." for f in files
    )
    judged = {"val": "validation images, cut from the training images, perhaps to choose settings by", "test": "test images"}
    trained = {n.settings.phase: n.settings.training.model_dump(mode="json", exclude_none=True)
               for n in done.nodes if n.settings.training}  # fmt: skip
    recipe = settings.model_dump(mode="json", include={"model", "partition"}, exclude_unset=True)
    recipe["data"] = data.model_dump(mode="json", exclude={"folder"}, exclude_unset=True) | {"source": data.source}
    recipe |= {
        "precision": settings.precision,
        "strategy": settings.strategies[name].model_dump(mode="json", exclude={"weights", "phases"}, exclude_none=True),
    }
    versions = ", ".join(f"{package} {version}" for package, version in summary["provenance"]["versions"].items())
    lines = "\n".join(phases)
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
| top-1 | {100 * row["accuracy"]:.2f} % on {summary["judge_images"]:,} {judged[data.eval_split]} ({data.eval_split} split) |
| seed | {seed} |
| trained on | {data.source}: {summary["train_images"]:,} images in {facts.num_classes} classes (`split_seed` {data.split_seed}) |
| training FLOPs, all phases | {row["flops"] / size:.4g} {unit}; critical path {row["critical_flops"] / size:.4g} {unit} |
| training time, all phases | {seconds_text(row["seconds"])} s; critical path {seconds_text(row["critical_seconds"])} s |
| measured on | {row["device"]}, {row["threads"]} thread(s); {versions} |
| code | commit {row["commit"].replace("+", " with uncommitted changes") or "unknown"}; {row["date"]} |

FLOPs are counted exactly (a multiply-add is two); seconds are of update steps only, on one machine or, for the critical
path, with modules side by side.{uncounted}

## Use

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # timm >= 1.0.26; on the hub: "hf-hub:USER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```

Pixels in 0 … 1 are normalised by mean {_numbers(mean)} and standard deviation {_numbers(std)}.

## Training

| phase | epochs | images seen | {unit} | s | top-1 at its end |
|---|---|---|---|---|---|
{lines}

```yaml
{yaml.safe_dump(recipe | {"training": trained}, sort_keys=False, default_flow_style=None, width=120)}```

## Limits

- One seed: another one gives another accuracy, and nothing here says by how much.
- It was trained on the {data.source} images named above{" and on what its starting weights had seen" * bool(files)}, and
  gives one of their {facts.num_classes} classes for any image. How it does on other images, cameras or groups of people
  was not evaluated: do so before any other use.
- It was made for a comparison of training methods, not for the best accuracy.
"""


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
