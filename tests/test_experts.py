"""A mixture of experts: fixed places, who is dropped, the loss of balance; and that it goes the way other networks go."""

import pytest
import timm
import torch
from test_language import RUN, SHARES, words, write
from torch.nn.functional import one_hot

from incubate_lib.config import load_settings
from incubate_lib.method.mntk import kernel_by_definition, modular_kernels
from incubate_lib.method.units import find_units
from incubate_lib.networks import register_all
from incubate_lib.networks.experts import BALANCE, SwitchMlp, routing
from incubate_lib.pipeline.strategies import plan
from incubate_lib.training.costs import train_flops_per_image

register_all()
__all__ = ["words", "write"]  # fixtures
SMALL = {"num_classes": 40, "context": 12, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_experts": 3}
MODEL = RUN["model"] | {"options": {"num_experts": 2}}


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return SwitchMlp(8, 16, num_experts=3, capacity=1.0).double()


@pytest.fixture
def x():
    return torch.randn(4, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_each_token_is_its_experts_times_the_routers_share_or_dropped_when_that_is_full(layer, x):
    out = layer.eval()(x)
    for tokens, found in zip(x, out, strict=True):
        taken = [0, 0, 0]
        for token, value in zip(tokens, found, strict=True):
            shares = layer.router(token).float().softmax(-1)
            best = int(shares.argmax())
            taken[best] += 1
            expected = shares[best].double() * layer.experts[best](token) if taken[best] <= 4 else torch.zeros(8).double()
            torch.testing.assert_close(value, expected)


def test_dropped_tokens_are_counted(layer, x):
    sent = one_hot(layer.router(x).argmax(-1), 3).sum(1)  # [B, E]
    row = routing(layer, x)[0]
    assert row["dropped"] == pytest.approx((sent - 4).clamp(min=0).sum().item() / 48) and row["dropped"] > 0
    assert row["busiest"] == pytest.approx(sent.sum(0).max().item() / 48)


def test_what_a_context_becomes_does_not_depend_on_its_batch(layer, x):
    torch.testing.assert_close(layer.eval()(x)[2:3], layer(x[2:3]), rtol=0, atol=1e-14)


def test_the_loss_of_balance_is_one_where_all_are_equally_busy_and_its_gradient_reaches_the_router(layer, x):
    expert = torch.arange(12).remainder(3).expand(4, 12)
    assert layer.imbalance(torch.full((4, 12, 3), 1 / 3), expert).item() == pytest.approx(1.0)
    assert layer.imbalance(one_hot(torch.zeros(4, 12).long(), 3).float(), torch.zeros(4, 12).long()).item() == pytest.approx(3.0)
    layer.train().loss_share = 100.0  # so that it is far above what float32 rounds
    found = torch.autograd.grad(layer(x).sum(), layer.router.weight)[0]
    without = torch.autograd.grad(layer.eval()(x).sum(), layer.router.weight)[0]
    routes = layer.routes(x)
    balance = torch.autograd.grad(layer.imbalance(routes.shares, routes.expert), layer.router.weight)[0]
    torch.testing.assert_close(found - without, 100 * BALANCE * balance, rtol=1e-4, atol=1e-6)
    assert balance.abs().max() > 1e-3


def test_a_batch_in_pieces_has_the_gradients_of_the_whole_one(layer, x):
    layer.train()
    whole = torch.autograd.grad(layer(x).square().mean(), list(layer.parameters()))
    layer.loss_share, parts = 0.5, [torch.zeros_like(p) for p in layer.parameters()]
    for half in x.split(2):
        for part, gradient in zip(
            parts, torch.autograd.grad(layer(half).square().mean() / 2, list(layer.parameters())), strict=True
        ):
            part += gradient
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_routers_and_experts_are_units_whose_kernels_are_those_by_definition():
    torch.manual_seed(0)
    model, x = timm.create_model("text_causal", **SMALL).double(), torch.randint(40, (3, 12))
    units = find_units(model, "experts")
    assert [unit.name for unit in units][:4] == ["blocks.0.mlp.router", *(f"blocks.0.mlp.experts.{i}" for i in range(3))]
    assert len(units) == 8
    for unit, kernel in zip(units, modular_kernels(model, units, x), strict=True):
        torch.testing.assert_close(kernel, kernel_by_definition(model, [*unit.rows], x), rtol=1e-8, atol=1e-12)


def test_experts_cost_what_their_places_cost():
    """Of more experts with as many places in all only the router's and the head's products are counted on top."""
    flops = []
    for number in (2, 4):
        with torch.device("meta"):
            model = timm.create_model("text_causal", **SMALL | {"num_experts": number, "capacity": 1.0})
        flops.append(train_flops_per_image(model, (12,)))
    routers = 2 * 3 * 2 * 12 * 8 * 2  # blocks × passes × (multiply and add) × tokens × width × two experts more
    assert flops[1] - flops[0] == routers


@pytest.mark.parametrize("task", ["language", "masked_language"])
def test_pieces_and_adaptive_training_learn_it(write, task):
    name = {"language": "text_causal", "masked_language": "text_masked"}[task]
    data = RUN["data"] | ({"mask_share": 0.15} if task == "masked_language" else {})
    strategies = {"deep_incubation_stack": SHARES, "growing": {"match": "end_to_end", "shares": {"meta": 0.5}}}
    mat = {"units": "experts", "probe": 4, "warmup_epochs": 0.5, "every_epochs": 0.5, "alpha": 0.5}
    file = write(task=task, data=data, model=MODEL | {"name": name}, strategies=strategies, mat=mat)
    ways = ["end_to_end", "deep_incubation_stack", "growing", "mat"]
    (made := plan(load_settings(file), ways)).run()
    assert all(node.summary()["score"] > 0 for node in made.finals.values())
    assert made.finals["mat", 0].summary()["train_flops"] < made.finals["end_to_end", 0].summary()["train_flops"]
