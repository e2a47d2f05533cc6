"""`recipe: released` does what the authors' code does: rates, drop-path, order, draws, and whole updates, to the last digits.

Their side is written anew here, from what their code computes, in float64 and without this project's functions.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import image_set
from timm.data.mixup import Mixup, rand_bbox

from incubate_lib.config import PhaseSettings, SettingsError, TrainingSettings, load_settings
from incubate_lib.config.recipes import RELEASED, fields_of
from incubate_lib.data.order import Order
from incubate_lib.data.schedule import derive_seed, lr_at
from incubate_lib.data.sets import ImageSet
from incubate_lib.phases.networks import build_target
from incubate_lib.phases.recipes import prepare
from incubate_lib.tasks.classification import Classification
from incubate_lib.training.trainer import Trainer

IMAGENET = ["imagenet-vit-b", "imagenet-vit-l", "imagenet-vit-h", "imagenet-vit-b-released"]
DRAWS = {"meta": 8, "incubate": 16, "finetune": 32}


def their_rate(epoch, epochs, warmup, lr=2e-3):
    """timm 0.3.2's cosine, set at the end of each epoch by its number."""
    t = max(0, epoch - 1)
    if t < warmup:
        return 1e-6 + t * (lr - 1e-6) / warmup
    return 1e-5 + 0.5 * (lr - 1e-5) * (1 + math.cos(math.pi * t / epochs))


@pytest.mark.parametrize("preset", IMAGENET)
@pytest.mark.parametrize(
    ("epochs", "warmup", "peak", "mean"),
    [
        (300, 20, 1.978e-3, 0.939e-3),  # as the released code logs them
        (100, 20, 1.900e-3, 0.817e-3),
        (100, 0, 2.000e-3, 1.035e-3),
        (50, 20, None, None),
        (25, 20, 1.900e-3, None),
    ],
)
def test_every_update_has_the_rate_that_the_released_code_gives_its_epoch(preset, epochs, warmup, peak, mean):
    recipe = load_settings(preset).training_of("deep_incubation", "meta")
    recipe = recipe.model_copy(update={"epochs": float(epochs), "warmup_epochs": float(warmup)})
    ours = [lr_at(recipe, step, 7 * epochs, 7) for step in range(7 * epochs)]
    theirs = [their_rate(epoch, epochs, warmup) for epoch in range(epochs) for _ in range(7)]
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-12
    assert not warmup or ours[:14] == [1e-6] * 14
    assert peak is None or round(max(ours), 6) == peak
    assert mean is None or round(sum(ours) / len(ours), 6) == mean


def in_hybrid(settings, index, recipe=None):
    """Return the settings of the phase in which a module learns."""
    target, meta = settings.partition.depths(settings.model.depth)
    return PhaseSettings(
        phase="incubate", seed=0, data=settings.data, model=settings.model, target_depths=target, meta_depths=meta,
        options={"module_index": index, "start": "random", "inherit_stem": False, "inherit_head": False},
        training=recipe or settings.training_of("deep_incubation", "incubate"),
    )  # fmt: skip


@pytest.mark.parametrize("preset", IMAGENET)
def test_drop_path_rises_over_the_blocks_of_the_hybrid(preset):
    settings = load_settings(preset)
    for index, depth in enumerate(settings.partition.target_depths):
        with torch.device("meta"):
            hybrid = prepare(in_hybrid(settings, index), {}, 1000)
        blocks = [block for block in hybrid.network.blocks if hasattr(block, "attn")]
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
        assert rates == [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks]
        assert rates == torch.linspace(0, 0.1, depth + 3).tolist()
        learning = rates[index : index + depth]
        if "vit-b" in preset and index in (0, 3):
            assert learning == pytest.approx([0, 0.02, 0.04] if index == 0 else [0.06, 0.08, 0.1])
        assert hybrid.train().network.norm.training == (index == 3 or preset.endswith("released"))  # of the last module


@pytest.mark.parametrize("phase", DRAWS)
def test_the_copies_of_an_image_fall_into_as_many_draws_of_mixup_on_eight_ranks(phase):
    recipe = load_settings("imagenet-vit-b").training_of("deep_incubation", phase)
    in_draws = {}
    for strided in (True, False):
        own, together = recipe.model_copy(update={"stride_repeats": strided}), []
        for rank in range(8):
            micros = Order(20480, own, seed=1, steps=10, rank=rank, devices=8)
            for k, (_, places, images) in enumerate(micros):
                slots = (k * 8 + rank) % (recipe.batch_size // 256) * 256 + torch.arange(256)
                draws = k * recipe.mixup_draws + slots // (recipe.batch_size // recipe.mixup_draws)
                together += zip(images.tolist(), places.tolist(), draws.tolist(), strict=True)
        assert sorted(place % 20480 for _, place, _ in together) == list(range(20480))
        drawn = {}
        for image, _, draw in together:
            drawn.setdefault(image, []).append(draw)
        whole = [draws for draws in drawn.values() if len(draws) == 3]
        assert len(whole) == 20480 // 3 and len(drawn) == len(whole) + 1
        in_draws[strided] = sum(len(set(draws)) == 3 for draws in whole) / len(whole)
    assert in_draws == {True: 1.0, False: 0.0}


@pytest.mark.parametrize(("micro", "draws"), [(8, None), (8, 1), (8, 4), (2, 2), (2, None), (4, 4)])
def test_mixup_is_drawn_as_often_as_is_asked_for(micro, draws, monkeypatch):
    drawn, original = [], Mixup._params_per_batch
    monkeypatch.setattr(Mixup, "_params_per_batch", lambda self: drawn.append(original(self)) or drawn[-1])
    recipe = TrainingSettings(batch_size=8, micro_batch=micro, mixup=0.8, mixup_draws=draws, epochs=1, warmup_epochs=0)
    settings = load_settings("smoke")
    trainer = Trainer(build_target(in_hybrid(settings, 0, recipe), 4), image_set(), recipe, seed=0)
    trainer.begin(0)
    for step in range(2):
        trainer.step(step)
    number = draws or 8 // micro
    assert len(drawn) == 2 * max(number, 8 // micro) and len(set(drawn)) == 2 * number
    groups = [len(list(group)) for _, group in itertools.groupby(drawn)]
    assert groups == [len(drawn) // (2 * number)] * (2 * number)  # those that share one follow each other


def test_the_class_token_alone_begins_otherwise():
    settings = load_settings("imagenet-vit-b", ["model.img_size=32"])
    recipes = [settings.training_of("deep_incubation", "meta").model_copy(update={"token_std": std}) for std in (None, 0.02)]
    ours, theirs = (
        build_target(in_hybrid(settings, 0, recipe).model_copy(update={"target_depths": [1]}), 4).state_dict()
        for recipe in recipes
    )
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {"cls_token"}
    assert ours["cls_token"].std().item() < 1e-5 and theirs["cls_token"].std().item() == pytest.approx(0.02, rel=0.1)


# -- whole updates --------------------------------------------------------------------------------------------------------


class Exact(ImageSet):
    def finish(self, images, recipe):
        return super().finish(images, recipe).double()


class ExactLoss(Classification):
    def loss(self, output, batch, recipe=None):
        return -(batch[1] * output.log_softmax(1)).sum(1).mean()


def their_mixup(x, y, classes, smoothing):
    """Mixup of a batch with alpha 0.8, or CutMix with alpha 1, drawn from numpy's generator; the box is timm's own (where its
    side is odd, timm 0.3.2 had it one pixel smaller)."""
    np.random.rand()  # whether at all: always
    is_cut = np.random.rand() < 0.5
    share = float(np.random.beta(1.0, 1.0) if is_cut else np.random.beta(0.8, 0.8))
    x, other = x.clone(), x.flip(0)
    if is_cut:
        top, bottom, left, right = rand_bbox(x.shape, share)
        x[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (x.shape[-1] * x.shape[-2])
    else:
        x = share * x + (1 - share) * other
    targets = F.one_hot(y, classes).double() * (1 - smoothing) + smoothing / classes
    return x, share * targets + (1 - share) * targets.flip(0)


def their_forward(w, x, heads, last_rate):
    """A Vision Transformer in train mode, by hand: every block's two branches drop images at its rate."""
    patches = F.unfold(x, 4, stride=4).transpose(1, 2) @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), patches], 1) + w["pos_embed"]
    blocks = sorted({int(name.split(".")[1]) for name in w if name.startswith("blocks.")})
    for place, number in enumerate(blocks):
        b = {name.split(".", 2)[2]: tensor for name, tensor in w.items() if name.startswith(f"blocks.{number}.")}
        rate = last_rate * place / (len(blocks) - 1)

        def kept(branch, rate=rate):
            if not rate:
                return branch
            mask = torch.empty(len(branch), 1, 1, dtype=torch.float64).bernoulli_(1 - rate)
            return branch * mask / (1 - rate)

        def norm(x, name, b=b):
            mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
            return (x - mean) / (variance + 1e-6).sqrt() * b[f"{name}.weight"] + b[f"{name}.bias"]

        qkv = norm(x, "norm1") @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = ((q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + kept(mixed.transpose(1, 2).flatten(2) @ b["attn.proj.weight"].T + b["attn.proj.bias"])
        hidden = norm(x, "norm2") @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + kept(hidden @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"])
    return norm(x, "norm", w)[:, 0] @ w["head.weight"].T + w["head.bias"]


@pytest.mark.parametrize("index", range(3))
def test_updates_with_everything_released_are_those_of_the_released_code(index):
    batch, epochs, seed = 16, 5, 3
    changes = ["recipe=released", f"batch_size={batch}", "drop_path=0.3", "shift=0", "mixup=0.8", "cutmix=1.0", "mixup_draws=4"]
    changes += ["repeats=3", "clip_grad=1e-3", "lr=2e-3", f"epochs={epochs}", "warmup_epochs=2"]
    settings = load_settings("smoke", [f"training.{change}" for change in changes])
    recipe = settings.training_of("deep_incubation", "incubate")
    torch.set_default_dtype(torch.float64)
    try:
        hybrid = prepare(in_hybrid(settings, index, recipe), {}, 4)
        with torch.no_grad():  # what begins at zero or one would hide much
            for parameter in hybrid.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.1)
        weights = {name: tensor.clone() for name, tensor in hybrid.network.state_dict().items()}
        learning = {name.removeprefix("network.") for name, p in hybrid.named_parameters() if p.requires_grad}
        data = Exact(**vars(image_set(batch)))
        trainer = Trainer(hybrid, data, recipe, seed=seed, task=ExactLoss())
        trainer.begin(0)
        for step in range(epochs):
            trainer.step(step)
        images = data.normalise(data.images).double()
        theirs = updated(weights, learning, images, data.labels, epochs, batch, seed)
    finally:
        torch.set_default_dtype(torch.float32)
    assert ("pos_embed" in learning) == (index == 0) == ("cls_token" in learning)
    ours = hybrid.network.state_dict()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-12
    assert all(torch.equal(ours[name], weights[name]) for name in weights.keys() - learning)
    assert min((ours[name] - weights[name]).abs().max().item() for name in learning) > 1e-4


def updated(weights, learning, images, labels, epochs, batch, seed):
    """Return the weights after an update an epoch: AdamW, decay on all but biases and norms, no clipping."""
    w = {name: tensor.clone().requires_grad_(name in learning) for name, tensor in weights.items()}
    first, second = ({name: torch.zeros_like(w[name]) for name in learning} for _ in range(2))
    for step in range(epochs):
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", step))
        order = torch.randperm(batch, generator=generator).repeat_interleave(3)[:batch]
        draw_seed = derive_seed(seed, "draw", step, 0)
        np.random.seed(draw_seed)
        torch.manual_seed(draw_seed)
        mixed = [their_mixup(images[order[d::4]], labels[order[d::4]], 4, 0.1) for d in range(4)]  # a rank each
        x, targets = map(torch.cat, zip(*mixed, strict=True))
        loss = -(targets * their_forward(w, x, 2, 0.3).log_softmax(1)).sum(1).mean()
        gradients = torch.autograd.grad(loss, [w[name] for name in sorted(learning)])
        rate = their_rate(step, epochs, 2)
        for name, gradient in zip(sorted(learning), gradients, strict=True):
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, spread = first[name] / (1 - 0.9 ** (step + 1)), (second[name] / (1 - 0.999 ** (step + 1))).sqrt()
            decay = 0 if name.endswith("bias") or "norm" in name else 0.05
            w[name] = (w[name] * (1 - rate * decay) - rate * mean / (spread + 1e-8)).detach().requires_grad_()
    return {name: tensor.detach() for name, tensor in w.items()}


# -- by name and one by one -----------------------------------------------------------------------------------------------


def digests(*overrides, preset="smoke"):
    settings = load_settings(preset, overrides)
    return {phase: settings.training_of("deep_incubation", phase) for phase in ("meta", "incubate", "finetune")}


def test_a_recipe_by_name_is_its_fields_one_by_one_and_what_is_set_wins():
    whole = digests("training.recipe=released", "training.batch_size=32")
    fields = {phase: fields_of("released", phase) for phase in whole}
    for phase, recipe in whole.items():
        assert recipe.model_dump(include=set(fields[phase])) == fields[phase] and recipe.recipe is None
    one_by_one = [
        f"phases.{phase}.{name}={value}" for phase in whole for name, value in fields[phase].items() if value is not None
    ]
    assert digests(*one_by_one, "training.batch_size=32") == whole
    assert digests("training.recipe=ours") == digests() != whole
    kept = digests("training.recipe=released", "training.batch_size=32", "training.frozen=eval", "phases.meta.recipe=ours")
    assert kept["meta"] == digests("training.batch_size=32")["meta"]
    assert kept["incubate"] == whole["incubate"].model_copy(update={"frozen": "eval"})
    last = digests("training.batch_size=32", "strategies.deep_incubation.phases.finetune.recipe=released")
    assert (last["finetune"], last["meta"]) == (whole["finetune"], digests("training.batch_size=32")["meta"])


def test_whatever_the_released_code_has_otherwise_is_set_by_its_recipe():
    names = {name for fields in RELEASED.values() for name in fields}
    for phase in ("meta", "incubate", "finetune", "end_to_end"):
        ours, theirs = fields_of("ours", phase), fields_of("released", phase)
        same = {name for name in names if ours[name] == theirs[name]}
        assert same == ({"decay_tokens"} if phase != "incubate" else set())


def test_draws_that_cut_micro_batches_are_refused():
    changes = ["training.batch_size=24", "training.micro_batch=8", "training.mixup_draws=2"]
    with pytest.raises(SettingsError, match=r"12 images a draw of mixup \(mixup_draws 2\), and 8 a micro-batch"):
        load_settings("smoke", changes)
