"""How figures look: a colour, marker and line style a strategy; markers and line styles distinguish what colours distinguish."""

import io

from matplotlib import figure as mpl_figure
from matplotlib.patches import Patch

from incubate_lib.report.words import LOOKS, about

SPARE = {"v": "#CC79A7", "P": "#E69F00", "X": "#56B4E9"}  # marker → colour
ONE_BY_ONE = LOOKS["one_by_one"]  # whose looks curves have that are of no strategy
FROZEN, TRAINED = "#D9D9D9", "#F5B041"
# beneath words on what is hatched
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}


class Figure(mpl_figure.Figure):
    """A figure that shows itself in a notebook, without pyplot and its global state."""

    def png(self, dpi: int = 100) -> bytes:
        """Return the figure as a PNG file."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=dpi)
        return buffer.getvalue()

    def svg(self) -> bytes:
        """Return the figure as an SVG file: sharp at any size; its letters are drawn, so that no font is missing."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()


def style(strategy: str) -> dict[str, str]:
    """Return colour, marker and line style of a strategy, the same in every figure."""
    marker, color = list(SPARE.items())[sum(map(ord, strategy)) % len(SPARE)]
    return about(strategy).get("look") or {"color": color, "marker": marker, "linestyle": "-"}


def filling(trained: bool) -> dict[str, str]:
    """Return how a part of a network is filled: by colour and hatch, whether it trains or is frozen."""
    look = {"facecolor": TRAINED} if trained else {"facecolor": FROZEN, "hatch": "//"}
    return {"edgecolor": "black"} | look


def trained_and_frozen() -> list[Patch]:
    """Return what a legend says of `filling`."""
    names = {"trained": True, "frozen, never updated": False}
    return [Patch(label=name, **filling(trained)) for name, trained in names.items()]
