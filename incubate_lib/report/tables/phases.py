"""Tables of single phases: their settings, and in what these differ, their costs, their curves."""

from collections.abc import Sequence

import pandas as pd

from incubate_lib import tasks
from incubate_lib.config import SettingsError
from incubate_lib.config.members import PHASES
from incubate_lib.config.phase import identity
from incubate_lib.pipeline.graph import Node, Plan, closure

WHOLE = "the whole phase"  # in the place of a setting, where not all strategies have the phase


def settings_table(node: Node) -> pd.DataFrame:
    """Return the resolved settings of a phase, one row a field."""
    values = {name: value for name, value in identity(node.settings).items() if name not in ("inputs", "format")}
    unused = node.settings.data.unused_fields
    values["data"] = {name: value for name, value in values["data"].items() if name not in unused}
    flat = pd.json_normalize(values)
    if node.settings.training and node.settings.training.lr_for_batch:
        flat["training.lr × batch_size / lr_for_batch"] = node.settings.training.peak_lr
    flat = flat.dropna(axis="columns").T.rename(columns={0: "value"})
    return flat[flat["value"].map(lambda value: value not in ({}, []))].rename_axis("setting")


def costs_table(node: Node) -> pd.DataFrame:
    """Return what a training image costs in each kind of phase that the node's strategy may have, counted, next to end to end."""
    # of kinds that are set under one name a strategy has one
    own = {PHASES[name].group: PHASES[name].group for name in PHASES} | {node.kind.group: node.kind.name}
    counted = {
        key: flops for key, flops in node.facts.flops_at(node.settings.model.img_size).items()
        if (kind := key.partition("-")[0]) not in PHASES
        or (own[PHASES[kind].group] == kind and not (PHASES[kind].counted_apart and node.kind.name != kind))
    }  # fmt: skip
    flops = pd.Series(counted) / 1e6
    table = pd.DataFrame(
        {f"MFLOP {tasks.get(node.settings.task).a_sample}": flops.round(2), "of end to end": (flops / flops["target"]).round(3)}
    )
    names = {kind: PHASES[kind].counted_as for kind in PHASES}

    def named(key: str) -> str:
        kind, _, number = key.partition("-")
        if kind == "target":  # what all kinds cost that train the whole network
            return f"{names['end_to_end']}, {f'{number} pixels' if number else 'fine-tuning'}"
        if kind == "renewal":
            return f"{names['assemble']}, statistics renewed"
        what = f"module {int(number) + 1}" if number.isdigit() else number.replace("_", " ")
        return names.get(kind, kind) + (f", {what}" if what else "")

    table.index = [named(key) for key in table.index]
    return table


def spent(summary: dict) -> str:
    """Say what a phase took, so that neither repeated augmentation nor left-out batches can hide anything."""
    text = f"Cost: {summary['train_flops'] / 1e9:.4g} GFLOP, {summary['train_seconds']:.3g} s "
    text += f"({summary['data_share']:.0%} of it waiting for data); {summary['steps']:,} updates, "
    text += f"{summary['images_seen']:,} samples seen, "
    return text + f"{summary['distinct_images_per_epoch']:,} different ones an epoch."


def curves_of(node: Node) -> pd.DataFrame:
    """Return the evaluations of one phase, and which metric their score is of."""
    return pd.DataFrame(node.folder.metrics()).assign(metric=tasks.get(node.settings.task).score.name)


def settings_difference(plan: Plan, strategies: Sequence[str] | None = None) -> pd.DataFrame:
    """Return the resolved settings in which strategies differ: rows (phase, setting), a column a strategy.

    A phase that not all of them have is one row, `the whole phase`; all modules have the same settings and count once. Read from
    the first seed's phases, finished or not. None: all strategies. SettingsError for one that was not begun.
    """
    finals = {name: node for (name, _), node in reversed(plan.finals.items())}
    names = list(dict.fromkeys(name for name, _ in plan.finals)) if strategies is None else list(strategies)
    if unknown := [name for name in names if name not in finals]:
        raise SettingsError(f"strategy {unknown[0]} is not part of this run, which has: {', '.join(finals) or 'none'}")
    columns: dict[str, dict[tuple[str, str], str]] = {}
    for name in names:
        phases = {node.settings.seeded_as: node for node in reversed(closure([finals[name]]))}  # of modules the first
        columns[name] = {}
        for phase, node in reversed(phases.items()):
            settings = settings_table(node)["value"].drop(["phase", "seed", "module_index"], errors="ignore")
            columns[name] |= {(phase, WHOLE): "yes"} | {(phase, setting): str(value) for setting, value in settings.items()}
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    order = list(dict.fromkeys(phase for phase, _ in keys))
    rows: dict[tuple[str, str], list[str | None]] = {}
    for phase, setting in sorted(keys, key=lambda key: order.index(key[0])):
        absent = {name: "–" if setting == WHOLE or (phase, WHOLE) in columns[name] else None for name in names}
        row = [columns[name].get((phase, setting), absent[name]) for name in names]
        if len({*row} - {None}) > 1:
            rows[phase, setting] = row
    index = pd.MultiIndex.from_tuples(rows, names=["phase", "setting"])
    return pd.DataFrame(list(rows.values()), index=index, columns=names).fillna("")
