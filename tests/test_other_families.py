"""A ResNet and a Swin go all the way: in pieces, through the notebooks, killed and resumed, looked into, and into stock timm."""

import json
import os

import command_line
import pytest
import timm
import torch
from families import SMALL, pair, settings_file, some_images
from patience import Hooks, wait_for

from incubate_lib.config import load_settings
from incubate_lib.method.chain import find_chain
from incubate_lib.method.incubation import Hybrid
from incubate_lib.method.network import divide_at
from incubate_lib.method.sizes import at_size
from incubate_lib.networks import register_all
from incubate_lib.phases.networks import build_target
from incubate_lib.pipeline.strategies import open_phase, plan
from incubate_lib.report.live.hybrids import Hybrids
from incubate_lib.report.live.representations import similarity
from incubate_lib.report.planner.anatomy import PIECES, anatomy
from incubate_lib.training.trainer import compiled


@pytest.fixture(params=SMALL)
def file(request, tmp_path):
    return settings_file(tmp_path, request.param)


def weights(folder):
    phases = folder.glob("phases/*/summary.json")
    return {path.parent.name: json.loads(path.read_text())["weights_sha256"] for path in phases}


def test_it_runs_through_the_notebooks_is_killed_goes_on_and_is_exported(file, tmp_path, monkeypatch):
    """Killed in an update of a module; the same bits as in this process, in peace; stock timm loads what is exported."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path / "peace"))
    made = plan(load_settings(file))
    made.run()
    hooks, data = Hooks(tmp_path), tmp_path / "data"
    env = os.environ | hooks.env | {"INCUBATE_DATA": str(data)}
    hooks.hold("incubate-1", 2)
    killed = command_line.Begun("run", file, env=env)
    wait_for(lambda: [*data.glob("phases/*/checkpoint*")] and len([*data.glob("phases/*/summary.json")]) == 2, "a checkpoint")
    killed.kill()
    hooks.let_go("incubate-1")
    result = command_line.incubate("run", file, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert weights(data) == weights(tmp_path / "peace") and len(weights(data)) == 5
    assert len([*data.glob("phases/*/notebook.ipynb")]) == 5
    result = command_line.incubate("export", file, str(tmp_path / "out"), env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    exported = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).state_dict()
    own = next(iter(made.finals.values())).folder.load_weights()
    assert exported.keys() >= own.keys() and all(torch.equal(exported[name], value) for name, value in own.items())

    alike = similarity(made, "deep_incubation_identity", images=32)
    assert set(alike["module_index"]) == {0, 1} and alike["cka"].le(1 + 1e-6).all()
    hybrids = Hybrids(made, "deep_incubation_identity")
    counted = [sum(part.flops for part in hybrids.costs(i).parts) for i in range(2)]
    assert counted == [made.experiment.facts.flops_per_image[f"incubate-{i}"] for i in range(2)]
    starts = {n.settings.module_index: n.summary()["start_score"] for n in made.nodes if n.settings.phase == "incubate"}
    meta = next(node for node in made.nodes if node.settings.phase == "meta")
    assert set(starts.values()) == {meta.summary()["score"]}  # identity: the hybrid computes what the meta model computes


def test_the_anatomy_has_every_piece_once_and_adds_up_to_the_whole_network(file, data_folder):
    node = open_phase("assemble", file)
    found, facts = anatomy(node), node.facts
    assert [module.blocks for module in found.modules] == facts.target_depths
    assert [module.meta_blocks for module in found.modules] == facts.meta_depths
    assert sum(module.flops for module in found.modules) == facts.flops_per_image["target"]
    target = build_target(node.settings, facts.outputs)
    assert sum(module.parameters for module in found.modules) == sum(p.numel() for p in target.parameters())
    names = [name for name, _, _ in found.pieces]
    assert len(set(names)) == len(names) and {kind for *_, kind in found.pieces} == set(PIECES)
    drawn = [text.get_text() for axis in found.figure().axes for text in axis.texts]
    assert found.modules[0].last in drawn


def test_plan_shows_the_anatomy(file, data_folder, capsys):
    from incubate_lib.cli import main

    assert main(["plan", file]) == 0
    output = capsys.readouterr().out
    assert all(heading in output for heading in ("pieces", "parameters", "MFLOP", "module 2")), output


@pytest.mark.parametrize(("layers", "parameters"), [(20, 272_474), (32, 466_906), (56, 855_770), (110, 1_730_714)])
def test_the_cifar_resnets_have_the_published_size(layers, parameters):
    """He et al. (arXiv 1512.03385, table 6) say 0.27, 0.46, 0.85 and 1.7 million; 1,730,714 is option B's with 10 classes."""
    register_all()
    with torch.device("meta"):
        model = timm.create_model(f"cifar_resnet{layers}", num_classes=10)
        chain = find_chain(model, (3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert sum(isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3) for layer in model.modules()) + 1 == layers
    assert len(chain.blocks) == (layers - 2) // 2 - 2  # all but the two that halve the side


@pytest.mark.parametrize("cuts", [["layer2.8"], ["layer1.17", "layer2.17"], ["layer1.11", "layer2.7", "layer3.3"]])
def test_resnet_110_is_cut_where_infopro_cuts_it(cuts):
    register_all()
    with torch.device("meta"):
        chain = find_chain(timm.create_model("cifar_resnet110"), (3, 32, 32))
    partition = divide_at(chain, cuts)
    assert [partition.blocks(index)[-1] for index in range(partition.num_modules - 1)] == cuts


def test_a_swin_s_weights_are_those_of_smaller_images_too():
    options = {"patch_size": 1, "in_chans": 1, "embed_dim": 8, "num_heads": (2, 2), "depths": (2, 2), "window_size": 4}
    small, large = (timm.create_model("swin_tiny_patch4_window7_224", img_size=n, **options) for n in (8, 16))
    large.load_state_dict(at_size(small.state_dict(), large), strict=True)
    assert torch.equal(large.layers[0].blocks[1].attn.qkv.weight, small.layers[0].blocks[1].attn.qkv.weight)


@pytest.mark.parametrize("name", ["resnet", "swin"])
def test_compiled_hybrids_have_the_gradients_of_their_own_module(name):
    """aot_eager traces forward and backward as inductor does, and needs no compiler; each module anew, over the same weights."""
    meta, target, partition = pair(name)
    for index in (0, 2):
        hybrid = Hybrid(meta, target, partition, index).eval()  # else batch norm's statistics would move between the two
        found = []
        for mode in ("off", "default"):
            hybrid.zero_grad()
            compiled(hybrid, mode, "aot_eager")(some_images()).square().sum().backward()
            found.append({n: p.grad.clone() for n, p in hybrid.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys() == {n for n, p in hybrid.named_parameters() if p.requires_grad}
        for parameter, value in found[0].items():
            torch.testing.assert_close(found[1][parameter], value, rtol=1e-3, atol=1e-4 * value.abs().max().item() + 1e-6)
    compiled(torch.nn.Identity(), "default")  # forgets what was compiled here
