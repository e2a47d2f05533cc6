"""The devices that train one phase together: one process each, all with the same weights."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch import distributed as dist


@dataclass(frozen=True)
class Team:
    """This process's place among `devices` that train together; alone by default, and then nothing is communicated."""

    rank: int = 0
    devices: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # of this process

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def sync_every(self) -> int:
        """Updates between two looks at losses and clock; together they must be the same ones for all."""
        return 1 if self.devices == 1 else 8

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.devices > 1:
            dist.all_reduce(values)
        return values

    def decide(self, decision: bool) -> bool:
        """Return what the first process decided: clocks and files may look different to each."""
        if self.devices == 1:
            return decision
        decided = torch.tensor([decision], dtype=torch.int32, device=self.device)
        dist.broadcast(decided, 0)
        return bool(decided.item())

    def share(self, values: Tensor) -> Tensor:
        """Return the first process's values: those of others may differ in the last bits."""
        if self.devices == 1:
            return values
        there = values.to(self.device)
        dist.broadcast(there, 0)
        return there.to(values.device)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every replica the first one's buffers, such as BatchNorm's running statistics: those are the ones saved.

        Gradients keep parameters equal, but each device has seen images of its own.
        """
        if self.devices > 1:
            for buffer in model.buffers():
                buffer.copy_(self.share(buffer))

    def gather(self, names: list[str]) -> set[str]:
        """Return all names that any process has."""
        parts = [names]
        if self.devices > 1:
            parts = [None] * self.devices
            dist.all_gather_object(parts, names)
        return {name for part in parts for name in part}

    def barrier(self) -> None:
        if self.devices > 1:
            dist.barrier()


ALONE = Team()
