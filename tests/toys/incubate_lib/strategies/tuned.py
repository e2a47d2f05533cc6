"""A kind of strategy: end to end, then tuned once more."""

from typing import Any, Literal

from incubate_lib.config.strategies import StrategySettings
from incubate_lib.strategies import Kind


class Tuned(StrategySettings):
    kind: Literal["tuned"]

    @property
    def trains(self) -> list[str]:
        return ["end_to_end", "finetune"]


def build(made: Any) -> Any:
    first = made.node("end_to_end", made.training("end_to_end"))
    return made.node("finetune", made.training("finetune"), {"before": first})


LOOK = {"color": "#CC79A7", "marker": "p", "linestyle": "-."}
KIND = Kind(Tuned, build, label="end to end, then tuned", look=LOOK)
