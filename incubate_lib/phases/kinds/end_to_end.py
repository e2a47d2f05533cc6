"""end_to_end: the whole target network at once, from its fresh start; with small_images for the first part of a training."""

from typing import Any

from incubate_lib.config import Frozen, ModelSettings, PhaseSettings
from incubate_lib.phases.kinds import Inputs, Phase


class Options(Frozen):
    small_images: bool = False  # the training goes on at the network's own size


class EndToEnd(Phase):
    name = "end_to_end"
    label = "end to end"
    look = ("#777777", "xx")
    notebook = "05_end_to_end"
    options = Options

    def network(self, model: ModelSettings, partition: dict[str, list[Any]], takes_depth: bool) -> dict[str, Any]:
        depths = partition["target_depths"]
        return {"model": model, "target_depths": [sum(depths)] if depths else [], "meta_depths": []}

    def cost(self, model: ModelSettings, options: dict[str, Any]) -> str:
        return f"target-{model.img_size}" if options.get("small_images") else "target"

    def count(self, networks: Any) -> dict[str, int]:
        return {"target": networks.counts.per_image(networks.target, networks.partition)}

    def build(self, s: PhaseSettings, inputs: Inputs, outputs: int) -> Any:
        from incubate_lib.phases.networks import build_target

        return build_target(s, outputs)


PHASE = EndToEnd()
