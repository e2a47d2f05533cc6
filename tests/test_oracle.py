"""The oracle: what it must notice, what it must not mind, and smoke against small recorded tensors."""

import json
import shutil

import oracle
import pytest
import torch
from alike import Phase, differences, found, unlike
from oracle import ROOT, Case, Failed
from renamed import Change, flat, nested, renamed, renamed_keys
from safetensors.torch import load_file, save_file

SUMMARY = {
    "phase": "end_to_end", "seed": 0, "steps": 2, "train_flops": 10, "train_seconds": 1.5, "mat": {"flops": 3, "seconds": 1},
    "hash": "abc", "inputs_sha256": {"meta": "abc"}, "provenance": {"date": "today", "versions": {"torch": "2"}, "threads": 1},
}  # fmt: skip
CURVE = [{"step": step, "loss": 1.0 / step, "train_seconds": 0.1 * step} for step in (1, 2)]


def write_phase(folder, summary=SUMMARY, curve=CURVE, weight=1.0):
    folder.mkdir(parents=True)
    save_file({"head.weight": torch.tensor([0.0, weight])}, folder / "model.safetensors")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps({"module_index": None, "target_depths": []}))


def write_data(data, **how):
    """A run with a phase that strategies share, a strategy of one phase and one of several; the last as asked for."""
    seed = data / "runs" / "small" / "seed-0"
    write_phase(seed / "meta", SUMMARY | {"phase": "meta"})
    write_phase(seed / "end_to_end", **how)
    write_phase(seed / "growing" / "finetune", SUMMARY | {"phase": "finetune"})
    return data


def test_smoke_ends_in_the_recorded_tensors(tmp_path):
    values, otherwise = oracle.recorded()
    if otherwise:
        pytest.skip(otherwise)
    oracle.train(ROOT, "smoke", oracle.RECORDED, tmp_path)
    told = list(oracle.unlike_recorded(values, tmp_path))
    assert not told, "if numbers are meant to change: python tests/oracle.py --record\n" + "\n".join(told)


def test_another_rounding_and_other_versions_are_told(tmp_path):
    values = load_file(oracle.RECORDING)
    values["rounding|exp"] = values["rounding|exp"].nextafter(torch.tensor(9.0))
    for made_with, word in ((oracle.versions(), "rounds otherwise"), ({"torch": "1"}, "recorded with")):
        save_file(values, tmp_path / "other.safetensors", made_with)
        assert word in oracle.recorded(tmp_path / "other.safetensors")[1]


def test_what_differs_is_told_and_times_are_not(tmp_path):
    old = write_data(tmp_path / "old")
    later = {"train_seconds": 9.0, "mat": {"flops": 3, "seconds": 7}, "hash": "def", "inputs_sha256": {"meta": "def"}}
    later["provenance"] = {"date": "tomorrow"}
    curve = [row | {"train_seconds": 5.0} for row in CURVE]
    assert not list(differences(old, write_data(tmp_path / "times", summary=SUMMARY | later, curve=curve)))
    bent = [CURVE[0], CURVE[1] | {"loss": 0.75}]
    for name, how, told in (
        ("tensor", {"weight": 1.5}, "head.weight differs by up to 0.5 in 1 of 2 values"),
        ("curve", {"curve": bent}, "metrics.jsonl:2 loss was 0.5, is 0.75, apart by 0.25"),
        ("shorter", {"curve": CURVE[:1]}, "metrics.jsonl:2 step is only before (and 1 more of this phase)"),
        ("flops", {"summary": SUMMARY | {"train_flops": 11}}, "summary train_flops was 10, is 11, apart by 1"),
        ("inner", {"summary": SUMMARY | {"mat": {"flops": 4}}}, "summary mat.flops was 3, is 4, apart by 1"),
    ):
        assert list(differences(old, write_data(tmp_path / name, **how))) == [f"small/seed-0/end_to_end/end_to_end: {told}"]


def test_missing_and_new_phases_and_empty_folders_are_told(tmp_path):
    old, new = write_data(tmp_path / "old"), write_data(tmp_path / "new")
    shutil.rmtree(new / "runs/small/seed-0/growing")
    assert list(differences(old, new)) == ["small/seed-0/growing/finetune: only before"]
    assert list(differences(new, old)) == ["small/seed-0/growing/finetune: only after"]
    assert list(differences(tmp_path / "a", tmp_path / "b")) == ["no phase is there"]


def test_the_smallest_difference_counts():
    one = torch.tensor([1.0, 2.0])
    assert unlike(one, one.clone()) is None and "differs" in unlike(one, one.nextafter(torch.tensor(9.0)))
    assert unlike(one, one.double()) == "was float32 [2], is float64 [2]"
    assert unlike([1, [2, 3]], [1, [2, 4]]) == "[1] [1] was 3, is 4, apart by 1"
    assert unlike(None, 1.0) == "was None, is 1.0" and unlike(0.1 + 0.2, 0.3)


def test_phases_are_found_in_either_layout_and_by_todays_names(tmp_path):
    old, new = write_data(tmp_path / "old"), write_data(tmp_path / "new")
    run = new / "runs" / "small"
    keys = {"seed-0/meta": "a1", "seed-0/end_to_end": "b2", "seed-0/grown/tune": "c3"}
    (new / "phases").mkdir()
    for key, digest in keys.items():
        folder = new / "phases" / digest
        shutil.move(run / key.replace("grown/tune", "growing/finetune"), folder)
        (folder / "config.json").unlink()
        (folder / "phase.json").write_text(json.dumps({"settings": {"target_depths": []}}))
        (run / key).parent.mkdir(parents=True, exist_ok=True)
        (run / key).symlink_to(folder)  # a name for people, no phase of its own
    (run / "run.json").write_text(json.dumps({"phases": {key: {"digest": digest} for key, digest in keys.items()}}))
    weights = load_file(new / "phases/b2/model.safetensors")
    save_file({"top.weight": weights["head.weight"]}, new / "phases/b2/model.safetensors")
    changes = [Change(strategies={"growing": "grown"}, phases={"finetune": "tune"}), Change(tensors={r"head\.(.*)": r"top.\1"})]
    assert list(differences(old, new)) and not list(differences(old, new, changes))
    assert found(new, changes)[Phase("small", 0, "grown", "tune")] == new / "phases" / "c3"
    assert found(old, changes).keys() == found(new, changes).keys()


def test_names_change_in_order_and_what_is_gone_is_left_out():
    changes = [Change(settings={r"training\.(.*)": r"recipe.\1"}), Change(settings={r"recipe\.lr": "recipe.rate", "name": None})]
    fields = flat({"name": "x", "training": {"lr": 1e-3, "betas": [0.9, 0.99]}, "strategies": {"mat": {}}})
    assert nested(renamed_keys(fields, "settings", changes)) == {
        "recipe": {"rate": 1e-3, "betas": [0.9, 0.99]}, "strategies": {"mat": {}},
    }  # fmt: skip
    assert renamed("training.lr", "settings", changes[:1]) == "recipe.lr" and renamed("name", "settings", changes) is None


def test_a_side_is_given_the_newest_names_that_it_knows(tmp_path, monkeypatch):
    tried = []

    def incubate(root, data, arguments):
        tried.append((tmp_path / "small.yaml").read_text())
        known = "rate" not in tried[-1]
        return oracle.subprocess.CompletedProcess(arguments, 0 if known else oracle.BAD_INPUT, "", "unknown field 'rate'")

    monkeypatch.setattr(oracle, "_incubate", incubate)
    changes, case = [Change(settings={r"training\.lr": "training.rate"})], Case(("mat",), {"training": {"lr": 1e-3}})
    oracle.train(ROOT, "small", case, tmp_path, changes)
    assert ["rate" in text for text in tried] == [True, False]
    refusing = Case(("mat",), {"rate": 1})
    with pytest.raises(Failed, match="unknown field 'rate'"):
        oracle.train(ROOT, "small", refusing, tmp_path, changes)
