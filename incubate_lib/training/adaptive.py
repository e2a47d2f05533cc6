"""Modular Adaptive Training within the loop: when kernels are evaluated, which units train from then on, what that costs."""

import copy
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from incubate_lib.config import MATSettings, SettingsError
from incubate_lib.data.schedule import derive_seed
from incubate_lib.data.sets import ImageSet
from incubate_lib.data.stream import StreamedSet
from incubate_lib.method.mat import PartialUpdates, choose, gradient_norms, same_number
from incubate_lib.method.mntk import check_kernels, modular_kernels, outputs_of, probe_bytes
from incubate_lib.method.spectra import EXACT, effective_rank, normalised, principal_eigenvalues, spectrum
from incubate_lib.method.units import Unit, find_units
from incubate_lib.tasks import Task
from incubate_lib.tasks.classification import TASK as CLASSIFICATION
from incubate_lib.training.costs import all_products, train_flops_per_image
from incubate_lib.training.team import ALONE, Team

MEMORY_SHARE = 0.8  # of the free memory that a probe may take


class Adaptive:
    """Evaluates the kernels of a model's units now and then, lets them rest or train, and counts what an update costs meanwhile.

    The probe is the first images of a random order of the training images, as they are evaluated. SettingsError when the
    kernels of that many do not fit into the memory that is free, and for units whose kernels or partial updates this
    network does not allow.
    """

    def __init__(
        self,
        model: nn.Module,
        train: ImageSet | StreamedSet,
        settings: MATSettings,
        *,
        steps_per_epoch: int,
        flops_per_image: int,
        seed: int,
        team: Team = ALONE,
        task: Task = CLASSIFICATION,
    ) -> None:
        self.model, self.settings, self.seed, self.team, self.task = model, settings, seed, team, task
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(derive_seed(seed, "probe")))
        self.batch = train.some(order[: settings.probe])
        self.images = task.inputs(self.batch)
        self.every = max(1, round(settings.every_epochs * steps_per_epoch))
        self.warmup = round(settings.warmup_epochs * steps_per_epoch)
        try:
            self.units = find_units(model, settings.units)
            check_kernels(model, self.units, self.images)
            self.updates = PartialUpdates(model, self.units, self.images[:1], cut=settings.cut, stop_error=settings.stop_error)
        except ValueError as error:
            raise SettingsError(f"mat.units {settings.units!r}: {error}") from None
        check_probe(model, self.units, self.images, settings, task.samples)
        self.active = torch.ones(len(self.units), dtype=torch.bool)
        self.history: list[list[float]] = []  # principal eigenvalues [E][U]
        self.flops_of: dict[tuple[bool, ...], int] = {tuple(self.active.tolist()): flops_per_image}
        self.probe_flops, self.rank_flops = self._count_on_meta() if team.is_first else (0, 0)
        self.executed = (0, 0)  # by an evaluation and by a ranking, on this device; see `count_executed`

    def is_due(self, step: int) -> bool:
        """Whether the kernels are evaluated before update `step`."""
        return step % self.every == 0 or step == self.warmup

    def probe(self, step: int) -> dict[str, Any]:
        """Evaluate the kernels, decide which units train from here on, and return a record. This is training time."""
        how, decides = self.settings, step >= self.warmup
        kernels = modular_kernels(self.model, self.units, self.images, outputs=how.outputs, checked=True)
        kernels = normalised(kernels) if how.normalised else kernels
        ranks = None
        if kernels.shape[-1] <= EXACT:
            eigenvalues = spectrum(kernels)
            ranks, eigenvalues = effective_rank(eigenvalues).tolist(), eigenvalues[:, 0]
        else:
            eigenvalues = principal_eigenvalues(kernels)
        eigenvalues = self.team.share(eigenvalues)
        if not eigenvalues.isfinite().all():
            raise FloatingPointError(f"an eigenvalue of the modular NTK is not finite before update {step}; is the lr too high?")
        self.history.append(eigenvalues.tolist())
        record: dict[str, Any] = {"step": step, "eigenvalues": self.history[-1], "effective_ranks": ranks, "cut": None}
        if decides:
            choice = choose(torch.tensor(self.history).double(), alpha=how.alpha, beta=how.beta, threshold=how.threshold)
            self.active = self.ranked(choice.active, eigenvalues, step)
            record |= {"cut": choice.cut, "forced": choice.forced}
        flops, executed = (
            self.team.devices * (probe + decides * rank)  # each device does it
            for probe, rank in ((self.probe_flops, self.rank_flops), self.executed)
        )
        return record | {"active": self.active.int().tolist(), "flops": flops, "flops_executed": executed}

    def count_executed(self) -> None:
        """Count what a look and a ranking execute on this device, with fused attention where it has it.

        This takes passes of its own: under a counter some products round otherwise, and a phase that goes on from a
        checkpoint must see the numbers that an uninterrupted one saw.
        """
        self.executed = self._count(self.model, self.images)

    def ranked(self, active: Tensor, eigenvalues: Tensor, step: int) -> Tensor:
        """Return the units that train: MAT's, or as many by another ranking, for a control."""
        if self.settings.rank == "mntk":
            return active
        if self.settings.rank == "inverted":
            scores = -eigenvalues
        elif self.settings.rank == "random":
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "mat", step))
            scores = torch.rand(len(active), generator=generator)
        else:
            scores = self.team.share(gradient_norms(self.model, self.units, self.images, self._loss))
        return same_number(active, scores)

    def wanted(self, step: int) -> Tensor:
        """Return the units [U] that train in update `step`: with Multirate now and then all."""
        slow = self.settings.slow_every
        return torch.ones_like(self.active) if slow and step % slow == 0 else self.active

    def flops_per_image(self, active: Tensor) -> int:
        """Return the FLOPs of a training image while exactly these units train, counted as budgets are: on the meta device."""
        key = tuple(active.tolist())
        if key not in self.flops_of:
            before = self.updates.active
            self.updates.apply(active)
            self.flops_of[key] = train_flops_per_image(self.model, tuple(self.images.shape[1:]))
            self.updates.apply(before)
        return self.flops_of[key]

    def summary(self, probes: Sequence[dict[str, Any]], samples: int) -> dict[str, Any]:
        """Return the units, what the records of all evaluations add up to, and the FLOPs of training on so many samples while
        all units train, and while all rest: the updates of no choice of units cost less."""
        bounds = {"full_flops": torch.ones_like(self.active), "least_flops": torch.zeros_like(self.active)}
        return {
            "units": [unit.name for unit in self.units],
            "evaluations": len(probes),
            **{name: sum(row[name] for row in probes) for name in ("seconds", "flops")},
            **{name: samples * self.flops_per_image(active) for name, active in bounds.items()},
        }

    def _count_on_meta(self) -> tuple[int, int]:
        """Return the FLOPs of a look and of a ranking as budgets are counted: attention not fused."""
        model = copy.deepcopy(self.model).to("meta")
        return self._count(model, torch.empty_like(self.images, device="meta"))

    def _count(self, model: nn.Module, images: Tensor) -> tuple[int, int]:
        """Return the FLOPs of evaluating the kernels, and of ranking units by their gradients.

        The eigenvalues' are not counted; where they are found by power iteration, its number of steps is not known before.
        """
        with all_products() as probing:
            modular_kernels(model, self.units, images, outputs=self.settings.outputs, checked=True)
        if self.settings.rank != "gradient_norm":
            return probing.get_total_flops(), 0
        with all_products() as ranking:
            gradient_norms(model, self.units, images, self._loss)
        return probing.get_total_flops(), ranking.get_total_flops()

    def _loss(self, output: Tensor) -> Tensor:
        """Return the mean loss of the probe; of one that is only counted, on the meta device, too."""
        batch = tree_map(lambda value: value.to(output.device) if isinstance(value, Tensor) else value, self.batch)
        return self.task.loss(output, batch)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "active": self.active.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.active = state["history"], torch.tensor(state["active"], dtype=torch.bool)


def check_probe(model: nn.Module, units: Sequence[Unit], images: Tensor, settings: MATSettings, samples: str) -> None:
    """Raise SettingsError when a probe needs more memory than is free, and say how many `samples` would do."""
    free = free_memory(images.device)
    rows = outputs_of(model, images) if settings.outputs == "all" else 1  # of the kernels, an image
    per_image = rows * probe_bytes(model, units, tuple(images.shape[1:]))
    most = len(images)
    while most and most * per_image + len(units) * (most * rows) ** 2 * 4 > MEMORY_SHARE * free:
        most -= 1
    if most < len(images):
        how = f"mat.units {settings.units} and mat.outputs {settings.outputs}"
        message = f"mat.probe is {len(images)}; with {how} the kernels of so many {samples} need more memory than is free "
        message += f"({free / 2**30:.1f} GiB)"
        rest = f"; it may be {most} at most" if most > 1 else f", and so do those of two {samples}"
        raise SettingsError(message + rest)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available
