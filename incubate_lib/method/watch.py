"""What a forward pass does with a network's parameters, seen operation by operation.

Kernels and partial updates both rest on each layer being called once and using its parameters itself. Networks that do
otherwise are many: BEiT, EVA and Swin v2 multiply by the weight of a layer that they never call, `weight_norm` computes a
layer's weight from others before each call. The names of classes do not show it, the operations do.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Use:
    """When a forward pass uses a parameter, in operations from its start."""

    first: int
    last: int
    outside: bool = False  # whether an operation takes it outside the call of the layer that holds it


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a while; afterwards each module is in the mode it was in, frozen batch norms too."""
    was_training = model.training
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)  # some modules keep what they computed in eval mode until the mode changes
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def watched_parameters(model: nn.Module) -> Iterator[dict[str, Use]]:
    """Note the use of each parameter in the forward passes that follow: its name → when; those that are not used are missing.

    A layer's call begins when all its pre-hooks are done, and so does what counts as its own use.
    """
    uses: dict[str, Use] = {}
    calls: dict[int, int] = {}  # id of a module → calls of it that are going on

    def enter(module: nn.Module, inputs: Any) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        calls[id(module)] -= 1

    with contextlib.ExitStack() as hooks, _Watch(model, uses, calls):
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                hooks.enter_context(module.register_forward_pre_hook(enter))
                hooks.enter_context(module.register_forward_hook(leave, prepend=True))
        yield uses


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module, uses: dict[str, Use], calls: dict[int, int]) -> None:
        super().__init__()
        self.uses, self.calls, self.now = uses, calls, 0
        self.known = {}  # id of a parameter → its name, the module that holds it
        for name, parameter in model.named_parameters():
            self.known[id(parameter)] = name, model.get_submodule(name.rpartition(".")[0])

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                known = self.known.get(id(tensor)) or self.known.get(id(tensor._base))  # or a view that was made before
                if known is not None:
                    name, module = known
                    use = self.uses.setdefault(name, Use(self.now, self.now))
                    use.last = self.now
                    use.outside |= not self.calls.get(id(module))
        self.now += 1
        return func(*args, **kwargs)


def check_held_alone(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError for a parameter among these that two layers hold, or that shares its memory with another."""
    holders: dict[int, list[str]] = {}
    places: dict[tuple[int, int], set[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append(name)
            if parameter.numel():
                places.setdefault(_place(parameter), set()).add(name)
    for name in names:
        parameter = model.get_parameter(name)
        others = {*holders[id(parameter)], *places.get(_place(parameter), ())} - {name}
        if len(holders[id(parameter)]) > 1 or len(places.get(_place(parameter), ())) > 1:
            raise ValueError(f"parameter {name} is {' and '.join(sorted(others))} as well; no unit has it alone")


def _place(parameter: Tensor) -> tuple[int, int]:
    return parameter.untyped_storage()._cdata, parameter.storage_offset()
