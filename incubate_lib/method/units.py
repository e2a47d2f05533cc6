"""The parts of a network that MAT (arXiv 2405.07527) lets rest or train; the paper calls them modules.

A unit is a set of parameters, or of rows of parameters: an attention head's rows of q, k and v, a sub-layer, a block, a
convolution, a filter. Only parameters that require gradients belong to units, so in a hybrid of Deep Incubation the units
are those of its target module. Made by `find_units`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from incubate_lib.method.rows import RowConv2d

APART = ("query", "key", "value")
Ranges = tuple[tuple[int, int], ...]  # first row and one past the last, in a parameter's first dimension


@dataclass(frozen=True)
class Unit:
    """Some parameters, or some rows of them, that rest or train together."""

    name: str  # e.g. blocks.3.attn, or blocks.3.attn head 2
    rows: dict[str, Ranges | None]  # name of a parameter → its rows that belong to the unit; none: all of it
    entrances: tuple[str, ...] = ()  # layers at which its residual branches begin; none: there is no way around the unit


def find_units(model: nn.Module, kind: str) -> list[Unit]:
    """Return the trainable units of a kind, in the order of the model's layers.

    Kinds: `heads`, `experts` (of a mixture, and its router), `sublayers` (attention, MLP), `blocks`, `conv_layers`, `filters`.
    Raises ValueError when the model is frozen or has none of that kind, and for rows that are not what they seem: each head's
    and each filter's rows must reach its own channels, all of them and no others, which a copy of the layer with random
    weights shows.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("every parameter of the model is frozen: nothing is left that could rest or train")
    if kind not in KINDS:
        raise ValueError(f"there is no kind of unit {kind!r}; there are: {', '.join(KINDS)}")
    if kind == "heads":
        _prove(model, _attentions(model), _heads, _attended)
    if kind == "filters":
        convolutions = ((name, layer) for name, layer in _named(model, nn.Conv2d) if not _is_plain(layer))
        _prove(model, convolutions, _filters, _convolved)
    units = _trainable(model, kind)
    if not units:
        has = ", ".join(f"{name} ({count})" for name, count in count_units(model).items()) or "none that are known here"
        raise ValueError(f"{type(model).__name__} has no {kind.replace('_', ' ')}; it has: {has}")
    return units


def owners_of(units: Sequence[Unit], model: nn.Module) -> dict[str, int | Tensor]:
    """Return for each parameter that units have the index of its unit, or of the unit of each of its rows: int64, -1 for none.

    Raises ValueError for what belongs to two units.
    """
    owners: dict[str, int | Tensor] = {}
    for index, unit in enumerate(units):
        for name, ranges in unit.rows.items():
            if ranges is None or isinstance(owners.get(name), int):
                if name in owners:
                    raise ValueError(f"parameter {name} belongs to two units; one of them is {unit.name}")
                owners[name] = index
                continue
            rows = owners.setdefault(name, torch.full((len(model.get_parameter(name)),), -1))
            for first, end in ranges:
                if rows[first:end].ge(0).any():
                    raise ValueError(f"rows {first} to {end} of {name} belong to two units; one of them is {unit.name}")
                rows[first:end] = index
    return owners


def count_units(model: nn.Module) -> dict[str, int]:
    """Return the kinds of trainable units that a model has, and how many of each."""
    return {kind: len(found) for kind in KINDS if (found := _trainable(model, kind))}


def _trainable(model: nn.Module, kind: str) -> list[Unit]:
    layers_of, units_of = KINDS[kind]
    units = [unit for name, layer in layers_of(model) for unit in units_of(name, layer)]
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = (Unit(u.name, {name: rows for name, rows in u.rows.items() if name in learns}, u.entrances) for u in units)
    return [unit for unit in kept if unit.rows]


def _named(model: nn.Module, classes: type | tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, classes))


def _whole(name: str, module: nn.Module) -> dict[str, None]:
    return {parameter: None for parameter, _ in module.named_parameters(prefix=name)}


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if (isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "num_heads")) or _is_apart(module):
            yield name, module


def _is_apart(module: nn.Module) -> bool:
    """Whether an attention has a layer for each of q, k and v, as Hugging Face's BERT has them."""
    layers = all(isinstance(getattr(module, part, None), nn.Linear) for part in APART)
    return layers and hasattr(module, "num_attention_heads")


def _heads(name: str, module: nn.Module) -> Iterator[Unit]:
    """Each head's rows of q, k and v; the output projection and the MLP belong to no head."""
    if _is_apart(module):
        size = module.query.out_features // module.num_attention_heads
        parameters = [own for part in APART for own in _whole(f"{name}.{part}", getattr(module, part))]
        for head in range(module.num_attention_heads):
            yield Unit(f"{name} head {head}", dict.fromkeys(parameters, ((head * size, (head + 1) * size),)))
        return
    heads, width = module.num_heads, module.qkv.out_features // 3
    size = width // heads
    for head in range(heads):
        rows = tuple((part * width + head * size, part * width + (head + 1) * size) for part in range(3))
        yield Unit(f"{name} head {head}", dict.fromkeys(_whole(f"{name}.qkv", module.qkv), rows))


def _mixtures(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(getattr(module, "router", None), nn.Linear) and hasattr(module, "experts"):
            yield name, module


def _experts(name: str, mixture: nn.Module) -> Iterator[Unit]:
    """The router and each expert."""
    parts = {"router": mixture.router} | {f"experts.{i}": expert for i, expert in enumerate(mixture.experts)}
    for part, layer in parts.items():
        yield Unit(f"{name}.{part}", _whole(f"{name}.{part}", layer))


def _sublayers(name: str, block: Block) -> Iterator[Unit]:
    for part, layers in {"attn": ("norm1", "attn", "ls1"), "mlp": ("norm2", "mlp", "ls2")}.items():
        rows = {}
        for layer in layers:
            rows |= _whole(f"{name}.{layer}", getattr(block, layer))
        yield Unit(f"{name}.{part}", rows, (f"{name}.{layers[0]}",))


def _block(name: str, block: nn.Module) -> Iterator[Unit]:
    entrances = ("norm1", "norm2") if isinstance(block, Block) else ("conv1",)
    yield Unit(name, _whole(name, block), tuple(f"{name}.{layer}" for layer in entrances))


def _conv_layer(name: str, layer: nn.Conv2d) -> Iterator[Unit]:
    yield Unit(name, _whole(name, layer))


def _filters(name: str, layer: nn.Conv2d) -> Iterator[Unit]:
    for row in range(layer.out_channels):
        yield Unit(f"{name} filter {row}", dict.fromkeys(_whole(name, layer), ((row, row + 1),)))


# A kind → where its units are, and those of one such place.
_convolutions = partial(_named, classes=nn.Conv2d)
KINDS = {
    "heads": (_attentions, _heads),
    "experts": (_mixtures, _experts),
    "sublayers": (partial(_named, classes=Block), _sublayers),
    "blocks": (partial(_named, classes=(Block, BasicBlock, Bottleneck)), _block),
    "conv_layers": (_convolutions, _conv_layer),
    "filters": (_convolutions, _filters),
}


# -- whether rows are what they seem --------------------------------------------------------------------------------------


def _prove(
    model: nn.Module,
    layers: Iterable[tuple[str, nn.Module]],
    units_of: Callable[[str, nn.Module], Iterator[Unit]],
    run: Callable[[nn.Module], Tensor],
) -> None:
    """Raise ValueError for the first layer whose units' rows do not each reach their own share of the channels."""
    proven = set()
    for name, layer in layers:
        alike = f"{type(layer)} {layer} {[(n, tuple(p.shape)) for n, p in layer.named_parameters()]}"
        trains = any(parameter.requires_grad for parameter in layer.parameters())
        if alike in proven or not trains:  # of layers that are alike one is proven
            continue
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                twin = _random_copy(layer)
                found = _reach_their_own(twin, [unit.rows for unit in units_of("", twin)], run)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            message = str(error).splitlines() or [type(error).__name__]
            raise ValueError(f"{name} ({type(layer).__name__}): which rows belong to what is not known ({message[0]})") from None
        if not found:
            raise ValueError(f"{name} ({type(layer).__name__}): its rows are laid out in another way than is known here")
        proven.add(alike)


def _random_copy(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer on the CPU, in eval mode, with random weights; its own may be zero, or on the meta device."""
    twin = copy.deepcopy(layer)
    on_meta = any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    twin = twin.to_empty(device="cpu") if on_meta else twin.cpu()
    for buffer in twin.buffers() if on_meta else ():
        buffer.zero_()  # an index of positions, a running mean; nothing that moves rows
    for parameter in twin.parameters():
        parameter.normal_()
    twin.double()
    twin.eval()  # some return nothing
    return twin


def _reach_their_own(layer: nn.Module, rows: list[dict[str, Ranges | None]], run: Callable[[nn.Module], Tensor]) -> bool:
    """Whether, of U units, a change of the rows of unit u changes share u of U of the last dimension of what runs, all of it.

    The units whose number has bit b set are changed together, then those that have not: if rows of one unit reached the
    channels of another, the two would differ in some bit.
    """
    old = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    new = {name: torch.randn_like(parameter) for name, parameter in old.items()}
    unit_of = {name: torch.full((len(parameter),), -1) for name, parameter in old.items() if parameter.ndim}
    for unit, parts in enumerate(rows):
        for name, ranges in parts.items():
            for first, end in ranges or ():
                unit_of[name.lstrip(".")][first:end] = unit
    before = run(layer)
    number, channels = len(rows), before.shape[-1]
    if channels % number:
        return False
    for bit in range(max(1, (number - 1).bit_length())):
        for value in (0, 1):
            for name, units in unit_of.items():
                moved = units.ge(0) & (units >> bit & 1).eq(value)
                parameter = layer.get_parameter(name)
                parameter.copy_(torch.where(moved.view(-1, *[1] * (parameter.ndim - 1)), new[name], old[name]))
            changed = (run(layer) != before).flatten(0, -2).any(0).view(number, -1)
            expected = (torch.arange(number) >> bit & 1).eq(value)[:, None]
            if not torch.equal(changed, expected.expand_as(changed)):
                return False
    return True


def _attended(attention: nn.Module) -> Tensor:
    """Return what an attention makes of random tokens, before anything mixes its heads: [2, T, channels]."""
    seen: list[Tensor] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if seen:  # not a norm before q, k and v
            seen.append(inputs[0])

    tokens = getattr(attention, "window_area", 4)  # windows have a fixed number
    generator = torch.Generator().manual_seed(1)
    if _is_apart(attention):
        return attention(torch.randn(2, tokens, attention.query.in_features, generator=generator, dtype=torch.float64))[0]
    with ExitStack() as hooks:
        hooks.enter_context(attention.qkv.register_forward_hook(lambda layer, inputs, output: seen.append(output)))
        for layer in (getattr(attention, "norm", None), attention.proj):
            if isinstance(layer, nn.Module):
                hooks.enter_context(layer.register_forward_pre_hook(record))
        attention(torch.randn(2, tokens, attention.qkv.in_features, generator=generator, dtype=torch.float64))
    if len(seen) < 2:
        raise ValueError("its layers qkv and proj are not called one after the other")
    return seen[1]


def _convolved(layer: nn.Conv2d) -> Tensor:
    """Return a convolution's outputs for one random image, channels last."""
    size = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)]
    generator = torch.Generator().manual_seed(1)
    return layer(torch.randn(1, layer.in_channels, *size, generator=generator, dtype=torch.float64)).movedim(1, -1)


def _is_plain(layer: nn.Conv2d) -> bool:
    """Whether row r of weight and bias is filter r, by what the class is known to do."""
    own = {name for name, _ in layer.named_parameters()}
    return type(layer) in (nn.Conv2d, RowConv2d) and own <= {"weight", "bias"} and "forward" not in vars(layer)
