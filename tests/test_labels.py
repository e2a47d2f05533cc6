"""Labels of images, and shards: told where they are no classes, or where a part would be left out."""

import tarfile

import pytest
import sentences
import torch
from layouts import HERE, add, check, picture, png, settings_file

from incubate_lib.backends.local import backend as local
from incubate_lib.cli import main
from incubate_lib.config import DataSettings, SettingsError
from incubate_lib.data.sets import load_data
from incubate_lib.data.sources import open_source

# -- labels and shards ----------------------------------------------------------------------------------------------------------


def numbered(root, source, labels):
    """Write sets with these labels, in turn, as a source has them; return data settings."""
    root.mkdir(exist_ok=True)
    if source == "wds/":
        for split in ("train", "val"):
            with tarfile.open(root / f"{split}.tar", "w") as tar:
                for i in range(12):
                    add(tar, {f"{i:03}.png": png(), f"{i:03}.cls": str(labels[i % len(labels)]).encode()})
        return {"source": "wds/", "folder": str(root)}
    from datasets import Dataset, Features, Value
    from datasets import Image as Encoded

    kind = {int: "int64", str: "string", float: "float64"}[type(labels[0])]
    rows = {"image": [{"bytes": png(), "path": None}] * 12, "label": [labels[i % len(labels)] for i in range(12)]}
    for split in ("train", "test"):
        table = Dataset.from_dict(rows, Features({"image": Encoded(), "label": Value(kind)}))
        table.to_parquet(str(root / f"{split}.parquet"))
    (root.parent / "cache").mkdir(exist_ok=True)
    return {"source": f"hfds/{root}", "folder": str(root.parent / "cache"), "test_split": "test"}


@pytest.mark.parametrize("source", ["wds/", "hfds"])
@pytest.mark.parametrize(
    ("labels", "output"),
    [([1, 2, 3], sentences.no_image("0", 1, 4)), ([0, 3, 4], sentences.no_image("1, 2", 2, 5)), ([0, 1, 2], None)],
)
def test_labels_with_gaps_are_told_and_keep_their_numbers(source, labels, output, tmp_path, monkeypatch, capsys, data_folder):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = numbered(tmp_path / "set", source, labels)
    for split in open_source(DataSettings(**settings)):
        assert split.classes == [str(i) for i in range(max(labels) + 1)] and set(split.labels) == set(labels)
    (tmp_path / "mine.yaml").write_text(settings_file("x").replace("source: folder, folder: 'x'", _flow(settings)))
    for command in ("check", "plan"):
        assert main([command, str(tmp_path / "mine.yaml")]) == 0
        out = capsys.readouterr().out
        assert output in out if output else "No image to train on" not in out, command


def test_a_run_tells_labels_with_gaps_before_it_trains(tmp_path, monkeypatch, capsys, data_folder):
    settings = numbered(tmp_path / "set", "wds/", [1, 2, 3])
    (tmp_path / "mine.yaml").write_text(settings_file("x").replace("source: folder, folder: 'x'", _flow(settings)))
    monkeypatch.setattr(local.Local, "submit", lambda *_, **more: 130)  # as if interrupted at once
    assert main(["run", str(tmp_path / "mine.yaml"), "--strategies", "end_to_end"]) == 130
    assert sentences.no_image("0", 1, 4) in capsys.readouterr().out


def test_columns_of_other_names_are_named_and_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    settings = numbered(tmp_path / "set", "hfds", [0, 1])
    for split in ("train", "test"):
        table = load_dataset(str(tmp_path / "set"), split=split, cache_dir=settings["folder"])
        table = table.rename_columns({"image": "img", "label": "fine_label"})
        table.to_parquet(str(tmp_path / "other" / f"{split}.parquet"))
    settings |= {"source": f"hfds/{tmp_path / 'other'}"}
    asked = "data.image_column is 'image' and data.label_column is 'label', but its columns are img, fine_label"
    with pytest.raises(SettingsError, match=f"train: {asked}"):
        open_source(DataSettings(**settings))
    chosen = {"image_column": "img", "label_column": "fine_label"}
    train, _ = open_source(DataSettings(**settings, **chosen))
    assert set(train.labels) == {0, 1} and train.opener(0).size == (16, 16)
    with pytest.raises(ValueError, match=sentences.no_meaning("image_column, label_column", "source 'folder'")):
        DataSettings(source="folder", **chosen)


def _flow(settings):
    return ", ".join(f"{name}: '{value}'" for name, value in settings.items())


@pytest.mark.parametrize(
    ("source", "labels", "output"),
    [
        ("hfds", ["ant", "bee"], sentences.no_number("ant")),
        ("hfds", [0.0, 1.5], sentences.no_number(0.0)),
        ("hfds", [0, 10**9], sentences.no_class(10**9)),
        ("wds/", [0, 10**9], sentences.no_class(10**9)),
        ("wds/", [10**30], sentences.NOT_A_CLASS),
    ],
)
def test_labels_that_are_no_classes_are_told(source, labels, output, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SettingsError, match=output):
        open_source(DataSettings(**numbered(tmp_path / "set", source, labels)))


def test_a_class_to_judge_by_that_training_lacks_is_told_by_its_label(tmp_path, capsys):
    numbered(tmp_path / "set", "wds/", [0, 1, 2, 3])
    with tarfile.open(tmp_path / "set" / "train.tar", "w") as tar:
        for i in range(12):
            add(tar, {f"{i}.png": png(), f"{i}.cls": str([0, 1, 3][i % 3]).encode()})
    status, output = check(tmp_path / "set", capsys, "wds/")
    assert status == 2 and sentences.classes_lacking("the test split", "2") in output


def test_a_shard_cut_anywhere_is_told(tmp_path, capsys):
    numbered(tmp_path / "set", "wds/", [0, 1, 2])
    shard = tmp_path / "set" / "train.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        end = max(member.offset_data + 512 for member in tar)  # of the last block with content
    settings = DataSettings(source="wds/", folder=str(tmp_path / "set"))
    for size in [*range(0, end + 1024, 512), end - 100, end + 1023]:
        shard.write_bytes(whole[:size])
        with pytest.raises(SettingsError, match=r"cannot be read|is cut short"):
            open_source(settings)
    shard.write_bytes(whole[: end + 1024])  # without the padding that some tools add
    assert len(open_source(settings)[0].labels) == 12
    assert check(tmp_path / "set", capsys, "wds/")[0] == 0


@pytest.mark.parametrize(
    ("damage", "output"),
    [
        (lambda whole, at: whole[:at] + b"x" * 512 + whole[at + 512 :], "is damaged: there is no end mark"),
        (lambda whole, _: whole + whole, "goes on after its end mark"),
    ],
    ids=["damaged header", "joined by cat"],
)
def test_a_shard_of_which_a_part_would_be_left_out_is_told(damage, output, tmp_path, capsys):
    numbered(tmp_path / "set", "wds/", [0, 1, 2])
    shard = tmp_path / "set" / "train.tar"
    with tarfile.open(shard) as tar:
        third = tar.getmember("002.png").offset
    shard.write_bytes(damage(shard.read_bytes(), third))
    status, out = check(tmp_path / "set", capsys, "wds/")
    assert status == 2 and "train.tar" in out and output in out


def test_a_sample_that_stands_there_twice_or_is_a_link_is_told(tmp_path):
    settings = DataSettings(**numbered(tmp_path / "set", "wds/", [0]))
    with tarfile.open(tmp_path / "set" / "train.tar", "a") as tar:
        add(tar, {"000.png": png()})
    with pytest.raises(SettingsError, match=r"000\.png is in it twice"):
        open_source(settings)
    numbered(tmp_path / "set", "wds/", [0])
    with tarfile.open(tmp_path / "set" / "train.tar", "a") as tar:
        link = tarfile.TarInfo("again.png")
        link.type, link.linkname = tarfile.LNKTYPE, "000.png"
        tar.addfile(link)
    with pytest.raises(SettingsError, match=r"again\.png is a link or a device"):
        open_source(settings)


def test_files_of_inaturalist_are_opened_here(tmp_path):
    """torchvision would open them itself, and all of them to learn their labels."""
    for i, name in enumerate(("ant", "bee")):
        kind = tmp_path / "set" / "2021_train" / f"0000{i}_Animalia_Arthropoda_Insecta_Order_Family_Genus_{name}"
        kind.mkdir(parents=True)
        for k in range(2):
            picture(i).save(kind / f"{k}.jpg")
    (tmp_path / "set" / "2021_valid").symlink_to(tmp_path / "set" / "2021_train")
    settings = DataSettings(source="torch/inaturalist", folder=str(tmp_path / "set"))
    train, eval_set = load_data(settings, shape=(3, 16, 16), machine=HERE)
    assert len(train) == len(eval_set) == 4 and train.source.opener.name(3).endswith("bee/1.jpg")
    assert torch.equal(next(eval_set.eval_batches())[1], torch.tensor([0, 0, 1, 1]))
