"""Scores of other metrics, and tables from before there were others: compared, sorted, chosen, worded the right way round."""

import dataclasses
import math

import pandas as pd
import pytest
import renamed
import sentences
from rich.console import Console

from incubate_lib import tasks
from incubate_lib.config import SettingsError, load_settings
from incubate_lib.config.study import COLUMNS, load_study
from incubate_lib.pipeline import study as walks
from incubate_lib.pipeline.graph import Node
from incubate_lib.pipeline.view import Line, render
from incubate_lib.report.export import Finished, choose
from incubate_lib.report.tables import mat, plots
from incubate_lib.report.tables.answers import answer, reached
from incubate_lib.report.tables.comparison import comparison
from incubate_lib.report.tables.records import Results, read_table
from incubate_lib.report.tables.studies import StudyTable, gains
from incubate_lib.report.tables.study_plots import ranking
from incubate_lib.report.tables.verdict import is_worse

PERPLEXITY = tasks.Metric("perplexity", "perplexity", digits=2, higher_is_better=False)


class Guessing(type(tasks.get())):
    """Classification, scored by a metric of which less is better."""

    metrics = (PERPLEXITY,)


@pytest.fixture(autouse=True)
def less_is_better(monkeypatch):
    known = {metric.name: metric for metric in (PERPLEXITY, tasks.get().score)}
    monkeypatch.setattr(tasks, "metric", known.__getitem__)


def table(scores: dict[str, list[float]], **more) -> pd.DataFrame:
    rows = [
        {"strategy": name, "seed": seed, "metric": "perplexity", "score": score, "meta_score": 4.0, "assembled_score": score + 1,
         "flops": 1e12, "critical_flops": 5e11, "seconds": 1.0, "critical_seconds": 1.0, "split": "test"} | more
        for name, values in scores.items() for seed, score in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def results(scores: dict[str, list[float]]) -> Results:
    phases = pd.DataFrame([{"phase": "meta", "seed": 0, "flops": 1e11, "metric": "perplexity", "score": 3.0}])
    return Results("t", table(scores), phases, pd.DataFrame())


def test_less_is_better_in_words_and_tables():
    made = results({"end_to_end": [3.5, 3.52, 3.51], "growing": [2.5, 2.51, 2.52]})
    told, shown = made.verdict(), comparison(made)
    assert made.metric is PERPLEXITY
    assert sentences.clearly_better("perplexity 1.00", 3) in told
    assert f"{sentences.META_ALONE}3.00 for 0.10 times" in told and f"{sentences.NOT_BETTER}end to end." in told
    assert shown.loc["perplexity"].tolist() == ["3.51 ± 0.01", "2.51 ± 0.01"] and "meta model" in shown.index
    worse = results({"end_to_end": [2.5, 2.52, 2.51], "growing": [3.5, 3.51, 3.52]}).verdict()
    assert "perplexity 1.00 worse" in worse and sentences.seeds_better(0, 3) in worse


def test_a_study_reaches_what_is_at_most_as_much():
    parts = {
        "1/4": {"end_to_end": [4.0, 4.0], "growing": [2.9, 2.9]}, "1": {"end_to_end": [3.0, 3.0], "growing": [3.2, 3.2]},
    }  # fmt: skip
    cells = [table(scores, budget=budget, flops=float(i + 1)) for i, (budget, scores) in enumerate(parts.items())]
    rows = pd.concat(cells, ignore_index=True).reindex(columns=["budget", *COLUMNS])
    made = StudyTable("made", rows, pd.DataFrame())
    found, told = reached(made), "\n".join(answer(made))
    assert found[["strategy", "budget", "score", "best"]].values.tolist() == [["growing", "1/4", 2.9, 3.0]]
    assert gains(made)["gain"].tolist() == pytest.approx([1.1, -0.2])
    assert "reaches end to end's best (3.00) on average, with 2.90, for 0.50 of its FLOPs" in told
    assert sentences.largest("gain", 2, "perplexity") in told and "at budget 1/4, +1.10" in told


def test_the_best_stands_on_top_and_axes_say_what_they_show():
    rows = table({"end_to_end": [3.0], "growing": [2.0], "stacking": [4.0]}).reindex(columns=COLUMNS)
    axis = ranking(StudyTable("made", rows, pd.DataFrame())).axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()][-1].startswith("meta model, grown")
    assert axis.get_xlabel().startswith("perplexity, test split; hollow")
    rows = pd.DataFrame({"epoch": [0, 1], "train_loss": 1.0, "loss": 1.0, "metric": "perplexity", "score": [4.0, 3.0]})
    right = plots.learning_curves({"it": rows}, {"meta model": 2.5, "chance": None}).axes[1]
    assert right.get_ylabel() == "perplexity"
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["it", "meta model (2.50)"]


def test_what_a_score_costs_is_read_where_the_curve_falls_to_it():
    curves = {"end_to_end": [5.0, 4.0, 3.0], "mat": [5.0, 3.0, 2.0]}
    rows = [
        {"strategy": name, "seed": 0, "phase": "end_to_end", "metric": "perplexity", "score": score, "step": i,
         "flops": i * 1e12, "train_seconds": i * 1.0}
        for name, scores in curves.items() for i, score in enumerate(scores)
    ]  # fmt: skip
    finals = table({name: scores[-1:] for name, scores in curves.items()})
    phases = pd.DataFrame({"strategy": list(curves), "phase": "end_to_end"})
    found = mat.reach(Results("t", finals, phases, pd.DataFrame(rows)))
    assert found.loc["MAT", "training FLOPs to 3.00"] == "0.500"


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [([2.0, 2.1], [3.0, 3.2], True), ([3.0, 3.2], [2.0, 2.1], False), ([2.0], [3.0], False)],  # of one seed nobody knows
)
def test_worse_is_more(before, after, worse):
    assert is_worse(PERPLEXITY, before, after, images=100) is worse


def test_a_better_network_has_less():
    ready = [Finished(name, 0, score, PERPLEXITY, None) for name, score in {"growing": 3.0, "end_to_end": 2.5}.items()]
    assert "; end_to_end is 0.500 perplexity better" in choose(load_settings("smoke"), ready, "growing", 0)[1]
    assert choose(load_settings("smoke"), ready, "end_to_end", 0)[1] == "as --strategy says"


def test_the_rate_with_the_least_is_chosen_and_what_diverged_never(tmp_path, monkeypatch):
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(tasks, "get", lambda name="": Guessing())
    (tmp_path / "rates.yaml").write_text(
        "{preset: smoke, strategies: [end_to_end], seeds: [0], rates: {values: [1.0e-3, 2.0e-3, 1.0e+30], seeds: [7]}}"
    )
    scores = {1e-3: 3.0, 2e-3: 2.0}
    found = {"metric": "perplexity", "epochs": 1, "steps": 1}

    def told(node, *_):
        score = scores.get(node.settings.training.lr)
        return None if score is None else found | {"score": score}

    monkeypatch.setattr(Node, "summary", told)
    monkeypatch.setattr(walks, "is_over", lambda node: True)
    walk = walks.Walk(load_study(str(tmp_path / "rates.yaml")))
    list(walk.stages())
    rows = pd.DataFrame(walk.tried).set_index("lr")
    assert rows["chosen"].to_dict() == {1e-3: False, 2e-3: True, 1e30: False}
    assert rows.loc[1e30, "score"] == math.inf and set(rows["metric"]) == {"perplexity"}


def test_several_metrics_are_not_compared():
    made = results({"end_to_end": [3.5], "growing": [2.5]})
    mixed = made.strategies.assign(metric=["perplexity", "accuracy"])
    for rows, words in ((mixed, "several metrics.*: perplexity, accuracy"), (mixed.assign(metric="odd"), "no task.*'odd'")):
        with pytest.raises(SettingsError, match=words):
            dataclasses.replace(made, strategies=rows, phases=pd.DataFrame()).verdict()


def test_a_terminal_has_the_metric_above_its_column():
    console = Console(width=120)
    with console.capture() as shown:
        console.print(render([Line("a", "a phase", "done", metric="perplexity", score="2.50")]))
    assert "perplexity" in shown.get() and "2.50" in shown.get() and "top-1" not in shown.get()


OLD = "strategy,seed,accuracy,meta_accuracy,judged_on,look_flops\ngrowing,0,0.50,0.1,test,7\n"
NEW = "strategy,seed,metric,score,meta_score,split,probe_flops\ngrowing,0,accuracy,0.50,0.1,test,7\n"


def test_tables_of_before_are_read_and_renamed_without_a_change_of_values(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text(OLD)
    assert read_table(path).to_csv(index=False) == NEW.replace("0.50", "0.5")
    assert renamed.rename_table(path) and path.read_text() == NEW and not renamed.rename_table(path)
    assert read_table(path).to_csv(index=False) == NEW.replace("0.50", "0.5")
