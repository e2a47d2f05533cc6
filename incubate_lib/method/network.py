"""Any network as a chain: where it can be cut, which blocks it can do without, who owns which weight.

There is no table of architectures. One forward pass tells: the output of a layer is a *cut* if every path of the autograd
graph from the logits to the images goes through it, and a parameter belongs to the stretch between two cuts in which it is
used first. No forward pass is split: a network with blocks left out, or with blocks of another network in their place, is an
ordinary network of the same class and the same names, which shares its weights with those that it was made of.

Letters used for shapes: B batch, C channels, H and W pixels.
"""

import bisect
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Claims = Callable[[str], bool | None]  # of a name: whether it belongs; None: it does no work of its own
Vertex = tuple[Any, int]  # a tensor in the autograd graph: the node that made it, and which of the node's outputs it is


class NotAChain(ValueError):
    """The network cannot be cut; the message says why."""


class Skip(nn.Module):
    """What stands in a list of layers where a block was left out."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.clone()  # what follows may work in place


@dataclass(frozen=True)
class Stretch:
    """What lies between two neighbouring cuts."""

    layers: tuple[str, ...]  # those that return what is passed on at the cut behind it, the innermost first
    shape: tuple[int, ...]  # of that, with a batch of 2
    block: str | None = None  # the block that ends there, if the network can do without it
    ends: tuple[str, ...] = ()  # parameters at the ends of the block's residual branches: zeroed, it hands its input on

    @property
    def name(self) -> str:
        """What people call the cut behind it."""
        return self.block or self.layers[-1]


@dataclass(frozen=True)
class Chain:
    """A network's stretches in order, and in which of them its parts do their work."""

    stretches: tuple[Stretch, ...]
    owners: dict[str, int]  # a parameter or a buffer → the stretch that uses it first
    spans: dict[str, tuple[int, int]]  # a layer → the first and the last stretch in which it works

    @property
    def blocks(self) -> list[str]:
        """The blocks that the network can do without, in order."""
        return [stretch.block for stretch in self.stretches if stretch.block]

    def block_of(self, name: str) -> str | None:
        """Return the block that a parameter or a buffer lies in, if any."""
        return next((block for block in self.blocks if name.startswith(f"{block}.")), None)

    def is_stem(self, name: str) -> bool:
        """Whether a parameter or a buffer works before the first block."""
        return self.block_of(name) is None and self.owners[name] <= self._places[0]

    def is_head(self, name: str) -> bool:
        """Whether a parameter or a buffer works behind the last block."""
        return self.block_of(name) is None and self.owners[name] > self._places[-1]

    @property
    def _places(self) -> list[int]:
        return [i for i, stretch in enumerate(self.stretches) if stretch.block]


# -- finding out -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Output:
    """A tensor that a layer returned."""

    time: int
    layer: str
    vertex: Vertex
    shape: tuple[int, ...]
    source: Vertex | None  # the first tensor that the layer was given
    source_shape: tuple[int, ...] | None


class _Recording(TorchFunctionMode):
    """What happens in a forward pass. The clock counts the tensors that layers have returned so far."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.outputs: list[_Output] = []
        self.calls: dict[str, tuple[int, int]] = {}  # of a layer: when it was called first, when it returned last
        self.repeated: set[str] = set()  # layers that are called several times
        self.uses: dict[str, tuple[int, int]] = {}  # of a parameter or a buffer: its first and its last use
        self.names: dict[int, list[str]] = {}
        for name, tensor in _tensors(model):
            self.names.setdefault(id(tensor), []).append(name)
        self.open: dict[str, tuple[int, Vertex | None, tuple[int, ...] | None]] = {}

    @property
    def now(self) -> int:
        return len(self.outputs)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            for name in self.names.get(id(value), ()) if isinstance(value, Tensor) else ():
                self.uses[name] = (self.uses.get(name, (self.now,))[0], self.now)
        return function(*args, **(kwargs or {}))

    def enter(self, layer: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is None:
            self.open[layer] = (self.now, None, None)
        else:
            self.open[layer] = (self.now, _vertex(given), tuple(given.shape))

    def leave(self, layer: str, output: Any) -> None:
        began, source, shape = self.open.pop(layer)
        if layer in self.calls:
            self.repeated.add(layer)
        self.calls[layer] = (min(began, self.calls.get(layer, (began,))[0]), self.now)
        if isinstance(output, Tensor) and output.requires_grad:
            self.outputs.append(_Output(self.now, layer, _vertex(output), tuple(output.shape), source, shape))


def find_chain(model: nn.Module, shape: Sequence[int]) -> Chain:
    """Run `model` once on images of `shape` [C, H, W] and return where it can be cut.

    The model may lie on the meta device; it is left in eval mode with everything trainable. Raises NotAChain if its output
    is not one tensor, or if one parameter works on both sides of a cut.
    """
    model.eval().requires_grad_(True)
    images = torch.zeros(2, *shape, device=next(model.parameters()).device, requires_grad=True)
    recording = _Recording(model)
    handles = []
    for name, layer in model.named_modules():
        if name:
            enter = lambda layer, args, kwargs, name=name: recording.enter(name, args, kwargs)  # noqa: E731
            leave = lambda layer, args, output, name=name: recording.leave(name, output)  # noqa: E731
            handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(layer.register_forward_hook(leave))
    try:
        with recording:
            logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor):
        raise NotAChain(f"{type(model).__name__} returns a {type(logits).__name__}, not one tensor of logits")
    is_cut = _narrow_places(logits, images)

    # Tensors that every path goes through, in order of time, each with the layers that returned it.
    places: dict[Vertex, int] = {}
    made_by: list[list[_Output]] = []
    for output in recording.outputs:
        if is_cut(output.vertex) and output.layer not in recording.repeated:
            place = places.setdefault(output.vertex, len(places))
            if place == len(made_by):
                made_by.append([output])
            elif output.source != output.vertex:  # one that hands on what it was given made nothing
                made_by[place].append(output)
    if not made_by:
        raise NotAChain(f"{type(model).__name__} has no layer whose output is all that the layers behind it see")

    whole = {}  # a layer that lies between two cuts of one shape → the place of the cut behind it
    for place, outputs in enumerate(made_by):
        for output in outputs:
            if output.source in places and output.source != output.vertex and output.source_shape == output.shape:
                whole[output.layer] = place
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    block_at = {whole[name]: name for name in _blocks(model, whole)}
    stretches = []
    for place, outputs in enumerate(made_by):
        layers, block, branches = tuple(output.layer for output in outputs), block_at.get(place), ()
        if block:
            output = next(output for output in outputs if output.layer == block)
            branches = _branch_ends(output.vertex[0], output.source[0], names)
        stretches.append(Stretch(layers, outputs[-1].shape, block, branches))

    times = [outputs[-1].time for outputs in made_by]

    def stretch_at(time: int) -> int:
        return min(bisect.bisect_left(times, time), len(times) - 1)

    spans = {name: (stretch_at(first), stretch_at(last)) for name, (first, last) in recording.calls.items()}
    owners = {name: stretch_at(first) for name, (first, _) in recording.uses.items()}
    for name, _ in _tensors(model):
        if name not in owners:  # nothing of torch took it by itself: it works where its layer does
            layer = name.rpartition(".")[0]
            while layer and layer not in spans:
                layer = layer.rpartition(".")[0]
            owners[name] = spans[layer][0] if layer else 0
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shared = [name for name, (_, last) in recording.uses.items() if name in parameters and stretch_at(last) != owners[name]]
    if shared:
        raise NotAChain(f"{type(model).__name__} uses {shared[0]} in several places that a cut would part")
    return Chain(tuple(stretches), owners, spans)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _vertex(tensor: Tensor) -> Vertex:
    return (tensor, 0) if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def _narrow_places(logits: Tensor, images: Tensor) -> Callable[[Vertex], bool]:
    """Return a function that says whether all paths of the autograd graph from `logits` to `images` go through a tensor.

    A tensor lies on (paths from the logits to it) x (paths from it to the images) of them; Python counts exactly.
    """
    root = logits.grad_fn
    order, seen, stack = [], set(), [(root, False)]  # nodes, those nearer to the images first
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(below, False) for below, _ in node.next_functions if below is not None]
    down = {}  # paths from a node to the images
    for node in order:
        here = 1 if getattr(node, "variable", None) is images else 0
        down[node] = here + sum(down[below] for below, _ in node.next_functions if below is not None)
    up, into = {root: 1}, {(root, logits.output_nr): 1}  # paths from the logits to a node, to one output of it
    for node in reversed(order):
        for below, number in node.next_functions:
            if below is not None and down[below]:
                up[below] = up.get(below, 0) + up[node]
                into[below, number] = into.get((below, number), 0) + up[node]
    total = down[root]
    return lambda vertex: into.get(vertex, 0) * down.get(vertex[0], 0) == total


VIEWS = ("T", "View", "ReshapeAlias", "Unsqueeze", "Permute", "Transpose", "Expand", "UnsafeView", "ToCopy", "Reshape")


def _branch_ends(output: Any, source: Any, names: dict[int, str]) -> tuple[str, ...]:
    """Return the parameters that are met first on the ways back from a block's output; none if no way leads to its input
    past all parameters. `names` has the name of a parameter by its id."""
    found: set[str] = set()
    seen, stack, passed = set(), [output], False
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node is source:
            passed = True
            continue
        taken = [name for below, _ in node.next_functions if (name := names.get(id(_variable(below))))]
        found.update(taken)
        if not taken:
            stack += [below for below, _ in node.next_functions]
    return tuple(sorted(found)) if passed else ()


def _variable(node: Any) -> Tensor | None:
    """Return the leaf that a node hands on, itself or a view of it."""
    while node is not None and node.name().removesuffix("Backward0") in VIEWS:
        node = next((below for below, _ in node.next_functions if below is not None), None)
    return getattr(node, "variable", None)


def _blocks(model: nn.Module, whole: dict[str, int]) -> list[str]:
    """Return the innermost layers of `whole` that stand in a list and have weights; single layers only where all are."""

    def stands_in_a_list(name: str) -> bool:
        parent = model.get_submodule(name.rpartition(".")[0])
        return isinstance(parent, nn.Sequential | nn.ModuleList) or len({type(child) for child in parent.children()}) == 1

    def find(composite: bool) -> list[str]:
        fit = []
        for name in whole:
            layer = model.get_submodule(name)
            has_matrix = any(parameter.ndim > 1 for parameter in layer.parameters())
            if stands_in_a_list(name) and has_matrix and (not composite or any(layer.children())):
                fit.append(name)
        return [name for name in fit if not any(other.startswith(f"{name}.") for other in fit)]

    return find(composite=True) or find(composite=False)


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
    places = chain._places
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
            import difflib

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
    """Whether a network has a layer of that name, and not what stands for one that was left out."""
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

    handle = last_layer(model, partition, index).register_forward_hook(stop)
    try:
        model(x)
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise AssertionError("the network ran past its cut")


def outputs(model: nn.Module, partition: Partition, x: Tensor) -> list[Tensor]:
    """Run a network on images [B, C, H, W] and return the output of every module; of the last one they are the logits."""
    kept: dict[int, Tensor] = {}
    handles = []
    for index in range(partition.num_modules - 1):
        keep = lambda layer, args, output, index=index: kept.update({index: output})  # noqa: E731
        handles.append(last_layer(model, partition, index).register_forward_hook(keep))
    try:
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
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
    yield from (name for name, _ in _tensors(layer))
    yield from (name for name, _ in layer.named_modules(remove_duplicate=False) if name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shell(layer: nn.Module) -> nn.Module:
    """Return a layer of the same class and attributes with registries of its own, so that pieces can be exchanged."""
    shell = type(layer).__new__(type(layer))
    shell.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
    return shell
