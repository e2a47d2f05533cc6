"""The nominal speed of GPUs. No torch: a name that is not known is refused before it is imported."""

import re
from pathlib import Path

import yaml

from incubate_lib.config.errors import nearest, refuse

PEAKS = yaml.safe_load(Path(__file__).with_name("peaks.yaml").read_text())  # TFLOP/s of GPUs: bfloat16, float32
# assumed where nothing is said; a realistic ceiling for a ViT-B is 0.7, many runs reach 0.1
DEVICE, SHARE = "H100", 0.4


def peak_flops(name: str, precision: str) -> float | None:
    """Return the nominal dense FLOP/s of a GPU by its name; None if it is not known, or float32 really is TF32."""
    found = next((peaks for key, peaks in PEAKS.items() if re.search(rf"\b{key}\b", name)), (None, None))
    if precision == "float32":
        import torch

        if torch.get_float32_matmul_precision() != "highest":
            return None
    peak = found[precision == "float32"]
    return peak and peak * 1e12


def check_stated(device: str, share: float) -> None:
    """Raise SettingsError for a device whose peak is not known, and for a share of it that none can have."""
    refuse(not 0 < share <= 1, f"the share of the peak is {share:g}; it must be above 0 and at most 1")
    refuse(
        device not in PEAKS, f"the peak of {device!r} is not known; {nearest(device, PEAKS)}; or measure it with `incubate bench`"
    )
