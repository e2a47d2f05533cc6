"""How strategies, phases and amounts are called, the same in every table, figure and widget."""

from typing import Any

BASELINE = "end_to_end"


def label(strategy: str) -> str:
    """Return a strategy's name for people."""
    known = {
        "end_to_end": "end to end",
        "deep_incubation": "Deep Incubation, random start (paper)",
        "deep_incubation_stack": "Deep Incubation, stack start",
        "deep_incubation_identity": "Deep Incubation, identity start",
        "recommended": "Deep Incubation, recommended",
        "deep_incubation_mat": "Deep Incubation with MAT",
        "stacking": "meta model, stacked, no incubation",
        "growing": "meta model, grown, no incubation",
        "random_modules": "random modules, no meta model",
        "imitation": "modules imitate the meta model",
        "end_to_end_longer": "end to end, K workers as long",
        "end_to_end_low_resolution": "end to end, small images first",
        "end_to_end_short": "end to end, shorter",
        "mat": "MAT",
        "mat_random": "random units, as many",
        "mat_gradient_norm": "largest gradients, as many",
        "mat_inverted": "smallest eigenvalues, as many",
        "mat_multirate": "Multirate",
        "mat_exact": "MAT, error everywhere",
    }
    return known.get(strategy, strategy.replace("_", " "))


ISOLATES = {  # what a strategy is there to show, next to Deep Incubation
    "stacking": "whether the meta model's weights, copied into the deep network, do without incubation",
    "growing": "the same with blocks that begin as nothing: the deep network starts out as the meta model",
    "random_modules": "whether the recipe of fine-tuning alone does it, without any weights of a meta model",
    "imitation": "whether modules must learn from labels, or only what the meta module computes",
    "end_to_end_longer": "whether K workers had better trained the whole network together, as long and without loss",
    "end_to_end_low_resolution": "whether another saving, small images first, does as well",
}


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
