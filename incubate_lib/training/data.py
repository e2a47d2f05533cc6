"""Small image sets, held on the device as uint8 and augmented there in batches.

A kernel launch per batch, not a Python call per image: for sets that fit on the device, loading costs next to nothing.
Letters: B batch, C channels, H and W pixels.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from incubate_lib.config import DataSettings, SettingsError, TrainingSettings

SPLIT_SEED = 0  # one split for all runs, whatever their seed


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

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalised float images [B, C, H, W] and labels [B]."""
        return self.normalise(self.images[index]), self.labels[index]

    def normalise(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std


def load_data(settings: DataSettings, device: torch.device | str = "cpu") -> tuple[ImageSet, ImageSet]:
    """Return the images to train on and the images to judge by: the test split, or a validation split cut from training.

    Raises SettingsError when a split would be empty.
    """
    images, labels = _SOURCES[settings.source](settings)
    num_classes = int(labels.max()) + 1
    rest, test = _cut(labels, np.arange(len(labels)), settings.test_images or len(labels) // 3, "data.test_images")
    train, judge = rest, test
    if settings.eval_split == "val":
        train, judge = _cut(labels, rest, settings.val_images or len(rest) // 6, "data.val_images")
    x = torch.from_numpy(images).to(device)
    y = torch.from_numpy(labels).to(device)
    pixels = x[train].double() / 255
    mean = pixels.mean((0, 2, 3)).float()[:, None, None]
    std = pixels.std((0, 2, 3)).clamp_min(1e-3).float()[:, None, None]
    return tuple(ImageSet(x[part], y[part], mean, std, num_classes) for part in (train, judge))


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


def _cut(labels: np.ndarray, index: np.ndarray, size: int, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Cut `size` images off `index`, every class in its proportion; return what is left and what was cut off."""
    classes = len(np.unique(labels))
    if not classes <= size <= len(index) - classes:
        raise SettingsError(
            f"{field} is {size}; of {len(index)} images in {classes} classes, "
            f"{classes} to {len(index) - classes} can be set apart"
        )
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(index)
    share = np.empty(len(shuffled))  # how far into its class each image stands, 0 … 1
    for label in np.unique(labels):
        of_class = labels[shuffled] == label
        share[of_class] = (np.arange(of_class.sum()) + 0.5) / of_class.sum()
    cut = shuffled[np.argsort(share, kind="stable")[:size]]
    return np.setdiff1d(index, cut), np.sort(cut)


def _digits(settings: DataSettings) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits, 8 × 8 pixels, one channel, read from inside its package.

    Importing scikit-learn for one small table would cost every notebook several seconds.
    """
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    table = np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.int64)
    images = (table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    return images, table[:, -1]


def _synthetic(settings: DataSettings) -> tuple[np.ndarray, np.ndarray]:
    """Generated images: a smooth random pattern a class, under noise. Learnable, not trivial."""
    rng = np.random.default_rng(SPLIT_SEED)
    size, channels, classes = settings.image_size, settings.channels, settings.num_classes
    coarse = rng.normal(size=(classes, channels, 3, 3))
    patterns = F.interpolate(torch.from_numpy(coarse), size=(size, size), mode="bilinear").numpy()
    labels = np.arange(settings.num_images) % classes
    noisy = 128 + 45 * (patterns[labels] + rng.normal(size=(settings.num_images, channels, size, size)))
    return noisy.clip(0, 255).round().astype(np.uint8), labels.astype(np.int64)


_SOURCES = {"digits": _digits, "synthetic": _synthetic}
