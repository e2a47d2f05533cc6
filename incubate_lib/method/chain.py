"""Any network as a chain: where it can be cut, which blocks it can do without, who owns which weight.

There is no table of architectures. One forward pass shows it: the output of a layer is a *cut* if every path of the autograd
graph from the logits to the images goes through it, and a parameter belongs to the stretch between two cuts in which it is
used first.

Letters used for shapes: B batch, C channels, H and W pixels.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from incubate_lib.method.sizes import blank, differentiable

Vertex = tuple[Any, int]  # a tensor in the autograd graph: the node that made it, and which of the node's outputs it is


class NotAChain(ValueError):
    """The network cannot be cut; the message says why."""


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
        return self.block_of(name) is None and self.owners[name] <= self.places[0]

    def is_head(self, name: str) -> bool:
        """Whether a parameter or a buffer works behind the last block."""
        return self.block_of(name) is None and self.owners[name] > self.places[-1]

    @property
    def places(self) -> list[int]:
        """The stretches that end with a block."""
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
        for name, tensor in tensors_of(model):
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
    """Run `model` once on images of `shape` [C, H, W], or on contexts of [T] tokens, and return where it can be cut.

    The model may lie on the meta device; it is left in eval mode with everything trainable. Raises NotAChain if its output
    is not one tensor, or if one parameter works on both sides of a cut.
    """
    model.eval().requires_grad_(True)
    images = blank(model, 2, shape)
    recording = _Recording(model)
    with differentiable(model, images) as leaves, ExitStack() as hooks, recording:
        for name, layer in model.named_modules():
            if name:
                enter = lambda layer, args, kwargs, name=name: recording.enter(name, args, kwargs)  # noqa: E731
                leave = lambda layer, args, output, name=name: recording.leave(name, output)  # noqa: E731
                hooks.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.enter_context(layer.register_forward_hook(leave))
        logits = model(images)
    if not isinstance(logits, Tensor):
        raise NotAChain(f"{type(model).__name__} returns a {type(logits).__name__}, not one tensor of logits")
    is_cut = _narrow_places(logits, leaves)

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
    for name, _ in tensors_of(model):
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


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _vertex(tensor: Tensor) -> Vertex:
    return (tensor, 0) if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def _narrow_places(logits: Tensor, images: Sequence[Tensor]) -> Callable[[Vertex], bool]:
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
        here = int(any(getattr(node, "variable", None) is leaf for leaf in images))
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
# What hands on values as they are; ReLU, too, since blocks that end with it are given what a ReLU returned.
KEEPING = (*VIEWS, "Add", "Cat", "Clone", "Slice", "Split", "SplitWithSizes", "Unbind", "Select", "Squeeze", "Alias", "Relu")
KEEPING += ("AsStrided", "torch::autograd::CopySlices")  # an addition in place to a part of something


def _branch_ends(output: Any, source: Any, names: dict[int, str]) -> tuple[str, ...]:
    """Return the parameters that are met first on the ways back from a block's output; none unless all of that reaches its
    input once past all parameters. `names` has the name of a parameter by its id."""
    between = _leading_to(source, output)
    made: dict[Any, list[Any]] = {}  # of parameters alone: a weight, or a standardised one
    carried: dict[Any, list[Any]] = {}  # what holds the images; none if a factor that is made of parameters hides it
    times = {source: 1}  # how often what a node returns has the block's input in it, if all that is made is zero
    for node in between[1:]:
        operands = _operands(node)
        made[node] = [below for below in operands if below not in times]
        hidden = made[node] and node.name() != "AddBackward0"
        carried[node] = [] if hidden else [below for below in operands if below in times]
        parts = [times[below] for below in carried[node]]
        times[node] = sum(parts)
        if node.name() == "CatBackward0":  # of parts of the input; of the input and something else it would be none of both
            times[node] = parts[0] if len(set(parts)) == 1 else 2
        elif times[node] and _kind(node) not in KEEPING:
            times[node] = 2  # something else than the input
    found, reached = set[str](), {output}
    for node in reversed(between[1:]):
        if node in reached:
            found = found.union(*(_first_parameters(below, names) for below in made[node]))
            reached.update(carried[node])
    return tuple(sorted(found)) if times[output] == 1 else ()


def _leading_to(source: Any, output: Any) -> list[Any]:
    """Return the nodes between a block's input and its output, both included, those nearer to the input first."""
    found, seen, stack = {source: None}, set(), [(output, False)]
    while stack:
        node, done = stack.pop()
        below = [other for other, _ in node.next_functions if other is not None]
        if done and any(other in found for other in below):
            found[node] = None
        elif not done and node not in seen and node is not source:
            seen.add(node)
            stack += [(node, True), *((other, False) for other in below)]
    return list(found)


def _operands(node: Any) -> list[Any]:
    """Return what a node works on; of a normalisation its factor and bias, since these alone decide whether it returns zeros."""
    operands = [below for below, _ in node.next_functions if below is not None]
    return operands[1:] if "Norm" in node.name() and len(operands) > 1 else operands


def _first_parameters(node: Any, names: dict[int, str]) -> set[str]:
    """Return the parameters that are met first on the ways back from something made of parameters alone."""
    known = [names[id(leaf)] for below in (node, *_operands(node)) if id(leaf := _variable(below)) in names]
    return set(known) if known else set().union(*(_first_parameters(below, names) for below in _operands(node)))


def _kind(node: Any) -> str:
    return node.name().partition("Backward")[0]


def _variable(node: Any) -> Tensor | None:
    """Return the leaf that a node hands on, itself or a view of it."""
    while node is not None and _kind(node) in VIEWS:
        node = next((below for below, _ in node.next_functions if below is not None), None)
    return getattr(node, "variable", None)


def _blocks(model: nn.Module, whole: dict[str, int]) -> list[str]:
    """Return the innermost layers of `whole` that are in a list and have weights; single layers only where all are."""

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
