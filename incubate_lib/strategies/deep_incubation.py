"""deep_incubation: a meta model, target modules that learn in its place or not at all, and all of them together.

deep_incubation*      meta ─→ incubate-0 … incubate-K-1 ─→ assemble ─→ finetune
stacking, growing     meta ─→ assemble ─→ finetune; so does recommended, and random_modules without meta
"""

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from incubate_lib.config import SettingsError, refuse
from incubate_lib.config.strategies import SmallImages, StrategySettings, TrainingChanges, epochs_in
from incubate_lib.phases.kinds.incubate import StartName
from incubate_lib.strategies import Kind

Part = Literal["meta", "incubate", "finetune"]


class DeepIncubation(StrategySettings):
    """Stands for the paper's method and for its controls."""

    is_cut: ClassVar[bool] = True

    kind: Literal["deep_incubation"]  # needed where the strategy's name is a new one
    start: StartName = "random"  # how each target module begins: random, stack, identity
    inherit_stem: bool = False  # module 1 starts with the meta model's embedding
    inherit_head: bool = False  # module K starts with the meta model's norm and head
    weights: str | None = None  # a trained meta model, relative to data/
    # how modules learn: from labels through the hybrid (the paper), by imitating the meta module's features, or not at all:
    # they keep their starting weights
    incubate: Literal["labels", "features", "none"] = "labels"
    together: bool = False  # all modules learn in one phase, which reads each image once; one process, none side by side
    share_draws: bool = False  # modules that learn apart get the same images and random draws, as they do together
    # meta model and modules have small images, fine-tuning those of the network; {}: half as large, {img_size: 16}: of 16 pixels
    low_resolution: SmallImages | None = None
    match: str | None = None  # as long as costs the training FLOPs of that one
    budget: Annotated[float, Field(gt=0)] = 1.0  # share of what is matched that it may cost
    # of that budget; fine-tuning has the rest. Where they add up to 1 the assembled network is only evaluated
    shares: dict[Literal["meta", "incubate"], Annotated[float, Field(gt=0, le=1)]] | None = None
    # multiplies training.lr in these phases, unless phases.<phase> has a rate of its own
    lr_scale: dict[Part, Annotated[float, Field(gt=0)]] | None = None
    # warm-up of these phases as a share of their epochs, unless phases.<phase> has warmup_epochs
    warmup_share: dict[Part, Annotated[float, Field(ge=0, le=1)]] | None = None

    @property
    def needs_meta(self) -> bool:
        """Whether there is a meta model."""
        return self.incubate != "none" or self.start != "random" or self.inherit_stem or self.inherit_head

    @property
    def ends_assembled(self) -> bool:
        """Whether all is spent before fine-tuning."""
        return math.isclose(sum((self.shares or {}).values()), 1)

    @property
    def all_phases(self) -> list[str]:
        modules = ["incubate"] if self.incubate != "none" else []
        return [*(["meta"] if self.needs_meta else []), *modules, "assemble", "finetune"]

    @property
    def trains(self) -> list[str]:
        without = {"assemble": True, "meta": self.weights, "finetune": self.ends_assembled}
        return [phase for phase in self.all_phases if not without.get(phase)]

    @property
    def adapts(self) -> list[str]:
        return self.mat_phases or [phase for phase in self.trains if phase != "meta"]

    def check(self) -> None:
        shared = ", ".join(field for field in ("together", "share_draws") if getattr(self, field))
        refuse(
            shared and self.incubate != "labels",
            f"{shared} has no meaning with incubate: {self.incubate}; only labels are learned so",
        )
        both = "share_draws has no meaning with together: modules that learn together share their draws anyway"
        refuse(self.together and self.share_draws, both)
        adapts = self.together and self.mat is not None and "incubate" in self.adapts
        refuse(adapts, "mat rests units of one module at a time; with together: true leave incubate out of mat_phases")
        refuse(self.mat is not None and self.low_resolution, "mat and low_resolution do not go together")
        unmeant = self.low_resolution and self.all_phases[0] == "assemble"
        refuse(unmeant, "low_resolution has no meaning: nothing is trained before the network is fine-tuned")
        unmatched = not self.match and {"shares", "budget"} & self.model_fields_set
        refuse(unmatched, "shares and budget have no meaning without match")
        trained, wrong = ", ".join(self.trains), ", ".join(sorted(set(self.shares or ()) - set(self.trains)))
        refuse(wrong, f"shares names {wrong}, but this strategy trains {trained}")
        own = next((phase for phase in (*(self.shares or ()), "finetune") if epochs_in(self.phases, phase) is not None), None)
        both = f"shares say how long phases last, and fine-tuning has the rest; do not set phases.{own}.epochs besides"
        refuse(self.shares and own, both)
        relative = {"lr_scale": self.lr_scale, "warmup_share": self.warmup_share}
        for field, parts in relative.items():
            idle = ", ".join(sorted(set(parts or ()) - set(self.trains)))
            refuse(idle, f"{field} names {idle}, but this strategy trains {', '.join(self.trains)}")
        refuse(
            self.mat is not None and not self.adapts,
            f"mat has no meaning: only {', '.join(self.trains)} is trained; see mat_phases",
        )
        unread = self.weights and not self.needs_meta
        refuse(unread, "weights are those of a meta model, which this strategy does without")
        spent = sum((self.shares or {}).values())
        without = ", ".join(sorted(set(self.trains) - set(self.shares or ())))
        all_but = f"shares add up to 1, which leaves nothing for {without}"
        refuse(self.ends_assembled and without, all_but)
        refuse(spent > 1 and not self.ends_assembled, f"shares add up to {spent:g}, more than the whole budget")


def build(made: Any) -> Any:
    own, facts = made.own, made.facts
    if reason := facts.unsupported.get(own.start):
        raise SettingsError(f"strategies.{made.name}.start {own.start!r} is not possible: {reason}")
    start = {field: getattr(own, field) for field in ("start", "inherit_stem", "inherit_head")}
    budget = made.budget() if made.is_matched else None
    if own.ends_assembled:  # what else assembly costs comes off the shares: nothing is left for it
        budget -= facts.flops_per_image.get("renewal", 0) * facts.num_images
    inputs, small = {}, made.small_images()
    flops = facts.flops_at(small["model"].img_size if small else None)
    if own.needs_meta:
        training = None if own.weights else _share(made, "meta", budget, flops["meta"])
        changes = own.phases.get("meta", TrainingChanges()).model_fields_set or made.settings.mat_of(made.name, "meta")
        relative = (own.shares if budget else None, own.lr_scale, own.warmup_share)
        is_own = small or own.weights or changes or any("meta" in (part or {}) for part in relative)
        key = f"{made.name}/meta" if is_own else "meta"
        inputs["meta"] = made.node("meta", training, key=key, weights=own.weights, **small)
    if own.incubate != "none":
        inputs, start = _modules(made, budget, flops, inputs, start | small), {}
    assembled = made.node("assemble", None, inputs, renew="renewal" in facts.flops_per_image, **start, **small)
    training = made.training("finetune")
    if own.ends_assembled:
        training = training.model_copy(update={"epochs": 0.0, "warmup_epochs": 0.0})
    elif budget:
        training = made.lasting("finetune", budget - made.spent(assembled), facts.flops_per_image["target"])
    return made.node("finetune", training, {"assemble": assembled})


def _modules(made: Any, budget: float | None, flops: dict[str, int], inputs: Any, how: Any) -> dict[str, Any]:
    """Return the phases in which modules learn: one for each, or one for all."""
    own = made.own
    if own.together:
        training = _share(made, "incubate", budget, flops["incubate_together"])
        return {"modules": made.node("incubate_together", training, inputs, key=f"{made.name}/incubate", **how)}
    kind = "imitate" if own.incubate == "features" else "incubate"
    training = _share(made, "incubate", budget, sum(flops[key] for key in flops if key.startswith(f"{kind}-")))
    shared = {"share_draws": True} if own.share_draws else {}
    return {
        f"module-{i}": made.node(kind, training, inputs, key=f"{made.name}/incubate-{i}", module_index=i, **how, **shared)
        for i in range(len(made.facts.target_depths))
    }


def _share(made: Any, phase: str, budget: float | None, flops_per_image: int) -> Any:
    """Return the settings of a phase that has a share of the budget, if it has one."""
    if budget and phase in (made.own.shares or {}):
        return made.lasting(phase, made.own.shares[phase] * budget, flops_per_image)
    return made.training(phase)


KIND = Kind(DeepIncubation, build)
