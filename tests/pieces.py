"""Whether a network of timm can be trained in pieces: what tests/battery.py says of each network, and finds out here."""

import copy
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from incubate_lib.method.chain import Chain, NotAChain, find_chain
from incubate_lib.method.incubation import Hybrid, Imitation, assemble, start_module
from incubate_lib.method.network import Partition, divide, graft, run_to, without

PIXELS, CLASSES, IMAGES, MODULES = 64, 7, 2, 4
TOLERANCE = 1e-6
ROUNDING = 1e-5  # of a start that computes the same by other sums
PASSES, NEARLY, FAILS = "passes", "within 1e-6", "no"
FOUND = ["file", "network", "pixels", "blocks", "cuts", "modules", "starts", "result", "difference", "why"]  # columns
Tensors = dict[str, Tensor | None]


class Failed(Exception):
    """Says what a network lacks."""


# -- a network and its modules -------------------------------------------------------------------------------------------------


def build(name: str, seed: int, options: dict[str, Any]) -> nn.Module:
    """Return a network whose branches all count: none starts at zero, which would hide errors."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=CLASSES, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_meta and (parameter.numel() == max(parameter.shape, default=1) or not parameter.any()):
                parameter.add_(0.1 * torch.rand_like(parameter))
    return model


def anatomy(name: str) -> tuple[Chain, dict[str, Any], tuple[int, int, int]]:
    """Return where a network can be cut, with the options and the images [C, H, W] that it takes: small ones if it can."""
    known = timm.get_pretrained_cfg(name)
    channels, usual, _ = known.input_size if known else (3, 224, 224)
    sizes = [({"img_size": PIXELS}, PIXELS), ({}, PIXELS), ({}, usual)]
    if known and known.fixed_input_size:
        del sizes[1]
    for noisy in ({"drop_rate": 0.1, "drop_path_rate": 0.1}, {"drop_rate": 0.1}, {}):
        for size, pixels in sizes:
            options, shape = size | noisy, (channels, pixels, pixels)
            try:
                with torch.device("meta"):
                    return find_chain(build(name, 0, options), shape), options, shape
            except NotAChain:
                raise
            except Exception as error:  # whatever timm raises where it is given something that it does not take
                reason = error
    raise reason


def evenly(number: int, parts: int) -> list[int]:
    return [number * (i + 1) // parts - number * i // parts for i in range(parts)]


# -- what is compared ----------------------------------------------------------------------------------------------------------


def ran(model: nn.Module, images: Tensor, training: bool) -> Tensors:
    """Return the logits of a network, the gradients of their sum of squares, and the statistics that it then has."""
    fresh(model, training)
    torch.manual_seed(3)
    model.zero_grad()
    logits = [value for value in tree_leaves(model(images)) if isinstance(value, Tensor)]
    sum(value.square().sum() for value in logits).backward()
    gradients = {f"the gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {f"logits {i}": value.detach() for i, value in enumerate(logits)} | gradients | dict(model.named_buffers())


def fresh(model: nn.Module, training: bool) -> None:
    """Put a network into a mode; some keep what they computed in eval mode until they are next in train mode."""
    model.train()
    model.train(training)


def difference(ours: Tensors, theirs: Tensors, where: str, tolerance: float = TOLERANCE) -> float:
    """Return the largest difference of tensors of the same names, over the largest value of each; Failed if one is too large."""
    if ours.keys() != theirs.keys():
        raise Failed(f"{where}: {min(ours.keys() ^ theirs.keys())} is in one network only")
    largest = 0.0
    for name, a in ours.items():
        b = theirs[name]
        if a is None or b is None or torch.equal(a, b):
            if a is not b and (a is None or b is None):
                raise Failed(f"{where}: {name} is in one network only")
            continue
        apart = float((a - b).abs().max() / b.abs().max())
        if not apart <= tolerance:
            raise Failed(f"{where}: {name} differs by {apart:.1g} of its largest value")
        largest = max(largest, apart)
    return largest


def need(holds: bool, else_: str) -> None:
    if not holds:
        raise Failed(else_)


# -- the battery: each takes the meta model, the target, how they are divided, and images --------------------------------------


def the_graft_is_the_target(meta: nn.Module, target: nn.Module, partition: Partition, images: Tensor) -> float:
    reference, model = copy.deepcopy(target), meta
    for index in range(partition.num_modules):
        model = graft(model, target, partition.claims(index))
    need(type(model) is type(reference) and [*model.state_dict()] == [*reference.state_dict()], "the graft has other names")
    modes = {"eval mode": False, "train mode": True}
    found = [difference(ran(model, images, on), ran(reference, images, on), f"the graft in {mode}") for mode, on in modes.items()]
    return max(found)


def hybrids_train_their_modules(meta: nn.Module, target: nn.Module, partition: Partition, images: Tensor) -> float:
    useful = {name for name, value in ran(copy.deepcopy(target), images, True).items() if value is not None}
    meta, target = copy.deepcopy((meta, target))
    for index in range(partition.num_modules):
        hybrid = Hybrid(meta, target, partition, index)
        network, own = hybrid.network, set(hybrid.module_state())
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        logits_of(hybrid, images)
        hybrid.train()
        torch.nn.functional.cross_entropy(first(hybrid(images)), torch.arange(IMAGES)).backward()
        torch.optim.SGD([p for p in hybrid.parameters() if p.requires_grad], lr=0.01, weight_decay=1.0).step()
        parameters = {name for name, _ in network.named_parameters()}
        learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        reached = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
        moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
        wanted = own & parameters
        need(learning == wanted, f"hybrid {index + 1} does not train exactly its module")
        need(
            reached == {name for name in wanted if f"the gradient of {name}" in useful}, f"hybrid {index + 1} leaves weights out"
        )
        need(moved <= own, f"hybrid {index + 1} moves {min(moved - own, default='')}")
        evaluated = logits_of(hybrid, images)
        fresh(network, False)
        need(torch.equal(evaluated, logits_of(network, images)), f"hybrid {index + 1} evaluates what it was before")
    return 0.0


def hybrids_can_be_entered_at_their_cuts(meta: nn.Module, target: nn.Module, partition: Partition, images: Tensor) -> float:
    """An imitation runs the meta model, and the hybrid from behind its frozen prefix."""
    largest = 0.0
    meta, target = copy.deepcopy((meta, target))
    for index in range(partition.num_modules):
        imitation = Imitation(meta, target, partition, index)
        with torch.no_grad():
            torch.manual_seed(3)
            entered = imitation(images)
            torch.manual_seed(3)
            given, wanted = (run_to(model, partition, index, images) for model in (imitation.network, meta.eval()))
        whole = (first(given) - first(wanted)).float().square().flatten(1).mean(1) / first(wanted).float().var()
        largest = max(
            largest, difference({"the output": entered}, {"the output": whole}, f"hybrid {index + 1}, entered at its cut")
        )
    return largest


def modules_load_into_a_stock_network(
    meta: nn.Module, target: nn.Module, partition: Partition, images: Tensor, stock: nn.Module
) -> float:
    parts = [Hybrid(meta, target, partition, index).module_state() for index in range(partition.num_modules)]
    assemble(stock, partition, copy.deepcopy(parts))
    for model in (stock, target):
        fresh(model, False)
    ours, theirs = logits_of(stock, images), logits_of(target, images)
    need(bool(ours.isfinite().all()), "logits are not finite")
    return difference({"logits": ours}, {"logits": theirs}, "assembled in a stock network")


def starts(meta: nn.Module, target: nn.Module, partition: Partition, images: Tensor) -> Iterator[str]:
    """Yield the starts, beside the random one, that a network allows; Failed if one does not do what it should."""
    for start in ("stack", "identity"):
        small, large = copy.deepcopy((meta, target))
        try:
            for index in range(partition.num_modules):
                start_module(large, small, partition, index, start, inherit_stem=True, inherit_head=True)
        except ValueError:
            continue
        for index in range(partition.num_modules):
            hybrid = Hybrid(small, large, partition, index)
            fresh(small, False)
            ours, theirs = logits_of(hybrid, images), logits_of(small, images)
            need(bool(ours.isfinite().all()), f"logits behind start {start} are not finite")
            if start == "identity":
                difference({"logits": ours}, {"logits": theirs}, f"hybrid {index + 1} with start identity", ROUNDING)
        yield start


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images)


def first(output: Any) -> Tensor:
    """Return the tensor of logits: some networks return several in train mode."""
    return next(value for value in tree_leaves(output) if isinstance(value, Tensor))


def blank(name: str) -> dict[str, Any]:
    """Return the row of a network of which nothing is known."""
    file = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    return dict.fromkeys(FOUND, "") | {"file": file, "network": name, "result": FAILS}


def check(name: str) -> dict[str, Any]:
    """Return a network's row of the table, but for when and where."""
    row = blank(name)
    try:
        chain, options, shape = anatomy(name)
        row |= {"pixels": shape[-1], "blocks": len(chain.blocks), "cuts": len(chain.stretches) - 1}
        modules = max(2, min(MODULES, len(chain.blocks) // 2))
        need(len(chain.blocks) > modules, f"{len(chain.blocks)} blocks can be left out; two modules need three")
        partition = divide(chain, evenly(len(chain.blocks), modules))
        row["modules"] = modules
        target, other = (build(name, seed, options) for seed in range(2))
        stock = copy.deepcopy(other)
        meta = without(other, [block for index in range(modules) for block in partition.blocks(index)[1:]])
        images = torch.randn(IMAGES, *shape)
        need(bool(logits_of(meta, images).isfinite().all()), "the meta model's logits are not finite")
        largest = max(
            hybrids_train_their_modules(meta, target, partition, images),
            hybrids_can_be_entered_at_their_cuts(meta, target, partition, images),
            the_graft_is_the_target(meta, target, partition, images),
            modules_load_into_a_stock_network(meta, target, partition, images, stock),
        )
        row["starts"] = " ".join(starts(meta, target, partition, images))
        row |= {"difference": largest, "result": NEARLY if largest else PASSES}
    except (Failed, NotAChain) as failure:
        row["why"] = str(failure)
    except Exception as error:  # a network that cannot be built or run says so in many ways
        row["why"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return row
