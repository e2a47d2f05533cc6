"""Checkpoints of the released code become networks with the same logits; what does not fit, or holds code, is refused."""

import itertools
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import sentences
import timm
import torch
import yaml
from checkpoints import DEPTHS, KINDS, images_of, network, opened, released, same_logits, saved, stages_of

from incubate_lib.cli import main
from incubate_lib.config import SettingsError
from incubate_lib.phases.networks import build_model
from incubate_lib.phases.released import import_released, read_released, settings_of


@pytest.mark.parametrize("what", DEPTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_released_checkpoint_becomes_a_timm_folder_with_the_same_logits(kind, what, tmp_path, capsys):
    depths = DEPTHS[what]
    original = network(sum(depths), kind=kind)
    file = saved(tmp_path / "finished_checkpoint.pth", released(original, depths))
    assert main(["import", file, str(tmp_path / "ours"), "--num-heads", "2"]) == 0
    model = opened(tmp_path / "ours")
    assert same_logits(original, model) and len(model.blocks) == sum(depths)
    assert model.num_classes == 4 and images_of(model) == (1, 8, 8)
    other = network(sum(depths), kind=kind, eps={"B": 1e-5, "H": 1e-6}[kind])
    assert not same_logits(other, model), "these weights would not show a wrong eps"
    output = capsys.readouterr().out
    assert f"{' + '.join(map(str, depths))} in 4 module(s)" in output and "weights: " in output
    needed = yaml.safe_load(output.split("needs:\n")[1])
    assert needed.get("run") == (None if what == "meta" else ["tuned"]) and {"model", "strategies"} <= set(needed)
    assert ("as a trained meta model" in output) == (what == "meta") == ("deep_incubation" in needed["strategies"])
    settings, model, blocks = read_released([file], num_heads=2)
    assert blocks == depths and settings.depth == sum(depths)
    tagged = read_released([file], name=f"{settings.name}.some_tag", num_heads=2)[0]
    assert tagged == settings, "the part after the dot names weights of timm"
    assert same_logits(original, model)


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
        s = settings_of(model.state_dict(), "a file", None, None)
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
    assert same_logits(original, opened(tmp_path / "ours"))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architecture"] == "vit_base_patch16_224" and config["pretrained_cfg"]["crop_pct"] == 0.875


PREFIXES = ["module._orig_mod.", "_orig_mod.module.", "module.module.", "model.", "model._orig_mod.", "_orig_mod.model.module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_taken_off_in_any_order(prefix, tmp_path):
    original = network(3, width=128)
    content = {"state_dict": {prefix + name: tensor for name, tensor in original.state_dict().items()}}
    import_released([saved(tmp_path / "a.pth", content)], tmp_path / "ours")
    assert same_logits(original, opened(tmp_path / "ours"))


def test_wrappers_within_a_network_and_names_that_come_twice(tmp_path):
    original = network(3, width=128)  # blocks that were compiled or wrapped one by one
    names = {name: name.replace("blocks.1.", "blocks.1._orig_mod.").replace("attn.", "attn._checkpoint_wrapped_module.")
             for name in original.state_dict()}  # fmt: skip
    content = {names[name]: tensor for name, tensor in original.state_dict().items()}
    _, model, [_] = read_released([saved(tmp_path / "a.pth", content)])
    assert same_logits(original, model)
    read_released([saved(tmp_path / "b.pth", content | {"module.norm.bias": original.norm.bias.detach()})])
    twice = saved(tmp_path / "c.pth", content | {"module.norm.bias": original.norm.bias.detach() + 1})
    with pytest.raises(SettingsError, match=r"c.pth holds norm.bias twice, with different values, once as module.norm.bias"):
        read_released([twice])


def test_a_moving_average_in_the_file_is_offered_and_read(tmp_path, capsys):
    last, average = network(3, width=128), network(3, width=128, seed=5)
    content = released(last, [1, 2]) | {"model_ema": {f"module.{k}": v for k, v in average.state_dict().items()}}
    file, plain = saved(tmp_path / "a.pth", content), saved(tmp_path / "b.pth", released(last, [1, 2]))
    assert main(["import", file, str(tmp_path / "last")]) == 0
    assert "a.pth also holds a moving average of the weights, model_ema: --ema reads that" in capsys.readouterr().out
    assert main(["import", file, str(tmp_path / "average"), "--ema"]) == 0 and "--ema" not in capsys.readouterr().out
    assert same_logits(last, opened(tmp_path / "last")) and same_logits(average, opened(tmp_path / "average"))
    assert main(["import", plain, str(tmp_path / "none"), "--ema"]) == 2
    assert (
        "holds no moving average (model_ema, " in (said := capsys.readouterr().err) and "it has model, model_stages, opt" in said
    )


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
def test_target_checkpoints_assemble_to_the_known_network(kind, targets, tmp_path, capsys):
    final, files = hybrids(tmp_path, targets, kind)
    assert main(["import", *files, str(tmp_path / "ours"), "--num-heads", "2"]) == 0
    told = capsys.readouterr().out
    assert f"{' + '.join(map(str, targets))} in" in told and "To fine-tune it, a settings file needs:" in told
    assert same_logits(final, opened(tmp_path / "ours"))


def test_more_than_ten_modules_keep_their_order(tmp_path):
    final, files = hybrids(tmp_path, [2] * 11)
    _, model, _ = read_released(files, num_heads=2)
    assert same_logits(final, model)
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
    output = capsys.readouterr().err
    assert "is refused: it holds posix.mkdir" in output and output.count("\n") == 1
    assert not os.path.exists(trap) and not (tmp_path / "ours").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # the trap is a real one
    assert os.path.exists(trap)


# Every way to name a file in settings: {bomb} is a pickle that makes a folder, {folder} holds it under the names that timm reads.
SMALL = "model: {{img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, in_chans: 1}}\n"
NAMED = [
    "model: {{options: {{checkpoint_path: {bomb}}}}}",
    "model: {{options: {{pretrained: true, pretrained_cfg: {{file: {bomb}}}}}}}",
    "model: {{options: {{pretrained: true, pretrained_cfg_overlay: {{file: {bomb}}}}}}}",
    "model: {{options: {{pretrained: true, pretrained_cfg: {{source: local-dir, file: {bomb}, custom_load: true}}}}}}",
    "model: {{options: {{pretrained: true, cache_dir: {folder}}}}}",
    "model: {{options: {{block_args: [{{checkpoint_path: {bomb}}}]}}}}",
    "model: {{name: 'local-dir:{folder}'}}",
    "model: {{name: 'local-dir:{folder}', options: {{pretrained: true}}}}",
    "model: {{name: {bomb}}}",
    SMALL + "strategies: {{mine: {{kind: finetune, weights: {bomb}}}}}",
    SMALL + "strategies: {{mine: {{kind: finetune, weights: {folder}}}}}",
    "model: {{options: {{act_layer: {bomb}}}}}",
    "model: !!python/object/apply:os.mkdir ['{trap}']",
]


@pytest.mark.parametrize("text", NAMED)
def test_no_settings_file_can_have_a_pickle_read(text, tmp_path, data_folder, capsys):
    """With timm before 1.0.31 `checkpoint_path` ran what a file holds: it is refused here, whatever the version."""
    trap, folder = tmp_path / "it ran", tmp_path / "folder"
    folder.mkdir()
    torch.save(network(2).state_dict() | {"head.bias": Evil(str(trap))}, tmp_path / "bomb.pth")
    for name in ("pytorch_model.bin", "model.safetensors"):
        shutil.copy(tmp_path / "bomb.pth", folder / name)
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 4,
        "model_args": {"checkpoint_path": str(tmp_path / "bomb.pth")},
    }
    (folder / "config.json").write_text(json.dumps(config))
    text = text.format(bomb=tmp_path / "bomb.pth", folder=folder, trap=trap)
    more = "data: {source: synthetic}\n" + ("run: [mine]" if "mine" in text else "run: [end_to_end]")
    (tmp_path / "downloaded.yaml").write_text(f"{text}\n{more}\n")
    for command in ("run", "plan"):
        assert main([command, str(tmp_path / "downloaded.yaml")]) == 2
        assert (output := capsys.readouterr().err).count("\n") <= 2 and output.startswith("incubate: "), output
        assert not trap.exists() and not data_folder.exists()
    torch.load(tmp_path / "bomb.pth", weights_only=False)  # the trap is a real one
    assert trap.exists()


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
        (lambda c: changed(c, "blocks.1.attn.qkv.weight"), r"stage 1 does not fit .*: blocks.1.attn.qkv.weight is missing"),
        (lambda c: changed(c, "head.weight"), "head.weight is missing"),
        (lambda c: changed(c, "norm.bias", torch.ones(8)), r"norm.bias: the file has \(8,\), the model \(16,\)"),
        (lambda c: changed(c, "blocks.2.mlp.fc1.bias", torch.ones(64), ["model"]),
         r"model_stages disagrees with the flat state dict in blocks.2.mlp.fc1.bias \(64,\)"),
        (lambda c: changed(c, "cls_token", torch.ones(1, 1, 16), ["copies"]), r"stages.\* disagrees .* cls_token \(1, 1, 16\)"),
        (lambda c: changed(c, "head.bias", None, ["stages"]), "model_stages does not fit .* state dict: head.bias is missing"),
        (lambda c: changed(c, "pos_embed", torch.ones(1, 4, 16)), r"pos_embed \(1, 4, 16\) .* not those of a class token"),
        (lambda c: network(3).state_dict() | {"dist_token": torch.ones(1, 1, 16)}, f"dist_token {sentences.NOT_IN_MODEL}"),
        (lambda c: {"model": 3, "epoch": 9}, r"holds no state dict where one should be .*; it has model, epoch$"),
        (lambda c: {"state_dict": {f"encoder.{k}": v for k, v in network(3).state_dict().items()}},
         "cls_token, .* is missing; it has encoder.cls_token, encoder.pos_embed, .* and [0-9]+ more"),
        (lambda c: {k.replace("mlp.fc2", "mlp.second"): v for k, v in network(3).state_dict().items()},
         f"blocks.0.mlp.fc2.weight is missing; blocks.0.mlp.second.weight {sentences.NOT_IN_MODEL}"),
        (lambda c: changed(c, "norm.bias", torch.full((16,), torch.nan)), sentences.not_finite("norm.bias", 16, 16)),
        (lambda c: changed(c, "norm.bias", torch.arange(16)), "norm.bias is of int64, strided"),
        (lambda c: changed(c, "norm.bias", torch.ones(16, dtype=torch.complex64)), "norm.bias is of complex64"),
        (lambda c: changed(c, "norm.bias", torch.ones(16).to_sparse()), "norm.bias is of float32, sparse_coo"),
        (lambda c: changed(c, "norm.bias", torch.full((16,), 1e300, dtype=torch.float64)),
         sentences.not_finite("norm.bias", 16, 16)),
        (lambda c: [1, 2], "holds a list, not a checkpoint"),
    ],
)  # fmt: skip
def test_misfits_are_refused_by_name_and_shape(change, message, tmp_path):
    file = saved(tmp_path / "a.pth", change(released(network(3), [1, 1, 1])))
    with pytest.raises(SettingsError, match=message):
        import_released([file], tmp_path / "ours", num_heads=2)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_taken(dtype, tmp_path):
    original = network(2).to(dtype)
    import_released([saved(tmp_path / "a.pth", original.state_dict())], tmp_path / "ours", num_heads=2)
    model = opened(tmp_path / "ours")
    assert {p.dtype for p in model.parameters()} == {torch.float32} and same_logits(original.float(), model)


def test_a_bit_that_flipped_is_found_wherever_it_is(tmp_path):
    file = saved(tmp_path / "a.pth", released(network(2), [1, 1]))
    with zipfile.ZipFile(file) as archive:
        ends = [(info.header_offset, info.file_size) for info in archive.infolist() if "/data/" in info.filename]
        records = [i.filename for i in archive.infolist()]
    assert len(records) > 30
    blob = bytearray(Path(file).read_bytes())
    for offset, size in ends:
        name, extra = struct.unpack("<HH", blob[offset + 26 : offset + 30])
        place = offset + 30 + name + extra + size // 2  # in the middle of the tensor
        blob[place] ^= 1
        Path(file).write_bytes(blob)
        with pytest.raises(SettingsError, match=f"{sentences.NOT_SOUND}: .* is not what its checksum says"):
            read_released([file], num_heads=2)
        blob[place] ^= 1
    Path(file).write_bytes(blob)
    read_released([file], num_heads=2)


def test_what_cannot_be_imported_is_told(tmp_path, capsys, monkeypatch):
    file = saved(tmp_path / "a.pth", released(network(2), [1, 1]))
    (tmp_path / "text.pth").write_text("no checkpoint")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("precious")
    for arguments, message in [
        ([tmp_path / "none.pth", tmp_path / "ours"], "cannot read"),
        ([tmp_path / "text.pth", tmp_path / "ours"], sentences.NOT_SOUND),
        ([tmp_path / "pipe", tmp_path / "ours"], "it is a folder or a device, not a file"),
        ([file, tmp_path / ("a" * 250)], "its name is too long"),
        ([file, tmp_path / "taken"], "taken is there already"),
        ([file, tmp_path / "text.pth" / "ours", "--num-heads", "2"], "cannot write"),
        ([file, tmp_path / "ours"], "width 16 does not determine the number of heads; give --num-heads"),
        ([file, tmp_path / "ours", "--num-heads", "3"], "--num-heads 3 does not divide the width, 16"),
        ([file, tmp_path / "ours", "--num-heads", "2", "--model", "vit_tiny"], "timm has no 'vit_tiny'"),
        ([file, tmp_path / "ours", "--num-heads", "2", "--model", "resnet18"], "resnet18"),
        ([file, tmp_path / "ours", "--model", "local-dir:/x"], f"--model: name is 'local-dir:/x': {sentences.NO_PLACE}"),
    ]:
        assert main(["import", *map(str, arguments)]) == 2
        assert message in (output := capsys.readouterr().err) and output.count("\n") == 1, output
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["mine.txt"]

    def killed(model, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("timm.models.save_for_hf", killed)
    with pytest.raises(KeyboardInterrupt):
        import_released([file], tmp_path / "ours", num_heads=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "pipe", "taken", "text.pth"]
