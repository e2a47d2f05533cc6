"""Weights from a file: found, checked against what was planned, brought to the model's resolution, never unpickled."""

import hashlib
from pathlib import Path
from typing import Any

from incubate_lib.config import SettingsError


def weights_file(path: str | Path) -> Path:
    """Return the .safetensors file that a user means: the file, or `model.safetensors` in a folder (of a phase, of timm)."""
    path = Path(path).expanduser()
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise SettingsError(f"weights {path}: there is no {file}; give a .safetensors file or a folder with model.safetensors")
    if file.suffix != ".safetensors":
        raise SettingsError(f"weights {path}: only .safetensors files are read; `incubate import` turns a checkpoint into one")
    return file


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_into(model: Any, path: str | Path, expected_sha256: str | None = None) -> Any:
    """Load weights into a timm ViT, position embedding and patches resampled by timm if the resolution differs.

    Raises SettingsError when the file is not the one that was planned with, or does not fit, with the first names.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from timm.models.vision_transformer import checkpoint_filter_fn

    file = weights_file(path)
    if expected_sha256 and sha256(file) != expected_sha256:
        raise SettingsError(f"{file} is not the file it was when this experiment began; give the experiment another name")
    try:
        given = load_file(file)
    except SafetensorError as error:
        raise SettingsError(f"{file} is not a sound .safetensors file: {error}") from None
    if "pos_embed" in given and given["pos_embed"].ndim == 3:
        given = checkpoint_filter_fn(given, model, interpolation="bicubic", antialias=True)
    check_fits(model.state_dict(), given, str(file))
    model.load_state_dict(given)
    return model


def check_fits(own: dict[str, Any], given: dict[str, Any], what: str) -> None:
    """Raise SettingsError with the first names and shapes that differ between a model and what should go into it."""
    wrong = [f"{name}: the file has {tuple(given[name].shape)}, the model {tuple(own[name].shape)}"
             for name in own if name in given and given[name].shape != own[name].shape]  # fmt: skip
    wrong += [f"{name} is missing" for name in own if name not in given]
    wrong += [f"{name} is not in the model" for name in given if name not in own]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise SettingsError(f"{what} does not fit the model: {'; '.join(wrong[:3])}{more}")
