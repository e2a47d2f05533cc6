"""meta: the tiny shared network, trained end to end, or read from a file."""

from typing import Any

from incubate_lib.config import ModelSettings, PhaseSettings
from incubate_lib.phases.kinds import Inputs, Phase


class Meta(Phase):
    name = "meta"
    label = "meta model"
    notebook = "01_meta_model"

    def model_of(self, model: ModelSettings) -> ModelSettings:
        return model.model_copy(update={"depth": None})

    def target_depths(self, depths: list[int]) -> list[int]:
        return []

    def cost(self, s: PhaseSettings) -> str:
        return "meta"

    def count(self, networks: Any) -> dict[str, int]:
        return {"meta": networks.counts.per_image(networks.meta, networks.meta_partition)} if networks.partition else {}

    def build(self, s: PhaseSettings, inputs: Inputs, num_classes: int) -> Any:
        from incubate_lib.phases.networks import build_meta
        from incubate_lib.phases.weights import load_into

        model = build_meta(s, num_classes)
        if "weights" in inputs:
            load_into(model, inputs["weights"], s.inputs["weights"])
        return model


PHASE = Meta()
