"""Strategies that isolate what Deep Incubation is made of: what each starts from, what it trains, what it costs."""

import copy
import json

import pytest
import sentences
import torch
from networks import made_of, vit
from torch import nn

from incubate_lib.config import SettingsError, load_settings
from incubate_lib.data.sets import load_data
from incubate_lib.method.incubation import Hybrid, Imitation, start_module
from incubate_lib.method.sizes import at_size
from incubate_lib.phases.recipes import load_trained
from incubate_lib.pipeline.strategies import plan
from incubate_lib.report.tables.records import from_plan
from incubate_lib.report.words import ISOLATES, label

pytestmark = pytest.mark.xdist_group("strategies")  # one process, so that the run of the fixture is made once
CONTROLS = ["stacking", "growing", "random_modules", "imitation", "end_to_end_low_resolution"]


def nets():
    meta, target = vit(3), vit(6)
    for parameter in meta.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made_of(meta, [1, 1, 1], target, [2, 2, 2])


@pytest.fixture
def images():
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("index", range(3))
def test_who_computes_what_the_meta_module_computes_has_no_loss_left(index, images):
    meta, target, partition = nets()
    start_module(target, meta, partition, index, "identity", inherit_stem=True, inherit_head=True)
    model = Imitation(meta, target, partition, index)
    assert model(images).shape == (5,)
    torch.testing.assert_close(model(images), torch.zeros(5))
    with torch.no_grad():
        target.blocks[2 * index + 1].mlp.fc2.bias[0] += 1.0  # of one channel: the norm would take away what all have
    assert (model(images) > 0).all()


@pytest.mark.parametrize("index", range(3))
def test_imitation_moves_the_target_alone_and_is_judged_as_a_hybrid(index, images):
    meta, target, partition = nets()
    hybrid = Hybrid(*copy.deepcopy((meta, target)), partition, index).eval()
    model = Imitation(meta, target, partition, index)
    assert torch.equal(model.eval()(images), hybrid(images))
    model.train()
    own = {f"network.{name}" for name in model.module_state()}
    assert not any(layer.training for layer in model.meta.modules())
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    first = model(images).mean()
    first.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= own
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(images).mean()
        loss.backward()
        optimizer.step()
    assert loss < first / 2


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The preset smoke, every strategy without MAT, trained to its end."""
    patch = pytest.MonkeyPatch()
    patch.setenv("INCUBATE_DATA", str(tmp_path_factory.mktemp("data")))
    todo = plan(load_settings("smoke"), ["end_to_end", "deep_incubation", *CONTROLS, "end_to_end_longer"])
    todo.run()
    yield todo
    patch.undo()


def total(todo, name: str) -> int:
    rows = from_plan(todo).strategies.set_index("strategy")
    return rows.loc[name, "flops"]


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_cost_what_deep_incubation_costs_to_a_step(name, done):
    step = done.experiment.facts.flops_per_image["target"] * load_settings("smoke").training.batch_size
    assert abs(total(done, name) - total(done, "deep_incubation")) <= step
    assert label(name) != name.replace("_", " ") and name in ISOLATES


def test_what_is_grown_starts_out_as_the_meta_model_and_what_is_stacked_has_its_blocks(done):
    nodes = {node.key: node for node in done.nodes}
    meta = load_trained(nodes["seed-0/meta"].settings, nodes["seed-0/meta"].folder, 4)
    x, _ = next(nodes["seed-0/meta"].data()[1].eval_batches())
    grown, stacked = (
        load_trained(nodes[f"seed-0/{n}/assemble"].settings, nodes[f"seed-0/{n}/assemble"].folder, 4)
        for n in ("growing", "stacking")
    )
    with torch.no_grad():
        torch.testing.assert_close(grown(x), meta(x))
    assert nodes["seed-0/growing/assemble"].summary()["score"] == nodes["seed-0/meta"].summary()["score"]
    for i, block in enumerate(stacked.blocks):
        for name, value in block.state_dict().items():
            assert torch.equal(value, meta.blocks[i // 2].state_dict()[name]), (i, name)


def test_random_modules_are_the_start_of_end_to_end_training_and_need_no_meta_model(done):
    settings = done.experiment.settings
    alone = plan(settings, ["random_modules"])
    assert {node.settings.phase for node in alone.nodes} == {"assemble", "finetune"}
    untrained = plan(load_settings("smoke", ["phases.end_to_end.epochs=0", "phases.end_to_end.warmup_epochs=0"]), ["end_to_end"])
    untrained.run()
    first, second = (node.folder.load_weights() for node in (alone.nodes[0], untrained.nodes[0]))
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_k_workers_spend_k_times_the_critical_path(done):
    rows = from_plan(done).strategies.set_index("strategy")
    wanted = rows.loc["deep_incubation", "critical_flops"]
    step = done.experiment.facts.flops_per_image["target"] * load_settings("smoke").training.batch_size
    assert abs(rows.loc["end_to_end_longer", "flops"] - 3 * wanted) <= step
    assert abs(rows.loc["end_to_end_longer", "critical_flops"] - wanted) <= step / 3


def test_how_long_plain_training_is_does_not_change_what_k_workers_do(tmp_path, monkeypatch):
    """As in the studies, where `phases` sets the epochs of end to end."""
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    todo = plan(load_settings("smoke", ["phases.end_to_end.epochs=2"]), ["end_to_end", "end_to_end_longer", "deep_incubation"])
    meta, module, tuned = (
        todo.flops[f"seed-0/{key}"] for key in ("meta", "deep_incubation/incubate-0", "deep_incubation/finetune")
    )
    assert todo.flops["seed-0/end_to_end_longer"] == pytest.approx(3 * (meta + module + tuned), rel=0.02)
    assert todo.flops["seed-0/end_to_end"] < todo.flops["seed-0/end_to_end_longer"] / 5


def test_a_network_that_cannot_have_smaller_images_is_planned_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    change = [
        "partition=null",
        "model={name: vgg11, img_size: 32, in_chans: 1, options: {mlp_ratio: 0.002}}",
        "data.image_size=32",
    ]
    change += ["run=[end_to_end]", "phases.finetune.epochs=1"]
    settings = load_settings("smoke", change)
    assert plan(settings, ["end_to_end"]).nodes
    with pytest.raises(SettingsError, match=sentences.small_images("end_to_end_low_resolution", 16)):
        plan(settings, ["end_to_end_low_resolution"])


def test_small_images_first(done):
    first, second = (n for n in done.nodes if n.strategy == "end_to_end_low_resolution")
    assert first.settings.model.img_size == 4 and second.settings.model.img_size == 8
    train, eval_set = load_data(first.settings.data)
    whole, _ = load_data(second.settings.data)
    assert train.shape == eval_set.shape == (1, 4, 4)
    mean = whole.images.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert (train.images.float() - mean).abs().max() <= 0.5
    begun, at_end = first.folder.load_weights(), load_trained(second.settings, second.folder, 4)
    carried = at_size(begun, at_end)
    assert carried["pos_embed"].shape == at_end.pos_embed.shape != begun["pos_embed"].shape
    assert torch.equal(carried["pos_embed"][:, 0], begun["pos_embed"][:, 0])  # the class token has no place
    assert at_size(carried, at_end) is carried
    share = first.summary()["train_flops"] / total(done, "end_to_end_low_resolution")
    assert share == pytest.approx(0.5, abs=0.1)


def test_an_experiment_is_the_same_whatever_strategies_are_known(monkeypatch):
    from incubate_lib.config import strategies

    before = load_settings("smoke").digest()
    monkeypatch.setitem(strategies.KNOWN, "another", {"kind": "end_to_end"})
    assert "another" in load_settings("smoke").strategies and load_settings("smoke").digest() == before
    assert load_settings("smoke", ["strategies.another.phases.end_to_end.lr=0.1"]).digest() != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deep_incubation.match": "end_to_end"}, "match goes round in a circle: end_to_end → deep_incubation → end_to_end"),
        (
            {"stacking.phases.incubate.lr": 0.1},
            sentences.no_meaning("phases.incubate", "kind 'deep_incubation' that trains meta"),
        ),
        ({"random_modules.phases.meta.lr": 0.1}, sentences.no_meaning("phases.meta", "kind 'deep_incubation'")),
        ({"stacking.shares": {"incubate": 0.3}}, "shares names incubate, but this strategy trains meta, finetune"),
        ({"stacking.shares": {"meta": 1.1}}, "less than or equal to 1"),
        ({"stacking.shares": {"meta": 0}}, "greater than 0"),
        (
            {"stacking.shares": {"meta": 0.5}, "stacking.phases.finetune.epochs": 3},
            "fine-tuning has the rest; do not set phases.finetune.epochs",
        ),
        ({"stacking.shares": {"meta": 1}, "stacking.phases.meta.epochs": 3}, "do not set phases.meta.epochs besides"),
        ({"stacking.shares": {"meta": 1}, "stacking.mat": {}}, "mat has no meaning: only meta is trained"),
        ({"stacking.lr_scale": {"incubate": 0.5}}, "lr_scale names incubate, but this strategy trains meta, finetune"),
        ({"random_modules.weights": "x"}, "weights are those of a meta model, which this strategy does without"),
        ({"imitation.shares": {"incubate": 1}}, "shares add up to 1, which leaves nothing for meta"),
        ({"imitation.shares": {"meta": 0.5, "incubate": 0.6}}, "shares add up to 1.1, more than the whole budget"),
        ({"deep_incubation.shares": {"meta": 0.5}}, sentences.UNMATCHED),
        ({"deep_incubation.budget": 0.5}, sentences.UNMATCHED),
        ({"stacking.budget": 0}, "greater than 0"),
        ({"end_to_end_longer.match": "mat"}, "name a deep_incubation or end_to_end or local_learning strategy without MAT"),
        ({"end_to_end_longer.match": "end_to_end"}, "with match_on: critical_path name a deep_incubation strategy"),
        ({"mat.low_resolution": {}}, "mat and low_resolution do not go together"),
        ({"infopro.low_resolution": {}}, sentences.no_meaning("low_resolution", "kind 'local_learning'")),
        ({"end_to_end_low_resolution.low_resolution": {"share": 1.0}}, "less than 1"),
        ({"stacking.match": "staking"}, sentences.did_you_mean("stacking")),
        ({"end_to_end.lr_scale": {"finetune": 0.5}}, sentences.no_meaning("lr_scale", "kind 'end_to_end'")),
        ({"deep_incubation_recommended.lr_scale": {"finetune": 0}}, "greater than 0"),
        ({"deep_incubation_recommended.lr_scale": {"end_to_end": 0.5}}, "Input should be 'meta', 'incubate' or 'finetune'"),
        ({"deep_incubation_recommended.warmup_share": {"meta": 1.5}}, "less than or equal to 1"),
    ],
)
def test_bad_strategies(changes, message, tmp_path, monkeypatch):
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    overrides = [f"strategies.{field}={json.dumps(value)}" for field, value in changes.items()]
    with pytest.raises(SettingsError, match="(?s)" + message.replace("(", r"\(").replace(".", r"\.")):
        load_settings("smoke", overrides)


@pytest.mark.parametrize(
    ("changes", "strategy", "message"),
    [
        (["strategies.end_to_end_low_resolution.low_resolution.img_size=3"], "end_to_end", "divisible by its patches"),
        (["strategies.end_to_end_low_resolution.low_resolution.img_size=8"], "end_to_end", "must be smaller than"),
        (["strategies.stacking.phases.meta.epochs=100"], "stacking", "its other phases cost more than that already"),
        (["strategies.stacking.phases.meta.epochs=10", "strategies.stacking.phases.finetune.warmup_epochs=1.5"], "stacking",
         "which leaves its phase finetune"),
        (["data.resize=9"], "end_to_end", "data.resize is 9, but the images have 8 × 8 pixels"),
        (["phases.end_to_end.epochs=9", "strategies.mat.budget=0.5"], "mat", "budget has no meaning: phases say already"),
        (["model.patch_size=8"], "end_to_end_low_resolution",
         f"{sentences.small_images('end_to_end_low_resolution', 8)}: it must be smaller"),
    ],
)  # fmt: skip
def test_strategies_that_do_not_fit(changes, strategy, message, tmp_path, monkeypatch):
    monkeypatch.setenv("INCUBATE_DATA", str(tmp_path))
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        plan(load_settings("smoke", changes), [strategy])
