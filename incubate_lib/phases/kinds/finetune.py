"""finetune: a whole network trained on, from assembly, from small images, or from a file of weights."""

from typing import Any

from incubate_lib.config import PhaseSettings
from incubate_lib.phases.kinds import Inputs, Phase


class Finetune(Phase):
    name = "finetune"
    label = "fine-tuning"
    look = ("#009E73", "//")
    line = "-"
    notebook = "04_finetune"

    def begins(self, steps: int, others: set[str]) -> bool:
        return False

    def build(self, s: PhaseSettings, inputs: Inputs, outputs: int) -> Any:
        from incubate_lib.method.sizes import at_size
        from incubate_lib.phases.networks import build_target
        from incubate_lib.phases.weights import load_into
        from incubate_lib.training.runs import PhaseFolder

        model = build_target(s, outputs)
        if "weights" in inputs:
            load_into(model, inputs["weights"], s.inputs["weights"])
        elif inputs:
            [before] = inputs.values()
            model.load_state_dict(at_size(PhaseFolder(before).load_weights(), model))
        return model


PHASE = Finetune()
