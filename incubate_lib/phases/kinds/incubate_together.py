"""incubate_together: all target modules, each in its place in the frozen meta model, in one process that reads each image once.

Equal bit for bit to one `incubate` phase a module, if those have `share_draws`.
"""

from collections.abc import Callable, Iterator
from typing import Any

from incubate_lib.config import ModelSettings, PhaseSettings, TrainingSettings
from incubate_lib.phases.kinds import Inputs
from incubate_lib.phases.kinds.incubate import Incubate, Start


class IncubateTogether(Incubate):
    name = "incubate_together"
    group = "incubate"
    label = "modules together"
    counted_as = "hybrids together"
    notebook = ""
    is_set_by_name = False
    options = Start
    pace = "incubate_together"

    def unmeant(self, recipe: TrainingSettings) -> str:
        once = "frozen: train (frozen layers run once for all modules, without drop-path; set frozen: eval)"
        return super().unmeant(recipe) or (once if recipe.frozen == "train" else "")

    def title(self, s: PhaseSettings) -> str:
        return f"{len(s.target_depths)} modules together"

    def alone(self, s: PhaseSettings) -> list[PhaseSettings]:
        return [
            s.model_copy(update={"phase": "incubate", "group": "", "options": s.options | {"module_index": i}})
            for i in range(len(s.target_depths))
        ]

    def cost(self, model: ModelSettings, options: dict[str, Any]) -> str:
        return self.name

    def count(self, networks: Any) -> dict[str, int]:
        if not networks.partition:
            return {}
        by_module = [self.count_modules(networks, i) for i in range(networks.partition.num_modules)]
        again = sum(sum(flops[:i]) for i, flops in enumerate(by_module))  # the meta modules before each
        return {self.name: sum(map(sum, by_module)) - again + sum(by_module[-1][:-1])}

    def memory(self, networks: Any, index: int | None, count: Callable[..., Any], options: dict[str, Any]) -> Any:
        from incubate_lib.training.memory import StepMemory, in_turn

        modules = range(networks.partition.num_modules)
        hybrids = [sum(count(*self.trains(networks, i)), StepMemory()) for i in modules]
        meta = sum(parameter.numel() * parameter.element_size() for parameter in networks.hybrids_of.parameters())
        return in_turn(hybrids) + StepMemory(weights=meta)

    def build(self, s: PhaseSettings, inputs: Inputs, outputs: int) -> Any:
        from incubate_lib.method.together import Together
        from incubate_lib.phases.networks import partition_of
        from incubate_lib.phases.recipes import meta_and_target

        meta, target = meta_and_target(s, inputs, outputs)
        for index in range(len(s.target_depths)):
            self.hybrid(s, meta, target, index)  # which begins the module and sets its drop-path
        return Together(meta, target, partition_of(s))

    def losses(self, run: Callable[..., Any], x: Any, loss: Callable[[Any], Any]) -> Iterator[Any]:
        for index in run(x):
            yield loss(run(x, index))

    def evaluated(self, model: Any, x: Any) -> list[Any]:
        return model(x)

    def groups(self, model: Any) -> list[list[Any]]:
        return [own for hybrid in model.hybrids for own in super(IncubateTogether, self).groups(hybrid)]


PHASE = IncubateTogether()
