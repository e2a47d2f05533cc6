"""The parts of a network that MAT (arXiv 2405.07527) lets rest or train; the paper calls them modules.

A unit is a set of parameters, or of rows of parameters: an attention head's rows of q, k and v, a sub-layer, a block, a
convolution, a filter. Only parameters that require gradients belong to units, so in a hybrid of Deep Incubation the units
are those of its target module. Made by `find_units`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import Block
from torch import nn

Ranges = tuple[tuple[int, int], ...]  # first row and one past the last, in a parameter's first dimension


@dataclass(frozen=True)
class Unit:
    """Some parameters, or some rows of them, that rest or train together."""

    name: str  # e.g. blocks.3.attn, or blocks.3.attn head 2
    rows: dict[str, Ranges | None]  # name of a parameter → its rows that belong to the unit; none: all of it
    entrances: tuple[str, ...] = ()  # layers at which its residual branches begin; none: there is no way around the unit


def find_units(model: nn.Module, kind: str) -> list[Unit]:
    """Return the trainable units of a kind, in the order of the model's layers.

    Kinds: `heads`, `sublayers` (attention, MLP), `blocks`, `conv_layers`, `filters`. Raises ValueError when the model is
    frozen or has none of that kind.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("every parameter of the model is frozen: nothing is left that could rest or train")
    if kind not in KINDS:
        raise ValueError(f"there is no kind of unit {kind!r}; there are: {', '.join(KINDS)}")
    units = _trainable(model, KINDS[kind](model))
    if not units:
        has = ", ".join(f"{name} ({count})" for name, count in count_units(model).items()) or "none that are known here"
        raise ValueError(f"{type(model).__name__} has no {kind.replace('_', ' ')}; it has: {has}")
    return units


def count_units(model: nn.Module) -> dict[str, int]:
    """Return the kinds of trainable units that a model has, and how many of each."""
    return {kind: len(found) for kind, find in KINDS.items() if (found := _trainable(model, find(model)))}


def _trainable(model: nn.Module, units: Iterable[Unit]) -> list[Unit]:
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = (Unit(u.name, {name: rows for name, rows in u.rows.items() if name in learns}, u.entrances) for u in units)
    return [unit for unit in kept if unit.rows]


def _named(model: nn.Module, *classes: type) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, classes))


def _whole(name: str, module: nn.Module) -> dict[str, None]:
    return {parameter: None for parameter, _ in module.named_parameters(prefix=name)}


def _heads(model: nn.Module) -> Iterator[Unit]:
    """Each head's rows of q, k and v; the output projection and the MLP belong to no head."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads"):
            heads, width = module.num_heads, module.qkv.out_features // 3
            size = width // heads
            for head in range(heads):
                rows = tuple((part * width + head * size, part * width + (head + 1) * size) for part in range(3))
                yield Unit(f"{name} head {head}", dict.fromkeys(_whole(f"{name}.qkv", module.qkv), rows))


def _sublayers(model: nn.Module) -> Iterator[Unit]:
    for name, block in _named(model, Block):
        for part, layers in {"attn": ("norm1", "attn", "ls1"), "mlp": ("norm2", "mlp", "ls2")}.items():
            rows = {}
            for layer in layers:
                rows |= _whole(f"{name}.{layer}", getattr(block, layer))
            yield Unit(f"{name}.{part}", rows, (f"{name}.{layers[0]}",))


def _blocks(model: nn.Module) -> Iterator[Unit]:
    for name, block in _named(model, Block, BasicBlock, Bottleneck):
        entrances = ("norm1", "norm2") if isinstance(block, Block) else ("conv1",)
        yield Unit(name, _whole(name, block), tuple(f"{name}.{layer}" for layer in entrances))


def _conv_layers(model: nn.Module) -> Iterator[Unit]:
    for name, layer in _named(model, nn.Conv2d):
        yield Unit(name, _whole(name, layer))


def _filters(model: nn.Module) -> Iterator[Unit]:
    for name, layer in _named(model, nn.Conv2d):
        for row in range(layer.out_channels):
            yield Unit(f"{name} filter {row}", dict.fromkeys(_whole(name, layer), ((row, row + 1),)))


KINDS = {"heads": _heads, "sublayers": _sublayers, "blocks": _blocks, "conv_layers": _conv_layers, "filters": _filters}
