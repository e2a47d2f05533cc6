"""Watch a run, wherever it goes on: in this kernel, in the background, on a cluster.

All of it is read from the run's own files, and nothing is written but the stop file when the button is pressed: closing
the browser loses nothing, and running the cell again shows the same.
"""

import threading
import time
from collections.abc import Sequence
from html import escape
from typing import Any

import ipywidgets

from incubate_lib.config import SettingsError, data_folder, load_settings
from incubate_lib.pipeline.background import check_lists, stop_run
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.pipeline.graph import Plan
from incubate_lib.pipeline.recorded import DAMAGE, run_of
from incubate_lib.report.live.phase_graph import draw, snapshot
from incubate_lib.report.live.progress import Phase, Reader, at_work, headline, table_of
from incubate_lib.report.pages import page
from incubate_lib.report.widgets import Sentence, or_sentence, with_twin

# that a widget goes on looking while nothing is at work: between phases, or before somebody goes on
LINGER_SECONDS = 60.0
OLDER = "of an older version whose results are not used any more"


def find(preset: str, overrides: Sequence[str], strategies: Sequence[str] | None, seeds: Sequence[int]) -> Plan:
    """Return the plan of a run that was started; SettingsError in plain words for whatever is not as it should be.

    Without `strategies` all that were started.
    """
    settings = load_settings(preset, list(overrides))
    place = data_folder() / "runs" / settings.name
    try:
        experiment = Experiment.of(settings)
        if not experiment.is_known():
            beside = f" (what is there is of other settings, or {OLDER})" if experiment.path.exists() else ""
            missing = f"there is no run of these settings in {experiment.path} yet"
            raise SettingsError(f"{missing}; start_run or `incubate run {preset}` starts one{beside}")
        return run_of(settings, strategies, seeds)
    except SettingsError:
        raise
    except DAMAGE as error:
        damage = f"another version of this package, or damaged ({type(error).__name__}: {str(error).splitlines()[0]})"
        raise SettingsError(f"the records in {place} are of {damage}; move that folder away and run again") from None


class Live(ipywidgets.VBox):
    """A run as it goes on: a headline, a button to stop it, the graph of phases, curves, a table.

    A daemon thread of this kernel looks every few seconds, also while the kernel trains; it ends with the run, when the
    widget is closed or replaced, and with the kernel.
    """

    def __init__(self, preset: str, overrides: Sequence[str], *which: Any, every: float) -> None:
        self.wanted, self.every = (preset, overrides, *which), every
        self.reader: Reader | None = None
        self.shown: tuple[list[Phase], list[str]] = [], []
        self.over = threading.Event()
        self.headline, self.said, self.graph, self.curves, self.table = (ipywidgets.HTML() for _ in range(5))
        self.stop = ipywidgets.Button(description="Stop: save and pause", disabled=True)
        self.stop.layout.width = "auto"
        self.stop.tooltip = "Phases that train save a checkpoint first; the run can go on from there"
        self.stop.on_click(self._stop)
        _hear_while_busy(self.stop)
        button = ipywidgets.HBox([self.stop, self.said])
        super().__init__([self.headline, button, self.graph, self.curves, self.table])
        busy = self.refresh()
        replaced = _shown.pop((preset, *overrides), None)
        if replaced:
            replaced.end("A newer widget shows this run.")
        _shown[(preset, *overrides)] = self
        self.thread = threading.Thread(target=self._go_on, args=(busy,), name="watch", daemon=True)
        self.thread.start()

    def refresh(self) -> bool | None:
        """Read the run and show what has changed; return whether anything is at work, None if all is done for good."""
        try:
            self.reader = self.reader or Reader(find(*self.wanted))
            return self._refresh(self.reader)
        except SettingsError as error:
            words = str(error)
        # whatever is in those files: a thread's traceback would stand under some other cell
        except Exception as error:
            words = f"the run cannot be shown: {type(error).__name__}: {error}"
        self.headline.value = _html(words, role="alert")
        self.stop.disabled = True
        return False

    def _refresh(self, reader: Reader) -> bool | None:
        phases = reader.phases()
        busy = at_work(reader.plan, phases)
        self.headline.value = _html(headline(reader.plan, phases, reader.backend), weight="bold")
        self.stop.disabled = not busy
        if (phases, reader.messages) != self.shown:
            self.graph.value, self.curves.value = (picture.svg() for picture in draw(reader.plan, phases))
            table = table_of(phases, reader.backend.title)
            self.table.value = page("phases.html", table=table, numbers=phases[0].line.numbers(), messages=reader.messages)
            self.shown = phases, reader.messages
        return None if not busy and all(phase.line.state == "done" for phase in phases) else busy

    def _go_on(self, busy: bool | None) -> None:
        last = time.monotonic()  # that something was at work
        while busy is not None and time.monotonic() - last < LINGER_SECONDS:
            if self.over.wait(max(self.every, self.reader.backend.pause) if self.reader else self.every):
                return
            busy = self.refresh()
            if busy:
                last = time.monotonic()
        if busy is False:
            words = "Nothing has been at work for a while, so this picture stands still."
            self.end(f"{words} Run the cell again to look again.")
        self.over.set()

    def _stop(self, _: Any) -> None:
        try:
            self._say(f"{stop_run(self.reader.plan.experiment)}.")
        except (SettingsError, OSError) as error:
            self._say(str(error))

    def _say(self, words: str) -> None:
        self.said.value = _html(words, role="status")

    def end(self, words: str) -> None:
        """Look no more, and say why."""
        self.over.set()
        self.stop.disabled = True
        self._say(words)

    def close(self) -> None:
        self.over.set()
        super().close()


def _hear_while_busy(widget: ipywidgets.Widget) -> None:
    """Have what the page says to a widget handled at once, also while this kernel trains.

    JupyterLab sends it to a subshell, a thread beside the busy one (ipykernel 7 and later). But since 7.4 the kernel hands
    messages to the shell in which the widget was made, and that is busy. Without subshells they wait for the cell's end.
    """
    if widget.comm is not None:
        widget.comm._reply_subshell_for = lambda data, subshell: subshell


_shown: dict[tuple[str, ...], Live] = {}  # the widget that shows a run, in this kernel


def _html(words: str, role: str = "", weight: str = "normal") -> str:
    look = f"font-size: 14px; line-height: 1.4; margin: 4px 0; font-weight: {weight}"
    return f'<p role="{role}" style="{look}">{escape(words)}</p>'


def watch(
    preset: str = "digits",
    overrides: Sequence[str] = (),
    *,
    strategies: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    every: float = 2.0,
) -> Any:
    """Show a run as it goes on, wherever it runs, looking every `every` seconds; a sentence where there is nothing to show.

    Its twin, which is all that a headless run shows, is a picture of the state at that moment.
    """
    try:
        check_lists(overrides, strategies, seeds)
        if not every >= 0.1:
            raise SettingsError(f"every is {every!r}; it must be at least 0.1 seconds")
        load_settings(preset, list(overrides))
    except (SettingsError, TypeError) as error:
        return Sentence(str(error))
    wanted = preset, overrides, strategies, seeds
    return with_twin(lambda: Live(*wanted, every=every), or_sentence(lambda: snapshot(find(*wanted))))
