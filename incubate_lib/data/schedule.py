"""Pure functions of settings and step: how many updates, which learning rate, which seed. No torch."""

import hashlib
import math

from incubate_lib.config import TrainingSettings

RENEWAL_BATCH = 64  # images at once while statistics are renewed


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Return the updates of one epoch; the last incomplete batch is left out."""
    return num_images // batch_size


def total_steps(epochs: float, num_images: int, batch_size: int) -> int:
    """Return the updates of a phase: at least one, none for 0 epochs."""
    return max(1, round(epochs * steps_per_epoch(num_images, batch_size))) if epochs else 0


def micro_batches(batch_size: int, micro_batch: int | None, devices: int) -> tuple[int, int]:
    """Return how many micro-batches each device takes one after another in an update, and the images of each."""
    micro = micro_batch or batch_size // devices
    return batch_size // (micro * devices), micro


def lr_at(recipe: TrainingSettings, step: int, steps: int, per_epoch: int) -> float:
    """Return the learning rate of update `step` (0-based) of so many: a linear warm-up, then a cosine down to min_lr.

    By update the last one has min_lr. By epoch a rate is that of the epoch before, because the released code sets it at an
    epoch's end by the number of that epoch: the first two epochs have the first rate, and min_lr is not reached.
    """
    at, end, warmup = step, steps - 1, round(recipe.warmup_epochs * per_epoch)
    if recipe.lr_by == "epoch":
        at, end, warmup = max(0, step // per_epoch - 1), recipe.epochs, recipe.warmup_epochs
    lr, first = recipe.peak_lr, recipe.warmup_lr
    if at < warmup:
        return lr * (at + 1) / warmup if first is None else first + (lr - first) * at / warmup
    before = 0 if recipe.warmup == "inside" else warmup
    place = (at - before) / max(1, end - before)
    return recipe.min_lr + (lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * place))


def renewal(num_images: int) -> TrainingSettings:
    """Return the recipe of the pass that renews statistics: images once, in random order, without augmentation."""
    return TrainingSettings(epochs=1, batch_size=min(RENEWAL_BATCH, num_images), warmup_epochs=0, label_smoothing=0)


def derive_seed(seed: int, *what: str | int) -> int:
    """Return a seed for one purpose, e.g. ("order", epoch); different purposes never share random numbers."""
    return int.from_bytes(hashlib.sha256(repr((seed, *what)).encode()).digest()[:4])  # numpy takes 32 bits
