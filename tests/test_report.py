"""Tables and figures say what the records say."""

import base64
import html
import json
import math
import re
import shlex
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import sentences
from project import ROOT
from scipy.stats import t, ttest_1samp

from incubate_lib import tasks
from incubate_lib.cli import parser
from incubate_lib.config import SettingsError, load_settings
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report import publish
from incubate_lib.report.html import write_report
from incubate_lib.report.planner.forecast import against_measured, speed_of
from incubate_lib.report.planner.planner import against_in_words
from incubate_lib.report.tables import mat, plots, records, statistics
from incubate_lib.report.tables.comparison import comparison, hardware
from incubate_lib.report.tables.hardware import places
from incubate_lib.report.tables.phases import settings_table
from incubate_lib.report.tables.records import Results, from_plan, load_results, published
from incubate_lib.report.tables.statistics import spread
from incubate_lib.report.words import flop_unit

PUBLISHED = records.published_runs()


def results(accuracies: dict[str, list[float]], flops: dict[str, float]) -> Results:
    rows = [
        {
            "strategy": name, "seed": seed, "score": accuracy, "flops": flops[name], "critical_flops": flops[name] / 2,
            "seconds": 10.0, "critical_seconds": 5.0, "split": "test",
        }
        for name, values in accuracies.items() for seed, accuracy in enumerate(values)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    table["assembled_score"] = table["meta_score"] = float("nan")
    return Results("t", table, pd.DataFrame(columns=["phase"]), pd.DataFrame())


def test_the_verdict_follows_the_numbers():
    flops = {"end_to_end": 1e12, "deep_incubation": 2e12}
    better = results({"end_to_end": [0.5, 0.52, 0.51], "deep_incubation": [0.6, 0.61, 0.62]}, flops).verdict()
    assert f"{sentences.clearly_better('10.0 points', 3)}, for 2.00 times" in better
    worse = results({"end_to_end": [0.6, 0.61, 0.62], "deep_incubation": [0.5, 0.52, 0.51]}, flops).verdict()
    assert "10.0 points worse" in worse and sentences.seeds_better(0, 3) in worse
    noise = results({"end_to_end": [0.5, 0.6, 0.55], "deep_incubation": [0.6, 0.5, 0.56]}, flops).verdict()
    assert "inside the noise" in noise
    equal = results({"end_to_end": [0.5, 0.6], "deep_incubation": [0.5, 0.6]}, flops).verdict()
    assert f"0.0 points better or worse {sentences.THAN_END_TO_END} (inside the noise" in equal
    single = results({"end_to_end": [0.5], "deep_incubation": [0.6]}, flops).verdict()
    assert "one seed only" in single
    assert "Nothing to compare" in results({"end_to_end": [0.5]}, flops).verdict()


def noisy(p: float, seeds: int = 5) -> np.ndarray:
    """Differences in points over seeds whose paired t-test has exactly this p-value, two-sided."""
    pattern = np.linspace(-1, 1, seeds)
    error = pattern.std(ddof=1) / math.sqrt(seeds)
    return pattern + error * t.isf(p / 2, seeds - 1)


def test_a_difference_is_judged_as_students_paired_t_does():
    (row,) = statistics.compare([pd.Series(noisy(0.03))]).to_dict("records")
    test = ttest_1samp(noisy(0.03), 0)
    assert row["p_holm"] == pytest.approx(test.pvalue) == pytest.approx(0.03) and row["clear"] and row["comparisons"] == 1
    assert (row["low"], row["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))


@pytest.mark.parametrize(
    ("alone", "holm"),
    [
        ([0.04], [0.04]), ([0.03, 0.04], [0.06, 0.06]), ([0.01, 0.04], [0.02, 0.04]), ([0.04, 0.01, 0.02], [0.04, 0.03, 0.04]),
        ([0.001, 0.03, 0.02, 0.9], [0.004, 0.06, 0.06, 0.9]), ([0.7, 0.6], [1.0, 1.0]),
    ],
)  # fmt: skip
def test_what_is_shown_together_is_corrected_together(alone, holm):
    """By Holm's procedure, in whatever order; and an interval excludes zero exactly where the difference is clear."""
    found = statistics.compare([pd.Series(noisy(p)) for p in alone])
    assert found["p_holm"].tolist() == pytest.approx(holm)
    assert found["clear"].tolist() == [p <= 0.05 for p in holm]
    assert ((found["low"] > 0) | (found["high"] < 0)).tolist() == found["clear"].tolist()
    assert set(found["comparisons"]) == {len(alone)}


@pytest.mark.parametrize(
    ("low", "high", "output"),
    [
        (-4.69, -0.03, "[-4.7, -0.03]"), (0.0049, 2.0, "[+0.005, +2.0]"), (-1.0, 0.0499, "[-1.0, +0.05]"),
        (-0.05, 0.05, "[-0.1, +0.1]"), (0.0, 0.0, "[0.0, 0.0]"),
    ],
)  # fmt: skip
def test_an_interval_that_excludes_zero_does_not_show_it(low, high, output):
    row = pd.Series({"gain": (low + high) / 2, "low": low, "high": high, "clear": True, "metric": "accuracy"})
    assert statistics.interval_text(low, high) == output and statistics.gain_text(row).endswith(f" {output}")


def test_a_difference_of_one_seed_is_not_corrected_for():
    found = statistics.compare([pd.Series([4.0]), pd.Series(noisy(0.04)), pd.Series([1.0, 1.0])])
    assert found["comparisons"].tolist() == [2] * 3 and math.isnan(found["p_holm"][0]) and not found["clear"][0]
    assert found["p_holm"][2] == 0 and found["clear"][2], "no spread at all"


def test_the_verdict_is_corrected_for_what_it_compares():
    """One strategy is ahead with p = 0.03: clear by itself, not among four."""
    base = np.array([0.5, 0.51, 0.52, 0.53, 0.54])
    ahead, noise = base + noisy(0.03) / 100, [base + noisy(0.5) / 100] * 3
    made = {"end_to_end": base, "deep_incubation": ahead}
    assert "(clear at 95 %" in results(made, dict.fromkeys(made, 1e12)).verdict()
    made |= dict(zip(("growing", "stacking", "imitation"), noise, strict=True))
    output = results(made, dict.fromkeys(made, 1e12)).verdict()
    assert "(clear" not in output and output.count("inside the noise") == 4 and sentences.corrected(4) in output


def test_the_verdict_tells_when_the_small_network_is_enough():
    made = results({"end_to_end": [0.5, 0.5], "deep_incubation": [0.7, 0.7]}, {"end_to_end": 1e12, "deep_incubation": 1e12})
    for accuracy, words in [(0.6, f"{sentences.NOT_BETTER}end to end."), (0.4, "every strategy is better on average")]:
        meta = pd.DataFrame([{"phase": "meta", "seed": s, "score": accuracy, "flops": 2e11} for s in (0, 1)])
        output = Results("t", made.strategies, meta, made.curves).verdict()
        assert f"{sentences.META_ALONE}{100 * accuracy:.1f} % for 0.20 times" in output and words in output


def test_comparison_gives_mean_spread_and_ratios():
    table = comparison(
        results({"end_to_end": [0.5, 0.6], "deep_incubation": [0.7, 0.8]}, {"end_to_end": 1e12, "deep_incubation": 3e12})
    )
    row = table[sentences.DEEP_INCUBATION]
    assert row["top-1 %"] == "75.0 ± 7.1" and row["TFLOP"] == "3.00 (3.00×)" and row["critical path TFLOP"] == "1.50 (3.00×)"
    assert table.loc["seeds"].tolist() == [2, 2]


def test_spread_marks_a_single_seed():
    assert spread(pd.Series([0.91]), tasks.get().score) == "91.0 (one seed)"


@pytest.mark.parametrize(("flops", "unit"), [(3e9, "GFLOP"), (1e12, "TFLOP"), (2e15, "PFLOP"), (1e21, "EFLOP")])
def test_flop_unit(flops, unit):
    assert flop_unit(flops)[0] == unit


def test_sum_and_critical_path_are_those_of_the_graph(data_folder):
    todo = plan(load_settings("smoke"), ["deep_incubation", "deep_incubation_stack"])
    todo.run()
    table = from_plan(todo).strategies.set_index("strategy")
    cost = {node.key: node.summary()["train_flops"] for node in todo.nodes}
    own = "seed-0/deep_incubation_stack/"
    modules = [cost[f"{own}incubate-{i}"] for i in range(3)]
    row = table.loc["deep_incubation_stack"]
    assert row["flops"] == cost["seed-0/meta"] + sum(modules) + cost[f"{own}finetune"]
    assert row["critical_flops"] == cost["seed-0/meta"] + max(modules) + cost[f"{own}finetune"]
    assert cost == todo.flops, "what was planned is what was spent"
    phases = from_plan(todo).phases
    assert (phases["phase"] == "meta").groupby(phases["strategy"]).sum().tolist() == [1, 1], "the meta model counts in both"


def test_seconds_of_several_devices_are_told_as_such(data_folder, tmp_path):
    """The meta model was trained on another machine: its seconds never stand under the name of the last phase's device."""
    todo = plan(load_settings("smoke"), ["end_to_end", "deep_incubation"])
    todo.run()
    one = from_plan(todo)
    assert "†" not in comparison(one).to_string() + one.verdict() and len(places(one.strategies)) == 1
    (here, threads), *_ = places(one.strategies)
    path = next(node for node in todo.nodes if node.key == "seed-0/meta").folder.path / "summary.json"
    summary = json.loads(path.read_text())
    summary["provenance"] |= {"device": "Another GPU", "threads": 7}
    path.write_text(json.dumps(summary))
    todo = plan(load_settings("smoke"), ["end_to_end", "deep_incubation"])
    mixed = from_plan(todo)
    row = mixed.strategies.set_index("strategy").loc["deep_incubation"]
    assert row["device"] == f"Another GPU + {here}" and row["threads"] == f"7 + {threads}"
    assert mixed.strategies.set_index("strategy").loc["end_to_end", "device"] == here
    phases = mixed.phases[mixed.phases["strategy"] == "deep_incubation"].set_index("phase")
    assert phases.loc["meta", ["device", "threads"]].tolist() == ["Another GPU", 7] and phases.loc["finetune", "device"] == here
    table = comparison(mixed)
    seconds = table.index[table.index.str.endswith(" s")]
    assert len(seconds) == 2 and table.loc[seconds].map(lambda cell: "†" in cell).to_numpy().tolist() == [[False, True]] * 2
    ours, other = sentences.place(here, threads), sentences.place("Another GPU", 7)
    sentence = sentences.seconds_of(ours, other)
    assert sentence in mixed.verdict() and "2 devices (" in hardware(mixed)
    page = write_report(mixed, tmp_path / "report.html", todo).read_text()
    assert sentence in page and "<td>Another GPU</td>" in page
    speed = speed_of(one)
    output = against_in_words(against_measured(mixed, replace(speed, device=ours)))
    assert f"† marks seconds of other devices than the speed's: {other} / {other}; {here}" in output
    assert "2 devices are mixed" in speed_of(mixed).source


def test_the_report_says_what_the_run_was_and_how_to_have_it_again(data_folder, tmp_path):
    overrides = ["phases.meta.epochs=1", "strategies.end_to_end.phases.end_to_end.epochs=1"]
    todo = plan(load_settings("smoke", overrides), ["end_to_end", "deep_incubation"], [0, 1])
    todo.run()
    measured = from_plan(todo)
    page = html.unescape(write_report(measured, tmp_path / "report.html", todo).read_text())
    for words in (
        "synthetic: 192 images to train on, 96 to test on", "vit_tiny_patch16_224 img_size=8", "4 outputs",
        "K = 3 modules of 2 + 2 + 2 blocks; the meta model has 1 + 1 + 1", hardware(measured), measured.strategies["commit"][0],
        "a modelled schedule", "<dt>critical path</dt>",
    ):  # fmt: skip
        assert words in page
    assert page.count("some of the images to train on") == 1
    headings, links = re.findall('<h2 id="(.*?)">(.*?)</h2>', page), re.findall('<a href="#(.*?)">(.*?)</a>', page)
    assert headings == links and len(set(links)) == page.count("<h2") > 8, "contents lead to every part"
    command = re.search("<code>(incubate .*?)</code>", page)[1]
    options = parser().parse_args(shlex.split(command)[1:])
    assert load_settings(options.preset, options.set).digest() == todo.experiment.hash
    assert {"strategies": options.strategies, "seeds": options.seeds} == todo.arguments
    (tmp_path / "smoke.yaml").write_text(re.search("<pre>(.*?)</pre>", page, re.S)[1])
    assert load_settings(str(tmp_path / "smoke.yaml")).digest() == todo.experiment.hash
    tables = dict(re.findall('download="(.*?)" href="data:text/csv;charset=utf-8;base64,(.*?)"', page))
    assert list(tables) == ["smoke.csv", "smoke_phases.csv", "smoke_curves.csv"]
    assert base64.b64decode(tables["smoke.csv"]).decode() == records.as_csv(measured.strategies)
    first = measured.strategies[(measured.strategies["seed"] == 0) & (measured.strategies["strategy"] == "deep_incubation")]
    schedule = page.partition("a modelled schedule</h2>")[2].partition("</table>")[0]
    for column in ("seconds", "critical_seconds"):
        shown = [f">{first[column].item() * unit:,.4g} (" for unit in (1, 1000)]  # in milliseconds where all are short
        assert any(words in schedule for words in shown), "the seconds that were measured, not those of a mean speed"


def test_marks_stand_at_their_true_cost():
    made = results({"end_to_end": [0.5, 0.6], "deep_incubation": [0.7, 0.8]}, {"end_to_end": 1e12, "deep_incubation": 1e12})
    left, right = plots.score_vs_cost(made).axes
    for axis, cost in ((left, 1.0), (right, 0.5)):
        means = [line for line in axis.lines if line.get_marker() in "os"]
        assert [line.get_xydata().tolist() for line in means] == [[[cost, 55.0]], [[cost, 75.0]]]
        assert all(
            np.allclose(seeds.get_offsets()[:, 0], cost) for seeds in axis.collections[::1] if len(seeds.get_offsets()) == 2
        )


def test_publishing_keeps_every_number_and_draws_from_the_files(data_folder, tmp_path, monkeypatch):
    todo = plan(load_settings("smoke"), ["end_to_end", "deep_incubation"])
    todo.run()
    monkeypatch.setattr(records, "results_folder", lambda: tmp_path / "data" / "results")
    measured = from_plan(todo)
    files = publish.publish(measured)
    assert [f.name for f in files] == [
        "smoke.csv", "smoke_phases.csv", "smoke_curves.csv", "smoke_score_vs_cost.png", "smoke_convergence.png",
    ]  # fmt: skip
    assert all(f.is_relative_to(tmp_path) and f.stat().st_size > 200 for f in files)
    assert comparison(published("smoke")).equals(comparison(measured))
    assert published("smoke").verdict() == measured.verdict()


@pytest.mark.parametrize("name", PUBLISHED)
def test_tracked_figures_can_be_drawn_from_tracked_tables(name, tmp_path):
    tracked = published(name)
    for figure, draw in plots.PUBLISHED.items():
        axes = draw(tracked).axes
        assert all(axis.get_xlabel() or axis.get_shared_x_axes().joined(axis, axes[-1]) for axis in axes)
        unit = f"({tracked.metric.unit})" if tracked.metric.unit else ""  # perplexity has none
        assert "(" in axes[-1].get_xlabel() and unit in axes[0].get_ylabel(), "units on every axis"
        assert (ROOT / "figures" / f"{name}_{figure}.png").exists()
    if len(tracked.mntk):
        for figure, draw in mat.PUBLISHED.items():
            assert draw(tracked).axes and (ROOT / "figures" / f"{name}_{figure}.png").exists()
    page = write_report(tracked, tmp_path / "report.html").read_text()
    assert "±" in page and tracked.verdict().splitlines()[0] in page


def test_published_tables_stand_in_only_for_the_same_settings(data_folder):
    assert load_results("digits", [], [], [0]).published
    for preset, overrides in (("digits", ["training.lr=1e-3"]), ("smoke", [])):
        with pytest.raises(SettingsError, match=f"no strategy of {preset} is finished here"):
            load_results(preset, overrides, [], [0])


def test_strategies_can_be_told_apart_without_colour():
    looks = [plots.style(name) for name in ("end_to_end", "deep_incubation", "deep_incubation_stack", "deep_incubation_identity")]
    assert len({look["marker"] for look in looks}) == len({look["linestyle"] for look in looks}) == 4


def test_digits_are_published_with_five_seeds_and_equal_flops():
    table = published("digits").strategies
    assert set(table["strategy"]) == {"end_to_end", "deep_incubation", "deep_incubation_stack"}
    assert (table.groupby("strategy")["seed"].nunique() == 5).all()
    flops = table.groupby("strategy")["flops"].mean()
    assert flops.max() / flops.min() < 1.03
    assert set(table["split"]) == {"test"}


def test_the_settings_table_shows_only_what_has_a_meaning(data_folder):
    from incubate_lib.pipeline.strategies import open_phase

    digits, generated = (settings_table(open_phase("meta", preset)).index for preset in ("digits", "smoke"))
    assert "data.source" in digits and "training.lr" in digits
    assert not {"data.num_images", "data.num_classes", "data.crop_pct", "data.train_split"} & set(digits)
    assert "data.num_images" in generated and "data.folder" not in generated
