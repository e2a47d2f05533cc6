"""What training costs, counted: FLOPs of one image forward and backward, on the meta device, without running anything.

A multiply-add is two FLOPs. Counted are matrix products, convolutions and attention, as torch's FlopCounterMode does;
the element-wise rest and the optimiser are not. Frozen parts cost what they must: before the target forward only,
behind it forward and the gradient of their input. With these rules ViT-B/16 at 224 px costs 105.15 GFLOP end to end.
"""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def train_flops_per_image(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return the exact FLOPs of forward and backward for one image [C, H, W] with today's requires_grad.

    The model is left as it is; one on the meta device gets gradients there, which cost nothing.
    """
    if any(parameter.device.type != "meta" for parameter in model.parameters()):
        model = copy.deepcopy(model).to("meta")
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(2, *image_shape, device="meta")).sum().backward()  # batch norm cannot train on a single image
    return counter.get_total_flops() // 2
