"""The one training loop of every phase, and evaluation.

A phase decides only the model and which of its parameters require gradients. Everything random follows from the seed:
the order of the images from (seed, epoch), the rest from the global generators, whose states are in each checkpoint.
So a phase that was killed and resumed ends in the same bits as one that was not (same device, same threads).
"""

import math
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from incubate_lib.config import TrainingSettings
from incubate_lib.training.data import ImageSet, augment
from incubate_lib.training.progress import Progress
from incubate_lib.training.runs import HEARTBEAT_SECONDS, PhaseFolder, Stopped
from incubate_lib.training.schedule import derive_seed, lr_at, steps_per_epoch, total_steps

NO_DECAY = {"pos_embed", "cls_token", "reg_token", "dist_token"}  # besides biases and norms, in every phase
EVAL_BATCH = 256


# -- random states --------------------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # timm's Mixup draws from numpy
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """Return the states of all generators, as plain values that `weights_only` loading accepts."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


# -- training -------------------------------------------------------------------------------------------------------------


class Chrono:
    """Seconds of update steps only; the device is synchronised before the clock is read."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds, self.since = device, seconds, None

    def start(self) -> None:
        self.since = time.perf_counter()

    def pause(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.since is not None:
            self.seconds += time.perf_counter() - self.since
        self.since = None


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """Return AdamW over exactly the trainable parameters, without decay on biases, norms, embeddings and tokens."""
    exempt = [name for name, _ in model.named_parameters() if name.split(".")[-1] in NO_DECAY]
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=exempt)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, weight_decay=0.0, fused=True)


@torch.no_grad()
def evaluate(model: nn.Module, data: ImageSet) -> dict[str, float]:
    """Return mean loss and accuracy (0 … 1): sums over all samples, divided once. The model's mode is left as it was."""
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=data.images.device)
    correct = torch.zeros((), dtype=torch.int64, device=data.images.device)
    for index in torch.arange(len(data), device=data.images.device).split(EVAL_BATCH):
        x, y = data.batch(index)
        logits = model(x).float()
        loss += F.cross_entropy(logits, y, reduction="sum").double()
        correct += (logits.argmax(1) == y).sum()
    model.train(was_training)
    return {"loss": loss.item() / len(data), "accuracy": correct.item() / len(data)}


def fit(
    model: nn.Module,
    train: ImageSet,
    judge: ImageSet,
    settings: TrainingSettings,
    *,
    seed: int,
    folder: PhaseFolder,
    title: str,
    checkpoint_seconds: float,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train the parameters of `model` that require gradients; return steps, images seen, seconds and the last evaluation.

    Goes on from the folder's checkpoint if there is a sound one. Raises Stopped when `should_stop()` says so, after a
    checkpoint, and FloatingPointError at the step whose loss is not finite, without saving it.
    """
    device = train.images.device
    per_epoch = steps_per_epoch(len(train), settings.batch_size)
    steps = total_steps(settings.epochs, len(train), settings.batch_size)
    warmup = round(settings.warmup_epochs * per_epoch)
    optimizer = make_optimizer(model, settings)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    mix = None
    if settings.mixup or settings.cutmix:
        mix = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.label_smoothing, num_classes=train.num_classes)

    seed_everything(seed)
    step, loss_sum, loss_steps, seconds, eval_seconds = 0, 0.0, 0, 0.0, 0.0
    state, complaints = folder.load_checkpoint()
    for complaint in complaints:
        print(f"{title}: {complaint}; going back to what is sound", flush=True)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, loss_sum, loss_steps = state["step"], state["loss_sum"], state["loss_steps"]
        seconds, eval_seconds = state["train_seconds"], state["eval_seconds"]
        set_random_states(state["random"])
        folder.set_status(resumed_at=step)
    folder.start_metrics(step)
    rows = folder.metrics()
    clock = Chrono(device, seconds)
    progress = Progress(folder, title, steps, step)
    pending: list[Tensor] = []  # losses still on the device; reading one waits for it, so they are read together
    order, saved_at, looked_at = None, time.monotonic(), time.monotonic()

    def not_finite(what: str, value: float, at: int) -> FloatingPointError:
        return FloatingPointError(
            f"{title}: {what} is {value} at step {at} of {steps} (lr {settings.lr}, warmup_epochs "
            f"{settings.warmup_epochs}, clip_grad {settings.clip_grad}, batch_size {settings.batch_size}); "
            "a lower lr, a longer warm-up or clip_grad: 1.0 usually cures it"
        )

    def look() -> None:
        """Read the pending losses; the first that is not finite ends the phase with its step named."""
        nonlocal loss_sum, loss_steps
        for i, value in enumerate(torch.stack(pending).tolist() if pending else []):
            if not math.isfinite(value):
                raise not_finite("loss", value, step - len(pending) + i)
            loss_sum += value
            loss_steps += 1
        pending.clear()

    def save() -> None:
        folder.save_checkpoint({
            "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "random": random_states(), "loss_sum": loss_sum, "loss_steps": loss_steps,
            "train_seconds": clock.seconds, "eval_seconds": eval_seconds,
        })  # fmt: skip

    def judge_now() -> None:
        nonlocal loss_sum, loss_steps, eval_seconds
        began = time.perf_counter()
        result = evaluate(model, judge)
        eval_seconds += time.perf_counter() - began
        if not math.isfinite(result["loss"]):
            raise not_finite("the judged loss", result["loss"], step)
        row = {"step": step, "epoch": step / per_epoch, "images": step * settings.batch_size, **result}
        row |= {"train_loss": loss_sum / loss_steps if loss_steps else None, "train_seconds": clock.seconds}
        folder.add_metrics(row)
        rows.append(row)
        loss_sum, loss_steps = 0.0, 0

    model.train()
    if not rows:
        judge_now()
    while step < steps:
        if clock.since is None:
            clock.start()
        # data
        epoch, place = divmod(step, per_epoch)
        if order is None or place == 0:
            generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
            order = torch.randperm(len(train), generator=generator).to(device)
        index = order[place * settings.batch_size : (place + 1) * settings.batch_size]
        x, y = train.normalise(augment(train.images[index], settings)), train.labels[index]
        if mix is not None:
            x, y = mix(x, y)
        # forward, backward, clip, step
        smoothing = 0.0 if mix else settings.label_smoothing  # Mixup smooths its own targets
        loss = F.cross_entropy(model(x), y, label_smoothing=smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if settings.clip_grad is not None:
            nn.utils.clip_grad_norm_(trainable, settings.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, warmup, settings.lr, settings.min_lr)
        optimizer.step()
        pending.append(loss.detach())
        step += 1
        # record
        now = time.monotonic()
        due = step == steps or step % (settings.eval_every * per_epoch) == 0
        if due or now - looked_at >= HEARTBEAT_SECONDS or now - saved_at >= checkpoint_seconds:
            last_loss = pending[-1]
            look()
            clock.pause()
            if due:
                judge_now()
            progress.tell(step, epoch=step / per_epoch, loss=last_loss.item(), accuracy=rows[-1]["accuracy"])
            stop = should_stop() and step < steps
            if stop or now - saved_at >= checkpoint_seconds:
                save()
                saved_at = time.monotonic()
            if stop:
                progress.close()
                raise Stopped(f"{title}: stopped at step {step} of {steps}; the next run goes on from here")
            looked_at = time.monotonic()
    progress.close()
    return {
        "steps": steps, "images_seen": steps * settings.batch_size, "epochs": steps / per_epoch,
        "train_seconds": clock.seconds, "eval_seconds": eval_seconds, "start_accuracy": rows[0]["accuracy"],
        "accuracy": rows[-1]["accuracy"], "loss": rows[-1]["loss"], "train_loss": rows[-1]["train_loss"],
    }  # fmt: skip
