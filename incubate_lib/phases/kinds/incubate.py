"""incubate: one target module alone, in its place in the frozen meta model, from the labels."""

from typing import Any, Literal

from incubate_lib.config import Frozen, ModelSettings, PhaseSettings, TrainingSettings
from incubate_lib.phases.kinds import IN_PIECES, Inputs, Phase

StartName = Literal["random", "stack", "identity"]


class Start(Frozen):
    """How a target module begins."""

    start: StartName | None = None
    inherit_stem: bool = False
    inherit_head: bool = False


class Options(Start):
    module_index: int  # 0-based
    share_draws: bool = False  # order of images and random draws are those of module 1


class Incubate(Phase):
    name = "incubate"
    label = "module"
    counted_as = "hybrid"
    look = ("#56B4E9", "")
    line = "--"
    notebook = "02_incubate_module"
    options = Options
    pace = "incubate"
    imitates = False
    work = ("forward only", "forward, all gradients", "forward, gradient of its input")

    def begins(self, steps: int, others: set[str]) -> bool:
        return False

    def unmeant(self, recipe: TrainingSettings) -> str:
        return IN_PIECES if recipe.layer_decay else ""

    def title(self, s: PhaseSettings) -> str:
        return f"module {s.module_index + 1} of {len(s.target_depths)}"

    def cost(self, model: ModelSettings, options: dict[str, Any]) -> str:
        return f"{self.name}-{options['module_index']}"

    def count(self, networks: Any) -> dict[str, int]:
        modules = networks.partition.num_modules if networks.partition else 0
        return {f"{self.name}-{i}": sum(self.count_modules(networks, i)) for i in range(modules)}

    def count_modules(self, networks: Any, module_index: int) -> list[int]:
        made_of = networks.hybrids_of, networks.target, networks.partition
        return networks.counts.hybrid(*made_of, module_index, self.imitates)

    def trains(self, networks: Any, module_index: int | None) -> tuple[Any, Any]:
        from incubate_lib.method.incubation import Hybrid

        hybrid = Hybrid(networks.hybrids_of, networks.target, networks.partition, module_index)
        return hybrid.network, hybrid.partition

    def build(self, s: PhaseSettings, inputs: Inputs, outputs: int) -> Any:
        from incubate_lib.phases.recipes import meta_and_target

        return self.hybrid(s, *meta_and_target(s, inputs, outputs), s.module_index)

    def hybrid(self, s: PhaseSettings, meta: Any, target: Any, index: int) -> Any:
        """Return the hybrid of a module, begun as the settings say, whose weights are those of the two networks."""
        from incubate_lib.method.incubation import Hybrid, Imitation
        from incubate_lib.method.network import has_layer
        from incubate_lib.phases.networks import partition_of, set_drop_path
        from incubate_lib.phases.recipes import start

        start(s, meta, target, index)
        partition, recipe = partition_of(s), s.training
        kind = Imitation if self.imitates else Hybrid
        hybrid = kind(meta, target, partition, index, recipe.frozen if recipe else "eval")
        if recipe and recipe.drop_path_over == "hybrid":
            blocks = [block for block in partition.chain.blocks if has_layer(hybrid.network, block)]
            set_drop_path(hybrid.network, blocks, recipe.drop_path)
        return hybrid

    def results(self, model: Any) -> dict[str, dict[str, Any]]:
        return {"model": model.module_state()}


PHASE = Incubate()
