"""imitate: one target module alone, from what its meta module computes instead of labels (the paper's control)."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

from incubate_lib.phases.kinds import incubate


class Options(incubate.Options):
    imitate: Literal[True] = True  # by which identities differ from those of incubation


class Imitate(incubate.Incubate):
    name = "imitate"
    group = "incubate"
    label = "imitating module"
    counted_as = "imitation"
    is_set_by_name = False
    options = Options
    imitates = True
    work = ("forward only", "forward, all gradients; its meta module forward", "not used")

    def losses(self, run: Callable[[Any], Any], x: Any, loss: Callable[[Any], Any]) -> Iterator[Any]:
        yield run(x).mean()  # each image's distance from the meta module's features


PHASE = Imitate()
