"""What of a network depends on the size of its images: how weights are resampled for another, and what divides it."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def blank(model: nn.Module, number: int, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return empty inputs on a network's device, or another: images [N, C, H, W], or tokens [N, T] where it reads those."""
    reads_tokens = len(shape) == 1 and any(isinstance(layer, nn.Embedding) for layer in model.modules())
    kind = torch.int64 if reads_tokens else None
    return torch.zeros(number, *shape, device=device or next(model.parameters()).device, dtype=kind)


@contextmanager
def embedded(model: nn.Module, x: Tensor, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what tokens [N, T] are embedded as, which are no numbers that could be changed themselves."""

    def changed(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return change(output) if args and args[0].shape == x.shape else output  # those of positions are the same for all

    with ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, nn.Embedding):
                hooks.enter_context(layer.register_forward_hook(changed))
        yield


@contextmanager
def differentiable(model: nn.Module, x: Tensor) -> Iterator[list[Tensor]]:
    """Have gradients reach what goes into a network, as if something before it learned: images, or the embeddings of tokens.
    Yields these leaves, those of tokens once the network has run."""
    leaves = [x.requires_grad_()] if x.is_floating_point() else []

    def cut(output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    with nullcontext() if leaves else embedded(model, x, cut):
        yield leaves


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
