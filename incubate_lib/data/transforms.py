"""What makes the network's input of a decoded image: timm's transforms by a recipe, with what newer pillows refuse in them."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, posterize

from incubate_lib.config import SettingsError, TrainingSettings


def make_transform(
    shape: tuple[int, int, int], recipe: TrainingSettings | None, *, crop_pct: float, mean: tuple[float, ...]
) -> Callable[[Image.Image], Any]:
    """Return what makes a uint8 image of `shape` (C, H, W) of a decoded one: a recipe's augmentation, drawn anew each time.

    Without a recipe it is the centre crop of evaluation. Raises SettingsError for a `randaugment` that is
    not in timm's notation.
    """
    how: dict[str, Any] = {"is_training": recipe is not None, "crop_pct": crop_pct}
    if recipe is not None:
        jitter = None if recipe.randaugment else recipe.color_jitter or None
        how |= {"hflip": 0.5 * recipe.hflip, "auto_augment": recipe.randaugment, "color_jitter": jitter}
    try:
        transform = create_transform(shape, interpolation="bicubic", mean=mean, use_prefetcher=True, **how)
    except Exception as error:  # timm checks its notation by asserts
        raise SettingsError(f"training.randaugment {recipe and recipe.randaugment!r}: {error or 'not timm notation'}") from None
    for operation in operations(transform):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return transform


def operations(transform: Any) -> list[AugmentOp]:
    """Return timm's operations, of which RandAugment, AugMix and AutoAugment choose, in a transform; other kinds have none."""
    found = []
    for step in transform.transforms:
        for some in [getattr(step, "ops", []), *getattr(step, "policy", [])]:
            found += some
    return found


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Keep so many bits of each channel. None makes a black image, as it did before pillow 13, which refuses it."""
    return posterize(image, bits_to_keep, **options) if bits_to_keep > 0 else Image.new(image.mode, image.size)
