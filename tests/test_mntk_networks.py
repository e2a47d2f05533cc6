"""Kernels of every network: right, or refused by name."""

import re

import pytest
import sentences
import timm
import torch
import torch.nn.functional as F
from networks import with_kernels
from timm.layers import StdConv2d
from torch import nn

from incubate_lib.method.mntk import (
    check_kernels,
    kernel_by_definition,
    modular_kernels,
)
from incubate_lib.method.units import Unit, count_units, find_units

# -- every network: right, or refused by name -----------------------------------------------------------------------------

SMALL_VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL_SWIN = {"img_size": 32, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
FAMILIES = {  # network → how it is made small, the size of its images, which layers have no kernel
    "beit_base_patch16_224": (SMALL_VIT, 8, r"attn\.qkv$"),
    "eva02_tiny_patch14_224": (SMALL_VIT, 8, r"attn\.qkv$"),
    "swin_tiny_patch4_window7_224": (SMALL_SWIN, 32, None),
    "swinv2_tiny_window8_256": (SMALL_SWIN, 32, r"attn\.(qkv|cpb_mlp\..*)$"),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}, 32, None),
    "efficientformer_l1": ({"depths": (1, 1, 1, 2), "embed_dims": (8, 8, 8, 16), "num_vit": 1}, 224, None),
    "maxvit_tiny_rw_224": ({"img_size": 64, "embed_dim": (32,), "depths": (1,), "stem_width": 8}, 64,
                           r"attn\.rel_pos$"),
    "tiny_vit_5m_224": ({"embed_dims": (8, 16), "depths": (1, 1), "num_heads": (2, 2), "window_sizes": (4, 4)}, 64, None),
    "levit_128s": ({"img_size": 64, "embed_dim": (16, 24, 32), "depth": (1, 1, 1), "num_heads": (2, 2, 2), "key_dim": 4}, 64,
                   None),
    "xcit_nano_12_p16_224": ({"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, "cls_attn_layers": 1}, 32,
                             r"token_projection$"),
    "coat_tiny": ({"img_size": 32, "embed_dims": (16,) * 4, "serial_depths": (1,) * 4, "parallel_depth": 0}, 32, None),
    "vit_tiny_patch16_224": (SMALL_VIT | {"global_pool": "avg"}, 8, None),
}  # fmt: skip


def layer_units(model: nn.Module) -> list[Unit]:
    """Each layer that holds parameters as a unit."""
    names = {name: [n for n, _ in layer.named_parameters(name, recurse=False)] for name, layer in model.named_modules()}
    leaves = [name for name, layer in model.named_modules() if next(layer.children(), None) is None]
    return [Unit(name, dict.fromkeys(names[name])) for name in leaves if names[name]]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_has_the_kernel_of_the_definition_or_is_refused_by_name(name):
    options, size, expected = FAMILIES[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).double()
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        model.train()(images)
    units, refused = layer_units(model), set()
    while True:
        try:
            check_kernels(model, units, images)
            break
        except ValueError as error:
            output = str(error)
            named = [unit for unit in units if re.search(rf"(layer|parameter) {re.escape(unit.name)}[ .]", output)]
            assert len(named) == 1, output
            units.remove(named[0])
            refused.add(named[0].name)
    assert refused == {unit.name for unit in layer_units(model) if expected and re.search(expected, unit.name)}
    kernels = modular_kernels(model, units, images)
    for i in range(0, len(units), max(1, len(units) // 6)):
        by_definition = kernel_by_definition(model, list(units[i].rows), images)
        assert (kernels[i] - by_definition).norm() <= 1e-8 * by_definition.norm(), units[i].name


class Odd(nn.Module):
    """A small network that does one thing which kernels layer by layer cannot know."""

    def __init__(self, odd: str) -> None:
        super().__init__()
        self.odd = odd
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        if odd == "weight shared by two layers":
            self.second.weight = self.first.weight
        elif odd == "memory shared by two layers":
            self.second.weight.data = self.first.weight.data
        elif odd == "old weight_norm":
            self.first = nn.utils.weight_norm(self.first)
        elif odd == "old spectral_norm":
            self.first = nn.utils.spectral_norm(self.first)
        elif odd == "parametrised weight":
            self.first = nn.utils.parametrizations.weight_norm(self.first)
        elif odd == "multi-head attention":
            self.first = nn.MultiheadAttention(4, 2, batch_first=True)
        elif odd.startswith("batch norm"):
            self.norm = nn.BatchNorm1d(4, track_running_stats="without" not in odd)
            if "train mode" in odd:
                self.norm.train = lambda mode=True: self.norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N, T, 4]
        if self.odd == "multi-head attention":
            return self.head(self.first(x, x, x)[0].mean(1))
        if self.odd == "sequence first":
            return self.head(self.second(self.first(x.transpose(0, 1)).relu()).mean(0))
        if self.odd == "batch in reverse":
            return self.head(self.second(self.first(x).flip(0)).mean(1))
        y = self.first(x).relu()
        if self.odd == "weight used outside its layer":
            y = y + F.linear(x, self.first.weight)
        if self.odd == "layer that is not called":
            return self.head(F.linear(y, self.second.weight).mean(1))
        y = self.second(y).mean(1)
        return self.head(self.norm(y) if self.odd.startswith("batch norm") else y)


@pytest.mark.parametrize(
    ("odd", "output"),
    [
        ("weight shared by two layers", sentences.TWO_LAYERS),
        ("memory shared by two layers", sentences.TWO_LAYERS),
        ("weight used outside its layer", rf"parameter first\.weight {sentences.USED_ELSEWHERE}"),
        ("layer that is not called", rf"parameter second\.weight {sentences.USED_ELSEWHERE}"),
        ("multi-head attention", rf"parameter first\.out_proj\.weight {sentences.USED_ELSEWHERE}"),
        ("old weight_norm", rf"parameter first\.weight_[gv] {sentences.USED_ELSEWHERE}"),
        ("old spectral_norm", rf"parameter first\.weight_orig {sentences.USED_ELSEWHERE}"),
        ("parametrised weight", rf"parameter first\.(bias|parametrizations\..*) {sentences.NO_LAYER}"),
        ("batch norm without statistics", "batch norm norm has no running statistics"),
        ("batch norm left in train mode", "batch norm norm stays in train mode"),
        ("sequence first", f"layer first ({sentences.sees(5)}|.*{sentences.SAMPLES_DEPEND})"),
        ("batch in reverse", f"at layer second samples {sentences.SAMPLES_DEPEND}"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_networks_whose_kernels_would_be_wrong_are_refused_by_name(odd, output):
    torch.manual_seed(0)
    model, images = Odd(odd), torch.randn(5, 5, 4)  # as many tokens as images
    units = layer_units(model) if odd != "parametrised weight" else [Unit("first", {"first.bias": None})]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=output):
        modular_kernels(model, units, images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if odd != "batch in reverse":  # without values it cannot be seen, all else can
        with pytest.raises(ValueError, match=output), torch.device("meta"):
            meta = Odd(odd)
            units = layer_units(meta) if odd != "parametrised weight" else units
            modular_kernels(meta, units, torch.empty(5, 5, 4))


@pytest.mark.parametrize("images", [2, 3])
def test_tokens_may_be_as_many_as_images(images):
    torch.manual_seed(0)
    for odd in ("nothing", "sequence first"):
        model, x = Odd(odd).double(), torch.randn(5, images, 4, dtype=torch.float64)
        if odd == "sequence first":
            with pytest.raises(ValueError, match="layer first"):
                modular_kernels(model, layer_units(model)[:1], x)
            continue
        kernel = modular_kernels(model, layer_units(model)[:1], x)[0]
        torch.testing.assert_close(kernel, kernel_by_definition(model, ["first.weight", "first.bias"], x))


def test_looking_leaves_frozen_batch_norms_in_eval_mode():
    model, images = with_kernels("vgg_bn")
    model.train()
    frozen = model.features[1].eval()
    modular_kernels(model, find_units(model, "conv_layers")[:1], images)
    assert not frozen.training and model.features[0].training and model.training
    kernel_by_definition(model, ["features.0.bias"], images[:1])
    assert not frozen.training


def test_hooks_that_change_a_layers_output_do_not_change_whose_kernel_it_is():
    torch.manual_seed(0)
    model, images = Odd("nothing").double(), torch.randn(3, 5, 4, dtype=torch.float64)
    model.first.register_forward_hook(lambda layer, inputs, output: 3 * output)
    model.second.register_forward_pre_hook(lambda layer, inputs: (inputs[0].tanh(),))
    for unit in layer_units(model):
        kernel = modular_kernels(model, [unit], images)[0]
        torch.testing.assert_close(kernel, kernel_by_definition(model, list(unit.rows), images))


# -- rows that are not what they seem -------------------------------------------------------------------------------------


def attention(name: str, **how) -> nn.Module:
    from timm.models.efficientformer import Attention as ByWidths
    from timm.models.maxxvit import AttentionCl
    from timm.models.swin_transformer import WindowAttention
    from timm.models.tiny_vit import Attention as PerHead
    from timm.models.vision_transformer import Attention

    layer = {
        "vit": lambda: Attention(12, num_heads=3), "swin": lambda: WindowAttention(12, 3, window_size=(2, 2)),
        "maxvit": lambda: AttentionCl(12, dim_head=4, head_first=False), "maxvit per head": lambda: AttentionCl(12, dim_head=4),
        "efficientformer": lambda: ByWidths(12, key_dim=4, num_heads=3, attn_ratio=2, resolution=2),
        "tiny_vit": lambda: PerHead(12, key_dim=4, num_heads=3, attn_ratio=1, resolution=(2, 2)),
    }[name]()  # fmt: skip
    return nn.Sequential(layer)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "known"),
    [("vit", True), ("swin", True), ("maxvit", True), ("maxvit per head", False), ("efficientformer", False),
     ("tiny_vit", False)],
)  # fmt: skip
def test_heads_are_found_where_their_rows_are_theirs(name, known, device):
    with torch.device(device):
        model = attention(name)
    if known:
        assert len(find_units(model, "heads")) == 3
    else:
        with pytest.raises(ValueError, match=rf"0 \(Attention\w*\): {sentences.OTHER_ROWS}"):
            find_units(model, "heads")
    assert count_units(model)["heads"] == 3
    assert all(parameter.device.type == device for parameter in model.parameters())


def test_heads_that_cannot_be_proven_are_refused():
    with torch.device("meta"):
        model = timm.create_model("coat_tiny")
    with pytest.raises(ValueError, match=rf"factoratt_crpe \(Factor\w+\): {sentences.UNKNOWN_ROWS}"):
        find_units(model, "heads")


class Shuffled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).roll(1, 1)


def test_filters_of_unusual_convolutions_are_proven_as_well():
    assert len(find_units(nn.Sequential(StdConv2d(2, 5, 3), nn.Conv2d(5, 4, 1, groups=1)), "filters")) == 9
    with pytest.raises(ValueError, match=rf"0 \(Shuffled\): {sentences.OTHER_ROWS}"):
        find_units(nn.Sequential(Shuffled(2, 5, 3)), "filters")
    with pytest.raises(ValueError, match=r"0 \(Conv2d\)"):
        find_units(nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(2, 5, 3))), "filters")
