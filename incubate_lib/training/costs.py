"""What training costs, counted: FLOPs of one image forward and backward, on the meta device, without running anything.

A multiply-add is two FLOPs. Counted are matrix products, convolutions and attention, as torch's FlopCounterMode does;
the element-wise rest and the optimiser are not. Frozen parts cost what they must: before the target forward only,
behind it forward and the gradient of their input. With these rules ViT-B/16 at 224 px costs 105.15 GFLOP end to end.

On the meta device attention is not fused: plain products, whose results are kept for the backward pass. Budgets are
matched by this count, which is the same on every machine. Fused attention, which real devices run, computes queries times
keys once more in the backward pass; `executed_flops_per_image` counts that, too.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from incubate_lib.method.incubation import Hybrid, Imitation


def train_flops_per_image(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return the FLOPs of forward and backward for one image [C, H, W] with today's requires_grad, attention not fused.

    Exact on the meta device, which budgets are matched by. The model is left as it is; one on the meta device gets
    gradients there, which cost nothing.
    """
    if any(parameter.device.type != "meta" for parameter in model.parameters()):
        model = copy.deepcopy(model).to("meta")
    model.train()
    [flops], _ = _go_through(model, _images(image_shape), backward=True)
    return flops // 2


def executed_flops_per_image(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return the FLOPs that the model's device executes, forward and backward, for one image [C, H, W] with today's
    requires_grad: with fused attention where the device has it.

    Two empty images pass through the model as it is, in its mode and under the caller's autocast; weights, their
    gradients and buffers are left alone. What torch.compile makes of it is not seen.
    """
    x = torch.zeros(2, *image_shape, device=next(model.parameters()).device)
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # batch norm writes to them
    with all_products() as counter, torch.enable_grad():
        out = functional_call(model, buffers, (x,))
        torch.autograd.grad(out.float().sum(), learns, allow_unused=True)
    return counter.get_total_flops() // 2


def all_products() -> FlopCounterMode:
    """Return a counter that knows the products in place and with vectors, too, which torch's own passes over."""
    aten = torch.ops.aten
    behind = {aten.addmm_, aten.baddbmm_, aten.addbmm, aten.addbmm_, aten.addmv, aten.addmv_}  # what is added to comes first
    return FlopCounterMode(
        display=False,
        custom_mapping={op: _product(1) for op in behind} | {op: _product(0) for op in (aten.mv, aten.dot, aten.vdot)},
    )


def _product(first: int) -> Callable[..., int]:
    """Return the FLOPs of a product whose factors are the arguments `first` and the next, from their shapes."""

    def flops(*shapes: tuple[int, ...], **more: object) -> int:
        a, b = shapes[first : first + 2]
        return 2 * math.prod(a) * (b[-1] if len(b) > 1 else 1)

    return flops


@dataclass
class FlopCounts:
    """The same counts for a network before it is trained, and for hybrids made of the same modules: exact, too, and sooner.

    Going through all operations of a deep network takes seconds. So of blocks that are alike two are gone through,
    and of modules that are alike one.
    """

    image_shape: tuple[int, int, int]
    known: dict[tuple, tuple[tuple[int], Tensor]] = field(default_factory=dict)

    def per_image(self, model: nn.Module) -> int:
        """Return the FLOPs of forward and backward for one image; everything is on the meta device."""
        return sum(flops for _, flops in self.parts(model))

    def parts(self, model: nn.Module) -> list[tuple[nn.Module, int]]:
        """Return the modules that an image goes through in training, in order, and each one's FLOPs; a whole network is one."""
        model.train()
        x, found = _images(self.image_shape), []
        prefix, target, suffix = (model.prefix, model.target, model.suffix) if isinstance(model, Hybrid) else ((), model, ())
        for part in prefix:
            flops, x = self._part(part, x, backward=False)
            found.append((part, flops // 2))
        if isinstance(model, Imitation):
            found.append((model.model_of, self._part(model.model_of, x, backward=False)[0] // 2))
            suffix = ()
        for part in (target, *suffix):
            flops, x = self._part(part, x, backward=True)
            found.append((part, flops // 2))
        return found

    def _part(self, part: nn.Module, x: Tensor, *, backward: bool) -> tuple[int, Tensor]:
        key = (x.shape, backward, x.requires_grad)
        [flops], out = by_blocks(part, self.known, key, lambda: _go_through(part, x, backward=backward))
        return flops, out


def _images(shape: tuple[int, int, int]) -> Tensor:
    return torch.empty(2, *shape, device="meta")  # batch norm cannot train on a single image


def _go_through(part: nn.Module, x: Tensor, *, backward: bool) -> tuple[tuple[int], Tensor]:
    x = x.detach().requires_grad_(x.requires_grad)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out = part(x)
        if backward:
            out.sum().backward()
    return (counter.get_total_flops(),), torch.empty_like(out, requires_grad=backward)


def by_blocks(part: nn.Module, known: dict, key: tuple, count: Callable[[], tuple]) -> tuple[Sequence[int], Any]:
    """Return what `count` does of a part, numbers and something else; numbers are linear in the blocks that are alike.

    Of those it counts with one and with two. `known` keeps what was counted, by `key` and the description of the part.
    """
    blocks = getattr(part, "blocks", None)
    alike = isinstance(blocks, nn.Sequential) and len({description(block) for block in blocks}) == 1
    found = []
    try:
        for depth in range(1, 1 + min(2, len(blocks) if alike else 1)):
            if alike:
                part.blocks = blocks[:depth]
            own = (description(part), *key)
            if own not in known:
                known[own] = count()
            found.append(known[own])
    finally:
        if alike:
            part.blocks = blocks
    numbers, rest = found[0]
    if len(found) == 2:
        numbers = [one + (len(blocks) - 1) * (two - one) for one, two in zip(numbers, found[1][0], strict=True)]
    return numbers, rest


def description(block: nn.Module) -> str:
    """Describe layers, sizes, and which parameters are trained."""
    return f"{block} {[(name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters()]}"
