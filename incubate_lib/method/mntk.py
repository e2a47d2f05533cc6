"""The modular neural tangent kernel of MAT (arXiv 2405.07527, section 3).

For the parameters θ of one unit and samples X the kernel is Θ(X, X) = J Jᵀ, J the Jacobian of the network's outputs with
respect to θ. Where units together are the whole network, the sum of their kernels is the network's. The largest eigenvalue
says how well the unit still learns what the samples share.

One forward and one backward pass give the kernels of all units: at each layer the backward pass brings each sample's
gradient of the layer's output, from which with the layer's input the sample's gradient of the layer's parameters follows;
their inner products are summed, and they are forgotten before the next layer. The whole Jacobian is never in memory.
Here the network is in eval mode (dropout off, batch norm with its running statistics), or samples would not be
independent of each other. All this holds for layers that are called once, with one input a sample or all windows of a
sample side by side, and use their parameters themselves; `check_kernels` refuses all others by name.

Letters: N samples, C outputs, M rows of a kernel (N, or N·C), U units, T tokens or pixels, I and O a layer's inputs and
outputs.
"""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from incubate_lib.method.rows import is_matrix
from incubate_lib.method.sizes import blank, embedded
from incubate_lib.method.units import Unit, owners_of
from incubate_lib.method.watch import check_held_alone, eval_mode, watched_parameters

# what a sample gives: one number, the sum of its logits (the paper's side code) or of those of its last token; or every logit
Outputs = Literal["sum", "last", "all"]
CHUNK = 2**24  # numbers in a piece of per-sample gradients: 64 MiB in float32
UNKNOWN = "its kernel is not known here"


def modular_kernels(
    model: nn.Module, units: Sequence[Unit], images: Tensor, *, outputs: Outputs = "sum", checked: bool = False
) -> Tensor:
    """Return the kernel of each unit on `images` [N, …]: [U, M, M], in float32 (float64 if the model is).

    With `outputs="all"` row n·C + c is logit c of sample n. Weights, their gradients and every module's mode are left
    alone. Raises the ValueErrors of `check_kernels`; with `checked` that was called before, for the same model and units.
    """
    if not checked:
        check_kernels(model, units, images)
    owners = _owners(model, units)
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    roots: list[Tensor] = []
    precision = torch.promote_types(next(model.parameters()).dtype, torch.float32)

    def watch(name: str):
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0].detach()
            version = x._version
            if not output.requires_grad:  # the first of its path: the backward pass ends here
                roots.append(output.detach().requires_grad_())
                output = roots[-1].clone()

            def add(delta: Tensor) -> None:
                if x._version != version:
                    raise ValueError(f"the input of layer {name} is overwritten later; {UNKNOWN}")
                with torch.no_grad(), _without_autocast(x.device.type):
                    _add(kernels, layer, owners[name], x.to(precision), delta.to(precision))

            output.register_hook(add)
            return output

        return hook

    with eval_mode(model):
        if outputs == "all":
            number = outputs_of(model, images)
            images = images.repeat_interleave(number, 0)
        kernels = torch.zeros(len(units), len(images), len(images), dtype=precision, device=images.device)
        with contextlib.ExitStack() as stack, torch.enable_grad():
            for name in owners:  # before other hooks, which may change the output
                stack.enter_context(model.get_submodule(name).register_forward_hook(watch(name), prepend=True))
            for parameter in learns:
                parameter.requires_grad_(False)  # their gradients are what must not be computed
                stack.callback(parameter.requires_grad_, True)
            logits = _asked_for(model(images), outputs)
            if outputs == "all":
                one = torch.eye(number, device=logits.device, dtype=logits.dtype)
                logits = logits.flatten(1) * one.repeat(len(logits) // number, 1)
            torch.autograd.grad(logits.sum(), roots, allow_unused=True)
    return kernels


@torch.no_grad()
def check_kernels(model: nn.Module, units: Sequence[Unit], images: Tensor) -> None:
    """Raise ValueError, with a layer's or parameter's name, where `modular_kernels` would be wrong.

    Each owned layer must be called exactly once, with one tensor whose first dimension is the samples', or that of their
    windows, those of a sample side by side; alone hold its parameters, and alone use them, within that call; and no sample
    may reach another one's outputs. Two passes of a few copies of `images[:1]` show it: of different numbers, because tokens
    may be as many as samples, and with one image of NaN, which whatever it reaches becomes too. On the meta device there are
    no values, so there only batch norms are asked whether samples are independent.
    """
    owners = _owners(model, units)
    check_held_alone(model, (f"{name}.{short}" for name, shorts in owners.items() for short in shorts))
    with eval_mode(model):
        for name, layer in model.named_modules():
            if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
                why = "stays in train mode" if layer.training else "has no running statistics"
                raise ValueError(f"batch norm {name} {why}, so samples depend on each other; {UNKNOWN}")
        windows: dict[tuple[str, str], int] = {}  # of a sample
        for number in (2, 3):
            probe = images[:1].repeat(number, *[1] * (images.ndim - 1))
            spoiled = contextlib.nullcontext() if probe.is_floating_point() else embedded(model, probe, _spoil)
            probe = _spoil(probe) if probe.is_floating_point() else probe
            with spoiled:
                _check_pass(model, owners, probe, windows)


def _spoil(values: Tensor) -> Tensor:
    values = values.clone()
    values[0] = torch.nan
    return values


def _check_pass(
    model: nn.Module, owners: Mapping[str, Mapping[str, "Owner"]], probe: Tensor, windows: dict[tuple[str, str], int]
) -> None:
    seen: set[str] = set()

    def check(name: str):
        def hook(layer: nn.Module, inputs: tuple, more: dict, output: Tensor) -> None:
            if name in seen:
                raise ValueError(f"layer {name} is used more than once in a forward pass; {UNKNOWN}")
            seen.add(name)
            if more or not all(isinstance(value, Tensor) for value in (*inputs, output)) or len(inputs) != 1:
                raise ValueError(f"layer {name} has other inputs or outputs than one tensor; {UNKNOWN}")
            for value, what in ((inputs[0], "sees {} inputs"), (output, "has {} outputs")):
                number = len(value) if value.ndim else 1
                each = windows.setdefault((name, what), number // len(probe))
                if number != each * len(probe):
                    raise ValueError(f"layer {name} {what.format(number)} for {len(probe)} images; {UNKNOWN}")
                if not value.is_meta and value[each:].isnan().any():
                    raise ValueError(f"at layer {name} samples depend on each other; {UNKNOWN}")

        return hook

    with contextlib.ExitStack() as hooks:
        for name in owners:
            hook = check(name)
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True, prepend=True))
        uses = hooks.enter_context(watched_parameters(model))
        logits = model(probe)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the network gives a {type(logits).__name__}, not one tensor; {UNKNOWN}")
    for name, shorts in owners.items():
        for short in shorts:
            if (use := uses.get(f"{name}.{short}")) and use.outside:
                raise ValueError(f"parameter {name}.{short} is used outside its own layer's call; {UNKNOWN}")
        if name not in seen:
            raise ValueError(f"layer {name} is not called in a forward pass; {UNKNOWN}")
    if not logits.is_meta and logits[1:].isnan().any():
        raise ValueError(f"the outputs of samples depend on each other; {UNKNOWN}")


def _asked_for(logits: Tensor, outputs: Outputs) -> Tensor:
    """Return the logits of which a sample's number is the sum, of [N, …, C]."""
    if outputs != "last":
        return logits
    if logits.ndim != 3:
        raise ValueError(f"its outputs have the shape {tuple(logits.shape)}; only those of a text have a last token")
    return logits[:, -1]


def kernel_by_definition(model: nn.Module, names: Sequence[str], images: Tensor, *, outputs: Outputs = "sum") -> Tensor:
    """Return the kernel [M, M] of some parameters by its definition: the Jacobian, row by row. For small networks."""
    parameters = [model.get_parameter(name).detach().requires_grad_() for name in names]
    rows = []
    with eval_mode(model):
        for image in images:
            pair = torch.stack([image, image])  # of a single one torch's backward pass can mistake the strides, and be wrong
            logits = functional_call(model, dict(zip(names, parameters, strict=True)), (pair,))[0]
            for value in logits if outputs == "all" else [_asked_for(logits[None], outputs).sum()]:
                gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
                rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor) -> int:
    """Return how many numbers a network gives for an image."""
    with eval_mode(model):
        return model(images[:1]).numel()


def probe_bytes(model: nn.Module, units: Sequence[Unit], image_shape: tuple[int, ...]) -> int:
    """Return the memory that each image of a probe (with `outputs="all"` each logit of it) needs, in bytes: what is kept for
    the backward pass, and the largest layer's inputs at every place of a convolution.

    Counted on the meta device. The kernels themselves, U·M², and a piece of one layer's gradients come on top.
    """
    model = copy.deepcopy(model).to("meta")
    owners, kept, unfolded = _owners(model, units), {}, [0]
    fixed = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in fixed:
            kept[storage._cdata] = storage  # kept alive, or another one would take its place
        return tensor

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        keep(inputs[0])
        if is_matrix(layer) and isinstance(layer, nn.Conv2d):
            unfolded.append(output[0, 0].numel() * layer.weight[0].numel() * output.element_size())
        return output if output.requires_grad else output.detach().requires_grad_().clone()

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in owners:
        model.get_submodule(name).register_forward_hook(hook)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = blank(model, 1, image_shape)
        model.eval()(x.to(next(model.parameters()).dtype) if x.is_floating_point() else x)
    return sum(storage.nbytes() for storage in kept.values()) + max(unfolded)


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


# -- one layer ------------------------------------------------------------------------------------------------------------

Owner = int | tuple[Tensor, Tensor]  # the unit that has the whole parameter, or rows [R] and the unit of each


def _owners(model: nn.Module, units: Sequence[Unit]) -> dict[str, dict[str, Owner]]:
    """Return for each layer that units have parameters of: these parameters' short names → the units that they belong to."""
    owners: dict[str, dict[str, Owner]] = {}
    for name, owner in owners_of(units, model).items():
        layer, _, short = name.rpartition(".")
        if next(model.get_submodule(layer).children(), None) is not None:
            raise ValueError(f"parameter {name} belongs to no layer of its own; use kernel_by_definition for it")
        if isinstance(owner, Tensor):
            rows = owner.argsort(stable=True)[owner.lt(0).sum() :]  # unit by unit
            device = model.get_parameter(name).device
            owner = rows.to(device), owner[rows].to(device)
        owners.setdefault(layer, {})[short] = owner
    return owners


def _add(kernels: Tensor, layer: nn.Module, owners: dict[str, Owner], x: Tensor, delta: Tensor) -> None:
    """Add what one layer's parameters give to the kernels, from inputs x [M, …, I] and gradients of its outputs.

    Of a layer that is given windows the first dimension is M times their number.
    """
    samples = kernels.shape[-1]
    if is_matrix(layer) and owners.keys() <= {"weight", "bias"}:
        x, delta = (part.reshape(samples, -1, part.shape[-1]) for part in places(layer, x, delta))
        if isinstance(owners.get("weight"), int) and owners.get("weight") == owners.get("bias"):
            x, owners = F.pad(x, (0, 1), value=1.0), {"weight": owners["weight"]}  # the bias is the weight of a constant input
        for short, owner in owners.items():
            if short == "weight" and isinstance(owner, int):
                _add_weight(kernels[owner], x, delta)
            elif short == "weight":
                _add_weight_rows(kernels, *owner, x, delta)
            else:
                _add_gradients(kernels, owner, delta.sum(1))
        return
    if _is_layer_norm(layer):  # as below, in a third of the time; there are many of them
        gradients = {"weight": delta * F.layer_norm(x, layer.normalized_shape, eps=layer.eps), "bias": delta}
        for short, owner in owners.items():
            _add_gradients(kernels, owner, gradients[short].reshape(samples, -1, *layer.normalized_shape).sum(1))
        return

    bare = copy.copy(layer)
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()  # what they do is in x and delta already

    def one(parameters: dict[str, Tensor], x: Tensor, delta: Tensor) -> dict[str, Tensor]:
        return vjp(lambda p: functional_call(bare, p, (x[None],)), parameters)[1](delta[None])[0]

    parameters = {short: layer.get_parameter(short).detach().to(x.dtype) for short in owners}
    gradients = vmap(one, (None, 0, 0))(parameters, x, delta)
    for short, owner in owners.items():
        _add_gradients(kernels, owner, gradients[short].unflatten(0, (samples, -1)).sum(1))


def _is_layer_norm(layer: nn.Module) -> bool:
    return type(layer) in (nn.LayerNorm, LayerNorm) and "forward" not in vars(layer)


def places(layer: nn.Module, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs [M, T, I] and output gradients [M, T, O] of a layer that is a matrix product at each place."""
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
        return x, delta.flatten(2).transpose(1, 2)
    return x.reshape(len(x), -1, x.shape[-1]), delta.reshape(len(delta), -1, delta.shape[-1])


def _add_weight(kernel: Tensor, x: Tensor, delta: Tensor) -> None:
    """Add what a whole weight matrix gives to a kernel [M, M], whichever way is less work.

    Inner products of gradients are sums over pairs of places of (x·x′)(δ·δ′), which spares the gradients themselves.
    """
    (m, t, i), o = x.shape, delta.shape[2]
    pairs = (m * t) ** 2
    if pairs <= CHUNK and pairs * (i + o) <= m * i * o * (t + m):
        products = (x.reshape(m * t, i) @ x.reshape(m * t, i).T) * (delta.reshape(m * t, o) @ delta.reshape(m * t, o).T)
        kernel += products.view(m, t, m, t).sum((1, 3))
        return
    for part in delta.split(max(1, CHUNK // (m * i)), dim=2):
        gradients = (part.transpose(1, 2) @ x).flatten(1)
        kernel.addmm_(gradients, gradients.T)


def _add_weight_rows(kernels: Tensor, rows: Tensor, units: Tensor, x: Tensor, delta: Tensor) -> None:
    m, _, i = x.shape
    for some, owner in zip(*(index.split(max(1, CHUNK // (m * i))) for index in (rows, units)), strict=True):
        gradients = (delta[:, :, some].transpose(1, 2) @ x).transpose(0, 1)  # [R, M, I]
        kernels.index_add_(0, owner, gradients @ gradients.transpose(1, 2))


def _add_gradients(kernels: Tensor, owner: Owner, gradients: Tensor) -> None:
    """Add the inner products of gradients [M, rows of the parameter, …]."""
    if isinstance(owner, int):
        gradients = gradients.flatten(1)
        kernels[owner].addmm_(gradients, gradients.T)
    else:
        rows, units = owner
        gradients = gradients.flatten(2) if gradients.ndim > 2 else gradients[..., None]
        gradients = gradients[:, rows].transpose(0, 1)
        kernels.index_add_(0, units, gradients @ gradients.transpose(1, 2))
