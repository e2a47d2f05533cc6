"""Studies: rates chosen on validation images alone, every cell at the cost that was told, statistics that hold."""

import json
import math
import os
import shutil
from pathlib import Path

import command_line
import numpy as np
import pandas as pd
import pytest
from patience import Hooks, wait_for
from project import block

from incubate_lib.config.study import COLUMNS, load_study, studies
from incubate_lib.phases.job import read_job
from incubate_lib.pipeline import store
from incubate_lib.pipeline import study as walks
from incubate_lib.report.tables import studies as report
from incubate_lib.report.tables.answers import answer, reached
from incubate_lib.report.tables.studies import StudyTable, gains, published, summary
from incubate_lib.report.tables.study_plots import fronts, gain_map, ranking
from incubate_lib.training.runs import PhaseFolder

pytestmark = pytest.mark.xdist_group("study")  # one process, so that the study is trained once
STUDY = """
description: two depths
preset: smoke
set:
  training.epochs: 1
  strategies.deep_incubation.match: end_to_end
  strategies.deep_incubation.shares: {meta: 0.3, incubate: 0.4}
  strategies.growing.match: end_to_end
axes:
  budget:
    half: {phases.end_to_end.epochs: 2}
    whole: {phases.end_to_end.epochs: 4}
strategies: [end_to_end, deep_incubation, growing]
seeds: [0, 1]
rates: {values: [1e-3, 4e-3], seeds: [7], at: {budget: half}}
"""


def incubate(*arguments, folder):
    return command_line.incubate(*arguments, env=os.environ | {"INCUBATE_DATA": str(folder), "COLUMNS": "200"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small study, from nothing to its tables: folder, file, costs told beforehand, what it printed."""
    folder = tmp_path_factory.mktemp("study")
    file = folder / "trial.yaml"
    file.write_text(STUDY)
    patch = pytest.MonkeyPatch()
    patch.setenv("INCUBATE_DATA", str(folder / "data"))
    costs = walks.costs(load_study(str(file)))
    result = incubate("study", str(file), "--jobs", "2", folder=folder / "data")
    assert result.returncode == 0, result.stderr + result.stdout
    yield folder / "data", file, costs, result.stdout
    patch.undo()


def tables(folder) -> StudyTable:
    return report.read_tables(folder / "studies", "trial", "trial")


def test_every_cell_has_every_strategy_and_seed_once_at_equal_cost(trained):
    results = tables(trained[0]).results
    keys = results[["budget", "strategy", "seed"]].apply(tuple, axis=1)
    assert sorted(keys) == sorted(
        (b, s, seed) for b in ("half", "whole") for s in ("end_to_end", "deep_incubation", "growing") for seed in (0, 1)
    )
    assert set(results["split"]) == {"test"}
    means = results.groupby(["budget", "strategy"])["flops"].mean().unstack()
    assert (means.div(means["end_to_end"], axis=0) - 1).abs().max().max() < 0.04  # half an update of 22
    assert means.loc["whole", "end_to_end"] == pytest.approx(2 * means.loc["half", "end_to_end"], rel=0.01)


def test_rates_are_the_best_on_validation_images_and_are_those_that_were_used(trained):
    folder = trained[0]
    table = tables(folder)
    assert set(table.rates["budget"]) == {"half"} and set(table.rates["seed"]) == {7}
    for (name, phase), group in table.rates.groupby(["strategy", "phase"]):
        assert set(group["lr"]) == {1e-3, 4e-3}
        best = group.loc[group["score"] == group["score"].max(), "lr"]
        chosen = group.loc[group["chosen"], "lr"]
        assert chosen.tolist() == [best.iloc[0]]
        assert set(table.results.loc[table.results["strategy"] == name, f"lr_{phase}"]) == {chosen.iloc[0]}
    split = {7: "val", 0: "test", 1: "test"}
    phases = [read_job(path) for path in folder.glob("phases/*/phase.json")]
    assert {job.settings.seed for job in phases} == split.keys()
    assert all(job.settings.data.eval_split == split[job.settings.seed] for job in phases)


def test_it_costs_what_was_told_and_nothing_is_trained_twice(trained):
    folder, _, costs, _ = trained
    own = [PhaseFolder(path) for path in folder.glob("phases/*")]
    assert all(phase.finished() and phase.status()["attempt"] == 1 for phase in own)
    spent = sum(phase.summary()["train_flops"] for phase in own)
    assert spent == pytest.approx(sum(cost.flops for cost in costs), rel=0.02)
    assert len(own) <= sum(cost.missing for cost in costs)  # rates that two strategies agree on have phases in common
    assert not (folder / "runs").exists() and store.unused() == []


def test_names_of_a_stages_phases_are_their_own_and_inputs_are_among_them(trained):
    """A backend knows jobs by them, and what a job waits for."""
    seen = {}
    for _, trials in walks.Walk(load_study(str(trained[1]))).stages():
        nodes = walks._each_once(trials)
        assert len({node.key for node in nodes}) == len({node.digest for node in nodes}) == len(nodes)
        assert not any(seen.get(node.key, node.digest) != node.digest for node in nodes)
        seen |= {node.key: node.digest for node in nodes}
        own = {node.digest: node for node in nodes}
        assert all(own.get(before.digest, before) is before for node in nodes for before in node.inputs.values())


def test_called_again_it_trains_nothing_and_says_the_same(trained):
    folder, file, _, output = trained
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("model.safetensors")}
    saved = (folder / "studies" / "trial.csv").read_text()
    again = incubate("study", str(file), folder=folder)
    assert again.returncode == 0 and "Everything is trained." in again.stdout
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("model.safetensors")} == before
    assert (folder / "studies" / "trial.csv").read_text() == saved
    assert again.stdout.splitlines()[-8:] == output.splitlines()[-8:]


def test_stopped_in_the_middle_it_goes_on_and_ends_in_the_same_numbers(trained, tmp_path):
    """One strategy of the study, stopped from outside while phases run, then called again; its accuracies are those of the
    study that was not."""
    file, hooks = tmp_path / "trial.yaml", Hooks(tmp_path)
    file.write_text(STUDY.replace("strategies: [end_to_end, deep_incubation, growing]", "strategies: [deep_incubation]"))
    hooks.hold("incubate-2", 0)  # so that it is not done before it is told to stop
    env = os.environ | hooks.env | {"INCUBATE_DATA": str(tmp_path)}
    begun = command_line.Begun("study", str(file), "--jobs", "2", env=env)
    wait_for(lambda: "module 1 of 3" in begun.output, "a module to be trained")
    asked = incubate("study", str(file), "--stop", folder=tmp_path)
    result = begun.end()
    assert result.returncode == 130 and "Stopped." in result.stdout and "asked trial to stop" in asked.stdout
    assert not (tmp_path / "studies" / "trial.csv").exists()
    assert incubate("study", str(file), "--jobs", "2", folder=tmp_path).returncode == 0
    for table in ("trial.csv", "trial_rates.csv"):
        ours, theirs = (pd.read_csv(data / "studies" / table) for data in (tmp_path, trained[0]))
        theirs = theirs[theirs["strategy"] == "deep_incubation"].reset_index(drop=True)
        assert len(ours) == len(theirs) > 1
        same = [c for c in theirs if c not in ("seconds", "critical_seconds", "date", "commit") and theirs[c].notna().any()]
        pd.testing.assert_frame_equal(ours[same], theirs[same], check_dtype=False)


def test_a_cell_of_a_study_is_a_run_that_is_trained_already(trained):
    folder, file, *_ = trained
    *_, (_, (trial, *_)) = walks.Walk(load_study(str(file))).stages()
    trial.plan.write()
    overrides = [part for value in trial.plan.experiment.settings.overrides for part in ("--set", value)]
    result = incubate("report", "smoke", *overrides, folder=folder)
    assert result.returncode == 0 and "than end to end" in result.stdout
    shutil.rmtree(folder / "runs")


def test_it_is_told_what_is_left(trained, tmp_path):
    _, file, *_ = trained
    result = incubate("study", str(file), "--dry-run", folder=tmp_path)
    assert result.returncode == 0 and "nothing was trained here yet" in result.stdout
    assert not (tmp_path / "runs").exists() and not (tmp_path / "phases").exists()


def test_the_tables_make_figures_and_sentences(trained):
    table = tables(trained[0])
    assert len(summary(table)) == 6 and len(answer(table)) >= 2
    for figure in (fronts(table), gain_map(table)):
        assert len(figure._repr_png_()) > 10_000


# -- statistics -----------------------------------------------------------------------------------------------------------


def made(rows) -> StudyTable:
    """A table of (budget, strategy, accuracies by seed, flops, critical flops)."""
    records = []
    for budget, strategy, accuracies, flops, critical in rows:
        for seed, accuracy in enumerate(accuracies):
            record = dict.fromkeys(COLUMNS) | {
                "budget": budget,
                "strategy": strategy,
                "seed": seed,
                "metric": "accuracy",
                "score": accuracy,
            }
            record |= {"flops": flops, "critical_flops": critical, "seconds": flops, "split": "test"}
            records.append(record | {"meta_score": np.nan, "assembled_score": np.nan})
    rates = pd.DataFrame(columns=["budget", "strategy", "phase", "lr", "seed", "metric", "score", "chosen"])
    return StudyTable("made", pd.DataFrame(records)[["budget", *COLUMNS]], rates)


def test_gains_are_paired_by_seed():
    """Seeds differ by ten points, strategies by one: only pairs show it."""
    base = np.array([0.5, 0.6, 0.7, 0.8])
    gain = np.array([0.010, 0.012, 0.008, 0.010])
    table = made([("1", "end_to_end", base, 4, 4), ("1", "growing", base + gain, 4, 4), ("1", "stacking", base[::-1], 4, 4)])
    found = gains(table).set_index("strategy")
    half = 4.176535 * np.std(100 * gain, ddof=1) / 2  # Student's t, three degrees of freedom, at 97.5 % for two comparisons
    assert found.loc["growing", "gain"] == pytest.approx(1.0) and found.loc["growing", "clear"]
    assert found.loc["growing", "low"] == pytest.approx(1.0 - half, abs=1e-6)
    assert not found.loc["stacking", "clear"] and found.loc["stacking", "gain"] == pytest.approx(0.0)
    assert gains(table, "growing").set_index("strategy").loc["end_to_end", "gain"] == pytest.approx(-1.0)


def test_one_seed_says_nothing_about_chance():
    table = made([("1", "end_to_end", [0.5], 4, 4), ("1", "growing", [0.9], 4, 4)])
    row = gains(table).iloc[0]
    assert math.isnan(row["low"]) and not row["clear"] and "one seed" in report.gain_text(row)


def test_the_cheapest_way_to_end_to_ends_best():
    table = made([
        ("1/4", "end_to_end", [0.5, 0.5], 1, 1), ("1", "end_to_end", [0.9, 0.92], 4, 4),
        ("1/4", "growing", [0.91, 0.92], 1, 1), ("1", "growing", [0.95, 0.96], 4, 4),
        ("1/4", "deep_incubation", [0.6, 0.6], 1, 0.5), ("1", "deep_incubation", [0.8, 0.8], 4, 2),
    ])  # fmt: skip
    found = reached(table)
    assert found["strategy"].tolist() == ["growing"] and found["budget"].tolist() == ["1/4"]
    assert found["flops"].tolist() == [0.25] and found["gain"].iloc[0] == pytest.approx(0.5)
    output = "\n".join(answer(table))
    assert "for 0.25 of its FLOPs" in output and "(paper) does not reach end to end's best at any budget here" in output
    assert "gain of 4 comparisons at equal FLOPs, in points: meta model, grown, no incubation at budget 1/4" in output
    assert "loss of 4 comparisons at equal FLOPs, in points: Deep Incubation, random start (paper) at budget 1, -11.0" in output
    assert "Corrected for 4 comparisons (Holm)." in output and "4 cells were compared" in output


def test_a_cell_without_end_to_end_is_not_the_best():
    """What is not finished, or diverged, is left out; it neither hides the best cell nor makes one."""
    rows = [
        ("1/4", "end_to_end", [math.nan, math.nan], 1, 1), ("1/4", "growing", [0.8, 0.8], 1, 1),
        ("1/2", "end_to_end", [0.7, 0.7], 2, 2), ("1/2", "growing", [0.9, 0.9], 2, 2),
        ("1", "growing", [0.9, 0.9], 4, 4),
    ]  # fmt: skip
    for some in (rows, rows[1:]):
        found = reached(made(some))
        assert found["budget"].tolist() == ["1/4"] and found["flops"].tolist() == [0.5], found
        assert found["best"].tolist() == pytest.approx([0.7]) and found["gain"].tolist() == pytest.approx([10.0])
        assert "nan" not in "".join(answer(made(some)))
    assert reached(made(rows[-1:])).empty
    assert answer(made(rows[:1] + rows[-1:])) == ["Nothing is finished yet."]


def test_two_cells_are_compared_on_the_seeds_that_both_have():
    """End to end's second seed is good and the other's is missing: nothing is reached by it."""
    table = made([("1", "end_to_end", [0.5, 0.9], 4, 4), ("1", "growing", [0.6], 4, 4)])
    found = reached(table)
    assert found["best"].tolist() == [0.5] and found["gain"].iloc[0] == pytest.approx(10.0) and found["seeds"].tolist() == [1]


def test_gains_are_corrected_for_how_many_a_study_compares():
    """One of six gains has p = 0.03: the largest, but not clear."""
    base, pattern = np.full(5, 0.5), np.array([-2, -1, 0, 1, 2]) / 100  # with a standard error of 0.707 points
    rows = [(str(b), "end_to_end", base, 4, 4) for b in range(6)]
    rows += [(str(b), "growing", base + pattern + (0.0234 if b == 0 else 0), 4, 4) for b in range(6)]
    alone, together = gains(made(rows[:1] + rows[6:7])), gains(made(rows))
    assert alone["clear"].tolist() == [True] and together["clear"].tolist() == [False] * 6
    assert together["low"].iloc[0] < 0 < alone["low"].iloc[0] and together["gain"].iloc[0] == pytest.approx(alone["gain"].iloc[0])
    assert "inside the noise. Corrected for 6 comparisons (Holm)." in "\n".join(answer(made(rows)))


def test_seconds_of_several_devices_are_marked(tmp_path):
    table = made([("1", "end_to_end", [0.5, 0.6], 4, 4), ("1", "growing", [0.7, 0.8], 4, 4)])
    table.results["device"], table.results["threads"] = "A CPU", "1"
    assert "†" not in summary(table).to_string() and gains(table)["seconds"].tolist() == [1.0]
    table.results.loc[table.results["strategy"] == "growing", ["device", "threads"]] = "A CPU + A GPU", "1 + 4"
    assert summary(table)["training s"].str.contains("†").tolist() == [False, True]
    assert gains(table)["seconds"].isna().all() and gains(table)["flops"].tolist() == [1.0]
    assert "Seconds of 2 devices: A CPU, 1 thread(s); A GPU, 4 thread(s)." in "\n".join(answer(table))
    assert "2 devices (" in report.described(StudyTable("made", table.results.assign(date="2026-01-01", torch="2"), table.rates))


def test_a_study_without_what_is_compared_has_no_such_figures():
    table = made([("1", "end_to_end", [0.5, 0.6], 4, 4), ("1", "growing", [0.9, 0.8], 8, 8)])
    assert gain_map(table) is None and len(fronts(table)._repr_png_()) > 10_000
    renamed = StudyTable("made", table.results.rename(columns={"budget": "depth"}), table.rates)
    assert fronts(renamed) is None and ranking(renamed) is None
    single = StudyTable("made", table.results.drop(columns="budget"), table.rates)
    assert fronts(single) is None and gain_map(single) is None and len(ranking(single)._repr_png_()) > 10_000


def test_values_of_axes_are_read_as_they_are_written(tmp_path):
    table = made([(value, "end_to_end", [0.5, 0.6], 4, 4) for value in ("0.10", "None", "1/4", "NA")])
    for part, rows in {"": table.results, "_rates": table.rates}.items():
        rows.to_csv(tmp_path / f"x{part}.csv", index=False)
    read = report.read_tables(tmp_path, "x", "made")
    assert read.results["budget"].unique().tolist() == ["0.10", "None", "1/4", "NA"] and read.axes == ["budget"]
    assert math.isnan(read.results["meta_score"].iloc[0])


def test_a_rate_that_is_too_high_is_an_answer(tmp_path, monkeypatch):
    """What diverges counts as the worst while rates are chosen, is not tried again, and the study goes on with the other."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / "data"))
    file = tmp_path / "wild.yaml"
    study = {"preset": "smoke", "strategies": ["end_to_end"], "seeds": [0], "set": {
        "phases.end_to_end.epochs": 1, "training.clip_grad": None, "training.warmup_epochs": 0,
    }, "rates": {"values": [1e30, 1e-3], "seeds": [7]}}  # fmt: skip
    file.write_text(json.dumps(study))
    result = incubate("study", str(file), "--jobs", "1", folder=tmp_path / "data")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "is not finite" in result.stdout or "loss is nan" in result.stdout or "FAILED" in result.stdout
    rates = pd.read_csv(tmp_path / "data" / "studies" / "wild_rates.csv").set_index("lr")
    assert rates.loc[1e30, "score"] == 0 and rates.loc[1e-3, "chosen"] and not rates.loc[1e30, "chosen"]
    study["rates"]["values"] = [1e30]
    file.write_text(json.dumps(study))
    result = incubate("study", str(file), "--jobs", "1", folder=tmp_path / "data")
    assert result.returncode == 2 and "the loss is not finite at any rate (1e+30)" in result.stderr


# -- what is tracked ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", studies())
def test_studies_of_the_package_are_whole(name):
    study = load_study(name)
    assert study.name == name and study.description and study.question and len(study.seeds) >= 3


def test_the_study_of_the_readme_is_one(tmp_path):
    (tmp_path / "mine-depth.yaml").write_text(block("yaml", "description: two depths"))
    study = load_study(str(tmp_path / "mine-depth.yaml"))
    assert [cell.place for cell in study.cells()] == [{"depth": "12"}, {"depth": "24"}]


@pytest.mark.parametrize("name", report.published_studies())
def test_tracked_tables_are_those_of_the_study(name):
    table, study = published(name), load_study(name)
    assert table.axes == list(study.axes)
    cells = [tuple(cell.place.values()) for cell in study.cells()]
    assert set(map(tuple, table.results[table.axes].drop_duplicates().to_numpy().tolist())) == set(cells)
    counts = table.results.groupby([*table.axes, "strategy"])["seed"].agg(set)
    assert set(counts.map(tuple)) == {tuple(sorted(study.seeds))} and len(counts) == len(cells) * len(study.strategies)
    if study.rates:
        assert set(table.rates["lr"]) == set(study.rates.values) and set(table.rates["seed"]) == set(study.rates.seeds)


def test_every_tracked_figure_is_drawn_again_from_a_tracked_table(tmp_path, monkeypatch):
    """What `incubate figures` writes is what is tracked, no more and no less, and each only once."""
    from incubate_lib.report import publish
    from incubate_lib.report.tables import mat, plots

    root = Path(__file__).parents[1]
    (tmp_path / "data").mkdir()
    shutil.copytree(root / "data" / "results", tmp_path / "data" / "results")
    monkeypatch.setattr("incubate_lib.report.tables.records.results_folder", lambda: tmp_path / "data" / "results")
    blank = plots.Figure(figsize=(1, 1))  # how they look is seen elsewhere
    for module in (plots, mat):
        monkeypatch.setattr(module, "PUBLISHED", {name: lambda _: blank for name in module.PUBLISHED})
    written = publish.redraw()
    tracked = {path.name for path in (root / "figures").glob("*.png")}
    assert sorted(path.name for path in written) == sorted(tracked)
