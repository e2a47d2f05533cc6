"""Looking into finished runs: similarity, disagreements, what hybrids cost, the browser of runs; what is damaged is told."""

import damaged_runs
import ipywidgets
import numpy as np
import pandas as pd
import pytest
import sentences
from layouts import write_folder

from incubate_lib.config import SettingsError, data_folder, load_settings
from incubate_lib.pipeline.recorded import recorded_plan
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.live import browser, representations, runs
from incubate_lib.report.live.hybrids import Hybrids, hybrid_viewer
from incubate_lib.report.live.representations import CASES, disagreements, similarity
from incubate_lib.report.style import Figure
from incubate_lib.report.tables.phases import settings_difference
from incubate_lib.report.tables.records import from_plan
from incubate_lib.report.widgets import Sentence

pytestmark = pytest.mark.xdist_group("look")  # one process, so that the run of the fixture is made once
STRATEGIES = ["end_to_end", "deep_incubation", "deep_incubation_identity"]
CHANGES = [  # identity modules that take no step, and a rate of their own, for the table of differences
    "strategies.deep_incubation_identity.phases.incubate.epochs=0",
    "strategies.deep_incubation_identity.phases.incubate.warmup_epochs=0",
    "strategies.deep_incubation_identity.phases.finetune.lr=5e-4",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A data folder of this file's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INCUBATE_DATA", str(tmp_path_factory.mktemp("look") / "data"))
        yield


@pytest.fixture(scope="module")
def done(home):
    """A finished run of three strategies."""
    made = plan(load_settings("smoke", CHANGES), STRATEGIES)
    made.run()
    return made


@pytest.fixture(scope="module")
def recorded(done):
    return recorded_plan(done.experiment.path)


def drawn(figure: Figure) -> bool:
    return figure._repr_png_().startswith(b"\x89PNG")


def test_an_identity_start_without_a_step_is_its_meta_module(done):
    table = similarity(done, "deep_incubation_identity").set_index(["network", "module_index"])["cka"]
    for network in ("start", "hybrid", "assembled"):
        assert table[network].to_numpy() == pytest.approx(1, abs=1e-5)
    assert (table["finetuned"] < 1 - 1e-4).all(), "fine-tuning changes it"
    assert (table["end_to_end"] < 0.95).all() and len(table) == 5 * 3


def test_a_random_module_is_not(done):
    table = similarity(done, "deep_incubation", images=64)
    assert set(table["images"]) == {64} and list(table["network"].unique()) == list(representations.NETWORKS)
    by_network = table.set_index(["network", "module_index"])["cka"]
    assert (by_network[["start", "end_to_end"]].xs(0, level=1) < 0.95).all(), "of an identity start it is 1 to five digits"
    assert by_network["assembled", 2] < by_network["hybrid", 2] < 0.95 and by_network["start", 1] != by_network["hybrid", 1]
    assert by_network["hybrid", 0] == pytest.approx(by_network["assembled", 0]), "the first module sees images in both"
    both = pd.concat([table, table.assign(seed=1)])
    for rows in (table, both):
        figure = representations.similarity_figure(rows)
        assert drawn(figure) and "(linear CKA" in figure.axes[0].get_ylabel()


def test_only_finished_strategies_with_a_meta_model_are_looked_at(done):
    other = plan(load_settings("smoke", ["training.lr=0.5"]), ["deep_incubation"], facts=done.experiment.facts)
    for look in (similarity, disagreements):
        with pytest.raises(SettingsError, match="end_to_end has no modules"):
            look(done, "end_to_end")
        with pytest.raises(SettingsError, match="is not part of what was asked for"):
            look(done, "growing")
        with pytest.raises(SettingsError, match=sentences.not_finished("seed 0 meta, seed 0 module 1 of 3")):
            look(other, "deep_incubation")
    with pytest.raises(SettingsError, match="images is 3"):
        similarity(done, "deep_incubation", images=3)


def test_what_has_lost_its_weights_is_not_looked_at(done):
    def lost(look, *phases):
        for phase in phases:
            phase.folder.weights.rename(phase.folder.path / "away")
        try:
            return look()
        finally:
            for phase in phases:
                (phase.folder.path / "away").rename(phase.folder.weights)

    final = done.finals["deep_incubation", 0]
    for look in (similarity, disagreements):
        with pytest.raises(SettingsError, match=sentences.not_finished("seed 0 module 2 of 3, .* goes on")):
            lost(lambda look=look: look(done, "deep_incubation"), final.upstream("incubate")[1])
    table = lost(lambda: similarity(done, "deep_incubation", images=8), done.finals["end_to_end", 0])
    assert set(table["network"]) == {"start", "hybrid", "assembled", "finetuned"}


# -- disagreements ------------------------------------------------------------------------------------------------------------


def check_against_records(found, made, strategy):
    final = made.finals[strategy, 0]
    nodes = {"meta": final.upstream("meta")[0], "assembled": final.upstream("assemble")[0], "finetuned": final}
    for network, node in nodes.items():
        right = found.mistakes[network].isna().mean()
        assert right == pytest.approx(node.summary()["score"]), network
    counts = found.counts()
    assert list(counts.columns) == list(CASES) and (counts.sum(axis=1) == final.summary()["eval_images"]).all()
    for (_, row), network in zip(counts.iterrows(), ("assembled", "finetuned"), strict=True):
        images = row.sum()
        assert (row["both right"] + row["only meta model right"]) / images == pytest.approx(nodes["meta"].summary()["score"])
        assert (row["both right"] + row["only deep network right"]) / images == pytest.approx(nodes[network].summary()["score"])
        assert drawn(found.figure(network, num=4))


def test_disagreements_agree_with_the_records(done):
    check_against_records(found := disagreements(done, "deep_incubation"), done, "deep_incubation")
    with pytest.raises(SettingsError, match="network is 'meta'"):
        found.cases("meta")
    image = found.cases().index[found.cases() != "both right"][0]
    pixels = found.pixels([image])[0]
    assert (pixels == found.eval_set.images[image].permute(1, 2, 0).numpy()).all(), "the very image"


def test_they_are_found_in_streamed_images_too(home, tmp_path):
    write_folder(tmp_path / "set", size=(18, 18))
    text = """
        data: {source: folder, folder: %s}
        model: {name: vit_tiny_patch16_224, img_size: 16, patch_size: 8, embed_dim: 16, depth: 4, num_heads: 2}
        partition: {num_modules: 2}
        training: {epochs: 1, batch_size: 4, lr: 1e-2, warmup_epochs: 0}
        machine: {workers: 0}
    """
    (tmp_path / "streamed.yaml").write_text(text % (tmp_path / "set"))
    made = plan(load_settings(str(tmp_path / "streamed.yaml")), ["deep_incubation"])
    made.run()
    found = disagreements(made, "deep_incubation")
    check_against_records(found, made, "deep_incubation")
    words = {word for told in found.mistakes["meta"].dropna() for word in told.split(", not ")}
    assert words and words <= {"ant", "bee", "cat"}
    assert len(similarity(made, "deep_incubation", images=9)) == 2 * 4, "and there is no end to end"


# -- hybrids ------------------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_hybrid_add_up_to_what_was_planned(done):
    made = plan(load_settings("smoke"), ["deep_incubation", "imitation"], facts=done.experiment.facts)
    facts = made.experiment.facts.flops_per_image
    for strategy, kind in {"deep_incubation": "incubate", "imitation": "imitate"}.items():
        for index in (0, 1, 2) if kind == "incubate" else (1,):
            found = Hybrids(made, strategy).costs(index)
            assert found.flops == facts[f"{kind}-{index}"]
            assert [part.trained for part in found.parts] == [i == index for i in range(3)]
            assert [part.memory.gradients > 0 for part in found.parts] == [i == index for i in range(3)], "frozen parts have none"
            assert [part.memory.optimizer > 0 for part in found.parts] == [i == index for i in range(3)]
            assert sum(part.memory.activations for part in found.parts[:index]) == 0, "nothing before the target waits"
            assert found.images == 16
    figure = Hybrids(made, "deep_incubation").figure(1)
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    flops = [part.flops for part in Hybrids(made, "deep_incubation").costs(1).parts] + [facts["target"]]
    assert np.array(widths) / widths[-1] == pytest.approx(np.array(flops) / flops[-1]), "to scale"


def test_the_viewer_switches_its_picture_and_has_a_twin(done, monkeypatch):
    monkeypatch.delenv("INCUBATE_HEADLESS", raising=False)
    shown = hybrid_viewer(done, "deep_incubation")
    menu, picture = shown.widget.children
    before = bytes(picture.value)
    menu.value = 2
    assert before.startswith(b"\x89PNG") and bytes(picture.value) != before
    monkeypatch.setenv("INCUBATE_HEADLESS", "1")
    assert drawn(hybrid_viewer(done, "deep_incubation"))
    output = hybrid_viewer(done, "end_to_end")
    assert isinstance(output, Sentence) and "has no hybrids" in output.words
    with pytest.raises(SettingsError, match="index is 3"):
        Hybrids(load_settings("smoke", CHANGES), "deep_incubation").figure(3)


# -- the browser --------------------------------------------------------------------------------------------------------------


def test_a_run_is_opened_from_its_folders_alone(done, recorded):
    assert {node.key for node in recorded.nodes} == {node.key for node in done.nodes}
    assert {key: node.key for key, node in recorded.finals.items()} == {key: node.key for key, node in done.finals.items()}
    for node in recorded.nodes:
        planned = next(n for n in done.nodes if n.key == node.key)
        assert node.settings == planned.settings and node.digest == planned.digest
        assert {name: n.key for name, n in node.inputs.items()} == {name: n.key for name, n in planned.inputs.items()}
    for ours, theirs in zip(vars(from_plan(recorded)).values(), vars(from_plan(done)).values(), strict=True):
        assert ours.equals(theirs) if isinstance(ours, pd.DataFrame) else ours == theirs
    pd.testing.assert_frame_equal(similarity(recorded, "deep_incubation"), similarity(done, "deep_incubation"))


def test_the_difference_names_exactly_what_was_set(done, recorded):
    table = settings_difference(recorded, STRATEGIES[1:])
    assert set(table.index) == {
        ("incubate", "start"), ("incubate", "inherit_stem"), ("incubate", "inherit_head"), ("incubate", "training.epochs"),
        ("incubate", "training.warmup_epochs"), ("finetune", "training.lr"),
    }  # fmt: skip
    assert table.loc[("finetune", "training.lr")].to_dict() == {STRATEGIES[1]: "0.002", STRATEGIES[2]: "0.0005"}
    assert settings_difference(recorded, STRATEGIES[1:2]).empty
    pd.testing.assert_frame_equal(settings_difference(recorded), settings_difference(done))
    others = settings_difference(recorded, ["end_to_end", "deep_incubation"])
    assert set(others.index.get_level_values("setting")) == {"the whole phase"} and len(others) == 5
    with pytest.raises(SettingsError, match="growing is not part of this run"):
        settings_difference(recorded, ["growing"])


@pytest.mark.parametrize("x", browser.AXES)
def test_curves_end_where_the_costs_do(recorded, x):
    results = from_plan(recorded)
    ends = results.strategies.set_index("strategy")
    for name in STRATEGIES:
        lines = list(browser.curve_lines(results, name, x))
        end = max(line["cost"].max() for _, line in lines)
        parts = results.phases[results.phases["strategy"] == name]
        assert end == pytest.approx(ends.loc[name, x] if x in ends else parts["epochs"].sum(), rel=1e-3)
        assert lines[-1][1]["score"].iloc[-1] == pytest.approx(ends.loc[name, "score"])
    assert drawn(browser.curves_figure(browser.some_of(results, STRATEGIES[:2], [0]), x))
    with pytest.raises(SettingsError, match="x is 'weeks'"):
        browser.curves_figure(results, "weeks")
    with pytest.raises(SettingsError, match="none of these strategies and seeds is finished"):
        browser.curves_figure(browser.some_of(results, STRATEGIES, [7]), x)


DAMAGED = {  # runs of damaged_runs.py, and what is told of them
    "nothing": "it is empty", "foreign": "it has no run.json", "before": "`incubate migrate` takes over runs of an",
    "half": sentences.DAMAGED, "a-list": sentences.DAMAGED, "no-facts": sentences.DAMAGED,
    "no-hash": sentences.DAMAGED, "no-inputs": "no 'inputs'", "other-phase": "phase is missing",
    "other-settings": "other settings than today's", "no-accuracy": "score is missing",
    "begun": "is finished yet", "missing": "there is no run missing",
}  # fmt: skip


@pytest.fixture
def damaged(done, tmp_path, monkeypatch):
    """A data folder with a sound run and everything that can be wrong with others: name → what is told."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / "data"))
    damaged_runs.write(done)
    return DAMAGED


def test_what_is_damaged_becomes_a_sentence(damaged):
    for name, output in damaged.items():
        with pytest.raises(SettingsError, match=output):
            browser.open_run(name)
    results, _ = browser.open_run("half-summary")
    assert set(results.strategies["strategy"]) == set(STRATEGIES[1:]), "the others can be looked at"


def test_the_table_of_runs_tells_what_is_there(damaged):
    table = runs.runs_table().set_index("name")
    place = runs.COLUMNS.index(runs.BEST)
    best = ["best top-1 %", "best masked perplexity"]  # the project's own tables have both
    headings = [*runs.COLUMNS[1:place], *best, *runs.COLUMNS[place + 1 :]]
    assert list(table.columns) == headings and "a file" not in table.index
    sound = table.loc["sound"]
    assert (sound["state"], sound["seeds"]) == ("done", 1) and all(name in sound["strategies"] for name in STRATEGIES)
    best = browser.open_run("sound")[0].strategies["score"].max()
    assert sound["best top-1 %"] == round(100 * best, 1) and sound["note"] == ", ".join(CHANGES)
    assert table.loc["half-summary", "state"] == "unfinished" and "end_to_end" not in table.loc["half-summary", "strategies"]
    assert table.loc["nothing", "state"] == "empty" and table.loc["begun", "state"] == "unfinished"
    for name in ("half", "a-list", "foreign", "before", "no-accuracy"):
        assert table.loc[name, "state"] == "damaged" and damaged[name] in table.loc[name, "note"]
    assert table.loc["published: digits", "state"] == "published" and table.loc["published: digits", "seeds"] == 5


def test_the_widget_follows_and_never_breaks(damaged, monkeypatch):
    monkeypatch.delenv("INCUBATE_HEADLESS", raising=False)
    shown = browser.browse_runs()
    assert isinstance(shown.widget, ipywidgets.VBox) and "sound" in shown._repr_mimebundle_()["text/html"]
    run, (strategies, _), axis = shown.widget.children[0], shown.widget.children[1].children, shown.widget.children[2]
    assert run.value == run.options[0], "the newest run stands there at once"
    said, picture, tables = shown.widget.children[3:6]
    for name in run.options:  # every one of them, the damaged ones and the published tables
        run.value = name
        output = damaged.get(name)
        assert output.replace("'", "&#x27;") in said.value if output else "thread(s) a phase" in said.value, name
        assert (picture.layout.display == "none") == bool(output)
    run.value = "sound"
    whole, compared = bytes(picture.value), tables.value
    assert "training.lr" in compared and "Comparison" in compared
    axis.value = "critical_seconds"
    assert bytes(picture.value) != whole
    strategies.value = ("end_to_end",)
    assert "training.lr" not in tables.value
    strategies.value = ()
    assert "none of these strategies" in said.value and picture.layout.display == "none"
    monkeypatch.setenv("INCUBATE_HEADLESS", "1")
    assert isinstance(browser.browse_runs(), pd.DataFrame)


def test_an_empty_data_folder_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / "nowhere"))
    monkeypatch.delenv("INCUBATE_HEADLESS", raising=False)
    assert set(runs.runs_table()["state"]) == {"published"}
    assert browser.browse_runs().widget is not None and not data_folder().exists()
