"""Whether fine-tuning made a network worse, and what to try then: one sentence, written from the records."""

import math
from collections.abc import Iterable
from statistics import fmean, stdev

from incubate_lib.pipeline.graph import Node
from incubate_lib.report.tables import label


def is_lower(before: list[float], after: list[float], images: int) -> bool:
    """Whether accuracies (0 … 1, one a seed) fell by more than chance explains.

    The mean loss must exceed two standard errors, of judging by so many images and, with several seeds, over these.
    """
    b, a, losses = fmean(before), fmean(after), [x - y for x, y in zip(before, after, strict=True)]
    error = math.sqrt((b * (1 - b) + a * (1 - a)) / images)
    if len(losses) > 1:
        error = max(error, stdev(losses) / math.sqrt(len(losses)))
    return fmean(losses) > 2 * error


def lowered(nodes: Iterable[Node]) -> str:
    """Say of which strategies fine-tuning lowered the accuracy, and what to try: a line each, nothing where it did not.

    `nodes` are phases of any kind and number of seeds, such as `Plan.finals.values()`; finished fine-tuning counts.
    """
    tuned: dict[str, list[Node]] = {}
    for node in nodes:
        if node.settings.phase == "finetune" and node.summary():
            tuned.setdefault(node.strategy, []).append(node)
    lines = []
    for name, group in tuned.items():
        summaries = [node.summary() for node in group]
        before, after = ([s[key] for s in summaries] for key in ("start_accuracy", "accuracy"))
        if is_lower(before, after, summaries[0]["judge_images"]):
            strategy = group[0].experiment.settings.strategies[name]
            shorter = "larger strategies.{}.shares" if strategy.shares else "fewer strategies.{}.phases.finetune.epochs"
            lines.append(
                f"Fine-tuning lowered {label(name)} from {100 * fmean(before):.1f} to {100 * fmean(after):.1f} % "
                f"({_seeds(group)}; more than chance explains). Try a lower strategies.{name}.phases.finetune.lr (it was "
                f"{group[0].settings.training.lr:g}), or {shorter.format(name)}."
            )
    return "\n".join(lines)


def _seeds(group: list[Node]) -> str:
    return f"mean of {len(group)} seeds" if len(group) > 1 else "one seed"
