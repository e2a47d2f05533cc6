"""The memory of a training step, counted before it is taken: weights, gradients, optimiser, and what waits for the backward pass.

Nothing is computed: fake tensors go through the network forward, and the sizes of what they leave behind are summed. Kernels' own
workspace and the fragments of an allocator are not seen; against measured peaks the sum is a few percent low.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from incubate_lib.method.network import Partition
from incubate_lib.training.costs import by_module, by_stretch, description
from incubate_lib.training.stopwatch import LiveBytes
from incubate_lib.training.trainer import autocast

STATES = {"adamw": 2, "sgd": 1}  # numbers a trained weight: both moments, or the momentum
CPU = torch.device("cpu")


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one device that trains; of several, each has as much."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    casts: int = 0  # weights once more in lower precision, kept for the backward pass
    activations: int = 0  # of one image, kept for the backward pass
    resting: int = 0  # gradients of modules whose turn is over or comes: they wait only where micro-batches are added up

    def __add__(self, other: "StepMemory") -> "StepMemory":
        return StepMemory(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def peak(self, images: int, adds_up: bool = False) -> int:
        """Return the peak of a step with so many images at once: before the backward pass, or after it, with all gradients.

        Where micro-batches are added up, the gradients of those before wait beside the next one.
        """
        kept = self.casts + images * self.activations
        waiting = self.gradients + self.resting + kept if adds_up else max(kept, self.gradients)
        return self.weights + self.optimizer + waiting


def in_turn(parts: Sequence[StepMemory]) -> StepMemory:
    """Return the memory of modules that learn in turn in one update, each from a loss that is gone through backward before the
    next: all that is learned is there at once with its moments, but gradients and what waits for them of one at a time."""
    learned, most = sum(part.gradients for part in parts), max(part.gradients for part in parts)
    return StepMemory(
        weights=learned,
        gradients=most,
        optimizer=sum(part.optimizer for part in parts),
        casts=max(part.casts for part in parts),
        activations=max(part.activations for part in parts),
        resting=learned - most,
    )


def memory_by_part(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    partition: Partition | None = None,
    *,
    precision: str = "float32",
    optimizer: str = "adamw",
    known: dict | None = None,
) -> list[StepMemory]:
    """Return the memory of each module of a network on the meta device, in order, with today's requires_grad, for images
    [C, H, W]; a network that is not cut is one.

    `known` is filled with what was found, for those who ask for many.
    """
    known = {} if known is None else known
    key = (description(network), image_shape, precision, optimizer, partition and partition.ends)
    if key not in known:
        known[key] = _memory(network, image_shape, partition, precision, STATES[optimizer])
    return known[key]


def _memory(
    network: nn.Module, shape: Sequence[int], partition: Partition | None, precision: str, states: int
) -> list[StepMemory]:
    modules = partition.num_modules if partition else 1
    size, trained = [0] * modules, [0] * modules
    for name, parameter in network.named_parameters():
        module = partition.owner(name) if partition else 0
        size[module] += parameter.numel() * parameter.element_size()
        trained[module] += parameter.numel() * parameter.element_size() * parameter.requires_grad
    two, four = (  # batch norm cannot train on one image
        by_module(network, partition, lambda thinned, n=n: _kept(thinned, (n, *shape), partition, precision)) for n in (2, 4)
    )
    memory = []
    for weights, learned, first, all_four in zip(size, trained, two, four, strict=True):
        image = (all_four - first) // 2
        memory.append(StepMemory(weights, learned, states * learned, max(0, first - 2 * image), image))
    return memory


def _kept(network: nn.Module, shape: Sequence[int], partition: Partition | None, precision: str) -> list[int]:
    """Return the bytes that each stretch keeps for the backward pass."""
    with FakeTensorMode():
        state = {name: _fake(tensor) for name, tensor in (*network.named_parameters(), *network.named_buffers())}
        x = torch.empty(shape, device=CPU)
        counted = LiveBytes([x, *state.values()])

        kept = counted.live

        def live(handed_on: Tensor) -> int:
            nonlocal kept
            if handed_on.requires_grad:  # else nothing is kept: all that is there goes again
                kept = counted.live
            return kept

        run = lambda x: torch.func.functional_call(network, state, x)  # noqa: E731
        with counted, autocast(CPU, precision):
            return by_stretch(network, partition, x, live, backward=False, run=run)


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CPU, requires_grad=tensor.requires_grad)
