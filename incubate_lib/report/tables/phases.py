"""Tables of single phases: their settings, and in what these differ, their costs, their curves."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from incubate_lib.config import SettingsError
from incubate_lib.pipeline.graph import Node, Plan, closure


def settings_table(node: Node) -> pd.DataFrame:
    """Return the resolved settings of a phase, one row a field."""
    hidden = {"inputs": True, "format": True, "data": node.settings.data.unused_fields}
    flat = pd.json_normalize(node.settings.model_dump(mode="json", exclude=hidden))
    if node.settings.training and node.settings.training.lr_for_batch:
        flat["training.lr × batch_size / lr_for_batch"] = node.settings.training.peak_lr
    flat = flat.dropna(axis="columns").T.rename(columns={0: "value"})
    return flat[flat["value"].map(lambda value: value not in ({}, []))].rename_axis("setting")


def costs_table(node: Node) -> pd.DataFrame:
    """Return what a training image costs in each kind of phase that the node's strategy may have, counted, next to end to end."""
    other = "incubate" if node.settings.imitate else "imitate"  # a strategy does one or the other
    counted = node.experiment.facts.flops_per_image
    flops = pd.Series({key: value for key, value in counted.items() if not key.startswith(other)}) / 1e6
    table = pd.DataFrame({"MFLOP an image": flops.round(2), "of end to end": (flops / flops["target"]).round(3)})
    names = {"meta": "meta model", "target": "end to end, fine-tuning"}
    kinds = {"incubate": "hybrid, module {}", "imitate": "imitation, module {}", "target": "end to end, {} pixels"}

    def named(key: str) -> str:
        kind, _, number = key.partition("-")
        return names.get(key) or kinds[kind].format(int(number) + (kind != "target"))

    table.index = [named(key) for key in table.index]
    return table


def spent(summary: dict) -> str:
    """Say what a phase took, so that neither repeated augmentation nor left-out batches can hide anything."""
    text = f"Cost: {summary['train_flops'] / 1e9:.4g} GFLOP, {summary['train_seconds']:.3g} s "
    text += f"({summary['data_share']:.0%} of it waiting for images); {summary['steps']:,} updates, "
    text += f"{summary['images_seen']:,} images seen, "
    return text + f"{summary['distinct_images_per_epoch']:,} different ones an epoch."


def curves_of(node: Node) -> pd.DataFrame:
    """Return the evaluations of one phase."""
    return pd.DataFrame(node.folder.metrics())


def settings_difference(plan: Plan, strategies: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the resolved settings in which strategies differ: rows (phase, setting), a column a strategy.

    A phase that not all of them have is one row, `the whole phase`; all modules have the same settings and count once. Read from
    the first seed's phases, finished or not. None: all strategies. SettingsError for one that was not begun.
    """
    finals = {name: node for (name, _), node in reversed(plan.finals.items())}
    names = list(dict.fromkeys(name for name, _ in plan.finals)) if strategies is None else list(strategies)
    if unknown := [name for name in names if name not in finals]:
        raise SettingsError(f"strategy {unknown[0]} is not part of this run, which has: {', '.join(finals) or 'none'}")
    values: dict[tuple[str, str], dict[str, Any]] = {}
    have: dict[str, list[str]] = {}
    for name in names:
        phases = {node.settings.phase: node for node in reversed(closure([finals[name]]))}  # of modules the first
        for phase, node in reversed(phases.items()):
            have.setdefault(phase, []).append(name)
            for setting, value in settings_table(node)["value"].items():
                if setting not in ("phase", "seed", "module_index"):
                    values.setdefault((phase, setting), {})[name] = value
    rows = {(phase, "the whole phase"): {name: "yes" if name in those else "–" for name in names}
            for phase, those in have.items() if len(those) < len(names)}  # fmt: skip
    for (phase, setting), by_name in values.items():
        row = [str(by_name.get(name, "–")) for name in have[phase]]
        if len(set(row)) > 1:
            rows[phase, setting] = dict.fromkeys(names, "") | dict(zip(have[phase], row, strict=True))
    index = pd.MultiIndex.from_arrays([[key[i] for key in rows] for i in (0, 1)], names=["phase", "setting"])
    table = pd.DataFrame(list(rows.values()), index=index, columns=names)
    order = {phase: place for place, phase in enumerate(have)}
    return table.sort_index(level="phase", key=lambda level: level.map(order), sort_remaining=False, kind="stable")
