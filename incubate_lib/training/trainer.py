"""One update of a model at a time: data, forward, backward, clip, step. Every phase and every measurement of speed uses it.

Everything random follows from the seed: the order of the images from (seed, epoch), each streamed image's augmentation from
(seed, epoch, place), all else from generators that are seeded anew for every micro-batch from (seed, update, micro-batch).
So a phase that was killed and resumed ends in the same bits as one that was not (same device, same threads), and N devices
see what one would.
"""

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from incubate_lib.config import DEFAULT_MACHINE, MachineSettings, MATSettings, SettingsError, TrainingSettings
from incubate_lib.data.order import Order
from incubate_lib.data.schedule import derive_seed, lr_at, micro_batches, steps_per_epoch, total_steps
from incubate_lib.data.scratch import own_folder
from incubate_lib.data.sets import ImageSet
from incubate_lib.data.stream import StreamedSet
from incubate_lib.method.mat import Piece
from incubate_lib.tasks import Loss, Losses, Task, of_the_output
from incubate_lib.tasks.classification import TASK as CLASSIFICATION
from incubate_lib.training.adaptive import Adaptive
from incubate_lib.training.costs import executed_flops_per_image
from incubate_lib.training.team import ALONE, Team

DataSet = ImageSet | StreamedSet


@dataclass
class Counts:
    """What a trainer has done so far and what that took."""

    step: int = 0
    # of `loss_steps` updates since the last evaluation; of each loss, where there are several
    loss_sum: float | list[float] = 0.0
    loss_steps: int = 0
    train_seconds: float = 0.0  # of update steps only
    eval_seconds: float = 0.0
    wait_seconds: float = 0.0  # for images
    startup_seconds: float = 0.0  # of each attempt's first update: compiling, starting workers
    startup_wait: float = 0.0
    flops: int = 0  # attention not fused, as budgets are counted
    flops_executed: int = 0  # with fused attention

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        for field in fields(self):
            setattr(self, field.name, state[field.name])


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed all generators that a micro-batch may draw from. (torch.manual_seed takes a stack trace without a GPU.)"""
    random.seed(seed)
    np.random.seed(seed)  # timm's Mixup draws from numpy
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def make_optimizer(model: nn.Module, settings: TrainingSettings, pieces: Sequence[Piece] = ()) -> torch.optim.Optimizer:
    """Return the recipe's optimiser of exactly the trainable parameters, no decay on biases, norms, and what the network says.

    Parameters of which rows can rest alone are given to it in `pieces`.
    """
    if settings.layer_decay:
        groups = _layer_groups(model, settings)
    else:
        groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=_not_decayed(model, settings))
    leaves: dict[int, list[nn.Parameter]] = {}
    for piece in pieces:
        leaves.setdefault(id(piece.parameter), []).append(piece.leaf)
    for group in groups:
        group["params"] = [leaf for parameter in group["params"] for leaf in leaves.get(id(parameter), [parameter])]
    if settings.optimizer == "sgd":
        momentum = settings.betas[0]
        return torch.optim.SGD(groups, lr=settings.peak_lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    return torch.optim.AdamW(groups, lr=settings.peak_lr, betas=settings.betas, weight_decay=0.0, fused=True)


def _not_decayed(model: nn.Module, settings: TrainingSettings) -> set[str]:
    """Return the parameters of which the network wants no decay, besides biases and norms."""
    own = set(getattr(model, "no_weight_decay", set)())  # timm's networks have embeddings and tokens there
    own |= {name for name, _ in model.named_parameters() if name.endswith("reg_token")}  # which timm before 1.0.22 forgets
    return {name for name in own if not (settings.decay_tokens and name.endswith(("pos_embed", "cls_token")))}


def _layer_groups(model: nn.Module, settings: TrainingSettings) -> list[dict[str, Any]]:
    """Return groups of parameters: the rate of a layer is a share of that of the next. What stands on a backbone has it whole."""
    backbone, decay = getattr(model, "backbone", model), settings.weight_decay
    own = _not_decayed(backbone, settings)
    groups = param_groups_layer_decay(backbone, decay, own, layer_decay=settings.layer_decay)
    layers = [{name: group[name] for name in ("params", "weight_decay", "lr_scale")} for group in groups]
    inside = {id(parameter) for parameter in backbone.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside and parameter.requires_grad]
    on_top = ([p for p in rest if p.ndim > 1], decay), ([p for p in rest if p.ndim <= 1], 0.0)
    return layers + [{"params": some, "weight_decay": own} for some, own in on_top if some]


def compiled(model: nn.Module, mode: str, backend: str = "inductor") -> nn.Module:
    """Return `model`, or a compiled callable for its present set of trainable parameters that shares its weights.

    Everything compiled before is forgotten: torch.compile may otherwise reuse a graph made for another set of
    trainable parameters (pytorch issue 139476). The weights are always read from `model`, so that no file ever has
    the prefix of a compiled one. What inductor keeps for the next time it unpickles, so it lies in a folder of this user's
    own, not under a name in a shared temporary folder that anybody could take: SettingsError if somebody did.
    """
    if mode == "off":
        return model
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        try:
            own = own_folder(Path(tempfile.gettempdir()), "TORCHINDUCTOR_CACHE_DIR")
        except PermissionError as error:
            raise SettingsError(f"machine.compile {mode!r}: {error}") from None
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own / "torchinductor")
    torch._dynamo.reset()
    return torch.compile(model, mode=None if mode == "default" else mode, backend=backend)


class Trainer:
    """One update of a model's trainable parameters at a time: data, forward, backward, clip, step.

    With several devices each holds a replica; gradients are averaged over all micro-batches of all devices.
    """

    def __init__(
        self,
        model: nn.Module,
        train: DataSet,
        settings: TrainingSettings,
        *,
        seed: int,
        precision: str = "float32",
        machine: MachineSettings = DEFAULT_MACHINE,
        team: Team = ALONE,
        mat: MATSettings | None = None,
        flops_per_image: int = 0,
        task: Task = CLASSIFICATION,
        losses: Losses = of_the_output,
        groups: Sequence[Sequence[nn.Parameter]] | None = None,  # one a loss, whose gradients reach no other
    ) -> None:
        self.model, self.train, self.settings, self.seed, self.team = model, train, settings, seed, team
        self.task, self.losses = task, losses
        self.flops_per_image = flops_per_image  # while everything trains
        self.executed_of: dict[tuple[bool, ...], int] = {}  # FLOPs executed for an image, by the units that train
        self.counts = Counts()
        self.device = next(model.parameters()).device
        self.precision, self.machine = precision, machine
        self.number, self.micro = micro_batches(settings.batch_size, settings.micro_batch, team.devices)
        for layer in model.modules():
            if hasattr(layer, "loss_share"):  # it adds a loss of its own
                layer.loss_share = 1 / self.number
        self.steps = total_steps(settings.epochs, len(train), settings.batch_size)
        self.per_epoch = per_epoch = steps_per_epoch(len(train), settings.batch_size)
        acts = settings.clip_when == "always" or precision != "float32"
        self.clip_grad = settings.clip_grad if acts else None
        whole = self.number * team.devices
        self.per_draw = whole // (settings.mixup_draws or whole)  # micro-batches that have one draw of mixup
        self.mat = None
        if mat is not None:
            self.mat = Adaptive(
                model, train, mat, steps_per_epoch=per_epoch, flops_per_image=flops_per_image, seed=seed, team=team, task=task
            )
        self.optimizer = make_optimizer(model, settings, self.mat.updates.pieces if self.mat else ())
        self.groups = groups or [[parameter for parameter in model.parameters() if parameter.requires_grad]]
        self.ema = ModelEmaV3(model, decay=settings.ema, use_warmup=True) if settings.ema is not None else None
        self.extra = task.start(train, settings)
        self.wrap()
        self.batches: Iterator[Any] | None = None

    def wrap(self) -> None:
        """Wrap and compile the model for its present set of trainable parameters."""
        self.replica = self.runner = None  # the one before lets go of the parameters first
        self.replica = self.model
        # what is frozen is frozen already, so no gradient is waited for in vain; with several losses some would be
        if self.team.devices > 1 and len(self.groups) == 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.replica = DistributedDataParallel(self.model, device_ids=ids, gradient_as_bucket_view=True)
        self.runner = compiled(self.replica, self.machine.compile)

    def adapt(self, step: int) -> dict[str, Any]:
        """Look at the units of Modular Adaptive Training before update `step`, decide which train, and return a record."""
        with autocast(self.device, self.precision):
            record = self.mat.probe(step)
        self.counts.flops += record["flops"]
        self.counts.flops_executed += record["flops_executed"]
        self.apply(step)
        return record

    def apply(self, step: int) -> None:
        """Let exactly the units train that do so in update `step`."""
        if self.mat and self.mat.updates.apply(self.mat.wanted(step)):
            self.wrap()

    def begin(self, step: int) -> None:
        """Take up the images from update `step` on."""
        order = Order(len(self.train), self.settings, self.seed, step, self.steps, rank=self.team.rank, devices=self.team.devices)
        self.batches = self.train.batches(order)
        self.apply(step)  # of a checkpoint; what it costs is counted before the clock starts
        if self.team.is_first:
            self.flops_now()
        if self.mat:
            with autocast(self.device, self.precision):
                self.mat.count_executed()
        self.executed_now()

    def step(self, step: int) -> Tensor:
        """Do update `step` (0-based) and return this device's mean loss, or losses [L], without waiting for the device."""
        losses, in_turn = [], len(self.groups) > 1 and self.number == 1  # gradients of one module at a time take less memory
        self.apply(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.settings, step, self.steps, self.per_epoch) * group.get("lr_scale", 1.0)
        (self.model if self.mat else self.optimizer).zero_grad(set_to_none=True)  # of divided parameters it holds views only
        for k in range(self.number):
            began = time.perf_counter()
            batch = next(self.batches)
            self.counts.wait_seconds += time.perf_counter() - began
            place = k * self.team.devices + self.team.rank
            seed_everything(derive_seed(self.seed, "draw", step, place), self.device)
            if self.per_draw > 1:  # they mix alike; nothing else draws from numpy
                np.random.seed(derive_seed(self.seed, "mixup", step, place // self.per_draw))
            batch = self.task.ready(batch, self.train, self.settings, self.extra)
            last = k == self.number - 1  # gradients travel once, after the last micro-batch
            is_wrapped = isinstance(self.replica, DistributedDataParallel)
            with self.replica.no_sync() if is_wrapped and not last else contextlib.nullcontext():
                for number, loss in enumerate(self.losses(self._run, self.task.inputs(batch), self._loss(batch))):
                    (loss / self.number).backward()
                    losses.append(loss.detach().clone())  # a captured graph would overwrite it
                    if in_turn:
                        self._learn([self.groups[number]])
        if not in_turn:
            self._learn(self.groups)
        if self.mat and self.mat.settings.slow_every:
            self.mat.updates.drift(self.optimizer)
        if self.team.is_first:
            self.counts.flops += self.flops_now() * self.settings.batch_size
        self.counts.flops_executed += self.executed_now() * self.settings.batch_size
        if self.ema is not None:
            self.ema.update(self.model, step)
        if len(losses) == self.number:
            return losses[0] if self.number == 1 else torch.stack(losses).mean()
        return torch.stack(losses).view(self.number, -1).mean(0)

    def _learn(self, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        """Change these parameters by their gradients; where there are several groups, those are gone then."""
        for group in groups:
            if len(self.groups) > 1:
                self.team.average([parameter.grad for parameter in group if parameter.grad is not None])
            if self.clip_grad is not None:
                nn.utils.clip_grad_norm_(group, self.clip_grad)
        if self.mat:
            self.mat.updates.hand_over()
        self.optimizer.step()
        if len(self.groups) > 1:
            self.optimizer.zero_grad(set_to_none=True)

    def flops_now(self) -> int:
        """Return the FLOPs of a training image with what trains at present, counted as budgets are: on the meta device."""
        return self.mat.flops_per_image(self.mat.updates.active) if self.mat else self.flops_per_image

    def executed_now(self) -> int:
        """Return the FLOPs that this device executes for a training image with what trains at present.

        Counted once for each set of units, on all devices at a time: a network may speak to the others in its forward pass.
        """
        key = tuple(self.mat.updates.active.tolist()) if self.mat else ()
        if key not in self.executed_of:
            with autocast(self.device, self.precision):
                self.executed_of[key] = executed_flops_per_image(self.model, self.train.shape, self.losses)
        return self.executed_of[key]

    def _run(self, *inputs: Any) -> Any:
        with autocast(self.device, self.precision):
            return self.runner(*inputs)

    def _loss(self, batch: Any) -> Loss:
        return Loss(self.task, batch, self.settings, self.train)

    @property
    def eval_model(self) -> nn.Module:
        """The weights that count: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def state(self) -> dict[str, Any]:
        """All that an update changes, each with state_dict and load_state_dict: this is the checkpoint.

        No random states, because all randomness follows from seed and step.
        """
        parts = {"model": self.model, "optimizer": self.optimizer, "counts": self.counts}
        parts |= {} if self.ema is None else {"ema": self.ema.module}
        return parts | ({"mat": self.mat} if self.mat else {})

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.state.items():
            part.load_state_dict(state[name])

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError, KeyError or TypeError unless a checkpoint's content is that of this model, optimizer and phase."""
        for name in self.counts.state_dict():
            if not np.isfinite(state["counts"][name]).all():
                raise ValueError(f"its {name} is {state['counts'][name]}")
        if not 0 <= state["counts"]["step"] <= self.steps:
            raise ValueError(f"it is at step {state['counts']['step']} of {self.steps}")
        own = self.state_dict()
        for name in {"model", "ema"} & own.keys():
            ours, given = ({(key, tuple(tensor.shape)) for key, tensor in s[name].items()} for s in (own, state))
            if wrong := sorted({key for key, _ in ours ^ given}):
                raise ValueError(f"its {name} has other names or shapes: {', '.join(wrong[:3])}")
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        numbers = [number for group in state["optimizer"]["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for slot, value in state["optimizer"]["state"].get(number, {}).items():
                if slot != "step" and value.shape != parameter.shape:
                    raise ValueError(f"its optimizer has {slot} of {tuple(value.shape)} for {tuple(parameter.shape)}")
        if self.mat and {len(units) for units in [*state["mat"]["history"], state["mat"]["active"]]} != {len(self.mat.units)}:
            raise ValueError("its mat is of other units")


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context in which matrix products run in that precision; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
