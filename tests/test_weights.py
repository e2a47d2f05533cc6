"""Weights in and out: checkpoints of the released code, exported networks, another resolution."""

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from incubate_lib.cli import main
from incubate_lib.config import SettingsError, load_settings
from incubate_lib.method.incubation import assemble
from incubate_lib.pipeline.graph import plan
from incubate_lib.report.export import export
from incubate_lib.report.tables import from_plan
from incubate_lib.training import weights
from incubate_lib.training.data import load_data
from incubate_lib.training.loop import evaluate
from incubate_lib.training.phases import build_model
from incubate_lib.training.released import _settings, import_released, read_released
from incubate_lib.training.weights import load_into

KINDS = {"B": {"qkv_bias": True, "eps": 1e-6}, "H": {"qkv_bias": False, "eps": 1e-5}}
DEPTHS = {"meta": [1, 1, 1, 1], "hybrid": [1, 3, 1, 1], "final": [3, 3, 3, 3]}


def network(depth, *, kind="B", eps=None, seed=0, width=16, img_size=8, **more):
    """A small ViT as the released code builds it, with weights of which none is zero or one."""
    torch.manual_seed(seed)
    norm = partial(nn.LayerNorm, eps=eps or KINDS[kind]["eps"])
    arguments = {"patch_size": 4, "in_chans": 1, "num_classes": 4, "num_heads": 2, "qkv_bias": KINDS[kind]["qkv_bias"]} | more
    model = VisionTransformer(img_size=img_size, embed_dim=width, depth=depth, norm_layer=norm, **arguments)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def stages_of(state, depths):
    """Cut a flat state dict as the released code does: blocks counted within the stage."""
    stages, ends = [{} for _ in depths], list(itertools.accumulate(depths))
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            i = next(i for i, end in enumerate(ends) if int(number) < end)
            stages[i][f"blocks.{int(number) - ends[i] + depths[i]}.{rest}"] = tensor
        else:
            stages[-1 if name.startswith(("norm.", "head.")) else 0][name] = tensor
    return stages


def released(model, depths):
    """What the released code saves: every weight three times, and what it needs to go on training."""
    state = model.state_dict()
    stages = stages_of(state, depths)
    copies = {f"stages.{i}.{name}": tensor for i, stage in enumerate(stages) for name, tensor in stage.items()}
    trained = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trained.parameters())
    trained(torch.rand(2, *images_of(model))).sum().backward()
    optimizer.step()
    return {
        "model": state | copies, "model_stages": stages, "optimizer": optimizer.state_dict(), "epoch": 99,
        "lr_scheduler": {"base_values": [5e-4], "t_initial": 100}, "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "args": argparse.Namespace(model="vit_base_patch16_224", divided_depths=depths, lr=5e-4, phase="PT"),
    }  # fmt: skip


def images_of(model):
    return (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


def saved(path, content):
    torch.save(content, path)
    return str(path)


def same_logits(a, b):
    x = torch.rand(3, *images_of(a), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(a(x), b(x))


# -- import ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", DEPTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_released_checkpoint_becomes_a_timm_folder_with_the_same_logits(kind, what, tmp_path, capsys):
    depths = DEPTHS[what]
    original = network(sum(depths), kind=kind)
    file = saved(tmp_path / "finished_checkpoint.pth", released(original, depths))
    assert main(["import", file, str(tmp_path / "ours"), "--num-heads", "2"]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    assert same_logits(original, model) and len(model.blocks) == sum(depths)
    assert model.num_classes == 4 and images_of(model) == (1, 8, 8)
    other = network(sum(depths), kind=kind, eps={"B": 1e-5, "H": 1e-6}[kind])
    assert not same_logits(other, model), "these weights would not show a wrong eps"
    told = capsys.readouterr().out
    assert f"{' + '.join(map(str, depths))} in 4 module(s)" in told and "weights: " in told
    assert set(yaml.safe_load(told.split("needs:\n")[1])) == {"model", "strategies"}
    settings, modules = read_released([file], num_heads=2)
    assert [len(m.blocks) for m in modules] == depths and settings.depth == sum(depths)
    assert same_logits(original, assemble(modules).eval())


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("vit_base_patch16_224", {"depth": 4}, ("vit_base_patch16_224", 224, 16, 12, {})),
        ("vit_base_patch16_384", {}, ("vit_base_patch16_224", 384, 16, 12, {})),
        ("vit_large_patch16_224", {}, ("vit_large_patch16_224", 224, 16, 16, {})),
        ("deit_tiny_patch16_224", {}, ("vit_tiny_patch16_224", 224, 16, 3, {})),
        ("vit_huge_patch14_224", {}, ("vit_huge_patch14_224", 224, 14, 16, {})),
        (
            "vit_huge_patch14_224", {"qkv_bias": False, "img_size": 392},
            ("vit_huge_patch14_clip_224", 392, 14, 16, {"qkv_bias": False, "pre_norm": False}),
        ),
        (
            "vit_base_patch16_224", {"embed_dim": 128, "num_heads": 2, "mlp_ratio": 2},
            ("vit_base_patch16_224", 224, 16, 2, {"mlp_ratio": 2.0}),
        ),
    ],
)  # fmt: skip
def test_the_architecture_follows_from_names_and_shapes(name, options, found):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000, **options)
        s = _settings(model.state_dict(), "a file", None, None)
        again = build_model(s, s.depth, 1000)
    assert (s.name, s.img_size, s.patch_size, s.num_heads, s.options) == found
    assert s.depth == len(model.blocks) and again.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads
    assert again.blocks[0].norm1.eps == again.norm.eps == (1e-5 if options.get("qkv_bias") is False else 1e-6)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3, "arch": "vit"},
                                  lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "model_stages": []},
                                  lambda s: {"model_stages": stages_of(s, [1, 2])}])  # fmt: skip
def test_other_ways_to_save_the_same_network(wrap, tmp_path):
    original = network(3, width=128)  # two heads of 64
    torch.save(wrap(original.state_dict()), tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # as torch < 1.6 did
    import_released([tmp_path / "old.pth"], tmp_path / "ours")
    assert same_logits(original, timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval())
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architecture"] == "vit_base_patch16_224" and config["pretrained_cfg"]["crop_pct"] == 0.875


def hybrids(tmp_path, targets, kind="B"):
    """A file for each target module of a known network, in a meta model whose other stages are shared."""
    final, meta = network(sum(targets), kind=kind, seed=1), network(len(targets), kind=kind, seed=2)
    ends, files = list(itertools.accumulate(targets)), []
    for i, depth in enumerate(targets):
        depths = [1] * i + [depth] + [1] * (len(targets) - i - 1)
        hybrid, state = network(sum(depths), kind=kind), {}
        stages = stages_of(meta.state_dict(), [1] * len(targets))
        stages[i] = stages_of(final.state_dict(), targets)[i]
        for place, stage in zip([0, *itertools.accumulate(depths)], stages):
            for name, tensor in stage.items():
                _, number, rest = name.split(".", 2) if name.startswith("blocks.") else (0, 0, 0)
                state[f"blocks.{place + int(number)}.{rest}" if rest else name] = tensor
        hybrid.load_state_dict(state)
        files.append(saved(tmp_path / f"MT_base_{i}.pth", released(hybrid, depths)))
    assert ends[-1] == len(final.blocks)
    return final, files


@pytest.mark.parametrize(("kind", "targets"), [("B", [3, 2, 3]), ("H", [2, 2])])
def test_target_checkpoints_assemble_to_the_known_network(kind, targets, tmp_path):
    final, files = hybrids(tmp_path, targets, kind)
    assert import_released(files, tmp_path / "ours", num_heads=2)[1] == targets
    assert same_logits(final, timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval())


def test_more_than_ten_modules_keep_their_order(tmp_path):
    final, files = hybrids(tmp_path, [2] * 11)
    _, modules = read_released(files, num_heads=2)
    assert same_logits(final, assemble(modules).eval())
    as_a_shell_sorts = sorted(files)
    assert as_a_shell_sorts != files
    with pytest.raises(SettingsError, match=r"MT_base_10.pth is given as number 3, but its stage 2 .* in the order of their"):
        read_released(as_a_shell_sorts, num_heads=2)
    with pytest.raises(SettingsError, match=r"MT_base_0.pth has 11 stages, but 2 files are given"):
        read_released(files[:2], num_heads=2)
    final, files = hybrids(tmp_path, [1, 1, 1])  # depths do not tell here, equal weights do
    with pytest.raises(SettingsError, match=r"MT_base_1.pth is given as number 1, but its stage 0 is the same as in"):
        read_released([files[1], files[0], files[2]], num_heads=2)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(zipped, tmp_path, capsys):
    trap = str(tmp_path / "it ran")
    content = released(network(2), [1, 1]) | {"args": Evil(trap)}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    assert main(["import", str(tmp_path / "evil.pth"), str(tmp_path / "ours")]) == 2
    told = capsys.readouterr().err
    assert "is refused: it holds posix.mkdir" in told and told.count("\n") == 1
    assert not os.path.exists(trap) and not (tmp_path / "ours").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # the trap is a real one
    assert os.path.exists(trap)


def changed(checkpoint, key, tensor=None, where=("model", "copies", "stages")):
    """Replace a weight of a released checkpoint (None: leave it out) in some of its three copies."""
    _, number, rest = key.split(".", 2) if key.startswith("blocks.") else (0, 0, 0)
    i = int(number) if rest else -1 if key.startswith(("norm.", "head.")) else 0  # one block a stage
    local = f"blocks.0.{rest}" if rest else key
    last = len(checkpoint["model_stages"]) - 1
    places = {"model": (checkpoint["model"], key), "stages": (checkpoint["model_stages"][i], local),
              "copies": (checkpoint["model"], f"stages.{last if i == -1 else i}.{local}")}  # fmt: skip
    for place in where:
        state, name = places[place]
        state.pop(name)
        if tensor is not None:
            state[name] = tensor
    return checkpoint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: changed(c, "blocks.1.attn.qkv.weight"), r"stage 1 does not fit .*: blocks.0.attn.qkv.weight is missing"),
        (lambda c: changed(c, "head.weight"), "head.weight is missing"),
        (lambda c: changed(c, "norm.bias", torch.ones(8)), r"norm.bias: the file has \(8,\), the model \(16,\)"),
        (lambda c: changed(c, "blocks.2.mlp.fc1.bias", torch.ones(64), ["model"]),
         r"model_stages disagrees with the flat state dict in blocks.2.mlp.fc1.bias \(64,\)"),
        (lambda c: changed(c, "cls_token", torch.ones(1, 1, 16), ["copies"]), r"stages.\* disagrees .* cls_token \(1, 1, 16\)"),
        (lambda c: changed(c, "head.bias", None, ["stages"]), "model_stages does not fit .* state dict: head.bias is missing"),
        (lambda c: changed(c, "pos_embed", torch.ones(1, 4, 16)), r"pos_embed \(1, 4, 16\) .* not those of a class token"),
        (lambda c: network(3).state_dict() | {"dist_token": torch.ones(1, 1, 16)}, "dist_token is not in the model"),
        (lambda c: {"model": 3}, "holds no state dict"),
        (lambda c: [1, 2], "holds a list, not a checkpoint"),
    ],
)  # fmt: skip
def test_misfits_are_refused_by_name_and_shape(change, message, tmp_path):
    file = saved(tmp_path / "a.pth", change(released(network(3), [1, 1, 1])))
    with pytest.raises(SettingsError, match=message):
        import_released([file], tmp_path / "ours", num_heads=2)
    assert not (tmp_path / "ours").exists()


def test_what_cannot_be_imported_is_told(tmp_path, capsys, monkeypatch):
    file = saved(tmp_path / "a.pth", released(network(2), [1, 1]))
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("precious")
    for arguments, message in [
        ([tmp_path / "none.pth", tmp_path / "ours"], "cannot read"),
        ([tmp_path / "text.pth", tmp_path / "ours"], "is not a sound torch checkpoint"),
        ([file, tmp_path / "taken"], "taken is there already"),
        ([file, tmp_path / "text.pth" / "ours", "--num-heads", "2"], "cannot write"),
        ([file, tmp_path / "ours"], "width 16 does not tell the number of heads; give --num-heads"),
        ([file, tmp_path / "ours", "--num-heads", "3"], "--num-heads 3 does not divide the width, 16"),
        ([file, tmp_path / "ours", "--num-heads", "2", "--model", "vit_tiny"], "timm has no 'vit_tiny'"),
        ([file, tmp_path / "ours", "--num-heads", "2", "--model", "resnet18"], "resnet18"),
    ]:
        assert main(["import", *map(str, arguments)]) == 2
        assert message in (told := capsys.readouterr().err) and told.count("\n") == 1, told
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["mine.txt"]

    def killed(model, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("timm.models.save_for_hf", killed)
    with pytest.raises(KeyboardInterrupt):
        import_released([file], tmp_path / "ours", num_heads=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "taken", "text.pth"]


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
    train, judge = load_data(settings.data)
    (point,) = next(node for node in todo.nodes if node.settings.phase == "meta").folder.metrics()
    assert meta["steps"] == meta["train_flops"] == point["step"] == 0 and point["accuracy"] == meta["accuracy"]
    assert meta["accuracy"] == evaluate(original, judge)["accuracy"]
    results = from_plan(todo)
    assert results.strategies["meta_accuracy"].dropna().tolist() == [meta["accuracy"]]
    told = results.verdict()
    assert told.endswith("Weights read from a file, whose training is not counted here: Deep Incubation, random start (paper).")
    alone = told.splitlines()[-2]
    assert f"The meta model alone has {100 * meta['accuracy']:.1f} %" in alone and "FLOPs" not in alone

    # export: the right strategy, a folder that plain timm loads, a card that says what the records say
    assert main(["export", "smoke", str(tmp_path / "out"), *itertools.chain(*(("--set", g) for g in given))]) == 0
    final = todo.finals["deep_incubation", 0]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(final.folder.weights).keys()
    model = timm.create_model("local-dir:" + str(tmp_path / "out"), pretrained=True).eval()
    x = judge.normalise(judge.images[:5])
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
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    trained = load_file(final.folder.weights)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"tags": ["image-classification", "timm"], "library_name": "timm"}
    row = results.strategies.set_index("strategy").loc["deep_incubation"]
    for words in (
        f"{100 * row['accuracy']:.2f} % on 97 test images (test split)", "| seed | 0 |", "synthetic: 191 images in 4 classes",
        f"{row['flops'] / 1e9:.4g} GFLOP", "training is not counted here", "One seed", "split_seed", "lr: 0.002",
        f"torch {torch.__version__}", str(row["date"]), f"mean {float(train.mean):.4f}", "incubate, module 3 of 3",
    ):  # fmt: skip
        assert words in text, words
    assert str(tmp_path) not in card and "None" not in card

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
    with pytest.raises(SettingsError, match="there is no run of these settings"):
        export(load_settings("digits"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_weights_that_do_not_fit_are_told_by_the_planner(tmp_path, data_folder):
    def folder(model, num_heads=2, name="vit_tiny_patch16_224"):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        import_released([saved(tmp_path / "a.pth", model.state_dict())], place, name=name, num_heads=num_heads)
        return place

    settings = load_settings("smoke", [f"strategies.deep_incubation.weights={folder(network(4))}"])
    with pytest.raises(SettingsError, match=r"^strategies.deep_incubation.weights: .* is not in the model; blocks.3"):
        plan(settings, ["deep_incubation"])
    assert not data_folder.exists()
    meta = build_model(settings.model, 3, 4)
    for place, message in [
        (folder(network(3, num_classes=5)), r"head.weight: the file has \(5, 16\), the model \(4, 16\)"),
        (folder(network(3, kind="H"), name=None), "blocks.0.attn.qkv.bias is missing"),
        (folder(network(3), num_heads=4), r"by its config.json \(vit_tiny_patch16_224\) it has num_heads 4, the model 2"),
        (folder(network(3), name="vit_huge_patch14_clip_224"), "LayerNorm's eps 1e-05, the model 1e-06"),
    ]:
        with pytest.raises(SettingsError, match=message):
            load_into(meta, place)


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
    again, judged, tuned = (node.summary() for node in high.finals.values())
    assert tuned["steps"] > 0 and judged["steps"] == 0 and judged["accuracy"] == judged["start_accuracy"]
    assert tuned["start_accuracy"] == judged["accuracy"] == again["accuracy"] > 0.4  # chance is 0.25
    assert "training is not counted here: from phase, judged, tuned." in from_plan(high).verdict()

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
        SettingsError, match="several strategies are finished for seed 0; name one with --strategy: from_phase, judged, tuned"
    ):
        export(settings, tmp_path / "unclear")
