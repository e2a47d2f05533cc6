"""What training a phase takes, as one value: handed to the process that trains, and written as JSON for several."""

from pathlib import Path
from typing import Any

from incubate_lib.config import Frozen, MachineSettings, PhaseSettings


class Job(Frozen):
    """One phase to be trained in `folder`.

    `inputs` are the folders of the phases it starts from, or a file of weights; `about` is added to the summary
    (strategy, names of the inputs' folders, SHA-256 of their weights); `flops_per_image` is the counted training cost,
    `expected` the number of training images and classes that was planned with.
    """

    settings: PhaseSettings
    folder: Path
    title: str
    about: dict[str, Any]
    inputs: dict[str, Path]
    flops_per_image: int
    expected: tuple[int, int]
    machine: MachineSettings
    stop_files: dict[str, int | None] = {}  # a file that stops the phase when touched: its time stamp before
    lease: int = 0  # the number of the folder's lease that this phase trains under
