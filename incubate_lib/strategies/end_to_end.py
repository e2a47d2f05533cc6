"""end_to_end: the whole network at once; with low_resolution on small images first, then on its own."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from incubate_lib.config import TrainingSettings, refuse
from incubate_lib.config.members import PHASES
from incubate_lib.config.strategies import Inner, PhaseChanges, PhaseName, SmallImages, StrategySettings, epochs_in
from incubate_lib.strategies import Kind


class LowResolution(SmallImages):
    """Small images first: cheaper updates at the beginning (FixRes, arXiv 1906.06423, and progressive resizing)."""

    share: Inner = 0.5  # of the training FLOPs; the rest is spent at the network's own size


class EndToEnd(StrategySettings):
    """Matched to another end_to_end: as many epochs; to any other: as many training FLOPs."""

    is_whole: ClassVar[bool] = True

    kind: Literal["end_to_end"]  # needed where the strategy's name is a new one
    match: str | None = None  # as long as costs the training FLOPs of that one
    # flops: as many; critical_path: what K machines can do together in that one's time
    match_on: Literal["flops", "critical_path"] = "flops"
    budget: Annotated[float, Field(gt=0)] = 1.0  # share of what is matched that it may cost
    low_resolution: LowResolution | None = None  # small images first; {}: of half the size, for half of the FLOPs
    phase: PhaseName = "end_to_end"  # what kind of phase trains it, if it is another one

    @property
    def trains(self) -> list[str]:
        return [self.phase, "finetune"] if self.low_resolution else [self.phase]

    @property
    def matched(self) -> list[str]:
        return self.trains

    def has_epochs(self, general: PhaseChanges) -> bool:
        own = epochs_in(self.phases, self.phase) is not None
        # all of them share `general`, which says how long plain end-to-end training is
        return own or (self.match_on == "flops" and epochs_in(general, self.phase) is not None)

    def check_match(self, said: str, other: StrategySettings, others: Mapping[str, StrategySettings]) -> None:
        refuse(
            self.match_on == "critical_path" and not other.is_cut,
            f"{said}; with match_on: critical_path name a deep_incubation strategy",
        )
        if other.is_whole:
            refuse(other.get("low_resolution"), f"{said}, which has images of two sizes; name another one")
            match = other.get("match")
            chained = match and others.get(match, other).is_whole
            refuse(chained, f"{said}, which is matched to {match!r} itself; name that one")

    def check(self) -> None:
        unmatched = not self.match and {"budget", "match_on"} & self.model_fields_set
        refuse(unmatched, "budget and match_on have no meaning without match")
        refuse(self.mat is not None and self.low_resolution, "mat and low_resolution do not go together")
        refuse(self.phase != "end_to_end" and self.low_resolution, "phase and low_resolution do not go together")


def build(made: Any) -> Any:
    own, training = made.own, made.training(made.own.phase)
    if made.is_matched:
        as_many = made.other.is_whole and not own.low_resolution
        per_image = made.facts.flops_per_image[PHASES[own.phase].cost(made.settings.model, {})]
        training = made.as_many_epochs(own.phase) if as_many else made.lasting(own.phase, made.budget(), per_image)
    return _small_images_first(made, training) if own.low_resolution else made.node(own.phase, training, key=made.name)


def _small_images_first(made: Any, training: TrainingSettings) -> Any:
    """Spend a share of what `training` costs on small images, the rest at the network's own size."""
    small, per_image = made.small_images(), made.facts.flops_per_image
    made.check_batch("end_to_end", training)
    budget = made.cost(training, per_image["target"])
    share = made.own.low_resolution.share
    training = made.lasting("end_to_end", share * budget, per_image[f"target-{small['model'].img_size}"])
    small = made.node("end_to_end", training, **small, small_images=True)
    training = made.lasting("finetune", budget - made.spent(small), per_image["target"])
    return made.node("finetune", training, {"small_images": small})


KIND = Kind(EndToEnd, build)
