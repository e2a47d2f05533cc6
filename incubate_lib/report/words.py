"""How strategies, phases and amounts are called, the same in every table, figure and widget."""

from pathlib import Path
from typing import Any

import yaml

BASELINE = "end_to_end"
TEMPLATES = Path(__file__).parent / "templates"
LOOKS = yaml.safe_load((TEMPLATES / "looks.yaml").read_text())
STRATEGIES = LOOKS["strategies"]
# what a control is there to show, next to Deep Incubation
ISOLATES = {strategy: about["isolates"] for strategy, about in STRATEGIES.items() if "isolates" in about}


def label(strategy: str) -> str:
    """Return a strategy's name for people."""
    return STRATEGIES.get(strategy, {}).get("label", strategy.replace("_", " "))


def flop_unit(flops: float) -> tuple[str, float]:
    """Return a unit in which the number reads well, and its size."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= size:
            return unit, size
    return "GFLOP", 1e9


def seconds_text(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"


PHASES = {"meta": "meta model", "assemble": "assembly", "finetune": "fine-tuning", "end_to_end": "end to end"}


def phase_name(phase: str, module_index: Any, num_modules: int = 0) -> str:
    """Return a phase's name for people, modules counted from one."""
    if phase != "incubate":
        return PHASES[phase]
    return f"module {int(module_index) + 1}" + (f" of {num_modules}" if num_modules else "")
