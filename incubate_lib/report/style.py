"""How figures look: a colour, marker and line style a strategy; markers and line styles tell what colours tell too."""

import io

from matplotlib import figure as mpl_figure
from matplotlib.patches import Patch

# Okabe and Ito's colours, which people with any colour vision can tell apart; #882255 is Tol's, dark where a blue stands by.
STYLE = {
    "end_to_end": {"color": "#000000", "marker": "o", "linestyle": "-"},
    "deep_incubation": {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    "deep_incubation_stack": {"color": "#D55E00", "marker": "^", "linestyle": "-."},
    "deep_incubation_identity": {"color": "#009E73", "marker": "D", "linestyle": ":"},
    "recommended": {"color": "#009E73", "marker": "h", "linestyle": "-"},
    "deep_incubation_mat": {"color": "#56B4E9", "marker": ">", "linestyle": "-."},
    "end_to_end_short": {"color": "#555555", "marker": ".", "linestyle": ":"},
    "stacking": {"color": "#E69F00", "marker": "P", "linestyle": "-."},
    "growing": {"color": "#CC79A7", "marker": "v", "linestyle": "-"},
    "random_modules": {"color": "#555555", "marker": "X", "linestyle": ":"},
    "imitation": {"color": "#56B4E9", "marker": "<", "linestyle": "--"},
    "end_to_end_longer": {"color": "#000000", "marker": "*", "linestyle": "--"},
    "end_to_end_low_resolution": {"color": "#555555", "marker": "d", "linestyle": "-"},
    "mat": {"color": "#D55E00", "marker": "^", "linestyle": "-"},
    "mat_random": {"color": "#882255", "marker": "v", "linestyle": "--"},
    "mat_gradient_norm": {"color": "#009E73", "marker": "D", "linestyle": "-."},
    "mat_inverted": {"color": "#CC79A7", "marker": "X", "linestyle": ":"},
    "mat_multirate": {"color": "#E69F00", "marker": "P", "linestyle": "--"},
    "mat_exact": {"color": "#56B4E9", "marker": "H", "linestyle": "-"},
}
SPARE = [{"color": c, "marker": m, "linestyle": "-"} for c, m in zip(("#CC79A7", "#E69F00", "#56B4E9"), "vPX", strict=True)]
ONE_BY_ONE = [  # looks of curves that are no strategies
    "end_to_end", "deep_incubation", "deep_incubation_stack", "deep_incubation_identity", "growing", "stacking", "imitation",
]  # fmt: skip
FROZEN, TRAINED = "#D9D9D9", "#F5B041"
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}  # beneath words on what is hatched


class Figure(mpl_figure.Figure):
    """A figure that shows itself in a notebook, without pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def style(strategy: str) -> dict[str, str]:
    """Return colour, marker and line style of a strategy, the same in every figure."""
    return STYLE.get(strategy) or SPARE[sum(map(ord, strategy)) % len(SPARE)]


def filling(trained: bool) -> dict[str, str]:
    """Return how a part of a network is filled: by colour and hatch, whether it trains or is frozen."""
    return {"edgecolor": "black"} | ({"facecolor": TRAINED} if trained else {"facecolor": FROZEN, "hatch": "//"})


def trained_and_frozen() -> list[Patch]:
    """Return what a legend says of `filling`."""
    return [Patch(label=name, **filling(trained)) for name, trained in (("trained", True), ("frozen, never updated", False))]
