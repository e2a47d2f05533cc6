"""Widgets to browse finished runs in JupyterLab. They only look: a widget's value is never an input of a run."""

import ipywidgets
import pandas as pd

from incubate_lib.report.plots import learning_curves
from incubate_lib.report.tables import Results


def browse(results: Results) -> ipywidgets.Widget:
    """Return a menu of all phases that shows the learning curves of the chosen one.

    The picture is an image, not an output area: for those, clients that execute notebooks write back to the kernel in
    the middle of a cell, and one run in some dozens hung on it.
    """
    columns = ["strategy", "seed", "phase", "module_index"]
    groups = {}
    for (strategy, seed, phase, index), table in results.curves.groupby(columns, dropna=False, sort=False):
        module = "" if pd.isna(index) else f" module {int(index) + 1}"
        groups[f"{strategy}, seed {seed}: {phase}{module}"] = table
    menu = ipywidgets.Dropdown(options=list(groups), description="phase", layout={"width": "36rem"})
    shown = ipywidgets.Image(format="png")

    def show(_: object = None) -> None:
        if menu.value is not None:
            shown.value = learning_curves({menu.value: groups[menu.value]})._repr_png_()

    menu.observe(show, names="value")
    show()
    return ipywidgets.VBox([menu, shown])
