"""Weights into the chain and out of it, and at another resolution."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentences
import timm
import torch
import yaml
from checkpoints import images_of, network, released, saved
from patience import HANG
from safetensors.torch import load_file, save_file

from incubate_lib.cli import main
from incubate_lib.config import ModelSettings, SettingsError, load_settings
from incubate_lib.data.sets import load_data
from incubate_lib.data.sources import open_source
from incubate_lib.phases import weights
from incubate_lib.phases.networks import build_model
from incubate_lib.phases.released import import_released
from incubate_lib.phases.weights import load_into, sha256
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.export import export
from incubate_lib.report.tables.records import from_plan
from incubate_lib.training.loop import evaluate

# -- into the chain and out of it -----------------------------------------------------------------------------------------


def test_an_imported_meta_model_drives_the_chain_and_the_result_can_be_exported(tmp_path, data_folder, capsys):
    original = network(3)
    file = saved(tmp_path / "meta.pth", released(original, [1, 1, 1]))
    imported = tmp_path / "meta model"
    import_released([file], imported, name="vit_tiny_patch16_224", num_heads=2)
    given = [f"strategies.deep_incubation.weights='{imported}'", "training.epochs=1", "data.test_images=97"]
    settings = load_settings("smoke", given)
    todo = plan(settings, ["end_to_end", "deep_incubation"], [0])
    assert not data_folder.exists()
    todo.run()

    meta = next(node for node in todo.nodes if node.settings.phase == "meta").summary()
    train, eval_set = load_data(settings.data)
    (point,) = next(node for node in todo.nodes if node.settings.phase == "meta").folder.metrics()
    assert meta["steps"] == meta["train_flops"] == point["step"] == 0 and point["score"] == meta["score"]
    assert meta["score"] == evaluate(original, eval_set)["score"]
    results = from_plan(todo)
    assert results.strategies["meta_score"].dropna().tolist() == [meta["score"]]
    output = results.verdict()
    assert output.endswith(f"Weights read from a file, whose {sentences.UNCOUNTED}: {sentences.DEEP_INCUBATION}.")
    alone = output.splitlines()[-2]
    assert f"{sentences.META_ALONE}{100 * meta['score']:.1f} %" in alone and "FLOPs" not in alone

    # export: the right strategy, a folder that plain timm loads, a card that says what the records say
    assert main(["export", "smoke", str(tmp_path / "out"), *itertools.chain(*(("--set", g) for g in given))]) == 0
    final = todo.finals["deep_incubation", 0]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(final.folder.weights).keys()
    model = timm.create_model("local-dir:" + str(tmp_path / "out"), pretrained=True).eval()
    x = eval_set.normalise(eval_set.images[:5])
    save_file({"x": x, "logits": model(x).detach(), "mean": train.mean, "std": train.std}, tmp_path / "expected.safetensors")
    code = """if True:
        import sys, timm, torch
        from safetensors.torch import load_file
        torch.set_num_threads(1)
        model = timm.create_model("local-dir:out", pretrained=True).eval()
        expected = load_file("expected.safetensors")
        assert torch.equal(model(expected["x"]), expected["logits"])
        data = timm.data.resolve_model_data_config(model)
        for key in ("mean", "std"):
            assert torch.equal(torch.tensor(data[key]), expected[key].flatten()), data
        assert tuple(data["input_size"]) == (1, 8, 8) and data["crop_pct"] == 1.0 and data["interpolation"] == "bicubic", data
        assert (model.num_classes, len(model.blocks), type(model).__name__) == (4, 6, "VisionTransformer")
        assert "incubate_lib" not in sys.modules
    """
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=HANG)
    assert result.returncode == 0, result.stderr
    trained = load_file(final.folder.weights)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"tags": ["image-classification", "timm"], "library_name": "timm"}
    row = results.strategies.set_index("strategy").loc["deep_incubation"]
    for words in (
        f"{100 * row['score']:.2f} % on 97 test images (test split)", "| seed | 0 |", "synthetic: 191 images in 4 classes",
        f"{row['flops'] / 1e9:.4g} GFLOP", sentences.UNCOUNTED, "One seed", "split_seed", "lr: 0.002",
        f"torch {torch.__version__}", str(row["date"]), f"mean {float(train.mean):.4f}", "incubate, module 3 of 3",
    ):  # fmt: skip
        assert words in text, words
    assert str(tmp_path) not in card and "None" not in card
    [snippet] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    pasted = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path / "out", capture_output=True, text=True, timeout=HANG)
    assert pasted.returncode == 0 and pasted.stdout.strip() in open_source(settings.data)[0].classes, pasted.stderr

    # and nothing else
    for arguments, message in [
        ({}, "out is there already"),
        ({"folder": "other", "seed": 1}, r"seed 1 was not run in .*; there are: 0"),
        (
            {"folder": "other", "strategy": "deep_incubation_stack"},
            "not finished for seed 0; finished: end_to_end, deep_incubation",
        ),
        ({"folder": "other", "strategy": "deep"}, "unknown strategy 'deep'"),
    ]:
        with pytest.raises(SettingsError, match=message):
            export(settings, **({"folder": tmp_path / arguments.pop("folder", "out")} | arguments))
    with pytest.raises(SettingsError, match=sentences.NO_RUN):
        export(load_settings("digits"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_weights_that_do_not_fit_are_told_by_the_planner(tmp_path, data_folder):
    def folder(model, num_heads=2, name="vit_tiny_patch16_224"):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        import_released([saved(tmp_path / "a.pth", model.state_dict())], place, name=name, num_heads=num_heads)
        return place

    settings = load_settings("smoke", [f"strategies.deep_incubation.weights={folder(network(4))}"])
    with pytest.raises(SettingsError, match=f"^strategies.deep_incubation.weights: .* {sentences.NOT_IN_MODEL}; blocks.3"):
        plan(settings, ["deep_incubation"])
    assert not data_folder.exists()
    meta = build_model(settings.model, 3, 4)
    for place, message in [
        (folder(network(3, num_classes=5)), r"head.weight: the file has \(5, 16\), the model \(4, 16\)"),
        (folder(network(3, kind="H"), name=None), "blocks.0.attn.qkv.bias is missing"),
        (folder(network(3), num_heads=4), re.escape(sentences.built_with("config.json", "blocks.0.attn.num_heads", 4))),
        (folder(network(3), name="vit_huge_patch14_clip_224"), r"it has blocks.0.norm1.eps 1e-05, the model 1e-06"),
    ]:
        with pytest.raises(SettingsError, match=message):
            load_into(meta, place)


def test_a_file_that_holds_no_sound_weights_is_told_and_not_the_learning_rate(tmp_path, data_folder):
    file = tmp_path / "a.safetensors"
    settings = load_settings("smoke", [f"strategies.deep_incubation.weights={file}"])
    model = build_model(settings.model, 3, 4)
    sound = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor, message in [
        (torch.tensor([1, torch.inf, 0, 0]), sentences.not_finite("head.bias", 1, 4)),
        (torch.zeros(4, dtype=torch.int32), "head.bias is of int32"),
        (torch.zeros(4, dtype=torch.complex64), "head.bias is of complex64"),
        (torch.full((4,), torch.nan), f"a.safetensors holds no sound weights: {sentences.not_finite('head.bias', 4, 4)}"),
    ]:
        save_file(sound | {"head.bias": tensor}, file)
        with pytest.raises(SettingsError, match=message):
            load_into(model, file)
    with pytest.raises(SettingsError, match=rf"^strategies.deep_incubation.weights: .*{message}"):
        plan(settings, ["deep_incubation"])
    assert not data_folder.exists()
    half = {name: tensor.half() for name, tensor in sound.items()}
    save_file(half, file)
    assert all(torch.equal(tensor, half[name].float()) for name, tensor in load_into(model, file).state_dict().items())


def test_a_file_damaged_since_its_phase_ended_is_told(data_folder):
    settings = load_settings("smoke", ["phases.end_to_end.epochs=1"])
    todo = plan(settings, ["end_to_end"])
    todo.run()
    folder = todo.finals["end_to_end", 0].folder
    model = build_model(settings.model, 6, 4)
    load_into(model, folder.path)
    blob = bytearray(folder.weights.read_bytes())
    blob[-1] ^= 1  # a number that is as good as any
    folder.weights.write_bytes(blob)
    for place in (folder.path, folder.weights):
        with pytest.raises(SettingsError, match=r"model.safetensors is damaged: it is not the file that the summary.json beside"):
            load_into(model, place)
    other = folder.path / "averaged.safetensors"  # the summary says nothing of it
    other.write_bytes(blob)
    load_into(model, other)
    load_into(model, other, sha256(other))
    with pytest.raises(SettingsError, match="is not the file it was"):
        load_into(model, other, folder.summary()["weights_sha256"])


def test_a_network_of_another_kind_is_loaded_with_its_counts_of_batches(tmp_path):
    settings = ModelSettings(name="resnet10t", in_chans=1)
    one, other = (build_model(settings, None, 4) for _ in range(2))
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "resnet10t", "model_args": {"in_chans": 1}}')
    assert all(torch.equal(tensor, one.state_dict()[name]) for name, tensor in load_into(other, tmp_path).state_dict().items())
    (tmp_path / "config.json").write_text('{"architecture": "resnet10t", "model_args": {"in_chans": 1, "act_layer": "gelu"}}')
    with pytest.raises(SettingsError, match=r"\(resnet10t\) it has conv1.2 GELU, the model ReLU"):
        load_into(other, tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": "many"}}')
    vit = build_model(ModelSettings(), 1, 4)
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(SettingsError, match=r"the config.json beside it describes no network that timm knows"):
        load_into(vit, tmp_path)


def test_the_weights_of_a_phase_with_other_heads_are_told(data_folder):
    """No shape differs: what the phase was stands in its phase.json."""
    todo = plan(load_settings("smoke", ["phases.end_to_end.epochs=1", "model.num_heads=4"]), ["end_to_end"])
    todo.run()
    with pytest.raises(SettingsError, match=re.escape(sentences.built_with("phase.json", "blocks.0.attn.num_heads", 4))):
        load_into(build_model(load_settings("smoke").model, 6, 4), todo.finals["end_to_end", 0].folder.path)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_weights_are_resampled_for_another_size_as_the_network_s_own_file_does_it(tmp_path, name):
    small, large = (build_model(ModelSettings(name=name, img_size=size, patch_size=4), 2 if "vit" in name else None, 4)
                    for size in (32, 64))  # fmt: skip
    save_file(small.state_dict(), tmp_path / "model.safetensors")
    loaded = load_into(large, tmp_path / "model.safetensors").state_dict()
    same = [key for key, tensor in small.state_dict().items() if loaded[key].shape == tensor.shape]
    assert all(torch.equal(loaded[key], small.state_dict()[key]) for key in same)
    assert 0 < len(loaded) - len(same) < len(same)


# -- another resolution ---------------------------------------------------------------------------------------------------


def test_a_trained_network_is_tuned_or_judged_at_another_resolution(tmp_path, data_folder):
    settings = load_settings("smoke", ["phases.end_to_end.epochs=4"])
    low = plan(settings, ["end_to_end"])
    low.run()
    folder = tmp_path / "low"
    assert export(settings, folder) == "end_to_end"
    phase = low.finals["end_to_end", 0].folder
    raw = yaml.safe_load((Path(weights.__file__).parents[1] / "presets" / "smoke.yaml").read_text())
    raw["data"]["image_size"] = raw["model"]["img_size"] = 16
    raw["training"]["epochs"] = 1
    judge_only = {"finetune": {"epochs": 0, "warmup_epochs": 0}}
    raw["strategies"] = {
        "tuned": {"kind": "finetune", "weights": str(folder)},
        "judged": {"kind": "finetune", "weights": str(phase.weights), "phases": judge_only},
        "from_phase": {"kind": "finetune", "weights": str(phase.path), "phases": judge_only},
    }
    raw["run"] = sorted(raw["strategies"])
    (tmp_path / "high.yaml").write_text(yaml.safe_dump(raw))
    settings = load_settings(str(tmp_path / "high.yaml"))
    high = plan(settings)
    high.run()
    again, eval_batches, tuned = (node.summary() for node in high.finals.values())
    assert tuned["steps"] > 0 and eval_batches["steps"] == 0 and eval_batches["score"] == eval_batches["start_score"]
    assert tuned["start_score"] == eval_batches["score"] == again["score"] > 0.4  # chance is 0.25
    assert f"{sentences.UNCOUNTED}: from phase, judged, tuned." in from_plan(high).verdict()

    before, after = load_file(phase.weights), load_file(high.finals["judged", 0].folder.weights)
    assert [name for name in before if not torch.equal(before[name], after[name][..., : before[name].shape[-1]])
            ] == ["pos_embed"] and after["pos_embed"].shape == (1, 17, 16)  # fmt: skip
    assert torch.equal(before["pos_embed"][:, :1], after["pos_embed"][:, :1]), "the class token has no place to resample"

    # the same resolution: nothing is resampled
    model = build_model(low.finals["end_to_end", 0].settings.model, 6, 4)
    for place in (folder, phase.path, phase.weights):
        assert all(torch.equal(before[name], tensor) for name, tensor in load_into(model, place).state_dict().items())

    assert export(settings, tmp_path / "high", strategy="tuned") == "tuned"
    assert images_of(timm.create_model(f"local-dir:{tmp_path / 'high'}", pretrained=True)) == (1, 16, 16)
    with pytest.raises(
        SettingsError,
        match=r"several strategies are finished for seed 0; name one with --strategy: from_phase \(.* %\), judged \(",
    ):
        export(settings, tmp_path / "unclear")
