"""Deep Incubation (arXiv 2212.04129, section 3): hybrids, starting weights, assembly, for any network that is a chain.

1. train a tiny meta model end to end; 2. for each i train target module i alone inside the frozen meta model
(`Hybrid`); 3. put the trained modules together (`assemble`); 4. fine-tune the result end to end.
Steps 1, 2 and 4 use the ordinary loss on the labels, so any training loop will do.

Here a meta model has the names of the target: it is the target network with blocks left out (`network.without`), or a
network of its own in those names (`network.in_names_of`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from incubate_lib.method.network import Partition, graft, has_layer, replaced, run_to

Start = Literal["random", "stack", "identity"]


class Hybrid(nn.Module):
    """The meta model with one module replaced by the target's; only that is trainable.

    Only that is ever in train mode, too, unless `frozen` is "train", as in the released code.
    Weights are shared with both networks, and frozen or not in place, before anybody can wrap or compile the hybrid.
    Raises ValueError when the module does not fit the meta model.
    """

    def __init__(
        self, meta: nn.Module, target: nn.Module, partition: Partition, index: int, frozen: Literal["eval", "train"] = "eval"
    ) -> None:
        super().__init__()
        if not 0 <= index < partition.num_modules:
            raise ValueError(f"index {index} is outside the modules 0 … {partition.num_modules - 1}")
        check_fit(meta, target)
        self.partition, self.index, self.frozen = partition, index, frozen
        self.network = graft(meta, target, partition.claims(index))
        self.learning = list(layers_of(self.network, partition, index))
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(partition.owner(name) == index)
        self.train()

    def train(self, mode: bool = True) -> "Hybrid":
        """Put the target module in train mode; what is frozen stays in eval mode: drop-path would be noise, statistics move."""
        super().train(mode and self.frozen == "train")
        self.training = mode
        for layer in self.learning:
            layer.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits. Nothing before the module needs a gradient; behind it, it passes through."""
        return self.network(x)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the network wants no decay of, as timm's networks say it."""
        return {f"network.{name}" for name in getattr(self.network, "no_weight_decay", set)()}

    def module_state(self) -> dict[str, Tensor]:
        """Return the trained module's tensors, under the target network's names."""
        return self.partition.part(self.index, self.network.state_dict())


def layers_of(network: nn.Module, partition: Partition, index: int) -> Iterator[nn.Module]:
    """Return the layers that work in module `index`, and those within them that nobody calls."""
    belongs = partition.claims(index)

    def walk(layer: nn.Module, path: str, inherited: bool) -> Iterator[nn.Module]:
        own = belongs(path) if path else index == partition.num_modules - 1  # the root's own drop-out lies in its head
        if own is None:
            own = inherited and path not in partition.chain.spans
        if own:
            yield layer
        for name, child in layer.named_children():
            yield from walk(child, f"{path}.{name}" if path else name, own and bool(path))

    return walk(network, "", False)


class Replay(nn.Module):
    """Takes the place of a layer whose output is known already, and has that layer's attributes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.known = [layer]  # in a list: its weights are registered elsewhere
        self.value: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["known"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


class Copied(Replay):
    """The same for several networks, each of which may work in place on what it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.value.clone() if isinstance(self.value, Tensor) else self.value


class Imitation(Hybrid):
    """A hybrid whose target learns what its meta module computes, instead of labels: the paper's control (its section 4.3).

    In train mode its outputs are losses, in eval mode the hybrid's logits.
    """

    def __init__(self, meta: nn.Module, target: nn.Module, partition: Partition, index: int, frozen: str = "eval") -> None:
        super().__init__(meta, target, partition, index, frozen)
        self.meta = meta
        for name, parameter in meta.named_parameters():
            if partition.owner(name) == index:
                parameter.requires_grad_(False)
        self.replays = {path: Replay(self.network.get_submodule(path)) for path in layers_before(self.network, partition, index)}
        self.behind_prefix = [replaced(self.network, self.replays)]  # in a list: all that it holds is registered above
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to each image's loss [B]: the mean squared distance of the two modules' outputs.

        It is divided by the variance of the meta module's outputs, so that every module's losses are of one size.
        """
        if not self.training:
            return super().forward(x)
        with torch.no_grad(), recorded(self.meta, self.replays.items()):
            wanted = run_to(self.meta, self.partition, self.index, x)
        distance = (run_to(self.behind_prefix[0], self.partition, self.index, x) - wanted).float().square().flatten(1).mean(1)
        return distance / wanted.float().var()


@contextmanager
def recorded(network: nn.Module, replays: Iterable[tuple[str, Replay]]) -> Iterator[None]:
    """Have layers of a network, by their places, hand their outputs to replays: a frozen prefix runs once."""

    def record(layer: nn.Module, args: Any, output: Any, replay: Replay) -> None:
        replay.value = output.clone() if isinstance(output, Tensor) else output  # what follows may work in place

    with ExitStack() as hooks:
        for path, replay in replays:
            hooks.enter_context(network.get_submodule(path).register_forward_hook(partial(record, replay=replay)))
        yield


def layers_before(network: nn.Module, partition: Partition, index: int) -> list[str]:
    """Return the outermost layers that work only before module `index`."""
    spans = partition.chain.spans
    before = {name for name, (_, last) in spans.items() if partition.module_of(last) < index and has_layer(network, name)}
    return [name for name in before if not any(name.startswith(f"{other}.") for other in before)]


def check_fit(meta: nn.Module, target: nn.Module) -> None:
    """Raise ValueError unless all that a meta model has is in the target, too, and of the same shapes."""
    large = target.state_dict()
    for name, tensor in meta.state_dict().items():
        if name not in large or large[name].shape != tensor.shape:
            there = f"{tuple(large[name].shape)} in the target" if name in large else "not in the target"
            raise ValueError(f"the meta model does not fit the target: {name} is {tuple(tensor.shape)}, but {there}")


@torch.no_grad()
def start_module(
    target: nn.Module,
    meta: nn.Module,
    partition: Partition,
    index: int,
    start: Start,
    *,
    inherit_stem: bool = False,
    inherit_head: bool = False,
) -> None:
    """Set the starting weights of the target's module `index` from the meta model, in place.

    `random` (the paper) leaves the blocks as they were initialised; `stack` fills them with copies of the meta module's
    blocks; `identity` puts the meta module's blocks first and lets the residual branches of all others start at zero, so that
    the module computes what its meta module computes. With both, layers between blocks (those that reduce the image's size)
    are the meta model's, too. What lies before all blocks, or behind all, is inherited where that is asked for.
    Raises ValueError when the blocks cannot start that way.
    """
    check_fit(meta, target)
    chain = partition.chain
    own, small = target.state_dict(), meta.state_dict()
    blocks = partition.blocks(index)
    kept = [block for block in blocks if has_layer(meta, block)]
    shapes = {b: {n[len(b) :]: t.shape for n, t in own.items() if n.startswith(f"{b}.")} for b in blocks}
    ends = {stretch.block: stretch.ends for stretch in chain.stretches}
    for block in blocks:
        source = block
        if start == "stack":
            alike, fit = ([other for other in some if shapes[other] == shapes[block]] for some in (blocks, kept))
            if not fit:
                raise ValueError(
                    f"start 'stack': of module {index + 1} the meta model has no block of the shapes of {block}; more of its "
                    "blocks (meta_depths), or a cut between the stages, would give it one"
                )
            source = fit[alike.index(block) * len(fit) // len(alike)]
        elif start == "random":
            continue
        elif block not in kept:
            if not ends[block]:
                raise ValueError(f"start 'identity' needs residual blocks; nothing leads around the weights of {block}")
            for name in ends[block]:
                own[name].zero_()
            continue
        for name in [name for name in own if name.startswith(f"{block}.")]:
            own[name].copy_(small[source + name[len(block) :]])
    for name in partition.part(index, own):
        if chain.block_of(name) is None:
            inherits = start != "random"
            if chain.is_stem(name):
                inherits = inherit_stem
            elif chain.is_head(name):
                inherits = inherit_head
            if inherits:
                own[name].copy_(small[name])


def assemble(model: nn.Module, partition: Partition, modules: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    """Load the tensors of the trained modules 0 … K-1, as `Hybrid.module_state` returns them, into a target network.

    Raises ValueError that names what is missing, in the wrong place or of another shape.
    """
    if len(modules) != partition.num_modules:
        raise ValueError(f"the network has {partition.num_modules} modules, but {len(modules)} were given")
    own = model.state_dict()
    for index, tensors in enumerate(modules):
        expected = partition.part(index, own)
        wrong = {
            "missing": expected.keys() - tensors.keys(),
            "not its own": tensors.keys() - expected.keys(),
            "of another shape": {n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape},
        }
        for why, names in wrong.items():
            if names:
                raise ValueError(
                    f"cannot assemble: of module {index + 1} of {partition.num_modules}, {len(names)} tensors are {why}, "
                    f"first {min(names)}"
                )
    model.load_state_dict({name: tensor for tensors in modules for name, tensor in tensors.items()}, strict=True)
    return model
