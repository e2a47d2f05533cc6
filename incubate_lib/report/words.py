"""How strategies, phases, scores and amounts are called, the same in every table, figure and widget."""

from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from incubate_lib import tasks
from incubate_lib.config import SettingsError
from incubate_lib.config.members import PHASES
from incubate_lib.config.members import STRATEGIES as KINDS

BASELINE = "end_to_end"
TEMPLATES = Path(__file__).parent / "templates"
LOOKS = yaml.safe_load((TEMPLATES / "looks.yaml").read_text())
STRATEGIES = LOOKS["strategies"]
# what a control is there to show, next to Deep Incubation
ISOLATES = {strategy: about["isolates"] for strategy, about in STRATEGIES.items() if "isolates" in about}


def about(strategy: str) -> dict[str, Any]:
    """Return label and look of a strategy, as far as there are any: of a known one, or of one that is called as its kind."""
    kind = vars(KINDS[strategy]) if strategy in KINDS else {}
    return {name: kind[name] for name in ("label", "look") if kind.get(name)} | STRATEGIES.get(strategy, {})


def label(strategy: str) -> str:
    """Return a strategy's name for people."""
    return about(strategy).get("label", strategy.replace("_", " "))


def metric_of(*tables: Any) -> tasks.Metric:
    """Return the metric that the scores of tables are of; of tables that do not say, the metric of classification.

    SettingsError for several, which cannot be compared, and for one that no task has.
    """
    names = list(dict.fromkeys(name for table in tables for name in table.get("metric", ()) if isinstance(name, str)))
    if len(names) > 1:
        raise SettingsError(f"scores of several metrics cannot be compared: {', '.join(names)}")
    try:
        return tasks.metric(names[0]) if names else tasks.get().score
    except KeyError:
        raise SettingsError(f"no task has the metric {names[0]!r}, of which a table's scores are") from None


def flop_unit(flops: float) -> tuple[str, float]:
    """Return a unit in which the number reads well, and its size."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if flops >= size:
            return unit, size
    return "GFLOP", 1e9


def seconds_text(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"


def in_yaml(values: dict[str, Any]) -> str:
    """Return values as a settings file has them: what has no parts of its own stands on one line."""
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def phase_name(phase: str, module_index: Any, num_modules: int = 0) -> str:
    """Return a phase's name for people, modules counted from one."""
    if pd.isna(module_index):
        return PHASES[phase].label
    return f"module {int(module_index) + 1}" + (f" of {num_modules}" if num_modules else "")
