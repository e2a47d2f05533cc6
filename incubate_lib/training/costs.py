"""What training costs, counted: FLOPs of one image forward and backward, on the meta device, without running anything.

A multiply-add is two FLOPs. Counted are matrix products, convolutions and attention, as torch's FlopCounterMode does;
the element-wise rest and the optimiser are not. Frozen parts cost what they must: before the target forward only,
behind it forward and the gradient of their input. With these rules ViT-B/16 at 224 px costs 105.15 GFLOP end to end.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from incubate_lib.method.incubation import Hybrid, Imitation


def train_flops_per_image(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return the exact FLOPs of forward and backward for one image [C, H, W] with today's requires_grad.

    The model is left as it is; one on the meta device gets gradients there, which cost nothing.
    """
    if any(parameter.device.type != "meta" for parameter in model.parameters()):
        model = copy.deepcopy(model).to("meta")
    model.train()
    return _go_through(model, _images(image_shape), backward=True)[0] // 2


@dataclass
class FlopCounts:
    """The same counts for a network before it is trained, and for hybrids made of the same modules: exact, too, and sooner.

    Going through all operations of a deep network takes seconds. So of blocks that are alike two are gone through,
    and of modules that are alike one.
    """

    image_shape: tuple[int, int, int]
    known: dict[tuple, tuple[int, Tensor]] = field(default_factory=dict)

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
        key = (description(part), x.shape, backward, x.requires_grad)
        if key not in self.known:
            self.known[key] = _count(part, x, backward)
        return self.known[key]


def _images(shape: tuple[int, int, int]) -> Tensor:
    return torch.empty(2, *shape, device="meta")  # batch norm cannot train on a single image


def _count(part: nn.Module, x: Tensor, backward: bool) -> tuple[int, Tensor]:
    """Return the FLOPs of a part and its outputs; FLOPs are linear in the number of blocks that are alike."""
    blocks = getattr(part, "blocks", None)
    if not isinstance(blocks, nn.Sequential) or len(blocks) < 3 or len({description(block) for block in blocks}) > 1:
        return _go_through(part, x, backward=backward)
    try:
        part.blocks = blocks[:1]
        one, out = _go_through(part, x, backward=backward)
        part.blocks = blocks[:2]
        two, _ = _go_through(part, x, backward=backward)
    finally:
        part.blocks = blocks
    return one + (len(blocks) - 1) * (two - one), out


def _go_through(part: nn.Module, x: Tensor, *, backward: bool) -> tuple[int, Tensor]:
    x = x.detach().requires_grad_(x.requires_grad)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out = part(x)
        if backward:
            out.sum().backward()
    return counter.get_total_flops(), torch.empty_like(out, requires_grad=backward)


def description(block: nn.Module) -> str:
    """Describe layers, sizes, and which parameters are trained."""
    return f"{block} {[(name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters()]}"
