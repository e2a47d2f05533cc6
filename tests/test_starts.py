"""How a target module starts: as it was initialised, as copies of its meta module, or computing what that computes."""

import copy

import pytest
import timm
import torch
from families import NETWORKS, PLAIN, K, build, divided, pair, some_images

from incubate_lib.method.chain import find_chain
from incubate_lib.method.incubation import Hybrid, start_module
from incubate_lib.method.network import divide, in_names_of, without


@pytest.fixture
def images():
    return some_images()


@pytest.mark.parametrize("index", range(K))
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "vgg"])
def test_identity_start_computes_what_its_meta_module_computes(name, index, images):
    meta, target, partition = pair(name)
    expected = meta(images)
    start_module(target, meta, partition, index, "identity", inherit_stem=True, inherit_head=True)
    torch.testing.assert_close(Hybrid(meta, target, partition, index).eval()(images), expected, rtol=0, atol=1e-6)


def test_an_identity_start_needs_ways_around_the_weights():
    meta, target, partition = pair("vgg")
    with pytest.raises(ValueError, match="nothing leads around the weights of features"):
        for index in range(K):
            start_module(target, meta, partition, index, "identity")


def test_stack_start_copies_and_does_not_share():
    small, large = (timm.create_model("vit_tiny_patch16_224", depth=depth, **PLAIN) for depth in (4, 8))
    own, partition = (divide(find_chain(copy.deepcopy(m), (1, 8, 8)), d) for m, d in ((small, [2, 2]), (large, [4, 4])))
    meta = in_names_of(small, own, large, partition)
    start_module(large, meta, partition, 0, "stack", inherit_stem=True)
    weights = [block.attn.qkv.weight for block in large.blocks[:4]]
    sources = [small.blocks[i].attn.qkv.weight for i in (0, 0, 1, 1)]
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(weights, sources, strict=True))
    assert torch.equal(large.pos_embed, small.pos_embed)


@pytest.mark.parametrize("name", NETWORKS)
def test_stack_start_copies_a_meta_block_of_the_same_shapes(name):
    """Of a module that spans stages the meta model has a block of each."""
    partition, target, sources = divided(name), build(name, 1), {}
    for index in range(K):
        for block in partition.blocks(index):
            shapes = str([(n, p.shape) for n, p in target.get_submodule(block).named_parameters()])
            sources[block] = next((b for b, own in sources.items() if own == (index, shapes)), None) or (index, shapes)
    kept = [block for block, source in sources.items() if isinstance(source, tuple)]
    meta = without(build(name), [block for block in sources if block not in kept])
    for index in range(K):
        start_module(target, meta, partition, index, "stack", inherit_stem=True, inherit_head=True)
    for block, source in sources.items():
        own, given = target.get_submodule(block), meta.get_submodule(block if block in kept else source)
        assert all(torch.equal(tensor, given.state_dict()[n]) for n, tensor in own.state_dict().items()), block


def test_a_stack_start_needs_a_meta_block_of_the_same_shapes():
    meta, target, partition = pair("resnet")
    with pytest.raises(ValueError, match=r"of module 2 the meta model has no block of the shapes of layer3\.1"):
        for index in range(K):
            start_module(target, meta, partition, index, "stack")


def test_random_start_changes_nothing_unless_stem_or_head_are_inherited():
    meta, target, partition = pair("vit")
    before = copy.deepcopy(target.state_dict())
    for index in range(K):
        start_module(target, meta, partition, index, "random")
    assert all(torch.equal(target.state_dict()[name], value) for name, value in before.items())
    for index in range(K):
        start_module(target, meta, partition, index, "random", inherit_stem=True, inherit_head=True)
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(target.state_dict()[name], value)}
    assert changed == {"patch_embed", "pos_embed", "cls_token", "norm", "head"}
