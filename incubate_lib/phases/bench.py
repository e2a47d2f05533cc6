"""What a training step costs on this machine: ours beside two references, and its growth with depth and image size.

Ours is `Trainer.step`, the very function that trains. The references are a bare hand-written loop over the same
stock timm model, and the same hybrids frozen as in the released code of arXiv 2212.04129. All run in one process, on
one device and in turn, on random images that lie there. What only some recipes have (clipping, EMA, mixup, drop-path)
is off in all of them. Nothing is printed; of the data only the names are read, to count the classes.
"""

import copy
import itertools
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from incubate_lib.config import (
    DEFAULT_MACHINE,
    MachineSettings,
    ModelSettings,
    PhaseSettings,
    Settings,
    SettingsError,
    TrainingSettings,
    check_numbers,
)
from incubate_lib.config.members import PHASES, TASKS
from incubate_lib.config.peaks import peak_flops
from incubate_lib.data.counts import IMAGENET, count_images
from incubate_lib.data.schedule import micro_batches
from incubate_lib.data.sets import invented
from incubate_lib.method.incubation import Hybrid
from incubate_lib.method.together import Together
from incubate_lib.phases.facts import outputs_for
from incubate_lib.phases.networks import depths_of, model_shape
from incubate_lib.phases.recipes import networks_of, prepare
from incubate_lib.tasks import Losses
from incubate_lib.training.costs import train_flops_per_image
from incubate_lib.training.stopwatch import Variant, measure, yardstick
from incubate_lib.training.team import explain_out_of_memory, pick_device, provenance, repeat_exactly
from incubate_lib.training.trainer import Trainer, autocast, compiled, make_optimizer

GPU_BATCH = 256  # images of a step, unless the settings have fewer
CPU_STEP = 5e10  # FLOPs of a step end to end on a CPU: about a second
LR = 1e-5  # so small that random labels do no harm
NARROW = ModelSettings(name="vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=96, depth=8, num_heads=3)
DEPTHS = (12, 24, 48, 96, 128)  # blocks
SIZES = (32, 64, 96, 128, 160, 224)  # pixels: 17 to 785 tokens, where attention has 3 to 58 % of the FLOPs
TOO_LARGE = "a batch of {} does not fit into the device's memory; give a smaller one with --batch"
Log = Callable[[str], None]


class Bench:
    """Builds the variants of one network on one device at one batch size; SettingsError if there is no such network."""

    def __init__(self, settings: Settings, *, batch: int, outputs: int, device: torch.device) -> None:
        if settings.partition is None:
            raise SettingsError("partition is missing: without modules there are no hybrids to measure beside end to end")
        self.settings, self.batch, self.outputs, self.device = settings, batch, outputs, device
        self.task = TASKS[settings.task]
        self.shape = model_shape(settings.model)
        self.target_depths, self.meta_depths = depths_of(settings)
        self.recipe = TrainingSettings(epochs=1e6, batch_size=batch, lr=LR, warmup_epochs=0.0, label_smoothing=0.0)
        self.data = invented(settings.data, batch, self.shape, outputs, device, self.task.invented)
        self.counted = networks_of(settings, (self.target_depths, self.meta_depths), outputs)

    def options(self, phase: str, index: int | None = None) -> dict[str, Any]:
        """Return the options of a phase that learns from random weights."""
        fields = PHASES[phase].options.model_fields
        given = {name: value for name, value in {"module_index": index, "start": "random"}.items() if name in fields}
        return PHASES[phase].options.model_validate(given).model_dump(mode="json")

    def flops(self, phase: str, index: int | None = None) -> int:
        """Return the FLOPs of a training image of a phase."""
        kind = PHASES[phase]
        return kind.count(self.counted)[kind.cost(self.settings.model, self.options(phase, index))]

    def build(self, phase: str, index: int | None = None) -> nn.Module:
        """Return the model that a phase trains, freshly initialised, on the device that is default here."""
        s = PhaseSettings(
            phase=phase,
            seed=0,
            task=self.settings.task,
            data=self.settings.data,
            model=self.settings.model,
            target_depths=self.target_depths,
            meta_depths=self.meta_depths,
            cuts=self.settings.partition.cuts or [],
            options=self.options(phase, index),
            training=self.recipe,
        )
        return prepare(s, {}, self.outputs)

    def ours(self, phase: str, index: int | None = None) -> Variant:
        """Return a phase in our loop."""
        with self.device:
            model = self.build(phase, index)
        return self._in_our_loop(phase if index is None else f"{phase}-{index}", model, self.flops(phase, index))

    def bare(self, ours: Variant) -> Variant:
        """Return a copy of a network in a loop as short as a loop can be; ours is compared with it.

        Its images are normalised beforehand, and it does not ask a GPU to repeat itself bit for bit.
        """
        model = copy.deepcopy(ours.model).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
        runner = compiled(model, self.settings.machine.compile)
        batch = self.data.some(torch.arange(self.batch))
        x, losses = self.task.inputs(batch), losses_of(ours.name)

        def run(x: Tensor) -> Any:
            with autocast(self.device, self.settings.precision):
                return runner(x)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            for loss in losses(run, x, lambda output: self.task.loss(output, batch)):
                loss.backward()
            optimizer.step()
            return loss.detach()

        ours.against = Variant(f"{ours.name}-bare", step, ours.flops, model, optimizer, ours.compiled)
        return ours.against

    def released(self, ours: Variant) -> Variant:
        """Return a copy of our hybrid with the released code's freezing, in our loop; it is compared with ours."""
        model = copy.deepcopy(ours.model)
        optimizer = make_optimizer(model, self.recipe)  # holds what trains now
        network = released_freezing(model)
        twin = self._in_our_loop(f"{ours.name}-released", network, train_flops_per_image(network, self.shape), optimizer)
        twin.against = ours
        return twin

    def apart(self, ours: Variant) -> Variant:
        """Return an update of each hybrid alone, one after the other; that of all together is compared with it."""
        hybrids = [self.ours("incubate", i) for i in range(len(self.target_depths))]
        models = nn.ModuleList(hybrid.model for hybrid in hybrids)
        states = SimpleNamespace(state=ChainMap(*(hybrid.optimizer.state for hybrid in hybrids)))
        flops = sum(hybrid.flops for hybrid in hybrids)
        step = lambda: [hybrid.step() for hybrid in hybrids][-1]  # noqa: E731
        ours.against = Variant(f"{ours.name}-apart", step, flops, models, states, ours.compiled, exact=True)
        return ours.against

    def _in_our_loop(self, name: str, model: nn.Module, flops: int, optimizer: torch.optim.Optimizer | None = None) -> Variant:
        """Return a model in our loop, with an optimiser of all that trains if none is given; `flops` are of an image."""
        machine = self.settings.machine
        trainer = Trainer(
            model, self.data, self.recipe, seed=0, precision=self.settings.precision, machine=machine, task=self.task,
            losses=losses_of(name),
        )  # fmt: skip
        trainer.optimizer = optimizer or trainer.optimizer
        trainer.begin(0)
        number = itertools.count()
        return Variant(name, lambda: trainer.step(next(number)), self.batch * flops, model, trainer.optimizer,
                       compiled=machine.compile != "off", exact=True)  # fmt: skip


def losses_of(variant: str) -> Losses:
    """Return the losses of the kind of phase that a variant is an update of."""
    return PHASES[variant.partition("-")[0]].losses


def released_freezing(hybrid: Hybrid) -> nn.Module:
    """Return a hybrid's network, sharing its weights, as the released code treats it.

    All of it runs in train mode. What lies behind the module is not frozen: its weight gradients are computed, and because
    the optimiser holds the module's alone, nothing uses or clears them.
    """
    network = hybrid.network.train()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(hybrid.partition.owner(name) >= hybrid.index)
    return network


def bench(
    settings: Settings,
    *,
    batch: int | None = None,
    rounds: int = 5,
    classes: int | None = None,
    log: Log = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure each kind of phase that has a speed of its own beside a bare loop, hybrids beside the released code's freezing, and
    all hybrids together beside the same one by one.

    Returns one row a variant. Two variants live at a time; `log` is given a line before and after each two. Raises SettingsError
    for numbers that make no sense and for a batch that the device cannot hold.
    """
    check_numbers({"--batch": batch, "--rounds": rounds, "--classes": classes})
    device = pick_device()
    repeat_exactly(device)
    count = partial(count_images, settings.data, settings.machine, shape=model_shape(settings.model))
    try:
        known = count(images=classes and 1, classes=classes)
        assumed = known.sentence if known.assumed else ""
    except SettingsError as error:  # images that cannot be trained on are no reason not to measure
        known = count(images=1, classes=IMAGENET[2])
        assumed = f"ASSUMED: {IMAGENET[2]:,} classes, those of ImageNet-1K, because {error}; --classes says another number."
    if assumed:
        log(assumed)
    outputs = outputs_for(settings, known)
    if batch is None:
        fits = GPU_BATCH
        if device.type != "cuda":  # counted before anything is built for real
            one = Bench(settings, batch=1, outputs=outputs, device=torch.device("meta"))
            fits = max(4, int(CPU_STEP / one.flops("end_to_end")))
        recipe, devices = settings.training, settings.machine.devices
        batch = min(micro_batches(recipe.batch_size, recipe.micro_batch, devices)[1], fits)
    made = Bench(settings, batch=batch, outputs=outputs, device=device)

    def pair(phase: str, index: int | None) -> Iterator[Variant]:
        yield (ours := made.ours(phase, index))
        twins = {Hybrid: made.released, Together: made.apart}
        yield twins.get(type(ours.model), made.bare)(ours)

    kinds = sorted((kind for kind in PHASES if PHASES[kind].pace == kind), key=lambda kind: PHASES[kind].group == "incubate")
    modules = range(len(made.target_depths))
    pairs = [(kind, index) for kind in kinds for index in (modules if PHASES[kind].has_modules else [None])]
    rows = []
    with explain_out_of_memory(TOO_LARGE.format(batch)):
        matmul = yardstick(device, settings.precision)
        for n, (phase, index) in enumerate(pairs):
            what = PHASES[phase].label + ("" if index is None else f" {index + 1}")
            log(f"{n + 1} of {len(pairs)}: {what}, batch {batch}, rounds {rounds}")
            measured = measure(pair(phase, index), rounds=rounds, device=device, matmul=matmul)
            log("  " + ", ".join(f"{row['variant']} {1e3 * row['step_seconds']:,.1f} ms" for row in measured))  # if it is cut off
            rows += measured
    each = {"task": settings.task, "batch": batch, "tokens": known.tokens, "characters": known.characters}  # of a sample
    return [about(settings, device) | each | row for row in rows]


def growth(
    precision: str = "float32",
    machine: MachineSettings = DEFAULT_MACHINE,
    *,
    batch: int | None = None,
    rounds: int = 3,
    depths: Sequence[int] = DEPTHS,
    sizes: Sequence[int] = SIZES,
    log: Log = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure end to end and one hybrid of a narrow ViT over its depth (blocks) and over the image size (pixels).

    Returns one row a point, with its `series` (depth or image_size) and `size`; a series is measured in turn as a whole.
    """
    check_numbers({"--batch": batch, "--rounds": rounds})
    device = pick_device()
    repeat_exactly(device)
    batch = batch or (GPU_BATCH if device.type == "cuda" else 4)
    base = Settings(name="growth", model=NARROW, partition={"num_modules": 4}, precision=precision, machine=machine)
    if machine.compile != "off":  # beyond the limit torch would quietly run the later ones uncompiled
        torch._dynamo.config.recompile_limit = 8 * (len(depths) + len(sizes))

    def points(field: str, values: Sequence[int]) -> Iterator[Variant]:
        for value in values:
            model = NARROW.model_copy(update={field: value})
            made = Bench(base.model_copy(update={"model": model}), batch=batch, outputs=10, device=device)
            yield made.ours("end_to_end")
            yield made.ours("incubate", 1)  # which has a prefix and a suffix

    rows = []
    with explain_out_of_memory(TOO_LARGE.format(batch)):
        matmul = yardstick(device, precision)
        for series, field, values in (("depth", "depth", depths), ("image_size", "img_size", sizes)):
            log(f"{series} {', '.join(map(str, values))}: batch {batch}, rounds {rounds}")
            measured = measure(points(field, values), rounds=rounds, device=device, matmul=matmul)
            places = [{"series": series, "size": value} for value in values for _ in range(2)]
            rows += [place | row for place, row in zip(places, measured, strict=True)]
    return [about(base, device) | {"batch": batch} | row for row in rows]


def about(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Return what every row must carry: settings, machine, date."""
    where = provenance(device)
    return {
        "settings": settings.name, "model": str(settings.model), "precision": settings.precision,
        "compile": settings.machine.compile, "peak_flops_per_second": peak_flops(where["device"], settings.precision),
        "device": where["device"], "threads": where["threads"], "torch": where["versions"]["torch"], "date": where["date"],
        "commit": (where["commit"] or "")[:10] + ("+" if where["dirty"] else ""),
    }  # fmt: skip
