"""The memory of a training step, counted before it is taken: weights, gradients, optimiser, and what waits for the backward pass.

Nothing is computed: fake tensors go through the network forward, and what they leave behind is added up. Kernels' own
workspace and the fragments of an allocator are not seen; against measured peaks the sum is a few percent low.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from incubate_lib.method.incubation import Hybrid
from incubate_lib.training.costs import by_blocks
from incubate_lib.training.stopwatch import LiveBytes
from incubate_lib.training.trainer import autocast

ADAM_STATES = 2  # numbers a trained weight: both moments
CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one device that trains; of several, each has as much."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    casts: int = 0  # weights once more in lower precision, kept for the backward pass
    activations: int = 0  # of one image, kept for the backward pass

    def __add__(self, other: "StepMemory") -> "StepMemory":
        return StepMemory(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def peak(self, images: int) -> int:
        """Return the peak of a step with so many images at once: before the backward pass, or after it, with all gradients."""
        return self.weights + self.optimizer + max(self.casts + images * self.activations, self.gradients)


def step_memory(model: nn.Module, image_shape: tuple[int, int, int], *, precision: str = "float32") -> StepMemory:
    """Return the memory of a step of a network, or of a hybrid, on the meta device, for images [C, H, W]."""
    return sum(memory_by_part(model, image_shape, precision=precision).values(), StepMemory())


def memory_by_part(
    model: nn.Module, image_shape: tuple[int, int, int], *, precision: str = "float32", known: dict | None = None
) -> dict[str, StepMemory]:
    """Return the memory of each part: of a hybrid prefix, target and suffix, a part a module; of any other model itself.

    `known` is filled with what was found for parts that are alike, for those who ask for many.
    """
    known = {} if known is None else known
    if not isinstance(model, Hybrid):
        return {"network": _part(model, image_shape, False, True, precision, known)[0]}
    memory, x = {}, (image_shape, False)
    parts = [*((m, False) for m in model.prefix), (model.target, True), *((m, True) for m in model.suffix)]
    for number, (part, backward) in enumerate(parts):
        name = f"module {number + 1}"
        memory[name], *x = _part(part, *x, backward, precision, known)
    return memory


def _part(
    part: nn.Module, shape: Sequence[int], x_grad: bool, backward: bool, precision: str, known: dict
) -> tuple[StepMemory, tuple[int, ...], bool]:
    """Return a part's memory and its outputs, as shape of one and whether they want a gradient."""
    size = sum(p.numel() * p.element_size() for p in part.parameters())
    trained = sum(p.numel() * p.element_size() for p in part.parameters() if p.requires_grad)
    key = (tuple(shape), x_grad, backward, precision)
    (casts, activations), out = by_blocks(part, known, key, lambda: _kept(part, shape, x_grad, backward, precision))
    return StepMemory(size, trained, ADAM_STATES * trained, casts, activations), *out


def _kept(
    part: nn.Module, shape: Sequence[int], x_grad: bool, backward: bool, precision: str
) -> tuple[tuple[int, int], tuple[tuple[int, ...], bool]]:
    """Return what a part keeps for the backward pass, in all and for each image; its output for one image: shape, gradient."""
    kept = {}
    for images in (1, 3):
        with FakeTensorMode():
            state = {name: _fake(tensor) for name, tensor in (*part.named_parameters(), *part.named_buffers())}
            x = torch.empty(images, *shape, device=CPU, requires_grad=x_grad and backward)
            counted = LiveBytes([x, *state.values()])
            before = counted.live
            with counted, torch.set_grad_enabled(backward), autocast(CPU, precision):
                out = torch.func.functional_call(part, state, x)
            kept[images] = counted.live - before - (0 if backward else _bytes(out))
    per_image = (kept[3] - kept[1]) // 2
    return (max(0, kept[1] - per_image), per_image), (tuple(out.shape[1:]), out.requires_grad)


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CPU, requires_grad=tensor.requires_grad)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
