"""BERT and GPT-2 of Hugging Face: cut, put together, trained in pieces, and loaded by `from_pretrained` with equal logits."""

import copy

import pytest
import timm
import torch
from test_language import RUN, SHARES, words, write

from incubate_lib.config import ModelSettings, SettingsError, load_settings
from incubate_lib.method.chain import find_chain
from incubate_lib.method.incubation import Hybrid
from incubate_lib.method.mntk import kernel_by_definition, modular_kernels
from incubate_lib.method.network import divide, graft, without
from incubate_lib.method.units import APART, count_units, find_units
from incubate_lib.networks import register_all
from incubate_lib.phases.networks import chain_of, takes_depth
from incubate_lib.phases.recipes import load_trained
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.export import export
from incubate_lib.training.costs import FlopCounts, train_flops_per_image

transformers = pytest.importorskip("transformers")
__all__ = ["words", "write"]  # fixtures
register_all()
SMALL = {"num_classes": 40, "context": 12, "embed_dim": 8, "depth": 3, "num_heads": 2}
BLOCKS = {"hf_bert": "bert.encoder.layer", "hf_gpt2": "transformer.h"}


@pytest.mark.parametrize("name", BLOCKS)
def test_logits_of_a_network_that_was_cut_and_put_together_are_equal(name, tmp_path):
    torch.manual_seed(0)
    target, model = (timm.create_model(name, **SMALL).eval() for _ in range(2))
    partition = divide(find_chain(copy.deepcopy(target), (12,)), [1, 2])
    assert partition.chain.blocks == [f"{BLOCKS[name]}.{i}" for i in range(3)]
    meta = without(model, [f"{BLOCKS[name]}.2"]).eval()
    x = torch.randint(40, (2, 12))
    hybrid = Hybrid(meta, target, partition, 1).eval()
    assert hybrid(x).shape == (2, 12, 40) and not torch.equal(hybrid(x), target(x))
    whole = graft(graft(meta, target, partition.claims(0)), target, partition.claims(1)).eval()
    assert torch.equal(whole(x), target(x))
    changed = (target(x) != target(torch.cat([x[:, :-1], (x[:, -1:] + 1) % 40], 1))).any(-1).any(0)
    assert changed[-1] and changed[:-1].any().item() is not target.is_causal
    target.save_pretrained(tmp_path / "out")
    kind = {"hf_bert": transformers.AutoModelForMaskedLM, "hf_gpt2": transformers.AutoModelForCausalLM}[name]
    again = kind.from_pretrained(tmp_path / "out").eval()
    assert type(again).__module__.startswith("transformers.") and torch.equal(again(input_ids=x).logits, target(x))


@pytest.mark.parametrize("name", BLOCKS)
def test_every_weight_learns_as_several_devices_need_it(name):
    model = timm.create_model(name, **SMALL)
    model(torch.randint(40, (2, 12))).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())


@pytest.mark.parametrize("name", BLOCKS)
def test_its_constructor_takes_a_depth_and_it_is_counted(name):
    settings = ModelSettings(name=name, context=12, embed_dim=8, depth=3, num_heads=2)
    assert takes_depth(settings) and len(chain_of(settings, 2).blocks) == 2
    products = 3 * (12 * 8**2 * 12 + 2 * 12 * 12 * 8) + 12 * 8 * 40 + (12 * 8 * 8 if name == "hf_bert" else 0)
    counted = train_flops_per_image(timm.create_model(name, **SMALL), (12,))
    assert counted == 6 * products


def test_blocks_that_are_cut_within_are_counted_as_often_as_they_are_there():
    with torch.device("meta"):
        model = timm.create_model("hf_bert", **SMALL | {"depth": 6})
    whole = train_flops_per_image(model, (12,))
    assert FlopCounts((12,)).per_image(model.requires_grad_(True), divide(find_chain(model, (12,)), [5, 1])) == whole


def test_heads_of_bert_are_units_whose_kernels_are_those_by_definition():
    torch.manual_seed(0)
    model, x = timm.create_model("hf_bert", **SMALL).double(), torch.randint(40, (3, 12))
    heads = find_units(model, "heads")
    assert len(heads) == 6 and not count_units(timm.create_model("hf_gpt2", **SMALL)).get("heads")
    whole = [f"bert.encoder.layer.1.attention.self.{part}.{kind}" for part in APART for kind in ("weight", "bias")]
    of_block = modular_kernels(model, heads, x)[2:4].sum(0)
    torch.testing.assert_close(of_block, kernel_by_definition(model, whole, x), rtol=1e-8, atol=1e-12)


def test_bert_is_trained_in_pieces_rests_and_is_exported(write, tmp_path):
    model = {"name": "hf_bert", "context": 12, "embed_dim": 8, "depth": 4, "num_heads": 2}
    strategies = {"deep_incubation_stack": SHARES, "mat": {"mat": {"units": "heads", "probe": 4, "warmup_epochs": 0.5}}}
    data = RUN["data"] | {"mask_share": 0.15}
    file = write(task="masked_language", data=data, model=model, strategies=strategies, run=["deep_incubation_stack", "mat"])
    made = plan(load_settings(file))
    made.write()
    made.run()
    pieces, adaptive = made.finals.values()
    assert adaptive.summary()["train_flops"] > 0
    export(load_settings(file), tmp_path / "out", strategy="deep_incubation_stack")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    own = load_trained(pieces.settings, pieces.folder, pieces.facts.outputs)
    x = pieces.data()[1].some(torch.arange(2))[0]
    assert torch.equal(again(input_ids=x).logits, own(x))


def test_weights_that_are_shared_are_refused_before_anything_trains(write):
    """No file of weights can have them, so training would end in nothing."""
    model = {
        "name": "hf_gpt2",
        "context": 12,
        "embed_dim": 8,
        "depth": 2,
        "num_heads": 2,
        "options": {"tie_word_embeddings": True},
    }
    file = write(model=model, partition=None, strategies={}, run=["end_to_end"])
    with pytest.raises(
        SettingsError, match=r"'hf_gpt2' .* shares one tensor under two names, transformer.wte.weight and lm_head"
    ):
        plan(load_settings(file))


def test_what_is_no_field_of_its_config_is_refused():
    with pytest.raises(TypeError, match="'fish'"):
        timm.create_model("hf_bert", fish=1)
    with pytest.raises(TypeError, match="'vocab_size'"):
        timm.create_model("hf_gpt2", vocab_size=1)
