"""What planning would count of the presets with the paper's numbers, had it the images: networks live on the meta device."""

import functools

import pytest
import torch
from networks import cut, made_of

from incubate_lib.config import load_settings
from incubate_lib.method.units import count_units
from incubate_lib.phases.facts import Facts, count
from incubate_lib.phases.networks import build_model, model_shape
from incubate_lib.pipeline import experiment, graph, strategies
from incubate_lib.training.costs import FlopCounts

IMAGES = {  # to train on, classes
    "folder": (1_281_167, 1000), "cifar100": (50_000, 100), "cifar10": (50_000, 10), "fashion_mnist": (60_000, 10),
}  # fmt: skip
IMAGENET = ["imagenet-vit-b", "imagenet-vit-l", "imagenet-vit-h"]
VITS = [*IMAGENET, "imagenet-vit-b-released", "cifar100-deit-t-32", "cifar100-deit-t-128", "fashion-deit-t-32"]


@functools.cache
def networks(preset):
    """Return the target network and the meta model on the meta device, and the blocks of their modules."""
    settings = load_settings(preset)
    classes = IMAGES[settings.data.source][1]
    with torch.device("meta"):
        target = build_model(settings.model, settings.model.depth, classes)
        target_depths, meta_depths = settings.partition.depths(len(target.blocks))
        return target, build_model(settings.model, sum(meta_depths), classes), target_depths, meta_depths


@functools.cache
def facts_of(preset):
    """Return what planning would measure, had it the images. `test_flops_are_the_known_ones` counts a whole ViT-B."""
    settings = load_settings(preset)
    images, classes = IMAGES[settings.data.source]
    if preset not in VITS:
        return count(settings, images, classes)
    target, meta, target_depths, meta_depths = networks(preset)
    counts = FlopCounts(model_shape(settings.model))
    parts = made_of(meta, meta_depths, target, target_depths)
    flops = {"meta": counts.per_image(meta.requires_grad_(True), cut(meta, meta_depths))}
    flops["target"] = counts.per_image(target.requires_grad_(True), parts[2])
    for i in range(len(target_depths)):
        flops[f"incubate-{i}"] = sum(counts.hybrid(*parts, i))
    return Facts(
        num_images=images, outputs=classes, target_depths=target_depths, meta_depths=meta_depths, flops_per_image=flops,
        unsupported={}, units=count_units(target),
    )  # fmt: skip


@functools.cache
def planned(preset, overrides=()):
    """Return the plan of all strategies of a preset, and for each strategy its nodes by phase."""
    settings, facts = load_settings(preset, overrides), facts_of(preset)
    facts = facts.model_copy(update={"num_images": round(facts.num_images * settings.data.train_share)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "measure", lambda _: facts)
        # not to be compiled; not counted above
        left_out = {"mat_multirate", "imitation", "end_to_end_low_resolution", "infopro", "dgl"}
        names = [name for name in settings.strategies if name not in left_out]
        todo = strategies.plan(settings, names)
    phases = {}
    for name in names:
        for node in graph.closure([todo.finals[name, 0]]):
            phases.setdefault(name, {}).setdefault(node.settings.phase, []).append(node)
    return todo, phases


def total(preset, strategy, overrides=()):
    """Return the FLOPs of all phases of a strategy."""
    todo, phases = planned(preset, overrides)
    return sum(todo.flops[node.key] for nodes in phases[strategy].values() for node in nodes)


def critical(todo, node):
    """Return the FLOPs of the longest way to the end of a phase: modules are trained side by side."""
    return todo.flops[node.key] + max((critical(todo, before) for before in node.inputs.values()), default=0)
