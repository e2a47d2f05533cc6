"""finetune: a trained network from a file, trained on."""

from typing import ClassVar, Literal

from incubate_lib.config import refuse
from incubate_lib.config.strategies import StrategySettings
from incubate_lib.strategies import Kind


class Finetune(StrategySettings):
    can_be_matched: ClassVar[bool] = False

    kind: Literal["finetune"]  # needed: no strategy of this kind is known by name
    weights: str | None = None  # the network, relative to data/; {seed} in it is the run's seed

    @property
    def trains(self) -> list[str]:
        return ["finetune"]

    def check(self) -> None:
        needed = "weights: the folder or .safetensors file of the network to start from"
        refuse(not self.weights, f"kind 'finetune' needs {needed}")


KIND = Kind(Finetune, lambda made: made.node("finetune", made.training("finetune"), key=made.name, weights=made.own.weights))
