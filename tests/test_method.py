"""The method's defining properties, on networks small enough to compare bit for bit."""

import copy
import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import sentences
import timm
import torch
from families import NETWORKS, SHAPE, K, build, divided, pair, some_images
from project import block
from torch import nn

from incubate_lib.method.chain import NotAChain, find_chain
from incubate_lib.method.incubation import Hybrid, Imitation, assemble
from incubate_lib.method.network import divide, divide_at, graft, in_names_of, outputs, run_to


@pytest.fixture
def images():
    return some_images()


def loss(model, images):
    return nn.functional.cross_entropy(model(images), torch.arange(len(images)) % 5)


@pytest.mark.parametrize("name", NETWORKS)
def test_all_modules_in_the_meta_model_are_the_target_bit_for_bit(name, images):
    model, target, partition = pair(name)
    for index in range(K):
        model = graft(model, target, partition.claims(index))
    loss(model, images).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    target.zero_grad()
    loss(target, images).backward()
    assert torch.equal(model(images), target(images))
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, target.parameters(), strict=True) if g is not None)
    stock = build(name, seed=9)
    assert not torch.equal(stock(images), target(images))
    stock.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(stock(images), target(images)) and type(model) is type(stock)


@pytest.mark.parametrize("name", NETWORKS)
def test_modules_own_each_tensor_once_and_assembled_they_are_the_target(name, images):
    _, target, partition = pair(name)
    tensors = target.state_dict()
    parts = [partition.part(index, tensors) for index in range(K)]
    assert sorted(itertools.chain(*parts)) == sorted(tensors) and all(parts)
    assert torch.equal(assemble(build(name, seed=5), partition, parts)(images), target(images))


def test_modules_of_a_vit_are_the_papers():
    owned = [{n.split(".")[0] for n in divided("vit").part(i, build("vit").state_dict())} for i in range(K)]
    assert owned == [{"cls_token", "pos_embed", "patch_embed", "blocks"}, {"blocks"}, {"blocks", "norm", "head"}]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_meta_model_of_the_same_weights_with_one_of_its_own_modules_is_itself(name, images):
    meta, _, partition = pair(name)
    for index in range(K):
        assert torch.equal(Hybrid(meta, meta, partition, index).eval()(images), meta(images))


@pytest.mark.parametrize("index", range(K))
@pytest.mark.parametrize("name", NETWORKS)
def test_one_step_moves_all_of_the_module_and_nothing_else(name, index, images):
    meta, target, partition = pair(name)
    hybrid = Hybrid(meta, target, partition, index)
    before = {name: tensor.clone() for name, tensor in hybrid.network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in hybrid.parameters() if p.requires_grad], lr=1.0)
    loss(hybrid, images).backward()
    with_gradient = {name for name, p in hybrid.network.named_parameters() if p.grad is not None}
    optimizer.step()
    moved = {name for name, tensor in hybrid.network.state_dict().items() if not torch.equal(tensor, before[name])}
    own = set(hybrid.module_state())
    assert moved <= own, "also no statistics of frozen layers"
    assert with_gradient == own & {name for name, _ in hybrid.network.named_parameters()}


@pytest.mark.parametrize("index", range(K))
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_through_frozen_modules_equals_the_joint_one(name, index, images):
    meta, target, partition = pair(name)
    joint = graft(*copy.deepcopy((meta, target)), partition.claims(index))
    loss(joint, images).backward()
    hybrid = Hybrid(meta, target, partition, index).eval()
    loss(hybrid, images).backward()
    whole = dict(joint.named_parameters())
    for name, parameter in hybrid.network.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, whole[name].grad, rtol=2e-5, atol=2e-6)


def test_frozen_modules_stay_in_eval_mode_and_the_prefix_records_nothing(images):
    meta, target, partition = pair("vit", drop_path_rate=0.5)
    hybrid = Hybrid(meta, target, partition, 1)
    blocks = hybrid.network.blocks
    for mode in (False, True):
        hybrid.train(mode)
        assert hybrid.training is mode
        learning = {name for name, layer in hybrid.network.named_modules() if layer.training}
        assert bool(learning) is mode and all(name.startswith(("blocks.2", "blocks.3")) for name in learning)
        assert not mode or blocks.get_submodule("2").attn.training
    recording = {}
    for name, child in blocks.named_children():
        keep = lambda *call, name=name: recording.update({name: call[-1].requires_grad})  # noqa: E731
        child.register_forward_hook(keep)
    hybrid(images)
    assert recording == {"0": False, "2": True, "3": True, "4": True}


def test_drop_out_that_the_network_calls_itself_belongs_to_its_head():
    meta, target, partition = pair("resnet")
    assert [Hybrid(meta, target, partition, index).network.training for index in range(K)] == [False, False, True]


@pytest.mark.parametrize("order", list(itertools.permutations(range(K))))
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_order_of_incubation_changes_nothing(name, order, images):
    """Each module's training depends on the meta model and itself only."""

    def incubate(order):
        meta, target, partition = pair(name)
        for index in order:
            hybrid = Hybrid(meta, target, partition, index)
            optimizer = torch.optim.AdamW([p for p in hybrid.parameters() if p.requires_grad], lr=0.01)
            for _ in range(2):
                optimizer.zero_grad()
                loss(hybrid, images).backward()
                optimizer.step()
        return target.state_dict()

    ours, reference = incubate(order), incubate(range(K))
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


@pytest.mark.parametrize("name", ["vit", "swin", "resnet"])
def test_a_network_can_be_run_to_the_end_of_each_module(name, images):
    meta, target, partition = pair(name)
    for model in (meta, target):
        kept = outputs(model, partition, images)
        assert torch.equal(kept[-1], model(images))
        for index, output in enumerate(kept):
            assert torch.equal(run_to(model, partition, index, images), output)


@pytest.mark.parametrize("index", range(K))
@pytest.mark.parametrize("name", ["vit", "swin", "resnet"])
def test_an_imitations_loss_is_the_distance_of_the_two_modules_outputs(name, index, images):
    meta, target, partition = pair(name)
    imitation = Imitation(meta, target, partition, index)
    torch.manual_seed(0)  # of drop-path
    losses = imitation(images)
    mixed = Hybrid(meta, target, partition, index)
    torch.manual_seed(0)
    given, wanted = run_to(mixed.network, partition, index, images), run_to(meta, partition, index, images)
    assert torch.equal(losses, (given - wanted).square().flatten(1).mean(1) / wanted.var())
    assert torch.equal(imitation.eval()(images), mixed.eval()(images))
    losses.mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in imitation.parameters() if p.requires_grad)


def test_a_shallow_network_takes_the_names_of_a_deep_one(images):
    small, large = build("vit", depth=3), build("vit")
    meta = in_names_of(small, divided("vit", depth=3), large, divided("vit"))
    assert torch.equal(meta(images), small(images))
    assert {name.split(".")[1] for name in meta.state_dict() if name.startswith("blocks.")} == {"0", "2", "4"}
    assert meta.state_dict()["blocks.2.attn.qkv.weight"].data_ptr() == small.blocks[1].attn.qkv.weight.data_ptr()


@pytest.mark.parametrize("depths", [[], [6, 0], [3, 2], [2, 2, 3], [-1, 7]])
def test_depths_that_do_not_add_up_are_refused(depths):
    with pytest.raises(ValueError, match="depths"):
        divide(divided("vit").chain, depths)


def test_cuts_are_named():
    chain = divided("resnet").chain
    partition = divide_at(chain, ["layer1.1", "layer3"])
    assert [partition.owner(f"{name}.conv1.weight") for name in ("layer1.0", "layer2.0", "layer3.1", "layer4.0")] == [0, 1, 1, 2]
    with pytest.raises(ValueError, match=sentences.no_cut("layer1.7") + r"; .*layer1\.1"):
        divide_at(chain, ["layer1.7"])
    with pytest.raises(ValueError, match="order"):
        divide_at(chain, ["layer3", "layer1"])


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(2)))

    def forward(self, x):
        return self.layer(self.blocks(self.layer(x)))[:, 0, 0]


def test_networks_that_are_no_chains_are_refused():
    with pytest.raises(NotAChain, match=r"Shared uses layer\.(weight|bias) in several places"):
        find_chain(Shared(), SHAPE)
    with pytest.raises(NotAChain, match="no blocks that it could do without"):
        divide(find_chain(timm.create_model("densenet121", growth_rate=4, block_config=(1, 1, 1)), SHAPE), [1])
    with pytest.raises(NotAChain, match="list, not one tensor"):
        find_chain(timm.create_model("resnet18", features_only=True), SHAPE)


def test_hybrid_refuses_what_does_not_belong():
    meta, target, partition = pair("vit")
    with pytest.raises(ValueError, match="index 3"):
        Hybrid(meta, target, partition, 3)
    with pytest.raises(ValueError, match=r"does not fit the target: cls_token is \(1, 1, 16\), but \(1, 1, 32\) in the target"):
        Hybrid(meta, build("vit", embed_dim=32), partition, 0)
    small, large = divided("vit"), divided("vit", depth=3)
    with pytest.raises(ValueError, match="1 blocks, fewer than the meta model's 2"):
        in_names_of(build("vit"), small, build("vit", depth=3), large)


def test_assemble_names_what_is_wrong():
    _, target, partition = pair("vit")
    parts = [partition.part(index, target.state_dict()) for index in range(K)]
    wide = partition.part(1, build("vit", embed_dim=32).state_dict())
    for modules, message in [
        (parts[:2], "has 3 modules, but 2 were given"),
        ([parts[0], parts[0], parts[2]], r"module 2 of 3, 24 tensors are missing, first blocks\.2"),
        ([parts[0] | parts[1], parts[1], parts[2]], r"module 1 of 3, 24 tensors are not its own, first blocks\.2"),
        ([parts[0], wide, parts[2]], "module 2 of 3, .* of another shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            assemble(build("vit"), partition, modules)


def test_more_than_ten_modules_keep_their_order(images):
    target = build("vit", depth=12)
    partition = divide(divided("vit", depth=12).chain, [1] * 12)
    assert [partition.blocks(index) for index in range(12)] == [[f"blocks.{index}"] for index in range(12)]
    parts = [partition.part(index, target.state_dict()) for index in range(12)]
    assert torch.equal(assemble(build("vit", seed=3, depth=12), partition, parts)(images), target(images))


@pytest.mark.parametrize("name", ["vit", "resnet", "swin"])
def test_the_readmes_block_runs_in_a_loop_of_ones_own(name, images):
    text = block("python", "train(meta)  # your loop")
    trained = []

    def train(model):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loss(model.train(), images).backward()
        optimizer.step()
        trained.append([name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])])

    chain = divided(name).chain
    depths = [1] * 3 + [len(chain.blocks) - 3]
    small = {"train": train, "timm": SimpleNamespace(create_model=lambda _: build(name))}
    changes = {"import copy, timm": "import copy", "(3, 224, 224)": "(3, 32, 32)", "[3, 3, 3, 3]": str(depths)}
    for old, new in changes.items():
        text = text.replace(old, new)
    exec(text, small)
    assert len(trained) == 6 and all(trained)
    assert len(set(itertools.chain(*trained[1:5]))) == sum(map(len, trained[1:5])), "each tensor by one module"


def test_method_stands_alone():
    """It can be lifted out: torch and timm only, neither settings nor loop nor files."""
    code = "import incubate_lib.method.incubation, sys; print([m for m in sys.modules if m.startswith('incubate_lib')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "config" not in loaded and "training" not in loaded and "incubate_lib.method.network" in loaded
