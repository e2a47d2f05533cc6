"""What the README shows works as it stands there."""

import re

import pytest
from PIL import Image

from incubate_lib.config import load_settings
from incubate_lib.pipeline.notebook import ROOT
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.forecast import open_plan
from incubate_lib.report.tables import comparison, from_plan

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
    assert (table["accuracy"] > 0.9).all()
    assert "half price" in comparison(results).columns


def test_its_images_exist_and_have_words_in_their_place():
    images = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", README)
    assert len(images) >= 6
    for words, path in images:
        assert len(words.split()) >= 4 and (ROOT / path).exists(), path
