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
import re
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from incubate_lib.method.network import Partition, has_layer, without
from incubate_lib.method.sizes import blank, differentiable
from incubate_lib.tasks import Losses, of_the_output


def train_flops_per_image(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Return the FLOPs of forward and backward for one image [C, H, W] with today's requires_grad, attention not fused.

    Exact on the meta device, which budgets are matched by. The model is left as it is; one on the meta device gets
    gradients there, which cost nothing.
    """
    if any(parameter.device.type != "meta" for parameter in model.parameters()):
        model = copy.deepcopy(model).to("meta")
    return FlopCounts(image_shape).per_image(model)


def executed_flops_per_image(model: nn.Module, image_shape: tuple[int, int, int], losses: Losses = of_the_output) -> int:
    """Return the FLOPs that the model's device executes, forward and backward, for one image [C, H, W] with today's
    requires_grad: with fused attention where the device has it.

    Two empty images pass through the model as it is, in its mode and under the caller's autocast; weights, their
    gradients and buffers are left alone. What torch.compile makes of it is not seen.
    """
    x = blank(model, 2, image_shape)
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # batch norm writes to them
    with all_products() as counter, torch.enable_grad():
        for loss in losses(lambda *inputs: functional_call(model, buffers, inputs), x, total):
            torch.autograd.grad(loss, learns, allow_unused=True)
    return counter.get_total_flops() // 2


def total(output: Any) -> Tensor:
    """Return the sum of all that a network gives, whatever that is made of: a loss for whoever counts a backward pass."""
    return sum(tensor.float().sum() for tensor in tree_leaves(output))


def all_products() -> FlopCounterMode:
    """Return a counter that knows the products in place and with vectors, too, which torch's own passes over.

    And the fused attention of CPUs, which torch 2.15 counts and 2.11 does not.
    """
    aten = torch.ops.aten
    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    }
    behind = {aten.addmm_, aten.baddbmm_, aten.addbmm, aten.addbmm_, aten.addmv, aten.addmv_}  # what is added to comes first
    return FlopCounterMode(
        display=False,
        custom_mapping={op: _product(1) for op in behind} | {op: _product(0) for op in (aten.mv, aten.dot, aten.vdot)} | fused,
    )


def _product(first: int) -> Callable[..., int]:
    """Return the FLOPs of a product whose factors are the arguments `first` and the next, from their shapes."""

    def flops(*shapes: tuple[int, ...], **more: object) -> int:
        a, b = shapes[first : first + 2]
        return 2 * math.prod(a) * (b[-1] if len(b) > 1 else 1)

    return flops


@dataclass
class FlopCounts:
    """The same counts for networks before they are trained, module by module: exact, too, and sooner.

    Going through all operations of a deep network takes seconds. So of the blocks of a module that are alike two are gone
    through (the first may need no gradient of what it is given), and all hybrids of two networks are counted by three runs.
    """

    image_shape: tuple[int, int, int]
    known: dict[tuple, list[int]] = field(default_factory=dict)

    def per_image(self, network: nn.Module, partition: Partition | None = None) -> int:
        """Return the FLOPs of forward and backward for one image with today's requires_grad, on the meta device."""
        return sum(self.by_module(network, partition))

    def forward(self, network: nn.Module) -> int:
        """Return the FLOPs of one image without a backward pass."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.eval()(blank(network, 1, self.image_shape))
        return counter.get_total_flops()

    def hybrid(self, meta: nn.Module, target: nn.Module, partition: Partition, index: int, imitates: bool = False) -> list[int]:
        """Return what each module of the hybrid of module `index` costs for one image; of an imitation what is used of them.

        `meta` has the target's names. Both are left all trainable.
        """
        target_alone = self.by_module(target.requires_grad_(True), partition, apart=True)
        before = self.by_module(meta.requires_grad_(False), partition)
        behind = self.by_module(meta, partition, image_grad=True)
        meta.requires_grad_(True)
        if imitates:
            return [*before[:index], before[index] + target_alone[index], *[0] * (partition.num_modules - index - 1)]
        return [*before[:index], target_alone[index], *behind[index + 1 :]]

    def by_module(
        self, network: nn.Module, partition: Partition | None, *, image_grad: bool = False, apart: bool = False
    ) -> list[int]:
        """Return the same for each module: with `image_grad` as if something before it learned, `apart` as if nothing did."""
        key = (description(network), partition and partition.ends, image_grad, apart)
        if key not in self.known:
            network.train()

            def count(thinned: nn.Module) -> list[int]:
                # batch norm cannot train on a single image
                x = blank(thinned, 2, self.image_shape)
                given = differentiable(thinned, x) if image_grad else nullcontext()
                with given, FlopCounterMode(display=False) as counter:
                    return by_stretch(thinned, partition, x, lambda _: counter.get_total_flops(), apart=apart)

            self.known[key] = [flops // 2 for flops in by_module(network, partition, count)]
        return list(self.known[key])


@dataclass(frozen=True)
class Counted:
    """The networks of which kinds of phases count the cost, on the meta device; without modules the target alone."""

    counts: FlopCounts
    target: nn.Module
    partition: Partition | None = None
    meta_partition: Partition | None = None
    meta: nn.Module | None = None
    hybrids_of: nn.Module | None = None  # the meta model under the target's names


def by_module(network: nn.Module, partition: Partition | None, count: Callable[[nn.Module], list[int]]) -> list[int]:
    """Return what each module of a network comes to, if `count` says it of each stretch.

    It is given the network with two of a module's blocks that are alike; all others come to what the second does.
    """
    if partition is None:
        return count(network)
    chain, groups = partition.chain, {}
    for stretch, part in enumerate(chain.stretches):
        if part.block and has_layer(network, part.block):
            alike = (partition.module_of(stretch), part.shape, description(network.get_submodule(part.block)))
            groups.setdefault(alike, []).append(stretch)
    left_out = [chain.stretches[i].block for group in groups.values() for i in group[2:]]
    found = count(without(network, left_out) if left_out else network)
    sums = [0] * partition.num_modules
    for stretch, number in enumerate(found):
        sums[partition.module_of(stretch)] += number
    for (module, *_), group in groups.items():
        for again in group[1:2] * len(group[2:]):
            inside = f"{chain.stretches[again].block}."  # where a block's first half is all that its second sees
            sums[module] += found[again] + sum(found[i] for i, part in enumerate(chain.stretches) if part.name.startswith(inside))
    return sums


def by_stretch(
    network: nn.Module,
    partition: Partition | None,
    x: Tensor,
    read: Callable[[Tensor], int],
    *,
    backward: bool = True,
    apart: bool = False,
    run: Callable[[Tensor], Tensor] | None = None,
) -> list[int]:
    """Run a network, or have `run` run it; return by how much the number that `read` returns grows in each stretch.

    With `backward` that of the backward pass is added; with `apart` no gradient leaves a module. `read` is given what the
    stretch hands on. Without a partition the network is one stretch.
    """
    stretches = partition.chain.stretches if partition else (None,)
    grown, last = [0] * len(stretches), len(stretches) - 1
    state = {"stretch": last, "before": read(x)}
    outputs: list[tuple[int, Tensor]] = []  # of what is gone through backward by itself

    def note(stretch: int, tensor: Tensor) -> None:
        now = read(tensor)
        grown[stretch] += now - state["before"]
        state["before"] = now

    def arrived(gradient: Tensor, stretch: int) -> None:
        note(state["stretch"], gradient)
        state["stretch"] = stretch

    def reached(layer: nn.Module, args: Any, output: Tensor, stretch: int) -> Tensor | None:
        note(stretch, output)
        if apart and stretch in partition.ends:
            outputs.append((stretch, output))
            return output.detach()
        if backward and output.requires_grad:
            output.register_hook(partial(arrived, stretch=stretch))
        return None

    with ExitStack() as hooks:
        for stretch, part in enumerate(stretches[:-1]):
            if has_layer(network, part.name):
                hook = partial(reached, stretch=stretch)
                hooks.enter_context(network.get_submodule(part.name).register_forward_hook(hook))
        out = (run or network)(x)
    note(last, tree_leaves(out)[0])
    for stretch, output in reversed([*outputs, (last, total(out))] if backward else []):
        if output.requires_grad:
            state["stretch"] = stretch
            output.sum().backward()
            note(state["stretch"], output)
    return grown


def description(block: nn.Module) -> str:
    """Describe layers, sizes, and which parameters are trained; drop-path, which costs nothing, may differ."""
    layers = re.sub(r"DropPath\([^)]*\)", "Identity()", str(block))
    return f"{layers} {[(name, tuple(p.shape), p.requires_grad) for name, p in block.named_parameters()]}"
