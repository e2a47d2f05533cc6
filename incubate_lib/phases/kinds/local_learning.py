"""local_learning: all modules of the target network at once, each from a loss of its own (InfoPro, DGL)."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

from incubate_lib.config import Frozen, ModelSettings, PhaseSettings, TrainingSettings
from incubate_lib.phases.kinds import IN_PIECES, Inputs, Phase

Weights = tuple[float, float] | list[float] | None


class Options(Frozen):
    method: Literal["infopro", "dgl"]
    contrast: bool = False
    reconstruction: Weights = None  # its weight, at the first module and at the last but one
    supervision: Weights = None  # that of the task


def cost_of(method: str, contrast: bool) -> str:
    """Return under which name the FLOPs of a training image stand; those of the heads alone have `_heads` behind it."""
    return f"local_learning-{method}{'_contrast' * contrast}"


class LocalLearning(Phase):
    name = "local_learning"
    label = "local learning"
    look = ("#CC79A7", "\\\\")
    options = Options
    counted_apart = True

    def unmeant(self, recipe: TrainingSettings) -> str:
        return IN_PIECES if recipe.layer_decay else ""

    def network(self, model: ModelSettings, partition: dict[str, list[Any]], takes_depth: bool) -> dict[str, Any]:
        return {"model": model} | partition | {"meta_depths": []}

    def cost(self, model: ModelSettings, options: dict[str, Any]) -> str:
        return cost_of(options["method"], options["contrast"])

    def count(self, networks: Any) -> dict[str, int]:
        flops: dict[str, int] = {}
        if not networks.partition:
            return flops
        modules = sum(networks.counts.by_module(*self.trains(networks, None), apart=True))
        for method, contrast in (("infopro", False), ("infopro", True), ("dgl", False)):
            try:
                heads = self._counted_heads(networks, method, contrast)
            except ValueError:  # what is handed on is no map; a strategy that needs it says so
                continue
            flops |= {cost_of(method, contrast): modules + heads, f"{cost_of(method, contrast)}_heads": heads}
        return flops

    def _counted_heads(self, networks: Any, method: str, contrast: bool) -> int:
        """Return the FLOPs of a training image in all heads."""
        from torch.utils.flop_counter import FlopCounterMode

        from incubate_lib.method.local import handed_on

        heads = self._heads(networks, method, contrast)
        with FlopCounterMode(display=False) as counter:
            for i, head in enumerate(heads):
                given = head(handed_on(networks.partition, i).requires_grad_())
                sum(part.sum() for part in (given.output, given.decoded) if part is not None).backward()
        return counter.get_total_flops() // 2

    def _heads(self, networks: Any, method: str, contrast: bool) -> list[Any]:
        """Return the heads on the meta device."""
        import torch

        from incubate_lib.method.local import heads_of

        with torch.device("meta"):
            return heads_of(method, networks.partition, networks.counts.image_shape, networks.target.num_classes, contrast)

    def memory(self, networks: Any, index: int | None, count: Callable[..., Any], options: dict[str, Any]) -> Any:
        from incubate_lib.method.local import Joined, handed_on
        from incubate_lib.training.memory import in_turn

        *modules, last = count(*self.trains(networks, None))
        heads = self._heads(networks, options["method"], options["contrast"])
        shapes = [handed_on(networks.partition, i).shape[1:] for i in range(len(heads))]
        own = [count(Joined(head), None, shape)[0] for head, shape in zip(heads, shapes, strict=True)]
        return in_turn([module + head for module, head in zip(modules, own, strict=True)] + [last])

    def build(self, s: PhaseSettings, inputs: Inputs, outputs: int) -> Any:
        import torch

        from incubate_lib.data.schedule import derive_seed
        from incubate_lib.method.local import LocalLearning, heads_of
        from incubate_lib.phases.networks import build_target, model_shape, partition_of

        partition, options = partition_of(s), Options.model_validate(s.options)
        weights = options.reconstruction, options.supervision
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(s.seed, "init", "heads"))
            heads = heads_of(options.method, partition, model_shape(s.model), outputs, options.contrast, weights)
        return LocalLearning(build_target(s, outputs), partition, heads)

    def losses(self, run: Callable[..., Any], x: Any, loss: Callable[[Any], Any]) -> Iterator[Any]:
        from torch.nn.functional import binary_cross_entropy_with_logits

        for index in run(x):
            made = run(x, index)
            # whoever only counts has one loss for everything, and no images
            value = made.weight * (getattr(loss, "contrast", loss) if made.contrast else loss)(made.output)
            if made.decoded is not None:
                pixels = getattr(loss, "pixels", lambda: x)()
                value = value + made.decoded_weight * binary_cross_entropy_with_logits(made.decoded.float(), pixels.float())
            yield value

    def groups(self, model: Any) -> list[list[Any]]:
        return model.groups()

    def finished(self, s: PhaseSettings, outputs: int) -> Any:
        from incubate_lib.phases.networks import build_target

        return build_target(s, outputs)

    def results(self, model: Any) -> dict[str, dict[str, Any]]:
        return {"model": model.network.state_dict()}

    def about(self, model: Any, flops_per_image: dict[str, int], cost: str) -> dict[str, Any]:
        network, heads = (sum(p.numel() for p in part.parameters()) for part in (model.network, model.heads))
        return {"parameters": network, "head_parameters": heads, "head_flops_per_image": flops_per_image[f"{cost}_heads"]}


PHASE = LocalLearning()
