"""Image sets as the loop sees them: micro-batches to train on, batches to evaluate on, on the device.

Small sets (`ImageSet`) live on the device as uint8 and are augmented there, a kernel launch per batch instead of a
Python call per image; large ones are `stream.StreamedSet`. Here both are made of a source: splits, shares, statistics.
Letters: B batch, C channels, H and W pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from incubate_lib.config import DEFAULT_MACHINE, SCENES, DataSettings, MachineSettings, SettingsError, TrainingSettings
from incubate_lib.data.folders import Source
from incubate_lib.data.order import EVAL_BATCH, Order, moved
from incubate_lib.data.sources import open_source
from incubate_lib.data.stream import StreamedSet
from incubate_lib.data.text import contexts
from incubate_lib.data.text.contexts import TextSet, load_texts

Shape = tuple[int, int, int]  # C, H, W
SHOWN = 5  # of the things that a sentence lists


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

    def some(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return images as evaluated, normalised [N, C, H, W], and labels [N] of an index."""
        index = moved(index, self.labels.device)
        return self.normalise(self.images[index]), self.labels[index]

    def batches(self, order: Order) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield micro-batches to train on: uint8 images [B, C, H, W] and labels [B]; `finish` makes them ready."""
        for _, _, index in order:
            index = moved(index, self.labels.device)
            yield self.images[index], self.labels[index]

    def finish(self, images: Tensor, recipe: TrainingSettings) -> Tensor:
        """Augment on the device, drawing from the global generators, and normalise."""
        return self.normalise(augment(images, recipe))

    def eval_batches(self, rank: int = 0, devices: int = 1, keep: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield normalised batches of every image that falls to this rank: each image once over all ranks.

        `keep` is for sets that worker processes read.
        """
        for index in torch.arange(rank, len(self), devices, device=self.labels.device).split(EVAL_BATCH):
            yield self.some(index)


def load_data(
    settings: DataSettings,
    device: torch.device | str = "cpu",
    shape: Shape | tuple[int] | None = None,
    machine: MachineSettings = DEFAULT_MACHINE,
) -> tuple[ImageSet, ImageSet] | tuple[StreamedSet, StreamedSet] | tuple[TextSet, TextSet]:
    """Return the images to train on and the images to evaluate on: the test split, or a validation split cut from training.

    `shape` is what the model takes (C, H, W, or the tokens of a context); streamed images are brought to it. Raises
    SettingsError for anything that is wrong with folder, classes, images, texts or the sizes of splits.
    """
    device = torch.device(device)
    if settings.is_text:
        return load_texts(settings, device, shape, machine)
    if shape is not None and len(shape) != 3:
        raise SettingsError(f"data.source {settings.source!r} holds images, but the network takes text (model.name)")
    train, test = open_source(settings, machine)
    classes = len(train.classes)  # a name for each label
    learn, eval_set = splits(settings, train, test)
    if settings.is_streamed:
        kind = StreamedSet
        if settings.source in SCENES:
            from incubate_lib.data.scenes.views import SceneSet as kind
        sets = [
            kind(source, index, shape or (3, 224, 224), classes, settings, device, machine) for source, index in (learn, eval_set)
        ]
        for part in sets:
            _, broken, _ = part.check(every=max(1, len(part) // 64))  # all of a large set would take hours
            part.note(broken.items(), fatal=not settings.skip_broken)
        return tuple(sets)
    (x, y), (eval_x, eval_y) = (_pixels(*part) for part in (learn, eval_set))
    if pad := settings.pad:
        x, eval_x = (np.pad(pixels, ((0, 0), (0, 0), (pad, pad), (pad, pad))) for pixels in (x, eval_x))
    if settings.resize:
        x, eval_x = (_shrink(pixels, settings.resize) for pixels in (x, eval_x))
    levels = np.arange(256) / 255
    counts = np.stack([np.bincount(x[:, c].ravel(), minlength=256) / x[:, c].size for c in range(x.shape[1])])
    mean = counts @ levels  # of a histogram: exact, and no copy of the images in floating point
    bessel = x[:, 0].size / (x[:, 0].size - 1)
    std = np.sqrt(bessel * (counts * (levels - mean[:, None]) ** 2).sum(1)).clip(1e-3)
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device)[:, None, None] for v in (mean, std))
    x, y, eval_x, eval_y = (torch.from_numpy(v).to(device) for v in (x, y, eval_x, eval_y))
    return ImageSet(x, y, mean, std, classes), ImageSet(eval_x, eval_y, mean, std, classes)


def invented(
    settings: DataSettings,
    number: int,
    shape: Shape | tuple[int],
    outputs: int,
    device: torch.device,
    asked: Callable[..., Tensor],
) -> ImageSet | TextSet:
    """Return so many random samples like those of a source, to measure how long an update takes; of images `asked`, given them
    and `outputs`, returns the labels."""
    if settings.is_text:
        return contexts.invented(number, shape[0], outputs, settings.mask_share, device)
    images = torch.randint(256, (number, *shape), dtype=torch.uint8, device=device)
    half = torch.full((shape[0], 1, 1), 0.5, device=device)
    return ImageSet(images, asked(images, outputs), half, half, outputs)


def unused_classes(labels: np.ndarray | Tensor, count: int) -> list[int]:
    """Return which of so many classes have none of these labels [N]."""
    return np.setdiff1d(np.arange(count), labels).tolist()


def unused_in_words(unused: list[int], count: int) -> str:
    """Say that labels do not begin at 0 or have gaps; nothing where every class has images."""
    if not unused:
        return ""
    some = ", ".join(map(str, unused[:SHOWN])) + (", …" if len(unused) > SHOWN else "")
    return (
        f"No image to train on has label {some}: {len(unused):,} of {count:,} outputs of the network have nothing to learn "
        "(labels are the numbers of classes, from 0 without gaps)."
    )


def splits(settings: DataSettings, train: Source, test: Source | None) -> tuple[tuple[Source, np.ndarray], ...]:
    """Return (source, index of its images) to train on and to evaluate on."""
    rest = np.arange(len(train.labels))
    if test is None:
        rest, held = _cut(settings, train.labels, rest, settings.test_images or len(rest) // 3, "test_images")
        test = train
    else:
        held = np.arange(len(test.labels))
        if settings.test_images not in (None, len(held)):
            _, held = _cut(settings, test.labels, held, settings.test_images, "test_images")
    if settings.eval_split == "val":
        rest, held = _cut(settings, train.labels, rest, settings.val_images or len(rest) // 6, "val_images")
        test = train
    if settings.train_share < 1:
        _, rest = _cut(settings, train.labels, rest, round(settings.train_share * len(rest)), "train_share")
    return (train, rest), (test, held)


def _cut(settings: DataSettings, labels: np.ndarray, index: np.ndarray, size: int, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Cut `size` images off `index`, every class in its proportion; return what is left and what was cut off."""
    has_classes = labels.ndim == 1 and labels.dtype.kind in "iu"
    labels = labels[index] if has_classes else np.zeros(len(index), dtype=np.int64)  # what is no class is one for all
    classes = len(np.unique(labels))
    if not classes <= size <= len(index) - classes:
        raise SettingsError(
            f"data.{field} is {getattr(settings, field) or size}; of {len(index)} images in {classes} classes, "
            f"{classes} to {len(index) - classes} can be set apart"
        )
    shuffled = np.random.default_rng(settings.split_seed).permutation(len(index))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    share = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])  # how far into its class each stands
    place = np.empty(len(index))
    place[by_class] = share
    cut = shuffled[np.argsort(place[shuffled], kind="stable")[:size]]
    return np.delete(index, cut), np.sort(index[cut])


def _pixels(source: Source, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return images [N, C, H, W] and labels [N] of an index; opened images must all be of one size and mode."""
    if source.pixels is not None:
        return source.pixels[index], source.labels[index]
    images: list[Image.Image] = []
    for i in map(int, index):
        name = source.opener.name(i)
        try:
            images.append(source.opener(i))
        except Exception as error:
            raise SettingsError(f"{name} cannot be read ({type(error).__name__}: {error})") from None
        image, first = images[-1], images[0]
        if (image.size, image.mode) != (first.size, first.mode):
            message = f"{name} is {image.size[0]} × {image.size[1]} pixels of mode {image.mode}"
            alike = f"and the first is {first.size[0]} × {first.size[1]}, {first.mode}"
            raise SettingsError(f"{message}; with data.in_memory all must be L or RGB and alike, {alike}")
    pixels = np.stack([np.asarray(image) for image in images])
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return pixels, source.labels[index]


def _shrink(pixels: np.ndarray, size: int) -> np.ndarray:
    """Return uint8 images [N, C, H, W] shrunk to squares, each new pixel the mean over what it covers."""
    if size > min(pixels.shape[2:]):
        raise SettingsError(
            f"data.resize is {size}, but the images have {pixels.shape[2]} × {pixels.shape[3]} pixels; it shrinks only"
        )
    parts = torch.from_numpy(pixels).split(4096)
    shrunk = [F.interpolate(part.float(), (size, size), mode="area").round() for part in parts]
    return torch.cat(shrunk).to(torch.uint8).numpy()


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
