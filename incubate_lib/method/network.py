"""A chain divided into modules, run up to one of them, and put together from parts of several networks.

No forward pass is split: a network with blocks left out, or with blocks of another network in their place, is an ordinary
network of the same class and the same names, which shares its weights with those that it was made of.

Letters used for shapes: B batch, C channels, H and W pixels.
"""

import bisect
import copy
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from incubate_lib.method.chain import Chain, NotAChain, tensors_of

Claims = Callable[[str], bool | None]  # of a name: whether it belongs; None: it does no work of its own


class Skip(nn.Module):
    """The place of a block that was left out, in a list of layers."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.clone()  # what follows may work in place


# -- dividing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """A chain divided into modules 0 … K-1, each from behind the cut of the module before it to its own."""

    chain: Chain
    ends: tuple[int, ...]  # the last stretch of each module

    @property
    def num_modules(self) -> int:
        return len(self.ends)

    def module_of(self, stretch: int) -> int:
        """Return the module (0-based) to which a stretch belongs."""
        return bisect.bisect_left(self.ends, stretch)

    def blocks(self, index: int) -> list[str]:
        """Return the blocks of module `index` (0-based) that the network can do without, in order."""
        stretches = enumerate(self.chain.stretches)
        return [stretch.block for i, stretch in stretches if stretch.block and self.module_of(i) == index]

    def owner(self, name: str) -> int:
        """Return the module that owns a parameter or a buffer."""
        return self.module_of(self.chain.owners[name])

    def claims(self, index: int) -> Claims:
        """Return a function that says whether a tensor or a layer belongs to module `index`.

        None: a container of several modules' layers, or something that nobody calls.
        """

        def belongs(name: str) -> bool | None:
            if name in self.chain.owners:
                return self.owner(name) == index
            if name not in self.chain.spans:
                return None
            first, last = (self.module_of(stretch) for stretch in self.chain.spans[name])
            if first == last:
                return first == index
            return None if first <= index <= last else False

        return belongs

    def part(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return those of a network's tensors, by name, that module `index` owns."""
        return {name: tensor for name, tensor in tensors.items() if self.owner(name) == index}


def divide(chain: Chain, depths: Sequence[int]) -> Partition:
    """Divide a chain into modules of `depths[i]` blocks; what lies before the first block belongs to the first module, what
    lies behind the last one to the last, and a layer between two blocks that cannot be left out to the second's.

    Raises NotAChain if the network has no blocks, ValueError when the depths are not positive or have another sum.
    """
    places = chain.places
    if not places:
        raise NotAChain("the network has no blocks that it could do without")
    if not depths or min(depths) < 1:
        raise ValueError(f"depths {list(depths)}: every module needs at least one block")
    if sum(depths) != len(places):
        raise ValueError(f"depths {list(depths)} add up to {sum(depths)}, but the network has {len(places)} blocks")
    ends, done = [], 0
    for depth in depths[:-1]:
        done += depth
        ends.append(places[done - 1])
    return Partition(chain, (*ends, len(chain.stretches) - 1))


def divide_at(chain: Chain, layers: Sequence[str]) -> Partition:
    """Divide a chain behind the named layers, in order. ValueError names one that is no cut, and cuts with similar names."""
    places = {layer: i for i, stretch in enumerate(chain.stretches[:-1]) for layer in stretch.layers}
    for layer in layers:
        if layer not in places:
            near = difflib.get_close_matches(layer, places, n=3, cutoff=0) or ["none"]
            raise ValueError(f"the network cannot be cut behind {layer!r}; cuts with similar names: {', '.join(near)}")
    ends = [places[layer] for layer in layers]
    if sorted(set(ends)) != ends:
        raise ValueError(f"the cuts {', '.join(layers)} are not in the network's order")
    return Partition(chain, (*ends, len(chain.stretches) - 1))


def counted_through(partition: Partition, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of module `index` under the network's names, where its blocks are counted within the module.

    So are those of the released checkpoints. Tensors that have the network's names already stay as they are.
    """
    places = partition.blocks(index)
    if any(name.startswith(f"{place}.") for name in tensors for place in places[-1:]):
        return dict(tensors)
    within = {f"{place.rpartition('.')[0]}.{i}": place for i, place in enumerate(places)}
    renamed = {}
    for name, tensor in tensors.items():
        own = next((own for own in within if name.startswith(f"{own}.")), "")
        renamed[within.get(own, "") + name[len(own) :]] = tensor
    return renamed


# -- running a part of it ----------------------------------------------------------------------------------------------


class _Reached(Exception):
    """Ends a forward pass at a cut."""


def has_layer(model: nn.Module, name: str) -> bool:
    """Whether a network has a layer of that name, and not the placeholder of one that was left out."""
    layer: Any = model
    for part in name.split("."):
        layer = getattr(layer, part, None) if isinstance(layer, nn.Module) else None
    return isinstance(layer, nn.Module) and not isinstance(layer, Skip)


def last_layer(model: nn.Module, partition: Partition, index: int) -> nn.Module:
    """Return the layer whose output is that of module `index`: where blocks are left out, what the last one before returns."""
    for stretch in reversed(partition.chain.stretches[: partition.ends[index] + 1]):
        for name in reversed(stretch.layers):
            if has_layer(model, name):
                return model.get_submodule(name)
    raise ValueError(f"the network has no layer of module {index + 1}")


def run_to(model: nn.Module, partition: Partition, index: int, x: Tensor) -> Tensor:
    """Run a network on images [B, C, H, W] up to the end of module `index`, and return that module's output."""
    if index == partition.num_modules - 1:
        return model(x)

    def stop(layer: nn.Module, args: Any, output: Tensor) -> None:
        raise _Reached(output)

    try:
        with last_layer(model, partition, index).register_forward_hook(stop):
            model(x)
    except _Reached as reached:
        return reached.args[0]
    raise AssertionError("the network ran past its cut")


def outputs(model: nn.Module, partition: Partition, x: Tensor) -> list[Tensor]:
    """Run a network on images [B, C, H, W] and return the output of every module; of the last one they are the logits."""
    kept: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for index in range(partition.num_modules - 1):
            keep = lambda layer, args, output, index=index: kept.update({index: output})  # noqa: E731
            hooks.enter_context(last_layer(model, partition, index).register_forward_hook(keep))
        logits = model(x)
    return [kept[index] for index in sorted(kept)] + [logits]


# -- putting together --------------------------------------------------------------------------------------------------


def without(model: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """Return `model` with blocks left out, sharing the weights of all others; its names stay what they are."""
    return replaced(model, dict.fromkeys(blocks))


def in_names_of(meta: nn.Module, own: Partition, target: nn.Module, partition: Partition) -> nn.Module:
    """Return `meta` as a network with the names of a deeper `target`, sharing meta's weights.

    The blocks of each of its modules take the places of the first ones of the target's module; the places of all others
    are left out. Raises ValueError where the target's module has fewer blocks than meta's.
    """
    places: dict[str, nn.Module | None] = {}
    for index in range(partition.num_modules):
        small, large = own.blocks(index), partition.blocks(index)
        if len(small) > len(large):
            raise ValueError(f"module {index + 1} has {len(large)} blocks, fewer than the meta model's {len(small)}")
        places |= {name: meta.get_submodule(small[i]) if i < len(small) else None for i, name in enumerate(large)}
    return replaced(meta, places, names=target)


def graft(base: nn.Module, scion: nn.Module, belongs: Claims) -> nn.Module:
    """Return `base` in which everything that `belongs` claims is the scion's, sharing the weights of both.

    `base` has the scion's names, or some of its blocks are left out.
    """

    def walk(base: nn.Module | None, scion: nn.Module, path: str) -> nn.Module | None:
        claimed = {belongs(_join(path, name)) for name in _everything(scion)} | ({belongs(path)} if path else set())
        claimed.discard(None)
        if claimed == {True}:
            return scion
        if claimed <= {False} or base is None:
            return base
        shell = _shell(base)
        for own, other in ((shell._parameters, scion._parameters), (shell._buffers, scion._buffers)):
            own.update({name: tensor for name, tensor in other.items() if belongs(_join(path, name))})
        children = {}
        for name, child in scion._modules.items():
            if child is not None:
                children[name] = walk(base._modules.get(name), child, _join(path, name))
        _set_children(shell, children)
        return shell

    return walk(base, scion, "")


def replaced(model: nn.Module, places: Mapping[str, nn.Module | None], names: nn.Module | None = None) -> nn.Module:
    """Return `model` with other layers (None: with none) at the given places, sharing the weights of all others.

    Its children are named as those of `names`, which may have more.
    """

    def walk(layer: nn.Module, named: nn.Module, path: str) -> nn.Module | None:
        if path in places:
            alone = not any(named.children())  # a single layer: what follows it may work in place on what it returns
            return Skip() if places[path] is None and alone else places[path]
        if not any(place.startswith(f"{path}." if path else "") for place in places):
            return layer
        shell = _shell(layer)
        children = {}
        for name, child in named._modules.items():
            if child is not None:
                children[name] = walk(layer._modules.get(name, child), child, _join(path, name))
        _set_children(shell, children)
        return shell

    return walk(model, names if names is not None else model, "")


def _set_children(shell: nn.Module, children: dict[str, nn.Module | None]) -> None:
    """Give `shell` its children; those that are None are left out where they are called one after the other by themselves."""
    absent = {name: None for name, child in shell._modules.items() if child is None}
    in_turn = type(shell).forward is nn.Sequential.forward
    shell._modules = dict(absent)
    for name, child in children.items():
        if child is None and in_turn:
            continue
        shell._modules[name] = Skip() if child is None else child


def _everything(layer: nn.Module) -> Iterator[str]:
    """Return the names of a layer's tensors and of all layers in it."""
    yield from (name for name, _ in tensors_of(layer))
    yield from (name for name, _ in layer.named_modules(remove_duplicate=False) if name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shell(layer: nn.Module) -> nn.Module:
    """Return a layer of the same class and attributes with registries of its own, so that pieces can be exchanged."""
    shell = type(layer).__new__(type(layer))
    shell.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
    return shell
