"""What the paper's own runs cost: the authors' hours beside FLOPs that are counted here."""

import pandas as pd

from incubate_lib.data.counts import IMAGENET
from incubate_lib.pipeline.graph import closure
from incubate_lib.report.planner.forecast import open_plan

PUBLISHED_HOURS = {  # A100-hours: end to end for 300 epochs, Deep Incubation (arXiv 2212.04129)
    "imagenet-vit-b": (290, 390),
    "imagenet-vit-l": (1090, 890),
    "imagenet-vit-h": (4790, 2720),
}


def published_costs(peak: float = 312e12) -> pd.DataFrame:
    """Return the authors' FLOPs and hours on A100s, and the share of the peak (FLOP/s) that both together imply.

    FLOPs are counted here, relative to 300 epochs end to end at 100+100, 50+50 and 25+25 epochs; hours are theirs.
    """
    rows = []
    for preset, (whole_hours, pieces_hours) in PUBLISHED_HOURS.items():
        names = ["end_to_end_300", "deep_incubation", "deep_incubation_50", "deep_incubation_25"]
        todo = open_plan(preset, strategies=names, images=IMAGENET[0], classes=IMAGENET[-1])
        flops = [sum(todo.flops[n.key] for n in closure([todo.finals[name, 0]])) for name in names]
        budgets = [f"{epochs} / end to end" for epochs in ("100+100", "50+50", "25+25")]
        row = {"network": preset.removeprefix("imagenet-")}
        row |= {budget: one / flops[0] for budget, one in zip(budgets, flops[1:], strict=True)}
        row |= {"end to end, hours": whole_hours, "… share of peak": flops[0] / (whole_hours * 3600 * peak)}
        row |= {"in pieces, hours": pieces_hours, "… share of peak ": flops[1] / (pieces_hours * 3600 * peak)}
        rows.append(row)
    return pd.DataFrame(rows).set_index("network")
