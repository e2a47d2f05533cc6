"""The one training loop of every phase, and evaluation.

A phase decides only the model and which of its parameters require gradients.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from incubate_lib.data.order import Order
from incubate_lib.data.schedule import derive_seed, renewal, steps_per_epoch
from incubate_lib.data.stream import StreamedSet
from incubate_lib.tasks import Task
from incubate_lib.tasks.classification import TASK as CLASSIFICATION
from incubate_lib.training.progress import Progress
from incubate_lib.training.runs import MNTK, STATUS_SECONDS, PhaseFolder, Stopped
from incubate_lib.training.team import ALONE, Team, device_name, explain_large_evaluation
from incubate_lib.training.trainer import Counts, DataSet, Trainer, autocast, seed_everything

DATA_SHARE_WARNED = 0.1  # of training time spent waiting for samples
SAVING_SHARE = 0.05  # checkpoints are spaced so that saving takes at most this share of the time


Evaluated = Callable[[nn.Module, Tensor], list[Any]]  # of a model and inputs: its outputs that are evaluated


def the_output(model: nn.Module, x: Tensor) -> list[Any]:
    return [model(x)]


class Chrono:
    """Counts the seconds of update steps only; the device is synchronised before the clock is read."""

    def __init__(self, device: torch.device, counts: Counts) -> None:
        self.device, self.counts, self.since = device, counts, None

    def start(self) -> None:
        self.since = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds until now, and go on."""
        self.pause()
        self.start()
        return self.counts.train_seconds

    def pause(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.since is not None:
            self.counts.train_seconds += time.perf_counter() - self.since
        self.since = None


def evaluate(
    model: nn.Module, data: DataSet, precision: str = "float32", team: Team = ALONE, task: Task = CLASSIFICATION
) -> dict[str, float]:
    """Return mean loss, score and other metrics: sums over all samples, divided once. The model's mode is left as it was.

    Each sample is counted exactly once, however many devices share the work; all take the first device's buffers.
    """
    return evaluate_each(model, data, precision, team, task)[0]


@torch.no_grad()
def evaluate_each(
    model: nn.Module,
    data: DataSet,
    precision: str = "float32",
    team: Team = ALONE,
    task: Task = CLASSIFICATION,
    evaluated: Evaluated = the_output,
) -> list[dict[str, float]]:
    """Return the same for each of a model's outputs, of which `evaluated` returns those of a batch: data are read once."""
    device = next(model.parameters()).device
    sums: list[Tensor] = []  # of each output
    noted: list[str] = []
    for outputs, batch in _outputs(model, data, precision, team, task, evaluated):
        sums = sums or [torch.zeros(task.num_sums, dtype=torch.float64, device=device) for _ in outputs]
        for summed, output in zip(sums, outputs, strict=True):
            summed += task.sums(output, batch)
        noted += task.noted(outputs[-1], batch)
    modules = team.gather([str(i) for i in range(len(sums))])  # there may be devices to which no image falls
    sums += [torch.zeros(task.num_sums, dtype=torch.float64, device=device) for _ in range(len(modules) - len(sums))]
    found = team.all_reduce(torch.stack(sums)).tolist()
    assert all(number == len(data) for number, *_ in found), f"{found[0][0]} samples evaluated, not {len(data)}"
    lines = team.gather(noted)
    return [task.evaluated(of_one, lines) for of_one in found]


@torch.no_grad()
def by_class(
    model: nn.Module, data: DataSet, classes: int, precision: str = "float32", team: Team = ALONE, task: Task = CLASSIFICATION
) -> dict[str, list[int]]:
    """Return how many samples each class has, and how many of them the model gets right, as lists of length `classes`."""
    counts = torch.zeros(2, classes, dtype=torch.int64, device=next(model.parameters()).device)
    for (output,), batch in _outputs(model, data, precision, team, task):
        of, right = task.classes(output, batch)
        counts += torch.stack([torch.bincount(of, minlength=classes), torch.bincount(of[right], minlength=classes)])
    samples, right = team.all_reduce(counts).tolist()
    return {"samples": samples, "right": right}


def _outputs(
    model: nn.Module,
    data: DataSet,
    precision: str,
    team: Team,
    task: Task,
    evaluated: Evaluated = the_output,
) -> Iterator[tuple[list[Any], Any]]:
    """Yield the model's outputs for this device's share of the evaluated batches, and each batch."""
    team.broadcast_buffers(model)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    for batch in data.eval_batches(team.rank, team.devices):
        with explain_large_evaluation(device), autocast(device, precision):
            outputs = evaluated(model, task.inputs(batch))
        yield outputs, batch
    model.train(was_training)


@torch.no_grad()
def renew_statistics(
    model: nn.Module, train: DataSet, seed: int, precision: str = "float32", task: Task = CLASSIFICATION
) -> dict[str, float]:
    """Give batch norm the statistics of the network as it is; return what that took: images and seconds.

    Those of a module were gathered beside the meta model's other modules, whose outputs are not those of the modules that it
    stands beside now. The training images pass once, in the batches of a training without augmentation, forward only; nothing
    but batch norm is in train mode.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    was_training, momenta = model.training, [layer.momentum for layer in norms]
    model.eval()
    for layer in norms:
        layer.reset_running_stats()
        layer.train()
        layer.momentum = None  # the mean over all batches
    device, recipe = next(model.parameters()).device, renewal(len(train))
    clock = Chrono(device, Counts())
    clock.start()
    steps = steps_per_epoch(len(train), recipe.batch_size)
    extra = task.start(train, recipe)
    for step, batch in enumerate(train.batches(Order(len(train), recipe, seed, steps=steps))):
        seed_everything(derive_seed(seed, "draw", step), device)
        with autocast(device, precision):
            model(task.inputs(task.ready(batch, train, recipe, extra)))
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
    model.train(was_training)
    return {"images_seen": steps * recipe.batch_size, "train_seconds": clock.lap()}


@torch.no_grad()
def mistakes(model: nn.Module, data: DataSet, task: Task = CLASSIFICATION, num: int = 10) -> tuple[Tensor, list[str]]:
    """Return the first images that the model gets wrong, uint8 [num, C, H, W], and what to write under each."""
    model.eval()
    device = next(model.parameters()).device
    images, captions = [torch.zeros(0, *data.shape, dtype=torch.uint8)], []
    for batch in data.eval_batches(keep=False):
        batch = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
        x = task.inputs(batch)
        words = task.mistakes(model(x), batch)
        wrong = [place for place, caption in enumerate(words) if caption is not None]
        images.append((255 * (x[wrong].to(data.std.device) * data.std + data.mean)).round().clamp(0, 255).to(torch.uint8).cpu())
        captions += [words[place] for place in wrong]
        if len(captions) >= num:
            break
    return torch.cat(images)[:num], captions[:num]


def fit(
    trainer: Trainer,
    eval_set: DataSet,
    *,
    folder: PhaseFolder,
    title: str,
    should_stop: Callable[[], bool] = lambda: False,
    evaluated: Evaluated = the_output,
) -> tuple[nn.Module, dict[str, Any]]:
    """Do all updates of a trainer; return the model to keep (the moving average of its weights if the recipe asks for
    one) and steps, images seen, seconds, the last evaluation; of several modules that learn, the mean, and each by itself.

    Goes on from the folder's checkpoint if there is a sound one. Raises Stopped when `should_stop()` says so, after a
    checkpoint, and FloatingPointError at the step whose loss is not finite, without saving it.
    """
    model, train, settings, team = trainer.model, trainer.train, trainer.settings, trainer.team
    steps, per_epoch = trainer.steps, steps_per_epoch(len(train), settings.batch_size)
    state, complaints = folder.load_checkpoint(trainer.check_state)
    for complaint in complaints:
        print(f"{title}: {complaint}; going back to what is sound", flush=True)
    resumed = state is not None
    if resumed:
        trainer.load_state_dict(state)
        state = None  # its tensors are copied; they would stay in memory
    counts = trainer.counts
    step = counts.step
    if team.all_reduce(torch.tensor([step], device=trainer.device)).item() != step * team.devices:  # also: all have read it
        raise RuntimeError(f"{title}: the devices read different checkpoints (this one is at step {step}); run again")
    if team.is_first:
        before = folder.status().get("devices", []) if resumed else []
        devices = list(dict.fromkeys([*before, device_name(trainer.device)]))
        folder.set_status(devices=devices, **({"resumed_at": step} if resumed else {}))
        folder.start_metrics(step)
        folder.start_metrics(step - 1, MNTK)  # of the evaluation before update `step` nothing is in the checkpoint
    rows = [row for row in folder.metrics() if row["step"] <= step]
    clock = Chrono(trainer.device, counts)
    progress = Progress(folder, title, steps, step, trainer.task.score.name) if team.is_first else None
    waited = counts.wait_seconds
    pending: list[Tensor] = []  # losses still on the device; reading one waits for it, so they are read together
    saved_at = read_at = time.monotonic()
    saving_seconds = 0.0

    def not_finite(what: str, value: float, at: int) -> FloatingPointError:
        return FloatingPointError(
            f"{title}: {what} is {value} at step {at} of {steps} (lr {settings.peak_lr:g}, warmup_epochs "
            f"{settings.warmup_epochs}, clip_grad {settings.clip_grad}, batch_size {settings.batch_size}); "
            "a lower lr, a longer warm-up or clip_grad: 1.0 usually cures it"
        )

    def read_losses() -> float | None:
        """Read the pending losses and return the last; the first that is not finite ends the phase with its step named."""
        values = (team.all_reduce(torch.stack(pending)) / team.devices).double().cpu().numpy() if pending else []
        for i, value in enumerate(values):
            if not np.isfinite(value).all():
                raise not_finite("loss", float(value.sum()), step - len(pending) + i)
            counts.loss_sum = (np.asarray(counts.loss_sum) + value).tolist()
            counts.loss_steps += 1
        pending.clear()
        return float(np.mean(values[-1])) if len(values) else None

    def evaluate_now() -> None:
        began = time.perf_counter()
        results = evaluate_each(trainer.eval_model, eval_set, trainer.precision, team, trainer.task, evaluated)
        counts.eval_seconds += time.perf_counter() - began
        made: list[dict[str, Any]] = []
        each = len(results) > 1  # has a loss of its own
        losses = np.broadcast_to(counts.loss_sum if each else np.sum(counts.loss_sum), len(results)).tolist()
        for i, (result, summed) in enumerate(zip(results, losses, strict=True)):
            if not math.isfinite(result["loss"]):
                raise not_finite("the evaluated loss", result["loss"], step)
            row = {"step": step, "epoch": step / per_epoch, "images": step * settings.batch_size, **result}
            row["train_flops"] = counts.flops
            row["train_loss"] = summed / counts.loss_steps if counts.loss_steps else None
            row["train_seconds"] = counts.train_seconds
            row["lr"] = max(group["lr"] for group in trainer.optimizer.param_groups) if step else None
            if each:
                row["module_index"] = i
            made.append(row)
        if team.is_first:
            folder.add_metrics(*made)
        rows.extend(made)
        counts.loss_sum, counts.loss_steps = 0.0, 0

    def mean(name: str, at: int) -> float | None:
        """Return a number of the evaluation at an update: of several modules the mean."""
        values = [row[name] for row in rows if row["step"] == at]
        return None if None in values else sum(values) / len(values)

    model.train()
    if not rows:
        evaluate_now()
    trainer.begin(step)
    first = step
    while step < steps:
        if clock.since is None:
            clock.start()
        if trainer.mat and trainer.mat.is_due(step):
            before = clock.lap()
            record = trainer.adapt(step)
            record |= {"epoch": step / per_epoch, "seconds": clock.lap() - before}
            clock.pause()  # what follows is for the record only
            if team.is_first:
                per_image = trainer.mat.flops_per_image(trainer.mat.active)
                folder.add_metrics(record | {"flops_per_image": per_image, "train_flops": counts.flops}, file=MNTK)
                if record.get("forced"):
                    print(f"{title}: at step {step} every unit would rest; the strongest goes on", flush=True)
            trainer.executed_now()
            clock.start()
        pending.append(trainer.step(step))
        step = counts.step = step + 1
        if step == first + 1:
            counts.startup_wait += counts.wait_seconds - waited
            before = counts.train_seconds
            counts.startup_seconds += clock.lap() - before
        # record
        due = step == steps or step % max(1, round(settings.eval_every * per_epoch)) == 0
        if not due and step % team.sync_every:
            continue
        now = time.monotonic()
        save_due = now - saved_at >= max(trainer.machine.checkpoint_seconds, saving_seconds / SAVING_SHARE)
        if team.decide(due or save_due or now - read_at >= STATUS_SECONDS):
            last_loss = read_losses()
            clock.pause()
            if due:
                evaluate_now()
            if progress:
                progress.update(step, epoch=step / per_epoch, loss=last_loss, score=mean("score", rows[-1]["step"]))
            stop = team.decide(step < steps and should_stop())
            if stop or team.decide(save_due):
                began = time.monotonic()
                if team.is_first:
                    folder.save_checkpoint(trainer.state_dict())
                saved_at = time.monotonic()
                saving_seconds = saved_at - began
            if stop:
                team.barrier()  # nobody leaves before it is on disk: a rank that ends takes the others with it
                if progress:
                    progress.close()
                raise Stopped(f"{title}: stopped at step {step} of {steps}; the next run goes on from here")
            read_at = time.monotonic()
    if progress:
        progress.close()
    steady = counts.train_seconds - counts.startup_seconds
    data_share = (counts.wait_seconds - counts.startup_wait) / steady if steady > 0 else 0.0
    broken = team.gather(sorted(getattr(train, "broken", ())))
    if data_share > DATA_SHARE_WARNED and team.is_first and isinstance(train, StreamedSet):  # of others nothing would help
        print(f"{title}: {data_share:.0%} of the training time was spent waiting for {trainer.task.samples}; more "
              "machine.workers, a faster disk or data.in_memory would help", flush=True)  # fmt: skip
    numbers: dict[str, Any] = {name: mean(name, steps) for name in ("score", "loss", "train_loss")}
    numbers["start_score"] = mean("score", rows[0]["step"])
    if "module_index" in rows[-1]:
        starts = [row["score"] for row in rows if row["step"] == rows[0]["step"]]
        own = ("module_index", "score", "loss", "train_loss")
        ends = [{name: row[name] for name in own} for row in rows if row["step"] == steps]
        numbers["modules"] = [end | {"start_score": start} for end, start in zip(ends, starts, strict=True)]
    if trainer.mat:
        numbers["mat"] = trainer.mat.summary(folder.metrics(MNTK), steps * settings.batch_size)
    numbers |= {name: getattr(counts, name) for name in ("train_seconds", "eval_seconds", "startup_seconds")}
    return trainer.eval_model, numbers | {
        "steps": steps,
        "images_seen": steps * settings.batch_size,
        "epochs": steps / per_epoch,
        "distinct_images_per_epoch": math.ceil(per_epoch * settings.batch_size / settings.repeats),
        "train_flops": counts.flops,
        "train_flops_executed": counts.flops_executed,
        "data_share": data_share,
        "broken_images": len(broken),
        "devices": team.devices,
    }
