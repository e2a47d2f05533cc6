"""Which images each micro-batch of a phase holds: a pure function of seed, update and place."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from incubate_lib.config import TrainingSettings
from incubate_lib.data.schedule import derive_seed, micro_batches, steps_per_epoch

EVAL_BATCH = 256  # images evaluated at once


@dataclass(frozen=True)
class Order:
    """Which images each micro-batch of a phase holds.

    Every epoch is a random order of all images. With `repeats` r each image is there r times in a row, and the epoch
    ends after as many places as there are images, as with timm's RepeatAugSampler: it shows 1/r of them. With
    `stride_repeats` draws of mixup (micro-batches, if mixup_draws is not set) take turns, so that no draw has two of the r.
    """

    num_images: int
    settings: TrainingSettings
    seed: int
    start: int = 0  # first update, when a phase goes on
    steps: int = 0  # updates of the whole phase
    rank: int = 0  # of `devices` that train together
    devices: int = 1

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (epoch, places in the epoch, images) of this rank's micro-batches, from update `start` to the end."""
        batch = self.settings.batch_size
        number, micro = micro_batches(batch, self.settings.micro_batch, self.devices)
        per_epoch = steps_per_epoch(self.num_images, batch)
        draws = self.settings.mixup_draws or number * self.devices
        places = torch.arange(batch)  # of an update, in the order of its micro-batches
        if self.settings.stride_repeats:
            places = places.view(-1, draws).T.flatten()
        for step in range(self.start, self.steps):
            epoch, place = divmod(step, per_epoch)
            order = _epoch_order(self.num_images, self.seed, epoch, self.settings.repeats)
            for k in range(number):
                first = (k * self.devices + self.rank) * micro
                mine = place * batch + places[first : first + micro]
                yield epoch, mine, order[mine]


def moved(index: Tensor, device: torch.device) -> Tensor:
    """Return an index on a device; to a GPU a copy from memory that is not pinned would wait for all work that is queued."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


@lru_cache(maxsize=2)
def _epoch_order(num_images: int, seed: int, epoch: int, repeats: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_images, generator=generator).repeat_interleave(repeats)[:num_images]
