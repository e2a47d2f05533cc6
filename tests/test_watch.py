"""Runs in the background, and the widget that shows them as they go on."""

import base64
import hashlib
import io
import json
import os
import re
import threading

import pytest
import sentences
from patience import HANG, Hooks, wait_for
from PIL import Image

from incubate_lib.config import SettingsError, data_folder, load_settings
from incubate_lib.phases.facts import measure
from incubate_lib.pipeline.background import start_run, stop_run
from incubate_lib.pipeline.experiment import Experiment
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.live import watch as watching
from incubate_lib.report.live.curves import browse
from incubate_lib.report.live.phase_graph import draw, snapshot
from incubate_lib.report.live.progress import Reader, table_of
from incubate_lib.report.live.watch import find, watch
from incubate_lib.report.style import Figure
from incubate_lib.report.tables.records import published
from incubate_lib.report.widgets import Sentence, Twinned
from incubate_lib.training.files import read_json
from incubate_lib.training.trainer import Trainer

pytestmark = pytest.mark.xdist_group("watch")  # one process, so that the run of the fixture is made once
LONG = ("training.epochs=5",)
WHAT = {"overrides": LONG, "strategies": ["end_to_end"]}


def files(folder):
    """Everything about a run's files that reading must leave as it is."""
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def table(todo):
    return table_of((reader := Reader(todo)).phases(), reader.backend.title)


def png(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.fixture(scope="module")
def facts():
    """Of the preset smoke, however long it trains: measuring takes seconds."""
    return measure(load_settings("smoke"))


@pytest.fixture(scope="module")
def story(tmp_path_factory, facts):
    """A run that is started in the background, watched, stopped by the button, and goes on here; what was seen of it."""
    output, hooks = {}, Hooks(tmp_path_factory.mktemp("hooks"))
    hooks.hold("end_to_end", 0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (hooks.env | {"INCUBATE_DATA": str(tmp_path_factory.mktemp("data"))}).items():
            patch.setenv(name, value)
        patch.setenv("FORCE_COLOR", "1")  # as a kernel has it
        patch.setenv("JPY_PARENT_PID", str(os.getpid()))
        patch.setattr(watching, "LINGER_SECONDS", 1.0)
        plan(load_settings("smoke", LONG), ["end_to_end"], facts=facts).write()
        first = start_run("smoke", **WHAT)
        patch.delenv("FORCE_COLOR")
        try:
            output["session"] = os.getsid(first.process.pid), first.process.pid
            with pytest.raises(SettingsError) as refused:
                start_run("smoke", **WHAT)
            output["refused"] = str(refused.value)
            shown = watch("smoke", **WHAT, every=0.2)
            live, todo = shown.widget, find("smoke", LONG, ["end_to_end"], (0,))
            output["values"] = {name: [] for name in ("headline", "graph", "curves", "table")}
            for name, seen in output["values"].items():
                getattr(live, name).observe(lambda change, seen=seen: seen.append(change["new"]), names="value")
            for changes in (1, 2):
                hooks.hold("end_to_end", 12 * changes + 1)  # an evaluation more
                wait_for(
                    lambda changes=changes: min(len(output["values"][name]) for name in ("curves", "graph")) >= changes,
                    f"the widget's change number {changes}",
                )
            output["midway"] = table(todo), snapshot(todo)._repr_png_(), live.stop.disabled
            live.stop.click()
            output["said"] = live.said.value
            output["code"] = first.wait(HANG)
            live.thread.join(HANG)
            output["ended"] = live.thread.is_alive(), live.table.value, live.said.value, live.stop.disabled
            folder = todo.nodes[0].folder
            output["stopped"] = folder.status(), (folder.path / "checkpoint.pt").exists()
            before = files(data_folder())
            snapshot(todo), table(todo), watch("smoke", **WHAT)._repr_mimebundle_()
            output["untouched"] = before == files(data_folder()) and len(before) > 5
            patch.setattr(watching, "LINGER_SECONDS", HANG)
            live = watch("smoke", **WHAT, every=0.2).widget
            output["here"], step = [], Trainer.step
            live.table.observe(lambda change: output["here"].append(change["new"]), names="value")
            shows = lambda: any(">running<" in table for table in output["here"])  # noqa: E731
            patch.setattr(Trainer, "step", lambda *a: wait_for(shows, "the widget to show it") and step(*a))
            todo.nodes[0].run()  # it goes on in this kernel: no second process, which would import everything again
            live.thread.join(HANG)
            output["finished"] = table(todo), snapshot(todo)._repr_png_(), read_json(folder.path / "status.json")
            output["over"] = live.thread.is_alive(), live.headline.value, live.table.value
            output["log"] = first.log.read_text()
            yield output
        finally:
            first.process.kill()


def test_a_run_in_the_background_has_a_session_of_its_own_and_is_alone(story):
    session, pid = story["session"]
    assert session == pid != os.getsid(0)
    assert f"process {pid} on" in story["refused"] and "at work" in story["refused"]
    assert sentences.done_already(0, 1) in story["log"] and "\x1b" not in story["log"]


def test_the_widget_changes_by_itself(story):
    rows = [table.count("<tr>") for table in story["values"]["table"]]
    assert set(rows) == {2}, "the head and the phase"
    assert any("1 running" in words for words in story["values"]["headline"])
    assert any(" left" in words for words in story["values"]["headline"])
    lengths = [picture.count(",") for picture in story["values"]["curves"]]
    assert lengths[-1] > lengths[0], "the curves grow"
    for svg in (*story["values"]["graph"], *story["values"]["curves"]):
        assert svg.count("<svg") == svg.count("</svg>") == 1


def test_midway_and_after(story):
    shown, picture, disabled = story["midway"]
    row = shown.iloc[0]
    assert (row["state"], disabled) == ("running", False)
    epoch, total = map(float, row["epoch"].split("/"))
    assert 0 < epoch < total and float(row["loss"]) > 0 and row["top-1"].endswith("%") and row["ETA"].endswith(" s")
    shown, later, _ = story["finished"]
    assert list(shown.loc[0, ["state", "ETA"]]) == ["done", ""] and float(shown.loc[0, "epoch"]) == pytest.approx(total, abs=0.06)
    green, blue = (0, 158, 115), (0, 114, 178)  # bars: done, running
    before, after = ({color for _, color in png(data).getcolors(1 << 24)} for data in (picture, later))
    assert blue in before and green not in before and green in after


def test_the_button_stops_with_a_checkpoint_and_it_goes_on_from_there(story):
    status, saved = story["stopped"]
    assert f"to stop; its phases {sentences.SAVE_FIRST}" in story["said"]
    assert story["code"] == 130 and status["state"] == "stopped" and saved
    alive, shown, said, disabled = story["ended"]
    assert not alive and "stopped" in shown and "stands still" in said and disabled
    assert story["finished"][2]["resumed_at"] == status["saved_step"] > 0
    alive, headline, shown = story["over"]
    assert not alive and f"{sentences.phases_done(1, 1)}<" in headline and ">done<" in shown


def test_it_shows_what_this_kernel_trains(story):
    """The thread looks also while this process trains."""
    assert any(">running<" in shown for shown in story["here"]) and ">done<" in story["here"][-1]


def test_reading_changes_no_file(story):
    assert story["untouched"]


def test_a_widget_waits_for_its_run_and_gives_way_to_a_newer_one(data_folder, facts):
    live = watch("smoke", every=0.1).widget
    assert sentences.NO_RUN in live.headline.value and live.stop.disabled
    plan(load_settings("smoke"), facts=facts).write()
    wait_for(lambda: sentences.phases_done(0, 12) in live.headline.value, "the widget to find its run")
    newer = watch("smoke").widget
    live.thread.join(HANG)
    assert not live.thread.is_alive() and "newer widget" in live.said.value
    newer.close()
    newer.thread.join(HANG)
    assert not newer.thread.is_alive()


# -- bad input ------------------------------------------------------------------------------------------------------------

WRONG = [
    ({"preset": "smok"}, sentences.did_you_mean("smoke")),
    ({"overrides": ["training.epoch=3"]}, "training.epoch"),
    ({"overrides": "training.epochs=3"}, r"write a list, \['training.epochs=3'\]"),
    ({"strategies": ["end_to_ent"]}, sentences.did_you_mean("end_to_end")),
    ({"strategies": "end_to_end"}, r"write a list, \['end_to_end'\]"),
    ({"seeds": 1}, r"write a list, \[1\]"),
    ({"seeds": ["1"]}, "seeds has '1' in it; they must be whole numbers"),
    ({"seeds": []}, "seeds is empty"),
    ({"seeds": [-1]}, sentences.NEGATIVE_SEED),
]


@pytest.fixture
def headless(monkeypatch):
    monkeypatch.setenv("INCUBATE_HEADLESS", "1")


@pytest.fixture
def todo(data_folder, facts):
    """A plan whose folder is made, as if its run had just been started."""
    todo = plan(load_settings("smoke"), ["end_to_end", "deep_incubation"], facts=facts)
    todo.write()
    return todo


@pytest.mark.parametrize(("given", "words"), WRONG)
def test_wrong_words_are_told_and_start_nothing(given, words, todo, headless):
    given = {"preset": "smoke"} | given
    before = files(data_folder())
    with pytest.raises(SettingsError, match=words) as output:
        start_run(**given)
    shown = watch(**given)
    assert isinstance(shown, Sentence) and str(shown) == str(output.value)
    assert files(data_folder()) == before


def test_jobs_and_seconds_that_cannot_be(todo):
    with pytest.raises(SettingsError, match=sentences.must_be("--jobs", 0, "at least 1")):
        start_run("smoke", jobs=0)
    assert sentences.must_be("every", 0, "at least 0.1 seconds") in str(watch("smoke", every=0))


def test_a_run_that_cannot_begin_says_why(todo, monkeypatch):
    """Somebody else's run may have taken the folder in the meantime."""
    from incubate_lib.pipeline import background, execution

    monkeypatch.setattr(background, "_check_free", lambda experiment: None)
    with (
        execution.only_run(todo.experiment.path),
        pytest.raises(SettingsError, match=f"process {os.getpid()} on .* is at work in"),
    ):
        start_run("smoke")


def test_nothing_there_yet(data_folder, headless):
    assert sentences.NO_RUN in str(watch("smoke")) and not data_folder.exists()
    with pytest.raises(SettingsError, match="nothing to stop"):
        stop_run(Experiment.of(load_settings("smoke")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: {"settings": {}}, sentences.OLDER),
        (lambda record: record | {"facts": {"images": 3}}, sentences.OTHER_VERSION),
        (lambda record: record | {"phases": {"seed-0/meta": {}}}, sentences.OLDER),
        (lambda record: {"hash": record["hash"]}, sentences.OLDER),
        (lambda record: record | {"hash": "of format 2"}, sentences.OLDER),
        (lambda record: [], sentences.NO_RUN),
        (lambda record: 3, sentences.OLDER),
    ],
)
def test_older_layouts(change, words, todo, headless):
    path = todo.experiment.path / "run.json"
    path.write_text(json.dumps(change(read_json(path))))
    shown = watch("smoke", strategies=["end_to_end", "deep_incubation"])
    assert isinstance(shown, Sentence) and re.search(words, str(shown)), shown


def test_half_written_records(todo):
    """Empty, cut off, not finite, or of somebody else: what can be read is shown, and the rest is named."""
    paths = [node.folder.path for node in todo.nodes]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    row = {"step": 0, "epoch": 0.0, "loss": 1.5, "score": 0.25, "train_loss": None}
    lines = [row, row | {"epoch": 1.0, "loss": float("nan")}, [3], row | {"epoch": None}, row | {"epoch": 2.0, "loss": 0.5}]
    paths[0].joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 3, "lo')
    paths[0].joinpath("status.json").write_text('{"state": "stopped", "progress": {}}')
    paths[1].joinpath("status.json").write_text("")
    paths[2].joinpath("status.json").write_text('{"progress": {"step": 3}}')
    paths[3].joinpath("summary.json").write_text(json.dumps({"hash": todo.nodes[3].digest}))
    paths[4].joinpath("status.json").write_text('{"state": "runn')
    paths[4].joinpath("metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    paths[5].joinpath("status.json").write_text('{"state": "dreaming", "error": "a <b>"}')
    shown = table(todo)
    states = ["stopped", "waiting", "waiting", "unreadable", "unreadable", "dreaming", "waiting"]
    assert list(shown["state"]) == states
    assert "cannot be read" in shown["note"][3] and "is no record of a finished phase (" in shown["note"][3]
    assert png(snapshot(todo)._repr_png_()).size[0] > 900
    live = watch("smoke", strategies=["end_to_end", "deep_incubation"]).widget
    live.close()
    assert "cannot be read" in live.table.value and "a &lt;b&gt;" in live.table.value and ">50.0" not in live.curves.value
    assert "25.0 %" in live.curves.value and "0.500" in live.curves.value and "nan" not in live.curves.value
    lines = re.findall(r'points="([^"]*)" fill="none" stroke="#D55E00"', live.curves.value)
    assert len(lines) == 3 and {len(line.split()) for line in lines} == {2}, "two of the legend, and one without the nan"


# -- twins ----------------------------------------------------------------------------------------------------------------


def test_headless_there_is_no_widget_and_no_thread(todo, headless, monkeypatch):
    monkeypatch.setattr(watching.ipywidgets.Widget, "__init__", lambda *args, **kwargs: pytest.fail("a widget was made"))
    threads = threading.active_count()
    assert isinstance(watch("smoke"), Figure) and isinstance(browse(published("digits")), Figure)
    assert threading.active_count() == threads


def test_a_widget_is_saved_with_its_picture(todo):
    live = watch("smoke")
    for shown in (live, browse(published("digits"))):
        assert isinstance(shown, Twinned)
        bundle = shown._repr_mimebundle_()
        assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == shown.widget.model_id
        assert min(png(base64.b64decode(bundle["image/png"])).size) > 250  # two strategies are two rows
    live.widget.close()


def test_many_rows_are_folded(data_folder, facts):
    """Where there are more than a few, those of which all phases wait or are done take one line."""
    few, many = (plan(load_settings("smoke"), ["deep_incubation"], range(number), facts=facts) for number in (3, 12))
    heights = [draw(todo, Reader(todo).phases())[0].height for todo in (few, many)]
    assert heights[1] < heights[0] and not draw(many, Reader(many).phases())[1].marks
