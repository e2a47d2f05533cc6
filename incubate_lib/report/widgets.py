"""Widgets to browse finished runs in JupyterLab. They only look: a widget's value is never an input of a run."""

import ipywidgets
import pandas as pd
from IPython.display import display

from incubate_lib.report.plots import learning_curves
from incubate_lib.report.tables import Results


def browse(results: Results) -> ipywidgets.Widget:
    """Return a menu of all phases that shows the learning curves of the chosen one."""
    columns = ["strategy", "seed", "phase", "module_index"]
    groups = {}
    for (strategy, seed, phase, index), table in results.curves.groupby(columns, dropna=False, sort=False):
        module = "" if pd.isna(index) else f" module {int(index) + 1}"
        groups[f"{strategy}, seed {seed}: {phase}{module}"] = table
    menu = ipywidgets.Dropdown(options=list(groups), description="phase", layout={"width": "36rem"})
    shown = ipywidgets.Output()

    def show(_: object = None) -> None:
        shown.clear_output(wait=True)
        with shown:
            if menu.value is not None:
                display(learning_curves({menu.value: groups[menu.value]}))

    menu.observe(show, names="value")
    show()
    return ipywidgets.VBox([menu, shown])
