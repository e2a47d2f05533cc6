"""assemble: incubated modules put together; where nothing was incubated, modules as they start.

Nothing is trained. Where the network has batch norm, its statistics are renewed by one pass over the training images.
"""

from typing import Any

from incubate_lib.config import ModelSettings, PhaseSettings
from incubate_lib.phases.kinds import Inputs, Phase
from incubate_lib.phases.kinds.incubate import Start


class Options(Start):
    renew: bool = False  # batch norm's statistics


class Assemble(Phase):
    name = "assemble"
    label = "assembly"
    notebook = "03_assemble"
    is_set_by_name = False
    options = Options

    def begins(self, steps: int, others: set[str]) -> bool:
        return "meta" not in others  # of random modules

    def cost(self, model: ModelSettings, options: dict[str, Any]) -> str:
        return "renewal"

    def count(self, networks: Any) -> dict[str, int]:
        from torch.nn.modules.batchnorm import _BatchNorm

        has_statistics = networks.partition and any(isinstance(layer, _BatchNorm) for layer in networks.target.modules())
        return {"renewal": networks.counts.forward(networks.target)} if has_statistics else {}

    def build(self, s: PhaseSettings, inputs: Inputs, outputs: int) -> Any:
        from incubate_lib.method.incubation import assemble
        from incubate_lib.method.network import counted_through
        from incubate_lib.phases.networks import build_target, partition_of
        from incubate_lib.phases.recipes import meta_and_target, start
        from incubate_lib.training.runs import PhaseFolder

        if "meta" in inputs:
            meta, target = meta_and_target(s, inputs, outputs)
            for index in range(len(s.target_depths)):
                start(s, meta, target, index)
            return target
        target = build_target(s, outputs)
        if not inputs:
            return target
        partition = partition_of(s)
        modules = range(partition.num_modules)
        if "modules" in inputs:  # of one phase, all of them
            trained = PhaseFolder(inputs["modules"]).load_weights()
            return assemble(target, partition, [partition.part(i, trained) for i in modules])
        trained = [PhaseFolder(inputs[f"module-{i}"]).load_weights() for i in modules]
        return assemble(target, partition, [counted_through(partition, *module) for module in enumerate(trained)])


PHASE = Assemble()
