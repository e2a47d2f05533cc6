"""The networks that phases train: whole, or cut into modules; freshly initialised from a run's seed."""

import contextlib
from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from incubate_lib.config import ModelSettings, PhaseSettings, SettingsError, in_a_line, nearest
from incubate_lib.data.schedule import derive_seed
from incubate_lib.method.incubation import assemble
from incubate_lib.method.partition import ViTModule, split


def build_model(
    settings: ModelSettings, depth: int | None, num_classes: int, drop_path: float = 0.0, *, any_kind: bool = False
) -> nn.Module:
    """Return a randomly initialised timm ViT of `depth` blocks (None: timm's own), or with `any_kind` any timm model.

    SettingsError names what does not fit, and weights that nothing initialised.
    """
    if not timm.is_model(settings.name):
        raise SettingsError(f"model.name: timm has no {settings.name!r}; {nearest(settings.name, timm.list_models())}")
    arguments = timm_arguments(settings) | ({} if depth is None else {"depth": depth})
    try:
        model = _create(settings.name, num_classes=num_classes, drop_path_rate=drop_path or None, **arguments)
    except Exception as error:  # timm checks its arguments by asserts and by failing somewhere inside
        message = f"timm cannot build model.name {settings.name!r} with {arguments}: {in_a_line(error)}"
        raise SettingsError(message if any_kind else f"{message} (only plain Vision Transformers can be taken apart)") from None
    if type(model) is not VisionTransformer and not any_kind:
        raise SettingsError(
            f"model.name {settings.name!r} is a {type(model).__name__}, not a plain timm VisionTransformer, and cannot be taken "
            "apart; without partition it can be trained end to end"
        )
    if unset := [name for name, tensor in model.state_dict().items() if not tensor.is_meta and tensor.isnan().any()]:
        raise SettingsError(
            f"timm leaves {len(unset)} tensor(s) of model.name {settings.name!r} with {arguments} without a start, first "
            f"{unset[0]}; change model.options"
        )
    return model


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
    """Return the arguments of a timm model that were set; those that take images of any size are not told which."""
    arguments = settings.timm_arguments()
    if not timm.get_pretrained_cfg(settings.name).fixed_input_size:
        arguments.pop("img_size", None)
    return arguments


def build_parts(s: PhaseSettings, which: str, num_classes: int) -> list[ViTModule]:
    """Return the freshly initialised modules of the `meta` or the `target` network.

    The whole network is built from the run's seed and then cut, so a module's start does not depend on which modules
    are trained, in what order or in what process, and all of them together are the start of end-to-end training.
    """
    depths = {"meta": s.meta_depths, "target": s.target_depths}[which]
    return split(_from_seed(s, which, sum(depths), num_classes), depths)


def build_target(s: PhaseSettings, num_classes: int) -> nn.Module:
    """Return the whole target network, freshly initialised; of any kind if it is not to be taken apart."""
    if s.target_depths:
        return assemble(build_parts(s, "target", num_classes))
    return _from_seed(s, "target", s.model.depth, num_classes, any_kind=True)


def _from_seed(s: PhaseSettings, which: str, depth: int | None, num_classes: int, any_kind: bool = False) -> nn.Module:
    drop_path = s.training.drop_path if s.training else 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(s.seed, "init", which))
        return build_model(s.model, depth, num_classes, drop_path, any_kind=any_kind)


def model_shape(settings: ModelSettings) -> tuple[int, int, int]:
    """Return the images that a model takes: C, H, W. One that takes any size gets model.img_size, or timm's usual."""
    try:
        with torch.device("meta"):
            model = build_model(settings, 1, 2)
        return (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    except SettingsError:  # no plain Vision Transformer
        if not timm.is_model(settings.name):
            raise
    channels, height, width = timm.get_pretrained_cfg(settings.name).input_size
    return (settings.in_chans or channels, settings.img_size or height, settings.img_size or width)


def at_size(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights of the same network for images of another size: the position embedding is resampled, as timm does."""
    own = getattr(model, "pos_embed", None)
    if own is None or own.shape == weights["pos_embed"].shape:
        return weights
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    resampled = resample_abs_pos_embed(weights["pos_embed"], list(model.patch_embed.grid_size), num_prefix_tokens=prefix)
    return weights | {"pos_embed": resampled}
