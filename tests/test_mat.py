"""Modular Adaptive Training, the method: who rests, what resting means for every gradient."""

import copy
import math

import pytest
import sentences
import timm
import torch
import torch.nn.functional as F
from networks import NETWORKS, gradients, images_for, masks, vgg, vit
from project import block
from torch import nn

from incubate_lib.method.mat import PartialUpdates, choose, gradient_norms, same_number
from incubate_lib.method.mntk import modular_kernels
from incubate_lib.method.units import Unit, find_units
from incubate_lib.training.trainer import compiled


def loss(logits):
    """Return the loss of eight images whose classes are 0, 1, 2, 3, 0, …"""
    return F.cross_entropy(logits.float(), torch.arange(8, device=logits.device) % 4)


# -- the threshold --------------------------------------------------------------------------------------------------------

VALUES = torch.tensor([[1.0, 2.0, 3.0, 4.0, 10.0]]).double()


@pytest.mark.parametrize(
    ("how", "active"),
    [
        ({"threshold": "ratio", "alpha": 0.0}, [1, 1, 1, 1, 1]),
        ({"threshold": "ratio", "alpha": 0.2}, [0, 0, 1, 1, 1]),  # the cut is 1 + 0.2 · 9 = 2.8
        ({"threshold": "ratio", "alpha": 1.0}, [0, 0, 0, 0, 1]),
        ({"threshold": "quantile", "alpha": 0.0}, [1, 1, 1, 1, 1]),
        ({"threshold": "quantile", "alpha": 0.5}, [0, 0, 1, 1, 1]),
        ({"threshold": "quantile", "alpha": 1.0}, [0, 0, 0, 0, 1]),
        ({"threshold": "mass", "alpha": 0.0}, [1, 1, 1, 1, 1]),
        ({"threshold": "mass", "alpha": 0.3}, [0, 0, 0, 1, 1]),  # 10 + 4 of 20
        ({"threshold": "mass", "alpha": 1.0}, [0, 0, 0, 0, 1]),
    ],
)
def test_modular_threshold(how, active):
    choice = choose(VALUES, **how)
    assert choice.active.int().tolist() == active and not choice.forced
    assert VALUES[0][choice.active].min() >= choice.cut > (VALUES[0][~choice.active].max() if 0 in active else -1)


def test_temporal_threshold_rests_what_no_longer_moves_and_lets_it_come_back():
    history = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 2.0], [3.0, 4.0]]).double()
    acts = [choose(history[: n + 1], alpha=0.0, beta=0.5).active.tolist() for n in range(4)]
    assert acts == [[True, True], [True, True], [True, False], [False, True]]  # from the third evaluation on


def test_the_strongest_goes_on_when_everything_would_rest():
    still = torch.tensor([[1.0, 2.0]] * 3).double() + torch.tensor([[0.0], [1.0], [1.0]]).double()
    choice = choose(still, alpha=0.0, beta=0.1)
    assert choice.forced and choice.active.tolist() == [False, True]


@pytest.mark.parametrize(("how", "output"), [({"alpha": -0.1}, "alpha is -0.1"), ({"alpha": 1.1}, "alpha is 1.1"),
                                           ({"alpha": 0.5, "beta": -1}, "beta is -1")])  # fmt: skip
def test_thresholds_out_of_range(how, output):
    with pytest.raises(ValueError, match=output):
        choose(VALUES, **how)
    with pytest.raises(ValueError, match="an eigenvalue is nan"):
        choose(VALUES * math.nan, alpha=0.1)


def test_controls_take_the_same_number():
    active = torch.tensor([True, False, True, False])
    assert same_number(active, -torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [True, True, False, False]


def test_gradient_norms_are_those_of_the_loss():
    for kind in ("heads", "sublayers"):
        model, images = vit().eval(), images_for(8)
        units = find_units(model, kind)
        norms = gradient_norms(model, units, images, loss)
        F.cross_entropy(model(images), torch.arange(8) % 4).backward()
        for unit, norm in zip(units, norms, strict=True):
            parts = [model.get_parameter(n).grad[slice(*r)] for n, rs in unit.rows.items() for r in rs or [(None, None)]]
            assert norm.item() == pytest.approx(torch.cat([part.flatten() for part in parts]).norm().item(), rel=1e-4)


# -- gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_active_has_the_gradients_of_full_training_and_what_rests_none(kind, cut):
    build, size = NETWORKS[kind]
    model, images = build(), images_for(size)
    full = gradients(build(), images)
    scale = max(g.abs().max() for g in full.values())
    updates = PartialUpdates(model, find_units(model, kind), images[:1], cut=cut)
    owned = {name for unit in updates.units for name in unit.rows}
    for active in masks(len(updates.units)):
        updates.apply(active)
        found = gradients(model, images)
        updates.hand_over()
        for piece in updates.pieces:
            if piece.unit is not None and not active[piece.unit]:
                assert piece.leaf.grad is None and (piece.rows is not None or piece.name not in found)
                continue
            if piece.name not in owned and piece.leaf.grad is None:
                lowest = min(height for height, on in zip(updates.heights, active, strict=True) if on)
                assert cut and updates.height[piece.name] < lowest
                continue
            expected = full[piece.name] if piece.rows is None else full[piece.name][piece.rows]
            torch.testing.assert_close(piece.leaf.grad, expected, rtol=1e-4, atol=1e-6 * scale.item())
    assert found.keys() == full.keys()  # all were active at the end


def test_below_the_lowest_active_unit_nothing_is_computed():
    model, images = vit(), images_for(8)
    updates = PartialUpdates(model, find_units(model, "blocks"), images[:1])
    updates.apply(torch.tensor([False, False, True]))
    assert set(gradients(model, images)) == {n for n in model.state_dict() if n.startswith(("blocks.2.", "norm.", "head."))}
    assert not model.blocks[1](torch.randn(1, 5, 24)).requires_grad  # no graph is built there
    updates.apply(torch.tensor([True, False, True]))  # the lowest unit trains, and so does the stem below it
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= set(gradients(model, images))


@pytest.mark.parametrize("kind", ["sublayers", "blocks"])
def test_stopped_error_takes_the_skip_connection_only(kind):
    """As if a resting branch were a constant that is added."""
    model, images = vit(), images_for(8)
    updates = PartialUpdates(model, find_units(model, kind), images[:1], stop_error=True)
    active = torch.ones(len(updates.units)).bool()
    active[1] = False
    for mask in (active, ~active):
        updates.apply(mask)
        found = gradients(model, images)
        expected = vit()
        for unit, on in zip(find_units(expected, kind), mask, strict=True):
            for name in () if on else {n.rpartition(".")[0] for n in unit.entrances}:
                block = expected.get_submodule(name)
                parts = unit.entrances if kind == "blocks" else unit.entrances[:1]
                for entrance in parts:
                    layer = entrance.rpartition(".")[2]
                    branch = (block.attn, block.ls1) if layer == "norm1" else (block.mlp, block.ls2)
                    branch[0].register_forward_hook(lambda module, inputs, output: output.detach())
        reference = gradients(expected, images)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, reference[name], rtol=1e-5, atol=1e-7)
    updates.apply(torch.ones(len(updates.units)).bool())
    torch.testing.assert_close(gradients(model, images), gradients(vit(), images), rtol=1e-5, atol=1e-7)


def test_stopped_error_of_rows_is_that_of_the_active_rows():
    layer = nn.Sequential(nn.Linear(6, 6), nn.Conv2d(1, 4, 3, padding=1, stride=2))
    from incubate_lib.method.rows import with_rows

    for plain, x in ((layer[0], torch.randn(5, 6)), (layer[1], torch.randn(2, 1, 7, 7))):
        rows = torch.tensor([0, 3])
        divided = with_rows("x", plain)
        divided.divide(rows, stop_error=True)
        x.requires_grad_()
        out = divided(x)
        delta = torch.randn_like(out)
        dim = -1 if isinstance(plain, nn.Linear) else 1
        (to_x,) = torch.autograd.grad(out, x, delta)
        kept = torch.zeros_like(delta).index_copy(dim, rows, delta.index_select(dim, rows))
        (expected,) = torch.autograd.grad(plain(x), x, kept)
        torch.testing.assert_close(to_x, expected)


@pytest.mark.parametrize(("kind", "stop_error"), [(k, k != "conv_layers") for k in NETWORKS])
def test_kernels_and_gradient_norms_are_whole_whatever_rests(kind, stop_error):
    """What resting changes on the way of the error must not reach what is looked at."""
    build, size = NETWORKS[kind]
    model, images = build(), images_for(size)
    updates = PartialUpdates(model, find_units(model, kind), images[:1], stop_error=stop_error)
    looked = []
    for active in [torch.ones(len(updates.units)).bool(), *masks(len(updates.units))[:3]]:
        updates.apply(active)
        model.train()
        kernels = modular_kernels(model, updates.units, images)
        looked.append((kernels, gradient_norms(model, updates.units, images, loss)))
    for kernels, norms in looked[1:]:
        torch.testing.assert_close(kernels, looked[0][0])
        torch.testing.assert_close(norms, looked[0][1])


def test_a_layer_of_which_every_head_rests_passes_no_error_on():
    model, images = vit(), images_for(8)
    updates = PartialUpdates(model, find_units(model, "heads"), images[:1], stop_error=True)
    active = torch.ones(9).bool()
    active[3:6] = False  # the second block's
    updates.apply(active)
    found = gradients(model, images)
    expected = vit()
    expected.blocks[1].attn.qkv.register_forward_pre_hook(lambda layer, inputs: (inputs[0].detach(),))
    reference = gradients(expected, images)
    assert "blocks.1.attn.qkv.weight" not in found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-5, atol=1e-7)


def test_stopped_error_needs_a_way_around():
    model = vgg()
    with pytest.raises(ValueError, match="the error has no way around these units"):
        PartialUpdates(model, find_units(model, "conv_layers"), images_for(32)[:1], stop_error=True)


def test_rows_of_unusual_layers_cannot_rest_alone():
    model = timm.create_model("resnet10t", in_chans=1, num_classes=4)
    model.conv1[0] = nn.Conv2d(1, 24, 3, stride=2, padding=1, padding_mode="reflect")
    with pytest.raises(ValueError, match=rf"rows of conv1\.0 .* {sentences.NOT_ALONE}"):
        PartialUpdates(model, find_units(model, "filters"), images_for(32)[:1])


def test_rows_whose_weight_is_used_elsewhere_cannot_rest_alone():
    """Or nothing would be cut, and gradients of the other use be dropped."""
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=8, patch_size=4, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(ValueError, match=r"rows of blocks\.0\.attn\.qkv\.weight cannot rest alone; it is used outside"):
        PartialUpdates(eva, [Unit("head", {"blocks.0.attn.qkv.weight": ((0, 8),)})], torch.randn(1, 3, 8, 8))
    layer = nn.utils.weight_norm(nn.Linear(4, 4))
    names = dict.fromkeys((name for name, _ in layer.named_parameters("0")), ((0, 2),))
    with pytest.raises(ValueError, match=sentences.NOT_ALONE):
        PartialUpdates(nn.Sequential(layer), [Unit("upper", names)], torch.randn(1, 4))


def test_a_weight_of_two_layers_or_units_rests_with_neither():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    units = [Unit("a", {"0.weight": None}), Unit("b", {"2.bias": None})]
    PartialUpdates(model, units, torch.randn(1, 4))
    with pytest.raises(ValueError, match=sentences.two_units("b")):
        PartialUpdates(model, [units[0], Unit("b", {"0.weight": None})], torch.randn(1, 4))
    with pytest.raises(ValueError, match=r"rows 1 to 3 of 0\.weight belong to two units"):
        PartialUpdates(model, [Unit("a", {"0.weight": ((0, 2),)}), Unit("b", {"0.weight": ((1, 3),)})], torch.randn(1, 4))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"parameter 0\.weight is 2\.weight as well"):
        PartialUpdates(model, units, torch.randn(1, 4))


def test_what_is_used_above_the_lowest_active_unit_keeps_its_gradient():
    """Wherever it is held: ConvNeXt's blocks hold a scale of their own, which is used after their layers."""
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 4, 4, 8), in_chans=1, num_classes=4)
    images = images_for(32)
    updates = PartialUpdates(model, find_units(model, "conv_layers"), images[:1])
    lowest = [unit.name for unit in updates.units].index("stages.2.blocks.0.conv_dw")
    updates.apply(torch.arange(len(updates.units)) == lowest)
    found = gradients(model, images)
    assert {"stages.2.blocks.0.gamma", "stages.3.blocks.0.gamma", "stages.2.blocks.0.conv_dw.weight"} <= set(found)
    assert not any(name.startswith(("stem.", "stages.0.", "stages.1.")) for name in found)


def test_looking_at_gradients_leaves_frozen_batch_norms_in_eval_mode():
    model = vgg().train()
    model.features[1].eval()
    images = images_for(32)
    PartialUpdates(model, find_units(model, "conv_layers"), images[:1])
    gradient_norms(model, find_units(model, "conv_layers")[:1], images, loss)
    assert not model.features[1].training and model.features[0].training


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["heads", "sublayers", "conv_layers", "filters"])
def test_compiled_gradients_equal_eager_ones_after_every_change(kind, precision):
    """torch.compile may reuse a graph of other trainable parameters (pytorch issue 139476), so each change compiles anew."""
    build, size = NETWORKS[kind]
    model, images = vit(2) if build is vit else build(), images_for(size)
    updates = PartialUpdates(model, find_units(model, kind), images[:1])
    for active in masks(len(updates.units))[: 4 if precision == "float32" else 2]:
        updates.apply(active)
        runner = compiled(model, "default", backend="aot_eager")

        def run(x, called=model):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                return called(x)

        eager = gradients(model, images, run)
        fast = gradients(model, images, lambda x, runner=runner: run(x, runner))
        assert eager.keys() == fast.keys()
        scale = max(g.abs().max().item() for g in eager.values())
        for name in eager:
            tolerance = 2e-2 if precision == "bfloat16" else 1e-6
            torch.testing.assert_close(fast[name], eager[name], rtol=tolerance, atol=tolerance * scale)


def test_a_copy_of_the_model_is_independent():
    model, images = vit(), images_for(8)
    updates = PartialUpdates(model, find_units(model, "heads"), images[:1])
    updates.apply(masks(9)[0])
    twin = copy.deepcopy(model)
    torch.testing.assert_close(gradients(twin, images), gradients(model, images))
    assert list(twin.state_dict()) == list(vit().state_dict())


def test_the_readmes_loop_trains():
    """The lines of README, run as they stand: what rests keeps its weights, the loss falls."""
    loop = block("python", "PartialUpdates")
    model, images = vit(), images_for(8)
    labels, losses = torch.arange(8) % 4, []

    def loss_function(logits, labels):
        losses.append(F.cross_entropy(logits, labels))
        return losses[-1]

    names = {"model": model, "probe": images, "epochs": 12, "loader": [(images, labels)] * 4, "loss_function": loss_function}
    exec(loop, names)
    assert losses[-1] < losses[0] / 2 and len(names["history"]) == 12
    active = names["updates"].active
    assert active.sum() == 2 and len(active) == 6  # a quarter of six, and what ties with the cut
    resting = [piece for piece in names["updates"].pieces if piece.unit is not None and not active[piece.unit]]
    assert resting and all(piece.leaf.grad is None for piece in resting)
