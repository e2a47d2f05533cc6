"""What tables of studies say: statistics that hold, sentences that follow them; tracked tables fit their studies."""

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sentences
from project import block

from incubate_lib.config.study import COLUMNS, load_study, studies
from incubate_lib.report.tables import studies as report
from incubate_lib.report.tables.answers import answer, changes, reached
from incubate_lib.report.tables.statistics import paired
from incubate_lib.report.tables.studies import StudyTable, gains, published, summary
from incubate_lib.report.tables.study_plots import fronts, gain_map, ranking
from incubate_lib.report.tables.verdict import meta_alone

NOTHING_IN_COMMON = "There is nothing to compare: no other strategy has a finished seed in common with end to end."


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
    assert f"{sentences.largest('gain', 4, 'points')}meta model, grown, no incubation at budget 1/4" in output
    assert f"{sentences.largest('loss', 4, 'points')}{sentences.DEEP_INCUBATION} at budget 1, -11.0" in output
    assert sentences.corrected(4) in output and "4 cells were compared" in output


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
    assert answer(made(rows[:1] + rows[-1:])) == [NOTHING_IN_COMMON]


def test_a_study_without_budgets_or_equal_costs_has_an_answer():
    dearer = made([("1", "end_to_end", [0.5, 0.5], 4, 4), ("1", "growing", [0.9, 0.8], 6, 6)]).results
    (of_all,) = answer(StudyTable("it", dearer.rename(columns={"budget": "depth"}), pd.DataFrame()))
    assert "35.0 points better" in of_all and "1.50 times its training FLOPs" in of_all
    alone = dearer[dearer["strategy"] == "end_to_end"].drop(columns="budget")
    assert answer(StudyTable("it", alone, pd.DataFrame())) == [NOTHING_IN_COMMON]


def test_the_meta_model_alone_is_told_where_there_is_one_and_end_to_end_to_compare_with():
    rows = {
        "strategy": ["end_to_end", "growing", "mine"],
        "seed": 0,
        "metric": "accuracy",
        "score": [0.5, 0.45, 0.75],
        "flops": 4,
    }
    phases = {"phase": "meta", "seed": 0, "metric": "accuracy", "score": [0.4, 0.9], "flops": 2}  # two of one cost
    table, meta = pd.DataFrame(rows), pd.DataFrame(phases)
    assert meta_alone(table, meta[:1]) == (
        "The meta model alone has 40.0 % for 0.50 times end to end's training FLOPs, and every strategy is better on average."
    )
    assert meta_alone(table, meta) == "" and meta_alone(table[1:], meta[:1]) == ""


def test_several_cells_are_not_taken_for_more_seeds():
    rows = made([(budget, name, [0.5, 0.6], 1, 1) for budget in ("1/2", "1") for name in ("end_to_end", "growing")]).results
    assert len(paired(rows[rows["budget"] == "1"], "growing", "end_to_end")) == 2
    with pytest.raises(ValueError, match="one cell at a time"):
        paired(rows, "growing", "end_to_end")


def test_two_cells_are_compared_on_the_seeds_that_both_have():
    """End to end's second seed is good and the other's is missing: nothing is reached by it."""
    table = made([("1", "end_to_end", [0.5, 0.9], 4, 4), ("1", "growing", [0.6], 4, 4)])
    found = reached(table)
    assert found["best"].tolist() == [0.5] and found["gain"].iloc[0] == pytest.approx(10.0) and found["seeds"].tolist() == [1]


def test_recipes_are_compared_with_the_first_of_them():
    """For each strategy, seed by seed: it says which fields of a recipe matter."""
    base, noise = np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.001, -0.001, 0.001, -0.001])
    rows = [(value, name, base + shift * (name == "growing") + noise * (shift > 0), 4, 4)
            for value, shift in (("ours", 0.0), ("theirs", 0.02)) for name in ("end_to_end", "growing")]  # fmt: skip
    rows += [("of pieces", "end_to_end", base, 4, 4)]  # says nothing of end to end, so it is the same networks
    table = made(rows)
    table = StudyTable("made", table.results.rename(columns={"budget": "recipe"}), table.rates)
    found = changes(table).set_index("of")
    assert found["gain"].to_dict() == pytest.approx({"end_to_end": 0.0, "growing": 2.0}) and set(found["other"]) == {"ours"}
    assert found["clear"].to_dict() == {"end_to_end": False, "growing": True} and set(found["comparisons"]) == {2}
    assert "no incubation: recipes against ours, in points: theirs +2.0 [" in "\n".join(answer(table))


def test_gains_are_corrected_for_how_many_a_study_compares():
    """One of six gains has p = 0.03: the largest, but not clear."""
    base, pattern = np.full(5, 0.5), np.array([-2, -1, 0, 1, 2]) / 100  # with a standard error of 0.707 points
    rows = [(str(b), "end_to_end", base, 4, 4) for b in range(6)]
    rows += [(str(b), "growing", base + pattern + (0.0234 if b == 0 else 0), 4, 4) for b in range(6)]
    alone, together = gains(made(rows[:1] + rows[6:7])), gains(made(rows))
    assert alone["clear"].tolist() == [True] and together["clear"].tolist() == [False] * 6
    assert together["low"].iloc[0] < 0 < alone["low"].iloc[0] and together["gain"].iloc[0] == pytest.approx(alone["gain"].iloc[0])
    assert f"inside the noise. {sentences.corrected(6)}" in "\n".join(answer(made(rows)))


def test_seconds_of_several_devices_are_marked(tmp_path):
    table = made([("1", "end_to_end", [0.5, 0.6], 4, 4), ("1", "growing", [0.7, 0.8], 4, 4)])
    table.results["device"], table.results["threads"] = "A CPU", "1"
    assert "†" not in summary(table).to_string() and gains(table)["seconds"].tolist() == [1.0]
    table.results.loc[table.results["strategy"] == "growing", ["device", "threads"]] = "A CPU + A GPU", "1 + 4"
    assert summary(table)["training s"].str.contains("†").tolist() == [False, True]
    assert gains(table)["seconds"].isna().all() and gains(table)["flops"].tolist() == [1.0]
    assert sentences.seconds_of(sentences.place("A CPU", 1), sentences.place("A GPU", 4)) in "\n".join(answer(table))
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


# -- what is tracked ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", studies())
def test_studies_of_the_package_are_whole(name):
    study = load_study(name)
    assert study.name == name and study.description and study.question and len(study.seeds) >= 3


def test_the_study_of_the_readme_is_one(tmp_path):
    (tmp_path / "mine-depth.yaml").write_text(block("yaml", "description: two depths"))
    study = load_study(str(tmp_path / "mine-depth.yaml"))
    assert [cell.place for cell in study.cells()] == [{"depth": "12"}, {"depth": "24"}]


def test_the_depths_of_a_text_network_have_rates_near_those_that_were_chosen_for_it():
    """One step of the grid at most: they were chosen for a smaller budget."""
    given = {field: value for field, value in load_study("austen-depth").set.items() if field.endswith(".lr")}
    chosen = published("austen-budget").rates.query("chosen and budget == '1/2'")[["strategy", "phase", "lr"]].drop_duplicates()
    known = {f"strategies.{row.strategy}.phases.{row.phase}.lr": row.lr for row in chosen.itertuples()}
    assert given and given.keys() <= known.keys()
    assert all(value / known[field] in (0.5, 1, 2) for field, value in given.items())


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
