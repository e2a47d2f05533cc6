"""Local learning: no gradient leaves a module, one module's graph at a time, heads counted apart, the stock network."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from incubate_lib.config import load_settings
from incubate_lib.config.members import PHASES
from incubate_lib.method.chain import find_chain
from incubate_lib.method.local import DGLHead, InfoProHead, LocalLearning, as_map, contrast, heads_of, pooled, weights_of
from incubate_lib.method.network import divide
from incubate_lib.phases.networks import depths_of, fair_shares
from incubate_lib.phases.recipes import load_trained
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.planner.memory import step_memory_of
from incubate_lib.report.tables.phases import costs_table
from incubate_lib.training.stopwatch import LiveBytes
from incubate_lib.training.trainer import Trainer

SMALL = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 6, "num_heads": 2},
            16, [2, 2, 2]),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32, "patch_size": 2, "embed_dim": 12, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4,
            "drop_path_rate": 0.0,
        },
        32, [1, 2, 1],
    ),
    "resnet": ("resnet26", {"channels": (4, 8, 4, 4), "stem_width": 8, "zero_init_last": False}, 32, [1, 1, 2]),
}  # fmt: skip
METHODS = [("infopro", False), ("infopro", True), ("dgl", False)]
METHOD_NAMES = ["infopro", "infopro by contrast", "dgl"]


def made(network: str, method: str = "infopro", by_contrast: bool = False) -> tuple[LocalLearning, torch.Tensor]:
    name, arguments, size, depths = SMALL[network]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, in_chans=3, **arguments)
    partition = divide(find_chain(model, (3, size, size)), depths)
    heads = heads_of(method, partition, (3, size, size), 10, by_contrast)
    return LocalLearning(model, partition, heads), torch.rand(8, 3, size, size)


class Labels:
    """The loss of classes, as a phase has it."""

    y = torch.arange(8) % 4

    def __call__(self, output):
        return F.cross_entropy(output, self.y)

    def contrast(self, features):
        return contrast(features, self.y)


def losses(model, x):
    return PHASES["local_learning"].losses(model, x, Labels())


@pytest.mark.parametrize(("method", "by_contrast"), METHODS, ids=METHOD_NAMES)
@pytest.mark.parametrize("network", SMALL)
def test_a_loss_reaches_its_own_module_and_head_and_nothing_else(network, method, by_contrast):
    model, x = made(network, method, by_contrast)
    groups = [set(map(id, group)) for group in model.groups()]
    assert sum(map(len, groups)) == len(list(model.parameters()))
    for own, loss in zip(groups, losses(model, x), strict=True):
        loss.backward()
        touched = {id(p): p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None}
        assert touched.keys() == own, "every parameter of the module learns"
        assert sum(value > 0 for value in touched.values()) > 0.8 * len(own)
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("network", SMALL)
def test_modules_in_turn_compute_what_the_network_computes(network):
    model, x = made(network, "dgl")
    for index in model(x):
        last = model(x, index).output
    torch.testing.assert_close(last, model.network(x))
    assert torch.equal(model.eval()(x), model.network(x))


@pytest.mark.parametrize("network", SMALL)
def test_what_is_kept_for_the_backward_pass_is_that_of_the_largest_module_and_its_head(network):
    model, x = made(network)
    peak, alone = LiveBytes([x, *model.state_dict().values()]), []
    kept: list[int] = []

    def saved(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor), peak:
        highest = 0
        for loss in losses(model, x):
            alone.append(sum(kept))
            highest = max(highest, peak.live)
            loss.backward()
            kept.clear()
            del loss
    assert sum(alone) > 1.2 * max(alone)  # what would be kept without detaching
    assert highest <= 1.1 * max(alone) + sum(p.numel() * 4 for p in model.parameters())  # gradients come as modules end


@pytest.mark.parametrize(("method", "by_contrast"), METHODS, ids=METHOD_NAMES)
def test_flops_are_what_the_counter_sees_and_heads_stand_apart(method, by_contrast, data_folder):
    way = f"strategies.mine={{kind: local_learning, method: {method}, contrast: {str(by_contrast).lower()}}}"
    node = plan(load_settings("smoke", [way]), ["mine"]).nodes[0]
    model = node.kind.build(node.settings, {}, 4).to("meta")
    per_image = node.job.flops_per_image
    heads = node.facts.flops_per_image[f"{node.kind.cost(node.settings.model, node.settings.options)}_heads"]
    with FlopCounterMode(display=False) as counter:
        for loss in PHASES["local_learning"].losses(model, torch.empty(2, 1, 8, 8, device="meta"), lambda output: output.sum()):
            loss.backward()
    assert counter.get_total_flops() == 2 * per_image and 0 < heads < per_image
    table = costs_table(node)
    assert any(name.startswith(f"local learning, {method}") and name.endswith("heads") for name in table.index)


@pytest.mark.parametrize(("method", "by_contrast"), METHODS, ids=METHOD_NAMES)
def test_a_strategy_ends_in_a_stock_network_that_has_learned(method, by_contrast, data_folder):
    way = f"strategies.mine={{kind: local_learning, method: {method}, contrast: {str(by_contrast).lower()}}}"
    how = ["training.epochs=6", "training.drop_path=0", "training.shift=0", "training.lr=4e-3"]
    node = plan(load_settings("smoke", [way, *how]), ["mine"]).nodes[0]
    node.run()
    first, *_, last = node.folder.metrics()
    assert last["loss"] < first["loss"]
    summary = node.summary()
    model = load_trained(node.settings, node.folder, 4)
    assert model.state_dict().keys() == timm.create_model("vit_tiny_patch16_224", depth=6).state_dict().keys()
    assert summary["parameters"] == sum(p.numel() for p in model.parameters()) and summary["head_parameters"] > 0
    assert summary["train_flops"] == node.flops == summary["steps"] * 16 * node.job.flops_per_image
    known: dict = {}
    memory, whole = (step_memory_of(one, known) for one in (node, plan(load_settings("smoke"), ["end_to_end"]).nodes[-1]))
    assert memory.activations < whole.activations
    assert memory.optimizer == 2 * 4 * (summary["parameters"] + summary["head_parameters"]) > whole.optimizer


@pytest.mark.parametrize(("method", "by_contrast"), METHODS, ids=METHOD_NAMES)
def test_memory_is_that_of_a_real_update_heads_included(method, by_contrast, data_folder):
    way = f"strategies.mine={{kind: local_learning, method: {method}, contrast: {str(by_contrast).lower()}}}"
    how = ["training.batch_size=64", "training.clip_grad=null", "training.drop_path=0", "training.shift=0"]
    node = plan(load_settings("smoke", [way, *how]), ["mine"]).nodes[0]
    model, (train, _) = node.kind.build(node.settings, {}, 4), node.data()
    own = {"losses": node.kind.losses, "groups": node.kind.groups(model), "flops_per_image": 1}
    trainer = Trainer(model, train, node.settings.training, seed=0, **own)
    trainer.begin(0)
    trainer.step(0)  # makes the optimiser's states
    trainer.optimizer.zero_grad(set_to_none=True)
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    with LiveBytes([*model.parameters(), *states]) as counted:
        trainer.step(1)
    least = 0.8 if method == "infopro" and not by_contrast else 0.85  # gradients of maps, gone in a moment, are not counted
    assert least < step_memory_of(node, {}).peak(64) / counted.peak < 1.05


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_heads_of_a_resnet_for_small_images_are_the_published_ones():
    """InfoPro halves maps of 16 and 32 channels; its decoder works at 32 pixels; DGL's layers are 4 C wide."""
    for channels, halved in ((16, True), (32, True), (64, False)):
        features = torch.randn(2, channels, 2048 // channels // 4, 2048 // channels // 4)
        head = InfoProHead(features, (3, 32, 32), 100, False, (1.0, 0.0))
        assert head.conv(features).shape[1:] == (
            (2 * channels, features.shape[2] // 2, features.shape[3] // 2) if halved else (channels, *features.shape[2:])
        )
        made = head(features)
        assert made.decoded.shape == (2, 3, 32, 32) and made.output.shape == (2, 100)
        dgl, wide = DGLHead(features, 100), 4 * channels
        linear = 3 * (wide * wide + 3 * wide) + 100 * (wide + 1)
        assert parameters(dgl) == 3 * (channels * channels + 2 * channels) + linear
    for modules, expected in ((2, [(5, 0.5)]), (4, [(1, 0), (0.5, 0.5), (0, 1)])):
        chain = find_chain(timm.create_model("resnet26", channels=(8, 8, 8, 8)), (3, 32, 32))
        partition = divide(chain, [4 // modules] * modules)
        assert weights_of(partition) == expected
    assert weights_of(partition, ([2.0, 4.0], None))[1][0] == 3


@pytest.mark.parametrize(("size", "side"), [((4, 4), 2), ((14, 14), 3), ((7, 5), 2), ((9, 9), 9), ((56, 56), 14)])
def test_pooling_is_that_of_torch_by_operations_that_are_deterministic_on_a_gpu(size, side):
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(pooled(x, side), F.adaptive_avg_pool2d(x, side))
    weights = torch.randn(2, 3, side, side, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((weights * pool(x, side)).sum(), x)[0] for pool in (pooled, F.adaptive_avg_pool2d))
    torch.testing.assert_close(ours, theirs)
    with FlopCounterMode(display=False) as counter:
        pooled(x, side)
    assert counter.get_total_flops() == 0  # as of torch's


def test_tokens_become_a_map_without_those_that_come_first():
    tokens = torch.arange(2 * 18 * 3.0).view(2, 18, 3)
    assert torch.equal(as_map(tokens)[0, :, 0, 0], tokens[0, 2]) and as_map(tokens).shape == (2, 3, 4, 4)
    assert as_map(torch.empty(2, 4, 4, 8)).shape == (2, 8, 4, 4) == as_map(torch.empty(2, 8, 4, 4)).shape
    with pytest.raises(ValueError, match="neither a map nor tokens"):
        as_map(torch.empty(2, 8))


def test_contrast_is_the_published_loss_and_takes_no_part_of_samples_without_a_partner():
    features, labels = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 1, 2])
    z = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T / 0.07
    expected = []
    for i in range(5):  # the last one has no partner
        others = [j for j in range(6) if j != i]
        partners = [j for j in others if labels[j] == labels[i]]
        expected.append(-sum(z[i, j] - z[i, others].logsumexp(0) for j in partners) / len(partners))
    torch.testing.assert_close(contrast(features, labels), torch.stack(expected).mean())


@pytest.mark.parametrize("costs", [[5, 5, 1, 1, 1, 1, 1, 1], [1, 1, 9], [3, 1, 4, 1, 5, 9, 2, 6], [2] * 6])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_largest_share_is_as_small_as_can_be(costs, number):
    found, ends = fair_shares(costs, number), range(1, len(costs))
    assert len(found) == number and min(found) >= 1 and sum(found) == len(costs)

    def largest(depths):
        places = list(itertools.accumulate(depths, initial=0))
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(places))

    ways = ([b - a for a, b in itertools.pairwise((0, *cuts, len(costs)))] for cuts in itertools.combinations(ends, number - 1))
    assert largest(found) == min(map(largest, ways))


def test_modules_of_a_residual_network_are_cut_by_memory(data_folder):
    """Its first blocks keep most, of maps that are large."""
    how = ["model={name: resnet26, in_chans: 1, img_size: 32, options: {channels: [8, 8, 8, 8]}}", "data.image_size=32"]
    depths = [depths_of(load_settings("smoke", [*how, part]))[0] for part in (
        "partition={num_modules: 2, balance: memory}", "partition={num_modules: 2}")]  # fmt: skip
    assert depths[0][0] < depths[1][0] and sum(depths[0]) == sum(depths[1])
