"""Train one phase: load its images, build what trains, train it, and write down the result."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from incubate_lib.config import SettingsError, TrainingSettings
from incubate_lib.config.members import PHASES, TASKS
from incubate_lib.data.schedule import derive_seed, micro_batches, renewal
from incubate_lib.data.scratch import stage
from incubate_lib.data.sets import load_data
from incubate_lib.data.stream import check_shared_memory
from incubate_lib.phases.facts import outputs_for
from incubate_lib.phases.job import Job
from incubate_lib.phases.networks import model_shape
from incubate_lib.training.lease import Lease
from incubate_lib.training.loop import by_class, evaluate, fit, renew_statistics
from incubate_lib.training.runs import PhaseFolder, whose
from incubate_lib.training.team import Team, device_memory, device_name, explain_out_of_memory, provenance, repeat_exactly
from incubate_lib.training.trainer import Trainer

NONE_DONE = ["steps", "images_seen", "distinct_images_per_epoch", "broken_images", "train_flops", "train_flops_executed"]
NO_TIME = ["epochs", "train_seconds", "eval_seconds", "data_share"]
UNTRAINED = dict.fromkeys(NONE_DONE, 0) | dict.fromkeys(NO_TIME, 0.0) | {"devices": 1, "train_loss": None}


def train_phase(job: Job, team: Team) -> dict[str, Any] | None:
    """Be one device of a phase, or its only one: load, train, and if it is the first, write the result.

    Returns the summary, None for other devices. Raises SettingsError when the images are not those that were planned with.
    """
    s = job.settings
    path, about = job.folder.path, whose(job.digest, job.used(), job.facts.num_images)
    home = PhaseFolder(path, Lease(path / "lease", job.lease), about)
    repeat_exactly(team.device, job.machine.deterministic, strictly=bool(s.target_depths or s.meta_depths))
    machine = stage(s.data, job.machine)
    train, eval_set = load_data(s.data, team.device, model_shape(s.model), machine)
    task, kind = TASKS[s.task], PHASES[s.phase]
    found, expected = (len(train), outputs_for(s, train)), (job.facts.num_images, job.facts.outputs)
    if found != expected:
        raise SettingsError(
            f"there are {found[0]} training {task.samples} for {found[1]} outputs, but {expected[0]} for {expected[1]} when this "
            f"run was planned; look at data.folder (machine.data_folder): other {task.samples} need a folder of another name"
        )
    if s.data.is_streamed:
        recipe = renewal(len(train)) if s.options.get("renew") else s.training
        check_shared_memory(eval_set, train, recipe, team.devices)
    model = kind.build(s, job.inputs, job.facts.outputs).to(team.device)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    kept = model
    if s.training is None:
        before = evaluate(model, eval_set, s.precision, team, task)
        numbers = UNTRAINED | before | {"start_score": before["score"]}
        if s.options.get("renew"):
            took = renew_statistics(model, train, derive_seed(s.seed, s.seeded_as), s.precision, task)
            flops, images = job.flops_per_image * took["images_seen"], took["images_seen"]
            numbers |= evaluate(model, eval_set, s.precision, team, task) | took
            numbers |= {"train_flops": flops, "train_flops_executed": flops, "distinct_images_per_epoch": images}
            if team.is_first:
                score = (task.score.written(numbers[name]) for name in ("start_score", "score"))
                words = f"batch norm's statistics renewed by {images:,} training images, forward only"
                print(f"{job.title}: {words}; {task.score.label} {' → '.join(score)}", flush=True)
        if "weights" in s.inputs and team.is_first:  # read from a file: a single point, where others have a curve
            home.start_metrics(-1)
            row = {"step": 0, "epoch": 0.0, "images": 0, "train_flops": 0, "train_seconds": 0.0, "train_loss": None, "lr": None}
            home.add_metrics(row | {name: numbers[name] for name in ("loss", "score")})
    else:
        trainer = Trainer(
            model,
            train,
            s.training,
            seed=derive_seed(s.seed, s.seeded_as, 0 if s.options.get("share_draws") else s.module_index or 0),
            precision=s.precision,
            machine=machine,
            team=team,
            mat=s.mat,
            flops_per_image=job.flops_per_image,
            task=task,
            losses=kind.losses,
            groups=kind.groups(model),
        )
        stop = _stop_asked(job.stop_files)
        with explain_out_of_memory(_too_many(task.samples, s.training, team)):
            kept, numbers = fit(trainer, eval_set, folder=home, title=job.title, should_stop=stop, evaluated=kind.evaluated)
        for module, group in zip(numbers.get("modules", ()), trainer.groups, strict=False):
            module["parameters"] = sum(parameter.numel() for parameter in group)
    if task.has_classes and not (kind.has_modules or "modules" in numbers):  # of a whole network, once: an evaluation more
        numbers["classes"] = by_class(kept, eval_set, job.facts.outputs, s.precision, team, task)
    if not team.is_first:
        return None
    numbers |= {
        "metric": task.score.name,
        "flops_per_image": job.flops_per_image,
        "parameters": parameters,
        "train_images": len(train),
        "eval_images": len(eval_set),
    }
    numbers |= kind.about(model, job.facts.flops_per_image, kind.cost(s.model, s.options))
    where = provenance(team.device) | {"precision": s.precision}
    if s.training:  # its seconds are of all devices on which it went on
        where["device"] = " then ".join(home.status()["devices"])
    identity = {"phase": s.seeded_as, "module_index": s.module_index, "seed": s.seed, "strategy": job.strategy}
    return home.finish(identity | about | numbers | {"provenance": where}, kind.results(kept))


def _too_many(samples: str, recipe: TrainingSettings, team: Team) -> str:
    """Say that so many samples at once need more memory than a device has, and how many to try."""
    many = micro_batches(recipe.batch_size, recipe.micro_batch, team.devices)[1]
    less = next((n for n in range(many // 2, 0, -1) if many % n == 0), None)
    fewer = f"try training.micro_batch={less}" if less else "no fewer can be had"
    return (
        f"{many} {samples} at once need more than the {device_memory(team.device) / 2**30:.1f} GiB of {device_name(team.device)}"
        f"; {fewer} (`incubate plan` counts what each phase needs)"
    )


def _stop_asked(stop_files: dict[str, int | None]) -> Callable[[], bool]:
    """Return a function that says whether one of the files was touched since (by its own time stamps: clocks differ)."""
    return lambda: any(modified(path) not in (None, before) for path, before in stop_files.items())


def modified(path: Path | str) -> int | None:
    """Return when a file was last touched, in ns; None if it is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return None
