"""What the pages show works as it stands there, and their numbers are those of the tracked tables."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from project import ROOT, block, blocks, pages

from incubate_lib.cli import main, parser
from incubate_lib.cli.pages import commands
from incubate_lib.config import DataSettings, load_settings, presets
from incubate_lib.config.study import load_study, studies
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report import readme
from incubate_lib.report.planner.forecast import open_plan
from incubate_lib.report.readme.comparisons import comparisons
from incubate_lib.report.readme.markers import COMPARISONS
from incubate_lib.report.readme.sources import forget
from incubate_lib.report.tables import records
from incubate_lib.report.tables.comparison import comparison
from incubate_lib.report.tables.records import from_plan, published
from incubate_lib.report.tables.statistics import rounded
from incubate_lib.report.words import label

PAGES = pages()
RESULTS = PAGES["figures/README.md"]
SETTINGS = [text for text in blocks("yaml") if re.search(r"^model:", text, re.M)]


@pytest.mark.parametrize("text", [text for text in SETTINGS if "weights" not in text])
def test_settings_can_be_planned(text, tmp_path, data_folder):
    (path := tmp_path / "mine.yaml").write_text(text)
    todo = open_plan(str(path), images=2000, classes=10)
    assert sum(todo.flops.values()) > 0 and not data_folder.exists()


def test_data_has_an_example_of_each_kind_of_source():
    """Inline, where the settings are a line: `data: {source: …}`."""
    lines = re.findall(r"`data: (\{source: .*?\})`", PAGES["data/README.md"])
    sources = {DataSettings(**yaml.safe_load(line)).source.split("/")[0] for line in lines}
    assert sources >= {"folder", "torch", "hfds", "wds", "digits", "synthetic"} and sources & {"cifar10", "cifar100"}


def test_every_strategy_is_listed_with_its_label():
    """Those that are known by name, and those that presets and studies define."""
    page = PAGES["incubate_lib/strategies/README.md"]
    files = [load_settings(name).strategies for name in presets()]
    files += [load_study(name).settings(cell).strategies for name in studies() for cell in load_study(name).cells()[:1]]
    names = {name for strategies in files for name in strategies}
    assert len(names) > 20
    assert [name for name in names if f"| `{name}` | {label(name)} |" not in page] == []


def flowers(folder: Path) -> None:
    """Write images of two kinds of flowers that differ in colour."""
    for split, count in {"train": 16, "val": 6}.items():
        for name, color in {"poppy": (200, 30, 30), "gentian": (30, 30, 200)}.items():
            place = folder / "datasets" / "flowers" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40 + i, 36), tuple(c + 3 * i for c in color)).save(place / f"{i}.png")


def test_a_fifth_of_each_class_is_moved_to_be_tested_on(tmp_path):
    for name in ("poppy", "wild rose"):
        (place := tmp_path / "data/datasets/flowers/train" / name).mkdir(parents=True)
        for i in range(20):
            (place / f"a {i}.png").touch()
    (command,) = re.findall(r"`(\(cd data/datasets/flowers.*?\))`", PAGES["README.md"])
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    found = {split: len([*tmp_path.rglob(f"{split}/*/*.png")]) for split in ("train", "val")}
    assert found == {"train": 32, "val": 8} and len([*tmp_path.rglob("val/wild rose/*.png")]) == 4


def test_a_data_set_a_network_and_a_strategy_of_ones_own(tmp_path, data_folder):
    """Both ways of training tell two flowers apart, one at half of the other's cost."""
    (path := tmp_path / "flowers.yaml").write_text(block("yaml", "half_price:"))
    flowers(data_folder)
    todo = plan(load_settings(str(path)))
    todo.run()
    results = from_plan(todo)
    table = results.strategies.set_index("strategy")
    assert table.loc["half_price", "flops"] == pytest.approx(0.5 * table.loc["end_to_end", "flops"], rel=0.1)
    assert (table["score"] > 0.9).all()
    assert "half price" in comparison(results).columns


def test_ones_own_images_in_five_steps(tmp_path, data_folder, monkeypatch, capsys):
    """The front page's file and snippet, run as they stand but for size: checked, planned, trained, exported, one image told."""
    (text,) = blocks("yaml", "README.md")
    small = {"depth: 12": "depth: 4, embed_dim: 48, num_heads: 3", "img_size: 64": "img_size: 32", "epochs: 30": "epochs: 12",
             "batch_size: 64": "batch_size: 8"}  # fmt: skip
    for old, new in small.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "flowers.yaml").write_text(text)
    flowers(data_folder)
    monkeypatch.chdir(tmp_path)
    for command in ("check flowers.yaml", "plan flowers.yaml"):
        assert main(command.split()) == 0
    plan(load_settings("flowers.yaml")).run()
    (export,) = (line for line in lines(PAGES["README.md"]) if line.startswith("incubate export flowers.yaml"))
    assert main(export.split()[1:]) == 0
    exec(next(text for text in blocks("python", "README.md") if "create_transform" in text), {})
    assert capsys.readouterr().out.splitlines()[-1] in ("poppy", "gentian")


def test_the_method_runs_as_the_front_page_has_it():
    text = next(text for text in blocks("python", "README.md") if "Hybrid" in text)
    old, new = '"img_size": 64', '"img_size": 64, "embed_dim": 48, "num_heads": 3'
    assert old in text
    text = text.replace(old, new)
    names = {}
    exec(text, names)
    assert torch.isfinite(names["target"](names["images"])).all()


# -- links, pictures, commands ------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Return the anchors that a page's headings have, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", re.sub(r"[*`]", "", heading).lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("place", PAGES)
def test_every_link_leads_somewhere(place):
    text = re.sub(r"^ *```.*?^ *```$", "", PAGES[place], flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / place).parent / path if path else ROOT / place
        assert there.exists(), f"{place}: {target}"
        assert not anchor or anchor in anchors(there.read_text()), f"{place}: {target}"


def test_pictures_have_words_in_their_place():
    pictures = [words for text in PAGES.values() for words in re.findall(r"!\[([^\]]*)\]\(", text)]
    assert len(pictures) >= 6 and all(len(words.split()) >= 4 for words in pictures)


def lines(text: str) -> list[str]:
    """Return the commands that a page prints: lines of shell blocks, and what is set as code within a sentence."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M)
    shell = "".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ").splitlines()
    found = [line.partition(" #")[0] for line in shell] + re.findall("`([^`]+)`", prose)
    given = (" ".join(line.split()) for line in found if not re.search("…|COMMAND|PRESET|NAME", line))
    return [line for line in given if re.match(r"(incubate|papermill) \S+ ?", line)]


COMMANDS = sorted({line for text in PAGES.values() for line in lines(text)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_given(command):
    program, *words = shlex.split(command.partition(" > ")[0].replace("$SET", "--set machine.workers=2"))
    if program == "papermill":
        assert (ROOT / words[0]).exists()
    elif len(words) == 1:  # named, not called
        needed = {"logs": ["digits", "meta"], "export": ["digits", "x"], "completion": ["zsh"]}
        parser().parse_args(words + needed.get(words[0], []))
    else:
        parser().parse_args(words)


def test_the_front_page_shows_the_table_that_a_run_prints():
    """Its rows, in their order, and a column for each strategy of the preset."""
    (sample,) = (text for text in blocks("text", "README.md") if "top-1" in text)
    head, _, body = (part.strip("\n") for part in re.split("(─+)", sample))
    rows = [re.split(r"\s{2,}", line)[0] for line in body.splitlines()]
    table = comparison(published("digits"))
    assert rows and rows == [row for row in table.index if row in rows]
    assert sorted(head.split()) == sorted(word for name in load_settings("digits").run for word in label(name).split())


def test_the_front_page_is_short():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 200
    assert max(len(line) for language in ("sh", "yaml", "python", "bibtex") for text in blocks(language, "README.md")
               for line in text.splitlines()) <= 100  # fmt: skip


# -- its numbers ----------------------------------------------------------------------------------------------------------


def test_its_numbers_are_those_of_the_tracked_tables():
    """`incubate figures` would change nothing."""
    for place, text in PAGES.items():
        assert readme.render(text, {"commands": commands}) == text, place
    assert set(readme.pages()) <= {ROOT / place for place in PAGES}
    assert comparisons() == (ROOT / COMPARISONS).read_text()


def test_every_field_and_every_option_has_words():
    for place in ("incubate_lib/presets/README.md", "incubate_lib/cli/README.md"):
        rows = re.findall(r"^\| (`.*) \| *(.*?) *\|$", "".join(re.findall(r"<!--table.*?<!--end-->", PAGES[place], re.S)), re.M)
        assert len(rows) > 60 and all(len(words.split()) > 1 for _, words in rows), [
            row for row in rows if len(row[1].split()) < 2
        ]


def test_no_number_of_the_results_stands_there_by_hand():
    front = PAGES["README.md"]
    results = RESULTS + front[front.index("## What we found") : front.index("## Start")]
    text = re.sub(r"<!--table.*?<!--end-->|<!--=.*?<!---->|`[^`]*`|\(\S*\)|0\.0339", "", results, flags=re.DOTALL)
    assert re.findall(r"\S*\d\.\d\S*|\S* ± \d\S*|[+−]\d+", text) == []
    assert len(re.findall("<!--=", results)) > 100


def test_a_claim_that_something_is_clear_comes_from_the_table_and_names_it():
    front = PAGES["README.md"]
    for paragraph in re.split(r"\n\n|\n- ", RESULTS + front[front.index("## What we found") : front.index("## Start")]):
        by_hand = re.sub(r"<!--=.*?<!---->|<!--table.*?<!--end-->", "", paragraph, flags=re.DOTALL)
        if re.search(r"<!--=(gain|count_clear|ahead) ", paragraph):
            assert "results/README.md#" in paragraph or "second table" in paragraph, paragraph
        elif "difference is *clear*" not in by_hand:
            assert not re.search(r"\bclear(ly)?\b", by_hand), paragraph


@pytest.mark.parametrize(("old", "new"), [("-->93.4<!----", "-->93.5<!----"), ("| 27.0 ± 4.1 (0.13)", "| 27.1 ± 4.1 (0.13)")])
def test_a_wrong_number_is_written_right(old, new):
    assert RESULTS.count(old) >= 1
    assert readme.render(RESULTS.replace(old, new)) == RESULTS


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
