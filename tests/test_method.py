"""The method's defining properties, on networks small enough to compare bit for bit."""

import copy
import itertools
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from incubate_lib.method.incubation import assemble, make_hybrid, start_module
from incubate_lib.method.partition import join, split

SMALL = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "in_chans": 1, "num_classes": 5}
K = 3
VARIANTS = [  # models that differ in where stem and head keep their weights
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True}),
    ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}),
    ("vit_base_patch16_clip_224", {}),
    ("deit_tiny_patch16_224", {"init_values": 0.1, "qkv_bias": False}),
]


def vit(depth=6, name="vit_tiny_patch16_224", seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, depth=depth, **SMALL | options).eval()


def meta_and_target(seed=0, **options):
    return split(vit(K, seed=seed), [1] * K), split(vit(6, seed=seed + 1, **options), [2] * K)


@pytest.fixture
def images():
    return torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("depths", [[6], [2, 2, 2], [1, 4, 1], [1] * 6])
def test_split_and_join_are_timm_bit_for_bit(name, options, depths, images):
    model = vit(6, name, **options)
    modules = split(model, depths)
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(nn.Sequential(*modules)(images), logits)
        assert torch.equal(join(modules)(images), logits)
        assert torch.equal(assemble(copy.deepcopy(modules))(images), logits)
    stock = vit(6, name, seed=9, **options)
    assert not torch.equal(stock(images), logits)
    stock.load_state_dict(assemble(modules).state_dict(), strict=True)
    assert torch.equal(stock(images), logits)
    assert type(join(modules)) is type(stock)


def test_modules_own_each_parameter_once_and_share_it():
    model = vit()
    modules = split(model, [1, 3, 2])
    owned = [id(p) for module in modules for p in module.parameters()]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    assert {n.split(".")[0] for n, _ in modules[0].named_parameters()} == {"cls_token", "pos_embed", "patch_embed", "blocks"}
    assert {n.split(".")[0] for n, _ in modules[1].named_parameters()} == {"blocks"}
    assert {n.split(".")[0] for n, _ in modules[2].named_parameters()} == {"blocks", "norm", "head"}
    assert any(n.startswith("blocks.0.") for n, _ in modules[2].named_parameters())  # counted within the module


@pytest.mark.parametrize("depths", [[], [6, 0], [3, 2], [2, 2, 3], [-1, 7]])
def test_depths_that_do_not_add_up_are_refused(depths):
    with pytest.raises(ValueError, match="depths"):
        split(vit(), depths)


def test_only_plain_vits_are_split():
    with pytest.raises(TypeError, match="VisionTransformerDistilled"):
        split(timm.create_model("deit_tiny_distilled_patch16_224", depth=2, **SMALL), [1, 1])


@pytest.mark.parametrize("index", range(K))
def test_hybrid_of_meta_modules_is_the_meta_model(index, images):
    meta, _ = meta_and_target()
    with torch.no_grad():
        expected = join(meta)(images)
        hybrid = make_hybrid(meta, copy.deepcopy(meta[index]), index).eval()
        assert torch.equal(hybrid(images), expected)


@pytest.mark.parametrize("index", range(K))
def test_one_step_moves_all_of_the_target_and_nothing_else(index, images):
    meta, target = meta_and_target()
    hybrid = make_hybrid(meta, target[index], index)
    before = {name: p.clone() for name, p in hybrid.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in hybrid.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(hybrid(images), torch.arange(7) % 5).backward()
    with_gradient = {name for name, p in hybrid.named_parameters() if p.grad is not None}
    optimizer.step()
    moved = {name for name, p in hybrid.named_parameters() if not torch.equal(p, before[name])}
    assert moved == with_gradient == {name for name in before if name.startswith("target.")}


@pytest.mark.parametrize("index", range(K))
def test_gradient_through_frozen_modules_equals_the_joint_one(index, images):
    meta, target = meta_and_target()
    mixed = copy.deepcopy([*meta[:index], target[index], *meta[index + 1 :]])
    nn.functional.cross_entropy(nn.Sequential(*mixed)(images), torch.arange(7) % 5).backward()
    hybrid = make_hybrid(meta, target[index], index)
    nn.functional.cross_entropy(hybrid(images), torch.arange(7) % 5).backward()
    for ours, joint in zip(target[index].parameters(), mixed[index].parameters(), strict=True):
        assert torch.equal(ours.grad, joint.grad)


def test_frozen_modules_stay_in_eval_mode_and_the_prefix_records_nothing(images):
    meta, target = meta_and_target(drop_path_rate=0.5)
    hybrid = make_hybrid(meta, target[1], 1)
    for mode in (False, True):
        hybrid.train(mode)
        assert hybrid.training is mode and hybrid.target.blocks[0].training is mode
        assert not any(m.training for part in (hybrid.prefix, hybrid.suffix) for m in part.modules())
    recording = []
    for part in (hybrid.prefix, hybrid.target, hybrid.suffix):
        part.register_forward_pre_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    hybrid(images)
    assert recording == [False, True, True]


@pytest.mark.parametrize("order", list(itertools.permutations(range(K))))
def test_order_of_incubation_changes_nothing(order, images):
    """Each module's training depends on the meta model and itself only."""

    def incubate(order):
        meta, target = meta_and_target()
        for index in order:
            hybrid = make_hybrid(meta, target[index], index)
            optimizer = torch.optim.AdamW(hybrid.target.parameters(), lr=0.01)
            for _ in range(2):
                optimizer.zero_grad()
                nn.functional.cross_entropy(hybrid(images), torch.arange(7) % 5).backward()
                optimizer.step()
        return assemble(target).state_dict()

    ours, reference = incubate(order), incubate(range(K))
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


def test_hybrid_refuses_what_does_not_belong():
    meta, target = meta_and_target()
    with pytest.raises(ValueError, match="module 2 of 3 cannot stand in for module 1 of 3"):
        make_hybrid(meta, target[1], 0)
    with pytest.raises(ValueError, match="index 3"):
        make_hybrid(meta, target[2], 3)
    wide = split(vit(6, embed_dim=32), [2] * K)
    with pytest.raises(ValueError, match="width 32"):
        make_hybrid(meta, wide[0], 0)


def test_assemble_names_what_is_wrong():
    _, m = meta_and_target()
    wide, uneven = split(vit(6, embed_dim=32), [2] * K), split(vit(6), [1, 2, 3])
    for modules, message in [
        ([], "no modules"),
        ([m[0], m[2]], "missing: module 2"),
        ([m[0], m[1], m[1]], "missing: module 3; doubled: module 2"),
        ([m[0], m[1], m[1], m[2]], "doubled: module 2"),
        ([m[1], m[0], m[2]], "out of order: module 2, 1"),
        ([m[0], wide[1], m[2]], "module 2 of 3 .*width 32.* does not fit module 1"),
        ([m[0], m[1], uneven[2]], r"module 3 of 3 .*\(1, 2, 3\).* does not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            assemble(modules)


def test_more_than_ten_modules_keep_their_order(images):
    model = vit(12)
    with torch.no_grad():
        assert torch.equal(assemble(split(model, [1] * 12))(images), model(images))


@pytest.mark.parametrize("index", range(K))
def test_identity_start_computes_what_its_meta_module_computes(index, images):
    meta, target = meta_and_target()
    start_module(target[index], meta[index], "identity", inherit_stem=True, inherit_head=True)
    with torch.no_grad():
        expected = join(meta)(images)
        assert torch.equal(make_hybrid(meta, target[index], index).eval()(images), expected)


def test_all_identity_starts_assembled_are_the_meta_model(images):
    meta, target = meta_and_target()
    for t, m in zip(target, meta, strict=True):
        start_module(t, m, "identity", inherit_stem=True, inherit_head=True)
    with torch.no_grad():
        assert torch.equal(assemble(target).eval()(images), join(meta)(images))


def test_stack_start_copies_and_does_not_share():
    meta, target = split(vit(4, seed=0), [2, 2]), split(vit(8, seed=1), [4, 4])
    start_module(target[0], meta[0], "stack", inherit_stem=True, inherit_head=False)
    weights = [block.attn.qkv.weight for block in target[0].blocks]
    sources = [meta[0].blocks[i].attn.qkv.weight for i in (0, 0, 1, 1)]
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(weights, sources, strict=True))
    assert torch.equal(target[0].pos_embed, meta[0].pos_embed)


def test_random_start_changes_nothing_unless_stem_or_head_are_inherited():
    meta, target = meta_and_target()
    before = copy.deepcopy([t.state_dict() for t in target])
    for t, m in zip(target, meta, strict=True):
        start_module(t, m, "random", inherit_stem=False, inherit_head=False)
    assert all(torch.equal(t.state_dict()[n], v) for t, b in zip(target, before, strict=True) for n, v in b.items())
    start_module(target[0], meta[0], "random", inherit_stem=True, inherit_head=True)
    start_module(target[2], meta[2], "random", inherit_stem=True, inherit_head=True)
    changed = {
        n.split(".")[0]
        for t, b in zip(target, before, strict=True)
        for n, v in b.items()
        if not torch.equal(t.state_dict()[n], v)
    }
    assert changed == {"patch_embed", "pos_embed", "cls_token", "head"}  # the norm starts alike in both


def test_a_start_that_does_not_fit_is_refused():
    meta, target = split(vit(6), [3, 3]), split(vit(4), [2, 2])
    with pytest.raises(ValueError, match="fewer than the 3"):
        start_module(target[0], meta[0], "stack", inherit_stem=True, inherit_head=True)


def test_method_stands_alone():
    """It can be lifted out: torch and timm only, neither settings nor loop nor files."""
    code = "import incubate_lib.method.incubation, sys; print([m for m in sys.modules if m.startswith('incubate_lib')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "config" not in loaded and "training" not in loaded and "incubate_lib.method.partition" in loaded
