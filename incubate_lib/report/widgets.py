"""What every widget needs: a static twin. Widgets only look: a value is never an input of a run.

Executed copies have no widgets, and GitHub shows none: there its twin is shown, a picture with the same content.
"""

import base64
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import ipywidgets

from incubate_lib.config import SettingsError
from incubate_lib.report.style import Figure


@dataclass(frozen=True)
class Sentence:
    """Words in the place of a picture that cannot be drawn."""

    words: str

    def __repr__(self) -> str:
        return self.words

    def _repr_html_(self) -> str:
        return f'<p role="alert">{escape(self.words)}</p>'


@dataclass(frozen=True)
class Twinned:
    """A widget, shown together with its static twin: whoever cannot show the one shows the other."""

    widget: ipywidgets.Widget
    twin: Callable[[], Any]

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle, twin = self.widget._repr_mimebundle_(**kwargs), self.twin()
        if png := getattr(twin, "_repr_png_", None):
            return bundle | {"image/png": base64.b64encode(png()).decode()}
        if page := getattr(twin, "_repr_html_", None):
            return bundle | {"text/html": page()}
        return bundle | {"text/plain": str(twin)}


def with_twin(make_widget: Callable[[], ipywidgets.Widget], twin: Callable[[], Any]) -> Any:
    """Return what a cell shows: a widget with its twin, a Figure or Sentence; in a headless run the twin alone.

    Headless (INCUBATE_HEADLESS is set) no widget is even made: nobody could touch it, and clients that execute notebooks
    would have to store it.
    """
    return twin() if os.environ.get("INCUBATE_HEADLESS") else Twinned(make_widget(), twin)


def image() -> ipywidgets.Image:
    """Return the place of a picture.

    It is an image, not an output area: for those, clients that execute notebooks write back to the kernel in the middle of a
    cell, and one run in some dozens hung on it.
    """
    return ipywidgets.Image(format="png", layout={"max_width": "100%", "object_fit": "contain"})


def with_picture(menu: ipywidgets.Widget, draw: Callable[[Any], Figure]) -> ipywidgets.Widget:
    """Return a menu with the picture of what is chosen beneath it, drawn once for each value."""
    shown = image()
    drawn = functools.cache(lambda value: draw(value)._repr_png_())

    def show(_: object = None) -> None:
        shown.value = drawn(menu.value)

    menu.observe(show, names="value")
    show()
    return ipywidgets.VBox([menu, shown])


def or_sentence(show: Callable[..., Any]) -> Callable[..., Any]:
    """Have a function return the reason as a Sentence where what it shows cannot be shown."""

    @functools.wraps(show)
    def shown(*args: Any, **kwargs: Any) -> Any:
        try:
            return show(*args, **kwargs)
        except SettingsError as error:
            return Sentence(str(error))

    return shown


def attempt(make: Callable[[], Any]) -> Any:
    """Return what a function makes; where that is not possible, the reason as a Sentence, as often as it is asked for."""
    return or_sentence(make)()
