"""Checkpoints of the released Deep Incubation code become networks of ours; so do other torch files of plain timm ViTs.

A released file holds `model`, the flat state dict with everything again under `stages.I.…`, and `model_stages`, a list
of one state dict a stage with blocks counted within it: the names of our modules. It is read without running any code
that may be in it, and refused unless all copies agree. Architecture and sizes follow from names and shapes. What shapes
do not show follows from the released code: ViT-B and -L have LayerNorm eps 1e-6, ViT-H has no qkv bias and eps 1e-5,
as no architecture of timm but vit_huge_patch14_clip_224, once its first norm is left out.
"""

import argparse
import errno
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from incubate_lib.config import ModelSettings, SettingsError, error_message, in_a_line, refuse
from incubate_lib.config.errors import shortened
from incubate_lib.method.network import counted_through, divide
from incubate_lib.phases.networks import build_model, chain_of, model_shape
from incubate_lib.phases.weights import check_fits, check_values, first, save_timm
from incubate_lib.training.files import check_free, check_records

State = dict[str, Tensor]
NAMES = {width: f"vit_{size}_patch16_224" for width, size in {192: "tiny", 384: "small", 768: "base", 1024: "large"}.items()}
NAMES[1280] = "vit_huge_patch14_224"
WRAPPERS = {"module", "_orig_mod", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # DDP, compile, Lightning …
WITHOUT_QKV_BIAS = "vit_huge_patch14_clip_224"
AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")  # under which files keep a moving average of the weights


def import_released(
    files: Sequence[str | Path], folder: str | Path, *, name: str | None = None, num_heads: int | None = None, ema: bool = False,
    log: Callable[[str], object] = str,
) -> tuple[ModelSettings, list[int]]:  # fmt: skip
    """Write the network of one file, or the one assembled from K files, as a timm folder; return settings and depths.

    `log` is told of moving averages in the files, which `ema` has read instead.
    Images are to be normalised as in the released recipe, by ImageNet's mean and deviation. Raises SettingsError as
    `read_released` does, and if the folder is not free.
    """
    check_free(folder)
    settings, model, depths = read_released(files, name=name, num_heads=num_heads, ema=ema, log=log)
    arguments = settings.timm_arguments() | {"num_classes": model.num_classes}
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if settings.in_chans != 3:
        mean, std = ([sum(values) / 3] * settings.in_chans for values in (mean, std))
    save_timm(model, folder, arguments, model_shape(settings), mean, std, DEFAULT_CROP_PCT)
    return settings, depths


def read_released(
    files: Sequence[str | Path], *, name: str | None = None, num_heads: int | None = None, ema: bool = False,
    log: Callable[[str], object] = str,
) -> tuple[ModelSettings, nn.Module, list[int]]:  # fmt: skip
    """Return the network in one checkpoint, or that of K hybrids, stage i of file i, and the blocks of each stage; a plain
    state dict is one stage.

    `name` is the timm architecture and `num_heads` the number of heads, where they cannot be inferred. Raises
    SettingsError for a file that cannot be read safely, whose copies disagree, or that is not a plain ViT classifier,
    with the first names and shapes, and for files in another order than their target modules.
    """
    found = [_read(Path(os.path.expanduser(path)), ema, log) for path in files]
    stages = found[0]
    if len(files) > 1:
        _check_order(files, found)
        stages = [file[i] for i, file in enumerate(found)]
    whole = _joined(stages)
    settings = settings_of(whole, str(files[0]), name, num_heads)
    depths = [_depth(stage) for stage in stages]
    if not all(depths):
        raise SettingsError(f"{files[0]}: stage {depths.index(0)} has no blocks")
    with torch.device("meta"):  # random weights would take longer than everything else
        model = build_model(settings, settings.depth, len(whole["head.weight"]))
    model.to_empty(device="cpu")
    partition = divide(chain_of(settings, settings.depth), depths)
    own = model.state_dict()
    for i, stage in enumerate(stages):
        path = files[i if len(files) > 1 else 0]
        given = counted_through(partition, i, stage)
        check_fits(partition.part(i, own), given, f"{path}, stage {i}" if len(stages) > 1 else str(path))
        model.load_state_dict(given, strict=False)
    return settings, model.eval(), depths


def _read(path: Path, ema: bool, log: Callable[[str], object]) -> list[State]:
    """Return the state dicts of a checkpoint's stages; all copies of a weight in it must be equal."""
    raw = _load(path)
    average = next((key for key in AVERAGES if isinstance(raw.get(key), dict)), None)
    if ema:
        refuse(average is None, f"{path} holds no moving average ({', '.join(AVERAGES)}); it has {_some(raw)}")
        raw = {"model": raw[average]}
    elif average:
        log(f"{path} also holds a moving average of the weights, {average}: --ema reads that instead")
    stages = raw.get("model_stages") or []
    if not isinstance(stages, list | tuple):
        raise SettingsError(f"{path}: model_stages is a {type(stages).__name__}, where a list of state dicts should be")
    stages = [_tensors(path, stage, raw) for stage in stages]
    given = raw.get("model", raw.get("state_dict", None if stages else raw))
    flat, copies = {}, {}
    for key, tensor in ({} if given is None else _tensors(path, given, raw)).items():
        in_stage = re.fullmatch(r"stages\.(\d+)\.(.+)", key)
        place = copies.setdefault(int(in_stage[1]), {}) if in_stage else flat
        place[in_stage[2] if in_stage else key] = tensor
    copies = [copies[i] for i in sorted(copies)]
    whole = flat or _joined(stages or copies)
    for what, parts in {"model_stages": stages, "stages.*": copies}.items():
        if not parts:
            continue
        again = _joined(parts)
        check_fits(whole, again, f"{path}: {what}", "the flat state dict")
        if unequal := [f"{key} {tuple(again[key].shape)}" for key in whole if not _equal(whole[key], again[key])]:
            raise SettingsError(f"{path}: {what} disagrees with the flat state dict in {first(unequal)}")
    return stages or copies or [whole]


def _load(path: Path) -> dict[str, Any]:
    """Return what is in a torch file, without running anything that is in it."""
    if path.exists() and not path.is_file():
        raise SettingsError(f"cannot read {path}: it is a folder or a device, not a file")
    try:
        if is_zip := zipfile.is_zipfile(path):
            check_records(path)
        # the released code's options are a class without code; what torch thinks of sparse tensors is no help to anybody
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            raw = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        why = "it is cut short" if error.errno == errno.EINVAL else error.strerror or error  # torch seeks before its beginning
        raise SettingsError(f"cannot read {path}: {why}") from None
    except Exception as error:  # unpickling a damaged file raises anything
        if culprit := re.search(r"GLOBAL (\S+)", str(error)):
            raise SettingsError(
                f"{path} is refused: it holds {culprit[1]}, and reading that could run code; "
                "only tensors, plain values and argparse.Namespace are read"
            ) from None
        raise SettingsError(f"{path} is not a sound torch checkpoint: {in_a_line(error)}") from None
    if not isinstance(raw, dict):
        raise SettingsError(f"{path} holds a {type(raw).__name__}, not a checkpoint or state dict")
    return raw


def _tensors(path: Path, state: Any, raw: dict[str, Any]) -> State:
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        where = "where one should be (under model, state_dict or model_stages, or alone)"
        raise SettingsError(f"{path} holds no state dict {where}; it has {_some(raw)}")
    named: State = {}
    for key, tensor in state.items():
        name = ".".join(part for part in str(key).split(".") if part not in WRAPPERS)
        if name in named and not _equal(named[name], tensor):
            raise SettingsError(f"{path} holds {name} twice, with different values, once as {key}")
        named[name] = tensor
    if hollow := [f"{name} {tuple(tensor.shape)}" for name, tensor in named.items() if not _has_data(tensor)]:
        raise SettingsError(f"{path} holds {first(hollow)} without all of its numbers")
    check_values(named, str(path))
    return named


def _some(named: dict[str, Any]) -> str:
    """Return the first names in a file, and how many there are besides."""
    names = ", ".join(shortened(key) for key in list(named)[:5]) or "nothing"
    return names + (f" and {len(named) - 5} more" if len(named) > 5 else "")


def _has_data(tensor: Tensor) -> bool:
    """Whether each number is stored: a few bytes can stand for any number of equal ones."""
    return not tensor.is_meta and (tensor.layout != torch.strided or tensor.untyped_storage().nbytes() >= tensor.nbytes)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _depth(stage: State) -> int:
    return max((int(m[1]) + 1 for m in (re.match(r"blocks\.(\d+)\.", key) for key in stage) if m), default=0)


def _joined(stages: Sequence[State]) -> State:
    """Return one flat state dict of all stages, blocks counted through."""
    whole, before = {}, 0
    for stage in stages:
        for key, tensor in stage.items():
            key = re.sub(r"^blocks\.(\d+)\.", lambda m, before=before: f"blocks.{before + int(m[1])}.", key)
            if key in whole:
                raise SettingsError(f"two stages hold {key}")
            whole[key] = tensor
        before += _depth(stage)
    return whole


def _check_order(files: Sequence[str | Path], found: list[list[State]]) -> None:
    """Raise SettingsError unless file i can be the hybrid of target module i.

    The meta stages of all hybrids are the same and shallow, so a stage i that another file has, too, or deeper, is
    not the target: shells sort module 10 before module 2.
    """
    for path, stages in zip(files, found, strict=True):
        if len(stages) != len(files):
            raise SettingsError(f"{path} has {len(stages)} stages, but {len(files)} files are given; give one for each stage")
    for i, path in enumerate(files):
        own = found[i][i]
        for j, other in enumerate(stages[i] for stages in found):
            same = i != j and own.keys() == other.keys() and all(_equal(own[key], other[key]) for key in own)
            if same or _depth(own) < _depth(other):
                message = "the same as" if same else f"of {_depth(own)} blocks, {_depth(other)}"
                raise SettingsError(
                    f"{path} is given as number {i + 1}, but its stage {i} is {message} in {files[j]}; "
                    "give the files in the order of their target modules"
                )


def settings_of(whole: State, path: str, name: str | None, num_heads: int | None) -> ModelSettings:
    """Infer the architecture from names and shapes."""
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "head.weight")
    if missing := [key for key in needed if key not in whole]:
        raise SettingsError(
            f"{path} is not a plain Vision Transformer's classifier of timm: {', '.join(missing)} is missing; "
            f"it has {_some(whole)}"
        )
    patches, positions = whole["patch_embed.proj.weight"].shape, whole["pos_embed"].shape
    grid = math.isqrt(max(0, positions[1] - 1)) if len(positions) == 3 else 0
    if not grid or grid**2 + 1 != positions[1] or len(patches) != 4 or patches[2] != patches[3]:
        raise SettingsError(
            f"{path}: pos_embed {tuple(positions)} and patch_embed.proj.weight {tuple(patches)} are not those of a class "
            "token and a square grid of square patches"
        )
    width, hidden = positions[2], len(whole["blocks.0.mlp.fc1.weight"])
    qkv_bias, pre_norm = "blocks.0.attn.qkv.bias" in whole, "norm_pre.weight" in whole
    if name is None:
        name = NAMES.get(width, NAMES[768]) if qkv_bias else WITHOUT_QKV_BIAS
    name = name.partition(".")[0]  # what follows names timm's weights; here they are the file's
    with torch.device("meta"):
        usual = build_model(_model_settings("--model", name=name), 1, 2)
    if num_heads is None:
        num_heads = usual.blocks[0].attn.num_heads if usual.embed_dim == width else width // 64
        if usual.embed_dim != width and width % 64:
            raise SettingsError(f"{path}: width {width} does not determine the number of heads; give --num-heads")
    options = {} if qkv_bias else {"qkv_bias": False}
    if pre_norm == isinstance(usual.norm_pre, nn.Identity):
        options["pre_norm"] = pre_norm
    if hidden != 4 * width:
        options["mlp_ratio"] = hidden / width
    if num_heads < 1 or width % num_heads:
        raise SettingsError(f"--num-heads {num_heads} does not divide the width, {width}")
    return _model_settings(
        path, name=name, img_size=grid * patches[2], patch_size=patches[2], embed_dim=width, depth=_depth(whole),
        num_heads=num_heads, in_chans=patches[1], options=options,
    )  # fmt: skip


def _model_settings(where: str, **fields: Any) -> ModelSettings:
    try:
        return ModelSettings(**fields)
    except ValidationError as error:
        raise SettingsError(f"{where}: {error_message(error, ModelSettings)}") from None
