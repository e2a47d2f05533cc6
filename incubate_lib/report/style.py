"""How figures look: a colour, marker and line style a strategy; markers and line styles tell what colours tell too."""

import io

from matplotlib import figure as mpl_figure
from matplotlib.patches import Patch

from incubate_lib.report.words import STRATEGIES

STYLE = {strategy: about["look"] for strategy, about in STRATEGIES.items()}
SPARE = [{"color": c, "marker": m, "linestyle": "-"} for c, m in zip(("#CC79A7", "#E69F00", "#56B4E9"), "vPX", strict=True)]
STARTS = ("deep_incubation", "deep_incubation_stack", "deep_incubation_identity")
ONE_BY_ONE = ("end_to_end", *STARTS, "growing", "stacking", "imitation")  # looks of curves that are no strategies
FROZEN, TRAINED = "#D9D9D9", "#F5B041"
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}  # beneath words on what is hatched


class Figure(mpl_figure.Figure):
    """A figure that shows itself in a notebook, without pyplot and its global state."""

    def png(self, dpi: int = 110) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=dpi)
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def style(strategy: str) -> dict[str, str]:
    """Return colour, marker and line style of a strategy, the same in every figure."""
    return STYLE.get(strategy) or SPARE[sum(map(ord, strategy)) % len(SPARE)]


def filling(trained: bool) -> dict[str, str]:
    """Return how a part of a network is filled: by colour and hatch, whether it trains or is frozen."""
    return {"edgecolor": "black"} | ({"facecolor": TRAINED} if trained else {"facecolor": FROZEN, "hatch": "//"})


def trained_and_frozen() -> list[Patch]:
    """Return what a legend says of `filling`."""
    return [Patch(label=name, **filling(trained)) for name, trained in (("trained", True), ("frozen, never updated", False))]
