"""meta: the tiny shared network, trained end to end, or read from a file."""

from typing import Any

from incubate_lib.config import ModelSettings, PhaseSettings
from incubate_lib.phases.kinds import Inputs, Phase


class Meta(Phase):
    name = "meta"
    label = "meta model"
    look = ("#E69F00", "..")
    line = ":"
    notebook = "01_meta_model"
    pace = "meta"

    def network(self, model: ModelSettings, partition: dict[str, list[Any]], takes_depth: bool) -> dict[str, Any]:
        if takes_depth:  # else it is what is left of the target network
            model, partition = model.model_copy(update={"depth": None}), partition | {"target_depths": [], "cuts": []}
        return {"model": model} | partition

    def cost(self, model: ModelSettings, options: dict[str, Any]) -> str:
        return "meta"

    def count(self, networks: Any) -> dict[str, int]:
        return {"meta": networks.counts.per_image(networks.meta, networks.meta_partition)} if networks.partition else {}

    def trains(self, networks: Any, module_index: int | None) -> tuple[Any, Any]:
        return networks.meta.requires_grad_(True), networks.meta_partition

    def build(self, s: PhaseSettings, inputs: Inputs, outputs: int) -> Any:
        from incubate_lib.phases.networks import build_meta
        from incubate_lib.phases.weights import load_into

        model = build_meta(s, outputs)
        if "weights" in inputs:
            load_into(model, inputs["weights"], s.inputs["weights"])
        return model


PHASE = Meta()
