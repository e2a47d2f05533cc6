"""Image sets as the loop sees them: micro-batches to train on, batches to judge by, on the device.

Small sets (`ImageSet`) live on the device as uint8 and are augmented there, a kernel launch per batch instead of a
Python call per image. Large ones (`StreamedSet`) are read and augmented by worker processes with timm's transforms.
Which images a micro-batch holds, and how each is augmented, are pure functions of seed, step and place: they depend on
neither the number of devices and workers nor on where a run was interrupted.
Letters: B batch, C channels, H and W pixels.
"""

import multiprocessing
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader

from incubate_lib.config import DEFAULT_MACHINE, DataSettings, MachineSettings, SettingsError, TrainingSettings
from incubate_lib.training.schedule import derive_seed, micro_batches, steps_per_epoch
from incubate_lib.training.sources import Opener, Source, open_source

EVAL_BATCH = 256
PREFETCH = 4  # batches that each worker reads ahead
MAX_BROKEN = 100  # unreadable images in a row that are passed over; more, and something else is wrong
Shape = tuple[int, int, int]  # C, H, W


@dataclass(frozen=True)
class Order:
    """Which images each micro-batch of a phase holds.

    Every epoch is a random order of all images. With `repeats` r each image stands r times in a row, and the epoch
    ends after as many places as there are images, as with timm's RepeatAugSampler: it shows 1/r of them.
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
        for step in range(self.start, self.steps):
            epoch, place = divmod(step, per_epoch)
            order = _epoch_order(self.num_images, self.seed, epoch, self.settings.repeats)
            for k in range(number):
                first = place * batch + (k * self.devices + self.rank) * micro
                yield epoch, torch.arange(first, first + micro), order[first : first + micro]


@lru_cache(maxsize=2)
def _epoch_order(num_images: int, seed: int, epoch: int, repeats: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_images, generator=generator).repeat_interleave(repeats)[:num_images]


@dataclass(frozen=True)
class ImageSet:
    """Images [N, C, H, W] uint8 and labels [N] int64 on one device, with what normalises them."""

    images: Tensor
    labels: Tensor
    mean: Tensor  # [C, 1, 1], of the training images, in 0 … 1
    std: Tensor
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> Shape:
        """C, H, W as the model sees them."""
        return tuple(self.images.shape[1:])

    def preview(self, num: int, recipe: TrainingSettings | None = None) -> Tensor:
        """Return the first images as uint8 [num, C, H, W], augmented as in training if a recipe is given."""
        some = self.images[:num]
        return augment(some, recipe) if recipe else some

    def normalise(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std

    def batches(self, order: Order) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield micro-batches to train on: uint8 images [B, C, H, W] and labels [B]; `finish` makes them ready."""
        for _, _, index in order:
            if self.labels.is_cuda:  # or the copy would wait for all work that is queued
                index = index.pin_memory().to(self.labels.device, non_blocking=True)
            yield self.images[index], self.labels[index]

    def finish(self, images: Tensor, recipe: TrainingSettings) -> Tensor:
        """Augment on the device, drawing from the global generators, and normalise."""
        return self.normalise(augment(images, recipe))

    def judged(self, rank: int = 0, devices: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised batches of every image that falls to this rank: each image once over all ranks."""
        for index in torch.arange(rank, len(self), devices, device=self.labels.device).split(EVAL_BATCH):
            yield self.normalise(self.images[index]), self.labels[index]


@dataclass
class StreamedSet:
    """Images read when they are needed, by worker processes, through timm's transforms."""

    opener: Opener
    labels: np.ndarray  # [M], of the source
    index: np.ndarray  # [N], which of the source's images belong to this set
    shape: Shape
    num_classes: int
    settings: DataSettings
    device: torch.device
    machine: MachineSettings = DEFAULT_MACHINE
    broken: dict[str, str] = field(default_factory=dict)  # images passed over so far: name → reason
    judges: DataLoader | None = None  # kept, because starting its workers takes longer than a small evaluation

    def __len__(self) -> int:
        return len(self.index)

    def __post_init__(self) -> None:
        channels = self.shape[0]
        mean, std = (np.array(v) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        mean, std = (v if channels == 3 else np.full(channels, v.mean()) for v in (mean, std))
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=self.device)[:, None, None] for v in (mean, std))

    def preview(self, num: int, recipe: TrainingSettings | None = None) -> Tensor:
        """Return the first images as uint8 [num, C, H, W], as judged, or augmented as in training."""
        reader = self._reader(recipe)
        return torch.stack([self._sound(reader[i, i]) for i in range(min(num, len(self)))])

    def normalise(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std

    def batches(self, order: Order) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield micro-batches to train on: uint8 images [B, C, H, W] and labels [B]; `finish` makes them ready."""
        sampler = _Seeded(order, derive_seed(order.seed, "augment"))
        _, micro = micro_batches(order.settings.batch_size, order.settings.micro_batch, order.devices)
        for images, labels, broken in self._loader(order.settings, sampler, order.devices):
            self._note(broken, passed_over=self.settings.skip_broken and len(labels) == micro)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def finish(self, images: Tensor, recipe: TrainingSettings) -> Tensor:
        """Normalise, and erase rectangles on the device, drawing from the global generators."""
        images = self.normalise(images)
        if recipe.erase:
            images = RandomErasing(recipe.erase, mode="pixel", device=images.device)(images)
        return images

    def judged(self, rank: int = 0, devices: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised batches of every image that falls to this rank: each image once over all ranks."""
        if self.judges is None:
            mine = range(rank, len(self), devices)
            batches = [[(i, 0) for i in mine[k : k + EVAL_BATCH]] for k in range(0, len(mine), EVAL_BATCH)]
            self.judges = self._loader(None, batches, devices)
        for images, labels, broken in self.judges:
            self._note(broken)
            yield self.normalise(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)

    def check(self, every: int = 1) -> tuple[int, dict[str, str]]:
        """Open every n-th image; return how many were opened, and name → reason of those that cannot be read."""
        reader = self._reader(None)
        some = range(0, len(self), every)
        broken = {}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for start in range(0, len(some), 10_000):  # a pool holds all that it was given
                found = pool.map(lambda i: reader.open(i)[1], some[start : start + 10_000])
                broken.update(error for error in found if error)
        return len(some), broken

    def _reader(self, recipe: TrainingSettings | None) -> "_Reader":
        """Return what worker processes run; without a recipe the centre crop by which images are judged."""
        if recipe is None:
            how = {"is_training": False, "crop_pct": self.settings.crop_pct}
        else:
            jitter = None if recipe.randaugment else recipe.color_jitter or None
            how = {"is_training": True, "hflip": 0.5 * recipe.hflip, "auto_augment": recipe.randaugment, "color_jitter": jitter}
        mean, std = (tuple(v.flatten().tolist()) for v in (self.mean, self.std))
        try:
            transform = create_transform(self.shape, interpolation="bicubic", mean=mean, std=std, use_prefetcher=True, **how)
        except Exception as error:  # timm checks its notation by asserts
            raise SettingsError(
                f"training.randaugment {recipe and recipe.randaugment!r}: {error or 'not timm notation'}"
            ) from None
        mode = "L" if self.shape[0] == 1 else "RGB"
        skip = self.settings.skip_broken and recipe is not None  # judging by another image would count that one twice
        return _Reader(self.opener, self.labels, self.index, transform, mode, skip)

    def _loader(self, recipe: TrainingSettings | None, batches: Any, devices: int) -> DataLoader:
        workers = self.machine.workers
        if workers is None:
            cores = int(os.environ.get("INCUBATE_THREADS") or len(os.sched_getaffinity(0)))  # this phase's share of them
            workers = max(1, cores // devices)
        how = {}
        if workers:
            context = multiprocessing.get_context(self.machine.start_method)
            if self.machine.start_method == "forkserver":
                context.set_forkserver_preload(["incubate_lib.training.data"])  # so that workers need not import torch each
            how = {"multiprocessing_context": context, "persistent_workers": True, "prefetch_factor": PREFETCH}
            how["worker_init_fn"] = _end_with_reader
        return DataLoader(
            self._reader(recipe), batch_sampler=batches, num_workers=workers, collate_fn=_collate,
            pin_memory=self.device.type == "cuda", **how,
        )  # fmt: skip

    def _note(self, broken: list[tuple[str, str]], passed_over: bool = False) -> None:
        """Remember images that cannot be read; SettingsError unless others were taken in their place."""
        self.broken.update(broken)
        if broken and not passed_over:
            name, reason = broken[0]
            raise SettingsError(
                f"{len(self.broken)} image(s) cannot be read, the first: {name} ({reason}); `incubate check` names all of "
                "them, data.skip_broken=true takes the next image in place of each that is to be trained on"
            )

    def _sound(self, item: tuple[Tensor, int, list]) -> Tensor:
        image, _, broken = item
        self._note(broken)
        return image


@dataclass(frozen=True)
class _Seeded:
    """The sampler of a training loader: batches of (place in the set, seed of its augmentation)."""

    order: Order
    seed: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, places, images in self.order:
            yield [(i, derive_seed(self.seed, epoch, p)) for i, p in zip(images.tolist(), places.tolist(), strict=True)]


@dataclass(frozen=True)
class _Reader(torch.utils.data.Dataset):
    """Opens and augments one image; runs in worker processes. An image that cannot be read is told, not raised."""

    opener: Opener
    labels: np.ndarray
    index: np.ndarray
    transform: Any
    mode: str
    skip_broken: bool

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor | None, int, list[tuple[str, str]]]:
        i, seed = item
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        broken = []
        for step in range(min(MAX_BROKEN, len(self.index)) if self.skip_broken else 1):
            at = (i + step) % len(self.index)
            image, error = self.open(at)
            if image is not None:
                return torch.as_tensor(self.transform(image)), int(self.labels[self.index[at]]), broken  # older timm: an array
            broken.append(error)
        return None, 0, broken

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


def _collate(items: list) -> tuple[Tensor, Tensor, list[tuple[str, str]]]:
    images = [image for image, _, _ in items if image is not None]
    labels = [label for image, label, _ in items if image is not None]
    broken = [error for _, _, errors in items for error in errors]
    return torch.stack(images) if images else torch.empty(0), torch.tensor(labels), broken


def load_data(
    settings: DataSettings,
    device: torch.device | str = "cpu",
    shape: Shape | None = None,
    machine: MachineSettings = DEFAULT_MACHINE,
) -> tuple[ImageSet, ImageSet] | tuple[StreamedSet, StreamedSet]:
    """Return the images to train on and the images to judge by: the test split, or a validation split cut from training.

    `shape` is what the model takes (C, H, W); streamed images are brought to it. Raises SettingsError for anything that
    is wrong with folder, classes, images or the sizes of splits.
    """
    device = torch.device(device)
    train, test = open_source(settings, machine)
    num_classes = max(len(train.classes), int(train.labels.max()) + 1)
    learn, judge = _splits(settings, train, test)
    if settings.is_streamed:
        sets = [
            StreamedSet(source.opener, source.labels, index, shape or (3, 224, 224), num_classes, settings, device, machine)
            for source, index in (learn, judge)
        ]
        for part in sets:
            found = list(part.check(every=max(1, len(part) // 64))[1].items())  # all of a large set would take hours
            part._note(found, passed_over=settings.skip_broken)
        return tuple(sets)
    (x, y), (judged_x, judged_y) = (_pixels(settings, *part) for part in (learn, judge))
    levels = np.arange(256) / 255
    counts = np.stack([np.bincount(x[:, c].ravel(), minlength=256) / x[:, c].size for c in range(x.shape[1])])
    mean = counts @ levels  # of a histogram: exact, and no copy of the images in floating point
    bessel = x[:, 0].size / (x[:, 0].size - 1)
    std = np.sqrt(bessel * (counts * (levels - mean[:, None]) ** 2).sum(1)).clip(1e-3)
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device)[:, None, None] for v in (mean, std))

    def put(pixels: np.ndarray, labels: np.ndarray) -> ImageSet:
        return ImageSet(torch.from_numpy(pixels).to(device), torch.from_numpy(labels).to(device), mean, std, num_classes)

    return put(x, y), put(judged_x, judged_y)


def _splits(settings: DataSettings, train: Source, test: Source | None) -> tuple[tuple[Source, np.ndarray], ...]:
    """Return (source, index of its images) to train on and to judge by."""
    rest = np.arange(len(train.labels))
    if test is None:
        rest, judge = _cut(settings, train.labels, rest, settings.test_images or len(rest) // 3, "data.test_images")
        test = train
    else:
        judge = np.arange(len(test.labels))
        if settings.test_images not in (None, len(judge)):
            _, judge = _cut(settings, test.labels, judge, settings.test_images, "data.test_images")
    if settings.eval_split == "val":
        rest, judge = _cut(settings, train.labels, rest, settings.val_images or len(rest) // 6, "data.val_images")
        test = train
    if settings.train_share < 1:
        _, rest = _cut(settings, train.labels, rest, round(settings.train_share * len(rest)), "data.train_share")
    return (train, rest), (test, judge)


def _cut(settings: DataSettings, labels: np.ndarray, index: np.ndarray, size: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Cut `size` images off `index`, every class in its proportion; return what is left and what was cut off."""
    labels = labels[index]
    classes = len(np.unique(labels))
    if not classes <= size <= len(index) - classes:
        raise SettingsError(
            f"{what} is {getattr(settings, what.removeprefix('data.')) or size}; of {len(index)} images in {classes} classes, "
            f"{classes} to {len(index) - classes} can be set apart"
        )
    shuffled = np.random.default_rng(settings.split_seed).permutation(len(index))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    share = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])  # how far into its class each image stands, 0 … 1
    place = np.empty(len(index))
    place[by_class] = share
    cut = shuffled[np.argsort(place[shuffled], kind="stable")[:size]]
    left = np.ones(len(index), dtype=bool)
    left[cut] = False
    return index[left], np.sort(index[cut])


def _pixels(settings: DataSettings, source: Source, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return images [N, C, H, W] and labels [N] of an index; opened images must all be of one size and mode."""
    if source.pixels is not None:
        return source.pixels[index], source.labels[index]
    images, first = [], None
    for i in map(int, index):
        try:
            image = source.opener(i)
        except Exception as error:
            raise SettingsError(f"{source.opener.name(i)} cannot be read ({type(error).__name__}: {error})") from None
        looks = image.size, image.mode
        first = first or looks
        if looks != first or image.mode not in ("L", "RGB"):
            told = f"{source.opener.name(i)} is {image.size[0]} × {image.size[1]} pixels of mode {image.mode}"
            alike = f"and the first is {first[0][0]} × {first[0][1]}, {first[1]}"
            raise SettingsError(f"{told}; with data.in_memory all must be L or RGB and alike, {alike}")
        pixels = np.asarray(image)
        images.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
    return np.stack(images), source.labels[index]


# -- augmentation on the device -------------------------------------------------------------------------------------------


def shift(images: Tensor, pixels: int) -> Tensor:
    """Move each image of [B, C, H, W] by up to `pixels` in each direction; the border is filled with zeros."""
    b, _, h, w = images.shape
    dy, dx = torch.randint(0, 2 * pixels + 1, (2, b), device=images.device)
    rows = (torch.arange(h, device=images.device) + dy[:, None])[:, None, :, None]  # [B, 1, H, 1]
    columns = (torch.arange(w, device=images.device) + dx[:, None])[:, None, None, :]  # [B, 1, 1, W]
    padded = F.pad(images, (pixels,) * 4)
    place = torch.arange(b, device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[place, channel, rows, columns]


def augment(images: Tensor, settings: TrainingSettings) -> Tensor:
    """Apply the recipe's random translation and mirroring to a batch of uint8 images [B, C, H, W]."""
    if settings.shift:
        images = shift(images, settings.shift)
    if settings.hflip:
        flip = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return images
