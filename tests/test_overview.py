"""What is best over studies: picked by its mean, corrected for all that it was picked from, said as the tables have it."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_study_tables import made

from incubate_lib.report.tables import overview
from incubate_lib.report.tables.studies import StudyTable, published, published_studies

WHOLE = [("1/2", "end_to_end", [0.60, 0.61, 0.62], 2, 2), ("1", "end_to_end", [0.70, 0.71, 0.72], 4, 4)]
PIECES = [("1/2", "growing", [0.71, 0.72, 0.73], 2, 2), ("1", "growing", [0.75, 0.77, 0.76], 4, 4),
          ("1/2", "deep_incubation", [0.70, 0.71, 0.72], 2, 1), ("1", "deep_incubation", [0.74, 0.74, 0.75], 4, 3)]  # fmt: skip
CONTROLS = [("1", "end_to_end_longer", [0.9, 0.9, 0.9], 12, 4), ("1", "meta_alone", [0.9, 0.9, 0.9], 4, 4)]


def test_the_best_of_pieces_is_compared_with_the_best_end_to_end():
    (found,) = overview.settings(made(WHOLE + PIECES))
    assert found.gain == pytest.approx(5.0) and found.shown["best in pieces"].startswith("76.0 ± 1.0 % at 1: meta model, grown")
    assert found.shown["end to end's best"] == "71.0 ± 1.0 % at 1"
    assert found.path == 0.25 and found.shown["path to end to end's best"].startswith("0.25: Deep Incubation")


def test_it_is_corrected_for_all_that_it_was_picked_from():
    """More candidates that are worse widen the interval and change nothing else; controls are no candidates."""
    few, many, with_controls = (overview.settings(made(WHOLE + rows))[0] for rows in (PIECES[1:2], PIECES, PIECES + CONTROLS))
    assert few.gain == many.gain and few.shown["ahead by"] != many.shown["ahead by"]
    assert replace(with_controls, whole_pays=None, pieces_pay=None) == many


def test_less_is_better_where_it_is():
    alone = [("1/2", "meta_alone", [0.70, 0.72, 0.71], 2, 2), ("1", "meta_alone", [0.50, 0.52, 0.51], 4, 4)]
    table = made(WHOLE + PIECES + alone)
    turned = table.results.assign(metric="perplexity", score=1 / table.results["score"], meta_score=1 / 0.73)
    (found,) = overview.settings(StudyTable("it", turned, table.rates))
    assert found.gain > 0 and "grown" in found.shown["best in pieces"] and found.path == 0.25
    assert (found.whole_pays, found.pieces_pay) == (False, True)  # the shallow one stops at 1/2
    assert found.is_meta_better  # than end to end's best, not than all


def test_the_meta_model_alone_counts_where_it_costs_no_more():
    dear = made([*WHOLE, ("1", "growing", [0.6, 0.6, 0.6], 4, 4), ("2", "growing", [0.6, 0.6, 0.6], 8, 8)])
    for budget, better in (("1", True), ("2", False)):
        scores = dear.results["budget"].map({budget: 0.9})
        (found,) = overview.settings(StudyTable("it", dear.results.assign(meta_score=scores), dear.rates))
        assert found.is_meta_better is better


def test_each_value_of_other_axes_is_a_setting_and_a_study_needs_no_budget():
    table = made([row for row in WHOLE + PIECES if row[0] == "1"])
    parts = [table.results.rename(columns={"budget": "depth"}).assign(depth=depth) for depth in ("4", "8")]
    found = overview.settings(StudyTable("it", pd.concat(parts), table.rates))
    assert [setting.place for setting in found] == ["4", "8"] and " at " not in found[0].shown["best in pieces"]


def test_sentences_follow_the_numbers():
    table = made(WHOLE + PIECES)
    said = overview.in_short([table])
    assert said.startswith("In 1 of 1 cases") and "for 0.25 of its critical path" in said
    worse = made(WHOLE + [(budget, name, np.subtract(scores, 0.3), *costs) for budget, name, scores, *costs in PIECES])
    said = overview.in_short([worse])
    assert said.startswith("In 0 of 1 cases") and "it is clearly behind in 1. In 0 of 1 some strategy" in said
    assert "reaches end to end's best mean. But" in said
    meta = StudyTable("it", table.results.assign(meta_score=0.9), table.rates)
    said = overview.in_short([meta])
    assert (
        "But in 1 of 1 the shallow meta model alone, for no more than end to end's cost, is at least as good on average" in said
    )
    assert "In 0 cases we also gave that shallow network whole budgets: a deep one is clearly better in 0" in said


def test_it_is_said_where_depth_pays_and_whether_a_fifth_of_the_critical_path_is_enough():
    """Only where the shallow network had the whole budget, and is clearly behind."""
    rows = [(budget, name, scores, 10 * flops, 10 * flops) for budget, name, scores, flops, _ in WHOLE]
    for path, alone, deep, sooner in ((9, 0.5, 1, 0), (8.04, 0.5, 1, 1), (8, 0.5, 1, 1), (8, 0.69, 0, 0)):  # path of 40
        shallow = ("1", "meta_alone", [alone, alone + 0.02, alone + 0.01], 40, 40)
        said = overview.in_short([made([*rows, shallow, ("1/2", "growing", [0.72, 0.72, 0.72], 20, path)])])
        assert "In 1 cases we also gave" in said
        assert f"whole budgets: a deep one is clearly better in {deep} of them, trained end to end in {deep}," in said
        assert f"Of these {deep}," in said and said.endswith(f"in {sooner}.")


def test_the_shallow_network_stops_where_it_is_best():
    """Trained on it gets worse, which is no merit of depth; more budget than the deep one's is no help to it."""
    long = [("1", "meta_alone", [0.50, 0.52, 0.51], 4, 4), ("1", "growing", [0.80, 0.82, 0.81], 4, 4)]
    for budget, flops, whole, pieces in (("1/2", 2, False, True), ("2", 8, True, True)):
        table = made(WHOLE + long + [(budget, "meta_alone", [0.70, 0.72, 0.71], flops, flops)])
        (found,) = overview.settings(table)
        assert (found.whole_pays, found.pieces_pay) == (whole, pieces)
    for unfinished in ([], [("1", "meta_alone", [np.nan] * 3, 4, 4)]):
        (found,) = overview.settings(made(WHOLE + PIECES + unfinished))
        assert found.whole_pays is None and found.pieces_pay is None


@pytest.mark.parametrize("name", published_studies())
def test_every_tracked_study_with_end_to_end_has_a_best(name):
    table = published(name)
    assert bool(overview.settings(table)) is ("end_to_end" in set(table.results["strategy"]))
