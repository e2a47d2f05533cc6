"""Large image sets: read and augmented by worker processes with timm's transforms, as they are needed.

Each image's augmentation follows from seed, epoch and place: it depends on neither the number of devices and workers nor
on where a run was interrupted. Letters: B batch, C channels, H and W pixels.
"""

import math
import mmap
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader

from incubate_lib.config import DataSettings, MachineSettings, SettingsError, TrainingSettings
from incubate_lib.data.decode import Opener, is_turned
from incubate_lib.data.folders import Source
from incubate_lib.data.order import EVAL_BATCH, Order
from incubate_lib.data.schedule import derive_seed, micro_batches, total_steps
from incubate_lib.data.transforms import make_transform

PREFETCH = 4  # batches that each worker reads ahead
SHARED_MEMORY = "/dev/shm"  # where torch puts what one process hands to another
MAX_BROKEN = 100  # unreadable images in a row that are passed over; more, and something else is wrong


@dataclass
class StreamedSet:
    """Images read when they are needed, by worker processes, through timm's transforms."""

    source: Source
    index: np.ndarray  # [N], which of the source's images belong to this set
    shape: tuple[int, int, int]  # C, H, W
    num_classes: int
    settings: DataSettings
    device: torch.device
    machine: MachineSettings
    broken: dict[str, str] = field(default_factory=dict)  # images passed over so far: name → reason
    eval_loader: DataLoader | None = None  # kept while a network trains: to start its workers takes longer than to evaluate

    def __len__(self) -> int:
        return len(self.index)

    def __post_init__(self) -> None:
        self.labels = self.source.labels[self.index]
        stats = np.array([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])  # [2, 3]
        if self.shape[0] != 3:
            stats = stats.mean(1, keepdims=True).repeat(self.shape[0], 1)
        self.mean, self.std = torch.tensor(stats, dtype=torch.float32, device=self.device)[:, :, None, None]

    def preview(self, num: int, recipe: TrainingSettings | None = None) -> Tensor:
        """Return the first images as uint8 [num, C, H, W], as evaluated, or augmented as in training."""
        reader = self._reader(recipe)
        return self._sound(*self._collate()([reader[i, i] for i in range(min(num, len(self)))]))[0][:num]

    def normalise(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std

    def some(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return images as evaluated, normalised [N, C, H, W], and labels [N] of an index; read here, without workers."""
        reader = replace(self._reader(None), skip_broken=self.settings.skip_broken)
        images, labels = self._sound(*_collate([reader[i, 0] for i in index.tolist()]))
        return self.normalise(images.to(self.device)), labels.to(self.device)

    def batches(self, order: Order) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield micro-batches to train on: uint8 images [B, C, H, W] and labels [B]; `finish` makes them ready."""
        seed = derive_seed(order.seed, "augment")  # and epoch and place give each augmentation's
        sampler = (
            [(int(i), derive_seed(seed, epoch, int(place))) for i, place in zip(images, places, strict=True)]
            for epoch, places, images in order
        )
        yield from self._read(self.loader(order.settings, sampler, order.devices))

    def finish(self, images: Tensor, recipe: TrainingSettings) -> Tensor:
        """Normalise, and erase rectangles on the device, drawing from the global generators."""
        images = self.normalise(images)
        if recipe.erase:
            images = RandomErasing(recipe.erase, mode="pixel", device=images.device)(images)
        return images

    @property
    def evaluated_at_once(self) -> int:
        """How many images make a batch that is evaluated."""
        return EVAL_BATCH

    def eval_batches(self, rank: int = 0, devices: int = 1, keep: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised batches of every image that falls to this rank: each image once over all ranks.

        `keep` has the worker processes wait for the next time. They are not to be kept where nobody asks again: a notebook's
        kernel ends without ending them.
        """
        loader = self.eval_loader
        if loader is None:
            check_shared_memory(self, devices=devices)
            mine, at_once = range(rank, len(self), devices), self.evaluated_at_once
            batches = [[(i, 0) for i in mine[k : k + at_once]] for k in range(0, len(mine), at_once)]
            loader = self.loader(None, batches, devices)
        self.eval_loader = loader if keep else None
        for images, labels in self._read(loader):
            yield self.normalise(images), labels

    def _read(self, loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in loader:
            images, labels = self._sound(*batch)
            labels = labels.to(self.device, non_blocking=True) if isinstance(labels, Tensor) else labels
            yield images.to(self.device, non_blocking=True), labels

    def check(self, every: int = 1) -> tuple[int, dict[str, str], int]:
        """Open every n-th image. Return how many were opened, name and reason of those that cannot be read, and how many have
        a camera's orientation tag, which is not followed."""
        reader = self._reader(None)
        some = range(0, len(self), every)
        broken, turned = {}, 0

        def inspect(i: int) -> tuple[tuple[str, str] | None, bool]:
            image, error = reader.open(i)
            return error, image is not None and is_turned(image)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for start in range(0, len(some), 10_000):  # a pool holds all that it was given
                for error, has_tag in pool.map(inspect, some[start : start + 10_000]):
                    broken.update([error] if error else [])
                    turned += has_tag
        return len(some), broken, turned

    def _reader(self, recipe: TrainingSettings | None) -> "_Reader":
        """Return what worker processes run; without a recipe the centre crop of evaluation."""
        mean = tuple(self.mean.flatten().tolist())
        transform = make_transform(self.shape, recipe, crop_pct=self.settings.crop_pct, mean=mean)
        mode = "L" if self.shape[0] == 1 else "RGB"
        skip = self.settings.skip_broken and recipe is not None  # evaluating another would count that one twice
        return _Reader(self.source.opener, self.labels, self.index, transform, mode, skip)

    def _collate(self) -> Callable[[list[Any]], Any]:
        return _collate

    def _workers(self, devices: int) -> int:
        """Return how many processes read for this one."""
        if self.machine.workers is not None:
            return self.machine.workers
        return max(1, _cores() // min(self.machine.devices, devices))  # those of this machine share its cores

    def read_ahead(self, batch: int, batches: int, workers: int) -> int:
        """Return the bytes of shared memory that so many worker processes fill at most.

        They are those of batches read ahead, of the one in use and the one that follows it, of the names of the image files,
        and of the semaphores of the loader's queues (a page each: three a worker, and eight).
        """
        if not workers:
            return 0
        one = _pages(batch * math.prod(self.shape)) + _pages(batch * 8)  # images uint8, labels int64
        semaphores = (3 * workers + 8) * mmap.PAGESIZE
        return min(workers * PREFETCH + 2, batches) * one + _tensor_bytes(self.source.opener) + semaphores

    def loader(self, recipe: TrainingSettings | None, batches: Any, devices: int) -> DataLoader:
        """Return what reads these batches of places ahead, augmented if there is a recipe."""
        workers, start_method = self._workers(devices), self.machine.start_method
        multiprocessing.set_forkserver_preload([__name__])  # so that workers need not import torch each
        return DataLoader(
            self._reader(recipe), batch_sampler=batches, num_workers=workers, collate_fn=self._collate(),
            pin_memory=self.device.type == "cuda", persistent_workers=bool(workers), worker_init_fn=_end_with_reader,
            prefetch_factor=PREFETCH if workers else None, multiprocessing_context=start_method if workers else None,
        )  # fmt: skip

    def _sound(
        self, images: Tensor | None, labels: Tensor, broken: list[tuple[str, str]], faults: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Return images and labels of a batch; SettingsError if one is missing."""
        if faults:
            raise SettingsError(
                f"an image's transforms failed: {faults[0]}; another training.randaugment, or another version of timm or "
                "pillow, may do"
            )
        self.note(broken, fatal=images is None)
        return images, labels

    def note(self, broken: Iterable[tuple[str, str]], *, fatal: bool) -> None:
        """Remember images that cannot be read (name, reason); SettingsError if there are some, and nothing is in their place."""
        self.broken.update(broken)
        if broken and fatal:
            name, reason = next(iter(broken))
            raise SettingsError(
                f"{len(self.broken)} image(s) cannot be read, the first: {name} ({reason}); `incubate check` names all of "
                "them, data.skip_broken=true takes the next image in place of each that is to be trained on"
            )


# -- shared memory, through which worker processes hand images over -------------------------------------------------------


def check_shared_memory(
    eval_set: StreamedSet, train: StreamedSet | None = None, recipe: TrainingSettings | None = None, devices: int = 1
) -> None:
    """Raise SettingsError if /dev/shm is too small for what worker processes read ahead: training would wait for ever.

    What was read ahead to train on stays there while images are evaluated, so both count. Phases side by side have as much
    of it each as of the cores ($INCUBATE_THREADS), and so have those of `devices` that are in one machine.
    """
    machine, workers = eval_set.machine, eval_set._workers(devices)
    sharing = min(machine.devices, devices)  # a notebook evaluates on one device, whatever the machine has
    mine = math.ceil(len(eval_set) / devices)
    reads = [(eval_set, min(mine, EVAL_BATCH), math.ceil(mine / EVAL_BATCH))]  # set, size and number of batches
    if recipe:
        number, micro = micro_batches(recipe.batch_size, recipe.micro_batch, devices)
        reads.append((train, micro, number * total_steps(recipe.epochs, len(train), recipe.batch_size)))

    def needed(workers: int) -> int:
        return sum(part.read_ahead(batch, batches, workers) for part, batch, batches in reads)

    try:
        there = os.statvfs(SHARED_MEMORY)
    except OSError:  # not on this system
        return
    share = _cores() / len(os.sched_getaffinity(0))
    room = int(min(there.f_bavail, share * there.f_blocks) * there.f_frsize / sharing)
    fits = next(fewer for fewer in range(workers, -1, -1) if needed(fewer) <= room)
    if fits < workers:
        instead = f"{fits} or fewer" if fits else "0, which reads without them"
        raise SettingsError(
            f"{SHARED_MEMORY} has room for {room / 1e6:.0f} MB of images that are read ahead, but machine.workers {workers} can "
            f"fill {needed(workers) / 1e6:.0f} MB and would then wait for ever; set machine.workers to {instead}, or give "
            f"{SHARED_MEMORY} more room (docker run --shm-size)"
        )


def _cores() -> int:
    """Return this phase's share of the cores, where several run side by side."""
    return int(os.environ.get("INCUBATE_THREADS") or len(os.sched_getaffinity(0)))


def _pages(size: int) -> int:
    """Return what so many bytes take in shared memory."""
    return math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE


def _tensor_bytes(value: Any, depth: int = 4) -> int:
    """Return what the tensors in an object take in shared memory, where they go when worker processes get a copy of it."""
    if isinstance(value, Tensor):
        return _pages(value.nbytes)
    parts = vars(value).values() if depth and hasattr(value, "__dict__") else ()
    return sum(_tensor_bytes(part, depth - 1) for part in parts)


# -- in worker processes --------------------------------------------------------------------------------------------------

# Image or none, label, images that cannot be read (name, reason), what a transform failed of.
_Item = tuple[Tensor | None, int, list[tuple[str, str]], str]


@dataclass(frozen=True)
class _Reader(torch.utils.data.Dataset):
    """Opens and augments one image; runs in worker processes. What goes wrong is returned, not raised: an image that cannot be
    read, or that the transforms fail on."""

    opener: Opener
    labels: np.ndarray
    index: np.ndarray
    transform: Any
    mode: str
    skip_broken: bool

    def __getitem__(self, item: tuple[int, int]) -> _Item:
        i, seed = item
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        broken = []
        for step in range(min(MAX_BROKEN, len(self.index)) if self.skip_broken else 1):
            at = (i + step) % len(self.index)
            image, error = self.open(at)
            if image is not None:
                try:
                    made, label = self.made(at, image)
                except Exception as fault:  # whatever other versions of timm and pillow handle differently
                    name = self.opener.name(int(self.index[at]))
                    return None, 0, broken, f"{name} with seed {seed} ({type(fault).__name__}: {fault})"
                return made, label, broken, ""
            broken.append(error)
        return None, 0, broken, ""

    def made(self, at: int, image: Image.Image) -> tuple[Tensor, Any]:
        """Return an opened image, augmented, and its label."""
        return torch.as_tensor(self.transform(image)), int(self.labels[at])  # older timm: an array

    def open(self, i: int) -> tuple[Image.Image | None, tuple[str, str] | None]:
        """Return the decoded image, or its name and why it cannot be read."""
        at = int(self.index[i])
        try:
            return self.opener(at).convert(self.mode), None
        except Exception as error:  # damaged files make decoders raise anything
            return None, (self.opener.name(at), f"{type(error).__name__}: {error}")


def _end_with_reader(worker: int) -> None:
    """End a worker when the process that reads from it is gone; torch watches its parent, which may be a fork server."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if os.environ.get("INCUBATE_STOP"):  # a cluster warns all processes of a job; torch has workers end at that
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _collate(items: list[_Item]) -> tuple[Tensor | None, Tensor, list[tuple[str, str]], list[str]]:
    """Return images, none if one is missing, labels, and what was wrong."""
    images, labels, broken, faults = zip(*items, strict=True)
    whole = all(image is not None for image in images)
    broken = [error for errors in broken for error in errors]
    return torch.stack(images) if whole else None, torch.tensor(labels), broken, [fault for fault in faults if fault]
