"""What finished networks get right class by class, from the last evaluation to the report."""

import html
import json
from types import SimpleNamespace

import pytest
import torch

from incubate_lib.config import load_settings
from incubate_lib.phases.recipes import load_trained
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.html import write_report
from incubate_lib.report.tables.comparison import by_class
from incubate_lib.report.tables.records import from_plan


@pytest.fixture
def run(data_folder):
    todo = plan(load_settings("smoke", ["training.epochs=1"]), ["end_to_end", "deep_incubation"])
    todo.run()
    return todo


def test_classes_sum_to_the_score_and_are_those_of_the_saved_weights(run):
    for final in run.finals.values():
        summary, (_, images) = final.summary(), final.data()
        samples, right = summary["classes"]["samples"], summary["classes"]["right"]
        assert samples == torch.bincount(images.labels, minlength=4).tolist()
        assert sum(right) / sum(samples) == summary["score"]
        with torch.no_grad():
            guesses = load_trained(final.settings, final.folder, 4).eval()(images.normalise(images.images)).argmax(1)
        assert right == [int(((guesses == label) & (images.labels == label)).sum()) for label in range(4)]
        assert not any("classes" in node.summary() for node in final.upstream("incubate")), "a hybrid is no finished network"


def test_the_report_has_a_row_a_class_and_reads_runs_of_before(run, tmp_path):
    def page() -> str:
        return html.unescape(write_report(from_plan(run), tmp_path / "report.html", run).read_text())

    section = page().partition("Class by class</h2>")[2].partition("</table>")[0]
    assert [f"pattern {label}" in section for label in range(4)] == [True] * 4
    for final in run.finals.values():
        path = final.folder.path / "summary.json"
        summary = json.loads(path.read_text())
        assert summary.pop("classes")
        path.write_text(json.dumps(summary))
    assert "Class by class" not in page() and by_class(run).empty


def finished(*networks: tuple[str, int, list[int]], samples: list[int]) -> SimpleNamespace:
    """A run of finished networks: strategy, seed, and how many samples of each class are right."""
    summaries = {(name, seed): {"classes": {"samples": samples, "right": right}} for name, seed, right in networks}
    return SimpleNamespace(finals={key: SimpleNamespace(summary=lambda s=summary: s) for key, summary in summaries.items()})


def test_seeds_are_averaged_the_worst_class_stands_first_and_an_empty_one_nowhere():
    table = by_class(
        finished(("end_to_end", 0, [4, 1, 0]), ("end_to_end", 1, [2, 3, 0]), ("growing", 0, [1, 4, 0]), samples=[4, 8, 0]),
        ["cat", "dog", "unicorn"],
    )
    assert table.to_numpy().tolist() == [["dog", 8, 25.0, 50.0], ["cat", 4, 75.0, 25.0]]


def test_of_many_classes_the_worst_and_the_best_ten_are_shown():
    table = by_class(finished(("end_to_end", 0, list(range(100))), samples=[200] * 100))
    assert table["class"].tolist() == [str(label) for label in [*range(10), *range(90, 100)]]
