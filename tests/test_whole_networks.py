"""Modular Adaptive Training of networks that are no Vision Transformers, as a whole."""

import contextlib

import pytest
import sentences
import timm
import torch
from networks import images_for

from incubate_lib.config import DataSettings, SettingsError, load_settings
from incubate_lib.data.sets import load_data
from incubate_lib.phases.recipes import load_trained
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.export import export
from incubate_lib.report.tables import mat as report_mat
from incubate_lib.report.tables import plots


def test_a_vgg_is_trained_whole_shown_and_exported(data_folder, tmp_path):
    (tmp_path / "vgg.yaml").write_text(
        "data: {source: synthetic, num_images: 48, image_size: 28, pad: 2, test_images: 16, channels: 1}\n"
        "model: {name: vgg11, img_size: 32, in_chans: 1, options: {mlp_ratio: 0.002}}\n"
        "training: {epochs: 2, batch_size: 8, warmup_epochs: 0}\n"
        "mat: {threshold: quantile, alpha: 0.5, probe: 4}\nrun: [end_to_end, mat]\n"
    )
    settings = load_settings(str(tmp_path / "vgg.yaml"))
    todo = plan(settings)
    assert [node.settings.training.epochs for node in todo.nodes] == [2, 2] and not todo.nodes[0].settings.target_depths
    assert todo.nodes[1].settings.mat.units == "conv_layers"  # nobody chose
    assert todo.experiment.facts.units["conv_layers"] == 10
    todo.run()
    full, adaptive_ = (node.summary() for node in todo.nodes)
    assert full["train_flops_executed"] == full["train_flops"]  # no attention
    assert full["train_flops"] == todo.flops["seed-0/end_to_end"] and adaptive_["train_flops"] < 1.2 * full["train_flops"]
    assert plots.network_diagram([], "target").axes and len(report_mat.units_table(todo.nodes[1])) == 2
    export(settings, tmp_path / "out", strategy="mat", seed=0)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    ours = load_trained(todo.nodes[1].settings, todo.nodes[1].folder, 4)
    images = images_for(32)
    torch.testing.assert_close(model(images), ours(images))


WHOLE = [  # network, its fields, kind of units → what is told, or nothing
    ("resnet18", "img_size: 64", "filters", None),
    ("convnext_atto", "img_size: 64", "conv_layers", None),
    ("deit_tiny_distilled_patch16_224", "img_size: 64", "sublayers", None),
    ("efficientnet_b0", "img_size: 64", "conv_layers", None),
    (
        "efficientnet_b0",
        "img_size: 64",
        "filters",
        f"mat.units 'filters' of strategy mat .*not possible.*conv_dw .*{sentences.NOT_ALONE}",
    ),
    (
        "swin_tiny_patch4_window7_224",
        "img_size: 64, options: {depths: [1, 1], window_size: 4}",
        "heads",
        None,
    ),
    ("efficientformer_l1", "img_size: 224", "heads", sentences.UNKNOWN_ROWS),
    ("eva02_tiny_patch14_224", "img_size: 64, patch_size: 16", "heads", r"qkv and proj are not called one after the other"),
    (
        "swin_tiny_patch4_window7_224",
        "img_size: 64, options: {depths: [1, 1], window_size: 4}",
        "sublayers",
        r"none; it has: heads \(9\)",
    ),
]


@pytest.mark.parametrize(("name", "fields", "kind", "output"), WHOLE, ids=lambda v: v)
def test_which_units_a_network_as_a_whole_allows_is_known_while_planning(name, fields, kind, output, data_folder, tmp_path):
    size = fields.partition(",")[0].removeprefix("img_size: ")
    (tmp_path / "whole.yaml").write_text(
        f"data: {{source: synthetic, num_images: 48, image_size: {size}, channels: 3, test_images: 16}}\n"
        f"model: {{name: {name}, {fields}}}\n"
        f"training: {{epochs: 2, batch_size: 8, warmup_epochs: 0}}\nmat: {{units: {kind}, probe: 4}}\nrun: [mat]\n"
    )
    with pytest.raises(SettingsError, match=output) if output else contextlib.nullcontext():
        assert plan(load_settings(str(tmp_path / "whole.yaml"))).experiment.facts.units[kind] > 0


def test_padding_surrounds_the_images():
    source = {"source": "synthetic", "num_images": 32, "image_size": 6, "channels": 1, "test_images": 8}
    plain, padded = (load_data(DataSettings(**source, pad=pad)) for pad in (0, 2))
    for a, b in zip(plain, padded, strict=True):
        assert b.shape == (1, 10, 10) and torch.equal(a.images, b.images[:, :, 2:-2, 2:-2])
        assert b.images.sum() == a.images.sum()
