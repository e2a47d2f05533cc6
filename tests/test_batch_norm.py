"""Batch norm: what is frozen stays in eval mode, statistics are renewed after assembly, and that is counted and told."""

import pytest
import torch
import yaml
from families import pair, some_images
from test_devices import train_on
from timm.layers import BatchNormAct2d
from torch import nn

from incubate_lib.config import load_settings
from incubate_lib.data.sets import ImageSet
from incubate_lib.method.incubation import Hybrid
from incubate_lib.phases.recipes import load_trained
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.planner.forecast import forecast, stated_speed
from incubate_lib.training.loop import evaluate, renew_statistics

RESNET = {
    "data": {"source": "digits", "test_images": 200, "train_share": 0.1},
    "model": {"name": "cifar_resnet20", "img_size": 8, "in_chans": 1, "options": {"channels": [4, 8, 8], "layers": [3, 2, 2]}},
    "partition": {"num_modules": 2},
    "training": {"epochs": 1, "batch_size": 32, "lr": 3e-3, "warmup_epochs": 0},
    "run": ["deep_incubation"],
}


def settings(folder, **changes):
    (folder / "resnet.yaml").write_text(yaml.safe_dump(RESNET | changes))
    return load_settings(str(folder / "resnet.yaml"))


def statistics(network):
    return {name: buffer.clone() for name, buffer in network.named_buffers() if "running" in name}


@pytest.mark.parametrize("index", range(3))
def test_in_a_hybrid_only_the_statistics_of_what_learns_move(index):
    meta, target, partition = pair("resnet")
    hybrid = Hybrid(meta, target, partition, index)
    before = statistics(hybrid.network)
    hybrid.train()(some_images())
    moved = {name for name, value in statistics(hybrid.network).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if partition.owner(name) == index} != set()


def test_renewed_statistics_are_the_means_over_the_training_images_and_nothing_else_changes():
    """By the definition: of each batch its mean and its unbiased variance, the same weight for each batch."""
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(1, 4, 3), BatchNormAct2d(4)
    model = nn.Sequential(convolution, norm, nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    pixels = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8)
    one = torch.ones(1, 1, 1)
    data = ImageSet(pixels, torch.randint(3, (200,)), one / 3, one / 4, 3)
    seen = []
    convolution.register_forward_hook(lambda layer, inputs, output: seen.append(output.detach()))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" not in name}
    took = renew_statistics(model, data, seed=0)
    assert took["images_seen"] == sum(map(len, seen)) == 192 and took["train_seconds"] > 0
    means, variances = (torch.stack([part(batch) for batch in seen]).mean(0) for part in (of_mean, of_variance))
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.momentum == 0.1 and not any(layer.training for layer in model.modules())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items() if "tracked" not in name)


def of_mean(batch):
    return batch.mean((0, 2, 3))


def of_variance(batch):
    return batch.var((0, 2, 3))


def test_renewal_is_planned_counted_and_told(tmp_path, data_folder, capsys):
    made = plan(settings(tmp_path))
    made.run()
    node = next(node for node in made.nodes if node.settings.phase == "assemble")
    summary, per_image = node.summary(), made.experiment.facts.flops_per_image["renewal"]
    assert summary["train_flops"] == node.flops == made.flops[node.key] == per_image * summary["images_seen"] > 0
    assert summary["train_seconds"] > 0 and summary["steps"] == 0
    assert f"renewed by {summary['images_seen']} training images, forward only" in capsys.readouterr().out
    planned = forecast(made, stated_speed()).phases.set_index("phase")["flops"]
    assert planned["assemble"] == node.flops
    saved = load_trained(node.settings, node.folder, 10)
    fresh = statistics(saved)
    renew_statistics(saved, node.data()[0], seed=1)  # in another order it is nearly the same
    assert evaluate(saved, node.data()[1])["loss"] == pytest.approx(summary["loss"], rel=0.1)
    assert all(torch.equal(fresh[name], value) for name, value in statistics(load_trained(
        node.settings, node.folder, 10)).items())  # fmt: skip


def test_without_batch_norm_assembly_costs_nothing_and_is_what_it_was(tmp_path, data_folder):
    model = {"name": "swin_tiny_patch4_window7_224", "img_size": 8, "patch_size": 1, "in_chans": 1, "embed_dim": 8}
    model |= {"num_heads": [2, 2], "options": {"depths": [2, 2], "window_size": 4}}
    for own in (settings(tmp_path, model=model), load_settings("smoke")):
        node = next(node for node in plan(own, ["deep_incubation"]).nodes if node.settings.phase == "assemble")
        assert node.flops == 0 and not node.settings.options["renew"]
        assert "renewal" not in node.facts.flops_per_image


@pytest.mark.parametrize("phase", ["incubate", "finetune"])
def test_several_devices_save_the_statistics_that_they_were_evaluated_with(phase, tmp_path, data_folder):
    node = next(node for node in plan(settings(tmp_path)).nodes if node.settings.phase == phase)
    for before in node.inputs.values():
        before.run()
    train_on(2, tmp_path / "meeting", node)
    recorded, (train, eval_set) = node.folder.metrics()[-1], node.data()
    network = node.kind.build(node.settings, {name: n.folder.path for name, n in node.inputs.items()}, train.num_classes)
    weights = {f"network.{name}" if phase == "incubate" else name: t for name, t in node.folder.load_weights().items()}
    assert not network.load_state_dict(weights, strict=False).unexpected_keys
    saved = evaluate(network, eval_set)
    assert recorded["score"] == saved["score"] and recorded["loss"] == pytest.approx(saved["loss"], rel=1e-5)
