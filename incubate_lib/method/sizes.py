"""What of a network depends on the size of its images: how weights are resampled for another, and what divides it."""

import sys
from collections.abc import Mapping

from torch import Tensor, nn


def at_size(weights: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Return weights of the same network for images of another size; as they are where every shape fits, or nothing resamples.

    The file in which a network is written knows how: timm's convention is a `checkpoint_filter_fn(weights, model)` there.
    For Vision Transformers that is position embedding and patches.
    """
    own = model.state_dict()
    resample = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if resample is None or all(own[name].shape == tensor.shape for name, tensor in weights.items() if name in own):
        return weights
    return resample(dict(weights), model)


def patch_size(model: nn.Module) -> int:
    """Return the side in pixels of the patches that a network's first layer cuts images into; 1 where they overlap."""
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    return first.stride[0] if first is not None and first.kernel_size == first.stride else 1
