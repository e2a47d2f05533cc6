"""The modular neural tangent kernel: the definition, the sum rule, what it tells, what it costs."""

import pytest
import sentences
import timm
import torch
from networks import KERNELS, made_of, with_kernels
from timm.layers import StdConv2d
from torch import nn
from torch.func import functional_call, jacrev

from incubate_lib.method.incubation import Hybrid
from incubate_lib.method.mntk import kernel_by_definition, modular_kernels, probe_bytes
from incubate_lib.method.spectra import effective_rank, normalised, principal_eigenvalues, spectrum
from incubate_lib.method.units import Unit, count_units, find_units


def by_jacobian(model: nn.Module, units: list[Unit], images: torch.Tensor, outputs: str) -> torch.Tensor:
    """Every unit's kernel from torch's own Jacobian, which shares no code with what is tested."""
    names = sorted({name for unit in units for name in unit.rows})
    parameters = {name: model.get_parameter(name).detach() for name in names}
    fixed = {name: value.detach() for name, value in model.named_parameters()}

    def logits(parameters):
        out = functional_call(model.eval(), fixed | parameters, (images,))
        return out.sum(1) if outputs == "sum" else out.flatten()

    jacobian = jacrev(logits)(parameters)
    kernels = []
    for unit in units:
        parts = [jacobian[n][:, slice(*rows)] for n, ranges in unit.rows.items() for rows in ranges or [(None, None)]]
        matrix = torch.cat([part.flatten(1) for part in parts], 1)
        kernels.append(matrix @ matrix.T)
    return torch.stack(kernels)


@pytest.mark.parametrize("outputs", ["sum", "all"])
@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("vit", "heads", {}),
        ("vit", "sublayers", {"init_values": 0.1, "qk_norm": True}),  # LayerScale and norms of q and k
        ("vit", "blocks", {"qkv_bias": False}),
        ("vgg", "conv_layers", {}),  # activations in place
        ("vgg_bn", "filters", {}),
        ("resnet", "blocks", {}),  # strides, batch norm, shortcuts with convolutions
    ],
)
def test_kernels_are_those_of_the_definition(name, kind, more, outputs):
    model, images = with_kernels(name, **more)
    units = find_units(model, kind)
    kernels = modular_kernels(model, units, images, outputs=outputs)
    assert kernels.shape == (len(units), *(2 * [3 if outputs == "sum" else 9])) and kernels.dtype == torch.float64
    some = list(range(0, len(units), max(1, len(units) // 20)))
    expected = by_jacobian(model, [units[i] for i in some], images, outputs)
    norms = expected.flatten(1).norm(dim=1)
    assert ((kernels[some] - expected).flatten(1).norm(dim=1) <= 1e-8 * norms).all() and norms.gt(0).float().mean() > 0.5
    expected = torch.linalg.eigvalsh(expected)[:, -1]
    torch.testing.assert_close(principal_eigenvalues(kernels[some]), expected, rtol=1e-8, atol=1e-12)


def test_kernels_of_units_and_of_the_rest_add_up_to_the_networks():
    model, images = with_kernels("vit")
    everything = [name for name, _ in model.named_parameters()]
    whole = kernel_by_definition(model, everything, images, outputs="all")
    for kind in ("heads", "sublayers", "blocks"):
        units = find_units(model, kind)
        rest = kernel_by_definition(
            model, sorted({*everything} - {n for unit in units for n in unit.rows}), images, outputs="all"
        )
        torch.testing.assert_close(
            modular_kernels(model, units, images, outputs="all").sum(0) + rest, whole, rtol=1e-8, atol=1e-8
        )


def test_kernels_of_heads_and_of_filters_add_up_to_their_layers():
    for name, parts, layers in (("vit", "heads", None), ("vgg_bn", "filters", "conv_layers")):
        model, images = with_kernels(name)
        of_parts = modular_kernels(model, find_units(model, parts), images).sum(0)
        whole = [Unit(f"blocks.{i}", {f"blocks.{i}.attn.qkv.{p}": None for p in ("weight", "bias")}) for i in range(2)]
        of_layers = modular_kernels(model, find_units(model, layers) if layers else whole, images).sum(0)
        torch.testing.assert_close(of_parts, of_layers, rtol=1e-9, atol=1e-12)


def test_a_hybrids_units_are_those_of_its_target_module():
    torch.manual_seed(0)
    hybrid = Hybrid(*made_of(KERNELS["vit"](), [1, 1], KERNELS["vit"](), [1, 1]), 1).double()
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    units = find_units(hybrid, "sublayers")
    assert [unit.name for unit in units] == ["network.blocks.1.attn", "network.blocks.1.mlp"]
    torch.testing.assert_close(modular_kernels(hybrid, units, images), by_jacobian(hybrid, units, images, "sum"))


def test_looking_leaves_the_model_as_it_was():
    model, images = with_kernels("vgg_bn")
    model.train()
    model.features[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modular_kernels(model, find_units(model, "conv_layers"), images)
    assert model.training and not model.features[0].weight.requires_grad and model.features[4].weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_bfloat16_kernels_are_near_those_of_float32():
    model, images = with_kernels("vit")
    model, images = model.float(), images.float()
    units = find_units(model, "sublayers")
    exact = principal_eigenvalues(modular_kernels(model, units, images))
    with torch.autocast("cpu", torch.bfloat16):
        kernels = modular_kernels(model, units, images)
    assert kernels.dtype == torch.float32
    torch.testing.assert_close(principal_eigenvalues(kernels), exact, rtol=0.1, atol=0)


def test_power_iteration_finds_the_exact_value():
    torch.manual_seed(0)
    factors = torch.randn(5, 60, 30, dtype=torch.float64)
    kernels = factors @ factors.transpose(1, 2)
    kernels[3] = 0
    exact = torch.linalg.eigvalsh(kernels)[:, -1].clamp_min(0)
    torch.testing.assert_close(principal_eigenvalues(kernels, exact=10), exact, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(principal_eigenvalues(kernels), exact, rtol=1e-12, atol=1e-12)


def test_spectrum_and_effective_rank():
    values = spectrum(torch.diag_embed(torch.tensor([[1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]])))
    assert values.tolist() == [[1, 1, 1, 1], [4, 0, 0, 0], [3, 1, 0, 0]]
    ranks = effective_rank(values)
    assert ranks[0] == pytest.approx(4) and ranks[1] == pytest.approx(1) and 1 < ranks[2] < 2


def test_normalised_kernels_are_cosines():
    model, images = with_kernels("vit")
    kernels = modular_kernels(model, find_units(model, "blocks"), images)
    cosines = normalised(kernels)
    torch.testing.assert_close(cosines.diagonal(dim1=1, dim2=2), torch.ones(2, 3, dtype=torch.float64))
    expected = kernels[0, 0, 1] / (kernels[0, 0, 0] * kernels[0, 1, 1]).sqrt()
    assert cosines[0, 0, 1].item() == pytest.approx(expected.item())
    assert normalised(torch.zeros(1, 2, 2)).eq(0).all()  # no gradient, no direction


def test_only_one_layers_gradients_are_in_memory_at_a_time(monkeypatch):
    """However many units there are: what was made at one layer is gone when the next one is reached."""
    import weakref

    from incubate_lib.method import mntk

    alive, most = [], []
    original = mntk.places

    def watched(layer, x, delta):
        result = original(layer, x, delta)
        most.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(result[0]))
        return result

    monkeypatch.setattr(mntk, "places", watched)
    model, images = with_kernels("vit")
    for kind in ("blocks", "heads"):
        most.clear(), alive.clear()
        modular_kernels(model, find_units(model, kind), images)
        assert len(most) >= 2 and max(most) == 0


def test_the_memory_of_a_probe_is_what_its_backward_pass_keeps():
    model, _ = with_kernels("vit")
    units = find_units(model.float(), "sublayers")
    one = probe_bytes(model, units, (1, 8, 8))
    deeper = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=24, depth=4, num_heads=3, in_chans=1, num_classes=3
    )
    two = probe_bytes(deeper, find_units(deeper, "sublayers"), (1, 8, 8))
    tokens, width = 5, 24
    assert two == pytest.approx(2 * one, rel=0.1) and one > 2 * tokens * width * 4 * 8  # two blocks, of many activations each
    assert all(not parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "kind", "output"),
    [
        (
            "vit",
            "conv_filters",
            "there is no kind of unit 'conv_filters'; there are: heads, experts, sublayers, blocks, conv_layers, filters",
        ),
        ("vgg", "heads", r"VGG has no heads; it has: conv_layers \(10\), filters \(\d+\)"),
        ("resnet", "sublayers", r"ResNet has no sublayers; it has: blocks \(4\), conv_layers"),
    ],
)
def test_a_kind_that_the_model_does_not_have(name, kind, output):
    with pytest.raises(ValueError, match=output):
        find_units(KERNELS[name](), kind)


def test_a_frozen_model_has_no_units():
    model = KERNELS["vit"]().requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        find_units(model, "blocks")
    assert count_units(model) == {}
    model.blocks[1].requires_grad_(True)
    assert [unit.name for unit in find_units(model, "blocks")] == ["blocks.1"]


def test_layers_that_do_something_to_their_weights_have_kernels_of_their_own_weights():
    model = nn.Sequential(StdConv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).double()
    images = torch.randn(3, 1, 6, 6, dtype=torch.float64)
    unit = Unit("conv", {"0.weight": None})
    expected = by_jacobian(model, [unit], images, "sum")
    torch.testing.assert_close(modular_kernels(model, [unit], images), expected, rtol=1e-8, atol=1e-12)


class Swapped(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.LayerNorm(4), nn.PReLU(3)], ids=["matrix", "norm", "other"])
def test_of_windows_a_samples_gradients_are_added_up(layer):
    """As a Swin has them: the first dimension is that of samples times windows."""
    model = nn.Sequential(nn.Flatten(0, 1), layer, nn.Unflatten(0, (-1, 2)), nn.Flatten(), nn.Linear(24, 3)).double()
    images, unit = torch.randn(3, 2, 3, 4, dtype=torch.float64), Unit("windows", {"1.weight": None})
    expected = by_jacobian(model, [unit], images, "sum")
    torch.testing.assert_close(modular_kernels(model, [unit], images), expected, rtol=1e-8, atol=1e-12)


def test_what_has_no_known_kernel_is_told():
    model, images = with_kernels("vit")
    with pytest.raises(ValueError, match=f"parameter cls_token {sentences.NO_LAYER}"):
        modular_kernels(model, [Unit("stem", {"cls_token": None})], images)
    shared = nn.Sequential(layer := nn.Linear(4, 4), nn.ReLU(), layer)
    with pytest.raises(ValueError, match="layer 0 is used more than once"):
        modular_kernels(shared, [Unit("a", {"0.weight": None})], torch.randn(2, 4))
    places_first = nn.Sequential(Swapped(), nn.Linear(4, 4), Swapped(), nn.Flatten())
    with pytest.raises(ValueError, match=f"layer 1 {sentences.sees(3)}"):
        modular_kernels(places_first, [Unit("a", {"1.weight": None})], torch.randn(2, 3, 4))
    windows_first = nn.Sequential(Swapped(), nn.Flatten(0, 1), nn.Linear(4, 4), nn.Unflatten(0, (3, -1)), Swapped(), nn.Flatten())
    with pytest.raises(ValueError, match="at layer 2 samples depend on each other"):
        modular_kernels(windows_first, [Unit("a", {"2.weight": None})], torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=sentences.two_units("b")):
        modular_kernels(shared, [Unit("a", {"0.weight": None}), Unit("b", {"0.weight": None})], torch.randn(2, 4))
