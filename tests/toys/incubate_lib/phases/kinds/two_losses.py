"""A phase with two losses: of the images and, once that is gone through backward, of their mirror images.

Its two files of weights are the network and its head alone; the head's gradients are clipped by a norm of their own.
"""

from collections.abc import Callable, Iterator
from typing import Any

from incubate_lib.config import ModelSettings, PhaseSettings
from incubate_lib.phases.kinds import Inputs, Phase


class TwoLosses(Phase):
    name = "two_losses"
    label = "two losses"
    pace = "two_losses"

    def cost(self, model: ModelSettings, options: dict[str, Any]) -> str:
        return "two_losses"

    def count(self, networks: Any) -> dict[str, int]:
        return {"two_losses": 2 * networks.counts.per_image(networks.target, networks.partition)}

    def build(self, s: PhaseSettings, inputs: Inputs, outputs: int) -> Any:
        from incubate_lib.phases.networks import build_target

        return build_target(s, outputs)

    def losses(self, run: Callable[[Any], Any], x: Any, loss: Callable[[Any], Any]) -> Iterator[Any]:
        yield loss(run(x))
        yield loss(run(x.flip(-1)))

    def groups(self, model: Any) -> list[list[Any]]:
        head = list(model.head.parameters())
        return [[p for p in model.parameters() if not any(p is own for own in head)], head]

    def results(self, model: Any) -> dict[str, dict[str, Any]]:
        tensors = model.state_dict()
        return {"model": tensors, "head": {name: tensors[name] for name in tensors if name.startswith("head.")}}


PHASE = TwoLosses()
