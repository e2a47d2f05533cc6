"""What the README shows works as it stands there, and its numbers are those of the tracked tables."""

import re
import shutil

import pytest
from PIL import Image
from project import ROOT

from incubate_lib.config import load_settings
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report import readme
from incubate_lib.report.planner.forecast import open_plan
from incubate_lib.report.readme.comparisons import comparisons
from incubate_lib.report.readme.markers import COMPARISONS
from incubate_lib.report.readme.sources import forget
from incubate_lib.report.tables import records
from incubate_lib.report.tables.comparison import comparison
from incubate_lib.report.tables.records import from_plan
from incubate_lib.report.tables.statistics import rounded

README = (ROOT / "README.md").read_text()
SETTINGS = [block for block in re.findall(r"```yaml\n(.*?)```", README, re.S) if re.search(r"^model:", block, re.M)]


@pytest.fixture
def flowers(tmp_path):
    (path := tmp_path / "flowers.yaml").write_text(re.search(r"```yaml\n(# flowers\.yaml.*?)```", README, re.S)[1])
    return str(path)


@pytest.mark.parametrize("text", [text for text in SETTINGS if "weights" not in text])
def test_settings_can_be_planned(text, tmp_path, data_folder):
    (path := tmp_path / "mine.yaml").write_text(text)
    todo = open_plan(str(path), images=2000, classes=10)
    assert sum(todo.flops.values()) > 0 and not data_folder.exists()


def test_a_data_set_a_network_and_a_strategy_of_ones_own(flowers, data_folder):
    """Two kinds of flowers that differ in colour: both ways of training tell them apart, one at half of the other's cost."""
    for split, count in {"train": 16, "val": 6}.items():
        for name, color in {"poppy": (200, 30, 30), "gentian": (30, 30, 200)}.items():
            folder = data_folder / "datasets" / "flowers" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40 + i, 36), tuple(c + 3 * i for c in color)).save(folder / f"{i}.png")
    todo = plan(load_settings(flowers))
    todo.run()
    results = from_plan(todo)
    table = results.strategies.set_index("strategy")
    assert table.loc["half_price", "flops"] == pytest.approx(0.5 * table.loc["end_to_end", "flops"], rel=0.1)
    assert (table["score"] > 0.9).all()
    assert "half price" in comparison(results).columns


def test_its_images_exist_and_have_words_in_their_place():
    images = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", README)
    assert len(images) >= 6
    for words, path in images:
        assert len(words.split()) >= 4 and (ROOT / path).exists(), path


# -- its numbers ----------------------------------------------------------------------------------------------------------


def test_its_numbers_are_those_of_the_tracked_tables():
    """`incubate figures` would change nothing."""
    assert readme.render(README) == README
    assert comparisons() == (ROOT / COMPARISONS).read_text()


def test_no_number_of_the_results_stands_there_by_hand():
    results = README[README.index("## Results") : README.index("## The notebooks")]
    results += README[README.index("| 300 epochs of the meta model") : README.index("**TensorBoard, Weights & Biases.**")]
    text = re.sub(r"<!--table.*?<!--end-->|<!--=.*?<!---->|`[^`]*`|\(\S*\)|0\.0339", "", results, flags=re.DOTALL)
    assert re.findall(r"\S*\d\.\d\S*|\S* ± \d\S*|[+−]\d+", text) == []
    assert len(re.findall("<!--=", results)) > 100


def test_a_claim_that_something_is_clear_comes_from_the_table_and_names_it():
    for paragraph in re.split(r"\n\n|\n- ", README[README.index("## Results") : README.index("## The notebooks")]):
        by_hand = re.sub(r"<!--=.*?<!---->|<!--table.*?<!--end-->", "", paragraph, flags=re.DOTALL)
        if re.search(r"<!--=(gain|count_clear|ahead) ", paragraph):
            assert "data/results/README.md#" in paragraph or "second table" in paragraph, paragraph
        elif "A difference is *clear*" not in by_hand:
            assert not re.search(r"\bclear(ly)?\b", by_hand), paragraph


@pytest.mark.parametrize(("old", "new"), [("-->93.4<!----", "-->93.5<!----"), ("| 27.0 ± 4.1 (0.13)", "| 27.1 ± 4.1 (0.13)")])
def test_a_wrong_number_is_written_right(old, new):
    assert README.count(old) >= 1
    assert readme.render(README.replace(old, new)) == README


def test_other_tables_make_other_numbers(tmp_path, monkeypatch):
    marked = "at <!--=mean fashion-budget:1/8 end_to_end-->60.4<!---->"
    assert readme.render(marked) == marked
    shutil.copytree(ROOT / "data" / "results", tmp_path / "data" / "results")
    path = tmp_path / "data" / "results" / "study_fashion-budget.csv"
    path.write_text(path.read_text().replace("1/8,end_to_end,0,accuracy,0.641,", "1/8,end_to_end,0,accuracy,0.941,"))
    monkeypatch.setattr(records, "results_folder", lambda: tmp_path / "data" / "results")
    assert readme.render(marked) == marked, "tables are read once"
    forget()
    try:
        assert readme.render(marked) == marked.replace("60.4", "70.4")
    finally:
        forget()


@pytest.mark.parametrize(
    "text",
    [
        "x <!--=mean digits-budgt:1/4 growing-->1<!---->", "x <!--=mean digits-budget:1/3 growing-->1<!---->",
        "x <!--=meen digits-budget:1/4 growing-->1<!---->", "x <!--=mean digits-budget:1/4-->1<!---->",
        "a line\n<!--=mean digits-budget:1/4 growing-->1<!---->", "- <!--=mean digits-budget:1/4 growing-->1<!---->",
    ],
)  # fmt: skip
def test_a_marker_that_names_nothing_or_begins_a_line_is_refused(text):
    with pytest.raises(ValueError, match=r"marker|no published run|begins"):
        readme.render(text)


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [
        (76.15, 1, "", "76.2"), (76.25, 1, "", "76.3"), (100 * 0.5745, 1, "", "57.5"), (-0.04, 1, "+", "0.0"), (2.5, 0, "", "3"),
        (-2.25, 1, "+", "-2.3"), (0.94, 1, "+", "+0.9"), (1459.5, 0, "", "1,460"),
    ],
)  # fmt: skip
def test_halves_are_rounded_one_way(value, digits, sign, text):
    assert rounded(value, digits, sign) == text
