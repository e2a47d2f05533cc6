"""The networks that phases train: whole, or cut into modules; freshly initialised from a run's seed."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import nn

from incubate_lib.config import ModelSettings, PhaseSettings, Settings, SettingsError, in_a_line, nearest, refuse
from incubate_lib.config.members import TASKS
from incubate_lib.data.schedule import derive_seed
from incubate_lib.method.chain import Chain, NotAChain, find_chain
from incubate_lib.method.network import Partition, divide, divide_at, in_names_of, without
from incubate_lib.networks import register_all

WHOLE = (
    "without partition it can be trained end to end; ViTs, Swins, ConvNeXts, ResNets, RegNets and others can be cut, resnet50 "
    "or swin_tiny_patch4_window7_224 for example"
)
MOST_WEIGHTS = 10**12  # a slip in model.options, which have no bounds of their own, would take all memory


def check_name(settings: ModelSettings) -> None:
    """Raise SettingsError for a name that timm does not know."""
    register_all()
    if not timm.is_model(settings.name):
        raise SettingsError(f"model.name: timm has no {settings.name!r}; {nearest(settings.name, timm.list_models())}")


def build_model(settings: ModelSettings, depth: int | None, outputs: int, drop_path: float = 0.0) -> nn.Module:
    """Return a randomly initialised timm model, of `depth` blocks if its constructor takes that (None: timm's own).

    SettingsError names what does not fit, and weights that nothing initialised.
    """
    check_name(settings)
    arguments = timm_arguments(settings) | ({} if depth is None else {"depth": depth})
    try:
        model = _create(settings.name, num_classes=outputs, drop_path_rate=drop_path or None, **arguments)
    except Exception as error:  # timm checks its arguments by asserts and by failing somewhere inside
        raise SettingsError(f"timm cannot build model.name {settings.name!r} with {arguments}: {in_a_line(error)}") from None
    if not drop_path:
        for layer in model.modules():
            if isinstance(layer, DropPath):
                layer.drop_prob = 0.0  # timm's Swins have 0.1 unless they are told otherwise, and not all networks can be told
    weights = sum(parameter.numel() for parameter in model.parameters())
    many = f"model.name {settings.name!r} with {arguments} has {weights:,} weights; {MOST_WEIGHTS:,} are the most"
    refuse(weights > MOST_WEIGHTS, many)
    if unset := [name for name, tensor in model.state_dict().items() if not tensor.is_meta and tensor.isnan().any()]:
        raise SettingsError(
            f"timm leaves {len(unset)} tensor(s) of model.name {settings.name!r} with {arguments} without initial values, the "
            f"first: {unset[0]}; change model.options"
        )
    return model


def build_for(task: str, settings: ModelSettings, depth: int | None, outputs: int, drop_path: float = 0.0) -> nn.Module:
    """Return what learns a task: a timm model with as many outputs, or what stands on one without its classifier."""
    on_top = TASKS[task].is_on_top
    model = build_model(settings, depth, 0 if on_top else outputs, drop_path)
    if not on_top:
        return model
    try:
        return TASKS[task].over(model, model_shape(settings), outputs)
    except ValueError as error:
        raise SettingsError(f"model.name {settings.name!r} {error}; task {task!r} cannot stand on it") from None


def _create(name: str, **arguments: Any) -> nn.Module:
    if torch.get_default_device().type == "meta":  # nothing to initialise, and pretending to takes half of planning's time
        with contextlib.suppress(TypeError):  # not all networks know how to skip it
            return timm.create_model(name, weight_init="skip", **arguments)
    with _unset_memory_is_nan():
        return timm.create_model(name, **arguments)


@contextlib.contextmanager
def _unset_memory_is_nan() -> Iterator[None]:
    """Have torch fill new tensors with NaN where it would leave what the memory held, so that nobody trains from that."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    exactly, only_warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(exactly, warn_only=only_warned)


def timm_arguments(settings: ModelSettings) -> dict[str, Any]:
    """Return the arguments of a timm model that were set; those that take images of any size are given none."""
    arguments = settings.timm_arguments()
    known = timm.get_pretrained_cfg(settings.name)
    if not (known and known.fixed_input_size):
        arguments.pop("img_size", None)
    return arguments


def build_target(s: PhaseSettings, outputs: int) -> nn.Module:
    """Return the whole target network, freshly initialised from the run's seed.

    So a module's start does not depend on which modules are trained, in what order or in what process, and all of them
    together are the start of end-to-end training.
    """
    depth = s.model.depth
    if s.target_depths and takes_depth(s.model):
        depth = sum(s.target_depths)
    return _from_seed(s, "target", depth, outputs)


def build_meta(s: PhaseSettings, outputs: int) -> nn.Module:
    """Return the meta model, freshly initialised from the run's seed: the same constructor with less depth where it takes a
    depth, else the target network with blocks left out and drop-path growing over those that stay.
    """
    if takes_depth(s.model):
        return _from_seed(s, "meta", sum(s.meta_depths), outputs)
    partition = partition_of(s)
    model = _from_seed(s, "meta", s.model.depth, outputs)
    kept = {block for i, depth in enumerate(s.meta_depths) for block in _of_each_kind(model, partition.blocks(i), depth)}
    model = without(model, [block for block in partition.chain.blocks if block not in kept])
    set_drop_path(model, [b for b in partition.chain.blocks if b in kept], s.training.drop_path if s.training else 0.0)
    return model


def set_drop_path(model: nn.Module, blocks: list[str], rate: float) -> None:
    """Have drop-path rise linearly over these blocks, from 0 at the first to `rate` at the last."""
    rates = torch.linspace(0, rate, len(blocks), device="cpu").tolist()
    for block, own in zip(blocks, rates, strict=True):
        for layer in model.get_submodule(block).modules():
            if isinstance(layer, DropPath):
                layer.drop_prob = own


def _of_each_kind(model: nn.Module, blocks: list[str], number: int) -> list[str]:
    """Return so many of a module's blocks: the first of each shape (a stage has one of its own), then the second of each, …"""
    seen: dict[str, int] = {}
    turns = []
    for block in blocks:
        shapes = str([(name, tuple(tensor.shape)) for name, tensor in model.get_submodule(block).named_parameters()])
        turns.append(seen.setdefault(shapes, 0))
        seen[shapes] += 1
    first = sorted(range(len(blocks)), key=lambda i: (turns[i], i))[:number]
    return [blocks[i] for i in sorted(first)]


def partition_of(s: PhaseSettings) -> Partition:
    """Return how the target network is cut."""
    chain = chain_of(s.model, sum(s.target_depths) if takes_depth(s.model) else s.model.depth)
    return divide_at(chain, s.cuts) if s.cuts else divide(chain, s.target_depths)


def depths_of(settings: Settings) -> tuple[list[int], list[int]]:
    """Return the blocks of each target and each meta module; SettingsError if the network cannot be cut as is asked for."""
    chain, partition = chain_of(settings.model, settings.model.depth), settings.partition
    if not chain.blocks:
        raise SettingsError(
            f"model.name {settings.model.name!r} has no blocks that it could do without, so nothing smaller can be its meta "
            f"model; {WHOLE}"
        )
    if not partition.cuts:
        target, meta = partition.depths(len(chain.blocks), fixed=not takes_depth(settings.model))
        target = _balanced(settings, chain) if partition.balance == "memory" else target
    else:
        try:
            cut = divide_at(chain, partition.cuts)
        except ValueError as error:
            raise SettingsError(f"partition.cuts: {error}") from None
        target = [len(cut.blocks(index)) for index in range(cut.num_modules)]
        meta = list(partition.meta_depths or [min(1, blocks) for blocks in target])
        if takes_depth(settings.model) and 0 in target:
            raise SettingsError(f"partition.cuts {partition.cuts} leave module {target.index(0) + 1} without a block")
    for index, (large, small) in enumerate(zip(target, meta, strict=True)):
        many = f"partition.meta_depths {meta}: module {index + 1} of the target network has only {large} blocks"
        refuse(partition.meta_depths and small > large, many)
    return target, meta


def _balanced(settings: Settings, chain: Chain) -> list[int]:
    """Return the blocks of each module, cut so that the one that keeps most in memory keeps as little as can be."""
    from incubate_lib.training.memory import memory_by_part

    with torch.device("meta"):
        network = build_model(settings.model, settings.model.depth, 2).requires_grad_(True)
    one_each = divide(chain, [1] * len(chain.blocks))
    parts = memory_by_part(network, model_shape(settings.model), one_each, precision=settings.precision)
    return fair_shares([part.activations for part in parts], settings.partition.num_modules)


def fair_shares(costs: Sequence[int], number: int) -> list[int]:
    """Return how many of some costs in a row each of `number` shares has, so that the largest share is smallest."""
    upto = list(itertools.accumulate(costs, initial=0))
    best = {0: (0, [])}  # by how many costs are shared out: the largest share, and how many each has
    for done in range(1, number + 1):
        best = {
            end: min((max(best[i][0], upto[end] - upto[i]), [*best[i][1], end - i]) for i in best if i < end)
            for end in range(done, len(costs) - number + done + 1)
        }
    return best[len(costs)][1]


def meta_partition_of(s: PhaseSettings) -> Partition:
    """Return how the meta model is cut, under the names that it is saved with."""
    return divide(chain_of(s.model, sum(s.meta_depths)), s.meta_depths) if takes_depth(s.model) else partition_of(s)


def in_target_names(s: PhaseSettings, meta: nn.Module, target: nn.Module) -> nn.Module:
    """Return the meta model under the target's names, sharing its weights."""
    return in_names_of(meta, meta_partition_of(s), target, partition_of(s)) if takes_depth(s.model) else meta


def in_one_piece(settings: ModelSettings) -> Partition:
    """Return a network as one module, whose blocks are known."""
    chain = chain_of(settings, settings.depth)
    return divide(chain, [len(chain.blocks)])


def takes_depth(settings: ModelSettings) -> bool:
    """Whether the network's constructor takes its number of blocks."""
    return _takes_depth(settings.model_dump_json(exclude={"depth"}))


@cache
def _takes_depth(settings: str) -> bool:
    settings, sizes = ModelSettings.model_validate_json(settings), set()
    with contextlib.suppress(SettingsError), torch.device("meta"):
        for depth in (1, 2):
            sizes.add(sum(parameter.numel() for parameter in build_model(settings, depth, 2).parameters()))
    return len(sizes) == 2


def chain_of(settings: ModelSettings, depth: int | None) -> Chain:
    """Return where a network can be cut; SettingsError if it cannot, or cannot be built."""
    return _chain_of(settings.model_dump_json(exclude={"depth"}), depth)


@cache
def _chain_of(settings: str, depth: int | None) -> Chain:
    settings = ModelSettings.model_validate_json(settings)
    with torch.device("meta"):
        model = build_model(settings, depth, 2)
    try:
        return find_chain(model, model_shape(settings))
    except NotAChain as error:
        raise SettingsError(f"model.name {settings.name!r} cannot be taken apart: {error}; {WHOLE}") from None


def _from_seed(s: PhaseSettings, which: str, depth: int | None, outputs: int) -> nn.Module:
    drop_path = s.training.drop_path if s.training else 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(s.seed, "init", which))
        model = build_for(s.task, s.model, depth, outputs, drop_path)
        if s.training and s.training.token_std is not None and getattr(model, "cls_token", None) is not None:
            nn.init.trunc_normal_(model.cls_token, std=s.training.token_std)  # last, so that all else begins as ever
        return model


def model_shape(settings: ModelSettings) -> tuple[int, ...]:
    """Return the images that a model takes: C, H, W; of one that reads text its tokens, T. What is not set is timm's usual."""
    check_name(settings)
    known = timm.get_pretrained_cfg(settings.name)  # none: of a network that is not timm's own
    if known and len(known.input_size) == 1:
        refuse(settings.img_size, f"model.img_size has no meaning for {settings.name!r}, which reads text; set model.context")
        return (settings.context or known.input_size[0],)
    channels, height, width = known.input_size if known else (3, 224, 224)
    return (settings.in_chans or channels, settings.img_size or height, settings.img_size or width)
