"""What carries over: a report compares the run's networks where runs and studies trained them further, and only those."""

import html
import json
import os

import command_line
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file, save_file

from incubate_lib.config import load_settings
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.html import write_report
from incubate_lib.report.tables import statistics
from incubate_lib.report.tables.downstream import carried_over
from incubate_lib.report.tables.records import from_plan
from incubate_lib.report.tables.studies import read_tables
from incubate_lib.report.tables.verdict import differences

pytestmark = pytest.mark.xdist_group("carried_over")  # one process, so that all is trained once
SEEDS = [0, 1]
OURS = "runs/smoke/seed-{seed}"
STARTS = {
    "from_nothing": {"kind": "end_to_end"},
    "mine": {"kind": "finetune", "weights": f"{OURS}/end_to_end"},
    "pieces": {"kind": "finetune", "weights": f"{OURS}/deep_incubation/finetune"},
    "assembled": {"kind": "finetune", "weights": f"{OURS}/deep_incubation/assemble"},
    "elsewhere": {"kind": "finetune", "weights": "others.safetensors"},
}
FURTHER = {
    "task": "segmentation",
    "data": {"source": "digit_maps", "num_images": 8, "test_images": 4, "image_size": 32, "num_classes": 3},
    "model": load_settings("smoke").model.model_dump(exclude_defaults=True) | {"img_size": 32, "patch_size": 4},
    "training": {"epochs": 1, "batch_size": 4, "lr": 1e-3, "warmup_epochs": 0, "label_smoothing": 0},
    "strategies": STARTS,
    "run": [*STARTS],
    "machine": {"workers": 0},
}
HEADING = "What carries over"


STUDY = {
    "preset": "further.yaml",
    "axes": {"length": {"half": {"training.epochs": 0.5}, "whole": {"training.epochs": 1}}},
    "strategies": ["from_nothing", "mine", "pieces", "elsewhere"],
    "seeds": SEEDS,
}
CELLS = ["trial, length half", "trial, length whole"]
NETWORKS = ["nothing", "end to end", "Deep Incubation, random start (paper)"]


def trained(preset, *overrides, strategies=()):
    made = plan(load_settings(preset, overrides), strategies, SEEDS)
    made.run()
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, its report of that day, and then a run and a study that start from its networks and from one of others."""
    folder, patch = tmp_path_factory.mktemp("further"), pytest.MonkeyPatch()
    patch.setenv("INCUBATE_DATA", str(folder / "data"))
    networks = trained("smoke", "training.epochs=1", strategies=["end_to_end", "deep_incubation"])
    before = report(networks, folder)
    weights = load_file(networks.finals["end_to_end", 0].folder.weights)
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, folder / "data" / "others.safetensors")
    for name, values in {"further": FURTHER, "trial": STUDY}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    further = trained(str(folder / "further.yaml"))
    done = command_line.incubate("study", str(folder / "trial.yaml"), env=os.environ)
    assert done.returncode == 0, done.stderr
    yield networks, before, further, folder / "data"
    patch.undo()


def report(run, folder) -> str:
    return html.unescape(write_report(from_plan(run), folder / "report.html", run).read_text())


def rows(run) -> pd.DataFrame:
    return carried_over(run)[0].set_index(["trained further in", "from"])


def test_its_rows_are_the_networks_of_the_run_that_were_trained_further(runs):
    networks, _, further, _ = runs
    found, own = rows(networks), from_plan(further).strategies
    names = [*NETWORKS, f"{NETWORKS[-1]}, assembly"]
    assert found.index.tolist() == [("further", n) for n in names] + [(cell, n) for cell in CELLS for n in NETWORKS]
    assert (found["seeds"] == len(SEEDS)).all()
    for name, strategy in zip(names, STARTS, strict=False):
        values = 100 * own.loc[own["strategy"] == strategy, "score"]
        assert found.loc[("further", name), "score"] == f"mIoU % {values.mean():.1f} ± {values.std():.1f}"
    assert (found.loc[CELLS[1], "score"] == found.loc["further", "score"][:3]).all(), "the same phases"


def test_differences_are_paired_with_end_to_ends_network_and_are_one_family(runs):
    networks, _, further, data = runs
    study = read_tables(data / "studies", "trial", "trial").results
    tables = [from_plan(further).strategies, *(study[study["length"] == length] for length in ("half", "whole"))]
    differences = []
    for table in tables:
        scores = table.pivot(index="seed", columns="strategy", values="score")
        others = [name for name in ("from_nothing", "pieces", "assembled") if name in scores]
        differences += [100 * (scores[name] - scores["mine"]) for name in others]
    judged = statistics.compare(differences).assign(metric="mean_iou").to_dict("records")
    gains = rows(networks)["over end to end's"]
    assert gains[gains != ""].tolist() == [statistics.gain_text(row) for row in judged]
    assert (gains.xs("end to end", level="from") == "").all()


def test_scores_of_several_tasks_are_judged_as_one_family_each_by_its_metric():
    scores = {
        ("mean_iou", "a"): [0.5, 0.6],
        ("mean_iou", "b"): [0.6, 0.71],
        ("perplexity", "a"): [9.0, 8.0],
        ("perplexity", "b"): [7.0, 7.5],
    }
    table = pd.DataFrame([{"in": metric, "metric": metric, "strategy": name, "seed": seed, "score": score}
                          for (metric, name), values in scores.items() for seed, score in enumerate(values)])  # fmt: skip
    found = differences(table, [("b", "a")], ["in"])
    assert found["metric"].tolist() == ["mean_iou", "perplexity"] and set(found["comparisons"]) == {2}
    assert found["gain"].tolist() == pytest.approx([10.5, 1.25]), "less perplexity is better"


def test_the_report_has_them_from_then_on(runs, tmp_path):
    networks, before, _, _ = runs
    assert HEADING not in before
    part = report(networks, tmp_path).partition(f">{HEADING}</h2>")[2].partition("<h2")[0]
    shown = rows(networks)
    assert all(words in part for words in (*shown["score"], *CELLS, *NETWORKS, "Corrected for 7 comparisons (Holm)."))


def test_networks_that_were_trained_again_have_carried_nothing_over_yet(runs):
    networks, *_ = runs
    again = trained("smoke", "training.epochs=1", "training.lr=1e-3", strategies=["end_to_end"])
    assert again.experiment.path == networks.experiment.path and carried_over(again)[0].empty
    assert len(rows(networks)) == 10, "and those of before still have"


def test_a_table_of_other_phases_than_there_are_is_not_shown(runs):
    networks, *_, data = runs
    table = data / "studies" / "trial.csv"
    before = table.read_text()
    results = read_tables(data / "studies", "trial", "trial").results
    results.assign(score=results["score"] + 0.001).to_csv(table, index=False)
    assert set(rows(networks).index.get_level_values(0)) == {"further"}
    table.write_text(before)


def test_what_is_damaged_elsewhere_spoils_no_report(runs):
    networks, _, further, data = runs
    record = json.loads((further.experiment.path / "run.json").read_text())
    changed = {"runs/a": {"facts": {}}, "runs/b": {}, "runs/c": {"finals": [1]}, "studies/c": {}, "studies/d": {}}
    for place, changes in changed.items():
        (data / place).mkdir()
        (data / place / "run.json").write_text(json.dumps(record | changes))
    (data / "runs" / "b" / "run.json").write_bytes(b'{"\x00')
    (data / "studies" / "c.csv").write_bytes(b"\x00\xff")
    for table in ("d", "d_rates"):
        (data / "studies" / f"{table}.csv").write_text("of,others\n1,2\n")
    assert len(rows(networks)) == 10
