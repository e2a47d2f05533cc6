"""Studies: rates chosen on validation images alone, every cell at the cost that was told, the same numbers when called again."""

import json
import os
import shutil

import command_line
import pandas as pd
import pytest
import sentences
from patience import Hooks, wait_for

from incubate_lib.config.study import load_study
from incubate_lib.phases.job import read_job
from incubate_lib.pipeline import store
from incubate_lib.pipeline import study as walks
from incubate_lib.report.tables import studies as report
from incubate_lib.report.tables.answers import answer
from incubate_lib.report.tables.studies import StudyTable, summary
from incubate_lib.report.tables.study_plots import fronts, gain_map
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
    modules, largest = (results.groupby("strategy")[column].max() for column in ("module_memory", "memory"))
    assert largest.nunique() == 1 and modules.dropna().index.tolist() == ["deep_incubation"]  # the others train no module alone
    assert 0 < modules["deep_incubation"] < largest["deep_incubation"]
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
    hooks.hold("incubate-2", 0)  # so that it is not done before it is asked to stop
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
    assert result.returncode == 0 and sentences.THAN_END_TO_END in result.stdout
    shutil.rmtree(folder / "runs")


def test_it_is_told_what_is_left(trained, tmp_path):
    _, file, *_ = trained
    result = incubate("study", str(file), "--dry-run", folder=tmp_path)
    assert result.returncode == 0 and "no speed was measured here yet" in result.stdout
    assert not (tmp_path / "runs").exists() and not (tmp_path / "phases").exists()


def test_a_study_with_one_strategy_more_costs_no_more_than_that(trained, tmp_path, monkeypatch):
    """What is trained is known by the rates that were chosen, and what is left takes as long as what is finished took."""
    folder, *_ = trained
    monkeypatch.setenv("INCUBATE_DATA", str(folder))
    file = tmp_path / "trial.yaml"
    file.write_text(STUDY.replace("deep_incubation, growing]", "deep_incubation, growing, stacking]"))
    costs = walks.costs(load_study(str(file)))
    own = [trial for _, trials in walks.Walk(load_study(str(file))).stages() for trial in trials]
    missing = {n.digest: n for trial in own for n in trial.plan.nodes if not n.finished()}
    assert {node.strategy for node in missing.values()} == {"stacking"}
    assert sum(cost.missing for cost in costs) == len(missing)
    pace = walks.measured_pace()
    done = [s for path in folder.glob("phases/*") if (s := PhaseFolder(path).summary())["train_seconds"]]
    flops, seconds, evaluating = (sum(one[name] for one in done) for name in ("train_flops", "train_seconds", "eval_seconds"))
    every = [walks.Cost("", 0, 0, len(done), flops, frozenset())]
    assert pace.seconds(every) == pytest.approx(seconds + evaluating) and evaluating > 0


def test_the_tables_make_figures_and_sentences(trained):
    table = tables(trained[0])
    assert len(summary(table)) == 6 and len(answer(table)) >= 2
    for figure in (fronts(table), gain_map(table)):
        assert len(figure._repr_png_()) > 10_000


def test_a_rate_at_which_one_module_diverges_is_not_chosen(trained, tmp_path, monkeypatch):
    """Whatever the others have: nothing can be assembled from them."""
    before = walks.Walk(load_study(str(trained[1])))
    tries = [trial for _, trials in before.stages() for trial in trials if trial.phase == "incubate"]
    (where,) = {(trial.cell.label, trial.strategy) for trial in tries}
    best = before.chosen[where]["incubate"]
    first, *_ = next(trial for trial in tries if trial.rate == best).nodes
    monkeypatch.setenv("INCUBATE_DATA", str(shutil.copytree(trained[0], tmp_path / "data")))
    phase = PhaseFolder.of(first.digest)
    (phase.path / "summary.json").unlink()
    with pytest.raises(FloatingPointError), phase.claim({}):
        raise FloatingPointError("loss is nan")
    after = walks.Walk(load_study(str(trained[1])))
    assert list(after.stages()) and {best, after.chosen[where]["incubate"]} == {1e-3, 4e-3}


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
    assert result.returncode == 2 and "no rate keeps the loss finite in every training (1e+30)" in result.stderr
