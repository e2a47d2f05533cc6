"""A resolved phase: all that training it takes, as one value and as a file.

Settings are resolved to phases once. From then on a phase is the path of its file, `phases/<digest>/phase.json` below the data
folder: notebooks, kernels, processes, ranks and jobs of clusters are given that, and nobody plans again.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from incubate_lib.config import Frozen, MachineSettings, PhaseSettings, SettingsError, data_folder, error_message
from incubate_lib.config.members import PHASES, TASKS
from incubate_lib.phases.facts import Facts
from incubate_lib.training.files import read_json, write_atomic
from incubate_lib.training.runs import PhaseFolder

FILE = "phase.json"
Model = TypeVar("Model", bound=Frozen)


class Job(Frozen):
    """One phase. Its settings say what it is, and from which phases it starts; the rest says how it comes to be trained."""

    settings: PhaseSettings
    facts: Facts  # of its images and networks
    machine: MachineSettings
    strategy: str  # the first one that needs it
    run: str  # that has it trained, for people
    weights: str | None = None  # a file that it starts from, as settings name it
    # while it is trained:
    stop_files: dict[str, int | None] = {}  # a file that stops the phase when touched: its time stamp before
    lease: int = 0  # the number of the folder's lease that this phase trains under

    @cached_property
    def digest(self) -> str:
        return self.settings.digest()

    @property
    def folder(self) -> PhaseFolder:
        return PhaseFolder.of(self.digest)

    @property
    def title(self) -> str:
        """Name for people, modules counted from one."""
        what = PHASES[self.settings.phase].title(self.settings)
        return f"seed {self.settings.seed} {what}" + ("" if what in ("meta", self.strategy) else f", {self.strategy}")

    @property
    def path(self) -> str:
        """Where it is written, relative to the data folder: nodes of a cluster may have that elsewhere."""
        return str((self.folder.path / FILE).relative_to(data_folder()))

    @property
    def inputs(self) -> dict[str, Path]:
        """The folders of the phases that it starts from; "weights": a file."""
        folders = {name: PhaseFolder.of(digest).path for name, digest in self.settings.inputs.items()}
        return folders | ({"weights": Path(self.weights)} if self.weights else {})

    def used(self) -> dict[str, str]:
        """Return the SHA-256 of the weights that it starts from, as far as they are there."""
        given = {"weights": self.settings.inputs["weights"]} if self.weights else {}
        done = {name: PhaseFolder(path).summary() for name, path in self.inputs.items() if name not in given}
        return {name: summary["weights_sha256"] for name, summary in done.items() if summary} | given

    @property
    def work(self) -> tuple[str, str | None]:
        """What is executed: its notebook, and the name of the copy; of a kind without one the phase itself, and None."""
        notebook = PHASES[self.settings.phase].notebook
        return (notebook, "notebook.ipynb") if notebook else (self.settings.phase, None)

    def summary(self) -> dict[str, Any] | None:
        """Return what is recorded of this phase, trained from the inputs that are there, or None."""
        return self.folder.summary(self.digest, self.used())

    def finished(self) -> dict[str, Any] | None:
        """Return the summary if the weights are there, too: nothing is left to train.

        SettingsError if it was trained on other images, which happens where two data sets have one name.
        """
        done = self.folder.finished(self.digest, self.used())
        images = done and done.get("train_images", self.facts.num_images)
        if done and images != self.facts.num_images:
            what = f"was trained on {images} {TASKS[self.settings.task].samples}, but there are {self.facts.num_images} now"
            raise SettingsError(f"{self.title} ({self.folder.path}) {what}; give data.folder another name, or delete that folder")
        return done

    def is_complete(self, with_notebook: bool = True) -> bool:
        """Whether it is finished and its executed notebook, if its kind has one and that is wanted, is there."""
        _, copy = self.work
        return self.finished() is not None and (not with_notebook or copy is None or (self.folder.path / copy).exists())

    @property
    def flops_per_image(self) -> int:
        """The counted cost of training."""
        return self.facts.flops_of(self.settings)

    def write(self) -> None:
        """Write it into its folder; a finished phase keeps what is written there."""
        file = self.folder.path / FILE
        if read_json(file) is None or not self.finished():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, (self.model_dump_json(exclude_unset=True, indent=1) + "\n").encode())


def read_job(path: str | Path) -> Job:
    """Return the phase in a file; relative paths begin in the data folder. SettingsError if it cannot be read."""
    file = data_folder() / path
    values = read_json(file)
    if values is None:
        raise SettingsError(f"{file} is {'damaged' if file.exists() else 'not there'}; `incubate run` writes it again")
    job = checked(Job, values, str(file))
    if job.digest != file.parent.name:  # edited, or written when a package had other defaults: it would train elsewhere
        raise SettingsError(f"{file} has other settings than its folder ({job.digest}); `incubate run` writes it again")
    return job


def checked(model: type[Model], values: Any, where: str) -> Model:
    """Return what has these values, which were read from a file; SettingsError if they are none of today's."""
    try:
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        what = f"{where} is of another version of this package, or damaged"
        raise SettingsError(f"{what}: {error_message(error, model)}") from None
