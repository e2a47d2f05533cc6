"""Joint incubation: the hybrids of all modules at once, which share a batch and one pass through the frozen meta model.

Nothing changes for a module: it gets the images, the gradients and the random draws that it would get alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from incubate_lib.method.incubation import Copied, Hybrid, layers_before, layers_of, recorded
from incubate_lib.method.network import Partition, replaced, run_to


class Behind(Hybrid):
    """A hybrid in which the layers before the module stand for what they returned in the meta model."""

    def __init__(self, meta: nn.Module, target: nn.Module, partition: Partition, index: int) -> None:
        super().__init__(meta, target, partition, index)
        self.replays = {path: Copied(self.network.get_submodule(path)) for path in layers_before(self.network, partition, index)}
        self.network = replaced(self.network, self.replays)
        self.learning = list(layers_of(self.network, partition, index))
        self.train()


class Together(nn.Module):
    """All hybrids of a meta model and a target network, each with a loss of its own.

    `forward` without an index runs the meta model up to its last module, once. Then it returns in train mode the indices of the
    hybrids, which wait to be run one after the other (`forward(x, index)`, logits), so that the graph of one at a time is kept;
    in eval mode the logits of all. Every hybrid draws the same random numbers, those that it would draw alone.
    """

    def __init__(self, meta: nn.Module, target: nn.Module, partition: Partition) -> None:
        super().__init__()
        self.partition, self.meta = partition, meta.requires_grad_(False)
        self.hybrids = nn.ModuleList(Behind(meta, target, partition, i) for i in range(partition.num_modules))
        self.draws: Tensor | None = None
        self.train()

    def train(self, mode: bool = True) -> "Together":
        """Put the target modules in train mode; what is frozen stays in eval mode."""
        super().train(mode)
        self.meta.eval()
        for hybrid in self.hybrids:  # which share layers with the meta model
            hybrid.train(mode)
        return self

    def forward(self, x: Tensor, index: int | None = None) -> Any:
        """Map images [B, C, H, W] to logits, or begin to: see above."""
        if index is not None:
            _generator(x.device).set_state(self.draws)
            return self.hybrids[index](x)
        if places := [place for hybrid in self.hybrids for place in hybrid.replays.items()]:
            with torch.no_grad(), recorded(self.meta, places):
                run_to(self.meta, self.partition, self.partition.num_modules - 2, x)
        if not self.training:
            return [hybrid(x) for hybrid in self.hybrids]
        self.draws = _generator(x.device).get_state()
        return range(len(self.hybrids))

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the networks want no decay of, as timm's networks say it."""
        return {f"hybrids.{i}.{name}" for i, hybrid in enumerate(self.hybrids) for name in hybrid.no_weight_decay()}

    def module_state(self) -> dict[str, Tensor]:
        """Return the tensors of all trained modules, under the target network's names."""
        return {name: tensor for hybrid in self.hybrids for name, tensor in hybrid.module_state().items()}


def _generator(device: torch.device) -> torch.Generator:
    """Return what layers on a device draw from."""
    return torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
