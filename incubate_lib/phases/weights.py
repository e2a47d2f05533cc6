"""Weights from a file: found, checked against what was planned, brought to the model's resolution, never unpickled.
And into a file: a network as a folder that timm loads, whole or not at all.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from incubate_lib.config import ModelSettings, SettingsError, data_folder, in_a_line
from incubate_lib.training.files import check_free, read_json, unfinished


def weights_file(path: str | Path) -> Path:
    """Return the .safetensors file that a user means: the file, or `model.safetensors` in a folder (of a phase, of timm).

    A relative path begins in the data folder, so that nothing depends on where a notebook's kernel was started.
    """
    path = data_folder() / os.path.expanduser(path)
    file = path / "model.safetensors" if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise SettingsError(f"weights {path}: there is no {file}; give a .safetensors file or a folder with model.safetensors")
    if file.suffix != ".safetensors":
        raise SettingsError(f"weights {path}: only .safetensors files are read; `incubate import` turns a checkpoint into one")
    return file


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_into(model: Any, path: str | Path, expected_sha256: str | None = None) -> Any:
    """Load weights into a network, resampled as its file in timm does it if images are of another size.

    What stands on a backbone gets its backbone's weights, all but those of the classifier, unless the file has all of it.
    Raises SettingsError when the file is not the one that was planned with, is damaged, holds what cannot be weights, or
    does not fit, with the first names.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from incubate_lib.method.sizes import at_size

    file = weights_file(path)
    summary = read_json(file.with_name("summary.json")) if file.name == "model.safetensors" else None  # it is a phase's result
    recorded = summary.get("weights_sha256") if isinstance(summary, dict) else None
    found = sha256(file) if expected_sha256 or recorded else None
    if expected_sha256 and found != expected_sha256:
        raise SettingsError(f"{file} is not the file it was when this experiment began; give the experiment another name")
    if recorded and found != recorded:
        raise SettingsError(f"{file} is damaged: it is not the file that the summary.json beside it speaks of")
    try:
        given = load_file(file)
    except SafetensorError as error:
        raise SettingsError(f"{file} is not a sound .safetensors file: {error}") from None
    whole, backbone = model, getattr(model, "backbone", None)
    if backbone is not None and not given.keys() & (model.state_dict().keys() - backbone.state_dict().keys()):
        heads = backbone.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{name}." for name in ([heads] if isinstance(heads, str) else heads))
        given, model = {name: tensor for name, tensor in given.items() if not name.startswith(heads)}, backbone
    check_values(given, str(file), model.state_dict())
    with contextlib.suppress(Exception):  # of other weights than those of this network, which the next line reports
        given = at_size(given, model)
    check_fits(model.state_dict(), given, str(file))
    _check_config(model, file)
    model.load_state_dict(given)
    return whole


def check_fits(own: dict[str, Any], given: dict[str, Any], what: str, whose: str = "the model") -> None:
    """Raise SettingsError with the first names and shapes that differ between a model and what should go into it."""
    wrong = [f"{name}: the file has {tuple(given[name].shape)}, {whose} {tuple(own[name].shape)}"
             for name in own if name in given and given[name].shape != own[name].shape]  # fmt: skip
    missing = [f"{name} is missing" for name in own if name not in given]
    unknown = [f"{name} is not in {whose}" for name in given if name not in own]
    wrong += [one for pair in itertools.zip_longest(missing, unknown) for one in pair if one]  # both are seen at once
    if wrong:
        raise SettingsError(f"{what} does not fit {whose}: {first(wrong)}")


def check_values(given: dict[str, Any], what: str, own: dict[str, Any] | None = None) -> None:
    """Raise SettingsError with the first names of tensors that cannot be weights: of whole or complex numbers, not finite.

    What is of whole numbers in the model itself (`own`), such as the count of batches that batch norm keeps, may be so.
    """
    import torch

    wrong = []
    for name, tensor in given.items():
        counts = own is not None and name in own and not own[name].is_floating_point()
        if counts and tensor.dtype == own[name].dtype:
            continue
        if counts or not tensor.is_floating_point() or tensor.layout != torch.strided:
            wrong.append(f"{name} is of {str(tensor.dtype).removeprefix('torch.')}, {str(tensor.layout).removeprefix('torch.')}")
        elif bad := int((~tensor.float().isfinite()).sum()):  # as float32, in which all is trained
            wrong.append(f"{name} has {bad} of {tensor.numel()} numbers that are NaN or infinite")
    if wrong:
        raise SettingsError(f"{what} holds no sound weights: {first(wrong)}")


def first(wrong: Sequence[str]) -> str:
    """Return the first three of many complaints, and how many there are besides."""
    return "; ".join(wrong[:3]) + (f", and {len(wrong) - 3} more" if len(wrong) > 3 else "")


# What the shapes of weights do not show: attributes of layers.
UNSEEN = ("num_heads", "eps", "global_pool", "pool_type", "stride", "padding", "dilation", "groups")


def _check_config(model: Any, file: Path) -> None:
    """Raise SettingsError where shapes agree and the network is another one: heads, eps, strides, pooling, activations.

    What the file's network was is in the config.json beside it, of timm (or of a phase of an earlier version), or in a phase's
    phase.json; without one there is no knowing.
    """
    import timm
    import torch

    beside = next((place for name in ("config.json", "phase.json") if (place := file.with_name(name)).exists()), None)
    config = beside and read_json(beside)
    if not isinstance(config, dict):
        return
    try:
        name, arguments = config.get("architecture"), config.get("model_args") or {}
        if "settings" in config:
            given = ModelSettings.model_validate(config["settings"]["model"])
            name, arguments = given.name, given.timm_arguments()
        elif "phase" in config:
            name, arguments = config["model"]["name"], config["model"] | config["model"]["options"]
        if not isinstance(name, str) or not timm.is_model(name):
            return
        arguments = {key: value for key, value in arguments.items() if key not in ("name", "options") and value is not None}
        with torch.device("meta"):
            other = timm.create_model(name, **arguments)
        ours, theirs = _unseen(model), _unseen(other)
    except Exception as error:  # what it holds is not of this project or of timm
        raise SettingsError(
            f"{file}: the {beside.name} beside it describes no network that timm knows: {in_a_line(error)}"
        ) from None
    if wrong := [f"{key} {theirs[key]}, the model {ours[key]}" for key in ours if theirs.get(key, ours[key]) != ours[key]]:
        raise SettingsError(f"{file} does not fit the model: by its {beside.name} ({name}) it has {first(wrong)}")


def _unseen(model: Any) -> dict[str, Any]:
    """Return what the shapes of a network's weights do not show: these attributes of its layers, and activations."""
    unseen = {}
    for path, layer in model.named_modules():
        unseen |= {f"{path}.{key}".lstrip("."): vars(layer)[key] for key in UNSEEN if key in vars(layer)}
        if vars(layer).get("stride", 0) == vars(layer).get("kernel_size", 1) and hasattr(layer, "weight"):
            unseen[f"{path}.stride"] = "as its kernel"  # of patches, which are resampled
        if "activation" in type(layer).__module__:
            unseen[path] = type(layer).__name__
    return unseen


def save_timm(
    model: Any, folder: str | Path, arguments: dict[str, Any], shape: Sequence[int], mean: Sequence[float], std: Sequence[float],
    crop_pct: float, card: str | None = None, label_names: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write a timm model as timm does (config.json, model.safetensors), and a README.md if a card is given; return the path.

    `arguments` are those that `timm.create_model` needs besides the name, `shape` the images: C, H, W, `label_names` the
    classes' names in the order of the logits, if they are known. The folder appears whole or not at all. Raises
    SettingsError if something is there already or it cannot be written.
    """
    from timm.models import save_for_hf

    folder = check_free(folder)
    own = model.pretrained_cfg
    model.pretrained_cfg = {  # nothing of the weights that timm has under this name
        "architecture": own["architecture"], "num_classes": model.num_classes, "input_size": list(shape),
        "fixed_input_size": own.get("fixed_input_size", False), "mean": list(mean), "std": list(std),
        "crop_pct": crop_pct, "crop_mode": "center", "interpolation": "bicubic", "classifier": own["classifier"],
    } | ({"first_conv": own["first_conv"]} if shape[0] == 3 else {})  # fmt: skip  # timm < 1.0.31 would adapt any other
    half = unfinished(folder)
    try:
        half.mkdir(parents=True)
        more = {"label_names": list(label_names)} if label_names else {}
        save_for_hf(model, half, model_config=more, model_args=arguments, safe_serialization=True)
        shutil.copymode(half / "config.json", half / "model.safetensors")  # which safetensors lets only its owner read
        if card is not None:
            (half / "README.md").write_text(card)
        os.replace(half, folder)
    except OSError as error:
        raise SettingsError(f"cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return folder
