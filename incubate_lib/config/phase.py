"""One phase's resolved settings, and what names it: the hash of all that its result depends on."""

import hashlib
import json
from typing import Any, Literal

from incubate_lib.config.sections import DataSettings, Frozen, MATSettings, ModelSettings, Seed, TrainingSettings
from incubate_lib.config.strategies import Start

PhaseName = Literal["meta", "incubate", "assemble", "finetune", "end_to_end"]
TASK = "classification"
# of everything a phase's result depends on besides its settings; raise it when old results must not be reused
FORMAT = 3


class PhaseSettings(Frozen):
    """Everything that one phase's result depends on, resolved; `config.json` in its folder. Its hash is its identity."""

    phase: PhaseName
    seed: Seed
    task: str = TASK
    data: DataSettings
    model: ModelSettings
    target_depths: list[int]
    meta_depths: list[int]
    module_index: int | None = None  # 0-based; incubate only
    start: Start | None = None  # incubate; assemble, where nothing was incubated
    inherit_stem: bool = False
    inherit_head: bool = False
    # end_to_end only: the first part of a training that goes on at the network's own size
    small_images: bool = False
    imitate: bool = False  # incubate only: the meta module's features instead of labels
    precision: Literal["float32", "bfloat16"] = "float32"
    training: TrainingSettings | None = None  # none for assemble, and for a meta model that is read from a file
    mat: MATSettings | None = None  # with the kind of units resolved
    inputs: dict[str, str] = {}  # hashes of the phases it starts from; "weights": of a file
    format: int = FORMAT

    def digest(self) -> str:
        """Return the hash of all that decides the result and its record."""
        values = self.model_dump(mode="json")
        for section, later in ((values, ("mat", "imitate", "small_images")), (values["data"], ("pad", "resize"))):
            for field in later:  # what was trained before there were these stays good
                if not section[field]:
                    del section[field]
        if self.task == TASK:
            del values["task"]
        return digest(values)


def digest(value: Any) -> str:
    """Return 12 hex digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
